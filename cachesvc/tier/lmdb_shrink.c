/*
 * lmdb_shrink.c: what gives the disk back: size classes that hold nothing, and holes in the files
 * of those that hold less than they claimed.
 *
 * Thread: kvs-lmdb-w, or open's caller before there is one; donor and takeable on any. Invariants:
 * what is removed was synced as empty, so no crash brings a value back, and a write that was queued
 * for the class meanwhile makes it anew, since this thread is the one that will come to it. A page
 * becomes a hole only if it is free in the last commit, that commit is synced, and no read began
 * before it. LMDB may write to the hole again, so trim compares with what the disk says before
 * each commit.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "lmdb_tier.h"

#define MAX_FREE        (256u << 10) /* free pages looked at in one call */
#define RUNS_PER_LOOK   32u          /* holes between two looks at what the disk has */
#define FREE_DBI        0u           /* where LMDB lists its free pages */
#define DONOR_PAGES_MAX 4096u        /* asked for at once */

/* --- classes that hold nothing --- */

/* The caller holds the lock. */
static bool is_empty(const kvsi_class *class)
{
    return class->claim_pages > 0 && class->empty_ns != 0 && class->values == 0 &&
           class->queued_pages == 0 && class->freeing_pages == 0 && !class->broken &&
           !class->release_lost;
}

uint64_t kvsi_empty_due(const kvs_tier *tier)
{
    uint64_t due = 0;

    for (uint32_t i = 0; i < tier->n_classes; i++) {
        const kvsi_class *class = &tier->classes[i];
        if (is_empty(class) && (due == 0 || class->empty_ns + KVSI_EMPTY_NS < due))
            due = class->empty_ns + KVSI_EMPTY_NS;
    }
    return due;
}

/* Where its files cannot be removed, its room and its place stay taken. */
static bool remove_class(kvs_tier *tier, kvsi_class *class)
{
    char name[sizeof(class->env.name)], path[sizeof(name) + 16];

    if (class->dirty && kvsi_class_sync(tier, class) != KVC_OK)
        return false;
    memcpy(name, class->env.name, sizeof(name));
    kvsi_env_close(&class->env);
    snprintf(path, sizeof(path), "%s/data.mdb", name);
    int fd = openat(tier->root_fd, path, O_RDWR | O_CLOEXEC);
    kvc_status removed = kvsi_env_remove(tier->root_fd, name);
    kvc_mutex_lock(&tier->lock);
    if (removed != KVC_OK) {
        class->broken = true;
        kvc_mutex_unlock(&tier->lock);
        if (fd >= 0)
            close(fd);
        return false;
    }
    uint64_t claim = class->claim_pages + KVSI_ENV_SLACK_PAGES;
    class->claim_pages = class->live_pages = class->tree_pages = 0;
    class->empty_ns = 0;
    tier->refused_pages = 0;
    kvc_mutex_unlock(&tier->lock);
    kvsi_remains_add(tier, fd, claim);
    KVC_LOG_INFO(TIER, "lmdb: %s held no value any more: its room is given back", name);
    return true;
}

void kvsi_remove_empty(kvs_tier *tier)
{
    for (uint32_t i = 0; i < KVSI_MAX_CLASSES; i++) {
        kvsi_class *class = &tier->classes[i];
        kvc_mutex_lock(&tier->lock);
        bool due = is_empty(class) && kvc_now_ns() >= class->empty_ns + KVSI_EMPTY_NS;
        kvc_mutex_unlock(&tier->lock);
        if (due)
            (void)remove_class(tier, class);
    }
}

/* --- holes --- */

typedef struct free_list {
    kvsi_env *env;
    MDB_txn *txn;
    MDB_cursor *cursor;
    uint64_t *pages; /* [MAX_FREE] */
    uint32_t n;
} free_list;

/* Under a guard. */
static int list_free(void *arg)
{
    free_list *list = arg;
    MDB_val key, data;
    MDB_envinfo info;
    int rc = mdb_env_info(list->env->env, &info);

    if (rc == MDB_SUCCESS)
        rc = mdb_cursor_open(list->txn, FREE_DBI, &list->cursor);
    while (rc == MDB_SUCCESS && list->n < MAX_FREE) {
        rc = mdb_cursor_get(list->cursor, &key, &data, MDB_NEXT);
        if (rc == MDB_SUCCESS &&
            !kvsi_free_pages_add(data.mv_data, data.mv_size, info.me_last_pgno + 1, list->pages,
                                 MAX_FREE, &list->n))
            return MDB_CORRUPTED;
    }
    return rc == MDB_NOTFOUND ? MDB_SUCCESS : rc;
}

static int by_number(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

static uint64_t disk_pages(const kvsi_class *class)
{
    return kvsi_env_disk_pages(class->env.dir_fd, class->env.name);
}

/* Makes holes of the free pages, from the end of the file on, until the disk has no more than
   until_pages for it. False: the file system cannot. */
static bool make_holes(const kvsi_class *class, int fd, free_list *list, uint64_t until_pages)
{
    uint32_t runs = 0;

    qsort(list->pages, list->n, sizeof(*list->pages), by_number);
    for (uint32_t end = list->n, from; end > 0; end = from) {
        from = end - 1;
        while (from > 0 && list->pages[from - 1] + 1 == list->pages[from])
            from--;
        if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      (off_t)(list->pages[from] * KVSI_PAGE_BYTES),
                      (off_t)((end - from) * (uint64_t)KVSI_PAGE_BYTES)) != 0)
            return errno != EOPNOTSUPP && errno != ENOSYS;
        if (++runs % RUNS_PER_LOOK == 0 && disk_pages(class) <= until_pages)
            return true;
    }
    return true;
}

/* What was allotted behind the end of the file goes first: nothing was ever there. */
static bool cut_tail(int fd)
{
    struct stat st;

    return fstat(fd, &st) == 0 && ftruncate(fd, st.st_size) == 0;
}

/* As far as it can: until the disk has no more than until_pages for the file. */
static void punch(kvs_tier *tier, kvsi_class *class, uint64_t until_pages)
{
    free_list list = {.env = &class->env};
    mdb_filehandle_t fd;
    bool able = true;

    if (class->broken || atomic_load(&class->env.faulted) || disk_pages(class) <= until_pages ||
        kvsi_class_sync(tier, class) != KVC_OK ||
        mdb_env_get_fd(class->env.env, &fd) != MDB_SUCCESS || !cut_tail(fd) ||
        disk_pages(class) <= until_pages)
        return;
    list.pages = malloc(MAX_FREE * sizeof(*list.pages));
    if (list.pages == NULL)
        return;
    kvsi_env_drain(&class->env);
    if (kvsi_env_read_begin(&class->env, &list.txn) == KVC_OK) {
        int rc = kvsi_env_look(&class->env, list_free, &list);
        if (list.cursor != NULL)
            mdb_cursor_close(list.cursor);
        kvsi_env_read_end(&class->env, list.txn);
        if (rc == MDB_SUCCESS)
            able = make_holes(class, fd, &list, until_pages);
    }
    free(list.pages);
    if (able)
        return;
    KVC_LOG_WARN(TIER, "lmdb: %s: this file system takes nothing back out of a file", tier->root);
    kvc_mutex_lock(&tier->lock);
    tier->no_holes = true;
    kvc_mutex_unlock(&tier->lock);
}

void kvsi_class_trim(kvs_tier *tier, kvsi_class *class, uint64_t pages)
{
    if (class->claim_pages < class->env.map_pages && disk_pages(class) + pages > class->claim_pages)
        punch(tier, class, class->claim_pages > pages ? class->claim_pages - pages : 0);
}

/* Pages of its claim that a class needs for what it has and what is on its way to it. */
static uint64_t needed_pages(const kvsi_class *class)
{
    uint64_t pages =
        class->live_pages + class->tree_pages + kvsi_reserve_pages(class) + class->queued_pages;

    return pages > KVSI_CLASS_PAGES ? pages : KVSI_CLASS_PAGES;
}

uint64_t kvsi_class_shrink(kvs_tier *tier, kvsi_class *class, uint64_t pages)
{
    kvc_mutex_lock(&tier->lock);
    uint64_t claim = class->claim_pages, floor = needed_pages(class);
    kvc_mutex_unlock(&tier->lock);
    uint64_t want = claim > pages && claim - pages > floor ? claim - pages : floor;
    if (tier->no_holes || want >= claim)
        return 0;
    punch(tier, class, want);
    uint64_t taken = disk_pages(class);
    if (taken > want)
        want = taken < claim ? taken : claim;
    kvc_mutex_lock(&tier->lock);
    class->claim_pages = want;
    tier->claimed_pages -= claim - want;
    kvc_mutex_unlock(&tier->lock);
    return claim - want;
}

/* --- who gives, and to whom --- */

static bool is_hungry(const kvs_tier *tier, const kvsi_class *class)
{
    return class->claim_pages < tier->capacity_pages / KVSI_FAIR_PART;
}

/* What one class would give another now; at_most: if all that it holds could go. Those that have
   less than their share get all that is free beyond that of others; else what is idle for long
   stretches is had, and a step of it stays. */
static uint64_t allowance(const kvs_tier *tier, const kvsi_class *class, bool hungry, bool at_most)
{
    uint64_t fair = tier->capacity_pages / KVSI_FAIR_PART;
    uint64_t need = at_most ? KVSI_CLASS_PAGES : needed_pages(class);
    uint64_t have = class->claim_pages + (at_most ? 0 : class->freeing_pages);

    if (class->claim_pages == 0 || class->broken)
        return 0;
    if (is_empty(class))
        return class->claim_pages + KVSI_ENV_SLACK_PAGES;
    if (hungry && need < fair)
        need = fair;
    if (!hungry && !at_most)
        need += tier->step_pages;
    return have > need ? have - need : 0;
}

uint64_t kvsi_takeable(const kvs_tier *tier, const kvsi_class *class, bool at_most)
{
    bool hungry = is_hungry(tier, class);
    uint64_t pages = tier->remains_pages;

    for (uint32_t i = 0; !tier->no_holes && i < tier->n_classes; i++)
        if (&tier->classes[i] != class)
            pages += allowance(tier, &tier->classes[i], hungry, at_most);
    return pages;
}

void kvsi_take(kvs_tier *tier, const kvsi_class *class, uint64_t pages)
{
    for (uint32_t tried = 0;;) {
        kvsi_class *best = NULL;
        uint64_t most = 0, given = 0;
        while (pages > 0 && kvsi_remains_cut(tier, &given))
            pages -= given < pages ? given : pages;
        if (pages == 0 || tier->no_holes)
            return;
        kvc_mutex_lock(&tier->lock);
        for (uint32_t i = 0; i < tier->n_classes; i++) {
            kvsi_class *other = &tier->classes[i];
            uint64_t may = allowance(tier, other, is_hungry(tier, class), false);
            if (other == class || tried >> i & 1 || may <= most)
                continue;
            best = other;
            most = may;
        }
        bool whole = best != NULL && is_empty(best);
        kvc_mutex_unlock(&tier->lock);
        if (best == NULL)
            return;
        tried |= 1u << (best - tier->classes);
        given = 0;
        if (whole)
            (void)remove_class(tier, best); /* and then it is cut */
        else
            given = kvsi_class_shrink(tier, best, most < pages ? most : pages);
        pages -= given < pages ? given : pages;
    }
}

/* The rank-th of the classes, by what they claim, that have more than their share; NULL: no more.
   The caller holds the lock. */
static const kvsi_class *giver(const kvs_tier *tier, const kvsi_class *class, uint32_t rank)
{
    const kvsi_class *last = NULL;

    for (uint32_t k = 0; k <= rank; k++) {
        const kvsi_class *best = NULL;
        for (uint32_t i = 0; i < tier->n_classes; i++) {
            const kvsi_class *other = &tier->classes[i];
            bool later = last == NULL || other->claim_pages < last->claim_pages ||
                         (other->claim_pages == last->claim_pages && other > last);
            bool may = other != class && !other->broken && other->live_pages > 0;
            if (may && !is_hungry(tier, other) && later &&
                (best == NULL || other->claim_pages > best->claim_pages))
                best = other;
        }
        if (best == NULL)
            return NULL;
        last = best;
    }
    return last;
}

/* Whether small pieces lie in the class of longer ones (kvsi_record_room), having none of their
   own. The caller holds the lock. */
static bool has_small_inside(kvs_tier *tier, uint32_t pages)
{
    return pages == kvsi_record_room(1, KVS_PIECE_ROWS) && kvsi_class_of(tier, 1) == NULL;
}

/* Nobody may ask for values of that class's size: whether a class of those that give is that one.
   The caller holds the lock. */
static bool gives_small(kvs_tier *tier, const kvsi_class *class)
{
    const kvsi_class *from = NULL;

    for (uint32_t rank = 0; (from = giver(tier, class, rank)) != NULL; rank++)
        if (has_small_inside(tier, from->record_pages))
            return true;
    return false;
}

bool kvsi_donor(kvs_tier *tier, const kvs_tier_shape *shape, uint32_t rank, uint32_t *pages_p,
                uint64_t *bytes_p)
{
    kvc_mutex_lock(&tier->lock);
    const kvsi_class *class = kvsi_class_for(tier, shape->row_bytes, shape->n_rows);
    uint32_t pages =
        class != NULL ? class->record_pages : kvsi_record_pages(shape->row_bytes, shape->n_rows);
    bool is_new = class == NULL || class->claim_pages == 0;
    bool can = class != NULL || kvsi_class_place(tier) != NULL;
    uint64_t claim = is_new ? 0 : class->claim_pages;
    bool others = !tier->no_holes && (is_new || is_hungry(tier, class));
    const kvsi_class *from = can && others ? giver(tier, class, rank) : NULL;
    uint32_t n_before = 0; /* others that were asked */
    while (from == NULL && others && n_before < rank && giver(tier, class, n_before) != NULL)
        n_before++;
    bool small = can && others && from == NULL && gives_small(tier, class);
    bool first_small = small && rank == n_before;
    n_before += small;
    /* Its own values come after all others, or first and alone; then the smaller ones that it may
       have taken in. */
    bool own = from == NULL && !is_new && rank == n_before;
    bool taken_in =
        from == NULL && !is_new && rank == n_before + 1 && has_small_inside(tier, pages);
    *pages_p = from != NULL ? from->record_pages : first_small || taken_in ? 1 : pages;
    uint64_t want = claim < tier->step_pages ? claim : tier->step_pages;
    want = want < DONOR_PAGES_MAX ? want : DONOR_PAGES_MAX;
    if (is_new)
        want = kvsi_first_claim(pages);
    *bytes_p = from != NULL || first_small ? (want + pages) * KVSI_PAGE_BYTES : 0;
    kvc_mutex_unlock(&tier->lock);
    return can && (from != NULL || first_small || own || taken_in);
}
