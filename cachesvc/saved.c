/*
 * saved.c: the table of saved contexts; see saved.h. Uploads are in saved_put.c.
 *
 * Any thread may look; disk threads (without lmdb: transport threads) delete. Invariant: a name's
 * record and its entry change together, under the server's record_lock, which may wait for the
 * disk; the table's own lock does not.
 */
#include "saved.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/metrics.h"
#include "saved_table.h"

kvs_saved *kvs_saved_create(kvs_server *server)
{
    kvs_saved *saved = calloc(1, sizeof(*saved));
    if (!saved)
        return NULL;
    saved->server = server;
    kvc_mutex_init(&saved->lock, KVC_RANK_LEAF);
    return saved;
}

kvsi_saved_entry *kvsi_saved_entry_new(const kvc_digest *tenant, const kvc_saved_context *from)
{
    size_t parts_bytes = from->n_tail_parts * sizeof(uint32_t), name_bytes = strlen(from->name) + 1;
    kvsi_saved_entry *e = calloc(1, sizeof(*e) + parts_bytes + name_bytes);
    if (!e)
        return NULL;
    e->tenant = *tenant;
    e->context = *from;
    if (parts_bytes > 0)
        memcpy(e->tail_parts, from->tail_parts, parts_bytes);
    e->context.tail_parts = e->tail_parts;
    e->context.name = memcpy((char *)e->tail_parts + parts_bytes, from->name, name_bytes);
    return e;
}

/* Of an entry that is in no list. */
void kvsi_saved_entry_drop(kvs_saved *saved, kvsi_saved_entry *e)
{
    if (!e)
        return;
    kvs_body_put(&saved->server->lmdb, e->body);
    kvs_schemas_put(saved->server->schemas, e->schema);
    free(e);
}

static void free_list(kvs_saved *saved, kvsi_saved_entry *e)
{
    for (kvsi_saved_entry *next; e; e = next) {
        next = e->next;
        kvs_body_free(e->body);
        kvs_schemas_put(saved->server->schemas, e->schema);
        free(e);
    }
}

void kvs_saved_destroy(kvs_saved *saved)
{
    if (!saved)
        return;
    for (kvsi_saved_entry *e = saved->list; e; e = e->next)
        KVC_GAUGE_SUB(saved_contexts, 1);
    for (kvsi_saved_entry *e = saved->uploads; e; e = e->next)
        KVC_GAUGE_SUB(saved_uploads, 1);
    free_list(saved, saved->list);
    free_list(saved, saved->uploads);
    kvc_mutex_fini(&saved->lock);
    free(saved);
}

/* Where the name is, or belongs: *link of the first entry that is not before it. Locked. */
kvsi_saved_entry **kvsi_saved_place(kvs_saved *saved, const kvc_digest *tenant, const char *name)
{
    kvsi_saved_entry **link = &saved->list;
    while (*link) {
        int order = memcmp(&(*link)->tenant, tenant, sizeof(*tenant));
        if (order > 0 || (order == 0 && strcmp((*link)->context.name, name) >= 0))
            break;
        link = &(*link)->next;
    }
    return link;
}

bool kvsi_saved_is_at(kvsi_saved_entry *const *link, const kvc_digest *tenant, const char *name)
{
    return *link && kvc_digest_equal(&(*link)->tenant, tenant) &&
           strcmp((*link)->context.name, name) == 0;
}

kvsi_saved_entry *kvsi_saved_find(kvs_saved *saved, const kvc_digest *tenant, const char *name)
{
    kvsi_saved_entry **link = kvsi_saved_place(saved, tenant, name);
    return kvsi_saved_is_at(link, tenant, name) ? *link : NULL;
}

/* ---- start ----------------------------------------------------------------------------------- */

static bool found_head(void *arg, const kvc_digest *tenant, const kvc_saved_context *head)
{
    kvs_saved *saved = arg;
    kvsi_saved_entry *e = kvsi_saved_entry_new(tenant, head);
    kvs_body *body = calloc(1, sizeof(*body));
    if (!e || !body) {
        free(e);
        free(body);
        return false;
    }
    uint64_t n_pieces = (head->body_bytes + head->piece_bytes - 1) / head->piece_bytes;
    body->generation = head->generation;
    body->n_pieces = (uint32_t)n_pieces;
    atomic_init(&body->refs, 1);
    e->body = body;
    e->schema = kvs_schemas_find(saved->server->schemas, tenant, &head->schema);
    if (!e->schema)
        KVC_LOG_WARN(SERVER, "saved context %s: its schema was lost; register it again",
                     head->name);
    if (head->generation > saved->last_generation)
        saved->last_generation = head->generation;
    kvsi_saved_entry **link = kvsi_saved_place(saved, tenant, head->name);
    e->next = *link;
    *link = e;
    KVC_GAUGE_ADD(saved_contexts, 1);
    return true;
}

static bool is_named(void *arg, uint64_t generation)
{
    kvs_saved *saved = arg;
    for (const kvsi_saved_entry *e = saved->list; e; e = e->next)
        if (e->context.generation == generation)
            return true;
    return false;
}

kvc_status kvs_saved_load(kvs_saved *saved)
{
    uint64_t last = 0;
    uint32_t n = 0;
    kvc_status status = kvs_heads_each(&saved->server->lmdb, found_head, saved);
    if (status == KVC_OK)
        status = kvs_bodies_clean(&saved->server->lmdb, is_named, saved, &last);
    if (status == KVC_CORRUPT) {
        KVC_LOG_ERROR(SERVER, "saved contexts were lost: records of them are damaged");
        status = KVC_OK;
    }
    if (last > saved->last_generation)
        saved->last_generation = last;
    for (const kvsi_saved_entry *e = saved->list; e; e = e->next)
        n++;
    if (n)
        KVC_LOG_INFO(SERVER, "%u contexts are saved by name", n);
    return status;
}

/* ---- get, list, delete ----------------------------------------------------------------------- */

/* A copy in the arena. */
static bool copy_head(const kvc_saved_context *from, bool parts, kvc_arena *arena,
                      kvc_saved_context *to_p)
{
    size_t name_bytes = strlen(from->name) + 1, n = parts ? from->n_tail_parts : 0;
    char *name = kvc_arena_alloc(arena, name_bytes);
    uint32_t *ids = kvc_arena_alloc(arena, n * sizeof(*ids) + 1);
    if (!name || !ids)
        return false;
    *to_p = *from;
    to_p->name = memcpy(name, from->name, name_bytes);
    memcpy(ids, from->tail_parts, n * sizeof(*ids));
    to_p->tail_parts = ids;
    to_p->n_tail_parts = (uint32_t)n;
    return true;
}

kvc_status kvs_saved_get(kvs_saved *saved, const kvc_digest *tenant, const char *name,
                         uint64_t generation, kvc_arena *arena, kvs_saved_got *got_p,
                         char why[KVS_SAVED_WHY_BYTES])
{
    kvc_status status = KVC_OK;
    kvc_mutex_lock(&saved->lock);
    const kvsi_saved_entry *e = kvsi_saved_find(saved, tenant, name);
    if (!e) {
        status = KVC_NOT_FOUND;
        snprintf(why, KVS_SAVED_WHY_BYTES, "no context is saved under this name");
    } else if (generation != 0 && generation != e->context.generation) {
        status = KVC_NOT_FOUND;
        snprintf(why, KVS_SAVED_WHY_BYTES, "generation %" PRIu64 " was replaced by %" PRIu64,
                 generation, e->context.generation);
    } else if (!copy_head(&e->context, true, arena, &got_p->context)) {
        status = KVC_NO_MEMORY;
        snprintf(why, KVS_SAVED_WHY_BYTES, "memory is out");
    } else {
        got_p->body = e->body;
        atomic_fetch_add(&e->body->refs, 1);
    }
    kvc_mutex_unlock(&saved->lock);
    return status;
}

kvc_status kvs_saved_read(kvs_saved *saved, const kvs_saved_got *got, uint64_t off_bytes,
                          size_t len_bytes, void *dst)
{
    char *at = dst;
    uint32_t piece_bytes = got->context.piece_bytes;
    kvc_status status = KVC_OK;
    while (status == KVC_OK && len_bytes > 0) {
        size_t within = (size_t)(off_bytes % piece_bytes);
        size_t n = piece_bytes - within < len_bytes ? piece_bytes - within : len_bytes;
        status = kvs_body_read(&saved->server->lmdb, got->body, (uint32_t)(off_bytes / piece_bytes),
                               within, n, at);
        off_bytes += n;
        len_bytes -= n;
        at += n;
    }
    return status;
}

void kvs_saved_put_back(kvs_saved *saved, kvs_saved_got *got)
{
    kvs_body_put(&saved->server->lmdb, got->body);
}

kvc_status kvs_saved_list(kvs_saved *saved, const kvc_digest *tenant, const char *after,
                          uint32_t max, kvc_arena *arena, kvc_saved_context **list_p, uint32_t *n_p,
                          bool *more_p)
{
    uint32_t n = 0;
    kvc_status status = KVC_OK;
    kvc_saved_context *list = kvc_arena_calloc(arena, max, sizeof(*list));
    if (!list)
        return KVC_NO_MEMORY;
    kvc_mutex_lock(&saved->lock);
    kvsi_saved_entry **link = kvsi_saved_place(saved, tenant, after);
    const kvsi_saved_entry *e = kvsi_saved_is_at(link, tenant, after) ? (*link)->next : *link;
    for (; e && n < max && kvc_digest_equal(&e->tenant, tenant) && status == KVC_OK; e = e->next)
        status = copy_head(&e->context, false, arena, &list[n++]) ? KVC_OK : KVC_NO_MEMORY;
    *more_p = e && kvc_digest_equal(&e->tenant, tenant);
    kvc_mutex_unlock(&saved->lock);
    *list_p = list;
    *n_p = n;
    return status;
}

kvc_status kvs_saved_delete(kvs_saved *saved, const kvc_digest *tenant, const char *name,
                            uint64_t if_generation, char why[KVS_SAVED_WHY_BYTES])
{
    kvs_server *server = saved->server;
    kvsi_saved_entry *old = NULL;
    kvc_status status = KVC_OK;
    kvc_mutex_lock(&server->record_lock);
    kvc_mutex_lock(&saved->lock);
    const kvsi_saved_entry *have = kvsi_saved_find(saved, tenant, name);
    uint64_t generation = have ? have->context.generation : 0;
    kvc_mutex_unlock(&saved->lock);
    snprintf(why, KVS_SAVED_WHY_BYTES, "it cannot be removed");
    if (!have) {
        status = KVC_NOT_FOUND;
        snprintf(why, KVS_SAVED_WHY_BYTES, "no context is saved under this name");
    } else if (if_generation != 0 && if_generation != generation) {
        status = KVC_EXISTS;
        snprintf(why, KVS_SAVED_WHY_BYTES, "generation %" PRIu64 " is saved under this name",
                 generation);
    } else {
        status = kvs_head_drop(&server->lmdb, tenant, name);
    }
    if (status == KVC_OK) {
        kvc_mutex_lock(&saved->lock);
        kvsi_saved_entry **link = kvsi_saved_place(saved, tenant, name);
        old = *link;
        KVC_ASSERT(old); /* record_lock is held: it is still there */
        *link = old->next;
        kvc_mutex_unlock(&saved->lock);
        KVC_GAUGE_SUB(saved_contexts, 1);
    }
    kvc_mutex_unlock(&server->record_lock);
    kvsi_saved_entry_drop(saved, old);
    return status;
}
