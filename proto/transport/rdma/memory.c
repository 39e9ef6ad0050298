/*
 * memory.c: protection domains and the pool of registered buffers.
 *
 * Guarded by the loop's mutex. Lent memory is registered for local use alone, and so is a server's
 * pool, whose keys it names to nobody. A client names the keys of its pool to the one server of its
 * connection, whose domain nobody else shares. iWARP wants the target of a READ open to the peer,
 * so there the server's pool is, and each link has a domain of its own at both ends. The pool's cap
 * is that of all domains of a loop; what nobody has used for a while is given back.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/metrics.h"
#include "rdma_internal.h"

#define SMALLEST_BYTES 8192u
#define LOOK_NS        ((uint64_t)250 * 1000000)

static struct ibv_mr *count_registered(struct ibv_mr *mr, size_t len_bytes)
{
    if (mr != NULL) {
        KVC_GAUGE_ADD(rdma_registrations, 1);
        KVC_GAUGE_ADD(rdma_registered_bytes, len_bytes);
    } else {
        KVC_COUNT(rdma_registrations_failed);
    }
    return mr;
}

struct ibv_mr *kvtr_register(struct ibv_pd *pd, void *base, size_t len_bytes, int access)
{
    struct ibv_mr *mr = kvtr_verbs_now->reg_mr(pd, base, len_bytes, access);
    if (mr == NULL)
        KVC_LOG_WARN(RDMA, "cannot register %zu bytes: %s%s", len_bytes, strerror(errno),
                     errno == ENOMEM ? "; the limit on locked memory (ulimit -l) may be too low"
                                     : "");
    return count_registered(mr, len_bytes);
}

/* Why a GPU's memory was registered neither by its dma-buf (error_dmabuf; EBADF: there is none) nor
 * by its address. */
static const char *why_copied(int error_dmabuf, int error_peer)
{
    bool no_peer = error_peer == EFAULT; /* pages that no process has */
    switch (error_dmabuf) {
    case EBADF:
        return no_peer ? "the GPU's driver exports no dma-buf, and peer memory (nvidia_peermem) is "
                         "not loaded"
                       : "the GPU's driver exports no dma-buf, and peer memory refused";
    case EOPNOTSUPP:
    case EPROTONOSUPPORT:
    case ENOSYS:
        return no_peer ? "the RDMA device takes no dma-buf, and peer memory (nvidia_peermem) is "
                         "not loaded"
                       : "the RDMA device takes no dma-buf, and peer memory refused";
    default:
        return no_peer ? "the RDMA device refused the dma-buf, and peer memory (nvidia_peermem) is "
                         "not loaded"
                       : "the RDMA device refused the dma-buf, and so did peer memory";
    }
}

struct ibv_mr *kvtr_register_gpu(struct ibv_pd *pd, void *base, size_t len_bytes, int access,
                                 const kvc_lent_gpu *gpu, uint64_t off_bytes,
                                 kvtr_gpu_result *result_p)
{
    struct ibv_mr *mr = NULL;
    int error_dmabuf = EBADF;
    if (gpu->dmabuf_fd >= 0) {
        mr = kvtr_verbs_now->reg_dmabuf_mr(pd, gpu->dmabuf_off_bytes + off_bytes, len_bytes,
                                           (uintptr_t)base, gpu->dmabuf_fd, access);
        error_dmabuf = mr == NULL ? errno : 0;
    }
    kvc_lent_way way = mr != NULL ? KVC_LENT_DMABUF : KVC_LENT_PEER;
    if (mr == NULL)
        mr = kvtr_verbs_now->reg_mr(pd, base, len_bytes, access);
    if (mr == NULL) {
        int error_peer = errno;
        const char *why = why_copied(error_dmabuf, error_peer);
        way = KVC_LENT_COPIED;
        *result_p = (kvtr_gpu_result){.why = why, .error_peer = error_peer};
    }
    result_p->way = way;
    result_p->error_dmabuf = error_dmabuf;
    return count_registered(mr, len_bytes);
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

/* ---- the pool -------------------------------------------------------------------------------- */

/* Four sizes to an octave: less than a quarter of a buffer is unused. */
static uint32_t bin_bytes(uint32_t bin)
{
    uint32_t octave_bytes = SMALLEST_BYTES << (bin / 4);
    return octave_bytes + octave_bytes / 4 * (bin % 4);
}

static uint32_t bin_of(uint32_t len_bytes)
{
    uint32_t bin = 0;
    while (bin_bytes(bin) < len_bytes)
        bin++;
    KVC_ASSERT(bin < KVTI_BINS);
    return bin;
}

/* It counts no more already. */
static void buf_free(kvtr_buf *buf)
{
    kvtr_deregister(buf->mr);
    free(buf->bytes);
    free(buf);
}

static bool has_room(const kvtr_loop *loop, uint32_t size_bytes)
{
    return loop->pool_bytes + size_bytes <= loop->pool_max_bytes;
}

/* Takes out what is kept of other sizes, and for other links, until there is room. */
static kvtr_buf *make_room(kvtr_loop *loop, uint32_t size_bytes)
{
    kvtr_buf *taken = NULL;
    for (kvtr_domain *domain = loop->domains; domain != NULL; domain = domain->next) {
        for (uint32_t c = KVTI_BINS; c-- > 0;) {
            while (!has_room(loop, size_bytes) && domain->free[c] != NULL) {
                kvtr_buf *buf = domain->free[c];
                domain->free[c] = buf->next;
                loop->pool_bytes -= buf->size_bytes;
                domain->n_lent++; /* which stays until it is freed */
                buf->next = taken;
                taken = buf;
            }
        }
    }
    return taken;
}

/* Mutex free; it counts already. */
static kvtr_buf *buf_create(kvtr_domain *domain, uint32_t bin)
{
    kvtr_buf *buf = calloc(1, sizeof(*buf));
    if (buf == NULL)
        return NULL;
    buf->domain = domain;
    buf->bin = bin;
    buf->size_bytes = bin_bytes(bin);
    /* Zeroed: what this process had there before is none of the peer's business. */
    if (posix_memalign((void **)&buf->bytes, 4096, buf->size_bytes) != 0)
        goto err_buf;
    memset(buf->bytes, 0, buf->size_bytes);
    buf->mr = kvtr_register(domain->pd, buf->bytes, buf->size_bytes, domain->access);
    if (buf->mr == NULL)
        goto err_bytes;
    return buf;

err_bytes:
    free(buf->bytes);
err_buf:
    free(buf);
    return NULL;
}

/* The mutex is free meanwhile. What counts for it keeps the domain. */
static kvtr_buf *buf_add(kvtr_domain *domain, uint32_t bin, kvtr_buf *taken, bool has_space)
{
    kvtr_loop *loop = domain->loop;
    kvtr_buf *freed = taken, *buf = NULL;
    kvc_mutex_unlock(&loop->mutex);
    for (; taken != NULL; taken = taken->next)
        kvtr_deregister(taken->mr);
    if (has_space)
        buf = buf_create(domain, bin);
    kvc_mutex_lock(&loop->mutex);
    while (freed != NULL) {
        kvtr_buf *next = freed->next;
        freed->domain->n_lent--;
        free(freed->bytes);
        free(freed);
        freed = next;
    }
    return buf;
}

kvtr_buf *kvtr_buf_find(kvtr_domain *domain, uint32_t len_bytes)
{
    uint32_t bin = bin_of(len_bytes);
    kvtr_buf *buf = domain->free[bin];
    if (buf == NULL)
        return NULL;
    domain->free[bin] = buf->next;
    domain->n_lent++;
    return buf;
}

kvtr_buf *kvtr_buf_get(kvtr_domain *domain, uint32_t len_bytes, bool *full_p)
{
    kvtr_loop *loop = domain->loop;
    uint32_t bin = bin_of(len_bytes);
    kvtr_buf *buf = kvtr_buf_find(domain, len_bytes);
    *full_p = false;
    if (buf != NULL)
        return buf;
    kvtr_buf *taken = make_room(loop, bin_bytes(bin));
    bool has_space = has_room(loop, bin_bytes(bin));
    *full_p = !has_space;
    if (!has_space && taken == NULL)
        return NULL;
    if (has_space) {
        loop->pool_bytes += bin_bytes(bin);
        domain->n_lent++;
    }
    buf = buf_add(domain, bin, taken, has_space);
    if (has_space && buf == NULL) {
        loop->pool_bytes -= bin_bytes(bin);
        domain->n_lent--;
    }
    return buf;
}

void kvtr_buf_put(kvtr_buf *buf)
{
    if (buf == NULL)
        return;
    buf->domain->n_lent--;
    buf->put_ns = kvc_now_ns();
    buf->next = buf->domain->free[buf->bin];
    buf->domain->free[buf->bin] = buf;
}

/* With the mutex held: what has been free since before then, taken out. The newest come first. */
static kvtr_buf *take_old(kvtr_domain *domain, uint64_t before_ns)
{
    kvtr_buf *old = NULL;
    for (uint32_t b = 0; b < KVTI_BINS; b++) {
        kvtr_buf **at = &domain->free[b];
        while (*at != NULL && (*at)->put_ns >= before_ns)
            at = &(*at)->next;
        for (kvtr_buf *next, *buf = *at; buf != NULL; buf = next) {
            next = buf->next;
            buf->next = old;
            old = buf;
            domain->loop->pool_bytes -= buf->size_bytes;
        }
        *at = NULL;
    }
    return old;
}

void kvtr_pool_trim(kvtr_loop *loop)
{
    uint64_t now_ns = kvc_now_ns();
    if (now_ns < loop->trimmed_ns + LOOK_NS || now_ns < loop->pool_keep_ns)
        return;
    loop->trimmed_ns = now_ns;
    /* Only this thread makes and frees domains. */
    for (kvtr_domain *domain = loop->domains; domain != NULL; domain = domain->next) {
        kvc_mutex_lock(&loop->mutex);
        kvtr_buf *old = take_old(domain, now_ns - loop->pool_keep_ns);
        kvc_mutex_unlock(&loop->mutex);
        while (old != NULL) {
            kvtr_buf *buf = old;
            old = buf->next;
            buf_free(buf);
        }
    }
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
    kvtr_ranges_begin(domain);
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

static uint64_t free_bytes(const kvtr_domain *domain)
{
    uint64_t n_bytes = 0;
    for (uint32_t b = 0; b < KVTI_BINS; b++) {
        for (const kvtr_buf *buf = domain->free[b]; buf != NULL; buf = buf->next)
            n_bytes += buf->size_bytes;
    }
    return n_bytes;
}

/* Nothing of it is in anybody's hands. */
static void domain_free(kvtr_domain *domain)
{
    kvtr_ranges_end(domain);
    for (uint32_t b = 0; b < KVTI_BINS; b++) {
        while (domain->free[b] != NULL) {
            kvtr_buf *buf = domain->free[b];
            domain->free[b] = buf->next;
            buf_free(buf);
        }
    }
    if (kvtr_verbs_now->dealloc_pd(domain->pd) != 0)
        KVC_LOG_ERROR(RDMA, "cannot free a protection domain: %s", strerror(errno));
    free(domain);
}

void kvtr_domains_sweep(kvtr_loop *loop)
{
    for (;;) {
        kvc_mutex_lock(&loop->mutex);
        kvtr_domain **at = &loop->domains;
        while (*at != NULL && ((*at)->n_links > 0 || (*at)->n_lent > 0 ||
                               *at == loop->registering || ((*at)->shared && !loop->stopping)))
            at = &(*at)->next;
        kvtr_domain *domain = *at;
        if (domain != NULL) {
            *at = domain->next;
            loop->pool_bytes -= free_bytes(domain);
        }
        kvc_mutex_unlock(&loop->mutex);
        if (domain == NULL)
            return;
        domain_free(domain);
    }
}
