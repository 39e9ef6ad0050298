/*
 * ranges.c: lent memory, registered after its first use by a thread of its own.
 *
 * To register a segment of 64 MiB takes milliseconds, for which nobody waits: until it is done,
 * what is sent of it is copied. Everything is guarded by the loop's mutex but the registering
 * itself, on the thread "kvt-rdma-reg", one range at a time: that range stays in the table, and its
 * domain stays, until it is done. Only servers send from lent memory.
 */
#include <stdlib.h>
#include <string.h>

#include "rdma_internal.h"

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

/* Nothing of it is on its way any more: who lends memory keeps it while his slices are out. */
static void on_removed(kvc_lent_watch *watch, void *base, size_t len_bytes)
{
    kvtr_domain *domain = (kvtr_domain *)((char *)watch - offsetof(kvtr_domain, watch));
    kvtr_loop *loop = domain->loop;
    struct ibv_mr *mr = NULL;
    (void)len_bytes;
    kvc_mutex_lock(&loop->mutex);
    while (loop->registering == domain && loop->registering_base == base)
        kvc_cond_wait(&loop->changed, &loop->mutex);
    kvtr_range *range = range_at(domain, base);
    if (range != NULL) {
        mr = range->mr;
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

void kvtr_ranges_end(kvtr_domain *domain)
{
    kvc_lent_watch_end(&domain->watch);
    for (uint32_t i = 0; i < domain->n_ranges; i++)
        kvtr_deregister(domain->ranges[i].mr);
    free(domain->ranges);
}

struct ibv_mr *kvtr_range_find(kvtr_domain *domain, const void *base, size_t len_bytes)
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
    return range->mr;
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

/* With the mutex held, which is free while it registers. They are only ever sent from: whatever the
 * pool has to allow, no peer may touch them. */
static void register_one(kvtr_loop *loop, kvtr_domain *domain, kvtr_range *range)
{
    uint8_t *base = range->base;
    size_t len_bytes = range->len_bytes;
    loop->registering = domain;
    loop->registering_base = base;
    range->tried = true;
    kvc_mutex_unlock(&loop->mutex);
    struct ibv_mr *mr = kvtr_register(domain->pd, base, len_bytes, IBV_ACCESS_LOCAL_WRITE);
    kvc_mutex_lock(&loop->mutex);
    range_at(domain, base)->mr = mr; /* others may have come and gone, but not this one */
    loop->registering = NULL;
    kvc_cond_broadcast(&loop->changed);
}

static void run_registering(void *arg)
{
    kvtr_loop *loop = arg;
    kvc_mutex_lock(&loop->mutex);
    while (!loop->stopping) {
        kvtr_domain *domain;
        kvtr_range *range = loop->ranges_wanted ? next_wanted(loop, &domain) : NULL;
        if (range != NULL) {
            register_one(loop, domain, range);
        } else {
            loop->ranges_wanted = false;
            kvc_cond_wait(&loop->range_wanted, &loop->mutex);
        }
    }
    kvc_mutex_unlock(&loop->mutex);
}

kvc_status kvtr_ranges_start(kvtr_loop *loop)
{
    return kvc_thread_start(&loop->registrar, "kvt-rdma-reg", run_registering, loop);
}

void kvtr_ranges_stop(kvtr_loop *loop)
{
    kvc_thread_join(&loop->registrar);
}
