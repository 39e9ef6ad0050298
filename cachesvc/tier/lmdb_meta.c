/*
 * lmdb_meta.c: small named records beside the values, in an environment of their own.
 *
 * Thread: any; one put at a time under the meta lock, which is held while the disk works. Records
 * are the XXH3-64 of the data, then the data. A put returns after a full sync.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/metrics.h"
#include "base/sum.h"
#include "lmdb_tier.h"

#define SUM_BYTES 8u
#define MAX_TRIES 3u

typedef struct meta_put {
    kvsi_env *env;
    const char *name;
    const void *data;
    size_t len_bytes;
} meta_put;

/* Under a guard. */
static int put_guarded(void *arg)
{
    const meta_put *p = arg;
    uint64_t sum = kvc_value_sum(p->data, p->len_bytes);
    MDB_val key = {strlen(p->name), (void *)(uintptr_t)p->name};
    MDB_val value = {SUM_BYTES + p->len_bytes, NULL};
    MDB_txn *txn;
    int rc = mdb_txn_begin(p->env->env, NULL, 0, &txn);

    if (rc != MDB_SUCCESS)
        return rc;
    if (p->len_bytes == 0)
        rc = mdb_del(txn, p->env->dbi, &key, NULL);
    else
        rc = mdb_put(txn, p->env->dbi, &key, &value, MDB_RESERVE);
    if (rc == MDB_NOTFOUND)
        rc = MDB_SUCCESS; /* gone already */
    if (rc != MDB_SUCCESS) {
        mdb_txn_abort(txn);
        return rc;
    }
    if (p->len_bytes > 0) {
        memcpy(value.mv_data, &sum, SUM_BYTES);
        memcpy((uint8_t *)value.mv_data + SUM_BYTES, p->data, p->len_bytes);
    }
    return mdb_txn_commit(txn);
}

static int put_once(kvsi_env *env, const char *name, const void *data, size_t len_bytes)
{
    meta_put p = {env, name, data, len_bytes};

    if (atomic_load(&env->faulted) || !kvsi_env_is_there(env))
        return EIO;
    int rc = kvsi_env_run(env, put_guarded, &p);
    if (rc == MDB_SUCCESS)
        KVC_COUNT(lmdb_commits);
    return rc;
}

/* After a full map: more budget where there is some, else pages that were freed before. */
static kvc_status make_room(kvs_tier *tier, size_t len_bytes)
{
    uint64_t old = tier->meta.map_pages;
    uint64_t pages = kvsi_claim_meta(tier, old, old + 2 * (len_bytes / KVSI_PAGE_BYTES) + 32);

    if (pages > old && kvsi_env_grow(&tier->meta, pages) == KVC_OK) {
        tier->meta.map_pages = pages;
        return KVC_OK;
    }
    kvsi_unclaim(tier, pages - old);
    kvsi_env_drain(&tier->meta);
    return kvsi_env_tick(&tier->meta);
}

static kvc_status put_locked(kvs_tier *tier, const char *name, const void *data, size_t len_bytes)
{
    kvsi_env_pages pages;
    int rc = MDB_MAP_FULL;

    for (uint32_t tries = 0; tries < MAX_TRIES && rc == MDB_MAP_FULL; tries++) {
        if (tries > 0 && make_room(tier, len_bytes) != KVC_OK)
            break;
        rc = put_once(&tier->meta, name, data, len_bytes);
    }
    if (rc != MDB_SUCCESS) {
        KVC_LOG_ERROR(TIER, "lmdb: meta record \"%s\" of %zu bytes: %s", name, len_bytes,
                      mdb_strerror(rc));
        return kvsi_lmdb_status(rc);
    }
    kvc_status status = kvsi_env_sync(&tier->meta);
    if (status == KVC_OK)
        status = kvsi_env_count(&tier->meta, &pages);
    if (status == KVC_OK) {
        kvc_mutex_lock(&tier->lock);
        tier->meta_used_pages = pages.records + pages.tree;
        kvc_mutex_unlock(&tier->lock);
    }
    return status;
}

kvc_status kvsi_meta_put(kvs_tier *tier, const char *name, const void *data, size_t len_bytes)
{
    size_t name_bytes = strlen(name);

    if (name_bytes == 0 || name_bytes > KVSI_MAX_META_NAME || len_bytes > KVSI_MAX_META_BYTES)
        return KVC_INVALID;
    kvc_mutex_lock(&tier->meta_lock);
    kvc_status status = put_locked(tier, name, data, len_bytes);
    kvc_mutex_unlock(&tier->meta_lock);
    return status;
}

/* One record on its way out of the map. */
typedef struct meta_get {
    kvsi_env *env;
    MDB_txn *txn;
    MDB_cursor *cursor;
    const char *prefix; /* NULL: that very name */
    char name[KVSI_MAX_NAME + 1];
    size_t name_bytes, len_bytes, room_bytes;
    uint8_t *bytes; /* malloc'd, room_bytes of it; holds len_bytes if there is room for them */
} meta_get;

/* Under a guard: the first record after g->name that has the prefix, or the one of that name. */
static int get_one(void *arg)
{
    meta_get *g = arg;
    MDB_val key = {g->name_bytes, g->name}, value;
    int rc = mdb_cursor_open(g->txn, g->env->dbi, &g->cursor);

    if (rc != MDB_SUCCESS)
        return rc;
    rc = mdb_cursor_get(g->cursor, &key, &value, g->name_bytes > 0 ? MDB_SET_RANGE : MDB_FIRST);
    bool same = rc == MDB_SUCCESS && key.mv_size == g->name_bytes &&
                memcmp(key.mv_data, g->name, key.mv_size) == 0;
    if (g->prefix != NULL && same)
        rc = mdb_cursor_get(g->cursor, &key, &value, MDB_NEXT);
    if (rc != MDB_SUCCESS)
        return rc;
    if (g->prefix == NULL ? !same
                          : key.mv_size < strlen(g->prefix) ||
                                memcmp(key.mv_data, g->prefix, strlen(g->prefix)) != 0)
        return MDB_NOTFOUND;
    g->len_bytes = value.mv_size;
    if (value.mv_size > g->room_bytes || key.mv_size > KVSI_MAX_NAME)
        return key.mv_size > KVSI_MAX_NAME ? MDB_CORRUPTED : MDB_SUCCESS;
    memcpy(g->bytes, value.mv_data, value.mv_size);
    memcpy(g->name, key.mv_data, key.mv_size);
    g->name_bytes = key.mv_size;
    g->name[key.mv_size] = '\0';
    return MDB_SUCCESS;
}

/* A record, copied; makes room for it where that is missing. NOT_FOUND: there is none. */
static kvc_status copy_record(meta_get *g)
{
    for (;;) {
        kvc_status status = kvsi_env_read_begin(g->env, &g->txn);
        if (status != KVC_OK)
            return status;
        g->cursor = NULL;
        int rc = kvsi_env_look(g->env, get_one, g);
        if (g->cursor != NULL)
            mdb_cursor_close(g->cursor);
        kvsi_env_read_end(g->env, g->txn);
        if (rc != MDB_SUCCESS || g->len_bytes <= g->room_bytes)
            return kvsi_lmdb_status(rc);
        if (g->len_bytes > KVSI_MAX_META_BYTES + SUM_BYTES)
            return KVC_CORRUPT;
        uint8_t *more = realloc(g->bytes, g->len_bytes);
        if (more == NULL)
            return KVC_NO_MEMORY;
        g->bytes = more;
        g->room_bytes = g->len_bytes;
    }
}

static bool is_right(const meta_get *g)
{
    uint64_t sum;

    if (g->name_bytes == 0 || g->name_bytes > KVSI_MAX_META_NAME || g->len_bytes < SUM_BYTES)
        return false;
    memcpy(&sum, g->bytes, SUM_BYTES);
    return sum == kvc_value_sum(g->bytes + SUM_BYTES, g->len_bytes - SUM_BYTES);
}

kvc_status kvsi_meta_get(kvs_tier *tier, const char *name, void **data_p, size_t *len_bytes_p)
{
    meta_get g = {.env = &tier->meta, .name_bytes = strlen(name)};

    *data_p = NULL;
    *len_bytes_p = 0;
    if (g.name_bytes == 0 || g.name_bytes > KVSI_MAX_META_NAME)
        return KVC_INVALID;
    memcpy(g.name, name, g.name_bytes + 1);
    kvc_status status = copy_record(&g);
    if (status == KVC_OK && !is_right(&g)) {
        KVC_LOG_ERROR(TIER, "lmdb: meta record \"%s\" is corrupt", name);
        status = KVC_CORRUPT;
    }
    if (status != KVC_OK) {
        free(g.bytes);
        return status;
    }
    memmove(g.bytes, g.bytes + SUM_BYTES, g.len_bytes - SUM_BYTES);
    *data_p = g.bytes;
    *len_bytes_p = g.len_bytes - SUM_BYTES;
    return KVC_OK;
}

kvc_status kvsi_meta_each(kvs_tier *tier, const char *prefix,
                          bool (*each)(void *arg, const char *name, const void *data,
                                       size_t len_bytes),
                          void *arg)
{
    meta_get g = {.env = &tier->meta, .prefix = prefix, .name_bytes = strlen(prefix)};
    bool damaged = tier->meta_lost;
    kvc_status status;

    if (g.name_bytes > KVSI_MAX_META_NAME)
        return KVC_INVALID;
    memcpy(g.name, prefix, g.name_bytes + 1);
    while ((status = copy_record(&g)) == KVC_OK) {
        if (!is_right(&g)) {
            KVC_LOG_ERROR(TIER, "lmdb: meta record \"%s\" is corrupt", g.name);
            damaged = true;
        } else if (!each(arg, g.name, g.bytes + SUM_BYTES, g.len_bytes - SUM_BYTES)) {
            break;
        }
    }
    free(g.bytes);
    if (status != KVC_OK && status != KVC_NOT_FOUND)
        return status;
    return damaged ? KVC_CORRUPT : KVC_OK;
}
