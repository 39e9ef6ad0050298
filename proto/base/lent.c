/*
 * lent.c: see lent.h.
 *
 * One mutex of rank LENT guards the table and the list of watchers. Some hundreds of ranges at
 * most: a list will do.
 */
#include "base/lent.h"

#include <stdlib.h>

#include "base/thread.h"

typedef struct range {
    struct range *next;
    uint8_t *base;
    size_t len_bytes;
    uint32_t n; /* times it was added */
} range;

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

kvc_status kvc_lent_add(void *base, size_t len_bytes)
{
    kvc_status status = KVC_OK;
    range *r = calloc(1, sizeof(*r));
    if (r == NULL)
        return KVC_NO_MEMORY;
    take_lock();
    range *other = overlapping(base, len_bytes);
    if (other == NULL) {
        *r = (range){ranges, base, len_bytes, 1};
        ranges = r;
        for (kvc_lent_watch *watch = watches; watch != NULL; watch = watch->next)
            watch->added(watch, base, len_bytes);
    } else if (other->base == base && other->len_bytes == len_bytes) {
        other->n++;
    } else {
        status = KVC_INVALID;
    }
    kvc_mutex_unlock(&lock);
    if (other != NULL)
        free(r);
    return status;
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
    free(r);
}

void kvc_lent_watch_begin(kvc_lent_watch *watch)
{
    take_lock();
    watch->next = watches;
    watches = watch;
    for (range *r = ranges; r != NULL; r = r->next)
        watch->added(watch, r->base, r->len_bytes);
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
