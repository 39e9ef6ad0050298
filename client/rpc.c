/*
 * rpc.c: one message, blocking, upon the asynchronous core.
 *
 * The calling thread waits; the reply is read on a transport thread by the caller's take function.
 * Never from a callback: kvc-prog cannot wait for itself.
 */
#include "internal.h"

static kvc_status rpc_take(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    kvci_call *call = msg->call;
    *why_p = "the reply makes no sense";
    return call->u.rpc.take != NULL ? call->u.rpc.take(call->u.rpc.arg, reply) : KVC_OK;
}

static void rpc_finish(kvci_call *call)
{
    if (call->u.rpc.resent_p != NULL)
        *call->u.rpc.resent_p = call->resent;
}

#define RPC_KIND(method, text, schema)                                                             \
    [method] = {.name = text, .names_schema = schema, .take = rpc_take, .finish = rpc_finish}

static const kvci_kind kinds[KVC_METHOD_COUNT] = {
    RPC_KIND(KVC_DESCRIBE, "describe", false),
    RPC_KIND(KVC_REGISTER_SCHEMA, "schema register", false),
    RPC_KIND(KVC_PUT_BLOCKS, "put", true),
    RPC_KIND(KVC_MATCH_PREFIX, "match", true),
    RPC_KIND(KVC_OPEN_CONTEXT, "context open", true),
    RPC_KIND(KVC_EXTEND_CONTEXT, "context extend", false),
    RPC_KIND(KVC_CLOSE_CONTEXT, "context close", false),
    RPC_KIND(KVC_FETCH_ROWS, "fetch", false),
    RPC_KIND(KVC_STATS, "stats", false),
};

kvc_status kvci_rpc(kvc_client *client, const kvc_request *req, const kvci_rpc_opts *opts)
{
    kvci_call *call = kvci_call_new(client, &kinds[req->method], 1, 0, opts->deadline_ns);
    if (call == NULL)
        return kvci_fail(KVC_NO_MEMORY, "%s: no memory", kinds[req->method].name);
    call->msgs[0].req = *req;
    call->msgs[0].n_items = 1;
    call->once = opts->once;
    call->u.rpc.take = opts->take;
    call->u.rpc.arg = opts->take_arg;
    call->u.rpc.resent_p = opts->resent_p;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    kvc_status status = kvci_call_start(call, &op);
    return status == KVC_OK ? kvc_op_wait(&op, 0) : status;
}
