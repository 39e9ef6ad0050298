/*
 * levels.c: the levels of a worker's index, from its options and its projection file. Runs inside
 * kvw_open; levels are immutable afterwards.
 *
 * The columns of a nested projection are sorted by weight, so a level of fewer dims takes a prefix
 * of them. Where tensor parallelism splits the heads, a worker keeps the rows of its own heads.
 */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static kvc_status misfit(const kvw_worker *w, const char *why)
{
    return kvwi_fail(KVC_INVALID, "projection_path: %s: %s", w->opts.projection_path, why);
}

static kvc_status check_projection(const kvw_worker *w)
{
    const kvwi_projection *p = w->projection;
    const kvw_opts *o = &w->opts;
    uint32_t position = w->selector->positions == KVW_FAR_NEAR ? o->far_position : o->n_recent;
    if (strcmp(p->selector, w->selector->name) != 0 || p->form != w->selector->form) {
        return misfit(w, "it was made for another selector");
    }
    if (strcmp(p->model, o->model) != 0) {
        return misfit(w, "it was made for another model");
    }
    if (p->n_kv_heads != o->n_kv_heads * o->tp_size) {
        return kvwi_fail(KVC_INVALID,
                         "projection_path: %s: it has n_kv_heads=%u, but %u on each of tp_size %u "
                         "ranks make %u: heads must divide evenly",
                         o->projection_path, p->n_kv_heads, o->n_kv_heads, o->tp_size,
                         o->n_kv_heads * o->tp_size);
    }
    if (p->n_layers != o->n_layers || p->head_dim != o->head_dim) {
        return misfit(w, "its shape is not the model's");
    }
    if (p->rope != KVWI_PROJECTION_RAW && (uint32_t)p->rope != position) {
        return misfit(w, "it was calibrated for another far_position or n_recent");
    }
    return KVC_OK;
}

static kvc_status choose_dims(kvw_worker *w)
{
    const kvwi_projection *p = w->projection;
    kvw_opts *o = &w->opts;
    bool reranked = o->index == KVW_INDEX_RERANKED;
    if (reranked && o->rerank_dims == 0) {
        o->rerank_dims = p->dims;
    }
    if (o->index_dims == 0) {
        o->index_dims = reranked ? o->rerank_dims / 2u : p->dims;
    }
    if (o->index_dims == 0 || o->index_dims > p->dims || o->rerank_dims > p->dims) {
        return kvwi_fail(KVC_INVALID, "index_dims, rerank_dims: the projection has %u", p->dims);
    }
    if (reranked && o->index_dims >= o->rerank_dims) {
        return kvwi_fail(KVC_INVALID, "index_dims: must be below rerank_dims");
    }
    if (!p->nested && (o->index_dims != p->dims || reranked)) {
        return kvwi_fail(KVC_INVALID, "index_dims: the projection is not nested, take all of it");
    }
    return KVC_OK;
}

/* The first dims columns of this rank's rows of one side of the projection. */
static float *take_columns(const kvw_worker *w, const float *all, const kvwi_level *level)
{
    const kvwi_projection *p = w->projection;
    uint32_t rank = w->opts.tp_rank;
    size_t rows_all = (size_t)p->heads * p->d_in, rows = (size_t)level->heads * level->d_in;
    float *out = calloc(w->opts.n_layers * rows * level->dims, sizeof(float));
    for (uint32_t layer = 0; out != NULL && layer < w->opts.n_layers; layer++) {
        const float *src = all + (layer * rows_all + rank * rows) * p->dims;
        float *dst = out + layer * rows * level->dims;
        for (size_t i = 0; i < rows; i++) {
            memcpy(dst + i * level->dims, src + i * p->dims, level->dims * sizeof(float));
        }
    }
    return out;
}

static kvc_status open_level(kvw_worker *w, kvwi_level *level, uint32_t dims)
{
    bool shared = w->selector->form == KVWI_SHARED;
    level->dims = dims;
    level->heads = shared ? 1 : w->opts.n_kv_heads;
    level->d_in = shared ? w->opts.n_kv_heads * w->opts.head_dim : w->opts.head_dim;
    level->row_bytes = kvk_index_row_bytes(level->heads, dims);
    level->a = take_columns(w, w->projection->a, level);
    level->b = take_columns(w, w->projection->b, level);
    if (level->a == NULL || level->b == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    return KVC_OK;
}

static void open_exact(kvw_worker *w)
{
    bool shared = w->selector->form == KVWI_SHARED;
    w->n_levels = 1;
    w->level[0] = (kvwi_level){
        .exact = true,
        .heads = shared ? 1 : w->opts.n_kv_heads,
        .dims = shared ? w->opts.n_kv_heads * w->opts.head_dim : w->opts.head_dim,
        .row_bytes = w->k_bytes,
    };
    w->level[0].d_in = w->level[0].dims;
}

/* A chunk's landmark is spread over the index rows of its tokens, so that index rows are stored,
 * matched and brought back as those of any selector. */
static void open_landmarks(kvw_worker *w)
{
    w->n_levels = 1;
    w->level[0] = (kvwi_level){
        .exact = true,
        .heads = 1,
        .dims = (uint32_t)w->opts.landmark_dim,
        .row_bytes = (size_t)w->opts.landmark_dim * sizeof(float) / KVW_CHUNK_TOKENS,
    };
    w->index_row_bytes = w->level[0].row_bytes;
}

kvc_status kvwi_levels_open(kvw_worker *worker)
{
    const char *why = NULL;
    const kvw_opts *o = &worker->opts;
    if (worker->selector->fusion != 0) {
        open_landmarks(worker);
        return KVC_OK;
    }
    if (o->index == KVW_INDEX_EXACT) {
        open_exact(worker);
        return KVC_OK;
    }
    kvc_status st = kvwi_projection_load(o->projection_path, &worker->projection, &why);
    if (st != KVC_OK) {
        return kvwi_fail(st, "projection_path: %s: %s", o->projection_path, why);
    }
    if ((st = check_projection(worker)) != KVC_OK || (st = choose_dims(worker)) != KVC_OK) {
        return st;
    }
    worker->n_levels = o->index == KVW_INDEX_RERANKED ? 2 : 1;
    for (uint32_t i = 0; i < worker->n_levels; i++) {
        st = open_level(worker, &worker->level[i], i == 0 ? o->index_dims : o->rerank_dims);
        if (st != KVC_OK) {
            return st;
        }
        worker->index_row_bytes += worker->level[i].row_bytes;
    }
    kvwi_projection_drop_matrices(worker->projection);
    return KVC_OK;
}

void kvwi_levels_close(kvw_worker *worker)
{
    for (uint32_t i = 0; i < KVWI_MAX_LEVELS; i++) {
        free(worker->level[i].a);
        free(worker->level[i].b);
    }
    kvwi_projection_free(worker->projection);
}
