/*
 * buffers.c: reply buffers; see buffers.h.
 *
 * Any thread. Invariant: held_bytes, the memory of all buffers, handed out or kept for reuse, never
 * exceeds cap_bytes: kept ones are freed where others need their room, and where nobody has needed
 * them for a while. Large ones are mapped by themselves: in malloc's heap each would leave a hole
 * that smaller blocks then settle in, and what is freed would not go back to the system.
 */
#include "buffers.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/assert.h"

#define ALIGN_BYTES _Alignof(kvs_buffer)

void kvs_buffers_init(kvs_buffers *pool, uint32_t big_bytes, uint64_t cap_bytes)
{
    memset(pool, 0, sizeof(*pool));
    kvc_mutex_init(&pool->lock, KVC_RANK_LEAF);
    pool->big_bytes = big_bytes;
    pool->cap_bytes = cap_bytes;
}

static size_t total_of(uint32_t size_bytes)
{
    size_t head_bytes = sizeof(kvs_buffer) + ALIGN_BYTES;
    return (head_bytes + size_bytes + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
}

/* total_bytes has room for the alignment. Not aligned_alloc: what it gave and got back, glibc
   before 2.38 does not find for the next of that size, so its heap grows and grows. */
static kvs_buffer *new_small(size_t total_bytes)
{
    char *memory = malloc(total_bytes);
    if (!memory)
        return NULL;
    size_t over = (uintptr_t)memory % ALIGN_BYTES;
    kvs_buffer *buffer = (kvs_buffer *)(void *)(memory + (over ? ALIGN_BYTES - over : 0));
    buffer->memory = memory;
    return buffer;
}

static kvs_buffer *new_buffer(const kvs_buffers *pool, size_t total_bytes)
{
    if (total_bytes != total_of(pool->big_bytes))
        return new_small(total_bytes);
    void *map = mmap(NULL, total_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return map == MAP_FAILED ? NULL : map;
}

static void free_buffer(const kvs_buffers *pool, kvs_buffer *buffer)
{
    if (buffer->total_bytes != total_of(pool->big_bytes))
        free(buffer->memory);
    else
        (void)munmap(buffer, buffer->total_bytes);
}

/* Unlinks a kept buffer; the pool's memory is less by it. With the lock. */
static kvs_buffer *unlink_kept(kvs_buffers *pool)
{
    kvs_buffer *buffer = pool->free_big;
    pool->free_big = buffer->next;
    pool->n_kept--;
    if (pool->n_kept < pool->least_kept)
        pool->least_kept = pool->n_kept;
    return buffer;
}

/* Unlinks one to be freed, in front of *garbage_p. With the lock. */
static void discard_kept(kvs_buffers *pool, kvs_buffer **garbage_p)
{
    kvs_buffer *buffer = unlink_kept(pool);
    pool->held_bytes -= buffer->total_bytes;
    buffer->next = *garbage_p;
    *garbage_p = buffer;
}

static void free_all(const kvs_buffers *pool, kvs_buffer *garbage)
{
    while (garbage) {
        kvs_buffer *next = garbage->next;
        free_buffer(pool, garbage);
        garbage = next;
    }
}

void kvs_buffers_fini(kvs_buffers *pool)
{
    kvs_buffer *garbage = NULL;
    while (pool->free_big)
        discard_kept(pool, &garbage);
    free_all(pool, garbage);
    KVC_ASSERT(pool->held_bytes == 0);
    kvc_mutex_fini(&pool->lock);
}

void kvs_buffers_rest(kvs_buffers *pool)
{
    kvs_buffer *garbage = NULL;
    kvc_mutex_lock(&pool->lock);
    for (uint32_t n = pool->least_kept; n > 0; n--)
        discard_kept(pool, &garbage);
    pool->least_kept = pool->n_kept;
    kvc_mutex_unlock(&pool->lock);
    free_all(pool, garbage);
}

/* Takes total bytes of the cap. Gives a kept buffer of that size, if there is one, or unlinks kept
   ones until there is room: *garbage_p lists those. False: the cap is reached. With the lock. */
static bool take_room(kvs_buffers *pool, size_t total_bytes, kvs_buffer **kept_p,
                      kvs_buffer **garbage_p)
{
    *kept_p = *garbage_p = NULL;
    if (pool->free_big && pool->free_big->total_bytes == total_bytes) {
        *kept_p = unlink_kept(pool);
        return true;
    }
    while (pool->held_bytes + total_bytes > pool->cap_bytes && pool->free_big)
        discard_kept(pool, garbage_p);
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
    free_all(pool, garbage);
    if (!room)
        return KVC_AGAIN;
    if (!buffer && !(buffer = new_buffer(pool, total_bytes))) {
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

uint64_t kvs_buffers_held(kvs_buffers *pool)
{
    kvc_mutex_lock(&pool->lock);
    uint64_t bytes = pool->held_bytes;
    kvc_mutex_unlock(&pool->lock);
    return bytes;
}

void kvs_buffer_release(void *arg)
{
    kvs_buffer *buffer = arg;
    KVC_ASSERT(atomic_exchange(&buffer->out, 0) == 1);
    kvs_buffers *pool = buffer->pool;
    atomic_fetch_sub(&pool->out_bytes, buffer->total_bytes);
    if (buffer->total_bytes != total_of(pool->big_bytes)) {
        size_t total_bytes = buffer->total_bytes;
        free_buffer(pool, buffer);
        give_room(pool, total_bytes);
        return;
    }
    kvc_mutex_lock(&pool->lock);
    buffer->next = pool->free_big;
    pool->free_big = buffer;
    pool->n_kept++;
    kvc_mutex_unlock(&pool->lock);
}
