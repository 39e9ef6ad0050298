/*
 * encode_request.c: plain request structs -> header bytes.
 *
 * Pure, any thread. Each function builds the protobuf-c struct of its method, borrowing from the
 * request, and packs it into the arena. Limits are those of kvc/types.h.
 */
#include "wire_internal.h"

/* Where the packed bytes go; one argument instead of three. */
static Kvasir__V1__Rope put_rope(const kvc_rope *rope)
{
    Kvasir__V1__Rope msg = KVASIR__V1__ROPE__INIT;
    msg.type = (Kvasir__V1__RopeType)rope->type;
    msg.stored_rotated = rope->stored_rotated != 0;
    msg.theta = rope->theta;
    msg.factor = rope->factor;
    msg.low_freq_factor = rope->low_freq_factor;
    msg.high_freq_factor = rope->high_freq_factor;
    msg.original_max_position = rope->original_max_position;
    return msg;
}

static Kvasir__V1__Part put_part(const kvc_part *part, Kvasir__V1__Rope *rope)
{
    Kvasir__V1__Part msg = KVASIR__V1__PART__INIT;
    msg.part = part->part;
    msg.kind = (Kvasir__V1__PartKind)part->kind;
    msg.dtype = (Kvasir__V1__Dtype)part->dtype;
    msg.layer = part->layer;
    msg.kv_head_first = part->kv_head_first;
    msg.kv_head_count = part->kv_head_count;
    msg.row_bytes = part->row_bytes;
    msg.k_off_bytes = part->k_off_bytes;
    msg.k_len_bytes = part->k_len_bytes;
    msg.v_off_bytes = part->v_off_bytes;
    msg.v_len_bytes = part->v_len_bytes;
    msg.q_dim = part->q_dim;
    msg.v_dim = part->v_dim;
    msg.window = part->window;
    msg.rope = rope;
    msg.attention_scale = part->attention_scale;
    msg.softcap = part->softcap;
    msg.sinks = part->sinks;
    msg.codec = kvci_put_text(part->codec);
    return msg;
}

static bool schema_fits(const kvc_schema *schema)
{
    if (schema == NULL || schema->n_parts > KVC_MAX_PARTS || schema->opaque > 1 ||
        !kvci_fits(kvci_put_text(schema->model), KVC_MAX_NAME_BYTES) ||
        !kvci_fits(kvci_put_text(schema->revision), KVC_MAX_NAME_BYTES) ||
        !kvci_fits(kvci_put_text(schema->recipe), KVC_MAX_RECIPE_BYTES))
        return false;
    for (uint32_t i = 0; i < schema->n_parts; i++) {
        const kvc_part *part = &schema->parts[i];
        if (part->rope.stored_rotated > 1 ||
            !kvci_fits(kvci_put_text(part->codec), KVC_MAX_NAME_BYTES))
            return false;
    }
    return true;
}

kvc_status kvci_put_schema(const kvc_schema *schema, kvc_arena *arena, Kvasir__V1__Schema *msg_p)
{
    if (!schema_fits(schema))
        return KVC_INVALID;
    uint32_t n = schema->n_parts;
    Kvasir__V1__Part *parts = kvc_arena_alloc(arena, n * sizeof(*parts));
    Kvasir__V1__Part **list = kvc_arena_alloc(arena, n * sizeof(*list));
    Kvasir__V1__Rope *ropes = kvc_arena_alloc(arena, n * sizeof(*ropes));
    if (parts == NULL || list == NULL || ropes == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        ropes[i] = put_rope(&schema->parts[i].rope);
        parts[i] = put_part(&schema->parts[i], &ropes[i]);
        list[i] = &parts[i];
    }
    *msg_p = (Kvasir__V1__Schema)KVASIR__V1__SCHEMA__INIT;
    msg_p->model = kvci_put_text(schema->model);
    msg_p->revision = kvci_put_text(schema->revision);
    msg_p->recipe = kvci_put_text(schema->recipe);
    msg_p->tp_size = schema->tp_size;
    msg_p->block_tokens = schema->block_tokens;
    msg_p->n_parts = n;
    msg_p->parts = list;
    msg_p->opaque = schema->opaque != 0;
    return KVC_OK;
}

kvc_status kvci_put_register_schema_request(const kvc_request *req, const kvci_out *out)
{
    Kvasir__V1__Schema msg;
    Kvasir__V1__RegisterSchemaRequest top = KVASIR__V1__REGISTER_SCHEMA_REQUEST__INIT;
    kvc_status status = kvci_put_schema(req->u.register_schema.schema, out->arena, &msg);
    if (status != KVC_OK)
        return status;
    top.schema = &msg;
    return kvci_put(out, &top.base, 0);
}

kvc_status kvci_put_put_blocks_request(const kvc_request *req, const kvci_out *out)
{
    uint32_t n = req->u.put_blocks.n_values;
    bool data_fits = req->data_bytes == 0 || req->data != NULL;
    if (n > KVC_MAX_BATCH_VALUES || !data_fits ||
        !kvci_data_fits(req->data, req->n_data, req->data_bytes))
        return KVC_INVALID;
    Kvasir__V1__PutValue *values = kvc_arena_alloc(out->arena, n * sizeof(*values));
    Kvasir__V1__PutValue **list = kvc_arena_alloc(out->arena, n * sizeof(*list));
    if (values == NULL || list == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        const kvc_put_value *value = &req->u.put_blocks.values[i];
        values[i] = (Kvasir__V1__PutValue)KVASIR__V1__PUT_VALUE__INIT;
        values[i].digest = kvci_put_digest(&value->digest);
        values[i].part = value->part;
        values[i].len_bytes = value->len_bytes;
        values[i].total_bytes = value->whole.total_bytes;
        values[i].sum = value->whole.sum;
        list[i] = &values[i];
    }
    Kvasir__V1__PutBlocksRequest msg = KVASIR__V1__PUT_BLOCKS_REQUEST__INIT;
    msg.schema = kvci_put_digest(&req->u.put_blocks.schema);
    msg.promise = (Kvasir__V1__Promise)req->u.put_blocks.promise;
    msg.n_values = n;
    msg.values = list;
    return kvci_put(out, &msg.base, req->data_bytes);
}

kvc_status kvci_put_match_prefix_request(const kvc_request *req, const kvci_out *out)
{
    if (req->u.match_prefix.n_digests > KVC_MAX_DIGESTS ||
        req->u.match_prefix.n_parts > KVC_MAX_PARTS)
        return KVC_INVALID;
    Kvasir__V1__MatchPrefixRequest msg = KVASIR__V1__MATCH_PREFIX_REQUEST__INIT;
    msg.schema = kvci_put_digest(&req->u.match_prefix.schema);
    msg.digests = kvci_put_digests(req->u.match_prefix.digests, req->u.match_prefix.n_digests);
    msg.n_parts = req->u.match_prefix.n_parts;
    msg.parts = (uint32_t *)(uintptr_t)req->u.match_prefix.parts;
    msg.want_tiers = req->u.match_prefix.want_tiers;
    msg.want_each = req->u.match_prefix.want_each;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_put_open_context_request(const kvc_request *req, const kvci_out *out)
{
    if (req->u.open_context.n_digests > KVC_MAX_DIGESTS)
        return KVC_INVALID;
    Kvasir__V1__OpenContextRequest msg = KVASIR__V1__OPEN_CONTEXT_REQUEST__INIT;
    msg.schema = kvci_put_digest(&req->u.open_context.schema);
    msg.digests = kvci_put_digests(req->u.open_context.digests, req->u.open_context.n_digests);
    msg.ttl_ms = req->u.open_context.ttl_ms;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_put_extend_context_request(const kvc_request *req, const kvci_out *out)
{
    if (req->u.extend_context.n_digests > KVC_MAX_DIGESTS)
        return KVC_INVALID;
    Kvasir__V1__ExtendContextRequest msg = KVASIR__V1__EXTEND_CONTEXT_REQUEST__INIT;
    msg.context = req->u.extend_context.context;
    msg.n_blocks_before = req->u.extend_context.n_blocks_before;
    msg.digests = kvci_put_digests(req->u.extend_context.digests, req->u.extend_context.n_digests);
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_put_close_context_request(const kvc_request *req, const kvci_out *out)
{
    Kvasir__V1__CloseContextRequest msg = KVASIR__V1__CLOSE_CONTEXT_REQUEST__INIT;
    msg.context = req->u.close_context.context;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_put_groups(const kvc_request *req, kvc_arena *arena, Kvasir__V1__RowGroup ***list_p)
{
    uint32_t n = req->u.fetch_rows.n_groups;
    if (n > KVC_MAX_GROUPS)
        return KVC_INVALID;
    Kvasir__V1__RowGroup *groups = kvc_arena_alloc(arena, n * sizeof(*groups));
    Kvasir__V1__RowGroup **list = kvc_arena_alloc(arena, n * sizeof(*list));
    if (groups == NULL || list == NULL)
        return KVC_NO_MEMORY;
    uint64_t n_picks = 0;
    for (uint32_t i = 0; i < n; i++) {
        const kvc_row_group *group = &req->u.fetch_rows.groups[i];
        groups[i] = (Kvasir__V1__RowGroup)KVASIR__V1__ROW_GROUP__INIT;
        groups[i].context = group->context;
        groups[i].part = group->part;
        groups[i].n_picks = group->n_picks;
        groups[i].picks = (uint32_t *)(uintptr_t)group->picks;
        list[i] = &groups[i];
        n_picks += group->n_picks;
    }
    *list_p = list;
    return n_picks > KVC_MAX_PICKS ? KVC_INVALID : KVC_OK;
}

kvc_status kvci_put_fetch_rows_request(const kvc_request *req, const kvci_out *out)
{
    Kvasir__V1__FetchRowsRequest msg = KVASIR__V1__FETCH_ROWS_REQUEST__INIT;
    kvc_status status = kvci_put_groups(req, out->arena, &msg.groups);
    if (status != KVC_OK)
        return status;
    msg.n_groups = req->u.fetch_rows.n_groups;
    return kvci_put(out, &msg.base, 0);
}

static kvc_status put_empty(const kvc_request *req, const kvci_out *out)
{
    ProtobufCMessage msg;
    protobuf_c_message_init(kvci_request_type(req->method), &msg);
    return kvci_put(out, &msg, 0);
}

kvc_status kvci_put_describe_request(const kvc_request *req, const kvci_out *out)
{
    return put_empty(req, out);
}

kvc_status kvci_put_stats_request(const kvc_request *req, const kvci_out *out)
{
    return put_empty(req, out);
}

kvc_status kvc_wire_encode_request(const kvc_request *req, kvc_arena *arena, const void **head_p,
                                   size_t *head_bytes_p)
{
    typedef kvc_status put_fn(const kvc_request *, const kvci_out *);
    static put_fn *const table[KVC_METHOD_COUNT] = {
#define KVC_METHOD(upper, lower, name, flags) kvci_put_##lower##_request,
#include "wire/methods.def"
#undef KVC_METHOD
    };
    kvci_out out = {arena, head_p, head_bytes_p};
    *head_p = NULL;
    *head_bytes_p = 0;
    if ((int)req->method < 0 || req->method >= KVC_METHOD_COUNT)
        return KVC_INVALID;
    if (req->data_bytes != 0 && !(kvc_method_flags(req->method) & KVC_METHOD_BULK_REQUEST))
        return KVC_INVALID;
    return table[req->method](req, &out);
}
