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

static const kvci_kind kinds[KVC_METHOD_COUNT] = {
#define KVC_METHOD(upper, lower, method_name, flags)                                               \
    {.name = method_name,                                                                          \
     .names_schema = ((flags)&KVC_METHOD_NAMES_SCHEMA) != 0,                                       \
     .take = rpc_take,                                                                             \
     .finish = rpc_finish},
#include "wire/methods.def"
#undef KVC_METHOD
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
