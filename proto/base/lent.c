/*
 * lent.c: see lent.h.
 *
 * One mutex of rank LENT guards the table and the list of watchers. Some hundreds of ranges at
 * most: a list will do.
 */
#include "base/lent.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/thread.h"

typedef struct range {
    struct range *next;
    uint8_t *base;
    size_t len_bytes;
    uint32_t n; /* times it was added */
    bool on_gpu;
    kvc_lent_gpu gpu;
} range;

static void range_free(range *r)
{
    if (r != NULL && r->gpu.dmabuf_fd >= 0)
        (void)close(r->gpu.dmabuf_fd);
    free(r);
}

static pthread_once_t once = PTHREAD_ONCE_INIT;
static kvc_mutex lock;
static range *ranges;
static kvc_lent_watch *watches;

static void init_lock(void)
{
    kvc_mutex_init(&lock, KVC_RANK_LENT);
}

static void take_lock(void)
{
    (void)pthread_once(&once, init_lock);
    kvc_mutex_lock(&lock);
}

/* With the lock held: the first that has a byte of it; NULL: none has. */
static range *overlapping(const uint8_t *base, size_t len_bytes)
{
    range *r = ranges;
    while (r != NULL && (base >= r->base + r->len_bytes || r->base >= base + len_bytes))
        r = r->next;
    return r;
}

static kvc_lent_gpu *gpu_of(range *r)
{
    return r->on_gpu ? &r->gpu : NULL;
}

/* Takes r, whose dma-buf is its own. */
static kvc_status add(range *r, const kvc_lent_gpu **gpu_p)
{
    kvc_status status = KVC_OK;
    take_lock();
    range *other = overlapping(r->base, r->len_bytes), *kept = r;
    if (other == NULL) {
        r->next = ranges;
        ranges = r;
        for (kvc_lent_watch *watch = watches; watch != NULL; watch = watch->next)
            watch->added(watch, r->base, r->len_bytes, gpu_of(r));
    } else if (other->base == r->base && other->len_bytes == r->len_bytes &&
               other->on_gpu == r->on_gpu) {
        other->n++;
        kept = other;
    } else {
        status = KVC_INVALID;
    }
    if (status == KVC_OK && gpu_p != NULL)
        *gpu_p = &kept->gpu;
    kvc_mutex_unlock(&lock);
    if (other != NULL)
        range_free(r);
    return status;
}

/* NULL: no memory. */
static range *range_new(void *base, size_t len_bytes)
{
    range *r = calloc(1, sizeof(*r));
    if (r == NULL)
        return NULL;
    r->base = base;
    r->len_bytes = len_bytes;
    r->n = 1;
    r->gpu.dmabuf_fd = -1;
    return r;
}

kvc_status kvc_lent_add(void *base, size_t len_bytes)
{
    range *r = range_new(base, len_bytes);
    return r == NULL ? KVC_NO_MEMORY : add(r, NULL);
}

kvc_status kvc_lent_add_gpu(void *base, size_t len_bytes, int dmabuf_fd, uint64_t dmabuf_off_bytes,
                            const kvc_lent_gpu **gpu_p)
{
    range *r = range_new(base, len_bytes);
    *gpu_p = NULL;
    if (r == NULL)
        return KVC_NO_MEMORY;
    r->on_gpu = true;
    r->gpu.dmabuf_off_bytes = dmabuf_off_bytes;
    if (dmabuf_fd >= 0) /* where there is no descriptor left, there is no dma-buf */
        r->gpu.dmabuf_fd = fcntl(dmabuf_fd, F_DUPFD_CLOEXEC, 0);
    return add(r, gpu_p);
}

void kvc_lent_remove(void *base)
{
    take_lock();
    range **at = &ranges;
    while (*at != NULL && (*at)->base != (uint8_t *)base)
        at = &(*at)->next;
    range *r = *at;
    if (r != NULL && --r->n > 0)
        r = NULL;
    if (r != NULL) {
        *at = r->next;
        for (kvc_lent_watch *watch = watches; watch != NULL; watch = watch->next)
            watch->removed(watch, r->base, r->len_bytes);
    }
    kvc_mutex_unlock(&lock);
    range_free(r);
}

void kvc_lent_watch_begin(kvc_lent_watch *watch)
{
    take_lock();
    watch->next = watches;
    watches = watch;
    for (range *r = ranges; r != NULL; r = r->next)
        watch->added(watch, r->base, r->len_bytes, gpu_of(r));
    kvc_mutex_unlock(&lock);
}

void kvc_lent_watch_end(kvc_lent_watch *watch)
{
    take_lock();
    kvc_lent_watch **at = &watches;
    while (*at != NULL && *at != watch)
        at = &(*at)->next;
    if (*at != NULL)
        *at = watch->next;
    kvc_mutex_unlock(&lock);
}
