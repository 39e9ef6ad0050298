/*
 * saved_record.c: the records of saved contexts; see saved_record.h.
 *
 * Disk threads, the ticker, and the starting thread. Invariant: no head names a body whose pieces
 * were not all synced before.
 */
#include "saved_record.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/digest.h"
#include "base/log.h"
#include "wire/wire.h"

#define HEADS       "context/"
#define BODIES      "body/"
#define ARENA_BYTES (1u << 20)
#define HEAD_BYTES  (sizeof(HEADS) + KVC_DIGEST_HEX_BYTES + KVC_MAX_NAME_BYTES + 1)
#define STRAYS      64u /* bodies removed in one walk */
#define PIECE_BYTES 64u /* of a piece's or a body's name */

static kvc_status put(kvs_store *store, const char *name, const void *data, size_t len_bytes)
{
    kvc_status status = store->ops->meta_put(store->tier, name, data, len_bytes);
    return status == KVC_AGAIN ? KVC_NO_SPACE : status; /* nothing will give way to it */
}

static void body_name(uint64_t generation, char name[PIECE_BYTES])
{
    snprintf(name, PIECE_BYTES, BODIES "%016" PRIx64, generation);
}

static void piece_name(uint64_t generation, uint32_t piece, char name[PIECE_BYTES])
{
    snprintf(name, PIECE_BYTES, "piece/%016" PRIx64 "/%08" PRIx32, generation, piece);
}

kvc_status kvs_body_create(kvs_store *store, uint64_t generation, uint32_t n_pieces,
                           kvs_body **body_p)
{
    char name[PIECE_BYTES];
    kvc_status status = KVC_OK;
    *body_p = NULL;
    kvs_body *body = calloc(1, sizeof(*body));
    if (!body)
        return KVC_NO_MEMORY;
    body->generation = generation;
    body->n_pieces = n_pieces;
    atomic_init(&body->refs, 1);
    if (store->ops) {
        body_name(generation, name);
        status = put(store, name, &n_pieces, sizeof(n_pieces));
    } else {
        body->pieces = calloc(n_pieces, sizeof(*body->pieces));
        status = body->pieces ? KVC_OK : KVC_NO_MEMORY;
    }
    if (status != KVC_OK)
        kvs_body_free(body);
    else
        *body_p = body;
    return status;
}

kvc_status kvs_body_write(kvs_store *store, kvs_body *body, uint32_t piece, const void *data,
                          size_t len_bytes)
{
    char name[PIECE_BYTES];
    if (store->ops) {
        piece_name(body->generation, piece, name);
        return put(store, name, data, len_bytes);
    }
    void *copy = malloc(len_bytes);
    if (!copy)
        return KVC_NO_MEMORY;
    memcpy(copy, data, len_bytes);
    free(body->pieces[piece]);
    body->pieces[piece] = copy;
    return KVC_OK;
}

kvc_status kvs_body_read(kvs_store *store, const kvs_body *body, uint32_t piece, size_t off_bytes,
                         size_t len_bytes, void *dst)
{
    char name[PIECE_BYTES];
    void *data;
    size_t have_bytes;
    if (!store->ops) {
        memcpy(dst, (const char *)body->pieces[piece] + off_bytes, len_bytes);
        return KVC_OK;
    }
    piece_name(body->generation, piece, name);
    kvc_status status = store->ops->meta_get(store->tier, name, &data, &have_bytes);
    if (status != KVC_OK)
        return status;
    if (off_bytes + len_bytes <= have_bytes)
        memcpy(dst, (const char *)data + off_bytes, len_bytes);
    else
        status = KVC_CORRUPT;
    free(data);
    return status;
}

void kvs_body_free(kvs_body *body)
{
    for (uint32_t i = 0; body && body->pieces && i < body->n_pieces; i++)
        free(body->pieces[i]);
    if (body)
        free(body->pieces);
    free(body);
}

/* The record of a body goes last, so that what a failure leaves is found at the next start. */
static kvc_status remove_body(kvs_store *store, uint64_t generation, uint32_t n_pieces)
{
    char name[PIECE_BYTES];
    kvc_status status = KVC_OK;
    for (uint32_t i = 0; i < n_pieces && status == KVC_OK; i++) {
        piece_name(generation, i, name);
        status = put(store, name, NULL, 0);
    }
    body_name(generation, name);
    if (status == KVC_OK)
        status = put(store, name, NULL, 0);
    if (status != KVC_OK)
        KVC_LOG_WARN(SERVER, "%s of a saved context stays until the next start: %s", name,
                     kvc_status_name(status));
    return status;
}

void kvs_body_put(kvs_store *store, kvs_body *body)
{
    if (!body || atomic_fetch_sub(&body->refs, 1) != 1)
        return;
    if (store->ops)
        (void)remove_body(store, body->generation, body->n_pieces); /* it was logged */
    kvs_body_free(body);
}

static void head_name(const kvc_digest *tenant, const char *saved, char name[HEAD_BYTES])
{
    char hex[KVC_DIGEST_HEX_BYTES];
    kvc_digest_hex(tenant, hex);
    snprintf(name, HEAD_BYTES, HEADS "%s/%s", hex, saved);
}

kvc_status kvs_head_write(kvs_store *store, const kvc_digest *tenant,
                          const kvc_saved_context *saved)
{
    char name[HEAD_BYTES];
    kvc_reply reply = {.method = KVC_GET_CONTEXT, .u.get_context.context = *saved};
    kvc_arena arena;
    const void *head;
    size_t head_bytes;
    if (!store->ops)
        return KVC_OK;
    kvc_arena_init(&arena, ARENA_BYTES);
    kvc_status status = kvc_wire_encode_reply(&reply, &arena, &head, &head_bytes);
    head_name(tenant, saved->name, name);
    if (status == KVC_OK)
        status = put(store, name, head, head_bytes);
    kvc_arena_reset(&arena);
    return status;
}

kvc_status kvs_head_drop(kvs_store *store, const kvc_digest *tenant, const char *saved)
{
    char name[HEAD_BYTES];
    if (!store->ops)
        return KVC_OK;
    head_name(tenant, saved, name);
    return put(store, name, NULL, 0);
}

typedef struct head_walk {
    kvs_head_found *found;
    void *arg;
} head_walk;

/* What the table relies on; the wire has checked the rest. */
static const char *head_fault(const char *name, const kvc_saved_context *saved,
                              kvc_digest *tenant_p)
{
    char hex[KVC_DIGEST_HEX_BYTES], own[HEAD_BYTES];
    snprintf(hex, sizeof(hex), "%s", name + sizeof(HEADS) - 1);
    if (kvc_digest_parse(hex, tenant_p) != KVC_OK)
        return "its tenant is malformed";
    head_name(tenant_p, saved->name, own);
    if (strcmp(name, own) != 0)
        return "its name is not the one in it";
    return saved->body_bytes == 0 || saved->piece_bytes == 0 ||
                   saved->body_bytes / saved->piece_bytes >= UINT32_MAX
               ? "its lengths are malformed"
               : NULL;
}

static bool each_head(void *arg, const char *name, const void *data, size_t len_bytes)
{
    const head_walk *walk = arg;
    struct iovec in = {.iov_base = (void *)(uintptr_t)data, .iov_len = len_bytes};
    const char *why = NULL;
    kvc_digest tenant;
    kvc_reply reply;
    kvc_arena arena;
    bool more = true;
    kvc_arena_init(&arena, ARENA_BYTES);
    kvc_status status = kvc_wire_decode_reply(KVC_GET_CONTEXT, &in, 1, &arena, &reply, &why);
    if (status == KVC_OK)
        why = head_fault(name, &reply.u.get_context.context, &tenant);
    if (status == KVC_OK && !why)
        more = walk->found(walk->arg, &tenant, &reply.u.get_context.context);
    else
        KVC_LOG_WARN(SERVER, "saved context %s is left out: %s", name, why ? why : "");
    kvc_arena_reset(&arena);
    return more;
}

kvc_status kvs_heads_each(kvs_store *store, kvs_head_found *found, void *arg)
{
    head_walk walk = {.found = found, .arg = arg};
    return store->ops->meta_each(store->tier, HEADS, each_head, &walk);
}

/* Bodies that no head names; removed after the walk, since it must not be written meanwhile. */
typedef struct body_walk {
    bool (*wanted)(void *arg, uint64_t generation);
    void *arg;
    uint64_t last;
    struct stray {
        uint64_t generation;
        uint32_t n_pieces;
    } strays[STRAYS];
    uint32_t n;
} body_walk;

static bool each_body(void *arg, const char *name, const void *data, size_t len_bytes)
{
    body_walk *walk = arg;
    char own[PIECE_BYTES];
    uint64_t generation;
    uint32_t n_pieces;
    if (sscanf(name, BODIES "%16" SCNx64, &generation) != 1 || len_bytes != sizeof(n_pieces))
        return true;
    body_name(generation, own);
    if (strcmp(name, own) != 0)
        return true; /* removing it would leave it where it is */
    memcpy(&n_pieces, data, sizeof(n_pieces));
    if (generation > walk->last)
        walk->last = generation;
    if (!walk->wanted(walk->arg, generation))
        walk->strays[walk->n++] = (struct stray){generation, n_pieces};
    return walk->n < STRAYS;
}

kvc_status kvs_bodies_clean(kvs_store *store, bool (*wanted)(void *arg, uint64_t generation),
                            void *arg, uint64_t *last_p)
{
    body_walk walk = {.wanted = wanted, .arg = arg};
    uint32_t n = 0;
    kvc_status status, removed = KVC_OK;
    do {
        walk.n = 0;
        status = store->ops->meta_each(store->tier, BODIES, each_body, &walk);
        for (uint32_t i = 0; i < walk.n && removed == KVC_OK; i++, n++)
            removed = remove_body(store, walk.strays[i].generation, walk.strays[i].n_pieces);
    } while (walk.n == STRAYS && removed == KVC_OK);
    if (n > 0)
        KVC_LOG_INFO(SERVER, "%u saved contexts were replaced or not finished: removed", n);
    *last_p = walk.last;
    return status;
}
