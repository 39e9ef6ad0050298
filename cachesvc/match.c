/*
 * match.c: MatchPrefix, and the three calls about contexts.
 *
 * Transport threads; nothing here waits for a medium.
 */
#include <string.h>

#include "base/metrics.h"
#include "request.h"

/* The places of the parts that the request names. NULL after kvs_fail. */
static uint16_t *named_parts(kvt_call *call, const kvs_schema *schema, uint32_t n)
{
    const uint32_t *ids = call->req.u.match_prefix.parts;
    if (n > schema->n_parts) {
        kvs_fail(call, KVC_INVALID, "%u parts; the schema has %u", n, schema->n_parts);
        return NULL;
    }
    uint16_t *places = kvc_arena_calloc(&call->arena, n, sizeof(*places));
    bool *seen = kvc_arena_calloc(&call->arena, schema->n_parts, sizeof(*seen));
    if (!places || !seen) {
        kvs_fail(call, KVC_NO_MEMORY, "no memory for the list of parts");
        return NULL;
    }
    for (uint32_t i = 0; i < n; i++) {
        int place = kvs_schema_part(schema, ids[i]);
        if (place < 0 || seen[place]) {
            kvs_fail(call, KVC_INVALID, "part %u is %s", ids[i],
                     place < 0 ? "not in the schema" : "named twice");
            return NULL;
        }
        seen[place] = true;
        places[i] = (uint16_t)place;
    }
    return places;
}

/* Where none are named: all but compressed keys, unless the schema has nothing else. NULL after
   kvs_fail. */
static uint16_t *default_parts(kvt_call *call, const kvs_schema *schema, uint32_t *n_p)
{
    uint16_t *places = kvc_arena_calloc(&call->arena, schema->n_parts, sizeof(*places));
    *n_p = 0;
    if (!places) {
        kvs_fail(call, KVC_NO_MEMORY, "no memory for the list of parts");
        return NULL;
    }
    for (uint32_t i = 0; i < schema->n_parts; i++)
        if (!schema->parts[i].is_index)
            places[(*n_p)++] = (uint16_t)i;
    for (uint32_t i = 0; *n_p == i && i < schema->n_parts; i++)
        places[(*n_p)++] = (uint16_t)i;
    return places;
}

void kvs_on_match_prefix(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    uint32_t n_digests = call->req.u.match_prefix.n_digests;
    uint32_t n_parts = call->req.u.match_prefix.n_parts;
    bool named = n_parts > 0;
    kvc_reply reply = {.method = KVC_MATCH_PREFIX};
    if (n_digests > server->limits.max_digests) {
        kvs_fail(call, KVC_INVALID, "%u digests; max_digests is %u", n_digests,
                 server->limits.max_digests);
        return;
    }
    const kvs_schema *schema =
        kvs_want_schema(server, call, tenant, &call->req.u.match_prefix.schema);
    if (!schema)
        return;
    uint16_t *parts =
        named ? named_parts(call, schema, n_parts) : default_parts(call, schema, &n_parts);
    if (!parts)
        return;
    kvc_status status = kvs_index_match(server->index, schema, parts, n_parts, !named,
                                        call->req.u.match_prefix.digests, n_digests,
                                        call->deadline_ns, &reply.u.match_prefix.hits);
    if (status != KVC_OK) {
        kvs_fail(call, status, "%u digests of %u parts were not matched in time", n_digests,
                 n_parts);
        return;
    }
    KVC_COUNT_N(match_digests, n_digests);
    KVC_COUNT_N(match_hits, reply.u.match_prefix.hits);
    kvs_answer(call, &reply, NULL, 0);
}

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
        kvs_want_schema(server, call, tenant, &call->req.u.open_context.schema);
    if (!schema)
        return;
    uint64_t ttl_ns = ttl_ms > UINT64_MAX / 1000000 ? UINT64_MAX : ttl_ms * 1000000;
    kvc_status status = kvs_context_open(server->contexts, schema, call->req.u.open_context.digests,
                                         n_digests, ttl_ns, &context, &why);
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

/* References the context of a handle; NULL after kvs_fail. */
static kvs_context *want_context(kvs_server *server, kvt_call *call, const kvc_digest *tenant,
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
    kvs_context *context = want_context(server, call, tenant, call->req.u.extend_context.context);
    if (!context)
        return;
    kvc_status status = kvs_context_extend(
        server->contexts, context, call->req.u.extend_context.n_blocks_before,
        call->req.u.extend_context.digests, call->req.u.extend_context.n_digests, &why);
    kvc_reply reply = {.method = KVC_EXTEND_CONTEXT};
    reply.u.extend_context.n_tokens = n_tokens(context);
    kvs_context_put(server->contexts, context);
    if (status == KVC_OK)
        kvs_answer(call, &reply, NULL, 0);
    else
        kvs_fail(call, status, "%s", why);
}

void kvs_on_close_context(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    kvs_context *context = want_context(server, call, tenant, call->req.u.close_context.context);
    if (!context)
        return;
    kvs_context_close(server->contexts, context);
    kvs_context_put(server->contexts, context);
    kvc_reply reply = {.method = KVC_CLOSE_CONTEXT};
    kvs_answer(call, &reply, NULL, 0);
}
