/*
 * branch.c: contexts that lose their end (truncate) or get a twin (fork).
 *
 * Caller's threads, as the busy owner of the context, so that no extend or reopen comes between.
 * Where the handle is stale, the digest list here is enough: the context is opened anew with the
 * length asked for. Invariant: after a failure the list is as it was.
 */
#include "map.h"

/* What the server was told of a truncate may have been done although we know nothing of it. */
static bool outcome_unknown(kvc_status status)
{
    return status != KVC_INVALID && status != KVC_NO_SPACE && status != KVC_NO_MEMORY;
}

static kvc_status truncate_handle(kvc_context *context, uint32_t n, uint64_t deadline_ns,
                                  uint64_t *handle_p)
{
    kvc_client *client = context->client;
    kvc_request req = {.method = KVC_TRUNCATE_CONTEXT};
    req.u.truncate_context.context = *handle_p;
    req.u.truncate_context.n_blocks = n;
    kvc_status status = KVC_STALE_HANDLE;
    if (!kvci_context_is_stale(context))
        status = kvci_send_rpc(client, &req, deadline_ns, NULL, NULL);
    if (status != KVC_STALE_HANDLE)
        return status;
    return kvci_open_chain(context, n, kvci_limits(client).max_digests, kvci_send_rpc, client,
                           deadline_ns, handle_p);
}

kvc_status kvc_context_truncate(kvc_context *context, uint32_t n_blocks, uint64_t deadline_ns)
{
    kvc_client *client = context->client;
    deadline_ns = kvci_deadline(client, deadline_ns);
    kvc_status status = kvci_context_take(context, deadline_ns);
    if (status != KVC_OK)
        return status;
    uint32_t n_old = kvc_context_blocks(context);
    uint64_t old_handle = context->handle, handle = old_handle;
    if (n_blocks > n_old)
        status = kvci_fail(KVC_INVALID, "context truncate: %u blocks; it has %u", n_blocks, n_old);
    else if (n_blocks < n_old)
        status = truncate_handle(context, n_blocks, deadline_ns, &handle);
    bool ambiguous = status != KVC_OK && outcome_unknown(status);
    if (ambiguous) {
        /* Fetches must not find it shorter there than it is here. */
        kvc_mutex_lock(&client->lock);
        kvci_context_stale(context, context->gen);
        kvc_mutex_unlock(&client->lock);
    }
    if (status == KVC_OK)
        kvci_map_cut(context, n_blocks);
    kvci_context_give(context, status, ambiguous, handle, n_blocks);
    if (status == KVC_OK && handle != old_handle)
        kvci_handle_close(client, old_handle);
    return status;
}

static kvc_status take_fork(void *arg, const kvc_reply *reply)
{
    *(uint64_t *)arg = reply->u.fork_context.context;
    return KVC_OK;
}

static kvc_status fork_handle(kvc_context *from, const kvc_context *twin, uint32_t n,
                              uint64_t deadline_ns, uint64_t *handle_p)
{
    kvc_client *client = from->client;
    kvc_request req = {.method = KVC_FORK_CONTEXT};
    req.u.fork_context.context = from->handle;
    req.u.fork_context.n_blocks = n;
    req.u.fork_context.ttl_ms = twin->ttl_ms;
    kvc_status status = KVC_STALE_HANDLE;
    /* A fork of nothing is an open of nothing; 0 would mean all on the wire. */
    if (n > 0 && !kvci_context_is_stale(from))
        status = kvci_send_rpc(client, &req, deadline_ns, take_fork, handle_p);
    if (status != KVC_STALE_HANDLE)
        return status;
    return kvci_open_chain(twin, n, kvci_limits(client).max_digests, kvci_send_rpc, client,
                           deadline_ns, handle_p);
}

kvc_status kvc_context_fork(kvc_context *context, uint32_t n_blocks, uint64_t ttl_ms,
                            uint64_t deadline_ns, kvc_context **context_p)
{
    kvc_client *client = context->client;
    kvc_context *twin = NULL;
    *context_p = NULL;
    deadline_ns = kvci_deadline(client, deadline_ns);
    kvc_status status = kvci_context_take(context, deadline_ns);
    if (status != KVC_OK)
        return status;
    uint32_t n_old = kvc_context_blocks(context);
    uint64_t handle = context->handle;
    if (n_blocks > n_old)
        status = kvci_fail(KVC_INVALID, "context fork: %u blocks; it has %u", n_blocks, n_old);
    if (status == KVC_OK) {
        twin = kvci_context_new(client, &context->schema, context->blocks, n_blocks, ttl_ms);
        status = twin != NULL ? KVC_OK : KVC_NO_MEMORY;
    }
    if (status == KVC_OK)
        status = fork_handle(context, twin, n_blocks, deadline_ns, &twin->handle);
    kvci_context_give(context, KVC_AGAIN, false, handle, n_old); /* nothing about it changed */
    if (status != KVC_OK && twin != NULL)
        kvci_context_free(twin);
    else
        *context_p = twin;
    if (status == KVC_OK)
        kvci_map_follow(twin, deadline_ns);
    return status;
}
