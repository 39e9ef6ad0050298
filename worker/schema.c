/*
 * schema.c: what this worker's values mean: recipe, table of parts, digest. Runs inside kvw_open.
 *
 * The table names the parts of every rank, so that all ranks have one schema and share digests.
 * KV above layer 0 depends on how attention was computed, so every setting that can change a bit of
 * it is in the recipe. ESA's index is the same on every rank and is stored once.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/digest.h"
#include "base/log.h"
#include "internal.h"

static const char *const index_names[] = {"", "exact", "compressed", "reranked"};

static bool index_is_shared(const kvw_worker *w)
{
    return w->selector->form == KVWI_SHARED;
}

static void projection_hex(const kvw_worker *w, char out[KVC_DIGEST_HEX_BYTES])
{
    (void)snprintf(out, KVC_DIGEST_HEX_BYTES, "none");
    if (w->projection != NULL) {
        kvc_digest_hex(&w->projection->digest, out);
    }
}

static void write_recipe(const kvw_worker *w, char *text, size_t cap)
{
    const kvw_opts *o = &w->opts;
    char hex[KVC_DIGEST_HEX_BYTES];
    bool device = w->device != NULL; /* which one of several alike does not matter */
    projection_hex(w, hex);
    (void)snprintf(text, cap,
                   "selector=%s;index=%s;projection=%s;index_dims=%u;rerank_dims=%u;"
                   "rerank_factor=%u;n_sink=%u;n_recent=%u;k=%u;eps=%u;far_position=%u;"
                   "reselect_cos=%.17g;chunk_tokens=%u;exact=%u;passes=%s;backend=%s;isa=%s%s%s",
                   o->selector, index_names[o->index], hex, o->index_dims, o->rerank_dims,
                   o->rerank_factor, o->n_sink, o->n_recent, o->k, o->eps,
                   w->selector->positions == KVW_FAR_NEAR ? o->far_position : 0, o->reselect_cos,
                   o->chunk_tokens, o->exact, o->reuse_any ? "any" : "chunks",
                   device                  ? w->device_ops->name
                   : o->backend[0] != '\0' ? o->backend
                                           : "cpu",
                   kvk_backend_isa(w->be), device ? "+" : "",
                   device ? w->device_ops->isa(w->device) : "");
    if (w->selector->fusion != 0) {
        size_t n = strlen(text);
        (void)snprintf(text + n, cap - n, ";landmark_dim=%u", (unsigned)o->landmark_dim);
    }
}

static void write_codec(const kvw_worker *w, char *text, size_t cap)
{
    char hex[KVC_DIGEST_HEX_BYTES];
    if (w->selector->fusion != 0) {
        (void)snprintf(text, cap, "%s;f32;landmark_dim=%u;chunk=%u", w->opts.selector,
                       w->level[0].dims, KVW_CHUNK_TOKENS);
        return;
    }
    projection_hex(w, hex);
    (void)snprintf(text, cap, "%s;int8;dims=%u", w->opts.selector, w->level[0].dims);
    for (uint32_t i = 1; i < w->n_levels; i++) {
        size_t n = strlen(text);
        (void)snprintf(text + n, cap - n, "+%u", w->level[i].dims);
    }
    size_t n = strlen(text);
    (void)snprintf(text + n, cap - n, ";projection=%s", hex);
}

static kvc_rope part_rope(const kvw_worker *w)
{
    const kvk_rope_params *r = &w->opts.rope;
    kvc_rope rope = {.type = KVC_ROPE_NONE};
    if (w->inv_freq != NULL) {
        rope.type = r->type == 0 ? KVC_ROPE_PLAIN : KVC_ROPE_LLAMA3;
        rope.theta = r->theta;
    }
    if (rope.type == KVC_ROPE_LLAMA3) {
        rope.factor = r->factor;
        rope.low_freq_factor = r->low_freq_factor;
        rope.high_freq_factor = r->high_freq_factor;
        rope.original_max_position = r->original_max_position;
    }
    return rope;
}

static kvc_part kv_part(const kvw_worker *w, uint32_t rank, uint32_t layer)
{
    const kvw_opts *o = &w->opts;
    return (kvc_part){
        .part = rank * KVWI_PART_RANK_STRIDE + layer,
        .kind = KVC_PART_KV,
        .dtype = w->row_dtype == KVK_I8_SCALED     ? KVC_DTYPE_I8
                 : w->row_dtype == KVK_E4M3_SCALED ? KVC_DTYPE_E4M3
                                                   : kvwi_wire_dtype(o->dtype),
        .layer = layer,
        .kv_head_first = rank * o->n_kv_heads,
        .kv_head_count = o->n_kv_heads,
        .row_bytes = (uint32_t)w->row_bytes,
        .k_len_bytes = (uint32_t)w->k_bytes,
        .v_off_bytes = (uint32_t)w->k_bytes,
        .v_len_bytes = (uint32_t)w->k_bytes,
        .q_dim = o->head_dim,
        .v_dim = o->head_dim,
        .rope = part_rope(w),
        .attention_scale = (double)w->scale,
        .codec = kvk_is_coded(w->row_dtype) ? KVC_CODEC_HEAD_SCALES : NULL,
    };
}

static kvc_part index_part(const kvw_worker *w, uint32_t rank, uint32_t layer, const char *codec)
{
    const kvw_opts *o = &w->opts;
    bool shared = index_is_shared(w);
    return (kvc_part){
        .part = rank * KVWI_PART_RANK_STRIDE + KVWI_PART_INDEX + layer,
        .kind = KVC_PART_INDEX,
        .dtype = KVC_DTYPE_I8,
        .layer = layer,
        .kv_head_first = shared ? 0 : rank * o->n_kv_heads,
        .kv_head_count = shared ? o->n_kv_heads * o->tp_size : o->n_kv_heads,
        .row_bytes = (uint32_t)w->index_row_bytes,
        .rope = {.type = KVC_ROPE_NONE},
        .codec = codec,
    };
}

/* parts has room; returns how many. */
static uint32_t list_parts(const kvw_worker *w, kvc_part *parts, const char *codec)
{
    const kvw_opts *o = &w->opts;
    uint32_t n = 0;
    for (uint32_t rank = 0; rank < o->tp_size; rank++) {
        for (uint32_t layer = 0; layer < o->n_layers; layer++) {
            parts[n++] = kv_part(w, rank, layer);
        }
        bool indexed = w->index_row_bytes != 0 && (rank == 0 || !index_is_shared(w));
        for (uint32_t layer = 0; indexed && layer < o->n_layers; layer++) {
            parts[n++] = index_part(w, rank, layer, codec);
        }
    }
    return n;
}

static kvc_status list_own_parts(kvw_worker *w)
{
    const kvw_opts *o = &w->opts;
    w->kv_parts = calloc(o->n_layers, sizeof(uint32_t));
    w->index_parts = calloc(o->n_layers, sizeof(uint32_t));
    w->group_parts = calloc((size_t)o->tp_size * o->n_layers, sizeof(uint32_t));
    if (w->kv_parts == NULL || w->index_parts == NULL || w->group_parts == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    uint32_t index_rank = index_is_shared(w) ? 0 : o->tp_rank;
    for (uint32_t layer = 0; layer < o->n_layers; layer++) {
        w->kv_parts[layer] = o->tp_rank * KVWI_PART_RANK_STRIDE + layer;
        w->index_parts[layer] = index_rank * KVWI_PART_RANK_STRIDE + KVWI_PART_INDEX + layer;
        for (uint32_t rank = 0; rank < o->tp_size; rank++) {
            w->group_parts[rank * o->n_layers + layer] = rank * KVWI_PART_RANK_STRIDE + layer;
        }
    }
    return KVC_OK;
}

static kvc_status register_schema(const kvw_worker *w, uint32_t server, const kvc_schema *schema)
{
    char text[KVWI_SERVER_TEXT];
    kvc_digest named;
    kvc_status st = kvc_schema_register(w->servers.all[server].client, schema, 0, &named);
    if (st != KVC_OK) {
        return kvwi_fail(st, "schema: the store did not take it%s: %s",
                         kvwi_server_text(w, server, text), kvc_last_error());
    }
    if (!kvc_digest_equal(&named, &w->schema)) {
        return kvwi_fail(KVC_PROTOCOL, "schema: the store gave it another digest%s",
                         kvwi_server_text(w, server, text));
    }
    return KVC_OK;
}

static kvc_status name_schema(kvw_worker *w, const kvc_schema *schema)
{
    const char *why = NULL;
    if (kvc_schema_check(schema, kvwi_servers_max_value(w), &why) != KVC_OK) {
        return kvwi_fail(KVC_INVALID, "schema: %s", why);
    }
    kvc_status st = kvc_schema_digest(schema, &w->schema);
    if (st != KVC_OK) {
        return kvwi_fail(st, "schema: its digest could not be computed");
    }
    for (uint32_t i = 0; st == KVC_OK && i < w->servers.n; i++) {
        st = register_schema(w, i, schema);
    }
    return st;
}

/* What the ways of a server cost, where there is more than one to choose from; returns whether the
 * one that was asked for is among them. A probe that fails leaves guesses. */
static bool open_server_ways(const kvw_worker *w, kvc_client *client, const kvc_part *part,
                             const char **why_p)
{
    const kvc_way_ask ask = {.n_rows = 1, .row_bytes = part->row_bytes, .n_q = 1};
    kvc_way_cost costs[KVC_WAY_COUNT];
    (void)kvc_way_costs(client, &ask, costs, NULL);
    if (w->way != KVC_WAY_COUNT) {
        *why_p = costs[w->way].why_not;
        return *why_p == NULL;
    }
    if (costs[KVC_WAY_NEAR].why_not == NULL &&
        kvc_way_probe(client, &w->schema, part, w->opts.n_q_heads, 0) != KVC_OK) {
        KVC_LOG_DEBUG(WORKER, "the ways could not be measured: %s", kvc_last_error());
    }
    return true;
}

/* A way that was asked for is one of some server. */
static kvc_status open_ways(const kvw_worker *w, const kvc_part *part)
{
    const char *why = NULL;
    bool any = w->servers.n == 0;
    for (uint32_t i = 0; i < w->servers.n; i++) {
        any = open_server_ways(w, w->servers.all[i].client, part, &why) || any;
    }
    return any ? KVC_OK : kvwi_fail(KVC_UNSUPPORTED, "way: \"%s\": %s", kvc_way_name(w->way), why);
}

kvc_status kvwi_schema_open(kvw_worker *worker)
{
    const kvw_opts *o = &worker->opts;
    char recipe[1024], codec[KVC_MAX_NAME_BYTES + 1];
    kvc_status st = list_own_parts(worker);
    if (st != KVC_OK) {
        return st;
    }
    kvc_part *parts = calloc((size_t)o->tp_size * o->n_layers * 2u, sizeof(*parts));
    if (parts == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    write_recipe(worker, recipe, sizeof(recipe));
    write_codec(worker, codec, sizeof(codec));
    kvc_schema schema = {
        .model = o->model,
        .revision = o->revision,
        .recipe = recipe,
        .tp_size = o->tp_size,
        .block_tokens = o->block_tokens,
        .n_parts = list_parts(worker, parts, codec),
        .parts = parts,
    };
    st = name_schema(worker, &schema);
    if (st == KVC_OK) {
        const kvc_part own = kv_part(worker, o->tp_rank, 0);
        st = open_ways(worker, &own);
    }
    free(parts);
    return st;
}
