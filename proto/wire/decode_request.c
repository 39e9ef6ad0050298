/*
 * decode_request.c: received bytes -> plain request structs.
 *
 * Pure, any thread. Arrays of numbers and digests are borrowed from protobuf-c's structs, which
 * live in the same arena. Counts and lengths are checked here; meaning is the server's to judge.
 */
#include "wire_internal.h"

static kvc_rope get_rope(const Kvasir__V1__Rope *msg)
{
    if (msg == NULL)
        return (kvc_rope){0};
    return (kvc_rope){
        .type = (kvc_rope_type)msg->type,
        .stored_rotated = msg->stored_rotated != 0,
        .theta = msg->theta,
        .factor = msg->factor,
        .low_freq_factor = msg->low_freq_factor,
        .high_freq_factor = msg->high_freq_factor,
        .original_max_position = msg->original_max_position,
    };
}

static kvc_part get_part(const Kvasir__V1__Part *msg)
{
    return (kvc_part){
        .part = msg->part,
        .kind = (kvc_part_kind)msg->kind,
        .dtype = (kvc_dtype)msg->dtype,
        .layer = msg->layer,
        .kv_head_first = msg->kv_head_first,
        .kv_head_count = msg->kv_head_count,
        .row_bytes = msg->row_bytes,
        .k_off_bytes = msg->k_off_bytes,
        .k_len_bytes = msg->k_len_bytes,
        .v_off_bytes = msg->v_off_bytes,
        .v_len_bytes = msg->v_len_bytes,
        .q_dim = msg->q_dim,
        .v_dim = msg->v_dim,
        .window = msg->window,
        .rope = get_rope(msg->rope),
        .attention_scale = msg->attention_scale,
        .softcap = msg->softcap,
        .sinks = msg->sinks,
        .codec = msg->codec[0] == '\0' ? NULL : msg->codec,
    };
}

kvc_status kvci_get_schema(kvci_job *job, const Kvasir__V1__Schema *msg,
                           const kvc_schema **schema_p)
{
    if (msg == NULL)
        return kvci_refuse(job, "the schema is missing");
    if (msg->n_parts > KVC_MAX_PARTS)
        return kvci_refuse(job, "a schema has 1 to 4096 parts");
    if (!kvci_fits(msg->model, KVC_MAX_NAME_BYTES) || !kvci_fits(msg->revision, KVC_MAX_NAME_BYTES))
        return kvci_refuse(job, "model and revision must have at most 255 bytes");
    if (!kvci_fits(msg->recipe, KVC_MAX_RECIPE_BYTES))
        return kvci_refuse(job, "recipe must have at most 4096 bytes");
    kvc_schema *schema = kvc_arena_alloc(job->arena, sizeof(*schema));
    kvc_part *parts = kvc_arena_alloc(job->arena, msg->n_parts * sizeof(*parts));
    if (schema == NULL || parts == NULL)
        return kvci_no_memory(job);
    for (size_t i = 0; i < msg->n_parts; i++) {
        if (!kvci_fits(msg->parts[i]->codec, KVC_MAX_NAME_BYTES))
            return kvci_refuse(job, "codec is above 255 bytes");
        parts[i] = get_part(msg->parts[i]);
    }
    *schema = (kvc_schema){
        .model = msg->model,
        .revision = msg->revision,
        .recipe = msg->recipe,
        .tp_size = msg->tp_size,
        .block_tokens = msg->block_tokens,
        .n_parts = (uint32_t)msg->n_parts,
        .parts = parts,
        .opaque = msg->opaque != 0,
    };
    *schema_p = schema;
    return KVC_OK;
}

kvc_status kvci_get_register_schema_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__RegisterSchemaRequest *msg =
        (const Kvasir__V1__RegisterSchemaRequest *)job->msg;
    return kvci_get_schema(job, msg->schema, &req->u.register_schema.schema);
}

kvc_status kvci_get_put_blocks_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__PutBlocksRequest *msg = (const Kvasir__V1__PutBlocksRequest *)job->msg;
    if (kvci_get_digest(&msg->schema, &req->u.put_blocks.schema) != KVC_OK)
        return kvci_refuse(job, "the schema digest must have 32 bytes");
    if ((int)msg->promise != KVC_PROMISE_MEMORY && (int)msg->promise != KVC_PROMISE_DURABLE)
        return kvci_refuse(job, "promise must be MEMORY or DURABLE");
    if (msg->n_values > KVC_MAX_BATCH_VALUES)
        return kvci_refuse(job, "more values than max_batch_values");
    kvc_put_value *values = kvc_arena_alloc(job->arena, msg->n_values * sizeof(*values));
    if (values == NULL)
        return kvci_no_memory(job);
    for (size_t i = 0; i < msg->n_values; i++) {
        if (kvci_get_digest(&msg->values[i]->digest, &values[i].digest) != KVC_OK)
            return kvci_refuse(job, "a value's digest must have 32 bytes");
        values[i].part = msg->values[i]->part;
        values[i].len_bytes = msg->values[i]->len_bytes;
        values[i].whole = (kvc_whole){msg->values[i]->total_bytes, msg->values[i]->sum};
    }
    req->u.put_blocks.promise = (kvc_promise)msg->promise;
    req->u.put_blocks.n_values = (uint32_t)msg->n_values;
    req->u.put_blocks.values = values;
    return KVC_OK;
}

const char kvci_bad_schema[] = "the schema digest must have 32 bytes";
const char kvci_bad_digests[] = "digests must be a run of 32 bytes each, at most max_digests";

kvc_status kvci_get_match_prefix_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__MatchPrefixRequest *msg = (const Kvasir__V1__MatchPrefixRequest *)job->msg;
    if (kvci_get_digest(&msg->schema, &req->u.match_prefix.schema) != KVC_OK)
        return kvci_refuse(job, kvci_bad_schema);
    if (kvci_get_digests(&msg->digests, &req->u.match_prefix.n_digests,
                         &req->u.match_prefix.digests) != KVC_OK)
        return kvci_refuse(job, kvci_bad_digests);
    if (msg->n_parts > KVC_MAX_PARTS)
        return kvci_refuse(job, "more parts than a schema can have");
    req->u.match_prefix.n_parts = (uint32_t)msg->n_parts;
    req->u.match_prefix.parts = msg->parts;
    req->u.match_prefix.want_tiers = msg->want_tiers != 0;
    req->u.match_prefix.want_each = msg->want_each != 0;
    return KVC_OK;
}

kvc_status kvci_get_open_context_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__OpenContextRequest *msg = (const Kvasir__V1__OpenContextRequest *)job->msg;
    if (kvci_get_digest(&msg->schema, &req->u.open_context.schema) != KVC_OK)
        return kvci_refuse(job, kvci_bad_schema);
    if (kvci_get_digests(&msg->digests, &req->u.open_context.n_digests,
                         &req->u.open_context.digests) != KVC_OK)
        return kvci_refuse(job, kvci_bad_digests);
    req->u.open_context.ttl_ms = msg->ttl_ms;
    return KVC_OK;
}

kvc_status kvci_get_extend_context_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__ExtendContextRequest *msg =
        (const Kvasir__V1__ExtendContextRequest *)job->msg;
    if (kvci_get_digests(&msg->digests, &req->u.extend_context.n_digests,
                         &req->u.extend_context.digests) != KVC_OK)
        return kvci_refuse(job, kvci_bad_digests);
    req->u.extend_context.context = msg->context;
    req->u.extend_context.n_blocks_before = msg->n_blocks_before;
    return KVC_OK;
}

kvc_status kvci_get_close_context_request(kvci_job *job, kvc_request *req)
{
    req->u.close_context.context = ((const Kvasir__V1__CloseContextRequest *)job->msg)->context;
    return KVC_OK;
}

kvc_status kvci_get_groups(kvci_job *job, Kvasir__V1__RowGroup **msgs, size_t n, kvc_request *req)
{
    if (n > KVC_MAX_GROUPS)
        return kvci_refuse(job, "more groups than max_groups");
    kvc_row_group *groups = kvc_arena_alloc(job->arena, n * sizeof(*groups));
    if (groups == NULL)
        return kvci_no_memory(job);
    uint64_t n_picks = 0;
    for (size_t i = 0; i < n; i++) {
        const Kvasir__V1__RowGroup *group = msgs[i];
        n_picks += group->n_picks;
        if (n_picks > KVC_MAX_PICKS)
            return kvci_refuse(job, "more picks than max_picks");
        groups[i] = (kvc_row_group){
            .context = group->context,
            .part = group->part,
            .n_picks = (uint32_t)group->n_picks,
            .picks = group->picks,
        };
    }
    req->u.fetch_rows.n_groups = (uint32_t)n;
    req->u.fetch_rows.groups = groups;
    return KVC_OK;
}

kvc_status kvci_get_fetch_rows_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__FetchRowsRequest *msg = (const Kvasir__V1__FetchRowsRequest *)job->msg;
    return kvci_get_groups(job, msg->groups, msg->n_groups, req);
}

kvc_status kvci_get_describe_request(kvci_job *job, kvc_request *req)
{
    (void)job;
    (void)req;
    return KVC_OK;
}

kvc_status kvci_get_stats_request(kvci_job *job, kvc_request *req)
{
    (void)job;
    (void)req;
    return KVC_OK;
}

static kvc_status convert(kvc_method method, kvci_job *job, kvc_request *req)
{
    typedef kvc_status get_fn(kvci_job *, kvc_request *);
    static get_fn *const table[KVC_METHOD_COUNT] = {
#define KVC_METHOD(upper, lower, name, flags) kvci_get_##lower##_request,
#include "wire/methods.def"
#undef KVC_METHOD
    };
    return table[method](job, req);
}

kvc_status kvc_wire_decode_request(kvc_method method, const struct iovec *in, uint32_t n_in,
                                   kvc_arena *arena, kvc_request *req_p, const char **why_p)
{
    kvci_split split;
    ProtobufCMessage *msg;
    kvci_job job = {.arena = arena};
    *req_p = (kvc_request){.method = method};
    kvc_status status =
        kvci_unpack(kvci_request_type(method), in, n_in, arena, &split, &msg, &job.why);
    if (status == KVC_OK) {
        job.msg = msg;
        job.data_bytes = split.data_bytes;
        status = convert(method, &job, req_p);
    }
    if (status == KVC_OK) {
        req_p->data = split.data;
        req_p->n_data = split.n_data;
        req_p->data_bytes = split.data_bytes;
    }
    if (why_p != NULL)
        *why_p = status == KVC_OK ? NULL : job.why;
    return status;
}
