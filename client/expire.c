/*
 * expire.c: what time does to calls that no transport holds.
 *
 * Runs on kvc-prog under client->lock. A message in flight is the transport's, which ends it at its
 * deadline; one that waits (queue, timer, link, context) ends here, with the status of its last
 * attempt where there was one, since that says more than TIMED_OUT.
 */
#include <stdio.h>

#include "base/clock.h"
#include "internal.h"

#define LINK_FIRST_NS (10ull * 1000000)
#define LINK_MAX_NS   (500ull * 1000000)

static uint64_t min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static bool waits_here(const kvci_msg *msg)
{
    return msg->state != KVCI_DONE && msg->state != KVCI_SENDING && msg->state != KVCI_SENT;
}

static void expire_call(kvc_client *client, kvci_call *call)
{
    call->refs++;
    for (uint32_t i = 0; i < call->n_msgs; i++) {
        kvci_msg *msg = &call->msgs[i];
        if (!waits_here(msg))
            continue;
        kvc_status status = msg->last != KVC_OK ? msg->last : KVC_TIMED_OUT;
        char detail[KVT_DETAIL_BYTES + 64];
        (void)snprintf(detail, sizeof(detail), "the deadline passed%s%s",
                       msg->xfer.detail[0] != '\0' ? "; the last attempt: " : "", msg->xfer.detail);
        kvci_msg_finish(client, msg, status, detail);
    }
    kvci_call_put(call);
}

/* The time at which the call must be looked at again; UINT64_MAX: not before a message returns. */
static uint64_t call_due_ns(const kvci_call *call)
{
    for (uint32_t i = 0; i < call->n_msgs; i++)
        if (waits_here(&call->msgs[i]))
            return call->deadline_ns;
    return UINT64_MAX;
}

void kvci_expire(kvc_client *client, uint64_t now_ns)
{
    uint64_t next_ns = UINT64_MAX;
    for (kvci_node *node = client->timed.next, *next; node != &client->timed; node = next) {
        kvci_msg *msg = (kvci_msg *)node;
        next = node->next;
        if (msg->due_ns <= now_ns)
            kvci_msg_requeue(client, msg);
        else
            next_ns = min_u64(next_ns, msg->due_ns);
    }
    for (kvci_node *node = client->calls.next, *next; node != &client->calls; node = next) {
        kvci_call *call = (kvci_call *)node;
        next = node->next;
        if (call->deadline_ns <= now_ns)
            expire_call(client, call);
        else
            next_ns = min_u64(next_ns, call_due_ns(call));
    }
    client->next_due_ns = next_ns;
}

void kvci_link_restored(kvc_client *client)
{
    kvci_node *node;
    uint64_t now_ns = kvc_now_ns();
    while ((node = kvci_list_first(&client->wait_link)) != NULL) {
        kvci_msg *msg = (kvci_msg *)node;
        if (msg->failures <= 1) {
            kvci_msg_requeue(client, msg);
            continue;
        }
        msg->due_ns =
            now_ns + kvci_backoff_ns(msg->failures - 1, LINK_FIRST_NS, LINK_MAX_NS, &client->seed);
        kvci_list_remove(&msg->node);
        msg->state = KVCI_TIMED;
        kvci_list_push(&client->timed, &msg->node);
        kvci_wake_at(client, msg->due_ns);
    }
}
