/*
 * op.c: kvc_op, from submit to its one completion, and the thread that runs callbacks and timers.
 *
 * The op's slots: impl[OP_CLIENT], impl[OP_CALL] (client->lock), impl[OP_STATE] (atomic; the last
 * thing written at completion, after which the op is the caller's again), impl[OP_TICKET] of the
 * error text. Invariant: a call that was started completes exactly once.
 */
#include <stdio.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "map.h"

enum { OP_CLIENT = 0, OP_CALL, OP_STATE, OP_TICKET };
enum { OP_IDLE = 0, OP_IN_FLIGHT, OP_COMPLETE };

static uintptr_t op_state(const kvc_op *op)
{
    return (uintptr_t)__atomic_load_n(&op->impl[OP_STATE], __ATOMIC_ACQUIRE);
}

bool kvci_op_in_flight(const kvc_op *op)
{
    return op_state(op) == OP_IN_FLIGHT;
}

static void op_set_state(kvc_op *op, uintptr_t state)
{
    /* The states are numbers that live in a pointer's slot. */
    __atomic_store_n(&op->impl[OP_STATE], (void *)state, __ATOMIC_RELEASE);
}

void kvc_op_init(kvc_op *op, kvc_done_fn *done, void *arg)
{
    memset(op, 0, sizeof(*op));
    op->done = done;
    op->arg = arg;
}

kvc_status kvci_call_start(kvci_call *call, kvc_op *op)
{
    kvc_client *client = call->client;
    if (op_state(op) == OP_IN_FLIGHT) {
        kvci_call_drop(call);
        return kvci_fail(KVC_INVALID, "op: it is in flight");
    }
    kvc_mutex_lock(&client->lock);
    if (client->closing) {
        kvc_mutex_unlock(&client->lock);
        kvci_call_drop(call);
        return kvci_fail(KVC_CLOSED, "client: it is being closed");
    }
    op->impl[OP_CLIENT] = client;
    op->impl[OP_CALL] = call;
    op->impl[OP_TICKET] = NULL;
    op->status = KVC_OK;
    op_set_state(op, OP_IN_FLIGHT);
    call->op = op;
    call->began_ns = kvc_now_ns();
    call->refs = 1;
    client->live++;
    if (call->region != NULL)
        call->region->refs++;
    kvci_list_push(&client->calls, &call->node);
    kvci_node *lane = &client->lanes[call->kind->bulk_lane ? KVCI_LANE_BULK : KVCI_LANE_URGENT];
    for (uint32_t i = 0; i < call->n_msgs; i++)
        kvci_list_push(lane, &call->msgs[i].node);
    if (call->n_msgs == 0)
        kvci_call_complete(client, call);
    else
        kvci_wake_at(client, call->deadline_ns);
    kvci_pump(client);
    kvc_mutex_unlock(&client->lock);
    return KVC_OK;
}

/* The op is the caller's again from here on. */
static void op_release(kvc_op *op)
{
    op->impl[OP_CALL] = NULL;
    op_set_state(op, OP_COMPLETE);
}

void kvci_call_complete(kvc_client *client, kvci_call *call)
{
    kvc_op *op = call->op;
    kvci_list_remove(&call->node);
    if (call->kind->finish != NULL)
        call->kind->finish(call);
    if (call->region != NULL)
        call->region->refs--;
    op->status = call->status;
    if (call->status != KVC_OK) {
        char text[KVT_DETAIL_BYTES + 64];
        (void)snprintf(text, sizeof(text), "%s: %s%s%s", call->kind->name,
                       kvc_status_name(call->status), call->detail[0] != '\0' ? ": " : "",
                       call->detail);
        op->impl[OP_TICKET] = (void *)kvci_error_store(text);
    }
    if (op->done != NULL) {
        kvci_list_push(&client->finished, &call->node);
        kvc_cond_signal(&client->prog_cond);
        return;
    }
    op_release(op);
    client->live--;
    kvci_call_put(call);
    kvc_cond_broadcast(&client->done_cond);
}

/* Runs the callback of one finished call; drops and retakes the lock. */
static void run_done(kvc_client *client, kvci_call *call)
{
    kvc_op *op = call->op;
    kvc_done_fn *done = op->done;
    void *arg = op->arg;
    kvc_status status = op->status;
    uintptr_t ticket = (uintptr_t)op->impl[OP_TICKET];
    kvci_list_remove(&call->node);
    kvci_call_put(call);
    op_release(op);
    kvc_mutex_unlock(&client->lock);
    if (status != KVC_OK)
        kvci_error_load(ticket, status);
    done(op, arg);
    kvc_mutex_lock(&client->lock);
    client->live--;
    kvc_cond_broadcast(&client->done_cond);
}

void kvci_progress_main(void *arg)
{
    kvc_client *client = arg;
    kvc_mutex_lock(&client->lock);
    while (!client->stopping) {
        kvci_call *call = (kvci_call *)kvci_list_first(&client->finished);
        if (call != NULL) {
            run_done(client, call);
            continue;
        }
        uint64_t now_ns = kvc_now_ns();
        if (now_ns >= client->sweep_due_ns && !client->mapping) {
            kvci_map_sweep(client, now_ns);
            continue;
        }
        if (now_ns >= client->next_due_ns) {
            kvci_expire(client, now_ns);
            kvci_pump(client);
            continue;
        }
        uint64_t until_ns = client->next_due_ns;
        if (!client->mapping && client->sweep_due_ns < until_ns)
            until_ns = client->sweep_due_ns;
        (void)kvc_cond_wait_until(&client->prog_cond, &client->lock,
                                  until_ns == UINT64_MAX ? 0 : until_ns);
    }
    kvc_mutex_unlock(&client->lock);
}

/* Blocks until the op is complete, or TIMED_OUT. The client lives at least until then. */
static kvc_status await(kvc_op *op, uint64_t deadline_ns)
{
    kvc_client *client = op->impl[OP_CLIENT];
    kvc_status waited = KVC_OK;
    kvc_mutex_lock(&client->lock);
    client->waiters++;
    while (op_state(op) == OP_IN_FLIGHT && waited == KVC_OK)
        waited = kvc_cond_wait_until(&client->done_cond, &client->lock, deadline_ns);
    if (--client->waiters == 0 && client->closing)
        kvc_cond_broadcast(&client->done_cond);
    bool complete = op_state(op) == OP_COMPLETE;
    kvc_mutex_unlock(&client->lock);
    return complete ? KVC_OK : KVC_TIMED_OUT;
}

kvc_status kvc_op_wait(kvc_op *op, uint64_t deadline_ns)
{
    if (op->done != NULL)
        return kvci_fail(KVC_INVALID, "op: it has a callback, which may free it; do not wait");
    if (op_state(op) == OP_IDLE)
        return kvci_fail(KVC_INVALID, "op: it was never submitted");
    if (op_state(op) == OP_IN_FLIGHT && await(op, deadline_ns) != KVC_OK)
        return kvci_fail(KVC_TIMED_OUT, "op: still in flight when the wait's deadline passed");
    if (op->status != KVC_OK)
        kvci_error_load((uintptr_t)op->impl[OP_TICKET], op->status);
    return op->status;
}

void kvc_op_cancel(kvc_op *op)
{
    if (op_state(op) != OP_IN_FLIGHT)
        return;
    kvc_client *client = op->impl[OP_CLIENT];
    kvc_mutex_lock(&client->lock);
    kvci_call *call = op->impl[OP_CALL];
    if (call != NULL && call->n_left > 0) {
        kvci_call_cancel(client, call);
        kvci_pump(client);
    }
    kvc_mutex_unlock(&client->lock);
}
