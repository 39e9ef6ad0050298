/*
 * options.c: checks kvw_opts and fills in the defaults. Runs once, inside kvw_open.
 *
 * Every rule names its option in the text, so that a caller can mend the call without the source.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* What the struct held before the first field was added at its end. */
#define FIRST_SIZE_BYTES offsetof(kvw_opts, index_dims)

#define DEFAULT_SINK      128u
#define DEFAULT_K         2048u
#define DEFAULT_K_CHUNKS  8u
#define MAX_LANDMARK_DIM  65536u
#define DEFAULT_CHUNK     512u
#define DEFAULT_BLOCK     256u
#define DEFAULT_FACTOR    4u
#define DEFAULT_WINDOW    4u
#define DEFAULT_FETCH_NS  10000000000ull
#define DEFAULT_PUT_NS    60000000000ull
#define MAX_WINDOW_TOKENS (1u << 24)
#define MAX_CHUNK         (1u << 16)
#define MAX_EPS           4096u
#define MAX_TP            32u
#define MAX_HEADS         1024u
#define MAX_HEAD_DIM      1024u
#define MAX_PUT_WINDOW    4096u
#define MAX_QUERIES       (1ull << 32) /* of one retrieval */

static kvc_status bad(const char *option, const char *rule)
{
    return kvwi_fail(KVC_INVALID, "%s: %s", option, rule);
}

static void default_u32(uint32_t *value, uint32_t otherwise)
{
    if (*value == 0) {
        *value = otherwise;
    }
}

static kvc_status own_string(const char **text_p, const char *option, size_t max_bytes)
{
    const char *text = *text_p == NULL ? "" : *text_p;
    *text_p = NULL;
    if (strnlen(text, max_bytes + 1) > max_bytes) {
        return bad(option, "is too long");
    }
    *text_p = strdup(text);
    return *text_p == NULL ? kvwi_fail(KVC_NO_MEMORY, "out of memory") : KVC_OK;
}

/* Strings first: from here on kvwi_options_fini frees them. */
static kvc_status own_strings(kvw_opts *o)
{
    const char **const strings[] = {&o->model,    &o->revision,        &o->backend,
                                    &o->selector, &o->projection_path, &o->way};
    static const char *const names[] = {"model",    "revision",        "backend",
                                        "selector", "projection_path", "way"};
    const char *given[6];
    kvc_status st = KVC_OK;
    for (size_t i = 0; i < 6; i++) {
        given[i] = *strings[i];
        *strings[i] = NULL;
    }
    for (size_t i = 0; i < 6 && st == KVC_OK; i++) {
        *strings[i] = given[i];
        st = own_string(strings[i], names[i], i < 2 ? KVC_MAX_NAME_BYTES : 4000u);
    }
    return st;
}

static kvc_status check_model(const kvw_opts *o)
{
    if (o->model[0] == '\0') {
        return bad("model", "is missing");
    }
    if (o->n_layers == 0 || o->n_layers > KVWI_MAX_LAYERS) {
        return bad("n_layers", "must be 1 to 1000");
    }
    if (o->n_kv_heads == 0 || o->n_kv_heads > MAX_HEADS) {
        return bad("n_kv_heads", "must be 1 to 1024");
    }
    if (o->n_q_heads == 0 || o->n_q_heads > MAX_HEADS || o->n_q_heads % o->n_kv_heads != 0) {
        return bad("n_q_heads", "must be a multiple of n_kv_heads, at most 1024");
    }
    if (o->head_dim == 0 || o->head_dim > MAX_HEAD_DIM || o->head_dim % 2 != 0) {
        return bad("head_dim", "must be even, 2 to 1024");
    }
    if (o->dtype != KVK_F32 && o->dtype != KVK_F16 && o->dtype != KVK_BF16) {
        return bad("dtype", "must be f32, f16 or bf16");
    }
    if (o->row_dtype != 0 && o->row_dtype != KVK_I8_SCALED && o->row_dtype != KVK_E4M3_SCALED) {
        return bad("row_dtype", "must be 0, KVK_I8_SCALED or KVK_E4M3_SCALED");
    }
    if (!isfinite(o->attention_scale) || o->attention_scale < 0) {
        return bad("attention_scale", "must be finite and not negative");
    }
    return KVC_OK;
}

static kvc_status check_tp(kvw_opts *o)
{
    default_u32(&o->tp_size, 1);
    if (o->tp_size > MAX_TP || o->tp_rank >= o->tp_size) {
        return bad("tp_rank", "must be below tp_size, which is at most 32");
    }
    if (o->tp_size > 1 && o->all_reduce == NULL) {
        return bad("all_reduce", "is needed where tp_size is above 1");
    }
    if (o->tp_size * o->n_layers * 2u > KVC_MAX_PARTS) {
        return bad("tp_size", "makes more parts than a schema may have");
    }
    return KVC_OK;
}

static kvc_status check_store(kvw_opts *o, size_t row_bytes, uint32_t max_value)
{
    if (o->block_tokens == 0) {
        o->block_tokens = DEFAULT_BLOCK;
        while (o->block_tokens > KVC_BLOCK_TOKENS_MIN && o->block_tokens * row_bytes > max_value) {
            o->block_tokens /= 2;
        }
    }
    if (o->block_tokens < KVC_BLOCK_TOKENS_MIN || o->block_tokens > KVC_BLOCK_TOKENS_MAX ||
        o->block_tokens % 16 != 0) {
        return bad("block_tokens", "must be a multiple of 16, 64 to 1024");
    }
    if (o->promise == 0) {
        o->promise = KVC_PROMISE_MEMORY;
    }
    if (o->promise != KVC_PROMISE_MEMORY && o->promise != KVC_PROMISE_DURABLE) {
        return bad("promise", "must be MEMORY or DURABLE");
    }
    if (o->policy == 0) {
        o->policy = KVW_FAIL;
    }
    if (o->policy != KVW_FAIL && o->policy != KVW_DROP) {
        return bad("policy", "must be FAIL or DROP");
    }
    if (o->policy == KVW_DROP && o->tp_size > 1) {
        return bad("policy", "must be FAIL where tp_size is above 1: ranks would drop other rows");
    }
    o->fetch_timeout_ns = o->fetch_timeout_ns == 0 ? DEFAULT_FETCH_NS : o->fetch_timeout_ns;
    o->put_timeout_ns = o->put_timeout_ns == 0 ? DEFAULT_PUT_NS : o->put_timeout_ns;
    default_u32(&o->put_window, DEFAULT_WINDOW);
    return o->put_window > MAX_PUT_WINDOW ? bad("put_window", "must be at most 4096") : KVC_OK;
}

static kvc_status check_windows(kvw_opts *o, const kvw_selector_ops *selector)
{
    default_u32(&o->n_sink, DEFAULT_SINK);
    default_u32(&o->n_recent, selector->default_recent);
    default_u32(&o->k, selector->fusion != 0 ? DEFAULT_K_CHUNKS : DEFAULT_K);
    default_u32(&o->chunk_tokens, DEFAULT_CHUNK);
    default_u32(&o->far_position, o->n_recent);
    if (o->n_sink > MAX_WINDOW_TOKENS || o->n_recent > MAX_WINDOW_TOKENS ||
        o->k > MAX_WINDOW_TOKENS || o->far_position > MAX_WINDOW_TOKENS) {
        return bad("n_sink, n_recent, k, far_position", "must be at most 2^24");
    }
    if (o->chunk_tokens > MAX_CHUNK ||
        (o->chunk_tokens % o->block_tokens != 0 && o->block_tokens % o->chunk_tokens != 0)) {
        return bad("chunk_tokens", "block_tokens must divide it or be a multiple; at most 65536");
    }
    if (o->eps > MAX_EPS) {
        return bad("eps", "must be at most 4096");
    }
    if (!(o->reselect_cos >= -1.0 && o->reselect_cos <= 1.0)) {
        return bad("reselect_cos", "must be -1 to 1");
    }
    if (o->reselect_cos != 0 && !selector->reuses) {
        return bad("reselect_cos", "this selector has no Selection Cache");
    }
    if (o->reselect_cos != 0 && o->chunk_tokens == 1) {
        /* prefill would fill the cache, and a reused prefix begins without one */
        return bad("reselect_cos", "needs a chunk_tokens above 1");
    }
    default_u32(&o->residency_slots, 2u * o->k);
    if (o->residency_slots < o->k || o->residency_slots > 2u * MAX_WINDOW_TOKENS) {
        return bad("residency_slots", "must be at least k, since a step may fetch k rows");
    }
    if (o->exact > 1 || o->reuse_any > 1) {
        return bad("exact, reuse_any", "must be 0 or 1");
    }
    if (o->device_memory > 1 || o->max_tokens > KVWI_MAX_TOKENS) {
        return bad("device_memory, max_tokens", "must be 0 or 1; at most 2^30");
    }
    return KVC_OK;
}

/* Of selectors of whole chunks. */
static kvc_status check_chunks(const kvw_opts *o, const kvw_selector_ops *selector)
{
    if (selector->fusion == 0) {
        return o->landmark_dim == 0 ? KVC_OK : bad("landmark_dim", "this selector has none");
    }
    if (o->landmark_dim == 0 || o->landmark_dim > MAX_LANDMARK_DIM || o->landmark_dim % 16 != 0) {
        return bad("landmark_dim", "must be a multiple of 16, at most 65536");
    }
    if (o->k > KVK_CHUNKS_MAX) {
        return bad("k", "must be at most 1024 chunks");
    }
    if (o->block_tokens % KVW_CHUNK_TOKENS != 0 || o->chunk_tokens % KVW_CHUNK_TOKENS != 0) {
        return bad("block_tokens, chunk_tokens", "must be whole chunks of 64 tokens");
    }
    if (o->rope.theta != 0 || o->eps != 0) {
        return bad("rope, eps", "have no meaning where chunks are retrieved");
    }
    if (o->retrieval_queries > MAX_QUERIES) {
        return bad("retrieval_queries", "must be at most 2^32");
    }
    if (o->policy != KVW_FAIL) {
        return bad("policy", "must be FAIL where chunks are retrieved");
    }
    return o->index == KVW_INDEX_EXACT ? KVC_OK : bad("index", "must be EXACT: landmarks are");
}

static kvc_status check_index(kvw_opts *o, kvw_index_kind default_index)
{
    if (o->index == 0) {
        o->index = default_index;
    }
    if (o->index < KVW_INDEX_EXACT || o->index > KVW_INDEX_RERANKED) {
        return bad("index", "must be EXACT, COMPRESSED or RERANKED");
    }
    bool exact = o->index == KVW_INDEX_EXACT;
    if (!exact && o->projection_path[0] == '\0') {
        return bad("projection_path", "is needed unless index is EXACT");
    }
    if (exact && (o->index_dims != 0 || o->projection_path[0] != '\0')) {
        return bad("projection_path, index_dims", "have no meaning where index is EXACT");
    }
    if (o->index != KVW_INDEX_RERANKED && (o->rerank_dims != 0 || o->rerank_factor != 0)) {
        return bad("rerank_dims, rerank_factor", "have a meaning only where index is RERANKED");
    }
    if (o->index == KVW_INDEX_RERANKED) {
        default_u32(&o->rerank_factor, DEFAULT_FACTOR);
    }
    if (o->rerank_factor > 1024) {
        return bad("rerank_factor", "must be at most 1024");
    }
    return KVC_OK;
}

/* KVC_WAY_COUNT stands for auto. */
static kvc_status check_way(kvw_worker *w)
{
    const char *way = w->opts.way;
    w->way = KVC_WAY_COUNT;
    if (way[0] == '\0' || strcmp(way, "auto") == 0) {
        return KVC_OK;
    }
    for (int i = 0; i < KVC_WAY_COUNT; i++) {
        if (strcmp(way, kvc_way_name((kvc_way)i)) == 0) {
            w->way = (kvc_way)i;
            return KVC_OK;
        }
    }
    return bad("way", "must be auto, rows, near, shm or rdma");
}

static kvc_status derive(kvw_worker *w)
{
    const kvw_opts *o = &w->opts;
    w->elem_bytes = kvk_dtype_bytes(o->dtype);
    w->in_bytes = (size_t)o->n_kv_heads * o->head_dim * w->elem_bytes;
    w->row_dtype = o->row_dtype == 0 ? o->dtype : (kvk_dtype)o->row_dtype;
    w->k_bytes = kvk_slice_bytes(w->row_dtype, o->n_kv_heads, o->head_dim);
    w->row_bytes = 2u * w->k_bytes;
    w->scale =
        o->attention_scale != 0 ? o->attention_scale : (float)(1.0 / sqrt((double)o->head_dim));
    if (o->rope.theta == 0) {
        return KVC_OK; /* no rotary embedding */
    }
    w->inv_freq = calloc(o->head_dim / 2u, sizeof(double));
    if (w->inv_freq == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    kvc_status st = kvk_rope_inv_freq(&o->rope, o->head_dim, w->inv_freq);
    return st == KVC_OK ? KVC_OK : bad("rope", "type, theta or factors are out of range");
}

kvc_status kvwi_options_fill(kvw_worker *worker, const kvw_opts *opts)
{
    kvw_opts *o = &worker->opts;
    if (!kvwi_size_fits(opts->size_bytes, FIRST_SIZE_BYTES, sizeof(*opts))) {
        return bad("size_bytes", "is not that of this library's kvw_opts");
    }
    memcpy(o, opts, opts->size_bytes);
    o->size_bytes = sizeof(*o);
    kvc_status st = own_strings(o);
    if (st == KVC_OK) {
        st = check_model(o);
    }
    if (st != KVC_OK) {
        return st;
    }
    worker->selector = kvw_selector_find(o->selector);
    if (worker->selector == NULL) {
        return kvwi_fail(KVC_INVALID, "selector: there is none called \"%s\"", o->selector);
    }
    if ((st = derive(worker)) != KVC_OK || (st = check_tp(o)) != KVC_OK ||
        (st = kvwi_servers_open(worker)) != KVC_OK ||
        (st = check_store(o, worker->row_bytes, kvwi_servers_max_value(worker))) != KVC_OK ||
        (st = check_windows(o, worker->selector)) != KVC_OK || (st = check_way(worker)) != KVC_OK) {
        return st;
    }
    st = check_index(o, worker->selector->default_index);
    if (st == KVC_OK && o->row_dtype != 0 &&
        (o->index == KVW_INDEX_EXACT || worker->selector->fusion != 0)) {
        st = bad("row_dtype", "needs a compressed index, and no selector of chunks");
    }
    return st == KVC_OK ? check_chunks(o, worker->selector) : st;
}

void kvwi_options_fini(kvw_worker *worker)
{
    kvw_opts *o = &worker->opts;
    kvwi_servers_close(worker);
    free((void *)(uintptr_t)o->model);
    free((void *)(uintptr_t)o->revision);
    free((void *)(uintptr_t)o->backend);
    free((void *)(uintptr_t)o->selector);
    free((void *)(uintptr_t)o->projection_path);
    free((void *)(uintptr_t)o->way);
    free(worker->inv_freq);
}
