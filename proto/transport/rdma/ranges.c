/*
 * ranges.c: lent memory, registered after its first use by a thread of its own.
 *
 * To register a segment of 64 MiB takes milliseconds, for which nobody waits: until it is done,
 * what goes there or comes from there is copied. Everything is guarded by the loop's mutex but the
 * registering itself, on the thread "kvt-rdma-reg" or "kvc-rdma-reg", one range at a time: that
 * range stays in the table, and its domain stays, until it is done. Servers send from lent memory,
 * without a limit; clients have rows written to it, and keep so many ranges and bytes registered,
 * some of them a sum for the whole process: beyond that the one that was used least recently goes,
 * unless that was just now, or the server may still write there.
 */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/metrics.h"
#include "rdma_internal.h"

uint64_t kvtr_region_rest_ns = KVTI_REGION_REST_NS;
static atomic_uint_least64_t all_bytes; /* of regions registered by all clients of the process */

/* The number of ranges that begin at or before base. */
static uint32_t ranges_up_to(const kvtr_domain *domain, const uint8_t *base)
{
    uint32_t low = 0, high = domain->n_ranges;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (domain->ranges[middle].base <= base)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* NULL: none begins there. */
static kvtr_range *range_at(kvtr_domain *domain, const void *base)
{
    uint32_t at = ranges_up_to(domain, base);
    kvtr_range *range = at == 0 ? NULL : &domain->ranges[at - 1];
    return range != NULL && range->base == (const uint8_t *)base ? range : NULL;
}

static void on_added(kvc_lent_watch *watch, void *base, size_t len_bytes)
{
    kvtr_domain *domain = (kvtr_domain *)((char *)watch - offsetof(kvtr_domain, watch));
    kvc_mutex_lock(&domain->loop->mutex);
    if (domain->n_ranges == domain->max_ranges) {
        uint32_t max = domain->max_ranges == 0 ? 16 : 2 * domain->max_ranges;
        kvtr_range *more = realloc(domain->ranges, max * sizeof(*more));
        if (more == NULL) {
            kvc_mutex_unlock(&domain->loop->mutex);
            return; /* it will be copied */
        }
        domain->ranges = more;
        domain->max_ranges = max;
    }
    uint32_t at = ranges_up_to(domain, base);
    memmove(domain->ranges + at + 1, domain->ranges + at,
            (domain->n_ranges - at) * sizeof(*domain->ranges));
    domain->ranges[at] = (kvtr_range){.base = base, .len_bytes = len_bytes};
    domain->n_ranges++;
    kvc_mutex_unlock(&domain->loop->mutex);
}

/* With the mutex held: a client's region is counted no more. */
static void give_room_back(kvtr_loop *loop, size_t len_bytes)
{
    if (!loop->is_client)
        return;
    atomic_fetch_sub(&all_bytes, len_bytes);
    loop->n_regions--;
    loop->region_bytes -= len_bytes;
}

/* With the mutex held: it is registered no more. Gives what is to be deregistered. */
static struct ibv_mr *take_mr(kvtr_loop *loop, kvtr_range *range)
{
    struct ibv_mr *mr = range->mr;
    range->mr = NULL;
    if (mr != NULL)
        give_room_back(loop, range->len_bytes);
    return mr;
}

/* Nothing of it is on its way any more: who lends memory keeps it while his slices are out, and
 * until the transfers to it are done. */
static void on_removed(kvc_lent_watch *watch, void *base, size_t len_bytes)
{
    kvtr_domain *domain = (kvtr_domain *)((char *)watch - offsetof(kvtr_domain, watch));
    kvtr_loop *loop = domain->loop;
    struct ibv_mr *mr = NULL;
    (void)len_bytes;
    kvc_mutex_lock(&loop->mutex);
    while ((loop->registering == domain && loop->registering_base == base) ||
           domain->dropping == base)
        kvc_cond_wait(&loop->changed, &loop->mutex);
    kvtr_range *range = range_at(domain, base);
    if (range != NULL) {
        KVC_ASSERT(range->n_used == 0);
        mr = take_mr(loop, range);
        uint32_t behind = domain->n_ranges - (uint32_t)(range - domain->ranges) - 1;
        memmove(range, range + 1, behind * sizeof(*range));
        domain->n_ranges--;
    }
    kvc_mutex_unlock(&loop->mutex);
    kvtr_deregister(mr);
}

void kvtr_ranges_begin(kvtr_domain *domain)
{
    domain->watch.added = on_added;
    domain->watch.removed = on_removed;
    kvc_lent_watch_begin(&domain->watch);
}

/* With the mutex held: one that is registered; NULL: none is. */
static kvtr_range *any_registered(kvtr_domain *domain)
{
    for (uint32_t i = 0; i < domain->n_ranges; i++) {
        if (domain->ranges[i].mr != NULL)
            return &domain->ranges[i];
    }
    return NULL;
}

/* Watches to the last: who takes memory back meanwhile waits until it is registered no more. */
void kvtr_ranges_end(kvtr_domain *domain)
{
    kvtr_loop *loop = domain->loop;
    kvc_mutex_lock(&loop->mutex);
    for (kvtr_range *range; (range = any_registered(domain)) != NULL;) {
        struct ibv_mr *mr = take_mr(loop, range);
        domain->dropping = range->base;
        kvc_mutex_unlock(&loop->mutex);
        kvtr_deregister(mr);
        kvc_mutex_lock(&loop->mutex);
        domain->dropping = NULL;
        kvc_cond_broadcast(&loop->changed);
    }
    kvc_mutex_unlock(&loop->mutex);
    kvc_lent_watch_end(&domain->watch);
    free(domain->ranges);
}

/* With the mutex held: the range that has all of it, which is asked for if it is not registered;
 * NULL: none has. */
static kvtr_range *find(kvtr_domain *domain, const void *base, size_t len_bytes)
{
    uint32_t at = ranges_up_to(domain, base);
    if (at == 0)
        return NULL;
    kvtr_range *range = &domain->ranges[at - 1];
    size_t off = (size_t)((const uint8_t *)base - range->base);
    if (off > range->len_bytes || len_bytes > range->len_bytes - off)
        return NULL;
    if (range->mr == NULL && !range->wanted) {
        range->wanted = true;
        domain->loop->ranges_wanted = true;
        kvc_cond_signal(&domain->loop->range_wanted);
    }
    return range;
}

struct ibv_mr *kvtr_range_find(kvtr_domain *domain, const void *base, size_t len_bytes)
{
    const kvtr_range *range = find(domain, base, len_bytes);
    return range == NULL ? NULL : range->mr;
}

struct ibv_mr *kvtr_range_use(kvtr_domain *domain, const void *base, size_t len_bytes,
                              const void **base_p)
{
    kvtr_range *range = find(domain, base, len_bytes);
    if (range == NULL || range->mr == NULL)
        return NULL;
    range->n_used++;
    range->used_ns = kvc_now_ns();
    *base_p = range->base;
    return range->mr;
}

void kvtr_range_leave(kvtr_domain *domain, const void *base)
{
    range_at(domain, base)->n_used--;
}

/* ---- the thread ------------------------------------------------------------------------------ */

/* With the mutex held: one that was asked for and not tried yet. */
static kvtr_range *next_wanted(kvtr_loop *loop, kvtr_domain **domain_p)
{
    for (kvtr_domain *domain = loop->domains; domain != NULL; domain = domain->next) {
        for (uint32_t i = 0; i < domain->n_ranges; i++) {
            if (domain->ranges[i].wanted && !domain->ranges[i].tried) {
                *domain_p = domain;
                return &domain->ranges[i];
            }
        }
    }
    return NULL;
}

/* With the mutex held: it is registered, and was not used for a while. */
static bool may_go(const kvtr_range *range, uint64_t now_ns)
{
    return range->mr != NULL && range->n_used == 0 && now_ns >= range->used_ns &&
           now_ns - range->used_ns >= kvtr_region_rest_ns;
}

/* With the mutex held: that which may go and was used least recently. */
static kvtr_range *oldest(kvtr_loop *loop, uint64_t now_ns, kvtr_domain **domain_p)
{
    kvtr_range *found = NULL;
    for (kvtr_domain *domain = loop->domains; domain != NULL; domain = domain->next) {
        for (uint32_t i = 0; i < domain->n_ranges; i++) {
            kvtr_range *range = &domain->ranges[i];
            if (!may_go(range, now_ns) || (found != NULL && found->used_ns <= range->used_ns))
                continue;
            found = range;
            *domain_p = domain;
        }
    }
    return found;
}

/* With the mutex held, which is free until end_work: base of the domain stays in the table. */
static void begin_work(kvtr_loop *loop, kvtr_domain *domain, void *base)
{
    loop->registering = domain;
    loop->registering_base = base;
    kvc_mutex_unlock(&loop->mutex);
}

static void end_work(kvtr_loop *loop)
{
    kvc_mutex_lock(&loop->mutex);
    loop->registering = NULL;
    kvc_cond_broadcast(&loop->changed);
}

/* With the mutex held: whether there is room for len_bytes more, where so many ranges and bytes of
 * those that are registered are gone. */
static bool has_room(const kvtr_loop *loop, size_t len_bytes, uint32_t n_gone, uint64_t gone_bytes)
{
    return !loop->is_client ||
           (loop->n_regions - n_gone < KVTI_REGIONS &&
            loop->region_bytes - gone_bytes + len_bytes <= loop->region_max_bytes &&
            (loop->region_shared_bytes == 0 ||
             atomic_load(&all_bytes) - gone_bytes + len_bytes <= loop->region_shared_bytes));
}

/* With the mutex held: what may go is enough. Else nothing has to. */
static bool room_can_be_made(const kvtr_loop *loop, size_t len_bytes, uint64_t now_ns)
{
    uint32_t n = 0;
    uint64_t bytes = 0;
    for (const kvtr_domain *domain = loop->domains; domain != NULL; domain = domain->next) {
        for (uint32_t i = 0; i < domain->n_ranges; i++) {
            if (may_go(&domain->ranges[i], now_ns)) {
                n++;
                bytes += domain->ranges[i].len_bytes;
            }
        }
    }
    return has_room(loop, len_bytes, n, bytes);
}

/* With the mutex held: one less, towards room for len_bytes. False: there can be none now. */
static bool evict_one(kvtr_loop *loop, size_t len_bytes)
{
    uint64_t now_ns = kvc_now_ns();
    kvtr_domain *domain = NULL;
    kvtr_range *range =
        room_can_be_made(loop, len_bytes, now_ns) ? oldest(loop, now_ns, &domain) : NULL;
    if (range == NULL)
        return false;
    struct ibv_mr *mr = take_mr(loop, range);
    range->wanted = range->tried = false; /* its next use asks for it again */
    KVC_COUNT(rdma_regions_evicted);
    begin_work(loop, domain, range->base);
    kvtr_deregister(mr);
    end_work(loop);
    return true;
}

/* With the mutex held: it is copied to for good, which its owner should know. */
static void tell_too_large(kvtr_loop *loop, const kvtr_range *range)
{
    KVC_COUNT(rdma_regions_too_large);
    if (!loop->told_too_large)
        KVC_LOG_WARN(RDMA,
                     "rows to a region of %zu bytes are copied: %llu may be registered (client "
                     "option region_bytes; by default no more than a quarter of ulimit -l)",
                     range->len_bytes, (unsigned long long)loop->region_max_bytes);
    loop->told_too_large = true;
}

/* With the mutex held: counts a client's region; false: other connections have taken its room. */
static bool take_room(kvtr_loop *loop, size_t len_bytes)
{
    if (!loop->is_client)
        return true;
    uint64_t bytes = atomic_fetch_add(&all_bytes, len_bytes) + len_bytes;
    if (loop->region_shared_bytes != 0 && bytes > loop->region_shared_bytes) {
        atomic_fetch_sub(&all_bytes, len_bytes);
        return false;
    }
    loop->n_regions++;
    loop->region_bytes += len_bytes;
    return true;
}

/* With the mutex held, which is free while it registers. What is sent from is open to no peer,
 * whatever the pool has to allow; rows are written to a client's by the server of its domain. */
static void register_one(kvtr_loop *loop, kvtr_domain *domain, kvtr_range *range)
{
    uint8_t *base = range->base;
    size_t len_bytes = range->len_bytes;
    int access = IBV_ACCESS_LOCAL_WRITE | (loop->is_client ? IBV_ACCESS_REMOTE_WRITE : 0);
    if (!take_room(loop, len_bytes)) {
        range->wanted = false; /* until its next use */
        return;
    }
    range->tried = true;
    begin_work(loop, domain, base);
    struct ibv_mr *mr = kvtr_register(domain->pd, base, len_bytes, access);
    end_work(loop);
    range = range_at(domain, base); /* others may have come and gone, but not this one */
    range->mr = mr;
    range->used_ns = kvc_now_ns();
    if (mr == NULL)
        give_room_back(loop, len_bytes);
}

static void run_registering(void *arg)
{
    kvtr_loop *loop = arg;
    kvc_mutex_lock(&loop->mutex);
    while (!loop->stopping) {
        kvtr_domain *domain;
        kvtr_range *range = loop->ranges_wanted ? next_wanted(loop, &domain) : NULL;
        if (range == NULL) {
            loop->ranges_wanted = false;
            kvc_cond_wait(&loop->range_wanted, &loop->mutex);
        } else if (loop->is_client && range->len_bytes > loop->region_max_bytes) {
            range->tried = true;
            tell_too_large(loop, range);
        } else if (has_room(loop, range->len_bytes, 0, 0)) {
            register_one(loop, domain, range);
        } else if (!evict_one(loop, range->len_bytes)) {
            range->wanted = false; /* until its next use */
        }
    }
    kvc_mutex_unlock(&loop->mutex);
}

kvc_status kvtr_ranges_start(kvtr_loop *loop, const char *thread_name)
{
    return kvc_thread_start(&loop->registrar, thread_name, run_registering, loop);
}

void kvtr_ranges_stop(kvtr_loop *loop)
{
    kvc_thread_join(&loop->registrar);
}
