/*
 * cuda_mirror.c: what host and device both have: index rows, and the rows of sinks and recent.
 *
 * Runs on the sequence's thread. Whichever side a pass is for writes its rows and index rows; what
 * the host wrote is brought to the device when a pass begins that is for the device, whose own rows
 * reach the host's block buffer by the same stream. Invariants: the device's index has rows [0,
 * n_index), the host's pages [0, n_rows), and the longer of the two is all of the layer; the ring
 * has the rows of positions [near_from, near_to), position p in slot p % ring_rows.
 */
#include <string.h>

#include "base/clock.h"
#include "convert.h"
#include "state.h"

/* Index rows that only the host has. */
static kvc_status push_index(kvw_seq *seq, uint32_t layer)
{
    kvwi_device_seq *d = seq->device;
    kvwi_device_layer *l = &d->layers[layer];
    uint32_t n = seq->layers[layer].level[0].n_rows, run = 0;
    kvc_status st = KVC_OK;
    for (; st == KVC_OK && l->n_index < n; l->n_index += st == KVC_OK ? run : 0) {
        for (uint32_t i = 0; st == KVC_OK && i < seq->worker->n_levels; i++) {
            const kvwi_pages *pages = &seq->layers[layer].level[i];
            const uint8_t *rows = kvwi_pages_row(pages, l->n_index, &run);
            run = kvwi_min_u32(run, n - l->n_index);
            st = kvk_cuda_copy(d->device->cuda, l->index[i] + l->n_index * pages->row_bytes, rows,
                               run * pages->row_bytes, d->stream);
        }
    }
    return st;
}

/* Index rows of a level that only the device has. */
static kvc_status pull_index(kvw_seq *seq, uint32_t layer, uint32_t i)
{
    kvwi_device_seq *d = seq->device;
    const kvwi_device_layer *l = &d->layers[layer];
    kvwi_pages *pages = &seq->layers[layer].level[i];
    kvc_status st = kvwi_pages_reserve(pages, l->n_index);
    seq->device->n_writes += pages->n_rows < l->n_index;
    while (st == KVC_OK && pages->n_rows < l->n_index) {
        uint32_t run = 0;
        uint8_t *rows = kvwi_pages_row(pages, pages->n_rows, &run);
        run = kvwi_min_u32(run, l->n_index - pages->n_rows);
        st = kvk_cuda_copy(d->device->cuda, rows, l->index[i] + pages->n_rows * pages->row_bytes,
                           run * pages->row_bytes, d->stream);
        pages->n_rows += st == KVC_OK ? run : 0;
    }
    return st;
}

/* Rows of positions [from, to) out of block buffers to slots from `slot` on, which do not wrap. */
static kvc_status push_rows(kvw_seq *seq, uint32_t layer, uint32_t from, uint32_t to,
                            uint8_t *slots)
{
    const kvw_worker *w = seq->worker;
    uint32_t bt = w->opts.block_tokens;
    kvc_status st = KVC_OK;
    while (st == KVC_OK && from < to) {
        uint32_t run = kvwi_min_u32(bt - from % bt, to - from);
        const kvwi_block *block = seq->blocks[from / bt].buf;
        if (block == NULL) {
            return kvwi_fail(KVC_NOT_FOUND, "block %u has left before its rows were read",
                             from / bt);
        }
        st = kvk_cuda_copy(seq->device->device->cuda, slots,
                           kvwi_block_row(w, block, layer, from % bt), run * w->row_bytes,
                           seq->device->stream);
        slots += run * w->row_bytes;
        from += run;
    }
    return st;
}

static kvc_status push_sinks(kvw_seq *seq, uint32_t layer)
{
    const kvw_worker *w = seq->worker;
    kvwi_device_layer *l = &seq->device->layers[layer];
    uint32_t n = kvwi_min_u32(seq->layers[layer].n_tokens, w->opts.n_sink);
    if (l->n_sinks >= n) {
        return KVC_OK;
    }
    kvc_status st = push_rows(seq, layer, l->n_sinks, n, l->slots + l->n_sinks * w->row_bytes);
    l->n_sinks = st == KVC_OK ? n : l->n_sinks;
    return st;
}

kvc_status kvwi_cuda_push_ring(kvw_seq *seq, uint32_t layer, uint32_t from, uint32_t to)
{
    kvwi_device_seq *d = seq->device;
    kvc_status st = KVC_OK;
    while (st == KVC_OK && from < to) {
        uint32_t slot = from % kvwi_ring_rows(seq->worker),
                 run = kvwi_min_u32(kvwi_ring_rows(seq->worker) - slot, to - from);
        st = push_rows(seq, layer, from, from + run,
                       d->layers[layer].ring + slot * seq->worker->row_bytes);
        from += run;
    }
    return st;
}

/* Rows of the last `near` tokens. */
static kvc_status push_recent(kvw_seq *seq, uint32_t layer, uint32_t near)
{
    kvwi_device_seq *d = seq->device;
    kvwi_device_layer *l = &d->layers[layer];
    uint32_t n = seq->layers[layer].n_tokens, from = n - kvwi_min_u32(n, near);
    bool keeps = l->near_from <= from && l->near_to >= from;
    kvc_status st = kvwi_cuda_push_ring(seq, layer, keeps ? l->near_to : from, n);
    if (st == KVC_OK) {
        uint32_t oldest = n - kvwi_min_u32(n, kvwi_ring_rows(seq->worker));
        l->near_from = keeps ? kvwi_max_u32(l->near_from, oldest) : from;
        l->near_to = n;
    }
    return st;
}

kvc_status kvwi_cuda_mirror(kvw_seq *seq, uint32_t layer, uint32_t near)
{
    kvc_status st = push_index(seq, layer);
    if (st == KVC_OK) {
        st = push_sinks(seq, layer);
    }
    if (st == KVC_OK) {
        st = push_recent(seq, layer, near);
    }
    return st == KVC_OK || st == KVC_NOT_FOUND ? st : kvwi_cuda_fail(st, "the device's copies");
}

kvc_status kvwi_cuda_pass(kvw_seq *seq, uint32_t n_tokens, uint32_t n)
{
    const kvw_worker *w = seq->worker;
    bool chunk = n > 1 || kvwi_is_full(w, kvwi_near_begin(w, n_tokens, 1));
    kvc_status st = kvwi_cuda_grow(seq, n_tokens);
    if (st == KVC_OK && chunk) {
        st = kvwi_cuda_prefill_open(seq);
    }
    if (st == KVC_OK) {
        st = kvwi_cuda_tables(seq, true);
    }
    for (uint32_t i = 0; st == KVC_OK && i < w->opts.n_layers; i++) {
        st = kvwi_cuda_mirror(seq, i, w->opts.n_recent);
        if (st == KVC_OK && !chunk) {
            st = kvwi_cuda_graphs(seq, i);
        }
    }
    return st;
}

void kvwi_cuda_near_grew(kvw_seq *seq, kvwi_device_layer *l, uint32_t end)
{
    uint32_t oldest = end - kvwi_min_u32(end, kvwi_ring_rows(seq->worker));
    l->near_to = end;
    l->near_from = kvwi_max_u32(l->near_from, oldest);
}

kvc_status kvwi_cuda_flush(kvw_seq *seq, uint32_t layer)
{
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    kvwi_lane *lane = &d->layers[layer].lane;
    if (!d->layers[layer].pending) {
        return KVC_OK;
    }
    const kvk_cuda_frame_args args = {
        .n_seqs = 1,
        .n_q_heads = w->opts.n_q_heads,
        .n_kv_heads = w->opts.n_kv_heads,
        .head_dim = w->opts.head_dim,
        .dims = w->level[0].dims,
        .dtype = w->opts.dtype,
        .token = lane->tokens[0],
        .row_dtype = w->row_dtype,
        .key_proj = kvwi_layer_proj(w, d->device->key_proj, kvwi_finest(w), layer),
        .workspace = lane->frame_space,
        .workspace_bytes = lane->frame_bytes,
        .per_head = kvwi_per_head(w),
        .fine_dims = kvwi_fine_dims(w),
    };
    d->layers[layer].pending = false;
    d->layers[layer].reads_kv = true;
    d->n_writes++;
    kvc_status st = kvk_cuda_frame(d->device->cuda, &args, d->stream);
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "append");
}

/* K and V to where the device codes them from, once it has read what was there before. */
static kvc_status stage_token(kvw_seq *seq, kvwi_device_layer *l, const void *k, const void *v,
                              kvk_cuda_token *token)
{
    size_t bytes = seq->worker->in_bytes;
    kvc_status st = l->reads_kv ? kvwi_cuda_sync(seq) : KVC_OK;
    if (st != KVC_OK) {
        return kvwi_cuda_fail(st, "append");
    }
    l->reads_kv = false;
    memcpy(l->kv_in, k, bytes);
    memcpy(l->kv_in + bytes, v, bytes);
    token->k = l->kv_in;
    token->v = l->kv_in + bytes;
    return KVC_OK;
}

static kvc_status append_token(kvw_seq *seq, uint32_t layer, const void *k, const void *v,
                               bool whole)
{
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    kvwi_device_layer *l = &d->layers[layer];
    uint32_t pos = seq->layers[layer].n_tokens, bt = w->opts.block_tokens;
    uint8_t *host = kvwi_block_row(w, seq->blocks[pos / bt].buf, layer, pos % bt);
    kvk_cuda_token token = {
        .k = k,
        .v = v,
        .row = l->ring + (pos % kvwi_ring_rows(w)) * w->row_bytes,
        .copy = host,
        .index_row = l->index[0] + (size_t)pos * w->level[0].row_bytes,
        .fine_row = w->n_levels == 1 ? NULL : l->index[1] + (size_t)pos * w->level[1].row_bytes,
        .bad = l->bad,
    };
    kvc_status st = kvwi_cuda_finite_next(seq, layer);
    if (st == KVC_OK && kvk_is_coded(w->row_dtype) && !w->opts.device_memory) {
        st = stage_token(seq, l, k, v, &token);
    } else if (st == KVC_OK && !w->opts.device_memory) {
        memcpy(host, k, w->k_bytes);
        memcpy(host + w->k_bytes, v, w->k_bytes);
        token.k = host;
        token.v = host + w->k_bytes;
        token.copy = NULL;
        if (whole) { /* whose graph knows this place, and is done when the next token comes */
            memcpy(l->kv_in, k, w->k_bytes);
            memcpy(l->kv_in + w->k_bytes, v, w->k_bytes);
        }
    }
    if (st == KVC_OK) {
        l->lane.tokens[0] = token;
        l->pending = true;
        st = whole ? KVC_OK : kvwi_cuda_flush(seq, layer);
    }
    if (st != KVC_OK) {
        return st;
    }
    d->n_writes++;
    l->unchecked = l->bad != NULL;
    l->n_index = pos + 1u;
    kvwi_cuda_near_grew(seq, l, pos + 1u);
    seq->layers[layer].n_tokens = pos + 1u;
    return KVC_OK;
}

kvc_status kvwi_cuda_append(kvw_seq *seq, uint32_t layer, const void *k, const void *v, uint32_t n,
                            bool whole)
{
    return n == 1 ? append_token(seq, layer, k, v, whole)
                  : kvwi_cuda_append_pass(seq, layer, k, v, n);
}

kvc_status kvwi_cuda_settle(kvw_seq *seq)
{
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < seq->worker->opts.n_layers; i++) {
        st = kvwi_cuda_flush(seq, i);
        for (uint32_t level = 0; st == KVC_OK && level < seq->worker->n_levels; level++) {
            st = pull_index(seq, i, level);
        }
    }
    if (st == KVC_OK && seq->device->n_settled != seq->device->n_writes) {
        st = kvwi_cuda_sync(seq);
    }
    return st == KVC_OK ? kvwi_cuda_finite_all(seq) : kvwi_cuda_fail(st, "what the device wrote");
}

/* A pass of many tokens may have been picked from; others get its positions now. */
static kvc_status forget_from(kvw_seq *seq, const kvwi_device_layer *l, uint32_t first)
{
    kvwi_device_seq *d = seq->device;
    uint32_t end = kvwi_min_u32(seq->pass.first + seq->pass.n, l->cap_tokens);
    /* the last ones are never picked: by the new one's query, of which they are recent */
    uint32_t near = seq->worker->opts.n_recent + (seq->worker->selector->recent_holds_new ? 0 : 1u);
    if (end <= first + near) {
        return KVC_OK;
    }
    return kvk_cuda_fill(d->device->cuda, l->slot_of + first, 0xff,
                         (end - near - first) * sizeof(*l->slot_of), d->stream);
}

static void cut(kvwi_device_layer *l, uint32_t n_tokens)
{
    l->n_index = kvwi_min_u32(l->n_index, n_tokens);
    l->near_to = kvwi_min_u32(l->near_to, n_tokens);
    l->near_from = kvwi_min_u32(l->near_from, l->near_to);
    l->n_sinks = kvwi_min_u32(l->n_sinks, n_tokens);
    if (l->unchecked) {
        *l->bad = 0;
        l->unchecked = false;
    }
}

kvc_status kvwi_cuda_layer_truncate(kvw_seq *seq, uint32_t layer, uint32_t n_tokens)
{
    kvc_status st = forget_from(seq, &seq->device->layers[layer], n_tokens);
    if (st != KVC_OK) {
        return kvwi_cuda_fail(st, "rows that are taken back");
    }
    cut(&seq->device->layers[layer], n_tokens);
    return KVC_OK;
}

kvc_status kvwi_cuda_truncate(kvw_seq *seq, uint32_t n_tokens)
{
    kvc_status st = kvwi_cuda_finite_kept(seq, n_tokens);
    if (st != KVC_OK) {
        return st;
    }
    for (uint32_t i = 0; st == KVC_OK && i < seq->worker->opts.n_layers; i++) {
        st = forget_from(seq, &seq->device->layers[i], n_tokens);
    }
    if (st != KVC_OK) {
        return kvwi_cuda_fail(st, "rows that are taken back");
    }
    for (uint32_t i = 0; i < seq->worker->opts.n_layers; i++) {
        cut(&seq->device->layers[i], n_tokens);
    }
    return KVC_OK;
}
