/*
 * samples_diff.c: deep comparison of plain messages, field by field.
 *
 * Pure. Gives the name of the first field that differs, for a test's message.
 */
#include <string.h>

#include "samples.h"

/* Returns the field's name from the function around it where a and b differ. */
#define SAME(field)                                                                                \
    if (a->field != b->field)                                                                      \
    return #field
#define SAME_BYTES(field, n)                                                                       \
    if ((n) > 0 && memcmp(a->field, b->field, (n)) != 0)                                           \
    return #field
#define SAME_TEXT(field)                                                                           \
    if (strcmp(a->field == NULL ? "" : a->field, b->field == NULL ? "" : b->field) != 0)           \
    return #field

static uint8_t byte_at(const struct iovec *data, uint32_t *piece, size_t *off)
{
    while (*off == data[*piece].iov_len) {
        (*piece)++;
        *off = 0;
    }
    return ((const uint8_t *)data[*piece].iov_base)[(*off)++];
}

static const char *data_diff(const struct iovec *a, const struct iovec *b, uint64_t n)
{
    uint32_t piece_a = 0, piece_b = 0;
    size_t off_a = 0, off_b = 0;
    for (uint64_t i = 0; i < n; i++) {
        if (byte_at(a, &piece_a, &off_a) != byte_at(b, &piece_b, &off_b))
            return "data";
    }
    return NULL;
}

static const char *part_diff(const kvc_part *a, const kvc_part *b)
{
    SAME(part);
    SAME(kind);
    SAME(dtype);
    SAME(layer);
    SAME(kv_head_first);
    SAME(kv_head_count);
    SAME(row_bytes);
    SAME(k_off_bytes);
    SAME(k_len_bytes);
    SAME(v_off_bytes);
    SAME(v_len_bytes);
    SAME(q_dim);
    SAME(v_dim);
    SAME(window);
    SAME(rope.type);
    SAME(rope.stored_rotated);
    SAME(rope.theta);
    SAME(rope.factor);
    SAME(rope.low_freq_factor);
    SAME(rope.high_freq_factor);
    SAME(rope.original_max_position);
    SAME(attention_scale);
    SAME(softcap);
    SAME(sinks);
    SAME_TEXT(codec);
    return NULL;
}

static const char *schema_diff(const kvc_schema *a, const kvc_schema *b)
{
    SAME_TEXT(model);
    SAME_TEXT(revision);
    SAME_TEXT(recipe);
    SAME(tp_size);
    SAME(block_tokens);
    SAME(opaque);
    SAME(n_parts);
    for (uint32_t i = 0; i < a->n_parts; i++) {
        const char *why = part_diff(&a->parts[i], &b->parts[i]);
        if (why != NULL)
            return why;
    }
    return NULL;
}

static const char *groups_diff(const kvc_row_group *a, const kvc_row_group *b, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++, a++, b++) {
        SAME(context);
        SAME(part);
        SAME(n_picks);
        SAME_BYTES(picks, a->n_picks * sizeof(uint32_t));
    }
    return NULL;
}

static const char *queries_diff(const kvc_request *ra, const kvc_request *rb)
{
    const kvc_attend_query *a = ra->u.fetch_rows.queries, *b = rb->u.fetch_rows.queries;
    for (uint32_t i = 0; i < ra->u.fetch_rows.n_groups; i++, a++, b++) {
        SAME(n_q);
        SAME(n_q_heads);
        SAME(q_dtype);
        SAME(o_dtype);
        SAME(same_q);
        if ((a->ranks == NULL) != (b->ranks == NULL))
            return "ranks";
        if (a->ranks != NULL)
            SAME_BYTES(ranks, ra->u.fetch_rows.groups[i].n_picks * sizeof(uint32_t));
        if ((a->q_positions == NULL) != (b->q_positions == NULL))
            return "q_positions";
        if (a->q_positions != NULL)
            SAME_BYTES(q_positions, a->n_q * sizeof(uint32_t));
    }
    return data_diff(ra->data, rb->data, ra->data_bytes);
}

static const char *values_diff(const kvc_put_value *a, const kvc_put_value *b, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++, a++, b++) {
        SAME_BYTES(digest.bytes, KVC_DIGEST_BYTES);
        SAME(part);
        SAME(len_bytes);
        SAME(whole.total_bytes);
        SAME(whole.sum);
    }
    return NULL;
}

static const char *offers_diff(const kvc_put_offer *a, const kvc_put_offer *b, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++, a++, b++) {
        SAME_BYTES(schema.bytes, KVC_DIGEST_BYTES);
        SAME_BYTES(digest.bytes, KVC_DIGEST_BYTES);
        SAME(part);
        SAME(len_bytes);
        SAME(promise);
        SAME(ttl_ms);
        SAME(whole.total_bytes);
        SAME(whole.sum);
    }
    return NULL;
}

static const char *answers_diff(const kvc_reply *a, const kvc_reply *b)
{
    SAME(u.put_stream.n_answers);
    for (uint32_t i = 0; i < a->u.put_stream.n_answers; i++) {
        SAME(u.put_stream.answers[i].value);
        SAME(u.put_stream.answers[i].send);
        SAME(u.put_stream.answers[i].status);
        SAME(u.put_stream.answers[i].retry_after_ms);
        SAME(u.put_stream.answers[i].ttl_ms);
    }
    return NULL;
}

static const char *context_diff(const kvc_request *a, const kvc_request *b)
{
    if (a->method == KVC_OPEN_CONTEXT) {
        SAME_BYTES(u.open_context.schema.bytes, KVC_DIGEST_BYTES);
        SAME(u.open_context.n_digests);
        SAME_BYTES(u.open_context.digests, a->u.open_context.n_digests * sizeof(kvc_digest));
        SAME(u.open_context.ttl_ms);
    } else if (a->method == KVC_EXTEND_CONTEXT) {
        SAME(u.extend_context.context);
        SAME(u.extend_context.n_blocks_before);
        SAME(u.extend_context.n_digests);
        SAME_BYTES(u.extend_context.digests, a->u.extend_context.n_digests * sizeof(kvc_digest));
    } else if (a->method == KVC_CLOSE_CONTEXT) {
        SAME(u.close_context.context);
    } else if (a->method == KVC_TRUNCATE_CONTEXT) {
        SAME(u.truncate_context.context);
        SAME(u.truncate_context.n_blocks);
    } else if (a->method == KVC_FORK_CONTEXT) {
        SAME(u.fork_context.context);
        SAME(u.fork_context.n_blocks);
        SAME(u.fork_context.ttl_ms);
    }
    return NULL;
}

static const char *keep_diff(const kvc_request *a, const kvc_request *b)
{
    if (a->method == KVC_ERASE) {
        SAME_BYTES(u.erase.schema.bytes, KVC_DIGEST_BYTES);
        SAME(u.erase.context);
        SAME(u.erase.n_digests);
        SAME(u.erase.n_parts);
        SAME_BYTES(u.erase.digests, a->u.erase.n_digests * sizeof(kvc_digest));
        SAME_BYTES(u.erase.parts, a->u.erase.n_parts * sizeof(uint32_t));
    } else if (a->method == KVC_HOLD) {
        SAME(u.hold.context);
        SAME(u.hold.hold);
        SAME(u.hold.ttl_ms);
        SAME(u.hold.n_digests);
        SAME_BYTES(u.hold.schema.bytes, KVC_DIGEST_BYTES);
        SAME_BYTES(u.hold.digests, a->u.hold.n_digests * sizeof(kvc_digest));
    } else if (a->method == KVC_RELEASE) {
        SAME(u.release.hold);
    } else if (a->method == KVC_PREFETCH) {
        SAME(u.prefetch.context);
        SAME(u.prefetch.n_parts);
        SAME_BYTES(u.prefetch.parts, a->u.prefetch.n_parts * sizeof(uint32_t));
        SAME(u.prefetch.first_block);
        SAME(u.prefetch.n_blocks);
        SAME(u.prefetch.tier);
        SAME(u.prefetch.n_digests);
        SAME_BYTES(u.prefetch.schema.bytes, KVC_DIGEST_BYTES);
        SAME_BYTES(u.prefetch.digests, a->u.prefetch.n_digests * sizeof(kvc_digest));
    }
    return NULL;
}

static const char *saved_diff(const kvc_saved_context *a, const kvc_saved_context *b)
{
    SAME_TEXT(name);
    SAME_BYTES(schema.bytes, KVC_DIGEST_BYTES);
    SAME(promise);
    SAME(n_blocks);
    SAME(n_ids);
    SAME(n_tail);
    SAME(n_tail_parts);
    SAME_BYTES(tail_parts, a->n_tail_parts * sizeof(uint32_t));
    SAME(piece_bytes);
    SAME(generation);
    SAME(upload);
    SAME(body_bytes);
    SAME(saved_unix_ms);
    return NULL;
}

static const char *saved_request_diff(const kvc_request *a, const kvc_request *b)
{
    if (a->method == KVC_PUT_CONTEXT) {
        SAME(u.put_context.upload);
        SAME(u.put_context.offset);
        SAME(u.put_context.if_generation);
        SAME(u.put_context.replace);
        const char *why = saved_diff(&a->u.put_context.context, &b->u.put_context.context);
        return why != NULL ? why : data_diff(a->data, b->data, a->data_bytes);
    }
    if (a->method == KVC_GET_CONTEXT) {
        SAME_TEXT(u.get_context.name);
        SAME(u.get_context.generation);
        SAME(u.get_context.offset);
    } else if (a->method == KVC_LIST_CONTEXTS) {
        SAME_TEXT(u.list_contexts.after);
        SAME(u.list_contexts.max);
    } else if (a->method == KVC_DELETE_CONTEXT) {
        SAME_TEXT(u.delete_context.name);
        SAME(u.delete_context.if_generation);
    } else {
        SAME_BYTES(u.get_schema.schema.bytes, KVC_DIGEST_BYTES);
    }
    return NULL;
}

static const char *map_request_diff(const kvc_request *a, const kvc_request *b)
{
    SAME(u.map_context.context);
    SAME(u.map_context.map);
    SAME(u.map_context.n_parts);
    SAME_BYTES(u.map_context.parts, a->u.map_context.n_parts * sizeof(uint32_t));
    SAME(u.map_context.first_block);
    SAME(u.map_context.n_blocks);
    SAME(u.map_context.release);
    SAME(u.map_context.gpu);
    SAME(u.map_context.n_unmapped);
    SAME_BYTES(u.map_context.unmapped, a->u.map_context.n_unmapped * sizeof(uint32_t));
    return NULL;
}

const char *sample_request_diff(const kvc_request *a, const kvc_request *b)
{
    SAME(method);
    SAME(data_bytes);
    switch (a->method) {
    case KVC_REGISTER_SCHEMA:
        return schema_diff(a->u.register_schema.schema, b->u.register_schema.schema);
    case KVC_PUT_BLOCKS:
        SAME_BYTES(u.put_blocks.schema.bytes, KVC_DIGEST_BYTES);
        SAME(u.put_blocks.promise);
        SAME(u.put_blocks.n_values);
        if (values_diff(a->u.put_blocks.values, b->u.put_blocks.values, a->u.put_blocks.n_values))
            return "values";
        return data_diff(a->data, b->data, a->data_bytes);
    case KVC_PUT_BLOCKS_STREAM:
        SAME(u.put_stream.n_offers);
        SAME(u.put_stream.value);
        if (offers_diff(a->u.put_stream.offers, b->u.put_stream.offers, a->u.put_stream.n_offers) !=
            NULL)
            return "offers";
        return data_diff(a->data, b->data, a->data_bytes);
    case KVC_MATCH_PREFIX:
        SAME_BYTES(u.match_prefix.schema.bytes, KVC_DIGEST_BYTES);
        SAME(u.match_prefix.n_digests);
        SAME(u.match_prefix.n_parts);
        SAME(u.match_prefix.want_tiers);
        SAME(u.match_prefix.want_each);
        SAME_BYTES(u.match_prefix.digests, a->u.match_prefix.n_digests * sizeof(kvc_digest));
        SAME_BYTES(u.match_prefix.parts, a->u.match_prefix.n_parts * sizeof(uint32_t));
        return NULL;
    case KVC_FETCH_BLOCKS:
        SAME_BYTES(u.fetch_blocks.schema.bytes, KVC_DIGEST_BYTES);
        SAME(u.fetch_blocks.n_digests);
        SAME(u.fetch_blocks.n_parts);
        SAME_BYTES(u.fetch_blocks.digests, a->u.fetch_blocks.n_digests * sizeof(kvc_digest));
        SAME_BYTES(u.fetch_blocks.parts, a->u.fetch_blocks.n_parts * sizeof(uint32_t));
        return NULL;
    case KVC_MAP_CONTEXT:
        return map_request_diff(a, b);
    case KVC_FETCH_ROWS_STREAM:
    case KVC_FETCH_ROWS:
        SAME(u.fetch_rows.n_groups);
        return groups_diff(a->u.fetch_rows.groups, b->u.fetch_rows.groups,
                           a->u.fetch_rows.n_groups);
    case KVC_ATTEND_ROWS:
        SAME(u.fetch_rows.n_groups);
        if (groups_diff(a->u.fetch_rows.groups, b->u.fetch_rows.groups, a->u.fetch_rows.n_groups) !=
            NULL)
            return "groups";
        return queries_diff(a, b);
    case KVC_ERASE:
    case KVC_HOLD:
    case KVC_RELEASE:
    case KVC_PREFETCH:
        return keep_diff(a, b);
    case KVC_PUT_CONTEXT:
    case KVC_GET_CONTEXT:
    case KVC_LIST_CONTEXTS:
    case KVC_DELETE_CONTEXT:
    case KVC_GET_SCHEMA:
        return saved_request_diff(a, b);
    default:
        return context_diff(a, b);
    }
}

static const char *tiers_diff(const kvc_tier_stats *a, const kvc_tier_stats *b, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++, a++, b++) {
        SAME_TEXT(name);
        SAME(capacity_bytes);
        SAME(used_bytes);
        SAME(values);
        SAME(rows_read);
        SAME(bytes_read);
        SAME(bytes_written);
        SAME(evictions);
    }
    return NULL;
}

static const char *describe_diff(const kvc_reply *a, const kvc_reply *b)
{
    SAME_TEXT(u.describe.version);
    SAME(u.describe.boot_id);
#define X(name) SAME(u.describe.limits.name);
#include "wire/limits.def"
#undef X
    SAME(u.describe.n_tiers);
    SAME(u.describe.n_schemas);
    SAME_BYTES(u.describe.schemas, a->u.describe.n_schemas * sizeof(kvc_digest));
    SAME_BYTES(u.describe.opaque, a->u.describe.n_schemas);
    return tiers_diff(a->u.describe.tiers, b->u.describe.tiers, a->u.describe.n_tiers);
}

static const char *counters_diff(const kvc_counter *a, const kvc_counter *b, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++, a++, b++) {
        SAME_TEXT(name);
        SAME(value);
    }
    return NULL;
}

static const char *stats_diff(const kvc_reply *a, const kvc_reply *b)
{
    SAME(u.stats.uptime_ms);
    SAME(u.stats.boot_id);
    SAME(u.stats.n_tiers);
    SAME(u.stats.n_counters);
    if (counters_diff(a->u.stats.counters, b->u.stats.counters, a->u.stats.n_counters) != NULL)
        return "counters";
    return tiers_diff(a->u.stats.tiers, b->u.stats.tiers, a->u.stats.n_tiers);
}

static const char *fetch_diff(const kvc_reply *a, const kvc_reply *b)
{
    SAME(u.fetch_rows.n_missing);
    SAME(u.fetch_rows.rows_gpu);
    SAME(u.fetch_rows.rows_dram);
    SAME(u.fetch_rows.rows_lmdb);
    SAME(u.fetch_rows.n_picks);
    for (uint32_t i = 0; i < a->u.fetch_rows.n_missing; i++) {
        SAME(u.fetch_rows.missing[i].index);
        SAME(u.fetch_rows.missing[i].status);
    }
    return data_diff(a->data, b->data, a->data_bytes);
}

static const char *map_diff(const kvc_reply *a, const kvc_reply *b)
{
    SAME(u.map_context.map);
    SAME(u.map_context.lease_bytes);
    SAME(u.map_context.lease_slot);
    SAME(u.map_context.n_blocks);
    SAME(u.map_context.pinned_bytes);
    SAME(u.map_context.max_bytes);
    SAME(u.map_context.unpinned);
    SAME(u.map_context.n_segments);
    for (uint32_t i = 0; i < a->u.map_context.n_segments; i++) {
        SAME(u.map_context.segments[i].id);
        SAME(u.map_context.segments[i].len_bytes);
        SAME(u.map_context.segments[i].gpu);
        SAME_BYTES(u.map_context.segments[i].handle.share, KVC_GPU_SHARE_BYTES);
        SAME_BYTES(u.map_context.segments[i].handle.device, KVC_GPU_DEVICE_BYTES);
    }
    return NULL;
}

static const char *blocks_diff(const kvc_reply *a, const kvc_reply *b)
{
    if (a->method == KVC_MAP_CONTEXT)
        return map_diff(a, b);
    SAME(u.fetch_blocks.n_values);
    for (uint32_t i = 0; i < a->u.fetch_blocks.n_values; i++) {
        SAME(u.fetch_blocks.values[i].block);
        SAME(u.fetch_blocks.values[i].part);
        SAME(u.fetch_blocks.values[i].status);
        SAME(u.fetch_blocks.values[i].tier);
        SAME(u.fetch_blocks.values[i].len_bytes);
        SAME(u.fetch_blocks.values[i].whole.total_bytes);
        SAME(u.fetch_blocks.values[i].whole.sum);
    }
    return data_diff(a->data, b->data, a->data_bytes);
}

static const char *saved_reply_diff(const kvc_reply *a, const kvc_reply *b)
{
    if (a->method == KVC_PUT_CONTEXT) {
        SAME(u.put_context.received);
        SAME(u.put_context.generation);
        SAME(u.put_context.promise);
        return NULL;
    }
    if (a->method == KVC_GET_CONTEXT) {
        const char *why = saved_diff(&a->u.get_context.context, &b->u.get_context.context);
        return why != NULL ? why : data_diff(a->data, b->data, a->data_bytes);
    }
    SAME(u.list_contexts.n_contexts);
    SAME(u.list_contexts.more);
    const char *why = NULL;
    for (uint32_t i = 0; why == NULL && i < a->u.list_contexts.n_contexts; i++)
        why = saved_diff(&a->u.list_contexts.contexts[i], &b->u.list_contexts.contexts[i]);
    return why;
}

const char *sample_reply_diff(const kvc_reply *a, const kvc_reply *b)
{
    SAME(method);
    SAME(data_bytes);
    switch (a->method) {
    case KVC_DESCRIBE:
        return describe_diff(a, b);
    case KVC_REGISTER_SCHEMA:
        SAME_BYTES(u.register_schema.digest.bytes, KVC_DIGEST_BYTES);
        return NULL;
    case KVC_PUT_BLOCKS:
        SAME(u.put_blocks.n_values);
        SAME_BYTES(u.put_blocks.status, a->u.put_blocks.n_values);
        return NULL;
    case KVC_MATCH_PREFIX:
        SAME(u.match_prefix.hits);
        SAME(u.match_prefix.n_tiers);
        SAME_BYTES(u.match_prefix.tiers, a->u.match_prefix.n_tiers);
        return NULL;
    case KVC_TRUNCATE_CONTEXT:
        SAME(u.truncate_context.n_tokens);
        return NULL;
    case KVC_ERASE:
        SAME(u.erase.values);
        SAME(u.erase.bytes);
        return NULL;
    case KVC_HOLD:
        SAME(u.hold.hold);
        SAME(u.hold.ttl_ms);
        SAME(u.hold.n_blocks);
        SAME(u.hold.tenant_bytes);
        SAME(u.hold.max_bytes);
        return NULL;
    case KVC_PREFETCH:
        SAME(u.prefetch.there);
        SAME(u.prefetch.moved);
        SAME(u.prefetch.missing);
        SAME(u.prefetch.left);
        SAME(u.prefetch.moved_bytes);
        return NULL;
    case KVC_FORK_CONTEXT:
        SAME(u.fork_context.context);
        SAME(u.fork_context.ttl_ms);
        SAME(u.fork_context.n_tokens);
        return NULL;
    case KVC_OPEN_CONTEXT:
        SAME(u.open_context.context);
        SAME(u.open_context.ttl_ms);
        SAME(u.open_context.n_tokens);
        return NULL;
    case KVC_EXTEND_CONTEXT:
        SAME(u.extend_context.n_tokens);
        return NULL;
    case KVC_FETCH_ROWS_STREAM:
    case KVC_FETCH_ROWS:
        return fetch_diff(a, b);
    case KVC_FETCH_BLOCKS:
    case KVC_MAP_CONTEXT:
        return blocks_diff(a, b);
    case KVC_STATS:
        return stats_diff(a, b);
    case KVC_PUT_CONTEXT:
    case KVC_GET_CONTEXT:
    case KVC_LIST_CONTEXTS:
        return saved_reply_diff(a, b);
    case KVC_GET_SCHEMA:
        return schema_diff(a->u.get_schema.schema, b->u.get_schema.schema);
    default:
        return a->method == KVC_PUT_BLOCKS_STREAM ? answers_diff(a, b) : NULL;
    }
}
