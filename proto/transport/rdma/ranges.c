/*
 * ranges.c: lent memory, registered after its first use by a thread of its own.
 *
 * To register a segment of 64 MiB takes milliseconds, for which nobody waits: until it is done,
 * what goes there or comes from there is copied. Everything is guarded by the loop's mutex but the
 * registering itself, on the thread "kvt-rdma-reg" or "kvc-rdma-reg", one range at a time: that
 * range stays in the table, and its domain stays, until it is done. Servers send from lent memory,
 * without a limit; clients have rows written to it, and keep so many ranges and bytes registered,
 * some of them a sum for the whole process: beyond that the one that was used least recently goes,
 * unless that was just now, or the server may still write there. What is larger than all that may
 * be registered has windows in its place, which overlap by half: two may have the same bytes.
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

/* With the mutex held. Without memory for the table it stays unknown, and is copied. */
static void add_range(kvtr_domain *domain, kvtr_range range)
{
    if (domain->n_ranges == domain->max_ranges) {
        uint32_t max = domain->max_ranges == 0 ? 16 : 2 * domain->max_ranges;
        kvtr_range *more = realloc(domain->ranges, max * sizeof(*more));
        if (more == NULL)
            return;
        domain->ranges = more;
        domain->max_ranges = max;
    }
    uint32_t at = ranges_up_to(domain, range.base);
    memmove(domain->ranges + at + 1, domain->ranges + at,
            (domain->n_ranges - at) * sizeof(*domain->ranges));
    domain->ranges[at] = range;
    domain->n_ranges++;
}

/* What a region of so many bytes is cut into; all of it where it is not. */
static size_t window_bytes(const kvtr_loop *loop, size_t len_bytes)
{
    if (!loop->is_client || len_bytes <= loop->region_max_bytes)
        return len_bytes;
    size_t window = (size_t)(loop->region_max_bytes / KVTI_WINDOWS) & ~(size_t)8191;
    return window == 0 || len_bytes / window >= KVTI_MAX_WINDOWS / 2 ? len_bytes : window;
}

static void on_added(kvc_lent_watch *watch, void *base, size_t len_bytes, kvc_lent_gpu *gpu)
{
    kvtr_domain *domain = (kvtr_domain *)((char *)watch - offsetof(kvtr_domain, watch));
    size_t window = window_bytes(domain->loop, len_bytes), off = 0, end;
    kvc_mutex_lock(&domain->loop->mutex);
    do {
        end = len_bytes - off < window ? len_bytes : off + window;
        add_range(domain, (kvtr_range){.base = (uint8_t *)base + off,
                                       .len_bytes = end - off,
                                       .whole = base,
                                       .whole_bytes = len_bytes,
                                       .gpu = gpu});
        off += window / 2;
    } while (end < len_bytes);
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

static bool is_within(const void *at, const uint8_t *base, size_t len_bytes)
{
    return (const uint8_t *)at >= base && (const uint8_t *)at < base + len_bytes;
}

/* With the mutex held: something within is being registered, or deregistered. */
static bool is_busy(const kvtr_domain *domain, const uint8_t *base, size_t len_bytes)
{
    const kvtr_loop *loop = domain->loop;
    return (loop->registering == domain && is_within(loop->registering_base, base, len_bytes)) ||
           is_within(domain->dropping, base, len_bytes);
}

/* Nothing of it is on its way any more: who lends memory keeps it while his slices are out, and
 * until the transfers to it are done. */
static void on_removed(kvc_lent_watch *watch, void *base, size_t len_bytes)
{
    kvtr_domain *domain = (kvtr_domain *)((char *)watch - offsetof(kvtr_domain, watch));
    kvtr_loop *loop = domain->loop;
    kvc_mutex_lock(&loop->mutex);
    for (;;) {
        while (is_busy(domain, base, len_bytes))
            kvc_cond_wait(&loop->changed, &loop->mutex);
        uint32_t at = ranges_up_to(domain, (uint8_t *)base + len_bytes - 1);
        if (at == 0 || !is_within(domain->ranges[at - 1].base, base, len_bytes))
            break;
        kvtr_range *range = &domain->ranges[at - 1];
        KVC_ASSERT(range->n_used == 0);
        struct ibv_mr *mr = take_mr(loop, range);
        memmove(range, range + 1, (domain->n_ranges - at) * sizeof(*range));
        domain->n_ranges--;
        kvc_mutex_unlock(&loop->mutex);
        kvtr_deregister(mr);
        kvc_mutex_lock(&loop->mutex);
    }
    kvc_mutex_unlock(&loop->mutex);
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

static bool holds(const kvtr_range *range, const uint8_t *base, size_t len_bytes)
{
    size_t off = (size_t)(base - range->base);
    return off <= range->len_bytes && len_bytes <= range->len_bytes - off;
}

/* With the mutex held: the range that has all of it; NULL: none has. Of two windows, one that is
 * registered. */
static kvtr_range *find(kvtr_domain *domain, const void *base, size_t len_bytes)
{
    uint32_t at = ranges_up_to(domain, base);
    kvtr_range *found = NULL;
    for (uint32_t i = 1; i <= 2 && i <= at; i++) {
        kvtr_range *range = &domain->ranges[at - i];
        if (holds(range, base, len_bytes) &&
            (found == NULL || (found->mr == NULL && range->mr != NULL)))
            found = range;
    }
    return found;
}

/* With the mutex held: asks for it if it is not registered. */
static struct ibv_mr *mr_of(kvtr_domain *domain, kvtr_range *range)
{
    if (range->mr == NULL && !range->wanted) {
        range->wanted = true;
        domain->loop->ranges_wanted = true;
        kvc_cond_signal(&domain->loop->range_wanted);
    }
    return range->mr;
}

struct ibv_mr *kvtr_range_find(kvtr_domain *domain, const void *base, size_t len_bytes)
{
    kvtr_range *range = find(domain, base, len_bytes);
    return range == NULL ? NULL : mr_of(domain, range);
}

struct ibv_mr *kvtr_range_use(kvtr_domain *domain, const void *base, size_t len_bytes, bool summed,
                              const void **base_p)
{
    kvtr_range *range = find(domain, base, len_bytes);
    if (range != NULL && range->gpu != NULL && summed) {
        atomic_store(&range->gpu->why,
                     "sums were asked for, and no CPU can verify what lies there");
        atomic_store(&range->gpu->way, KVC_LENT_COPIED);
        return NULL;
    }
    if (range == NULL || mr_of(domain, range) == NULL)
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

/* With the mutex held, as the first of a region is about to be registered that is larger than all
 * that may be: its owner should know. */
static void tell_too_large(kvtr_loop *loop, kvtr_domain *domain, const kvtr_range *range)
{
    if (!loop->is_client || range->told || range->whole_bytes <= loop->region_max_bytes)
        return;
    for (uint32_t i = 0; i < domain->n_ranges; i++)
        domain->ranges[i].told = domain->ranges[i].told || domain->ranges[i].whole == range->whole;
    KVC_COUNT(rdma_regions_too_large);
    if (!loop->told_too_large)
        KVC_LOG_WARN(RDMA,
                     "of a region of %zu bytes %llu may be registered at once, in pieces of %zu; "
                     "rows to the rest of it are copied (client option region_bytes; by default no "
                     "more than a quarter of ulimit -l)",
                     range->whole_bytes, (unsigned long long)loop->region_max_bytes,
                     range->len_bytes == range->whole_bytes ? 0 : range->len_bytes);
    loop->told_too_large = true;
}

/* With the mutex held: what became of a window of a GPU's region, or of all of it. The region is
 * copied to only where no window of it is registered; what is new of it is counted and said. */
static void tell_gpu(const kvtr_domain *domain, const kvtr_range *range,
                     const kvtr_gpu_result *result)
{
    kvc_lent_gpu *gpu = range->gpu;
    kvc_lent_way before = atomic_load(&gpu->way);
    bool any = false;
    for (uint32_t i = 0; i < domain->n_ranges && !any; i++)
        any = domain->ranges[i].whole == range->whole && domain->ranges[i].mr != NULL;
    if (result->way == KVC_LENT_COPIED && any)
        return;
    atomic_store(&gpu->why, result->why);
    atomic_store(&gpu->way, result->way);
    if (before == result->way)
        return;
    if (result->way == KVC_LENT_DMABUF)
        KVC_COUNT(rdma_gpu_regions_dmabuf);
    if (result->way == KVC_LENT_PEER)
        KVC_COUNT(rdma_gpu_regions_peer);
    if (result->way != KVC_LENT_COPIED)
        return;
    KVC_COUNT(rdma_gpu_regions_copied);
    KVC_LOG_WARN(RDMA, "rows to %zu bytes of a GPU are copied: %s (%s; %s)", range->whole_bytes,
                 result->why, strerror(result->error_dmabuf), strerror(result->error_peer));
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
    size_t len_bytes = range->len_bytes, off_bytes = (size_t)(base - range->whole);
    kvc_lent_gpu *gpu = range->gpu;
    kvtr_gpu_result result = {.way = KVC_LENT_NOT_YET, .why = ""};
    int access = IBV_ACCESS_LOCAL_WRITE | (loop->is_client ? IBV_ACCESS_REMOTE_WRITE : 0);
    if (!take_room(loop, len_bytes)) {
        range->wanted = false; /* until its next use */
        return;
    }
    tell_too_large(loop, domain, range);
    range->tried = true;
    begin_work(loop, domain, base);
    struct ibv_mr *mr = gpu == NULL ? kvtr_register(domain->pd, base, len_bytes, access)
                                    : kvtr_register_gpu(domain->pd, base, len_bytes, access, gpu,
                                                        off_bytes, &result);
    end_work(loop);
    range = range_at(domain, base); /* others may have come and gone, but not this one */
    range->mr = mr;
    range->used_ns = kvc_now_ns();
    if (gpu != NULL) /* who hears of it finds it so */
        tell_gpu(domain, range, &result);
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
            tell_too_large(loop, domain, range);
            range->tried = true;
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
