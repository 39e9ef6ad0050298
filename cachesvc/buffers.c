/*
 * buffers.c: reply buffers; see buffers.h.
 *
 * Any thread. Invariant: used_bytes is the sum of the sizes handed out and never exceeds cap_bytes;
 * idle big buffers count only while they are out, and there are never more than the cap allows.
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
    KVC_ASSERT(pool->used_bytes == 0);
    while (pool->free_big) {
        kvs_buffer *buffer = pool->free_big;
        pool->free_big = buffer->next;
        free(buffer);
    }
    kvc_mutex_fini(&pool->lock);
}

kvc_status kvs_buffer_get(kvs_buffers *pool, uint32_t len_bytes, kvs_buffer **buffer_p)
{
    KVC_ASSERT(len_bytes <= pool->big_bytes);
    uint32_t size = len_bytes > pool->big_bytes / 4 ? pool->big_bytes : len_bytes;
    kvs_buffer *buffer = NULL;
    *buffer_p = NULL;
    kvc_mutex_lock(&pool->lock);
    bool room = pool->used_bytes + size <= pool->cap_bytes;
    if (room) {
        pool->used_bytes += size;
        if (size == pool->big_bytes && pool->free_big) {
            buffer = pool->free_big;
            pool->free_big = buffer->next;
        }
    }
    kvc_mutex_unlock(&pool->lock);
    if (!room)
        return KVC_AGAIN;
    if (!buffer) {
        size_t total = (sizeof(*buffer) + size + 63) / 64 * 64;
        buffer = aligned_alloc(64, total);
    }
    if (!buffer) {
        kvc_mutex_lock(&pool->lock);
        pool->used_bytes -= size;
        kvc_mutex_unlock(&pool->lock);
        return KVC_NO_MEMORY;
    }
    buffer->pool = pool;
    buffer->size_bytes = size;
    atomic_store(&buffer->out, 1);
    *buffer_p = buffer;
    return KVC_OK;
}

void kvs_buffer_release(void *arg)
{
    kvs_buffer *buffer = arg;
    KVC_ASSERT(atomic_exchange(&buffer->out, 0) == 1);
    kvs_buffers *pool = buffer->pool;
    kvc_mutex_lock(&pool->lock);
    pool->used_bytes -= buffer->size_bytes;
    bool keep = buffer->size_bytes == pool->big_bytes;
    if (keep) {
        buffer->next = pool->free_big;
        pool->free_big = buffer;
    }
    kvc_mutex_unlock(&pool->lock);
    if (!keep)
        free(buffer);
}
