/*
 * lmdb_writer.c: the queue in front of LMDB and the thread that empties it, group by group.
 *
 * Threads: write, release and sync on any thread; the rest is kvs-lmdb-w. Invariants: a group
 * takes every release that is queued, and commits it before its writes: a value's release is
 * queued before its next write, so their order holds. done runs on this thread with no lock held,
 * for a durable write only after a full sync of its environment.
 */
#include <stdio.h>
#include <stdlib.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "lmdb_tier.h"

#define MAX_GROUP      1024u /* writes */
#define GAP_PARTS      16u   /* a durable write waits this part of group_commit_ns for company */
#define RETRY_DROPS_NS 20000000ull

/* What the writer works on; taken from the queue under the lock, then its own. */
typedef struct group {
    kvs_tier_write *writes[MAX_GROUP]; /* by class */
    kvsi_batch batches[KVSI_MAX_CLASSES];
    uint32_t n_writes, n_durable;
    kvsi_waiter *waiters;
} group;

/* --- any thread --- */

kvsi_class *kvsi_class_of(kvs_tier *tier, uint32_t pages)
{
    for (uint32_t i = 0; i < tier->n_classes; i++) {
        if (tier->classes[i].record_pages == pages)
            return &tier->classes[i];
    }
    return NULL;
}

/* Holds nothing and nothing is on its way: a place never taken, given back, or one whose creation
 * failed. */
static bool is_vacant(const kvsi_class *class)
{
    return class->claim_pages == 0 && class->queued_pages == 0 && class->freeing_pages == 0;
}

kvsi_class *kvsi_class_place(kvs_tier *tier)
{
    for (uint32_t i = 0; i < KVSI_MAX_CLASSES; i++) {
        if (is_vacant(&tier->classes[i]))
            return &tier->classes[i];
    }
    return NULL;
}

kvsi_class *kvsi_class_for(kvs_tier *tier, uint32_t row_bytes, uint32_t n_rows)
{
    kvsi_class *class = kvsi_class_of(tier, kvsi_record_pages(row_bytes, n_rows));
    uint32_t room = kvsi_record_room(row_bytes, n_rows);

    return class == NULL && room > 0 && kvsi_class_place(tier) == NULL ? kvsi_class_of(tier, room)
                                                                       : class;
}

/* A size class that cannot be had is named, once; the caller holds the lock. */
static void say_refused(kvs_tier *tier, uint32_t pages, const char *why)
{
    char list[KVSI_MAX_CLASSES * 12] = "";
    size_t n = 0;

    if (tier->refused_pages == pages)
        return;
    tier->refused_pages = pages;
    for (uint32_t i = 0; i < tier->n_classes; i++) {
        if (!is_vacant(&tier->classes[i]))
            n += (size_t)snprintf(list + n, sizeof(list) - n, "%s%u", n > 0 ? ", " : "",
                                  tier->classes[i].record_pages);
    }
    KVC_LOG_ERROR(TIER, "lmdb: values of %u pages are refused: %s; those of %s pages exist", pages,
                  why, list);
}

/* Whether the class could hold a value if it held no other, and others gave what they can spare;
   else releases help nobody. */
static bool could_hold(const kvs_tier *tier, const kvsi_class *class)
{
    uint64_t left = kvsi_left_pages(tier) + kvsi_takeable(tier, class, true);

    if (class->claim_pages == 0)
        return kvsi_first_claim(class->record_pages) <= left;
    return class->live_pages > 0 || class->queued_pages > 0 ||
           class->tree_pages + kvsi_reserve_pages(class) + class->record_pages <=
               class->claim_pages + left;
}

/* Whether the write may be queued; the caller holds the lock. */
static kvc_status admit(kvs_tier *tier, const kvs_tier_write *write, kvsi_class **class_p)
{
    kvsi_class *class = kvsi_class_for(tier, write->row_bytes, write->n_rows);
    uint32_t pages =
        class != NULL ? class->record_pages : kvsi_record_pages(write->row_bytes, write->n_rows);

    if (tier->stop)
        return KVC_CLOSED;
    bool is_new = class == NULL;
    if (is_new)
        class = kvsi_class_place(tier);
    if (class == NULL) {
        say_refused(tier, pages, "it would be a ninth size class");
        return KVC_NO_SPACE;
    }
    if (tier->n_queued == KVSI_MAX_QUEUED)
        return KVC_AGAIN;
    if (is_new) {
        class->record_pages = pages;
        class->broken = false; /* that was about another file */
    }
    if (class->broken)
        return KVC_IO;
    if (!could_hold(tier, class)) {
        say_refused(tier, pages, "other size classes have claimed the whole capacity");
        return KVC_NO_SPACE;
    }
    uint64_t room = class->claim_pages + kvsi_left_pages(tier) + kvsi_takeable(tier, class, false);
    uint64_t need = class->live_pages + class->tree_pages + kvsi_reserve_pages(class) +
                    class->queued_pages + pages;
    if (class->claim_pages == 0 && need < kvsi_first_claim(pages))
        need = kvsi_first_claim(pages);
    if (need > room + class->freeing_pages)
        return KVC_AGAIN;
    if (class >= &tier->classes[tier->n_classes])
        tier->n_classes = (uint32_t)(class - tier->classes) + 1;
    *class_p = class;
    return KVC_OK;
}

static void note_queued(kvs_tier *tier)
{
    tier->last_queued_ns = kvc_now_ns();
    if (tier->writes == NULL && tier->drops == NULL)
        tier->first_queued_ns = tier->last_queued_ns;
}

kvc_status kvsi_write(kvs_tier *tier, kvs_tier_write *write)
{
    uint64_t bytes = (uint64_t)write->row_bytes * write->n_rows;
    kvsi_class *class = NULL;

    if (bytes == 0 || write->n_rows > KVSI_MAX_ROWS || bytes > tier->max_value_bytes)
        return KVC_INVALID;
    kvc_mutex_lock(&tier->lock);
    kvc_status status = admit(tier, write, &class);
    if (status == KVC_OK) {
        note_queued(tier);
        class->queued_pages += class->record_pages;
        write->status = KVC_OK;
        write->slot = (kvs_slot){(uint64_t)(class - tier->classes), 0};
        write->next = NULL;
        *tier->writes_end = write;
        tier->writes_end = &write->next;
        tier->n_queued++;
        tier->accepted++;
        tier->queued_bytes += bytes;
        tier->n_durable_queued += write->durable;
        kvc_cond_signal(&tier->work);
    }
    kvc_mutex_unlock(&tier->lock);
    return status;
}

/* The caller holds the lock. */
static void append_drop(kvs_tier *tier, kvsi_drop *drop)
{
    note_queued(tier);
    drop->next = NULL;
    *tier->drops_end = drop;
    tier->drops_end = &drop->next;
    tier->classes[drop->class_number].freeing_pages +=
        tier->classes[drop->class_number].record_pages;
}

void kvsi_drop_push(kvs_tier *tier, kvsi_drop *drop)
{
    kvc_mutex_lock(&tier->lock);
    append_drop(tier, drop);
    kvc_cond_signal(&tier->work);
    kvc_mutex_unlock(&tier->lock);
}

void kvsi_release(kvs_tier *tier, const kvs_value_key *key, kvs_slot slot)
{
    kvsi_drop *drop = KVC_FAULT("lmdb.release") ? NULL : malloc(sizeof(*drop));

    KVC_ASSERT(slot.a < KVSI_MAX_CLASSES);
    if (drop == NULL) {
        kvc_mutex_lock(&tier->lock);
        tier->classes[slot.a].release_lost = true;
        kvc_mutex_unlock(&tier->lock);
        KVC_LOG_ERROR(TIER, "lmdb: no memory to release a value; it stays until the next start");
        return;
    }
    drop->class_number = (uint32_t)slot.a;
    drop->key_bytes = KVSI_KEY_BYTES;
    kvsi_key_pack(key, (uint32_t)(slot.b >> 32), (uint32_t)slot.b, drop->key);
    kvsi_sums_drop(tier->sums, drop->key);
    kvsi_drop_push(tier, drop);
}

/* The caller holds the lock; it is left meanwhile. */
static void wait_for_sync(kvs_tier *tier, kvsi_waiter *waiter)
{
    waiter->ticket = tier->accepted;
    waiter->next = tier->waiters;
    tier->waiters = waiter;
    kvc_cond_signal(&tier->work);
    while (!waiter->done)
        kvc_cond_wait(&tier->woken, &tier->lock);
}

kvc_status kvsi_sync(kvs_tier *tier, const kvs_slot *slots, uint32_t n, int8_t *status)
{
    kvsi_waiter waiter = {.classes = n == 0 ? (1u << KVSI_MAX_CLASSES) - 1 : 0};

    for (uint32_t i = 0; i < n; i++) {
        KVC_ASSERT(slots[i].a < KVSI_MAX_CLASSES);
        waiter.classes |= 1u << slots[i].a;
    }
    kvc_mutex_lock(&tier->lock);
    wait_for_sync(tier, &waiter);
    kvc_mutex_unlock(&tier->lock);
    for (uint32_t i = 0; status != NULL && i < n; i++)
        status[i] = waiter.failed >> slots[i].a & 1 ? KVC_IO : KVC_OK;
    return waiter.failed == 0 ? KVC_OK : KVC_IO;
}

kvc_status kvsi_sync_releases(kvs_tier *tier, const kvs_tier_shape *shapes, uint32_t n)
{
    kvsi_waiter waiter = {.classes = 0};
    bool lost = false;

    kvc_mutex_lock(&tier->lock);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t pages[] = {kvsi_record_pages(shapes[i].row_bytes, shapes[i].n_rows),
                            kvsi_record_room(shapes[i].row_bytes, shapes[i].n_rows)};
        for (uint32_t k = 0; k < 2; k++) {
            const kvsi_class *class = pages[k] > 0 ? kvsi_class_of(tier, pages[k]) : NULL;
            if (class == NULL)
                continue; /* nothing of that size was ever here */
            waiter.classes |= 1u << (class - tier->classes);
            lost = lost || class->release_lost;
        }
    }
    if (waiter.classes != 0)
        wait_for_sync(tier, &waiter);
    kvc_mutex_unlock(&tier->lock);
    return waiter.failed == 0 && !lost ? KVC_OK : KVC_IO;
}

/* --- kvs-lmdb-w: taking a group --- */

/* How long to go on gathering; 0: there is nothing to do at all. The caller holds the lock. */
static uint64_t gather_until(const kvs_tier *tier)
{
    uint64_t until = tier->first_queued_ns + tier->group_commit_ns;

    if (tier->writes == NULL && tier->drops == NULL)
        return 0;
    if (tier->n_durable_queued > 0) {
        uint64_t gap = tier->last_queued_ns + tier->group_commit_ns / GAP_PARTS;
        until = gap < until ? gap : until;
    }
    return until;
}

/* Waits for a group worth taking, or for a class or what is left of one that is to go; false:
   stopped and nothing is left. Holds the lock. */
static bool wait_for_group(kvs_tier *tier)
{
    for (;;) {
        uint64_t until = gather_until(tier);
        if (tier->stop || tier->waiters != NULL)
            return until != 0 || tier->waiters != NULL;
        if (until != 0 && (tier->queued_bytes >= tier->group_commit_bytes || kvc_now_ns() >= until))
            return true;
        uint64_t due = kvsi_empty_due(tier);
        if (tier->n_remains > 0 || (due != 0 && kvc_now_ns() >= due))
            return true;
        if (until == 0 || (due != 0 && due < until))
            until = due;
        (void)kvc_cond_wait_until(&tier->work, &tier->lock, until);
    }
}

/* Cuts the first writes, up to a group's size, off the queue; gives them as a list. */
static kvs_tier_write *cut_writes(kvs_tier *tier, group *g, uint32_t *per_class)
{
    kvs_tier_write *first = tier->writes, **link = &tier->writes;
    uint64_t bytes = 0;

    while (*link != NULL && g->n_writes < MAX_GROUP &&
           (g->n_writes == 0 || bytes < tier->group_commit_bytes)) {
        kvs_tier_write *write = *link;
        bytes += (uint64_t)write->row_bytes * write->n_rows;
        per_class[write->slot.a]++;
        g->n_writes++;
        g->n_durable += write->durable;
        link = &write->next;
    }
    tier->writes = *link;
    *link = NULL;
    if (tier->writes == NULL)
        tier->writes_end = &tier->writes;
    tier->n_queued -= g->n_writes;
    tier->queued_bytes -= bytes;
    tier->n_durable_queued -= g->n_durable;
    tier->first_queued_ns = kvc_now_ns();
    return first;
}

static void take_drops(kvs_tier *tier, group *g)
{
    kvsi_drop *drop = tier->drops;

    tier->drops = NULL;
    tier->drops_end = &tier->drops;
    while (drop != NULL) {
        kvsi_drop *next = drop->next;
        kvsi_batch *batch = &g->batches[drop->class_number];
        drop->next = NULL;
        *batch->drops_end = drop;
        batch->drops_end = &drop->next;
        batch->n_drops++;
        drop = next;
    }
}

/* Waiters whose writes are all in this group or before it. */
static void take_waiters(kvs_tier *tier, group *g)
{
    kvsi_waiter **link = &tier->waiters;

    while (*link != NULL) {
        kvsi_waiter *waiter = *link;
        if (waiter->ticket > tier->processed + g->n_writes) {
            link = &waiter->next;
            continue;
        }
        *link = waiter->next;
        waiter->next = g->waiters;
        g->waiters = waiter;
    }
}

static void take_group(kvs_tier *tier, group *g)
{
    uint32_t per_class[KVSI_MAX_CLASSES] = {0}, at = 0;

    g->n_writes = g->n_durable = 0;
    g->waiters = NULL;
    kvs_tier_write *list = cut_writes(tier, g, per_class);
    for (uint32_t i = 0; i < KVSI_MAX_CLASSES; i++) {
        g->batches[i] =
            (kvsi_batch){.class = &tier->classes[i], .number = i, .writes = g->writes + at};
        g->batches[i].drops_end = &g->batches[i].drops;
        at += per_class[i];
    }
    for (; list != NULL; list = list->next) {
        kvsi_batch *batch = &g->batches[list->slot.a];
        batch->writes[batch->n_writes++] = list;
    }
    take_drops(tier, g);
    take_waiters(tier, g);
}

/* --- kvs-lmdb-w: working on it --- */

static void free_drops(kvsi_drop *drop)
{
    while (drop != NULL) {
        kvsi_drop *next = drop->next;
        free(drop);
        drop = next;
    }
}

/* Accounts for a batch that was worked on; releases that failed wait for another round. */
static void settle_batch(kvs_tier *tier, kvsi_batch *batch)
{
    kvsi_class *class = batch->class;
    kvsi_drop *failed = batch->drops_done ? NULL : batch->drops;

    kvc_mutex_lock(&tier->lock);
    class->queued_pages -= (uint64_t)batch->n_writes * class->record_pages;
    class->freeing_pages -= (uint64_t)batch->n_drops * class->record_pages;
    for (uint32_t i = 0; i < batch->n_writes; i++) {
        const kvs_tier_write *write = batch->writes[i];
        if (write->status == KVC_OK)
            tier->bytes_written += (uint64_t)write->row_bytes * write->n_rows;
    }
    if (failed != NULL && (class->broken || tier->stop)) {
        KVC_LOG_ERROR(TIER, "lmdb: %s: %u releases failed; those values stay until a next start",
                      class->env.name, batch->n_drops);
    } else if (failed != NULL) {
        batch->drops = NULL;
        while (failed != NULL) {
            kvsi_drop *next = failed->next;
            append_drop(tier, failed);
            failed = next;
        }
        tier->first_queued_ns = kvc_now_ns() + RETRY_DROPS_NS;
    }
    kvc_mutex_unlock(&tier->lock);
    free_drops(batch->drops);
    batch->drops = NULL;
}

static bool has_durable(const kvsi_batch *batch)
{
    for (uint32_t i = 0; i < batch->n_writes; i++) {
        const kvs_tier_write *write = batch->writes[i];
        if (write != NULL && write->durable && write->status == KVC_OK)
            return true;
    }
    return false;
}

kvc_status kvsi_class_sync(kvs_tier *tier, kvsi_class *class)
{
    kvc_status status = kvsi_env_sync(&class->env);

    class->dirty = false;
    if (status != KVC_OK) {
        kvc_mutex_lock(&tier->lock);
        class->broken = true;
        kvc_mutex_unlock(&tier->lock);
    }
    return status;
}

/* Syncs what a durable write or a waiter of this group needs; a class fails only its own. */
static void sync_group(kvs_tier *tier, group *g)
{
    uint32_t wanted = 0, failed = 0;

    for (const kvsi_waiter *waiter = g->waiters; waiter != NULL; waiter = waiter->next)
        wanted |= waiter->classes;
    for (uint32_t i = 0; i < KVSI_MAX_CLASSES; i++) {
        kvsi_batch *batch = &g->batches[i];
        kvc_status status = KVC_OK;
        if (batch->class->dirty && (has_durable(batch) || wanted >> i & 1))
            status = kvsi_class_sync(tier, batch->class);
        if (batch->class->broken) /* also where an earlier sync of this group failed */
            status = KVC_IO;
        if (batch->class->broken || (batch->n_drops > 0 && !batch->drops_done))
            failed |= 1u << i;
        for (uint32_t k = 0; status != KVC_OK && k < batch->n_writes; k++) {
            if (batch->writes[k] != NULL && batch->writes[k]->status == KVC_OK)
                batch->writes[k]->status = status;
        }
    }
    for (kvsi_waiter *waiter = g->waiters; waiter != NULL; waiter = waiter->next)
        waiter->failed = waiter->classes & failed;
}

/* Calls done for the members that are durable, or for those that are not. */
static void finish_writes(kvs_tier *tier, group *g, bool durable)
{
    uint8_t key[KVSI_KEY_BYTES];

    for (uint32_t i = 0; i < g->n_writes; i++) {
        kvs_tier_write *write = g->writes[i];
        if (write == NULL || write->durable != durable)
            continue;
        kvsi_key_pack(&write->key, write->row_bytes, write->n_rows, key);
        kvsi_sums_drop(tier->sums, key);
        g->writes[i] = NULL; /* the caller's again */
        write->done(write);
    }
}

static void wake_waiters(kvs_tier *tier, group *g)
{
    kvc_mutex_lock(&tier->lock);
    tier->processed += g->n_writes;
    for (kvsi_waiter *waiter = g->waiters; waiter != NULL;) {
        kvsi_waiter *next = waiter->next; /* gone once done is seen */
        waiter->done = true;
        waiter = next;
    }
    if (g->waiters != NULL)
        kvc_cond_broadcast(&tier->woken);
    kvc_mutex_unlock(&tier->lock);
}

/* Classes in which something was released go first: what they give, others can take. */
static void commit_group(kvs_tier *tier, group *g, bool with_drops)
{
    for (uint32_t i = 0; i < KVSI_MAX_CLASSES; i++) {
        kvsi_batch *batch = &g->batches[i];
        if ((batch->n_writes == 0 && batch->n_drops == 0) || (batch->n_drops > 0) != with_drops)
            continue;
        kvsi_commit(tier, batch);
        settle_batch(tier, batch);
    }
}

static void process_group(kvs_tier *tier, group *g)
{
    commit_group(tier, g, true);
    commit_group(tier, g, false);
    finish_writes(tier, g, false);
    sync_group(tier, g);
    finish_writes(tier, g, true);
    wake_waiters(tier, g);
}

void kvsi_writer_main(void *arg)
{
    kvs_tier *tier = arg;
    group g;

    for (;;) {
        kvc_mutex_lock(&tier->lock);
        bool more = wait_for_group(tier);
        if (more)
            take_group(tier, &g);
        kvc_mutex_unlock(&tier->lock);
        if (!more)
            return;
        process_group(tier, &g);
        kvsi_remove_empty(tier);
        uint64_t given;
        (void)kvsi_remains_cut(tier, &given);
    }
}
