/*
 * stream.c: the messages of a reply that streams, at the server.
 *
 * kvti_call_send runs on any thread and starts one batch; its end comes back on the queue's thread,
 * where the server hears of it. gRPC ends the batch when flow control has let the message pass, or
 * as failed when the call is over. Invariant: one message is under way at a time, and the answer
 * (call.c) comes after the last, so no batch outlives the call.
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
