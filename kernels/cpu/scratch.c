/*
 * scratch.c: buffers for the length of one call, kept for the next one.
 *
 * Fresh pages cost more than the arithmetic of a small call, so up to KEPT_MAX buffers stay with
 * the backend. Whoever opened it may bring memory of his own instead, of which nothing is kept
 * here. A buffer carries its size in a 64-byte header before the pointer handed out.
 */
#include <pthread.h>
#include <stdlib.h>

#include "internal.h"

#define KEPT_MAX       8u
#define KEPT_BYTES_MAX ((size_t)64 << 20) /* a larger buffer goes back to the system at once */
#define HEADER_BYTES   64u
#define GROW_BYTES     ((size_t)64 << 10)

struct kvki_scratch {
    kvk_memory memory;    /* take NULL: ours */
    pthread_mutex_t lock; /* guards kept and n_kept; nothing is taken under it */
    char *kept[KEPT_MAX];
    uint32_t n_kept;
};

static size_t *size_of(char *base)
{
    return (size_t *)(void *)base;
}

kvc_status kvki_scratch_create(const kvk_memory *memory, kvki_scratch **scratch_p)
{
    *scratch_p = calloc(1, sizeof(**scratch_p));
    if (!*scratch_p)
        return KVC_NO_MEMORY;
    (*scratch_p)->memory = *memory;
    pthread_mutex_init(&(*scratch_p)->lock, NULL);
    return KVC_OK;
}

void kvki_scratch_destroy(kvki_scratch *scratch)
{
    if (!scratch)
        return;
    for (uint32_t i = 0; i < scratch->n_kept; i++)
        free(scratch->kept[i]);
    pthread_mutex_destroy(&scratch->lock);
    free(scratch);
}

/* The smallest kept buffer that is large enough, or NULL. */
static char *take_kept(kvki_scratch *scratch, size_t len_bytes)
{
    char *best = NULL;
    uint32_t at = 0;

    pthread_mutex_lock(&scratch->lock);
    for (uint32_t i = 0; i < scratch->n_kept; i++) {
        size_t have = *size_of(scratch->kept[i]);
        if (have >= len_bytes && (!best || have < *size_of(best))) {
            best = scratch->kept[i];
            at = i;
        }
    }
    if (best)
        scratch->kept[at] = scratch->kept[--scratch->n_kept];
    pthread_mutex_unlock(&scratch->lock);
    return best;
}

void *kvki_scratch_take(kvki_scratch *scratch, size_t len_bytes)
{
    char *base = NULL;

    if (len_bytes > SIZE_MAX / 2)
        return NULL;
    if (scratch->memory.take)
        return scratch->memory.take(scratch->memory.arg, len_bytes);
    base = take_kept(scratch, len_bytes);
    if (!base) {
        size_t rounded = (len_bytes + GROW_BYTES - 1) / GROW_BYTES * GROW_BYTES;
        base = aligned_alloc(64, rounded + HEADER_BYTES);
        if (!base)
            return NULL;
        *size_of(base) = rounded;
    }
    return base + HEADER_BYTES;
}

void kvki_scratch_give(kvki_scratch *scratch, void *buf)
{
    char *base = NULL;

    if (!buf)
        return;
    if (scratch->memory.take) {
        scratch->memory.give(scratch->memory.arg, buf);
        return;
    }
    base = (char *)buf - HEADER_BYTES;
    pthread_mutex_lock(&scratch->lock);
    if (*size_of(base) <= KEPT_BYTES_MAX) {
        if (scratch->n_kept == KEPT_MAX) { /* drop the oldest, keep the one just warmed */
            char *oldest = scratch->kept[0];
            scratch->kept[0] = base;
            base = oldest;
        } else {
            scratch->kept[scratch->n_kept++] = base;
            base = NULL;
        }
    }
    pthread_mutex_unlock(&scratch->lock);
    free(base);
}
