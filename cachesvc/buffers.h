/*
 * buffers.h: memory for rows on their way out, under one cap.
 *
 * Large buffers are kept for reuse, since touching fresh pages costs as much as copying rows.
 */
#ifndef KVS_BUFFERS_H
#define KVS_BUFFERS_H

#include <stdatomic.h>

#include "base/thread.h"

typedef struct kvs_buffers kvs_buffers;

typedef struct kvs_buffer {
    kvs_buffers *pool;
    struct kvs_buffer *next;
    size_t total_bytes; /* this head included */
    void *memory;       /* malloc's, of a small one */
    atomic_uint out;    /* 1 while handed out; a transport may give it back on any thread */
    _Alignas(64) char bytes[];
} kvs_buffer;

struct kvs_buffers {
    kvc_mutex lock;       /* rank LEAF; guards all below */
    kvs_buffer *free_big; /* kept for reuse, each for big_bytes */
    uint32_t n_kept;      /* in free_big */
    uint32_t least_kept;  /* the fewest since the last rest: nobody needed these */
    uint32_t big_bytes;
    uint64_t held_bytes, cap_bytes;  /* of all buffers, handed out or kept */
    atomic_uint_least64_t out_bytes; /* handed out */
};

/* cap_bytes: of all the memory that the pool takes. */
void kvs_buffers_init(kvs_buffers *pool, uint32_t big_bytes, uint64_t cap_bytes);
void kvs_buffers_fini(kvs_buffers *pool); /* every buffer must be back */
/* Gives the system back what was kept since the last call and not used; to be called now and then.
   Any thread. */
void kvs_buffers_rest(kvs_buffers *pool);
/* At least len_bytes; more than big_bytes is not kept for reuse. AGAIN: the cap is reached;
   NO_MEMORY. Any thread. */
kvc_status kvs_buffer_get(kvs_buffers *pool, uint32_t len_bytes,
                          kvs_buffer **buffer_p) KVC_MUST_CHECK;
/* The same for a message of a stream, which a slow reader may keep for long: AGAIN also where three
   quarters of the cap are handed out already, so that other calls have the rest. */
kvc_status kvs_buffer_get_for_stream(kvs_buffers *pool, uint32_t len_bytes,
                                     kvs_buffer **buffer_p) KVC_MUST_CHECK;
/* Whether more than half of the cap is handed out: a stream then takes one buffer at a time. */
static inline bool kvs_buffers_are_short(const kvs_buffers *pool)
{
    return atomic_load(&pool->out_bytes) > pool->cap_bytes / 2;
}
/* Memory of all its buffers, handed out or kept. Any thread. */
uint64_t kvs_buffers_held(kvs_buffers *pool);
/* arg: the kvs_buffer; fits kvt_slice.release. Any thread. */
void kvs_buffer_release(void *arg);

#endif
