/*
 * match.c: MatchPrefix.
 *
 * Transport threads; nothing here waits for a medium.
 */
#include "base/metrics.h"
#include "request.h"

uint16_t *kvs_named_parts(kvt_call *call, const kvs_schema *schema, const uint32_t *ids, uint32_t n)
{
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

uint16_t *kvs_default_parts(kvt_call *call, const kvs_schema *schema, uint32_t *n_p)
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

bool kvs_no_parts(kvt_call *call, uint32_t n_parts)
{
    if (n_parts)
        kvs_fail(call, KVC_INVALID, "the schema is opaque: its values have no parts to choose");
    return !n_parts;
}

/* The places of the parts to look for, in the arena; NULL after kvs_fail. */
static uint16_t *match_parts(kvt_call *call, const kvs_schema *schema, uint32_t *n_p)
{
    *n_p = call->req.u.match_prefix.n_parts;
    if (*n_p)
        return kvs_named_parts(call, schema, call->req.u.match_prefix.parts, *n_p);
    return kvs_default_parts(call, schema, n_p);
}

/* tiers: NULL, or one for each digest. False after kvs_fail. */
static bool match(kvs_server *server, kvt_call *call, const kvs_schema *schema, uint8_t *tiers,
                  uint32_t *hits_p)
{
    const kvc_digest *digests = call->req.u.match_prefix.digests;
    uint32_t n = call->req.u.match_prefix.n_digests, n_parts = call->req.u.match_prefix.n_parts;
    bool named = n_parts > 0;
    uint16_t *parts = NULL;
    kvc_status status;
    if (schema->piece_bytes ? !kvs_no_parts(call, n_parts)
                            : !(parts = match_parts(call, schema, &n_parts)))
        return false;
    if (schema->piece_bytes)
        status = kvs_index_match_opaque(server->index, schema, digests, n,
                                        call->req.u.match_prefix.want_each, call->deadline_ns,
                                        tiers, hits_p);
    else
        status = kvs_index_match(server->index, schema, parts, n_parts, !named, digests, n,
                                 call->deadline_ns, tiers, hits_p);
    if (status != KVC_OK)
        kvs_fail(call, status, "%u digests of %u parts were not matched in time", n, n_parts);
    return status == KVC_OK;
}

void kvs_on_match_prefix(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    uint32_t n_digests = call->req.u.match_prefix.n_digests;
    bool each = call->req.u.match_prefix.want_each;
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
    if (each && !schema->piece_bytes) {
        kvs_fail(call, KVC_INVALID, "want_each is for opaque schemas; blocks follow one another");
        return;
    }
    bool want_tiers = (call->req.u.match_prefix.want_tiers || each) && n_digests;
    uint8_t *tiers = want_tiers ? kvc_arena_alloc(&call->arena, n_digests) : NULL;
    if (want_tiers && !tiers) {
        kvs_fail(call, KVC_NO_MEMORY, "no memory for %u tiers", n_digests);
        return;
    }
    if (!match(server, call, schema, tiers, &reply.u.match_prefix.hits))
        return;
    reply.u.match_prefix.tiers = tiers;
    reply.u.match_prefix.n_tiers = !tiers ? 0 : each ? n_digests : reply.u.match_prefix.hits;
    KVC_COUNT_N(match_digests, n_digests);
    KVC_COUNT_N(match_hits, reply.u.match_prefix.hits);
    kvs_answer(call, &reply, NULL, 0);
}
