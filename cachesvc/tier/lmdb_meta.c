/*
 * lmdb_meta.c: small named records beside the values, in an environment of their own.
 *
 * Thread: any; one put at a time under the meta lock, which is held while the disk works. Records
 * are the XXH3-64 of the data, then the data. A put returns after a full sync.
 */
#include <string.h>

#include "base/log.h"
#include "base/metrics.h"
#include "base/sum.h"
#include "lmdb_tier.h"

#define SUM_BYTES 8u
#define MAX_TRIES 3u

static int put_once(kvsi_env *env, const char *name, const void *data, size_t len_bytes)
{
    uint64_t sum = kvc_value_sum(data, len_bytes);
    MDB_val key = {strlen(name), (void *)(uintptr_t)name}, value = {SUM_BYTES + len_bytes, NULL};
    MDB_txn *txn;
    int rc = mdb_txn_begin(env->env, NULL, 0, &txn);

    if (rc != MDB_SUCCESS)
        return rc;
    rc = mdb_put(txn, env->dbi, &key, &value, MDB_RESERVE);
    if (rc != MDB_SUCCESS) {
        mdb_txn_abort(txn);
        return rc;
    }
    memcpy(value.mv_data, &sum, SUM_BYTES);
    memcpy((uint8_t *)value.mv_data + SUM_BYTES, data, len_bytes);
    rc = mdb_txn_commit(txn);
    if (rc == MDB_SUCCESS)
        KVC_COUNT(lmdb_commits);
    return rc;
}

/* After a full map: more budget where there is some, else pages that were freed before. */
static kvc_status make_room(kvs_tier *tier, size_t len_bytes)
{
    uint64_t old = tier->meta.map_pages;
    uint64_t pages = kvsi_claim(tier, old, old + 2 * (len_bytes / KVSI_PAGE_BYTES) + 32);

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

/* Gives one record to each; *status_p becomes CORRUPT if its sum is wrong. False: stop. */
static bool give_record(const MDB_val *key, const MDB_val *value,
                        bool (*each)(void *arg, const char *name, const void *data,
                                     size_t len_bytes),
                        void *arg, kvc_status *status_p)
{
    char name[KVSI_MAX_META_NAME + 1];
    uint64_t sum;

    if (key->mv_size == 0 || key->mv_size > KVSI_MAX_META_NAME || value->mv_size < SUM_BYTES) {
        *status_p = KVC_CORRUPT;
        return true;
    }
    memcpy(name, key->mv_data, key->mv_size);
    name[key->mv_size] = '\0';
    memcpy(&sum, value->mv_data, SUM_BYTES);
    const uint8_t *data = (const uint8_t *)value->mv_data + SUM_BYTES;
    if (sum != kvc_value_sum(data, value->mv_size - SUM_BYTES)) {
        KVC_LOG_ERROR(TIER, "lmdb: meta record \"%s\" is corrupt", name);
        *status_p = KVC_CORRUPT;
        return true;
    }
    return each(arg, name, data, value->mv_size - SUM_BYTES);
}

kvc_status kvsi_meta_each(kvs_tier *tier,
                          bool (*each)(void *arg, const char *name, const void *data,
                                       size_t len_bytes),
                          void *arg)
{
    kvsi_env *env = &tier->meta;
    MDB_cursor *cursor;
    MDB_val key, value;
    MDB_txn *txn;
    kvc_status status = kvsi_env_read_begin(env, &txn);

    if (status != KVC_OK)
        return status;
    int rc = mdb_cursor_open(txn, env->dbi, &cursor);
    if (rc == MDB_SUCCESS) {
        while ((rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) == MDB_SUCCESS) {
            if (!give_record(&key, &value, each, arg, &status))
                break;
        }
        mdb_cursor_close(cursor);
    }
    kvsi_env_read_end(env, txn);
    if (rc != MDB_SUCCESS && rc != MDB_NOTFOUND)
        return kvsi_lmdb_status(rc);
    return tier->meta_lost ? KVC_CORRUPT : status;
}
