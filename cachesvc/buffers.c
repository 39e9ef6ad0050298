/*
 * buffers.c: reply buffers; see buffers.h.
 *
 * Any thread. Invariant: held_bytes, the memory of all buffers, handed out or kept for reuse, never
 * exceeds cap_bytes: kept ones are freed where others need their room.
 */
#include "buffers.h"

#include <stdlib.h>
#include <string.h>

#include "base/assert.h"

void kvs_buffers_init(kvs_buffers *pool, uint32_t big_bytes, uint64_t cap_bytes)
{
    memset(pool, 0, sizeof(*pool));
    kvc_mutex_init(&pool->lock, KVC_RANK_LEAF);
    pool->big_bytes = big_bytes;
    pool->cap_bytes = cap_bytes;
}

void kvs_buffers_fini(kvs_buffers *pool)
{
    while (pool->free_big) {
        kvs_buffer *buffer = pool->free_big;
        pool->free_big = buffer->next;
        pool->held_bytes -= buffer->total_bytes;
        free(buffer);
    }
    KVC_ASSERT(pool->held_bytes == 0);
    kvc_mutex_fini(&pool->lock);
}

static size_t total_of(uint32_t size_bytes)
{
    return (sizeof(kvs_buffer) + size_bytes + 63) / 64 * 64;
}

/* Takes total bytes of the cap. Gives a kept buffer of that size, if there is one, or unlinks kept
   ones until there is room: *garbage_p lists those. False: the cap is reached. With the lock. */
static bool take_room(kvs_buffers *pool, size_t total_bytes, kvs_buffer **kept_p,
                      kvs_buffer **garbage_p)
{
    *kept_p = *garbage_p = NULL;
    if (pool->free_big && pool->free_big->total_bytes == total_bytes) {
        *kept_p = pool->free_big;
        pool->free_big = (*kept_p)->next;
        return true;
    }
    while (pool->held_bytes + total_bytes > pool->cap_bytes && pool->free_big) {
        kvs_buffer *buffer = pool->free_big;
        pool->free_big = buffer->next;
        pool->held_bytes -= buffer->total_bytes;
        buffer->next = *garbage_p;
        *garbage_p = buffer;
    }
    if (pool->held_bytes + total_bytes > pool->cap_bytes)
        return false;
    pool->held_bytes += total_bytes;
    return true;
}

static void give_room(kvs_buffers *pool, size_t total_bytes)
{
    kvc_mutex_lock(&pool->lock);
    pool->held_bytes -= total_bytes;
    kvc_mutex_unlock(&pool->lock);
}

kvc_status kvs_buffer_get(kvs_buffers *pool, uint32_t len_bytes, kvs_buffer **buffer_p)
{
    bool big = len_bytes > pool->big_bytes / 4 && len_bytes <= pool->big_bytes;
    size_t total_bytes = total_of(big ? pool->big_bytes : len_bytes);
    kvs_buffer *buffer, *garbage;
    *buffer_p = NULL;
    kvc_mutex_lock(&pool->lock);
    bool room = take_room(pool, total_bytes, &buffer, &garbage);
    kvc_mutex_unlock(&pool->lock);
    while (garbage) {
        kvs_buffer *next = garbage->next;
        free(garbage);
        garbage = next;
    }
    if (!room)
        return KVC_AGAIN;
    if (!buffer && !(buffer = aligned_alloc(64, total_bytes))) {
        give_room(pool, total_bytes);
        return KVC_NO_MEMORY;
    }
    buffer->pool = pool;
    buffer->total_bytes = total_bytes;
    atomic_fetch_add(&pool->out_bytes, total_bytes);
    atomic_store(&buffer->out, 1);
    *buffer_p = buffer;
    return KVC_OK;
}

kvc_status kvs_buffer_get_for_stream(kvs_buffers *pool, uint32_t len_bytes, kvs_buffer **buffer_p)
{
    *buffer_p = NULL;
    if (atomic_load(&pool->out_bytes) + len_bytes > pool->cap_bytes - pool->cap_bytes / 4)
        return KVC_AGAIN;
    return kvs_buffer_get(pool, len_bytes, buffer_p);
}

void kvs_buffer_release(void *arg)
{
    kvs_buffer *buffer = arg;
    KVC_ASSERT(atomic_exchange(&buffer->out, 0) == 1);
    kvs_buffers *pool = buffer->pool;
    atomic_fetch_sub(&pool->out_bytes, buffer->total_bytes);
    if (buffer->total_bytes != total_of(pool->big_bytes)) {
        size_t total_bytes = buffer->total_bytes;
        free(buffer);
        give_room(pool, total_bytes);
        return;
    }
    kvc_mutex_lock(&pool->lock);
    buffer->next = pool->free_big;
    pool->free_big = buffer;
    kvc_mutex_unlock(&pool->lock);
}
