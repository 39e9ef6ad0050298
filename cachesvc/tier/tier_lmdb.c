/*
 * tier_lmdb.c: the persistent tier: one LMDB environment per size class under one byte budget.
 *
 * Threads: open and close on the caller's; kvs-lmdb-w writes (lmdb_writer.c, lmdb_commit.c); reads
 * on disk threads (lmdb_read.c). Invariants: one process has the folder (flock); no file outgrows
 * its claim; claimed_pages passes capacity_pages by folders set aside at most, and nothing more is
 * claimed then.
 *
 * Folder: lock, clean (while nobody has it, after a stop in order), meta/, class-<pages>/ each with
 * LMDB's data.mdb and lock.mdb. A folder that the check or LMDB refuses is renamed to *.bad,
 * counted against the budget and never touched again.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/metrics.h"
#include "lmdb_check.h"
#include "lmdb_tier.h"
#include "tier_registry.h"

#define CLEAN_MARK          "clean"
#define MAX_PATH_BYTES      4000u
#define STEPS               64u /* the budget is claimed in about this many steps */
#define MIN_STEP_PAGES      64u
#define DEFAULT_GROUP_BYTES (16ull << 20)
#define DEFAULT_CUT_BYTES   (1ull << 30)
#define DEFAULT_READER_NS   100000000ull
#define RESERVE_PAGES       48u
#define RESERVE_PART        50u /* of the records: fragments of runs */

/* --- the budget --- */

uint64_t kvsi_left_pages(const kvs_tier *tier)
{
    uint64_t taken =
        tier->claimed_pages + tier->reserved_pages + KVSI_META_PAGES + KVSI_ENV_SLACK_PAGES;

    return taken < tier->capacity_pages ? tier->capacity_pages - taken : 0;
}

static uint64_t claim(kvs_tier *tier, uint64_t now_pages, uint64_t need_pages, bool meta)
{
    /* As much again as there is, up to a step: a class that stays small takes little. */
    uint64_t step = now_pages < MIN_STEP_PAGES ? MIN_STEP_PAGES : now_pages;
    if (step > tier->step_pages)
        step = tier->step_pages;
    uint64_t want = need_pages > now_pages ? need_pages - now_pages + step : 0;

    kvc_mutex_lock(&tier->lock);
    uint64_t reserved = meta ? tier->reserved_pages : 0;
    uint64_t left = kvsi_left_pages(tier) + reserved;
    if (want > left)
        want = left;
    tier->claimed_pages += want;
    tier->reserved_pages -= want < reserved ? want : reserved;
    kvc_mutex_unlock(&tier->lock);
    return now_pages + want;
}

uint64_t kvsi_claim(kvs_tier *tier, uint64_t now_pages, uint64_t need_pages)
{
    return claim(tier, now_pages, need_pages, false);
}

uint64_t kvsi_claim_meta(kvs_tier *tier, uint64_t now_pages, uint64_t need_pages)
{
    return claim(tier, now_pages, need_pages, true);
}

void kvsi_unclaim(kvs_tier *tier, uint64_t pages)
{
    kvc_mutex_lock(&tier->lock);
    KVC_ASSERT(pages <= tier->claimed_pages);
    tier->claimed_pages -= pages;
    kvc_mutex_unlock(&tier->lock);
}

/* Trees are copied on write and freed pages rest for two commits: twice their size. */
uint64_t kvsi_reserve_pages(const kvsi_class *class)
{
    return RESERVE_PAGES + 2 * class->tree_pages + class->live_pages / RESERVE_PART;
}

uint64_t kvsi_first_claim(uint32_t record_pages)
{
    return KVSI_ENV_SLACK_PAGES + KVSI_CLASS_PAGES + 2ull * record_pages;
}

/* --- opening --- */

static kvc_status check_opts(const kvs_tier_opts *opts)
{
    if (opts->size_bytes != sizeof(*opts))
        return KVC_INVALID;
    if (opts->path == NULL || opts->path[0] == '\0' || strlen(opts->path) > MAX_PATH_BYTES) {
        KVC_LOG_ERROR(TIER, "lmdb: needs a folder of at most %u bytes", MAX_PATH_BYTES);
        return KVC_INVALID;
    }
    if (opts->capacity_bytes < KVSI_MIN_CAPACITY) {
        KVC_LOG_ERROR(TIER, "lmdb: a capacity of %llu bytes is less than the minimum of %llu",
                      (unsigned long long)opts->capacity_bytes, KVSI_MIN_CAPACITY);
        return KVC_INVALID;
    }
    if (sysconf(_SC_PAGESIZE) != KVSI_PAGE_BYTES) {
        KVC_LOG_ERROR(TIER, "lmdb: pages of %ld bytes are not supported", sysconf(_SC_PAGESIZE));
        return KVC_UNSUPPORTED;
    }
    return KVC_OK;
}

/*
 * The mark of a clean stop is there only while nobody has the folder: whoever opens it takes it
 * away for good before anything else.
 */
static kvc_status take_mark(kvs_tier *tier)
{
    tier->was_clean = unlinkat(tier->root_fd, CLEAN_MARK, 0) == 0;
    if (!tier->was_clean && errno != ENOENT) {
        KVC_LOG_ERROR(TIER, "lmdb: cannot write in %s: %s", tier->root, strerror(errno));
        return KVC_IO;
    }
    if (tier->was_clean && fsync(tier->root_fd) != 0) {
        KVC_LOG_ERROR(TIER, "lmdb: cannot sync %s: %s", tier->root, strerror(errno));
        return KVC_IO;
    }
    return KVC_OK;
}

/* Without it the next start looks at everything, which is right as well. */
static void leave_mark(kvs_tier *tier)
{
    int fd = openat(tier->root_fd, CLEAN_MARK, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

    if (fd < 0)
        return;
    if (fsync(fd) != 0 || fsync(tier->root_fd) != 0)
        (void)unlinkat(tier->root_fd, CLEAN_MARK, 0);
    close(fd);
}

/* Values lie in the folder in the clear: a folder that was there already is made 0700 too. */
static kvc_status close_to_others(kvs_tier *tier, const char *path)
{
    struct stat st;

    if (fstat(tier->root_fd, &st) != 0)
        return KVC_IO;
    if ((st.st_mode & 077) == 0)
        return KVC_OK;
    if (fchmod(tier->root_fd, st.st_mode & 0700) != 0) {
        KVC_LOG_ERROR(TIER, "lmdb: %s is open to other users (mode %03o): %s", path,
                      (unsigned)st.st_mode & 0777, strerror(errno));
        return KVC_INVALID;
    }
    KVC_LOG_WARN(TIER, "lmdb: %s was open to other users (mode %03o); it is 0700 now", path,
                 (unsigned)st.st_mode & 0777);
    return KVC_OK;
}

/* A folder whose name did not reach the disk takes all that is in it along. */
static kvc_status sync_name(const kvs_tier *tier, const char *path)
{
    int fd = openat(tier->root_fd, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc = fd >= 0 ? fsync(fd) : -1;

    if (rc != 0)
        KVC_LOG_ERROR(TIER, "lmdb: cannot sync the folder of %s: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
    return rc == 0 ? KVC_OK : KVC_IO;
}

/* The folder and the lock that keeps a second server out. */
static kvc_status open_folder(kvs_tier *tier, const char *path)
{
    bool is_new = mkdir(path, 0700) == 0;

    if (!is_new && errno != EEXIST) {
        KVC_LOG_ERROR(TIER, "lmdb: cannot create %s: %s", path, strerror(errno));
        return KVC_IO;
    }
    tier->root_fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (tier->root_fd < 0) {
        KVC_LOG_ERROR(TIER, "lmdb: cannot open %s: %s", path, strerror(errno));
        return errno == ENOTDIR ? KVC_INVALID : KVC_IO;
    }
    kvc_status status = close_to_others(tier, path);
    if (status == KVC_OK && is_new)
        status = sync_name(tier, path);
    if (status != KVC_OK)
        return status;
    tier->lock_fd = openat(tier->root_fd, "lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (tier->lock_fd < 0) {
        KVC_LOG_ERROR(TIER, "lmdb: cannot write in %s: %s", path, strerror(errno));
        return KVC_IO;
    }
    if (flock(tier->lock_fd, LOCK_EX | LOCK_NB) != 0) {
        KVC_LOG_ERROR(TIER, "lmdb: %s is in use by another server", path);
        return KVC_EXISTS;
    }
    return take_mark(tier);
}

static kvc_status check_claims(const kvs_tier *tier)
{
    if (tier->claimed_pages <= tier->capacity_pages)
        return KVC_OK;
    KVC_LOG_ERROR(
        TIER, "lmdb: %s holds more than the capacity of %llu bytes; raise it or empty the folder",
        tier->root, (unsigned long long)tier->capacity_pages * KVSI_PAGE_BYTES);
    return KVC_INVALID;
}

/* Claims what a folder of ours takes on the disk already; at least min_pages. */
static kvc_status claim_meta(kvs_tier *tier, uint64_t min_pages, uint64_t *map_pages_p)
{
    uint64_t pages = kvsi_env_file_pages(tier->root_fd, "meta");

    *map_pages_p = pages < min_pages ? min_pages : pages;
    tier->claimed_pages += *map_pages_p + KVSI_ENV_SLACK_PAGES;
    return check_claims(tier);
}

/* What a class's file takes; where it has holes, less than what it may be mapped for. */
static void claim_class(kvs_tier *tier, const char *name, uint64_t *map_pages_p,
                        uint64_t *claim_pages_p)
{
    uint64_t map = kvsi_env_file_pages(tier->root_fd, name);
    uint64_t claim = kvsi_env_disk_pages(tier->root_fd, name);

    *map_pages_p = map < KVSI_CLASS_PAGES ? KVSI_CLASS_PAGES : map;
    *claim_pages_p = claim < KVSI_CLASS_PAGES ? KVSI_CLASS_PAGES : claim;
    tier->claimed_pages += *claim_pages_p + KVSI_ENV_SLACK_PAGES;
}

void kvsi_class_check(kvs_tier *tier, kvsi_class *class)
{
    if (!atomic_load(&class->env.faulted))
        return;
    kvc_mutex_lock(&tier->lock);
    class->broken = true;
    kvc_mutex_unlock(&tier->lock);
}

kvc_status kvsi_set_aside(kvs_tier *tier, const char *name)
{
    char bad[96];

    snprintf(bad, sizeof(bad), "%s.%llu.bad", name, (unsigned long long)kvc_wall_ns());
    if (renameat(tier->root_fd, name, tier->root_fd, bad) != 0)
        return KVC_IO;
    KVC_COUNT(lmdb_set_aside);
    KVC_LOG_ERROR(TIER, "lmdb: %s/%s is damaged: set aside as %s; remove it to regain its room",
                  tier->root, name, bad);
    return KVC_OK;
}

/* After an unclean stop the checker looks first; else a quick look, since disks rot too. */
static kvc_status try_open(kvs_tier *tier, kvsi_env *env, const char *name, uint64_t map_pages,
                           uint64_t claim_pages)
{
    kvc_status status = kvsi_check_env(tier->root_fd, tier->root, name,
                                       tier->was_clean ? NULL : tier->checker, !tier->was_clean);

    if (status == KVC_OK)
        status = kvsi_env_open(env, tier->root_fd, tier->root, name, map_pages, claim_pages);
    /* A page that failed since the check is no reason to go without the other environments. */
    return status == KVC_IO && atomic_load(&env->faulted) ? KVC_CORRUPT : status;
}

/* Twice before it is called CORRUPT: what that sets aside is lost to those it was promised to, and
 * one read that came short looks like damage to LMDB. */
kvc_status kvsi_check_and_open(kvs_tier *tier, kvsi_env *env, const char *name, uint64_t map_pages,
                               uint64_t claim_pages)
{
    kvc_status status = try_open(tier, env, name, map_pages, claim_pages);

    return status == KVC_CORRUPT ? try_open(tier, env, name, map_pages, claim_pages) : status;
}

static kvc_status open_class(kvs_tier *tier, const char *name, uint32_t record_pages)
{
    kvsi_class *class = &tier->classes[tier->n_classes];
    kvsi_env_pages pages;
    uint64_t map_pages, claim_pages;

    if (tier->n_classes == KVSI_MAX_CLASSES) {
        KVC_LOG_ERROR(TIER, "lmdb: %s has more than %u size classes", tier->root, KVSI_MAX_CLASSES);
        return KVC_INVALID;
    }
    claim_class(tier, name, &map_pages, &claim_pages);
    kvc_status status = kvsi_check_and_open(tier, &class->env, name, map_pages, claim_pages);
    if (status == KVC_CORRUPT)
        return kvsi_set_aside(tier, name);
    if (status != KVC_OK)
        return status;
    status = kvsi_env_count(&class->env, &pages);
    if (status != KVC_OK) {
        kvsi_env_close(&class->env);
        return status;
    }
    class->record_pages = record_pages;
    class->claim_pages = claim_pages;
    tier->n_classes++;
    class->live_pages = pages.records;
    class->tree_pages = pages.tree;
    class->values = pages.entries;
    return status;
}

static kvc_status open_meta(kvs_tier *tier)
{
    kvsi_env_pages pages;
    uint64_t map_pages;
    kvc_status status = claim_meta(tier, KVSI_META_PAGES, &map_pages);

    if (status != KVC_OK)
        return status;
    status = kvsi_check_and_open(tier, &tier->meta, "meta", map_pages, map_pages);
    if (status == KVC_CORRUPT) {
        status = kvsi_set_aside(tier, "meta");
        tier->claimed_pages -= map_pages + KVSI_ENV_SLACK_PAGES; /* open_classes counts it */
        if (status == KVC_OK)
            status = claim_meta(tier, KVSI_META_PAGES, &map_pages);
        if (status == KVC_OK)
            status =
                kvsi_env_open(&tier->meta, tier->root_fd, tier->root, "meta", map_pages, map_pages);
    }
    if (status != KVC_OK)
        return status;
    status = kvsi_env_count(&tier->meta, &pages);
    tier->meta_used_pages = pages.records + pages.tree;
    uint64_t part = tier->capacity_pages / KVSI_META_PART;
    tier->reserved_pages = part > map_pages ? part - map_pages : 0;
    return status;
}

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);

    return n >= m && strcmp(text + n - m, end) == 0;
}

/* What was set aside takes its room, but never keeps the tier from opening. */
static void count_bad(kvs_tier *tier, const char *name)
{
    tier->meta_lost |= strncmp(name, "meta.", 5) == 0;
    tier->claimed_pages += kvsi_env_disk_pages(tier->root_fd, name) + KVSI_ENV_SLACK_PAGES;
    if (tier->claimed_pages > tier->capacity_pages)
        KVC_LOG_WARN(TIER, "lmdb: with %s/%s the folder is larger than its capacity; remove that",
                     tier->root, name);
}

/* What one name in the folder is to us. */
static kvc_status open_entry(kvs_tier *tier, const char *name)
{
    char canonical[32];
    unsigned record_pages = 0;

    if (sscanf(name, "class-%u", &record_pages) != 1 || record_pages == 0)
        return KVC_OK;
    snprintf(canonical, sizeof(canonical), "class-%u", record_pages);
    if (strcmp(canonical, name) == 0 && kvsi_env_file_pages(tier->root_fd, name) == 0) {
        (void)kvsi_env_remove(tier->root_fd, name); /* a stop came before its first page */
        return KVC_OK;
    }
    return strcmp(canonical, name) == 0 ? open_class(tier, name, record_pages) : KVC_OK;
}

/* Files that take more than the capacity, as copies that lost their holes do, give back what holds
   nothing. */
static kvc_status fit_classes(kvs_tier *tier)
{
    for (uint32_t i = 0; i < tier->n_classes; i++)
        if (tier->claimed_pages > tier->capacity_pages)
            (void)kvsi_class_shrink(tier, &tier->classes[i],
                                    tier->claimed_pages - tier->capacity_pages);
    return check_claims(tier);
}

static kvc_status open_classes(kvs_tier *tier)
{
    struct dirent **entries = NULL;
    int n = scandirat(tier->root_fd, ".", &entries, NULL, alphasort);
    kvc_status status = n < 0 ? KVC_IO : KVC_OK;

    for (int i = 0; i < n && status == KVC_OK; i++) {
        if (!ends_with(entries[i]->d_name, ".bad"))
            status = open_entry(tier, entries[i]->d_name);
    }
    if (status == KVC_OK)
        status = fit_classes(tier);
    for (int i = 0; i < n; i++) {
        if (ends_with(entries[i]->d_name, ".bad"))
            count_bad(tier, entries[i]->d_name);
        free(entries[i]);
    }
    free(entries);
    return status;
}

static void close_all(kvs_tier *tier)
{
    for (uint32_t i = 0; i < tier->n_classes; i++) {
        if (tier->classes[i].claim_pages > 0)
            kvsi_env_close(&tier->classes[i].env);
    }
    kvsi_remains_close(tier);
    if (tier->meta.env != NULL)
        kvsi_env_close(&tier->meta);
    kvsi_env_fini(&tier->meta);
    for (uint32_t i = 0; i < KVSI_MAX_CLASSES; i++)
        kvsi_env_fini(&tier->classes[i].env);
    kvsi_lanes_destroy(tier->lanes);
    kvsi_sums_destroy(tier->sums);
    if (tier->lock_fd >= 0)
        close(tier->lock_fd);
    if (tier->root_fd >= 0)
        close(tier->root_fd);
    kvc_cond_fini(&tier->woken);
    kvc_cond_fini(&tier->work);
    kvc_mutex_fini(&tier->lock);
    kvc_mutex_fini(&tier->meta_lock);
    free(tier->checker);
    free(tier->root);
    free(tier);
}

static kvs_tier *create(const kvs_tier_opts *opts)
{
    kvs_tier *tier = calloc(1, sizeof(*tier));

    if (tier == NULL)
        return NULL;
    tier->root_fd = tier->lock_fd = -1;
    tier->capacity_pages = opts->capacity_bytes / KVSI_PAGE_BYTES;
    tier->step_pages = tier->capacity_pages / STEPS;
    if (tier->step_pages < MIN_STEP_PAGES)
        tier->step_pages = MIN_STEP_PAGES;
    tier->max_value_bytes = opts->max_value_bytes > 0 ? opts->max_value_bytes : KVC_MAX_VALUE_BYTES;
    tier->group_commit_ns = opts->group_commit_ns;
    tier->reader_ns = opts->reader_ns > 0 ? opts->reader_ns : DEFAULT_READER_NS;
    tier->group_commit_bytes =
        opts->group_commit_bytes > 0 ? opts->group_commit_bytes : DEFAULT_GROUP_BYTES;
    tier->cut_bytes = opts->cut_bytes > 0 ? opts->cut_bytes : DEFAULT_CUT_BYTES;
    tier->writes_end = &tier->writes;
    tier->drops_end = &tier->drops;
    atomic_init(&tier->bytes_read, 0);
    kvc_mutex_init(&tier->meta_lock, KVSI_RANK_META);
    kvc_mutex_init(&tier->lock, KVC_RANK_TIER);
    kvc_cond_init(&tier->work);
    kvc_cond_init(&tier->woken);
    kvsi_env_init(&tier->meta);
    for (uint32_t i = 0; i < KVSI_MAX_CLASSES; i++)
        kvsi_env_init(&tier->classes[i].env);
    tier->root = strdup(opts->path);
    tier->checker = opts->checker != NULL ? strdup(opts->checker) : NULL;
    return tier;
}

static kvc_status lmdb_open(const kvs_tier_opts *opts, kvs_tier **tier_p)
{
    *tier_p = NULL;
    kvc_status status = check_opts(opts);
    if (status != KVC_OK)
        return status;
    kvs_tier *tier = create(opts);
    if (tier == NULL)
        return KVC_NO_MEMORY;
    status = tier->root != NULL ? open_folder(tier, opts->path) : KVC_NO_MEMORY;
    if (status == KVC_OK)
        status = open_meta(tier);
    if (status == KVC_OK)
        status = open_classes(tier);
    if (status == KVC_OK)
        status = kvsi_sums_create(opts->row_sums_bytes, &tier->sums);
    if (status == KVC_OK)
        status = kvsi_lanes_create(&tier->lanes);
    if (status == KVC_OK)
        status = kvc_thread_start(&tier->writer, "kvs-lmdb-w", kvsi_writer_main, tier);
    if (status != KVC_OK) {
        close_all(tier);
        return status;
    }
    *tier_p = tier;
    return KVC_OK;
}

static void lmdb_close(kvs_tier *tier)
{
    if (tier == NULL)
        return;
    kvc_mutex_lock(&tier->lock);
    tier->stop = true;
    kvc_cond_signal(&tier->work);
    kvc_mutex_unlock(&tier->lock);
    kvc_thread_join(&tier->writer);
    bool clean = !atomic_load(&tier->meta.faulted);
    for (uint32_t i = 0; i < tier->n_classes; i++) {
        clean &= !tier->classes[i].broken && !atomic_load(&tier->classes[i].env.faulted);
        if (tier->classes[i].dirty && kvsi_env_sync(&tier->classes[i].env) != KVC_OK) {
            KVC_LOG_WARN(TIER, "lmdb: the last values written without a promise may be lost");
            clean = false;
        }
    }
    if (clean)
        leave_mark(tier);
    close_all(tier);
}

static void lmdb_usage(kvs_tier *tier, kvs_tier_usage *usage_p)
{
    uint64_t pages = 0, values = 0;
    bool failed = false;

    kvc_mutex_lock(&tier->lock);
    pages = tier->meta_used_pages;
    for (uint32_t i = 0; i < tier->n_classes; i++) {
        pages += tier->classes[i].live_pages + tier->classes[i].tree_pages;
        values += tier->classes[i].values;
        failed |= tier->classes[i].broken;
    }
    *usage_p = (kvs_tier_usage){
        .capacity_bytes = tier->capacity_pages * KVSI_PAGE_BYTES,
        .used_bytes = pages * KVSI_PAGE_BYTES,
        .values = values,
        .bytes_read = atomic_load_explicit(&tier->bytes_read, memory_order_relaxed),
        .bytes_written = tier->bytes_written,
        .failed = failed,
    };
    kvc_mutex_unlock(&tier->lock);
}

const kvs_tier_ops kvsi_lmdb_ops = {
    .name = "lmdb",
    .caps = KVS_TIER_BLOCKING | KVS_TIER_PERSISTENT,
    .open = lmdb_open,
    .close = lmdb_close,
    .usage = lmdb_usage,
    .release = kvsi_release,
    .write = kvsi_write,
    .read = kvsi_read,
    .read_each = kvsi_read_each,
    .sync = kvsi_sync,
    .sync_releases = kvsi_sync_releases,
    .donor = kvsi_donor,
    .recover = kvsi_recover,
    .meta_put = kvsi_meta_put,
    .meta_get = kvsi_meta_get,
    .meta_each = kvsi_meta_each,
};
