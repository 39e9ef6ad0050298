/*
 * saved_put.c: how contexts get saved, piece by piece; see saved.h.
 *
 * Disk threads (without lmdb: transport threads) put; the ticker sweeps. Invariants: an upload that
 * is busy belongs to the thread that writes its piece; its head is written after all its pieces.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/metrics.h"
#include "saved_table.h"

/* The lengths against the schema; *body_bytes_p is what they come to. */
static kvc_status check_shape(const kvs_saved_piece *piece, uint64_t *body_bytes_p, char *why)
{
    const kvc_saved_context *c = piece->context;
    uint32_t block_tokens = piece->schema->block_tokens;
    uint64_t n_tokens = (uint64_t)c->n_blocks * block_tokens + c->n_tail, row_bytes = 0;
    if (c->n_tail >= block_tokens) {
        snprintf(why, KVS_SAVED_WHY_BYTES, "n_tail is %u: a tail is shorter than a block, %u",
                 c->n_tail, block_tokens);
        return KVC_INVALID;
    }
    if (c->n_ids != 0 && c->n_ids != n_tokens) {
        snprintf(why, KVS_SAVED_WHY_BYTES, "%u ids for %" PRIu64 " tokens of blocks and tail",
                 c->n_ids, n_tokens);
        return KVC_INVALID;
    }
    for (uint32_t i = 0; i < c->n_tail_parts; i++) {
        int place = kvs_schema_part(piece->schema, c->tail_parts[i]);
        if (place < 0 || (i > 0 && c->tail_parts[i] <= c->tail_parts[i - 1])) {
            snprintf(why, KVS_SAVED_WHY_BYTES, "tail part %u is %s", c->tail_parts[i],
                     place < 0 ? "not in the schema" : "not behind the one before it");
            return KVC_INVALID;
        }
        row_bytes += piece->schema->parts[place].row_bytes;
    }
    *body_bytes_p =
        (uint64_t)c->n_blocks * KVC_DIGEST_BYTES + 4ull * c->n_ids + c->n_tail * row_bytes;
    if (*body_bytes_p == 0)
        snprintf(why, KVS_SAVED_WHY_BYTES, "there is nothing to save: no blocks, ids or rows");
    return *body_bytes_p == 0 ? KVC_INVALID : KVC_OK;
}

/* May the name be taken? Locked. */
static kvc_status check_name(kvs_saved *saved, const kvc_digest *tenant, const char *name,
                             bool replace, uint64_t if_generation, char *why)
{
    const kvsi_saved_entry *have = kvsi_saved_find(saved, tenant, name);
    if (!have && if_generation != 0) {
        snprintf(why, KVS_SAVED_WHY_BYTES, "no context is saved under this name");
        return KVC_NOT_FOUND;
    }
    if (!have || replace || have->context.generation == if_generation)
        return KVC_OK;
    snprintf(why, KVS_SAVED_WHY_BYTES, "generation %" PRIu64 " is saved under this name",
             have->context.generation);
    return KVC_EXISTS;
}

/* What a tenant, and all of them together, have saved or are saving. */
typedef struct taken {
    uint64_t all_bytes, own_bytes;
    uint32_t n, n_uploads; /* the tenant's */
} taken;

static void count_list(const kvsi_saved_entry *e, const kvc_digest *tenant, taken *t, uint32_t *n_p)
{
    for (; e; e = e->next) {
        bool own = kvc_digest_equal(&e->tenant, tenant);
        t->all_bytes += e->context.body_bytes;
        t->own_bytes += own ? e->context.body_bytes : 0;
        *n_p += own;
    }
}

static uint64_t cap_of(const kvs_server *server)
{
    uint64_t cap_bytes = server->settings.max_saved_bytes;
    return !server->lmdb.ops && cap_bytes > KVS_SAVED_MEMORY_BYTES ? KVS_SAVED_MEMORY_BYTES
                                                                   : cap_bytes;
}

uint64_t kvs_saved_tenant_cap(const kvs_server *server)
{
    uint64_t share_bytes = server->settings.max_saved_tenant_bytes, cap_bytes = cap_of(server);
    if (share_bytes == 0)
        share_bytes = cap_bytes / 2;
    return share_bytes < cap_bytes ? share_bytes : cap_bytes;
}

/* Is there room for one more of body_bytes? Locked. */
static kvc_status check_room(kvs_saved *saved, const kvc_digest *tenant, uint64_t body_bytes,
                             char *why)
{
    const kvs_settings *s = &saved->server->settings;
    uint64_t cap_bytes = cap_of(saved->server);
    taken t = {.all_bytes = body_bytes, .own_bytes = body_bytes};
    uint64_t share_bytes = kvs_saved_tenant_cap(saved->server);
    count_list(saved->list, tenant, &t, &t.n);
    count_list(saved->uploads, tenant, &t, &t.n_uploads);
    why[0] = '\0';
    if (t.n + t.n_uploads >= s->max_saved)
        snprintf(why, KVS_SAVED_WHY_BYTES, "the tenant has max_saved %" PRIu64 ": delete one",
                 s->max_saved);
    else if (t.own_bytes > share_bytes)
        snprintf(why, KVS_SAVED_WHY_BYTES,
                 "the tenant's share of max_saved_bytes is %" PRIu64
                 "; its contexts would come to %" PRIu64 ": delete some",
                 share_bytes, t.own_bytes);
    else if (t.all_bytes > cap_bytes)
        snprintf(why, KVS_SAVED_WHY_BYTES,
                 "max_saved_bytes is %" PRIu64 "; all would come to %" PRIu64, cap_bytes,
                 t.all_bytes);
    if (why[0]) {
        KVC_COUNT(saved_refused);
        return KVC_NO_SPACE;
    }
    if (t.n_uploads < KVS_SAVED_UPLOADS)
        return KVC_OK;
    snprintf(why, KVS_SAVED_WHY_BYTES, "%u contexts are being saved already", t.n_uploads);
    return KVC_AGAIN;
}

static bool same_head(const kvc_saved_context *a, const kvc_saved_context *b)
{
    return strcmp(a->name, b->name) == 0 && kvc_digest_equal(&a->schema, &b->schema) &&
           a->n_blocks == b->n_blocks && a->n_ids == b->n_ids && a->n_tail == b->n_tail &&
           a->n_tail_parts == b->n_tail_parts &&
           (a->n_tail_parts == 0 ||
            memcmp(a->tail_parts, b->tail_parts, a->n_tail_parts * sizeof(uint32_t)) == 0);
}

/* Does the piece go on where the upload e stands? The first one sets the length of the others. */
static kvc_status check_piece(const kvsi_saved_entry *e, const kvs_saved_piece *piece, char *why)
{
    uint64_t end = piece->offset + piece->len_bytes, body_bytes = e->context.body_bytes;
    uint32_t piece_bytes = e->received ? e->context.piece_bytes : (uint32_t)piece->len_bytes;
    why[0] = '\0';
    if (!same_head(&e->context, piece->context))
        snprintf(why, KVS_SAVED_WHY_BYTES, "the context is not the one of the first piece");
    else if (piece->offset != e->received)
        snprintf(why, KVS_SAVED_WHY_BYTES, "the next piece begins at %" PRIu64, e->received);
    else if (piece->len_bytes == 0 || end > body_bytes)
        snprintf(why, KVS_SAVED_WHY_BYTES,
                 "%" PRIu64 " bytes at %" PRIu64 "; the body has %" PRIu64, piece->len_bytes,
                 piece->offset, body_bytes);
    else if (end < body_bytes && piece->len_bytes < KVC_MIN_SAVED_PIECE)
        snprintf(why, KVS_SAVED_WHY_BYTES, "a piece but the last has at least %u bytes",
                 KVC_MIN_SAVED_PIECE);
    else if (end < body_bytes ? piece->len_bytes != piece_bytes : piece->len_bytes > piece_bytes)
        snprintf(why, KVS_SAVED_WHY_BYTES, "the pieces of this upload have %u bytes", piece_bytes);
    return why[0] ? KVC_INVALID : KVC_OK;
}

static kvsi_saved_entry *find_upload(kvs_saved *saved, const kvc_digest *tenant, uint64_t upload)
{
    for (kvsi_saved_entry *e = saved->uploads; e; e = e->next)
        if (e->context.upload == upload && kvc_digest_equal(&e->tenant, tenant))
            return e;
    return NULL;
}

/* A new upload, in the list; *e_p NULL on failure. Locked. */
static kvc_status start_upload(kvs_saved *saved, const kvs_saved_piece *piece, uint64_t body_bytes,
                               kvsi_saved_entry **e_p, char *why)
{
    const kvc_digest *tenant = &piece->schema->tenant;
    *e_p = NULL;
    if (piece->offset != 0) {
        snprintf(why, KVS_SAVED_WHY_BYTES,
                 "upload %016" PRIx64 " is not here: it rested too long, or the server was "
                 "restarted; begin at 0",
                 piece->upload);
        return KVC_NOT_FOUND;
    }
    kvc_status status =
        check_name(saved, tenant, piece->context->name, piece->replace, piece->if_generation, why);
    if (status == KVC_OK)
        status = check_room(saved, tenant, body_bytes, why);
    if (status != KVC_OK)
        return status;
    kvsi_saved_entry *e = kvsi_saved_entry_new(tenant, piece->context);
    if (!e) {
        snprintf(why, KVS_SAVED_WHY_BYTES, "memory is out");
        return KVC_NO_MEMORY;
    }
    uint64_t now = kvc_wall_ns();
    saved->last_generation = now > saved->last_generation ? now : saved->last_generation + 1;
    e->context.generation = saved->last_generation;
    e->context.upload = piece->upload;
    e->context.body_bytes = body_bytes;
    e->context.piece_bytes = 0;
    e->context.promise = saved->server->lmdb.ops ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY;
    e->replace = piece->replace;
    e->if_generation = piece->if_generation;
    e->next = saved->uploads;
    saved->uploads = e;
    KVC_GAUGE_ADD(saved_uploads, 1);
    *e_p = e;
    return KVC_OK;
}

/* The upload of a piece, busy for the caller. OK with *e_p NULL: the piece was taken before. */
static kvc_status begin_piece(kvs_saved *saved, const kvs_saved_piece *piece, uint64_t body_bytes,
                              kvsi_saved_entry **e_p, uint64_t *received_p, uint64_t *generation_p,
                              char *why)
{
    const kvc_digest *tenant = &piece->schema->tenant;
    uint64_t end = piece->offset + piece->len_bytes;
    kvc_status status = KVC_OK;
    *e_p = NULL;
    kvc_mutex_lock(&saved->lock);
    const kvsi_saved_entry *done = kvsi_saved_find(saved, tenant, piece->context->name);
    kvsi_saved_entry *e = find_upload(saved, tenant, piece->upload);
    if (!e && done && done->context.upload == piece->upload && end == done->context.body_bytes) {
        *received_p = end;
        *generation_p = done->context.generation;
        goto unlock;
    }
    if (e && e->busy) {
        snprintf(why, KVS_SAVED_WHY_BYTES, "a piece of this upload is being written");
        status = KVC_AGAIN;
        goto unlock;
    }
    if (e && e->received > 0 && end == e->received && same_head(&e->context, piece->context)) {
        *received_p = end;
        goto unlock;
    }
    bool fresh = !e;
    if (fresh)
        status = start_upload(saved, piece, body_bytes, &e, why);
    if (status == KVC_OK)
        status = check_piece(e, piece, why);
    if (e) {
        e->busy = true;
        *e_p = e;
    }
    if (e && fresh && status == KVC_OK)
        e->context.piece_bytes = (uint32_t)piece->len_bytes;
unlock:
    kvc_mutex_unlock(&saved->lock);
    return status;
}

/* Takes an upload out of the list. */
static void cut_upload(kvs_saved *saved, kvsi_saved_entry *e)
{
    kvc_mutex_lock(&saved->lock);
    kvsi_saved_entry **link = &saved->uploads;
    while (*link != e)
        link = &(*link)->next;
    *link = e->next;
    kvc_mutex_unlock(&saved->lock);
    KVC_GAUGE_SUB(saved_uploads, 1);
}

static kvc_status write_piece(kvs_saved *saved, kvsi_saved_entry *e, const kvs_saved_piece *piece)
{
    kvs_store *store = &saved->server->lmdb;
    uint64_t piece_bytes = e->context.piece_bytes;
    kvc_status status = KVC_OK;
    if (!e->body) {
        e->schema = piece->schema;
        kvs_schemas_hold(saved->server->schemas, e->schema);
        status = kvs_body_create(
            store, e->context.generation,
            (uint32_t)((e->context.body_bytes + piece_bytes - 1) / piece_bytes), &e->body);
    }
    if (status != KVC_OK)
        return status;
    uint32_t number = (uint32_t)(piece->offset / piece_bytes);
    if (piece->n_data == 1)
        return kvs_body_write(store, e->body, number, piece->data[0].iov_base, piece->len_bytes);
    char *flat = malloc(piece->len_bytes);
    if (!flat)
        return KVC_NO_MEMORY;
    size_t at = 0;
    for (uint32_t i = 0; i < piece->n_data; i++) {
        memcpy(flat + at, piece->data[i].iov_base, piece->data[i].iov_len);
        at += piece->data[i].iov_len;
    }
    status = kvs_body_write(store, e->body, number, flat, piece->len_bytes);
    free(flat);
    return status;
}

/* Makes a whole upload, which is in no list, what its name stands for. Takes e on OK. */
static kvc_status publish(kvs_saved *saved, kvsi_saved_entry *e, char *why)
{
    kvs_server *server = saved->server;
    kvsi_saved_entry *old = NULL;
    e->context.saved_unix_ms = kvc_wall_ns() / 1000000;
    kvc_mutex_lock(&server->record_lock);
    kvc_mutex_lock(&saved->lock);
    kvc_status status =
        check_name(saved, &e->tenant, e->context.name, e->replace, e->if_generation, why);
    kvc_mutex_unlock(&saved->lock);
    if (status == KVC_OK)
        status = kvs_head_write(&server->lmdb, &e->tenant, &e->context);
    if (status == KVC_OK) {
        kvc_mutex_lock(&saved->lock);
        kvsi_saved_entry **link = kvsi_saved_place(saved, &e->tenant, e->context.name);
        if (kvsi_saved_is_at(link, &e->tenant, e->context.name))
            old = *link;
        e->next = old ? old->next : *link;
        *link = e;
        kvc_mutex_unlock(&saved->lock);
        KVC_GAUGE_ADD(saved_contexts, old ? 0 : 1);
    }
    kvc_mutex_unlock(&server->record_lock);
    kvsi_saved_entry_drop(saved, old);
    return status;
}

kvc_status kvs_saved_put(kvs_saved *saved, const kvs_saved_piece *piece, uint64_t *received_p,
                         uint64_t *generation_p, char why[KVS_SAVED_WHY_BYTES])
{
    kvsi_saved_entry *e;
    uint64_t body_bytes;
    *received_p = *generation_p = 0;
    why[0] = '\0';
    kvc_status status = check_shape(piece, &body_bytes, why);
    if (status != KVC_OK)
        return status;
    status = begin_piece(saved, piece, body_bytes, &e, received_p, generation_p, why);
    if (!e)
        return status;
    if (status == KVC_OK) {
        status = write_piece(saved, e, piece);
        if (status == KVC_OK)
            e->received += piece->len_bytes;
    }
    bool whole = e->received == e->context.body_bytes;
    bool never = e->received == 0; /* its first piece failed */
    uint64_t generation = e->context.generation, received = e->received;
    if (whole || never) {
        cut_upload(saved, e);
        if (whole)
            status = publish(saved, e, why);
        if (status != KVC_OK)
            kvsi_saved_entry_drop(saved, e);
    } else {
        kvc_mutex_lock(&saved->lock);
        e->expires_ns = kvc_deadline_ns(KVS_SAVED_UPLOAD_NS);
        e->busy = false;
        kvc_mutex_unlock(&saved->lock);
    }
    if (status != KVC_OK && !why[0])
        snprintf(why, KVS_SAVED_WHY_BYTES, "it cannot be stored");
    if (status == KVC_OK) {
        *received_p = received;
        *generation_p = whole ? generation : 0;
    }
    return status;
}

void kvs_saved_sweep(kvs_saved *saved, uint64_t now_ns)
{
    for (;;) {
        kvsi_saved_entry *due = NULL;
        kvc_mutex_lock(&saved->lock);
        for (kvsi_saved_entry *e = saved->uploads; e && !due; e = e->next)
            if (!e->busy && e->expires_ns <= now_ns)
                due = e;
        if (due)
            due->busy = true;
        kvc_mutex_unlock(&saved->lock);
        if (!due)
            return;
        KVC_LOG_INFO(SERVER, "an upload of saved context %s rested too long: dropped",
                     due->context.name);
        cut_upload(saved, due);
        kvsi_saved_entry_drop(saved, due);
    }
}
