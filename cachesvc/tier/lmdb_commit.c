/*
 * lmdb_commit.c: one group's writes and releases into one environment, as one transaction where
 * the map has room.
 *
 * Thread: kvs-lmdb-w. Invariants: whatever happens, each write of the batch leaves with a status,
 * and the environment is as it was for those that failed. LMDB lets pages freed by one transaction
 * be reused by the next but one, so a full map is met by committing the releases first, then an
 * empty transaction (tick), then the writes. Writes never take the reserve, so a release always
 * finds the few pages that it needs itself.
 */
#include <errno.h>
#include <stdio.h>

#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/metrics.h"
#include "lmdb_tier.h"

#define MAX_TRIES  4u
#define TREE_PAGES 4u /* that one more value changes, for what a file with holes may take */

static void fail_writes(kvsi_batch *batch, uint32_t from, kvc_status status)
{
    for (uint32_t i = from; i < batch->n_writes; i++)
        batch->writes[i]->status = status;
}

static int put_one(MDB_txn *txn, const kvsi_class *class, const kvs_tier_write *write)
{
    uint8_t bytes[KVSI_KEY_BYTES];
    MDB_val key = {sizeof(bytes), bytes};
    uint64_t record_bytes = kvsi_record_bytes(write->row_bytes, write->n_rows);
    if (class->record_pages != kvsi_record_pages(write->row_bytes, write->n_rows))
        record_bytes = (uint64_t) class->record_pages * KVSI_PAGE_BYTES - KVSI_RECORD_OFF;
    MDB_val data = {(size_t)record_bytes, NULL};

    kvsi_key_pack(&write->key, write->row_bytes, write->n_rows, bytes);
    int rc = mdb_put(txn, class->env.dbi, &key, &data, MDB_RESERVE);
    if (rc == MDB_SUCCESS)
        kvsi_record_write(write, record_bytes, data.mv_data);
    return rc;
}

static int drop_all(MDB_txn *txn, MDB_dbi dbi, const kvsi_drop *drop)
{
    int rc = MDB_SUCCESS;

    for (; drop != NULL && rc == MDB_SUCCESS; drop = drop->next) {
        MDB_val key = {drop->key_bytes, (void *)(uintptr_t)drop->key};
        rc = mdb_del(txn, dbi, &key, NULL);
        if (rc == MDB_NOTFOUND)
            rc = MDB_SUCCESS;
    }
    return rc;
}

/* One attempt; what try_commit gives to commit_once and what comes back. */
typedef struct attempt {
    kvsi_batch *batch;
    uint32_t n, n_done; /* writes wanted; put so far */
    MDB_txn *txn;
} attempt;

static int commit_once(void *arg)
{
    attempt *a = arg;
    kvsi_batch *batch = a->batch;
    MDB_dbi dbi = batch->class->env.dbi;
    int rc = mdb_txn_begin(batch->class->env.env, NULL, 0, &a->txn);

    if (rc != MDB_SUCCESS)
        return rc;
    if (!batch->drops_done)
        rc = drop_all(a->txn, dbi, batch->drops);
    while (rc == MDB_SUCCESS && a->n_done < a->n) {
        rc = put_one(a->txn, batch->class, batch->writes[a->n_done]);
        a->n_done += rc == MDB_SUCCESS;
    }
    if (rc == MDB_SUCCESS && KVC_FAULT("lmdb.commit"))
        rc = EIO;
    MDB_txn *txn = a->txn;
    a->txn = NULL;
    if (rc == MDB_SUCCESS) {
        rc = mdb_txn_commit(txn);
        a->n_done = rc == MDB_SUCCESS ? a->n : a->n / 2;
    } else {
        mdb_txn_abort(txn);
    }
    return rc;
}

static int abort_txn(void *arg)
{
    mdb_txn_abort(arg);
    return MDB_SUCCESS;
}

/*
 * One transaction with the releases, if not done yet, and the first n writes. *n_fit_p: how many
 * writes a second attempt should try after MDB_MAP_FULL. Where the file fails under it, nothing is
 * committed, then or ever again.
 */
static int try_commit(kvsi_batch *batch, uint32_t n, uint32_t *n_fit_p)
{
    kvsi_env *env = &batch->class->env;
    attempt a = {.batch = batch, .n = n};
    int rc = atomic_load(&env->faulted) ? EIO : kvsi_env_run(env, commit_once, &a);

    *n_fit_p = a.n_done;
    if (atomic_load(&env->faulted) && a.txn != NULL)
        (void)kvsi_env_run(env, abort_txn, a.txn);
    if (rc != MDB_SUCCESS)
        return rc;
    KVC_COUNT(lmdb_commits);
    batch->drops_done = true;
    batch->class->dirty = true;
    return MDB_SUCCESS;
}

/* Claims what is missing up to need pages, from what is free and then from other classes. Gives the
   new claim, which may be less than needed. */
static uint64_t claim_more(kvs_tier *tier, const kvsi_class *class, uint64_t now_pages,
                           uint64_t need)
{
    uint64_t pages = kvsi_claim(tier, now_pages, need);

    if (pages >= need)
        return pages;
    kvsi_take(tier, class, need - pages);
    return kvsi_claim(tier, pages, need);
}

/* The environment of a class that has none yet. */
static kvc_status create_class(kvs_tier *tier, kvsi_class *class)
{
    char name[32];
    uint64_t first = kvsi_first_claim(class->record_pages);
    uint64_t claimed = claim_more(tier, class, 0, first);

    if (claimed < first) {
        kvsi_unclaim(tier, claimed);
        KVC_LOG_WARN(TIER, "lmdb: no capacity is left for values of %u pages", class->record_pages);
        return tier->no_holes ? KVC_NO_SPACE : KVC_AGAIN;
    }
    uint64_t pages = claimed - KVSI_ENV_SLACK_PAGES;
    snprintf(name, sizeof(name), "class-%u", class->record_pages);
    kvc_status status = kvsi_env_open(&class->env, tier->root_fd, tier->root, name, pages, pages);
    if (status != KVC_OK) {
        if (kvsi_env_remove(tier->root_fd, name) == KVC_OK)
            kvsi_unclaim(tier, claimed);
        return status;
    }
    KVC_LOG_INFO(TIER, "lmdb: new size class of %u pages", class->record_pages);
    kvc_mutex_lock(&tier->lock);
    class->claim_pages = pages;
    kvc_mutex_unlock(&tier->lock);
    return KVC_OK;
}

/*
 * Grows the claim to need pages, or as far as the budget goes, and the map with it. AGAIN: there is
 * no room, in the budget or on the disk, and releases would help. Any other: the disk fails, and
 * they would not: values must not give way to a disk that dies.
 */
static kvc_status grow_class(kvs_tier *tier, kvsi_class *class, uint64_t need)
{
    uint64_t old = class->claim_pages;
    uint64_t pages = claim_more(tier, class, old, need);
    kvc_status status = KVC_OK;

    if (pages == old)
        return KVC_AGAIN;
    if (pages >= class->env.map_pages) /* its holes, if it had some, are filled again */
        status = kvsi_env_grow(&class->env, pages);
    if (status != KVC_OK) {
        kvsi_unclaim(tier, pages - old);
        return status == KVC_NO_SPACE ? KVC_AGAIN : status;
    }
    kvc_mutex_lock(&tier->lock);
    class->claim_pages = pages;
    if (pages > class->env.map_pages)
        class->env.map_pages = pages;
    kvc_mutex_unlock(&tier->lock);
    return KVC_OK;
}

/* Writes that fit without taking the reserve, counting what the releases free. */
static uint32_t count_fitting(const kvsi_batch *batch)
{
    const kvsi_class *class = batch->class;
    uint64_t taken = class->live_pages + class->tree_pages + kvsi_reserve_pages(class);
    uint64_t have = class->claim_pages + (uint64_t)batch->n_drops * class->record_pages;

    if (have <= taken)
        return 0;
    uint64_t n = (have - taken) / class->record_pages;
    return n < batch->n_writes ? (uint32_t)n : batch->n_writes;
}

/* After a full map: what was freed of late becomes usable. */
static int make_room(kvsi_batch *batch)
{
    uint32_t none;
    int rc = MDB_SUCCESS;

    kvsi_env_drain(&batch->class->env);
    if (!batch->drops_done && batch->drops != NULL)
        rc = try_commit(batch, 0, &none);
    if (rc == MDB_SUCCESS && kvsi_env_tick(&batch->class->env) != KVC_OK)
        rc = MDB_MAP_FULL;
    kvsi_env_drain(&batch->class->env);
    return rc;
}

/*
 * After a first failure: a larger map, or what was freed of late. OK: the second attempt may fit.
 * Else what grow_class gave.
 */
static kvc_status help_commit(kvs_tier *tier, kvsi_batch *batch, uint32_t n, int rc)
{
    kvsi_class *class = batch->class;
    uint64_t need = class->claim_pages + (uint64_t)n * class->record_pages;
    kvc_status status = rc == MDB_MAP_FULL ? grow_class(tier, class, need) : KVC_AGAIN;

    if (status != KVC_AGAIN)
        return status;
    (void)make_room(batch);
    return KVC_OK;
}

/*
 * Commits the first n writes or fewer; how many it were. *status_p: why not all of them. A disk
 * that is full in the middle of a commit (LMDB says EIO to a short write) is met like a full map:
 * there may be pages to reuse inside the file.
 */
static uint32_t commit_writes(kvs_tier *tier, kvsi_batch *batch, uint32_t n, kvc_status *status_p)
{
    uint32_t fit = n;
    int rc = MDB_MAP_FULL;

    for (uint32_t tries = 0; tries < MAX_TRIES; tries++) {
        rc = try_commit(batch, fit, &n);
        if (rc == MDB_SUCCESS)
            return fit;
        *status_p = kvsi_lmdb_status(rc);
        if (rc != MDB_MAP_FULL && tries == 0)
            KVC_LOG_ERROR(TIER, "lmdb: %s/%s: commit of %u values: %s", batch->class->env.root,
                          batch->class->env.name, fit, mdb_strerror(rc));
        if (atomic_load(&batch->class->env.faulted) ||
            (rc != MDB_MAP_FULL && rc != ENOSPC && rc != EIO))
            break;
        if (tries > 0) {
            fit = n;
            continue;
        }
        kvc_status helped = help_commit(tier, batch, fit, rc);
        if (helped != KVC_OK) {
            *status_p = helped;
            break;
        }
    }
    return 0;
}

static void update_counts(kvs_tier *tier, kvsi_class *class)
{
    kvsi_env_pages pages;

    if (kvsi_env_count(&class->env, &pages) != KVC_OK)
        return;
    kvc_mutex_lock(&tier->lock);
    class->live_pages = pages.records;
    class->tree_pages = pages.tree;
    class->values = pages.entries;
    if (pages.entries > 0)
        class->empty_ns = 0;
    else if (class->empty_ns == 0)
        class->empty_ns = kvc_now_ns();
    kvc_mutex_unlock(&tier->lock);
}

void kvsi_commit(kvs_tier *tier, kvsi_batch *batch)
{
    kvsi_class *class = batch->class;
    kvc_status status = class->broken ? KVC_IO : KVC_OK;

    if (status == KVC_OK && class->claim_pages > 0 && !kvsi_env_is_there(&class->env))
        status = KVC_IO;

    if (status == KVC_OK && class->claim_pages == 0)
        status = create_class(tier, class);
    if (status != KVC_OK) {
        fail_writes(batch, 0, status);
        kvsi_class_check(tier, class);
        return;
    }
    uint64_t need = class->live_pages + class->tree_pages + kvsi_reserve_pages(class) +
                    (uint64_t)batch->n_writes * class->record_pages;
    bool tight = batch->n_writes > 0 && need > class->claim_pages;
    kvc_status grown = tight ? grow_class(tier, class, need) : KVC_OK;
    if (grown == KVC_OK)
        tight = need > class->claim_pages;
    uint32_t n = count_fitting(batch);
    status = grown == KVC_OK ? KVC_AGAIN : grown;
    /* Where the releases must make the room, they go first: their pages are not free before. */
    if (tight && batch->n_drops > 0 && make_room(batch) != MDB_SUCCESS)
        n = 0;
    if (n > 0)
        kvsi_class_trim(tier, class, (uint64_t)n * (class->record_pages + TREE_PAGES));
    if (class->broken) { /* the trim's sync failed: what went before it may be lost */
        n = 0;
        status = KVC_IO;
    }
    if (n > 0 || !batch->drops_done)
        n = commit_writes(tier, batch, n, &status);
    for (uint32_t i = 0; i < n; i++) {
        kvs_tier_write *write = batch->writes[i];
        write->status = KVC_OK;
        write->slot = kvsi_slot(batch->number, write->row_bytes, write->n_rows);
    }
    fail_writes(batch, n, status);
    update_counts(tier, class);
    kvsi_class_check(tier, class);
}
