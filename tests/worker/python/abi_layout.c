/*
 * abi_layout.c: prints the layout of every struct that the Python binding mirrors, one field a
 * line: "struct field offset size", and "struct - 0 sizeof". The compiler is the judge; a field
 * added to a header without the binding makes the test fail.
 */
#include <stddef.h>
#include <stdio.h>

#include "kvc/client.h"
#include "kvk/compute.h"
#include "kvw/worker.h"

#define STRUCT(type) printf("%s - 0 %zu\n", #type, sizeof(type))
#define FIELD(type, field)                                                                         \
    printf("%s %s %zu %zu\n", #type, #field, offsetof(type, field), sizeof(((type *)0)->field))

/* The formatter does not settle on lists of macro calls. */
/* clang-format off */
#define DIGEST(X, t) \
    X(t, bytes)
#define ROPE(X, t) \
    X(t, type) X(t, theta) X(t, factor) X(t, low_freq_factor) X(t, high_freq_factor) \
    X(t, original_max_position)
#define OPTS(X, t) \
    X(t, size_bytes) X(t, model) X(t, revision) X(t, n_layers) X(t, n_q_heads) \
    X(t, n_kv_heads) X(t, head_dim) X(t, dtype) X(t, rope) X(t, attention_scale) X(t, tp_size) \
    X(t, tp_rank) X(t, client) X(t, block_tokens) X(t, promise) X(t, fetch_timeout_ns) \
    X(t, policy) X(t, backend) X(t, n_threads) X(t, selector) X(t, index) \
    X(t, projection_path) X(t, n_sink) X(t, n_recent) X(t, k) X(t, eps) X(t, chunk_tokens) \
    X(t, far_position) X(t, reselect_cos) X(t, all_reduce) X(t, all_reduce_arg) \
    X(t, residency_slots) X(t, exact) X(t, index_dims) X(t, rerank_dims) X(t, rerank_factor) \
    X(t, put_window) X(t, put_timeout_ns) X(t, reuse_any) X(t, way) X(t, landmark_dim) \
    X(t, clients) X(t, server_names) X(t, n_clients) X(t, max_tokens) X(t, device_memory) \
    X(t, retrieval_queries) X(t, row_dtype)
#define SEQ_OPTS(X, t) \
    X(t, size_bytes) X(t, tokens) X(t, n_tokens) X(t, adapter) X(t, salt) X(t, stream)
#define STATS(X, t) \
    X(t, size_bytes) X(t, tokens) X(t, tokens_reused) X(t, steps) X(t, reselects) X(t, picks) \
    X(t, hits) X(t, misses) X(t, rows_gpu) X(t, rows_dram) X(t, rows_lmdb) X(t, rows_dropped) \
    X(t, bytes_fetched) X(t, bytes_put) X(t, requests) X(t, blocks_put) X(t, blocks_existed) \
    X(t, index_rows_rebuilt) X(t, bytes_index) X(t, bytes_residency) X(t, bytes_window) \
    X(t, ns_select) X(t, ns_fetch_wait) X(t, ns_attend) X(t, ns_append) X(t, full_steps) \
    X(t, put_retries) X(t, ns_put_wait) X(t, rows_near) X(t, way_fallbacks) X(t, steps_device) \
    X(t, host_syncs) X(t, bytes_device) X(t, bytes_near) X(t, rows_ahead)
#define SERVER_STATS(X, t) \
    X(t, size_bytes) X(t, name) X(t, blocks) X(t, rows) X(t, bytes) X(t, requests) \
    X(t, rows_near) X(t, rows_missing) X(t, lost)
#define CLIENT_OPTS(X, t) \
    X(t, size_bytes) X(t, uris) X(t, connect_timeout_ns) X(t, default_timeout_ns) \
    X(t, n_channels) X(t, sums) X(t, region_bytes)
#define LIMITS(X, t) \
    X(t, max_value_bytes) X(t, max_message_bytes) X(t, max_batch_values) X(t, max_digests) \
    X(t, max_context_blocks) X(t, max_picks) X(t, max_groups) X(t, max_contexts) \
    X(t, max_ttl_ms) X(t, max_attend_queries) X(t, max_attend_calls) X(t, max_pieces) \
    X(t, max_open_blocks) X(t, max_holds) X(t, max_schemas) X(t, max_hold_bytes) \
    X(t, max_map_pin_bytes) X(t, max_mapped_bytes) X(t, max_saved_tenant_bytes) \
    X(t, max_inflight_bytes) X(t, max_put_window_bytes) X(t, max_put_window_values) \
    X(t, max_saved) X(t, max_calls) X(t, max_connections)
#define TIER(X, t) \
    X(t, name) X(t, capacity_bytes) X(t, used_bytes) X(t, values) X(t, rows_read) \
    X(t, bytes_read) X(t, bytes_written) X(t, evictions)
#define COUNT(X, t) \
    X(t, name) X(t, value)
#define SERVER(X, t) \
    X(t, size_bytes) X(t, version) X(t, boot_id) X(t, uptime_ms) X(t, limits) X(t, n_tiers) \
    X(t, n_counters) X(t, n_schemas) X(t, tiers) X(t, counters) X(t, schemas) X(t, opaque)
/* clang-format on */

#define PRINT(t, f) FIELD(t, f);

int main(void)
{
    STRUCT(kvc_digest);
    DIGEST(PRINT, kvc_digest)
    STRUCT(kvk_rope_params);
    ROPE(PRINT, kvk_rope_params)
    STRUCT(kvw_opts);
    OPTS(PRINT, kvw_opts)
    STRUCT(kvw_seq_opts);
    SEQ_OPTS(PRINT, kvw_seq_opts)
    STRUCT(kvw_stats);
    STATS(PRINT, kvw_stats)
    STRUCT(kvw_server_stats);
    SERVER_STATS(PRINT, kvw_server_stats)
    STRUCT(kvc_client_opts);
    CLIENT_OPTS(PRINT, kvc_client_opts)
    STRUCT(kvc_limits);
    LIMITS(PRINT, kvc_limits)
    STRUCT(kvc_tier_stats);
    TIER(PRINT, kvc_tier_stats)
    STRUCT(kvc_named_count);
    COUNT(PRINT, kvc_named_count)
    STRUCT(kvc_server_stats);
    SERVER(PRINT, kvc_server_stats)
    return 0;
}
