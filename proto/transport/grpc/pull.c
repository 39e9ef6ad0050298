/*
 * pull.c: the messages of a reply that streams, at the client.
 *
 * Everything runs on the connection's thread, but kvti_pull_begin, which hands over to it. The next
 * message is asked for once the caller has seen the last, so gRPC's flow control holds the server
 * back. A message that breaks the protocol ends the call.
 */
#include "grpc_internal.h"
#include "wire/wire.h"

static void ask(kvti_pull *pull)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
    op.data.recv_message.recv_message = &pull->message;
    kvti_start(pull->call, &op, 1, &pull->got);
}

static kvc_status decode(kvti_pull *pull)
{
    kvt_xfer *xfer = pull->xfer;
    uint32_t n_pieces;
    pull->why = "a message of the reply is compressed";
    if (pull->message->data.raw.compression != GRPC_COMPRESS_NONE)
        return KVC_PROTOCOL;
    pull->why = "memory for one message is out";
    struct iovec *pieces = kvti_byte_buffer_pieces(pull->message, &xfer->arena, &n_pieces);
    if (pieces == NULL)
        return KVC_NO_MEMORY;
    kvc_status status = kvc_wire_decode_reply(xfer->req->method, pieces, n_pieces, &xfer->arena,
                                              &xfer->reply, &pull->why);
    return status == KVC_INVALID ? KVC_PROTOCOL : status;
}

static void on_got(kvti_tag *tag, bool ok)
{
    kvti_pull *pull = KVTI_CONTAINER(tag, kvti_pull, got);
    (void)ok;
    if (pull->message == NULL) {
        pull->ended = true;
        grpc_call_unref(pull->call);
        pull->over(pull);
        return;
    }
    if (pull->status == KVC_OK) {
        pull->status = decode(pull);
        if (pull->status == KVC_OK)
            pull->xfer->message(pull->xfer);
        else
            (void)grpc_call_cancel(pull->call, NULL);
    }
    grpc_byte_buffer_destroy(pull->message);
    pull->message = NULL;
    kvc_arena_reset(&pull->xfer->arena);
    ask(pull);
}

void kvti_pull_begin(kvti_pull *pull)
{
    pull->got.fn = on_got;
    pull->status = KVC_OK;
    ask(pull);
}
