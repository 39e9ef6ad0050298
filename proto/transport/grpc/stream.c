/*
 * stream.c: the messages of replies and of requests that stream, at the server.
 *
 * kvti_call_send runs on any thread and starts one batch; its end comes back on the queue's thread,
 * where the server hears of it. gRPC ends the batch when flow control has let the message pass, or
 * as failed when the call is over. kvti_call_recv likewise, for the next message of the client.
 * Invariant: one message is under way in each direction, and the answer (call.c) comes after the
 * last, so no batch outlives the call.
 */
#include "base/assert.h"
#include "base/log.h"
#include "grpc_internal.h"
#include "wire/wire.h"

void kvti_on_part_sent(kvti_tag *tag, bool ok)
{
    struct kvti_call *call = KVTI_CONTAINER(tag, struct kvti_call, part_sent);
    grpc_byte_buffer_destroy(call->part);
    call->part = NULL;
    call->base.sent(&call->base, ok);
}

kvc_status kvti_call_send(kvt_call *base, const kvc_reply *reply, const kvt_slice *slices,
                          uint32_t n_slices)
{
    struct kvti_call *call = (struct kvti_call *)base;
    KVC_ASSERT(n_slices <= KVT_MAX_SLICES && call->part == NULL && base->sent != NULL);
    kvc_reply whole = *reply;
    const void *head;
    size_t head_bytes;
    kvc_arena arena; /* not the call's, which would grow with the stream */
    kvc_arena_init(&arena, KVTI_ARENA_BYTES);
    whole.method = (kvc_method)call->slot;
    whole.data = NULL;
    whole.data_bytes = 0;
    for (uint32_t i = 0; i < n_slices; i++)
        whole.data_bytes += slices[i].len_bytes;
    kvc_status status = kvc_wire_encode_reply(&whole, &arena, &head, &head_bytes);
    if (status != KVC_OK) {
        KVC_LOG_ERROR(GRPC, "a message of %s does not encode: %s", kvc_method_name(whole.method),
                      kvc_status_name(status));
        kvti_release_all(slices, n_slices);
        kvc_arena_reset(&arena);
        return status;
    }
    call->part = kvti_build_answer(head, head_bytes, slices, n_slices);
    kvc_arena_reset(&arena);
    grpc_op ops[2] = {{.op = GRPC_OP_SEND_MESSAGE}, {.op = GRPC_OP_SEND_INITIAL_METADATA}};
    ops[0].data.send_message.send_message = call->part;
    size_t n_ops = call->greeted ? 1 : 2;
    call->greeted = true;
    kvti_start(call->call, ops, n_ops, &call->part_sent);
    return KVC_OK;
}

/* Counts the message that came against the listener's limit. AGAIN: it is reached. */
static kvc_status charge(struct kvti_call *call, const char **why_p)
{
    uint64_t len_bytes = grpc_byte_buffer_length(call->request);
    bool room = kvti_budget_take(call->queue->listener->budget, len_bytes);
    if (room)
        call->charged_bytes = len_bytes;
    *why_p = room ? NULL : "too many request bytes in flight";
    return room ? KVC_OK : KVC_AGAIN;
}

void kvti_on_got(kvti_tag *tag, bool ok)
{
    struct kvti_call *call = KVTI_CONTAINER(tag, struct kvti_call, got);
    const char *why = NULL;
    int asked = KVTI_ASKED;
    (void)ok;
    if (!atomic_compare_exchange_strong(&call->asking, &asked, KVTI_ASK_NONE)) {
        if (call->next != NULL)
            grpc_byte_buffer_destroy(call->next);
        kvti_unref_call(call);
        return;
    }
    /* The answer's own reference keeps the call, for it comes after got. */
    (void)atomic_fetch_sub(&call->n_refs, 1);
    if (call->next == NULL) {
        call->base.got(&call->base, KVC_CLOSED, "there are no more messages");
        return;
    }
    call->request = call->next;
    call->next = NULL;
    kvc_status status = charge(call, &why);
    if (status == KVC_OK)
        status = kvti_decode_request(call, &why);
    if (status != KVC_OK)
        kvti_count_refusal(status);
    call->base.got(&call->base, status, why);
}

void kvti_call_recv(kvt_call *base)
{
    struct kvti_call *call = (struct kvti_call *)base;
    KVC_ASSERT(base->got != NULL && call->next == NULL);
    kvti_free_request(call);
    base->req = (kvc_request){.method = (kvc_method)call->slot};
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
    op.data.recv_message.recv_message = &call->next;
    (void)atomic_fetch_add(&call->n_refs, 1);
    atomic_store(&call->asking, KVTI_ASKED);
    kvti_start(call->call, &op, 1, &call->got);
}

bool kvti_call_unrecv(kvt_call *base)
{
    struct kvti_call *call = (struct kvti_call *)base;
    int asked = KVTI_ASKED;
    return atomic_compare_exchange_strong(&call->asking, &asked, KVTI_ASK_OVER);
}
