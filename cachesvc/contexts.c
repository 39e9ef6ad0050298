/*
 * contexts.c: the calls about contexts: open, extend, truncate, fork, close.
 *
 * Transport threads; nothing here waits for a medium. The table of contexts is context.c.
 */
#include "request.h"

static uint64_t n_tokens(const kvs_context *context)
{
    return (uint64_t)atomic_load(&context->n_blocks) * context->schema->block_tokens;
}

void kvs_on_open_context(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    kvs_context *context;
    const char *why;
    uint32_t n_digests = call->req.u.open_context.n_digests;
    uint64_t ttl_ms = call->req.u.open_context.ttl_ms;
    if (n_digests > server->limits.max_digests) {
        kvs_fail(call, KVC_INVALID, "%u digests; max_digests is %u: extend the context", n_digests,
                 server->limits.max_digests);
        return;
    }
    const kvs_schema *schema =
        kvs_want_rows(server, call, tenant, &call->req.u.open_context.schema);
    if (!schema)
        return;
    kvc_status status = kvs_context_open(server->contexts, schema, call->req.u.open_context.digests,
                                         n_digests, kvs_ttl_ns(ttl_ms), &context, &why);
    if (status != KVC_OK) {
        kvs_fail(call, status, "%s", why);
        return;
    }
    kvc_reply reply = {.method = KVC_OPEN_CONTEXT};
    reply.u.open_context.context = context->handle;
    reply.u.open_context.ttl_ms = context->ttl_ns / 1000000;
    reply.u.open_context.n_tokens = n_tokens(context);
    kvs_context_put(server->contexts, context);
    kvs_answer(call, &reply, NULL, 0);
}

kvs_context *kvs_want_context(kvs_server *server, kvt_call *call, const kvc_digest *tenant,
                              uint64_t handle)
{
    kvs_context *context;
    kvc_status status = kvs_context_get(server->contexts, tenant, handle, &context);
    if (status != KVC_OK)
        kvs_fail(call, status, "context %016llx is not open here: open it again",
                 (unsigned long long)handle);
    return context;
}

void kvs_on_extend_context(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    const char *why;
    if (call->req.u.extend_context.n_digests > server->limits.max_digests) {
        kvs_fail(call, KVC_INVALID, "%u digests; max_digests is %u",
                 call->req.u.extend_context.n_digests, server->limits.max_digests);
        return;
    }
    kvc_status status = KVC_AGAIN;
    kvc_reply reply = {.method = KVC_EXTEND_CONTEXT};
    while (status == KVC_AGAIN) { /* a truncate came between */
        kvs_context *context =
            kvs_want_context(server, call, tenant, call->req.u.extend_context.context);
        if (!context)
            return;
        status = kvs_context_extend(
            server->contexts, context, call->req.u.extend_context.n_blocks_before,
            call->req.u.extend_context.digests, call->req.u.extend_context.n_digests, &why);
        reply.u.extend_context.n_tokens = n_tokens(context);
        kvs_context_put(server->contexts, context);
    }
    if (status == KVC_OK)
        kvs_answer(call, &reply, NULL, 0);
    else
        kvs_fail(call, status, "%s", why);
}

void kvs_on_truncate_context(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    const char *why = "";
    uint32_t n = call->req.u.truncate_context.n_blocks;
    kvc_status status = KVC_AGAIN;
    kvc_reply reply = {.method = KVC_TRUNCATE_CONTEXT};
    while (status == KVC_AGAIN) {
        kvs_context *context =
            kvs_want_context(server, call, tenant, call->req.u.truncate_context.context);
        if (!context)
            return;
        status = kvs_context_truncate(server->contexts, context, n, &why);
        reply.u.truncate_context.n_tokens = (uint64_t)n * context->schema->block_tokens;
        kvs_context_put(server->contexts, context);
    }
    if (status == KVC_OK)
        kvs_answer(call, &reply, NULL, 0);
    else
        kvs_fail(call, status, "%s", why);
}

void kvs_on_fork_context(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    const char *why = "";
    kvs_context *context, *from;
    from = kvs_want_context(server, call, tenant, call->req.u.fork_context.context);
    if (!from)
        return;
    kvc_status status =
        kvs_context_fork(server->contexts, from, call->req.u.fork_context.n_blocks,
                         kvs_ttl_ns(call->req.u.fork_context.ttl_ms), &context, &why);
    kvs_context_put(server->contexts, from);
    if (status != KVC_OK) {
        kvs_fail(call, status, "%s", why);
        return;
    }
    kvc_reply reply = {.method = KVC_FORK_CONTEXT};
    reply.u.fork_context.context = context->handle;
    reply.u.fork_context.ttl_ms = context->ttl_ns / 1000000;
    reply.u.fork_context.n_tokens = n_tokens(context);
    kvs_context_put(server->contexts, context);
    kvs_answer(call, &reply, NULL, 0);
}

void kvs_on_close_context(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    kvs_context *context =
        kvs_want_context(server, call, tenant, call->req.u.close_context.context);
    if (!context)
        return;
    kvs_context_close(server->contexts, context);
    kvs_context_put(server->contexts, context);
    kvc_reply reply = {.method = KVC_CLOSE_CONTEXT};
    kvs_answer(call, &reply, NULL, 0);
}
