/*
 * place.c: see place.h.
 *
 * The digest is mixed before the key is added, so that neither bits which digests share nor keys
 * that differ in few bits make servers win together. A tie needs two equal keys, since mix is a
 * bijection; the rule for one is there so that the answer never depends on the list's order.
 */
#include "place.h"

#include <string.h>

#include "assert.h"
#include "digest.h"
#include "le.h"

static const char domain[] = "kvasir-place-v1";

kvc_status kvc_place_key(const char *name, uint64_t *key_p)
{
    char text[sizeof(domain) + KVC_MAX_NAME_BYTES];
    size_t head = sizeof(domain) - 1, len = strnlen(name, KVC_MAX_NAME_BYTES + 1);
    kvc_digest digest;
    *key_p = 0;
    if (len == 0 || len > KVC_MAX_NAME_BYTES)
        return KVC_INVALID;
    memcpy(text, domain, head);
    memcpy(text + head, name, len);
    kvc_status status = kvc_sha256(text, head + len, &digest);
    if (status == KVC_OK)
        *key_p = kvc_le_get(digest.bytes, 8);
    return status;
}

static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

uint32_t kvc_place_owner(const uint64_t *keys, uint32_t n, const kvc_digest *digest)
{
    uint64_t block = mix(kvc_le_get(digest->bytes, 8)), best = 0;
    uint32_t owner = 0;
    KVC_ASSERT(n > 0);
    for (uint32_t i = 0; i < n; i++) {
        uint64_t score = mix(keys[i] ^ block);
        if (i == 0 || score > best || (score == best && keys[i] < keys[owner])) {
            best = score;
            owner = i;
        }
    }
    return owner;
}
