/*
 * lmdb_env.c: opens, grows, syncs and closes one LMDB environment and pools its read
 * transactions; see lmdb_env.h.
 *
 * Threads: open, close, grow, tick and sync on the environment's one writer (kvs-lmdb-w, or the
 * caller of meta_put under the meta lock); reads on any thread. Invariants: no read transaction is
 * active while the map is replaced; the file never outgrows map_pages.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/assert.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/metrics.h"
#include "lmdb_env.h"

/*
 * NORDAHEAD: cold rows without it cost a read-ahead window each. NOTLS: read transactions move
 * between threads. NOMETASYNC: a commit syncs its data but not its meta page; whoever promised
 * durability syncs once more for the whole group.
 */
#define ENV_FLAGS (MDB_NORDAHEAD | MDB_NOTLS | MDB_NOMETASYNC)

kvc_status kvsi_lmdb_status(int rc)
{
    switch (rc) {
    case MDB_SUCCESS:
        return KVC_OK;
    case MDB_NOTFOUND:
        return KVC_NOT_FOUND;
    case MDB_MAP_FULL:
    case MDB_TXN_FULL:
    case MDB_READERS_FULL:
        return KVC_AGAIN;
    case MDB_CORRUPTED:
    case MDB_PAGE_NOTFOUND:
    case MDB_INVALID:
    case MDB_VERSION_MISMATCH:
        return KVC_CORRUPT;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return KVC_NO_SPACE;
    case ENOMEM:
        return KVC_NO_MEMORY;
    default:
        return KVC_IO;
    }
}

static kvc_status failed(const kvsi_env *env, const char *what, int rc)
{
    kvc_status status = kvsi_lmdb_status(rc);

    KVC_LOG_ERROR(TIER, "lmdb: %s/%s: %s: %s", env->root, env->name, what, mdb_strerror(rc));
    return status;
}

uint64_t kvsi_env_file_pages(int root_fd, const char *name)
{
    char path[64];
    struct stat st;

    snprintf(path, sizeof(path), "%s/data.mdb", name);
    if (fstatat(root_fd, path, &st, 0) != 0)
        return 0;
    uint64_t allotted = ((uint64_t)st.st_blocks * 512 + KVSI_PAGE_BYTES - 1) / KVSI_PAGE_BYTES;
    uint64_t size = ((uint64_t)st.st_size + KVSI_PAGE_BYTES - 1) / KVSI_PAGE_BYTES;
    allotted -= allotted < KVSI_ENV_SLACK_PAGES ? allotted : KVSI_ENV_SLACK_PAGES;
    return allotted > size ? allotted : size;
}

/* Room on the disk for the whole map. A file system that cannot do it is taken as it is. */
static kvc_status allot(kvsi_env *env, uint64_t map_pages)
{
    mdb_filehandle_t fd;
    int rc = mdb_env_get_fd(env->env, &fd);

    if (rc != MDB_SUCCESS)
        return failed(env, "mdb_env_get_fd", rc);
    if (fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, (off_t)(map_pages * KVSI_PAGE_BYTES)) == 0)
        return KVC_OK;
    rc = errno;
    if (rc == EOPNOTSUPP || rc == ENOSYS || rc == EINTR)
        return KVC_OK;
    KVC_LOG_WARN(TIER, "lmdb: %s/%s: no room on the disk for %llu pages: %s", env->root, env->name,
                 (unsigned long long)map_pages, strerror(rc));
    return kvsi_lmdb_status(rc);
}

static kvc_status open_database(kvsi_env *env)
{
    MDB_txn *txn;
    int dead = 0;
    int rc = mdb_txn_begin(env->env, NULL, 0, &txn);

    if (rc != MDB_SUCCESS)
        return failed(env, "mdb_txn_begin", rc);
    rc = mdb_dbi_open(txn, NULL, 0, &env->dbi);
    if (rc != MDB_SUCCESS) {
        mdb_txn_abort(txn);
        return failed(env, "mdb_dbi_open", rc);
    }
    rc = mdb_txn_commit(txn);
    if (rc != MDB_SUCCESS)
        return failed(env, "mdb_txn_commit", rc);
    rc = mdb_reader_check(env->env, &dead);
    if (rc != MDB_SUCCESS)
        return failed(env, "mdb_reader_check", rc);
    if (dead > 0)
        KVC_LOG_INFO(TIER, "lmdb: %s/%s: cleared %d dead readers", env->root, env->name, dead);
    return KVC_OK;
}

static kvc_status sync_folder(int root_fd, const char *name)
{
    int fd = openat(root_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    if (fd < 0)
        return KVC_IO;
    int rc = fsync(fd);
    close(fd);
    return rc == 0 && fsync(root_fd) == 0 ? KVC_OK : KVC_IO;
}

static kvc_status open_lmdb(kvsi_env *env, uint64_t map_pages)
{
    char path[4096 + 64];
    const char *what = "mdb_env_create";
    int rc = mdb_env_create(&env->env);

    if (rc != MDB_SUCCESS) {
        env->env = NULL;
        return failed(env, what, rc);
    }
    snprintf(path, sizeof(path), "%s/%s", env->root, env->name);
    what = "mdb_env_set_maxreaders";
    rc = mdb_env_set_maxreaders(env->env, KVSI_ENV_READERS + 2);
    if (rc == MDB_SUCCESS) {
        what = "mdb_env_set_mapsize";
        rc = mdb_env_set_mapsize(env->env, (size_t)map_pages * KVSI_PAGE_BYTES);
    }
    if (rc == MDB_SUCCESS) {
        what = "mdb_env_open";
        rc = mdb_env_open(env->env, path, ENV_FLAGS, 0600);
    }
    return rc == MDB_SUCCESS ? KVC_OK : failed(env, what, rc);
}

kvc_status kvsi_env_open(kvsi_env *env, int root_fd, const char *root, const char *name,
                         uint64_t map_pages)
{
    kvc_status status = KVC_OK;

    memset(env, 0, sizeof(*env));
    snprintf(env->name, sizeof(env->name), "%s", name);
    env->dir_fd = root_fd;
    env->root = root;
    if (mkdirat(root_fd, name, 0700) != 0 && errno != EEXIST)
        return failed(env, "mkdir", errno);
    kvc_mutex_init(&env->pool_lock, KVC_RANK_QUEUE);
    kvc_cond_init(&env->pool_cond);
    status = open_lmdb(env, map_pages);
    if (status == KVC_OK)
        status = allot(env, map_pages);
    if (status == KVC_OK)
        status = open_database(env);
    if (status == KVC_OK)
        status = kvsi_env_sync(env); /* the first meta pages of a new file */
    if (status == KVC_OK)
        status = sync_folder(root_fd, name);
    if (status == KVC_OK)
        env->map_pages = map_pages;
    else
        kvsi_env_close(env);
    return status;
}

void kvsi_env_close(kvsi_env *env)
{
    KVC_ASSERT(env->n_active == 0);
    while (env->n_idle > 0)
        mdb_txn_abort(env->idle[--env->n_idle]);
    if (env->env != NULL)
        mdb_env_close(env->env);
    env->env = NULL;
    kvc_cond_fini(&env->pool_cond);
    kvc_mutex_fini(&env->pool_lock);
}

/* --- readers --- */

static void gate_close(kvsi_env *env)
{
    kvc_mutex_lock(&env->pool_lock);
    env->gate = true;
    while (env->n_active > 0)
        kvc_cond_wait(&env->pool_cond, &env->pool_lock);
    kvc_mutex_unlock(&env->pool_lock);
}

static void gate_open(kvsi_env *env)
{
    kvc_mutex_lock(&env->pool_lock);
    env->gate = false;
    kvc_cond_broadcast(&env->pool_cond);
    kvc_mutex_unlock(&env->pool_lock);
}

/* Takes a place among the readers; the transaction to renew, or NULL to begin one. */
static MDB_txn *take_place(kvsi_env *env)
{
    MDB_txn *txn = NULL;

    kvc_mutex_lock(&env->pool_lock);
    while (env->gate || env->n_active == KVSI_ENV_READERS)
        kvc_cond_wait(&env->pool_cond, &env->pool_lock);
    env->n_active++;
    if (env->n_idle > 0)
        txn = env->idle[--env->n_idle];
    kvc_mutex_unlock(&env->pool_lock);
    return txn;
}

static void leave_place(kvsi_env *env, MDB_txn *txn)
{
    kvc_mutex_lock(&env->pool_lock);
    env->n_active--;
    if (txn != NULL)
        env->idle[env->n_idle++] = txn;
    kvc_cond_broadcast(&env->pool_cond);
    kvc_mutex_unlock(&env->pool_lock);
}

kvc_status kvsi_env_read_begin(kvsi_env *env, MDB_txn **txn_p)
{
    MDB_txn *txn = take_place(env);
    int rc;

    *txn_p = NULL;
    if (txn != NULL) {
        rc = mdb_txn_renew(txn);
        if (rc != MDB_SUCCESS)
            mdb_txn_abort(txn);
    } else {
        rc = mdb_txn_begin(env->env, NULL, MDB_RDONLY, &txn);
    }
    if (rc != MDB_SUCCESS) {
        leave_place(env, NULL);
        return failed(env, "read transaction", rc);
    }
    *txn_p = txn;
    return KVC_OK;
}

void kvsi_env_read_end(kvsi_env *env, MDB_txn *txn)
{
    mdb_txn_reset(txn);
    leave_place(env, txn);
}

/* --- the writer's --- */

kvc_status kvsi_env_grow(kvsi_env *env, uint64_t map_pages)
{
    kvc_status status = allot(env, map_pages);

    if (status != KVC_OK)
        return status;
    gate_close(env);
    int rc = mdb_env_set_mapsize(env->env, (size_t)map_pages * KVSI_PAGE_BYTES);
    gate_open(env);
    return rc == MDB_SUCCESS ? KVC_OK : failed(env, "mdb_env_set_mapsize", rc);
}

void kvsi_env_drain(kvsi_env *env)
{
    gate_close(env);
    gate_open(env);
}

kvc_status kvsi_env_tick(kvsi_env *env)
{
    static char name[] = "\0tick";
    MDB_val key = {sizeof(name), name}, data = {1, name};
    MDB_txn *txn;
    int rc = mdb_txn_begin(env->env, NULL, 0, &txn);

    if (rc != MDB_SUCCESS)
        return failed(env, "mdb_txn_begin", rc);
    rc = mdb_put(txn, env->dbi, &key, &data, 0);
    if (rc == MDB_SUCCESS)
        rc = mdb_del(txn, env->dbi, &key, NULL);
    if (rc != MDB_SUCCESS) {
        mdb_txn_abort(txn);
        return kvsi_lmdb_status(rc);
    }
    rc = mdb_txn_commit(txn);
    if (rc != MDB_SUCCESS)
        return failed(env, "mdb_txn_commit", rc);
    KVC_COUNT(lmdb_commits);
    return KVC_OK;
}

kvc_status kvsi_env_sync(kvsi_env *env)
{
    int rc = KVC_FAULT("lmdb.sync") ? EIO : mdb_env_sync(env->env, 1);

    if (rc != MDB_SUCCESS)
        return failed(env, "mdb_env_sync", rc);
    KVC_COUNT(lmdb_syncs);
    return KVC_OK;
}

kvc_status kvsi_env_count(kvsi_env *env, kvsi_env_pages *pages_p)
{
    MDB_stat st;
    int rc = mdb_env_stat(env->env, &st);

    *pages_p = (kvsi_env_pages){0, 0, 0};
    if (rc != MDB_SUCCESS)
        return failed(env, "mdb_env_stat", rc);
    pages_p->records = st.ms_overflow_pages;
    pages_p->tree = st.ms_branch_pages + st.ms_leaf_pages + 2; /* and the two meta pages */
    pages_p->entries = st.ms_entries;
    return KVC_OK;
}
