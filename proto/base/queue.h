/*
 * queue.h: a bounded queue of pointers, many producers and consumers, FIFO.
 *
 * The bound is fixed at creation; a full queue answers AGAIN. kvc_queue_close wakes every waiter;
 * what is inside can still be popped.
 */
#ifndef KVC_BASE_QUEUE_H
#define KVC_BASE_QUEUE_H

#include <stdint.h>

#include "kvc/status.h"

typedef struct kvc_queue kvc_queue;

kvc_status kvc_queue_create(uint32_t capacity, kvc_queue **queue_p) KVC_MUST_CHECK;
void kvc_queue_destroy(kvc_queue *queue); /* must be empty; NULL is fine */
/* Never blocks. AGAIN: full. CLOSED. item must not be NULL. */
kvc_status kvc_queue_push(kvc_queue *queue, void *item) KVC_MUST_CHECK;
/* Blocks to deadline_ns (0: for ever). TIMED_OUT; CLOSED once closed and empty. */
kvc_status kvc_queue_pop(kvc_queue *queue, uint64_t deadline_ns, void **item_p) KVC_MUST_CHECK;
void kvc_queue_close(kvc_queue *queue);

#endif
