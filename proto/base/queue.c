/*
 * queue.c: a ring of pointers under one leaf mutex.
 *
 * Any thread. Invariants: length <= capacity; items [head, head + length) modulo capacity are
 * live; once closed it stays closed.
 */
#include "base/queue.h"

#include <stdbool.h>
#include <stdlib.h>

#include "base/assert.h"
#include "base/thread.h"

struct kvc_queue {
    kvc_mutex lock; /* KVC_RANK_QUEUE; guards every field below */
    kvc_cond not_empty;
    uint32_t capacity, head, length;
    bool closed;
    void *items[];
};

kvc_status kvc_queue_create(uint32_t capacity, kvc_queue **queue_p)
{
    *queue_p = NULL;
    if (capacity == 0)
        return KVC_INVALID;
    kvc_queue *queue = calloc(1, sizeof(*queue) + (size_t)capacity * sizeof(void *));
    if (queue == NULL)
        return KVC_NO_MEMORY;
    kvc_mutex_init(&queue->lock, KVC_RANK_QUEUE);
    kvc_cond_init(&queue->not_empty);
    queue->capacity = capacity;
    *queue_p = queue;
    return KVC_OK;
}

void kvc_queue_destroy(kvc_queue *queue)
{
    if (queue == NULL)
        return;
    KVC_ASSERT(queue->length == 0);
    kvc_cond_fini(&queue->not_empty);
    kvc_mutex_fini(&queue->lock);
    free(queue);
}

kvc_status kvc_queue_push(kvc_queue *queue, void *item)
{
    KVC_ASSERT(item != NULL);
    kvc_status status = KVC_OK;
    kvc_mutex_lock(&queue->lock);
    if (queue->closed) {
        status = KVC_CLOSED;
    } else if (queue->length == queue->capacity) {
        status = KVC_AGAIN;
    } else {
        uint64_t tail = ((uint64_t)queue->head + queue->length) % queue->capacity;
        queue->items[tail] = item;
        queue->length++;
        kvc_cond_signal(&queue->not_empty);
    }
    kvc_mutex_unlock(&queue->lock);
    return status;
}

kvc_status kvc_queue_pop(kvc_queue *queue, uint64_t deadline_ns, void **item_p)
{
    *item_p = NULL;
    kvc_status status = KVC_OK;
    kvc_mutex_lock(&queue->lock);
    while (queue->length == 0 && !queue->closed && status == KVC_OK)
        status = kvc_cond_wait_until(&queue->not_empty, &queue->lock, deadline_ns);
    if (queue->length > 0) {
        /* An item that arrived together with the deadline is still handed out. */
        status = KVC_OK;
        *item_p = queue->items[queue->head];
        queue->head = (queue->head + 1) % queue->capacity;
        queue->length--;
    } else if (queue->closed) {
        status = KVC_CLOSED;
    }
    kvc_mutex_unlock(&queue->lock);
    return status;
}

void kvc_queue_close(kvc_queue *queue)
{
    kvc_mutex_lock(&queue->lock);
    queue->closed = true;
    kvc_cond_broadcast(&queue->not_empty);
    kvc_mutex_unlock(&queue->lock);
}
