/*
 * cuda_memory.c: where everything of a layer lies: one device memory of fixed size, one that grows
 * with the sequence, one that is pinned.
 *
 * Runs on the sequence's thread, at open and between passes. Each memory is carved twice by the
 * same function: without a base to learn its size, then for good.
 */
#include <stdlib.h>
#include <string.h>

#include "carve.h"
#include "state.h"

/* What passes between the engine and the step: pinned, or where the engine's memory is. */
static void carve_engine(kvwi_carver *c, const kvw_worker *w, uint32_t n_seqs, kvwi_lane *lane)
{
    size_t heads = (size_t)n_seqs * w->opts.n_q_heads;
    size_t q_bytes = heads * w->opts.head_dim * w->elem_bytes;
    lane->q_in = kvwi_carve(c, q_bytes);
    lane->q_select = kvwi_carve(c, q_bytes);
    lane->out = kvwi_carve(c, q_bytes);
    lane->lse = kvwi_carve(c, heads * sizeof(float));
}

void kvwi_carve_lane(kvwi_carver *c, const kvw_worker *w, uint32_t n_seqs, kvwi_lane *lane)
{
    size_t n = n_seqs, word = sizeof(uint32_t);
    size_t q = n * w->opts.n_q_heads * w->opts.head_dim * sizeof(float);
    lane->n_seqs = n_seqs;
    lane->res = kvwi_carve(c, n * sizeof(*lane->res));
    lane->ring_res = kvwi_carve(c, n * sizeof(*lane->ring_res));
    lane->cands = kvwi_carve(c, n * sizeof(*lane->cands));
    lane->source = kvwi_carve(c, n * sizeof(*lane->source));
    bool renumbers = w->selector->positions == KVW_RENUMBER;
    uint32_t heads = w->selector->form == KVWI_PER_HEAD ? w->opts.n_q_heads : 1u;
    lane->picks = kvwi_carve(c, n * w->opts.k * word);
    lane->ordered = renumbers ? kvwi_carve(c, n * w->opts.k * word) : lane->picks;
    lane->k_positions = renumbers ? kvwi_carve(c, n * kvwi_stride(w) * word) : NULL;
    lane->n_picks = kvwi_carve(c, n * word);
    lane->list = kvwi_carve(c, n * kvwi_stride(w) * word);
    lane->fetch = kvwi_carve(c, n * kvwi_stride(w) * word);
    lane->n_list = kvwi_carve(c, n * word);
    lane->n_near = kvwi_carve(c, n * word);
    lane->near_first = kvwi_carve(c, n * word);
    lane->counts = kvwi_carve(c, 2u * word);
    lane->resolved = kvwi_carve(c, n * kvwi_stride(w) * word);
    lane->q_near = kvwi_carve(c, q);
    lane->q_far = renumbers ? lane->q_near : kvwi_carve(c, q);
    lane->q_index = kvwi_carve(c, n * heads * w->level[0].dims * sizeof(float));
    if (w->n_levels > 1) {
        lane->finer = kvwi_carve(c, n * sizeof(*lane->finer));
        lane->wide = kvwi_carve(c, n * kvwi_wide(w) * word);
        lane->n_wide = kvwi_carve(c, n * word);
        lane->q_fine = kvwi_carve(c, n * heads * w->level[1].dims * sizeof(float));
    }
    if (w->opts.reselect_cos != 0) {
        lane->last = kvwi_carve(c, q);
        lane->keep = kvwi_carve(c, n * word);
    }
    if (w->opts.device_memory) {
        carve_engine(c, w, n_seqs, lane);
    }
}

void kvwi_carve_lane_pinned(kvwi_carver *c, const kvw_worker *w, uint32_t n_seqs, kvwi_lane *lane)
{
    size_t words = n_seqs * sizeof(uint32_t);
    lane->n_tokens = kvwi_carve(c, words);
    lane->n_misses = kvwi_carve(c, words);
    lane->differs = kvwi_carve(c, words);
    lane->kept_first = kvwi_carve(c, words);
    lane->kept = kvwi_carve(c, words);
    lane->done = kvwi_carve(c, sizeof(*lane->done));
    lane->tokens = kvwi_carve(c, n_seqs * sizeof(*lane->tokens));
    if (!w->opts.device_memory) {
        carve_engine(c, w, n_seqs, lane);
    }
}

static void carve_fixed(kvwi_carver *c, const kvw_worker *w, kvwi_device_layer *l)
{
    size_t slots = kvwi_slots(w), word = sizeof(uint32_t);
    l->slots = kvwi_carve(c, slots * w->row_bytes);
    l->ring = kvwi_carve(c, kvwi_ring_rows(w) * w->row_bytes);
    l->pos_of = kvwi_carve(c, slots * word);
    l->used = kvwi_carve(c, slots * word);
    l->step = kvwi_carve(c, word);
    kvwi_carve_lane(c, w, 1, &l->lane);
}

static void carve_pinned(kvwi_carver *c, const kvw_worker *w, kvwi_device_layer *l)
{
    l->n_far = kvwi_carve(c, sizeof(*l->n_far));
    l->chunk_cands = kvwi_carve(c, sizeof(*l->chunk_cands));
    l->miss_pos = kvwi_carve(c, kvwi_stride(w) * sizeof(uint32_t));
    l->status = kvwi_carve(c, kvwi_stride(w));
    if (!w->opts.device_memory) {
        l->kv_in = kvwi_carve(c, 2u * w->in_bytes);
        l->lane.kv = l->kv_in;
    }
    if (w->opts.device_memory) {
        l->bad = kvwi_carve(c, sizeof(*l->bad));
    }
    kvwi_carve_lane_pinned(c, w, 1, &l->lane);
}

static void carve_grown(kvwi_carver *c, const kvw_worker *w, const kvwi_device_seq *d,
                        kvwi_device_layer *l)
{
    for (uint32_t i = 0; i < w->n_levels; i++) {
        l->index[i] = kvwi_carve(c, (size_t)d->cap_tokens * w->level[i].row_bytes);
    }
    l->slot_of = kvwi_carve(c, (size_t)d->cap_tokens * sizeof(int32_t));
    l->blocks = kvwi_carve(c, ((size_t)d->cap_blocks + d->n_staging) * sizeof(void *));
}

/* The sinks' slots are at the head of every list, and what is listed ends before the near rows. */
static kvc_status number_lists(const kvw_worker *w, const kvwi_lane *lane, const int32_t *numbers,
                               kvk_stream *stream)
{
    kvk_cuda *cuda = w->device->cuda;
    uint32_t stride = kvwi_stride(w);
    kvc_status st = KVC_OK;
    for (size_t i = 0; st == KVC_OK && i < lane->n_seqs; i++) {
        st = kvk_cuda_copy(cuda, lane->list + i * stride, numbers + stride,
                           w->opts.n_sink * sizeof(*numbers), stream);
        if (st == KVC_OK && lane->k_positions != NULL) {
            st = kvk_cuda_copy(cuda, lane->k_positions + i * stride, numbers,
                               stride * sizeof(*numbers), stream);
        }
    }
    return st;
}

kvc_status kvwi_cuda_lane_clear(const kvw_worker *w, kvwi_lane *lane, kvk_stream *stream)
{
    kvk_cuda *cuda = w->device->cuda;
    uint32_t stride = kvwi_stride(w);
    int32_t *numbers = malloc(2u * stride * sizeof(*numbers)); /* -stride .. stride - 1 */
    if (numbers == NULL) {
        return KVC_NO_MEMORY;
    }
    for (uint32_t i = 0; i < 2u * stride; i++) {
        numbers[i] = (int32_t)i - (int32_t)stride;
    }
    kvc_status st = kvk_cuda_fill(cuda, lane->counts, 0, 2u * sizeof(*lane->counts), stream);
    if (st == KVC_OK) {
        st = kvk_cuda_fill(cuda, lane->resolved, 0,
                           (size_t)lane->n_seqs * stride * sizeof(*lane->resolved), stream);
    }
    if (st == KVC_OK) {
        st = kvk_cuda_fill(cuda, lane->fetch, 0xff,
                           (size_t)lane->n_seqs * stride * sizeof(uint32_t), stream);
    }
    if (st == KVC_OK) {
        st = number_lists(w, lane, numbers, stream);
    }
    if (st == KVC_OK) {
        st = kvk_cuda_stream_sync(cuda, stream); /* the copies are from here */
    }
    free(numbers);
    return st;
}

/* Nothing is resident yet. */
static kvc_status fill_fixed(kvw_seq *seq, kvwi_device_layer *l)
{
    const kvw_worker *w = seq->worker;
    const kvwi_device_seq *d = seq->device;
    kvk_cuda *cuda = d->device->cuda;
    const kvk_cuda_residency ring = {.slots = l->ring};
    kvc_status st = kvwi_cuda_lane_clear(w, &l->lane, d->stream);
    if (st == KVC_OK) {
        st = kvk_cuda_fill(cuda, l->pos_of, 0xff, kvwi_slots(w) * sizeof(uint32_t), d->stream);
    }
    if (st == KVC_OK) {
        st = kvk_cuda_fill(cuda, l->used, 0, kvwi_slots(w) * sizeof(uint32_t), d->stream);
    }
    if (st == KVC_OK) {
        st = kvk_cuda_fill(cuda, l->step, 0, sizeof(uint32_t), d->stream);
    }
    if (st == KVC_OK) {
        st = kvk_cuda_copy(cuda, l->lane.ring_res, &ring, sizeof(ring), d->stream);
    }
    return st == KVC_OK ? kvk_cuda_stream_sync(cuda, d->stream) : st; /* ring is from here */
}

kvc_status kvwi_cuda_layer_open(kvw_seq *seq, kvwi_device_layer *l)
{
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    kvwi_carver fixed = {0}, pinned = {0};
    carve_fixed(&fixed, w, l);
    carve_pinned(&pinned, w, l);
    kvc_status st = kvk_cuda_alloc(d->device->cuda, KVK_CUDA_DEVICE, fixed.at, &l->slab);
    if (st == KVC_OK) {
        d->device_bytes += fixed.at;
        st = kvk_cuda_alloc(d->device->cuda, KVK_CUDA_PINNED, pinned.at, &l->pinned);
    }
    if (st != KVC_OK) {
        return st;
    }
    memset(l->pinned, 0, pinned.at);
    fixed = (kvwi_carver){.base = l->slab};
    pinned = (kvwi_carver){.base = l->pinned};
    carve_fixed(&fixed, w, l);
    carve_pinned(&pinned, w, l);
    l->lane.frame_space = d->frame_space;
    l->lane.frame_bytes = d->frame_bytes;
    l->lane.attend_space = d->attend_space;
    l->lane.attend_bytes = d->attend_bytes;
    l->picks_in = &l->lane;
    st = kvk_cuda_event_create(d->device->cuda, &l->brought);
    if (st == KVC_OK) {
        st = fill_fixed(seq, l);
    }
    return st == KVC_OK ? kvwi_cuda_layer_grow(seq, l) : st;
}

/* The staging's blocks come behind all others, wherever these end. */
static kvc_status fill_blocks(kvw_seq *seq, kvwi_device_layer *l, uint32_t old_blocks)
{
    const kvw_worker *w = seq->worker;
    const kvwi_device_seq *d = seq->device;
    size_t block_bytes = w->opts.block_tokens * w->row_bytes;
    uint32_t n = d->cap_blocks + d->n_staging;
    const void **shadow = realloc((void *)l->shadow, n * sizeof(*shadow));
    if (shadow == NULL) {
        return KVC_NO_MEMORY;
    }
    for (uint32_t b = old_blocks; b < n; b++) {
        shadow[b] =
            b < d->cap_blocks ? NULL : kvwi_cuda_staging_block(d, b - d->cap_blocks, block_bytes);
    }
    l->shadow = shadow;
    return kvk_cuda_copy(d->device->cuda, (void *)l->blocks, (const void *)shadow,
                         n * sizeof(*shadow), d->stream);
}

kvk_cuda_residency kvwi_residency_of(const kvwi_device_layer *l)
{
    return (kvk_cuda_residency){.slots = l->slots,
                                .slot_of = l->slot_of,
                                .pos_of = l->pos_of,
                                .used = l->used,
                                .step = l->step,
                                .n_positions = l->cap_tokens};
}

kvk_cuda_source kvwi_source_of(const kvw_seq *seq, const kvwi_device_layer *l)
{
    return (kvk_cuda_source){.blocks = l->blocks,
                             .n_blocks = l->cap_blocks + seq->device->n_staging,
                             .block_tokens = seq->worker->opts.block_tokens};
}

kvk_cuda_candidates kvwi_candidates_of(const kvw_worker *w, const kvwi_device_layer *l)
{
    return (kvk_cuda_candidates){.index = l->index[0] + w->opts.n_sink * w->level[0].row_bytes};
}

kvk_cuda_candidates kvwi_finer_of(const kvwi_device_layer *l)
{
    return (kvk_cuda_candidates){.index = l->index[1], .n_rows = l->cap_tokens};
}

/* Index rows into new memory, and where each level's are. */
static kvc_status fill_index(kvw_seq *seq, kvwi_device_layer *l, const kvwi_device_layer *old)
{
    const kvw_worker *w = seq->worker;
    const kvwi_device_seq *d = seq->device;
    const kvk_cuda_candidates lists[KVWI_MAX_LEVELS] = {kvwi_candidates_of(w, l), kvwi_finer_of(l)};
    kvk_cuda_candidates *const to[KVWI_MAX_LEVELS] = {l->lane.cands, l->lane.finer};
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < w->n_levels; i++) {
        if (l->n_index != 0) {
            st = kvk_cuda_copy(d->device->cuda, l->index[i], old->index[i],
                               l->n_index * w->level[i].row_bytes, d->stream);
        }
        if (st == KVC_OK) {
            st = kvk_cuda_copy(d->device->cuda, to[i], &lists[i], sizeof(lists[i]), d->stream);
        }
    }
    return st == KVC_OK ? kvk_cuda_stream_sync(d->device->cuda, d->stream) : st; /* of lists */
}

static kvc_status fill_grown(kvw_seq *seq, kvwi_device_layer *l, const kvwi_device_layer *old)
{
    const kvwi_device_seq *d = seq->device;
    kvk_cuda *cuda = d->device->cuda;
    const kvk_cuda_residency res = kvwi_residency_of(l);
    const kvk_cuda_source source = kvwi_source_of(seq, l);
    kvc_status st =
        kvk_cuda_fill(cuda, l->slot_of, 0xff, d->cap_tokens * sizeof(int32_t), d->stream);
    if (st == KVC_OK && old->cap_tokens != 0) {
        st = kvk_cuda_copy(cuda, l->slot_of, old->slot_of, old->cap_tokens * sizeof(int32_t),
                           d->stream);
    }
    if (st == KVC_OK) {
        st = fill_index(seq, l, old);
    }
    if (st == KVC_OK) {
        st = kvk_cuda_copy(cuda, l->lane.res, &res, sizeof(res), d->stream);
    }
    if (st == KVC_OK) {
        st = kvk_cuda_copy(cuda, l->lane.source, &source, sizeof(source), d->stream);
    }
    if (st == KVC_OK) {
        st = fill_blocks(seq, l, old->cap_blocks);
    }
    return st == KVC_OK ? kvk_cuda_stream_sync(cuda, d->stream) : st;
}

kvc_status kvwi_cuda_layer_grow(kvw_seq *seq, kvwi_device_layer *l)
{
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    kvwi_device_layer old = *l;
    kvwi_carver size = {0};
    void *grown = NULL;
    if (l->cap_tokens == d->cap_tokens) { /* an earlier try came so far */
        return KVC_OK;
    }
    carve_grown(&size, w, d, l);
    kvc_status st = kvk_cuda_alloc(d->device->cuda, KVK_CUDA_DEVICE, size.at, &grown);
    if (st == KVC_OK) {
        kvwi_carver c = {.base = grown};
        carve_grown(&c, w, d, l);
        l->cap_tokens = d->cap_tokens;
        l->cap_blocks = d->cap_blocks;
        st = fill_grown(seq, l, &old);
    }
    if (st != KVC_OK) {
        old.shadow = l->shadow; /* it may have moved */
        *l = old;
        kvk_cuda_free(d->device->cuda, KVK_CUDA_DEVICE, grown);
        return st;
    }
    l->grown = grown;
    l->grown_bytes = size.at;
    d->device_bytes += size.at - old.grown_bytes;
    kvk_cuda_free(d->device->cuda, KVK_CUDA_DEVICE, old.grown);
    return KVC_OK;
}

void kvwi_cuda_layer_close(kvw_seq *seq, kvwi_device_layer *l)
{
    kvk_cuda *cuda = seq->device->device->cuda;
    kvwi_cuda_graphs_drop(seq, l);
    kvwi_cuda_tables_let_go(l);
    kvk_cuda_event_destroy(cuda, l->brought);
    kvk_cuda_free(cuda, KVK_CUDA_DEVICE, l->slab);
    kvk_cuda_free(cuda, KVK_CUDA_DEVICE, l->grown);
    kvk_cuda_free(cuda, KVK_CUDA_PINNED, l->pinned);
    free((void *)l->shadow);
}
