/*
 * memory.c: protection domains, the pool of registered buffers, and lent memory registered at its
 * first use.
 *
 * Guarded by the loop's mutex. Lent memory is registered for local use alone, and so is a server's
 * pool, whose keys it names to nobody. A client names the keys of its pool to the one server of its
 * connection, whose domain nobody else shares. iWARP wants the target of a READ open to the peer,
 * so there the server's pool is, and each link has a domain of its own at both ends.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/log.h"
#include "base/metrics.h"
#include "rdma_internal.h"

#define SMALLEST_BYTES 8192u

struct ibv_mr *kvtr_register(struct ibv_pd *pd, void *base, size_t len_bytes, int access)
{
    struct ibv_mr *mr = kvtr_verbs_now->reg_mr(pd, base, len_bytes, access);
    if (mr == NULL) {
        KVC_COUNT(rdma_registrations_failed);
        KVC_LOG_WARN(RDMA, "cannot register %zu bytes: %s%s", len_bytes, strerror(errno),
                     errno == ENOMEM ? "; the limit on locked memory (ulimit -l) may be too low"
                                     : "");
        return NULL;
    }
    KVC_GAUGE_ADD(rdma_registrations, 1);
    KVC_GAUGE_ADD(rdma_registered_bytes, len_bytes);
    return mr;
}

void kvtr_deregister(struct ibv_mr *mr)
{
    if (mr == NULL)
        return;
    size_t len_bytes = mr->length;
    int rc = kvtr_verbs_now->dereg_mr(mr);
    if (rc != 0)
        KVC_LOG_ERROR(RDMA, "cannot deregister %zu bytes: %s", len_bytes, strerror(rc));
    KVC_GAUGE_SUB(rdma_registrations, 1);
    KVC_GAUGE_SUB(rdma_registered_bytes, len_bytes);
}

/* ---- lent memory ----------------------------------------------------------------------------- */

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

static void on_removed(kvc_lent_watch *watch, void *base, size_t len_bytes)
{
    kvtr_domain *domain = (kvtr_domain *)((char *)watch - offsetof(kvtr_domain, watch));
    (void)len_bytes;
    kvc_mutex_lock(&domain->loop->mutex);
    uint32_t at = ranges_up_to(domain, base);
    if (at > 0 && domain->ranges[at - 1].base == (uint8_t *)base) {
        kvtr_deregister(domain->ranges[at - 1].mr);
        memmove(domain->ranges + at - 1, domain->ranges + at,
                (domain->n_ranges - at) * sizeof(*domain->ranges));
        domain->n_ranges--;
    }
    kvc_mutex_unlock(&domain->loop->mutex);
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
    if (range->mr == NULL && !range->failed) {
        /* They are only ever sent from: whatever the pool has to allow, no peer may touch them. */
        range->mr =
            kvtr_register(domain->pd, range->base, range->len_bytes, IBV_ACCESS_LOCAL_WRITE);
        range->failed = range->mr == NULL;
    }
    return range->mr;
}

/* ---- the pool -------------------------------------------------------------------------------- */

static uint32_t bin_of(uint32_t len_bytes)
{
    uint32_t bin = 0;
    while ((SMALLEST_BYTES << bin) < len_bytes)
        bin++;
    KVC_ASSERT(bin < KVTI_BINS);
    return bin;
}

static void buf_free(kvtr_buf *buf)
{
    buf->domain->pool_bytes -= buf->size_bytes;
    kvtr_deregister(buf->mr);
    free(buf->bytes);
    free(buf);
}

/* Frees what is kept of other sizes until there is room. */
static bool make_room(kvtr_domain *domain, uint32_t size_bytes)
{
    for (uint32_t c = KVTI_BINS; c-- > 0;) {
        while (domain->pool_bytes + size_bytes > domain->pool_max_bytes &&
               domain->free[c] != NULL) {
            kvtr_buf *buf = domain->free[c];
            domain->free[c] = buf->next;
            buf_free(buf);
        }
    }
    return domain->pool_bytes + size_bytes <= domain->pool_max_bytes;
}

static kvtr_buf *buf_create(kvtr_domain *domain, uint32_t bin)
{
    kvtr_buf *buf = calloc(1, sizeof(*buf));
    if (buf == NULL)
        return NULL;
    buf->domain = domain;
    buf->bin = bin;
    buf->size_bytes = SMALLEST_BYTES << bin;
    /* Zeroed: what this process had there before is none of the peer's business. */
    if (posix_memalign((void **)&buf->bytes, 4096, buf->size_bytes) != 0)
        goto err_buf;
    memset(buf->bytes, 0, buf->size_bytes);
    buf->mr = kvtr_register(domain->pd, buf->bytes, buf->size_bytes, domain->access);
    if (buf->mr == NULL)
        goto err_bytes;
    domain->pool_bytes += buf->size_bytes;
    return buf;

err_bytes:
    free(buf->bytes);
err_buf:
    free(buf);
    return NULL;
}

kvtr_buf *kvtr_buf_get(kvtr_domain *domain, uint32_t len_bytes, bool *full_p)
{
    uint32_t bin = bin_of(len_bytes);
    kvtr_buf *buf = domain->free[bin];
    *full_p = false;
    if (buf != NULL) {
        domain->free[bin] = buf->next;
    } else {
        *full_p = !make_room(domain, SMALLEST_BYTES << bin);
        buf = *full_p ? NULL : buf_create(domain, bin);
    }
    if (buf != NULL)
        domain->n_lent++;
    return buf;
}

void kvtr_buf_put(kvtr_buf *buf)
{
    if (buf == NULL)
        return;
    buf->domain->n_lent--;
    buf->next = buf->domain->free[buf->bin];
    buf->domain->free[buf->bin] = buf;
}

/* ---- domains --------------------------------------------------------------------------------- */

static kvtr_domain *find_shared(kvtr_loop *loop, struct ibv_context *context)
{
    kvtr_domain *domain = loop->domains;
    while (domain != NULL && (domain->context != context || !domain->shared))
        domain = domain->next;
    return domain;
}

kvc_status kvtr_domain_get(kvtr_loop *loop, struct ibv_context *context, kvtr_domain **domain_p)
{
    bool iwarp = context->device->transport_type == IBV_TRANSPORT_IWARP;
    kvtr_domain *domain = find_shared(loop, context); /* only this thread changes the list */
    *domain_p = domain;
    if (domain != NULL) {
        kvc_mutex_lock(&loop->mutex);
        domain->n_links++;
        kvc_mutex_unlock(&loop->mutex);
        return KVC_OK;
    }
    domain = calloc(1, sizeof(*domain));
    if (domain == NULL)
        return KVC_NO_MEMORY;
    domain->loop = loop;
    domain->context = context;
    domain->n_links = 1;
    domain->shared = !iwarp;
    domain->pool_max_bytes = loop->pool_max_bytes;
    domain->access = IBV_ACCESS_LOCAL_WRITE;
    if (loop->is_client)
        domain->access |= IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE;
    else if (iwarp)
        domain->access |= IBV_ACCESS_REMOTE_WRITE;
    domain->pd = kvtr_verbs_now->alloc_pd(context);
    if (domain->pd == NULL) {
        KVC_LOG_ERROR(RDMA, "cannot make a protection domain: %s", strerror(errno));
        free(domain);
        return KVC_DEVICE;
    }
    domain->watch.added = on_added;
    domain->watch.removed = on_removed;
    kvc_lent_watch_begin(&domain->watch);
    kvc_mutex_lock(&loop->mutex);
    domain->next = loop->domains;
    loop->domains = domain;
    kvc_mutex_unlock(&loop->mutex);
    *domain_p = domain;
    return KVC_OK;
}

void kvtr_domain_put(kvtr_domain *domain)
{
    if (domain == NULL)
        return;
    kvc_mutex_lock(&domain->loop->mutex);
    domain->n_links--;
    kvc_mutex_unlock(&domain->loop->mutex);
}

/* Nothing of it is in anybody's hands. */
static void domain_free(kvtr_domain *domain)
{
    kvc_lent_watch_end(&domain->watch);
    for (uint32_t i = 0; i < domain->n_ranges; i++)
        kvtr_deregister(domain->ranges[i].mr);
    for (uint32_t b = 0; b < KVTI_BINS; b++) {
        while (domain->free[b] != NULL) {
            kvtr_buf *buf = domain->free[b];
            domain->free[b] = buf->next;
            buf_free(buf);
        }
    }
    KVC_ASSERT(domain->pool_bytes == 0);
    if (kvtr_verbs_now->dealloc_pd(domain->pd) != 0)
        KVC_LOG_ERROR(RDMA, "cannot free a protection domain: %s", strerror(errno));
    free(domain->ranges);
    free(domain);
}

void kvtr_domains_sweep(kvtr_loop *loop)
{
    for (;;) {
        kvc_mutex_lock(&loop->mutex);
        kvtr_domain **at = &loop->domains;
        while (*at != NULL &&
               ((*at)->n_links > 0 || (*at)->n_lent > 0 || ((*at)->shared && !loop->stopping)))
            at = &(*at)->next;
        kvtr_domain *domain = *at;
        if (domain != NULL)
            *at = domain->next;
        kvc_mutex_unlock(&loop->mutex);
        if (domain == NULL)
            return;
        domain_free(domain);
    }
}
