/*
 * cuda_seq.c: what a sequence has on the device: streams, workspaces, staging and layers; and how
 * they grow.
 *
 * Runs on the sequence's thread. Capacity is max_tokens or what is known at open, whichever is
 * more; a sequence that outgrows it gets half as much again before the pass that needs it, and new
 * graphs.
 */
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "state.h"

kvc_status kvwi_cuda_fail(kvc_status st, const char *what)
{
    return kvwi_fail(st, "device: %s: %s", what, kvc_status_name(st));
}

kvc_status kvwi_cuda_sync(kvw_seq *seq)
{
    kvc_status st = kvk_cuda_stream_sync(seq->device->device->cuda, seq->device->stream);
    seq->stats.host_syncs++;
    if (st == KVC_OK) {
        kvwi_settled(seq->device, seq->device->n_writes);
    }
    return st;
}

static kvc_status device_alloc(kvwi_device_seq *d, size_t len_bytes, void *memory_pp)
{
    void *p = NULL;
    kvc_status st = kvk_cuda_alloc(d->device->cuda, KVK_CUDA_DEVICE, len_bytes, &p);
    memcpy(memory_pp, &p, sizeof(p));
    d->device_bytes += st == KVC_OK ? len_bytes : 0;
    return st;
}

kvc_status kvwi_cuda_streams(kvw_seq *seq, void *stream)
{
    kvwi_device_seq *d = seq->device;
    kvc_status st = kvk_cuda_stream_create(d->device->cuda, &d->capture);
    if (st == KVC_OK) {
        st = kvk_cuda_stream_create(d->device->cuda, &d->side);
    }
    if (st == KVC_OK) {
        st = kvk_cuda_event_create(d->device->cuda, &d->chosen);
    }
    d->own = seq->worker->opts.device_memory ? (kvk_stream *)stream : d->capture;
    d->stream = d->own;
    return st;
}

void kvwi_cuda_streams_close(kvwi_device_seq *d)
{
    kvk_cuda_event_destroy(d->device->cuda, d->chosen);
    kvk_cuda_stream_destroy(d->device->cuda, d->side);
    kvk_cuda_stream_destroy(d->device->cuda, d->capture);
}

/* Device memory of n numbers 0, 1, ... wrap - 1, 0, 1, ... */
static kvc_status open_count(kvwi_device_seq *d, uint32_t n, uint32_t wrap, int32_t **numbers_p)
{
    int32_t *numbers = malloc(n * sizeof(*numbers));
    if (numbers == NULL) {
        return KVC_NO_MEMORY;
    }
    for (uint32_t i = 0; i < n; i++) {
        numbers[i] = (int32_t)(i % wrap);
    }
    kvc_status st = device_alloc(d, n * sizeof(*numbers), numbers_p);
    if (st == KVC_OK) {
        st = kvk_cuda_copy(d->device->cuda, *numbers_p, numbers, n * sizeof(*numbers), d->stream);
    }
    if (st == KVC_OK) {
        st = kvk_cuda_stream_sync(d->device->cuda, d->stream);
    }
    free(numbers);
    return st;
}

static kvc_status open_numbers(kvw_seq *seq)
{
    kvwi_device_seq *d = seq->device;
    uint32_t ring = kvwi_ring_rows(seq->worker), most = kvwi_stride(seq->worker) + ring + 1u;
    kvc_status st = open_count(d, most, most, &d->near_pos);
    d->counts = (const uint32_t *)d->near_pos;
    return st == KVC_OK ? open_count(d, 2u * ring, ring, &d->ring_list) : st;
}

/* Of all layers, whose steps run one after the other. */
static kvc_status open_spaces(kvw_seq *seq)
{
    const kvw_opts *o = &seq->worker->opts;
    kvwi_device_seq *d = seq->device;
    uint32_t rows = kvwi_stride(seq->worker) + kvwi_near_max(seq->worker) + 16u;
    d->attend_bytes = kvk_cuda_attend_workspace_bytes(1, rows, o->n_q_heads, o->head_dim);
    d->frame_bytes =
        kvk_cuda_frame_workspace_bytes(1, o->n_kv_heads * o->head_dim, seq->worker->level[0].dims);
    kvc_status st = device_alloc(d, d->attend_bytes, &d->attend_space);
    if (st == KVC_OK) {
        st = device_alloc(d, d->frame_bytes, &d->frame_space);
    }
    if (st == KVC_OK) {
        st = kvk_cuda_fill(d->device->cuda, d->frame_space, 0, d->frame_bytes, d->stream);
    }
    return st == KVC_OK ? open_numbers(seq) : st;
}

static kvc_status open_select(kvw_seq *seq)
{
    kvwi_device_seq *d = seq->device;
    void *space = NULL;
    size_t bytes = d->device->selector->workspace_bytes(seq->worker, 1, d->cap_tokens);
    if (bytes <= d->select_bytes) { /* an earlier try to grow came so far */
        return KVC_OK;
    }
    kvc_status st = kvk_cuda_alloc(d->device->cuda, KVK_CUDA_DEVICE, bytes, &space);
    if (st == KVC_OK) {
        size_t cleared = d->device->selector->cleared_bytes(1, d->cap_tokens);
        st = kvk_cuda_fill(d->device->cuda, space, 0, cleared, d->stream);
    }
    if (st != KVC_OK) {
        kvk_cuda_free(d->device->cuda, KVK_CUDA_DEVICE, space);
        return st;
    }
    kvk_cuda_free(d->device->cuda, KVK_CUDA_DEVICE, d->select_space);
    d->device_bytes += bytes - d->select_bytes;
    d->select_space = space;
    d->select_bytes = bytes;
    return KVC_OK;
}

static void set_capacity(kvw_seq *seq, uint32_t n_tokens)
{
    uint32_t bt = seq->worker->opts.block_tokens;
    kvwi_device_seq *d = seq->device;
    d->cap_blocks = n_tokens / bt + 1u;
    d->cap_tokens = d->cap_blocks * bt;
    kvwi_cuda_staging_place(seq);
}

kvc_status kvwi_cuda_seq_open(kvw_seq *seq, uint32_t n_tokens, void *stream)
{
    const kvw_worker *w = seq->worker;
    const kvw_opts *o = &w->opts;
    kvwi_device_seq *d = calloc(1, sizeof(*d));
    if (d == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    seq->device = d;
    d->device = w->device;
    d->n_staging = (o->k + o->block_tokens - 1u) / o->block_tokens;
    set_capacity(seq,
                 kvwi_max_u32(o->max_tokens == 0 ? KVWI_DEVICE_TOKENS : o->max_tokens, n_tokens));
    d->layers = calloc(o->n_layers, sizeof(*d->layers));
    kvc_status st = d->layers == NULL ? KVC_NO_MEMORY : kvwi_cuda_streams(seq, stream);
    if (st == KVC_OK) {
        st = open_spaces(seq);
    }
    if (st == KVC_OK) {
        st = kvwi_cuda_staging_open(seq);
    }
    if (st == KVC_OK) {
        st = open_select(seq);
    }
    for (uint32_t i = 0; st == KVC_OK && i < o->n_layers; i++) {
        st = kvwi_cuda_layer_open(seq, &d->layers[i]);
    }
    if (st == KVC_OK) {
        st = kvwi_cuda_near_open(seq);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "memory of a sequence");
}

kvc_status kvwi_cuda_grow(kvw_seq *seq, uint32_t n_tokens)
{
    kvwi_device_seq *d = seq->device;
    bool fits = n_tokens <= d->cap_tokens && seq->n_blocks <= d->cap_blocks;
    if (fits && !d->growing) {
        return KVC_OK;
    }
    kvc_status st = kvwi_cuda_sync(seq);
    if (st != KVC_OK) {
        return kvwi_cuda_fail(st, "room for more tokens");
    }
    for (uint32_t i = 0; i < seq->worker->opts.n_layers; i++) { /* they name the select space */
        kvwi_cuda_graphs_drop(seq, &d->layers[i]);
    }
    if (!fits) {
        set_capacity(seq, kvwi_min_u32(n_tokens + n_tokens / 2u, KVWI_MAX_TOKENS));
    }
    d->growing = true;
    d->generation++;
    st = open_select(seq);
    for (uint32_t i = 0; st == KVC_OK && i < seq->worker->opts.n_layers; i++) {
        st = kvwi_cuda_layer_grow(seq, &d->layers[i]);
    }
    d->growing = st != KVC_OK;
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "room for more tokens");
}

void kvwi_cuda_seq_close(kvw_seq *seq)
{
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    if (d == NULL) {
        return;
    }
    kvk_cuda *cuda = d->device->cuda;
    if (d->batch != NULL) {
        kvwi_cuda_batch_part(d->batch);
    }
    if (kvk_cuda_stream_sync(cuda, d->stream) != KVC_OK ||
        (d->side != NULL && kvk_cuda_stream_sync(cuda, d->side) != KVC_OK)) {
        KVC_LOG_WARN(WORKER, "a sequence ends and the device does not answer");
    }
    for (uint32_t i = 0; d->layers != NULL && i < w->opts.n_layers; i++) {
        kvwi_cuda_layer_close(seq, &d->layers[i]);
    }
    kvwi_cuda_staging_close(seq);
    kvk_cuda_free(cuda, KVK_CUDA_DEVICE, d->select_space);
    kvk_cuda_free(cuda, KVK_CUDA_DEVICE, d->near_pos);
    kvk_cuda_free(cuda, KVK_CUDA_DEVICE, d->ring_list);
    kvwi_cuda_prefill_close(seq);
    kvwi_cuda_near_close(seq);
    kvk_cuda_free(cuda, KVK_CUDA_DEVICE, d->frame_space);
    kvk_cuda_free(cuda, KVK_CUDA_DEVICE, d->attend_space);
    kvwi_cuda_streams_close(d);
    free(d->layers);
    free(d);
    seq->device = NULL;
}
