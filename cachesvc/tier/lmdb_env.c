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
#include <sys/mman.h>
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
#define LOCK_FILE_BYTES (16 << 10) /* more than LMDB makes it for KVSI_ENV_READERS */
#define ENV_FLAGS       (MDB_NORDAHEAD | MDB_NOTLS | MDB_NOMETASYNC)

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

static void log_fault(kvsi_env *env, int why)
{
    if (!atomic_exchange(&env->faulted, true))
        KVC_LOG_ERROR(TIER,
                      "lmdb: %s/%s: %s; nothing more is written there, and the next start looks at "
                      "the file",
                      env->root, env->name,
                      why == KVSI_GUARD_BUS
                          ? "a page of the file cannot be had (disk full, cut or failing)"
                          : "LMDB found a page that makes no sense");
}

static int judge(kvsi_env *env, int rc)
{
    if (rc != KVSI_GUARD_BUS && rc != KVSI_GUARD_ASSERT && rc != KVSI_GUARD_WILD)
        return rc;
    log_fault(env, rc);
    return EIO;
}

/* LMDB knows no such state as dead. */
int kvsi_env_run(kvsi_env *env, int (*fn)(void *arg), void *arg)
{
    return judge(env, atomic_load(&env->dead) ? EIO : kvsi_guard_run(fn, arg));
}

int kvsi_env_look(kvsi_env *env, int (*fn)(void *arg), void *arg)
{
    return judge(env, atomic_load(&env->dead) ? EIO : kvsi_guard_read(fn, arg));
}

static kvc_status failed(const kvsi_env *env, const char *what, int rc)
{
    kvc_status status = kvsi_lmdb_status(rc);

    KVC_LOG_ERROR(TIER, "lmdb: %s/%s: %s: %s", env->root, env->name, what, mdb_strerror(rc));
    return status;
}

static bool stat_file(int root_fd, const char *name, struct stat *st_p)
{
    char path[64];

    snprintf(path, sizeof(path), "%s/data.mdb", name);
    return fstatat(root_fd, path, st_p, 0) == 0;
}

static uint64_t disk_pages(const struct stat *st)
{
    uint64_t pages = ((uint64_t)st->st_blocks * 512 + KVSI_PAGE_BYTES - 1) / KVSI_PAGE_BYTES;

    return pages - (pages < KVSI_ENV_SLACK_PAGES ? pages : KVSI_ENV_SLACK_PAGES);
}

uint64_t kvsi_env_disk_pages(int root_fd, const char *name)
{
    struct stat st;

    return stat_file(root_fd, name, &st) ? disk_pages(&st) : 0;
}

uint64_t kvsi_env_file_pages(int root_fd, const char *name)
{
    struct stat st;

    if (!stat_file(root_fd, name, &st))
        return 0;
    uint64_t size = ((uint64_t)st.st_size + KVSI_PAGE_BYTES - 1) / KVSI_PAGE_BYTES;
    uint64_t pages = disk_pages(&st);
    return pages > size ? pages : size;
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

static int begin_database(void *arg)
{
    kvsi_env *env = arg;
    MDB_txn *txn;
    int dead = 0;
    int rc = mdb_txn_begin(env->env, NULL, 0, &txn);

    if (rc != MDB_SUCCESS)
        return rc;
    rc = mdb_dbi_open(txn, NULL, 0, &env->dbi);
    if (rc != MDB_SUCCESS) {
        mdb_txn_abort(txn);
        return rc;
    }
    rc = mdb_txn_commit(txn);
    if (rc == MDB_SUCCESS)
        rc = mdb_reader_check(env->env, &dead);
    if (dead > 0)
        KVC_LOG_INFO(TIER, "lmdb: %s/%s: cleared %d dead readers", env->root, env->name, dead);
    return rc;
}

static kvc_status open_database(kvsi_env *env)
{
    int rc = kvsi_env_run(env, begin_database, env);

    return rc == MDB_SUCCESS ? KVC_OK : failed(env, "opening the database", rc);
}

static kvc_status sync_folder(int root_fd, const char *name)
{
    int fd = openat(root_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool ok = fd >= 0 && fsync(fd) == 0 && fsync(root_fd) == 0;

    if (!ok)
        KVC_LOG_ERROR(TIER, "lmdb: cannot sync the folder %s: %s", name, strerror(errno));
    if (fd >= 0)
        close(fd);
    return ok ? KVC_OK : KVC_IO;
}

/*
 * LMDB maps its lock file and touches it: on a full disk that would be a SIGBUS, so the blocks are
 * had first.
 */
static int allot_lock_file(const kvsi_env *env)
{
    char path[64];

    snprintf(path, sizeof(path), "%s/lock.mdb", env->name);
    int fd = openat(env->dir_fd, path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return errno;
    int rc = fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, LOCK_FILE_BYTES) == 0 ? 0 : errno;
    close(fd);
    return rc == EOPNOTSUPP || rc == ENOSYS || rc == EINTR ? 0 : rc;
}

static int open_files(void *arg)
{
    char path[4096 + 64];
    kvsi_env *env = arg;

    snprintf(path, sizeof(path), "%s/%s", env->root, env->name);
    return mdb_env_open(env->env, path, ENV_FLAGS, 0600);
}

static kvc_status open_lmdb(kvsi_env *env, uint64_t map_pages)
{
    char path[64];
    const char *what = "mdb_env_create";
    int rc = mdb_env_create(&env->env);

    if (rc != MDB_SUCCESS) {
        env->env = NULL;
        return failed(env, what, rc);
    }
    what = "mdb_env_set_maxreaders";
    rc = mdb_env_set_maxreaders(env->env, KVSI_ENV_READERS + 2);
    if (rc == MDB_SUCCESS)
        rc = mdb_env_set_assert(env->env, kvsi_guard_assert);
    if (rc == MDB_SUCCESS) {
        what = "mdb_env_set_mapsize";
        rc = mdb_env_set_mapsize(env->env, (size_t)map_pages * KVSI_PAGE_BYTES);
    }
    if (rc == MDB_SUCCESS) {
        what = "room for the lock file";
        rc = allot_lock_file(env);
    }
    if (rc == MDB_SUCCESS) {
        what = "mdb_env_open";
        rc = kvsi_env_run(env, open_files, env);
    }
    if (atomic_load(&env->faulted))
        env->env = NULL; /* half open: LMDB cannot close it */
    if (rc != MDB_SUCCESS)
        return failed(env, what, rc);
    snprintf(path, sizeof(path), "%s/data.mdb", env->name);
    env->direct_fd = openat(env->dir_fd, path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    return KVC_OK;
}

void kvsi_env_init(kvsi_env *env)
{
    memset(env, 0, sizeof(*env));
    env->direct_fd = -1;
    env->closed = true;
    kvc_mutex_init(&env->pool_lock, KVC_RANK_QUEUE);
    kvc_cond_init(&env->pool_cond);
}

void kvsi_env_fini(kvsi_env *env)
{
    KVC_ASSERT(env->closed && env->env == NULL);
    kvc_cond_fini(&env->pool_cond);
    kvc_mutex_fini(&env->pool_lock);
}

static void set_closed(kvsi_env *env, bool closed)
{
    kvc_mutex_lock(&env->pool_lock);
    env->closed = closed;
    kvc_mutex_unlock(&env->pool_lock);
}

/* What another file of the same class left. */
static void forget_file(kvsi_env *env)
{
    env->env = NULL;
    env->direct_fd = -1;
    env->map_pages = 0;
    env->n_idle = env->n_open = 0;
    atomic_store(&env->no_direct, false);
    atomic_store(&env->map_base, 0);
    atomic_store(&env->dead, false);
    atomic_store(&env->faulted, false);
}

kvc_status kvsi_env_open(kvsi_env *env, int root_fd, const char *root, const char *name,
                         uint64_t map_pages, uint64_t claim_pages)
{
    bool is_new = kvsi_env_file_pages(root_fd, name) == 0;
    kvc_status status = KVC_OK;

    KVC_ASSERT(env->closed);
    forget_file(env);
    kvsi_guard_install();
    snprintf(env->name, sizeof(env->name), "%s", name);
    env->dir_fd = root_fd;
    env->root = root;
    if (mkdirat(root_fd, name, 0700) != 0 && errno != EEXIST)
        return failed(env, "mkdir", errno);
    status = open_lmdb(env, map_pages);
    if (status == KVC_OK && claim_pages >= map_pages) {
        status = allot(env, map_pages);
        if (status == KVC_NO_SPACE && !is_new) /* what it holds can be read and released */
            status = KVC_OK;
    }
    if (status == KVC_OK)
        status = open_database(env);
    if (status == KVC_OK)
        status = kvsi_env_sync(env); /* the first meta pages of a new file */
    if (status == KVC_OK)
        status = sync_folder(root_fd, name);
    if (status == KVC_OK) {
        env->map_pages = map_pages;
        set_closed(env, false);
    } else {
        kvsi_env_close(env);
    }
    return status;
}

bool kvsi_env_is_there(kvsi_env *env)
{
    mdb_filehandle_t fd;
    struct stat st;

    if (mdb_env_get_fd(env->env, &fd) != MDB_SUCCESS || fstat(fd, &st) != 0 || st.st_nlink > 0)
        return true;
    if (!atomic_exchange(&env->faulted, true))
        KVC_LOG_ERROR(TIER,
                      "lmdb: %s/%s was removed from under the server: nothing is written any "
                      "more, restart it",
                      env->root, env->name);
    return false;
}

static bool is_unlinked(int root_fd, const char *path, int flags)
{
    return unlinkat(root_fd, path, flags) == 0 || errno == ENOENT;
}

kvc_status kvsi_env_remove(int root_fd, const char *name)
{
    char data[64], lock[64];

    snprintf(data, sizeof(data), "%s/data.mdb", name);
    snprintf(lock, sizeof(lock), "%s/lock.mdb", name);
    bool gone = is_unlinked(root_fd, data, 0) && is_unlinked(root_fd, lock, 0) &&
                is_unlinked(root_fd, name, AT_REMOVEDIR) && fsync(root_fd) == 0;
    if (!gone)
        KVC_LOG_WARN(TIER, "lmdb: %s cannot be removed: its room stays taken", name);
    return gone ? KVC_OK : KVC_IO;
}

/* --- the gate --- */

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

void kvsi_env_close(kvsi_env *env)
{
    gate_close(env);
    set_closed(env, true);
    gate_open(env);
    while (env->n_idle > 0)
        mdb_txn_abort(env->idle[--env->n_idle]);
    if (env->env != NULL)
        mdb_env_close(env->env);
    env->env = NULL;
    if (env->direct_fd >= 0)
        close(env->direct_fd);
    env->direct_fd = -1;
}

/* --- readers --- */

/* Takes a place among the readers; *txn_p: the transaction to renew, or NULL to begin one. False:
   there is nothing to read. */
static bool take_place(kvsi_env *env, MDB_txn **txn_p)
{
    *txn_p = NULL;
    kvc_mutex_lock(&env->pool_lock);
    while (env->gate || env->n_active == KVSI_ENV_READERS)
        kvc_cond_wait(&env->pool_cond, &env->pool_lock);
    bool open = !env->closed;
    env->n_active += open;
    if (open && env->n_idle > 0)
        *txn_p = env->idle[--env->n_idle];
    kvc_mutex_unlock(&env->pool_lock);
    return open;
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

typedef struct begin {
    kvsi_env *env;
    MDB_txn *txn;
} begin;

static int begin_read(void *arg)
{
    begin *b = arg;

    return b->txn != NULL ? mdb_txn_renew(b->txn)
                          : mdb_txn_begin(b->env->env, NULL, MDB_RDONLY, &b->txn);
}

/*
 * Whether the pages that begin_read touches can be had. LMDB would lose the memory of a new
 * transaction that ends under the guard, so they are tried before.
 */
static bool try_metas(kvsi_env *env)
{
    mdb_filehandle_t fd;
    char byte;

    if (mdb_env_get_fd(env->env, &fd) != MDB_SUCCESS)
        return false;
    for (off_t page = 0; page < 2; page++) {
        if (pread(fd, &byte, 1, (page + 1) * (off_t)KVSI_PAGE_BYTES - 1) != 1) {
            log_fault(env, KVSI_GUARD_BUS);
            return false;
        }
    }
    return true;
}

kvc_status kvsi_env_read_begin(kvsi_env *env, MDB_txn **txn_p)
{
    begin b = {.env = env};

    *txn_p = NULL;
    if (!take_place(env, &b.txn))
        return KVC_NOT_FOUND;
    bool pooled = b.txn != NULL;
    int rc = EIO;
    if (!atomic_load(&env->dead) && (pooled || try_metas(env)))
        rc = kvsi_env_run(env, begin_read, &b);
    if (rc != MDB_SUCCESS) {
        if (pooled)
            mdb_txn_abort(b.txn);
        else if (rc == EIO && atomic_load(&env->faulted))
            atomic_store(&env->dead, true); /* each such try would cost a reader's slot */
        leave_place(env, NULL);
        return failed(env, "read transaction", rc);
    }
    *txn_p = b.txn;
    return KVC_OK;
}

void kvsi_env_read_end(kvsi_env *env, MDB_txn *txn)
{
    mdb_txn_reset(txn);
    leave_place(env, txn);
}

/* --- the writer's --- */

/* Whether the system would map so much: LMDB gives the old map up before it tries, and has none if
   that fails. */
static bool could_map(const kvsi_env *env, size_t len_bytes)
{
    mdb_filehandle_t fd;

    if (KVC_FAULT("lmdb.map") || mdb_env_get_fd(env->env, &fd) != MDB_SUCCESS)
        return false;
    void *map = mmap(NULL, len_bytes, PROT_READ, MAP_SHARED, fd, 0);
    return map != MAP_FAILED && munmap(map, len_bytes) == 0;
}

typedef struct resize {
    MDB_env *env;
    size_t bytes;
} resize;

static int set_size(void *arg)
{
    const resize *r = arg;

    return mdb_env_set_mapsize(r->env, r->bytes);
}

kvc_status kvsi_env_grow(kvsi_env *env, uint64_t map_pages)
{
    resize r = {env->env, (size_t)map_pages * KVSI_PAGE_BYTES};
    kvc_status status = atomic_load(&env->faulted) ? KVC_IO : allot(env, map_pages);

    if (status == KVC_OK && !could_map(env, r.bytes)) {
        KVC_LOG_WARN(TIER, "lmdb: %s/%s: the system does not map %llu pages", env->root, env->name,
                     (unsigned long long)map_pages);
        status = KVC_NO_SPACE;
    }
    if (status != KVC_OK)
        return status;
    gate_close(env);
    int rc = kvsi_env_run(env, set_size, &r);
    atomic_store(&env->map_base, 0);
    if (rc != MDB_SUCCESS) { /* the old map is gone */
        atomic_store(&env->faulted, true);
        atomic_store(&env->dead, true);
    }
    gate_open(env);
    return rc == MDB_SUCCESS ? KVC_OK : failed(env, "mdb_env_set_mapsize", rc);
}

void kvsi_env_drain(kvsi_env *env)
{
    gate_close(env);
    gate_open(env);
}

static int commit_nothing(void *arg)
{
    static char name[] = "\0tick";
    MDB_val key = {sizeof(name), name}, data = {1, name};
    kvsi_env *env = arg;
    MDB_txn *txn;
    int rc = mdb_txn_begin(env->env, NULL, 0, &txn);

    if (rc != MDB_SUCCESS)
        return rc;
    rc = mdb_put(txn, env->dbi, &key, &data, 0);
    if (rc == MDB_SUCCESS)
        rc = mdb_del(txn, env->dbi, &key, NULL);
    if (rc == MDB_SUCCESS)
        return mdb_txn_commit(txn);
    mdb_txn_abort(txn);
    return rc;
}

kvc_status kvsi_env_tick(kvsi_env *env)
{
    int rc = atomic_load(&env->faulted) ? EIO : kvsi_env_run(env, commit_nothing, env);

    if (rc == MDB_MAP_FULL)
        return kvsi_lmdb_status(rc);
    if (rc != MDB_SUCCESS)
        return failed(env, "an empty commit", rc);
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

typedef struct count {
    MDB_env *env;
    MDB_stat st;
} count;

static int get_counts(void *arg)
{
    count *c = arg;

    return mdb_env_stat(c->env, &c->st);
}

kvc_status kvsi_env_count(kvsi_env *env, kvsi_env_pages *pages_p)
{
    count c = {.env = env->env};
    int rc = kvsi_env_run(env, get_counts, &c);

    *pages_p = (kvsi_env_pages){0, 0, 0};
    if (rc != MDB_SUCCESS)
        return failed(env, "mdb_env_stat", rc);
    pages_p->records = c.st.ms_overflow_pages;
    pages_p->tree = c.st.ms_branch_pages + c.st.ms_leaf_pages + 2; /* and the two meta pages */
    pages_p->entries = c.st.ms_entries;
    return KVC_OK;
}
