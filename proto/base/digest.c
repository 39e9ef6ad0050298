/*
 * digest.c: SHA-256 through libcrypto, and the block digest; the only file that sees openssl/.
 *
 * Any thread, no state. Integers enter the hash as little-endian bytes, made by hand, so that the
 * digest is the same on every machine.
 */
#include "base/digest.h"

#include <openssl/evp.h>
#include <string.h>

#include "base/le.h"

#define TOKENS_PER_TURN 256u

static const char block_tag[] = "kvasir-block-v1"; /* hashed without its NUL */

static bool hash_bytes(EVP_MD_CTX *ctx, const void *data, size_t len_bytes)
{
    return len_bytes == 0 || EVP_DigestUpdate(ctx, data, len_bytes) == 1;
}

static bool hash_u32(EVP_MD_CTX *ctx, uint32_t value)
{
    unsigned char bytes[4];
    kvc_le_put(bytes, value, 4);
    return hash_bytes(ctx, bytes, sizeof(bytes));
}

static bool hash_tokens(EVP_MD_CTX *ctx, const uint32_t *tokens, uint32_t n_tokens)
{
    unsigned char bytes[TOKENS_PER_TURN * 4];
    for (uint32_t first = 0; first < n_tokens; first += TOKENS_PER_TURN) {
        uint32_t n = n_tokens - first < TOKENS_PER_TURN ? n_tokens - first : TOKENS_PER_TURN;
        for (uint32_t i = 0; i < n; i++)
            kvc_le_put(bytes + (size_t)i * 4, tokens[first + i], 4);
        if (!hash_bytes(ctx, bytes, (size_t)n * 4))
            return false;
    }
    return true;
}

kvc_status kvc_sha256(const void *data, size_t len_bytes, kvc_digest *digest_p)
{
    *digest_p = (kvc_digest){{0}};
    unsigned int n = 0;
    if (EVP_Digest(len_bytes == 0 ? "" : data, len_bytes, digest_p->bytes, &n, EVP_sha256(),
                   NULL) != 1)
        return KVC_IO;
    return n == KVC_DIGEST_BYTES ? KVC_OK : KVC_IO;
}

kvc_status kvc_block_digest(const kvc_digest *schema, const kvc_digest *parent,
                            const uint32_t *tokens, uint32_t n_tokens, const void *extra,
                            uint32_t extra_bytes, kvc_digest *digest_p)
{
    static const kvc_digest root;
    kvc_digest digest = {{0}};
    unsigned int n = 0;

    /* Clearing the output comes last: it may be the parent, when a chain is made in place. */
    if (n_tokens < KVC_BLOCK_TOKENS_MIN || n_tokens > KVC_BLOCK_TOKENS_MAX ||
        (extra == NULL && extra_bytes != 0)) {
        *digest_p = digest;
        return KVC_INVALID;
    }
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();
    bool ok = ctx != NULL && EVP_DigestInit_ex(ctx, EVP_sha256(), NULL) == 1 &&
              hash_bytes(ctx, block_tag, sizeof(block_tag) - 1) &&
              hash_bytes(ctx, schema->bytes, KVC_DIGEST_BYTES) &&
              hash_bytes(ctx, parent == NULL ? root.bytes : parent->bytes, KVC_DIGEST_BYTES) &&
              hash_u32(ctx, n_tokens) && hash_tokens(ctx, tokens, n_tokens) &&
              hash_u32(ctx, extra_bytes) && hash_bytes(ctx, extra, extra_bytes) &&
              EVP_DigestFinal_ex(ctx, digest.bytes, &n) == 1 && n == KVC_DIGEST_BYTES;
    EVP_MD_CTX_free(ctx);
    *digest_p = ok ? digest : root;
    return ok ? KVC_OK : KVC_IO;
}

kvc_status kvc_key_digest(const kvc_digest *schema, const void *key, size_t key_bytes,
                          kvc_digest *digest_p)
{
    unsigned int n = 0;
    kvc_digest digest;
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();
    bool ok = ctx != NULL && EVP_DigestInit_ex(ctx, EVP_sha256(), NULL) == 1 &&
              hash_bytes(ctx, schema->bytes, KVC_DIGEST_BYTES) && hash_bytes(ctx, key, key_bytes) &&
              EVP_DigestFinal_ex(ctx, digest.bytes, &n) == 1 && n == KVC_DIGEST_BYTES;
    EVP_MD_CTX_free(ctx);
    *digest_p = ok ? digest : (kvc_digest){{0}};
    return ok ? KVC_OK : KVC_IO;
}

bool kvc_digest_equal(const kvc_digest *a, const kvc_digest *b)
{
    return memcmp(a->bytes, b->bytes, KVC_DIGEST_BYTES) == 0;
}

void kvc_digest_hex(const kvc_digest *digest, char out[KVC_DIGEST_HEX_BYTES])
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < KVC_DIGEST_BYTES; i++) {
        out[2 * i] = digits[digest->bytes[i] >> 4];
        out[2 * i + 1] = digits[digest->bytes[i] & 15];
    }
    out[2 * KVC_DIGEST_BYTES] = '\0';
}

static int hex_value(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

kvc_status kvc_digest_parse(const char *text, kvc_digest *digest_p)
{
    *digest_p = (kvc_digest){{0}};
    if (strnlen(text, KVC_DIGEST_HEX_BYTES) != 2 * (size_t)KVC_DIGEST_BYTES)
        return KVC_INVALID;
    kvc_digest digest;
    for (size_t i = 0; i < KVC_DIGEST_BYTES; i++) {
        int high = hex_value(text[2 * i]), low = hex_value(text[2 * i + 1]);
        if (high < 0 || low < 0)
            return KVC_INVALID;
        digest.bytes[i] = (uint8_t)(high << 4 | low);
    }
    *digest_p = digest;
    return KVC_OK;
}
