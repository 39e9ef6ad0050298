/*
 * raw_lmdb.c: see raw_lmdb.h.
 */
#include "raw_lmdb.h"

#include <lmdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MIB (1u << 20)

static int put_group(MDB_env *env, MDB_dbi *dbi, const uint8_t *src, uint32_t first, uint32_t n)
{
    MDB_txn *txn;
    int rc = mdb_txn_begin(env, NULL, 0, &txn);
    if (rc != MDB_SUCCESS) {
        return rc;
    }
    rc = mdb_dbi_open(txn, NULL, 0, dbi);
    for (uint32_t i = first; i < first + n && rc == MDB_SUCCESS; i++) {
        MDB_val key = {sizeof i, &i}, data = {MIB, NULL};
        rc = mdb_put(txn, *dbi, &key, &data, MDB_RESERVE);
        if (rc == MDB_SUCCESS) {
            memcpy(data.mv_data, src + (size_t)i * MIB, MIB);
        }
    }
    if (rc != MDB_SUCCESS) {
        mdb_txn_abort(txn);
        return rc;
    }
    return mdb_txn_commit(txn);
}

int raw_lmdb_put(const char *folder, const uint8_t *src, uint32_t n)
{
    char path[300], lock[320];
    MDB_env *env;
    MDB_dbi dbi;
    snprintf(path, sizeof path, "%s/raw.mdb", folder);
    snprintf(lock, sizeof lock, "%s-lock", path);
    if (mdb_env_create(&env) != MDB_SUCCESS) {
        return -1;
    }
    int rc = mdb_env_set_mapsize(env, (size_t)(n + 64) * MIB * 2);
    if (rc == MDB_SUCCESS) {
        rc = mdb_env_open(env, path, MDB_NOSUBDIR | MDB_NORDAHEAD, 0600);
    }
    for (uint32_t first = 0; first < n && rc == MDB_SUCCESS; first += RAW_LMDB_GROUP) {
        uint32_t left = n - first;
        rc = put_group(env, &dbi, src, first, left < RAW_LMDB_GROUP ? left : RAW_LMDB_GROUP);
    }
    mdb_env_close(env);
    (void)unlink(path);
    (void)unlink(lock);
    if (rc != MDB_SUCCESS) {
        fprintf(stderr, "store_bench: bare lmdb: %s\n", mdb_strerror(rc));
    }
    return rc;
}
