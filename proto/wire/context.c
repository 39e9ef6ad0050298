/*
 * context.c: TruncateContext and ForkContext.
 *
 * Pure, any thread; see wire_internal.h for what the functions of a method promise.
 */
#include "wire_internal.h"

kvc_status kvci_put_truncate_context_request(const kvc_request *req, const kvci_out *out)
{
    Kvasir__V1__TruncateContextRequest msg = KVASIR__V1__TRUNCATE_CONTEXT_REQUEST__INIT;
    msg.context = req->u.truncate_context.context;
    msg.n_blocks = req->u.truncate_context.n_blocks;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_truncate_context_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__TruncateContextRequest *msg =
        (const Kvasir__V1__TruncateContextRequest *)job->msg;
    req->u.truncate_context.context = msg->context;
    req->u.truncate_context.n_blocks = msg->n_blocks;
    return KVC_OK;
}

kvc_status kvci_put_truncate_context_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__TruncateContextReply msg = KVASIR__V1__TRUNCATE_CONTEXT_REPLY__INIT;
    msg.n_tokens = reply->u.truncate_context.n_tokens;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_truncate_context_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__TruncateContextReply *msg =
        (const Kvasir__V1__TruncateContextReply *)job->msg;
    reply->u.truncate_context.n_tokens = msg->n_tokens;
    return KVC_OK;
}

kvc_status kvci_put_fork_context_request(const kvc_request *req, const kvci_out *out)
{
    Kvasir__V1__ForkContextRequest msg = KVASIR__V1__FORK_CONTEXT_REQUEST__INIT;
    msg.context = req->u.fork_context.context;
    msg.n_blocks = req->u.fork_context.n_blocks;
    msg.ttl_ms = req->u.fork_context.ttl_ms;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_fork_context_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__ForkContextRequest *msg = (const Kvasir__V1__ForkContextRequest *)job->msg;
    req->u.fork_context.context = msg->context;
    req->u.fork_context.n_blocks = msg->n_blocks;
    req->u.fork_context.ttl_ms = msg->ttl_ms;
    return KVC_OK;
}

kvc_status kvci_put_fork_context_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__ForkContextReply msg = KVASIR__V1__FORK_CONTEXT_REPLY__INIT;
    msg.context = reply->u.fork_context.context;
    msg.ttl_ms = reply->u.fork_context.ttl_ms;
    msg.n_tokens = reply->u.fork_context.n_tokens;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_fork_context_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__ForkContextReply *msg = (const Kvasir__V1__ForkContextReply *)job->msg;
    reply->u.fork_context.context = msg->context;
    reply->u.fork_context.ttl_ms = msg->ttl_ms;
    reply->u.fork_context.n_tokens = msg->n_tokens;
    return KVC_OK;
}
