/*
 * call.c: the memory of calls.
 *
 * A call and its messages live in one scratch block, whose size the planner knows beforehand; used
 * calls are pooled with their scratch, so a steady load allocates nothing. The pool is guarded by
 * client->lock; a call belongs to its creator until kvci_call_start.
 */
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "internal.h"

#define ALIGN_BYTES ((size_t)16)

size_t kvci_carve_bytes(size_t n, size_t size_bytes)
{
    return (n * size_bytes + ALIGN_BYTES - 1) & ~(ALIGN_BYTES - 1);
}

static kvci_call *take_pooled(kvc_client *client)
{
    kvc_mutex_lock(&client->lock);
    kvci_call *call = (kvci_call *)kvci_list_first(&client->pool);
    if (call != NULL) {
        kvci_list_remove(&call->node);
        client->n_pooled--;
    }
    kvc_mutex_unlock(&client->lock);
    return call != NULL ? call : calloc(1, sizeof(*call));
}

static void call_free(kvci_call *call)
{
    free(call->scratch);
    free(call);
}

static void init_msgs(kvci_call *call)
{
    for (uint32_t i = 0; i < call->n_msgs; i++) {
        kvci_msg *msg = &call->msgs[i];
        msg->call = call;
        kvc_arena_init(&msg->xfer.arena, KVCI_REPLY_ARENA_BYTES);
    }
}

kvci_call *kvci_call_new(kvc_client *client, const kvci_kind *kind, uint32_t n_msgs,
                         size_t extra_bytes, uint64_t deadline_ns)
{
    kvci_call *call = take_pooled(client);
    if (call == NULL)
        return NULL;
    uint8_t *scratch = call->scratch;
    size_t scratch_bytes = call->scratch_bytes;
    size_t need_bytes = kvci_carve_bytes(n_msgs, sizeof(kvci_msg)) + extra_bytes;
    if (need_bytes > scratch_bytes) {
        free(scratch);
        scratch_bytes = need_bytes;
        scratch = malloc(need_bytes);
    }
    *call = (kvci_call){
        .client = client,
        .kind = kind,
        .deadline_ns = deadline_ns != 0 ? deadline_ns : kvc_deadline_ns(client->default_timeout_ns),
        .n_msgs = n_msgs,
        .n_left = n_msgs,
        .scratch = scratch,
        .scratch_bytes = scratch != NULL ? scratch_bytes : 0,
    };
    if (need_bytes > 0 && scratch == NULL) {
        call_free(call);
        return NULL;
    }
    call->msgs = kvci_carve(call, n_msgs, sizeof(kvci_msg));
    init_msgs(call);
    return call;
}

void *kvci_carve(kvci_call *call, size_t n, size_t size_bytes)
{
    size_t need_bytes = kvci_carve_bytes(n, size_bytes);
    KVC_ASSERT(need_bytes <= call->scratch_bytes - call->used_bytes);
    if (need_bytes == 0)
        return NULL;
    void *piece = call->scratch + call->used_bytes;
    call->used_bytes += need_bytes;
    memset(piece, 0, need_bytes);
    return piece;
}

/* Under the lock: back to the pool, or freed where that is full. */
static void recycle(kvci_call *call)
{
    kvc_client *client = call->client;
    if (client->n_pooled >= KVCI_POOL_CALLS || call->scratch_bytes > KVCI_POOL_BYTES) {
        call_free(call);
        return;
    }
    kvci_list_push_front(&client->pool, &call->node);
    client->n_pooled++;
}

void kvci_call_drop(kvci_call *call)
{
    kvc_client *client = call->client;
    kvc_mutex_lock(&client->lock);
    recycle(call);
    kvc_mutex_unlock(&client->lock);
}

void kvci_call_put(kvci_call *call)
{
    KVC_ASSERT(call->refs > 0);
    if (--call->refs == 0)
        recycle(call);
}
