/*
 * cuda_chunks.c: the CUDA kind of device for selectors of whole chunks: what it can serve, and what
 * a sequence has on it: landmarks, and a workspace to score them in.
 *
 * Runs inside kvw_open, and on the sequence's thread. The host's landmarks are whole; the device
 * has a copy of the first n of a layer, brought when a retrieval needs them. Capacity is max_tokens
 * or what is known at open; a sequence that outgrows it gets half as much again.
 */
#include <stdlib.h>

#include "state.h"

static kvc_status no(const char *option, const char *rule)
{
    return kvwi_fail(KVC_UNSUPPORTED, "%s: %s where chunks are retrieved on cuda", option, rule);
}

static kvc_status check(const kvw_worker *w)
{
    const kvw_opts *o = &w->opts;
    if (o->head_dim != 32 && o->head_dim != 64 && o->head_dim != 128) {
        return no("head_dim", "must be 32, 64 or 128");
    }
    if (o->landmark_dim > KVK_CUDA_LANDMARK_MAX) {
        return no("landmark_dim", "must be at most 4096");
    }
    return o->tp_size == 1 ? KVC_OK : no("tp_size", "must be 1");
}

static kvc_status chunks_open(kvw_worker *worker, uint32_t number, kvwi_device **device_p)
{
    *device_p = NULL;
    kvc_status st = check(worker);
    return st == KVC_OK ? kvwi_cuda_device_open(worker, number, device_p) : st;
}

/* Block buffers are the host's alone: what is retrieved from them goes through the slab. */
static kvc_status chunks_map(kvwi_device *device, void *base, size_t len_bytes)
{
    (void)device;
    (void)base;
    (void)len_bytes;
    return KVC_OK;
}

static void chunks_unmap(kvwi_device *device, void *base)
{
    (void)device;
    (void)base;
}

static kvc_status chunks_settle(kvw_seq *seq)
{
    (void)seq;
    return KVC_OK; /* the device writes nothing that is the host's */
}

static kvc_status chunks_truncate(kvw_seq *seq, uint32_t n_tokens)
{
    for (uint32_t i = 0; i < seq->worker->opts.n_layers; i++) {
        kvwi_device_marks *m = &seq->device->marks[i];
        m->n = kvwi_min_u32(m->n, n_tokens / KVW_CHUNK_TOKENS);
    }
    return KVC_OK;
}

/* ---- landmarks ---- */

static size_t mark_bytes(const kvw_worker *w)
{
    return (size_t)w->opts.landmark_dim * sizeof(float);
}

/* The workspace is that of all retrievers: they enqueue on one stream. */
static kvc_status grow_workspace(kvw_seq *seq, uint32_t cap)
{
    kvwi_device_seq *d = seq->device;
    size_t bytes = kvk_cuda_chunk_select_workspace_bytes(1, cap);
    void *space = NULL;
    if (bytes <= d->select_bytes) {
        return KVC_OK;
    }
    kvc_status st = kvk_cuda_alloc(d->device->cuda, KVK_CUDA_DEVICE, bytes, &space);
    if (st != KVC_OK) {
        return st;
    }
    kvk_cuda_free(d->device->cuda, KVK_CUDA_DEVICE, d->select_space);
    d->device_bytes += bytes - d->select_bytes;
    d->select_space = space;
    d->select_bytes = bytes;
    return KVC_OK;
}

/* Nothing that reads the old rows is under way afterwards. */
static kvc_status grow_marks(kvw_seq *seq, kvwi_device_marks *m, uint32_t cap)
{
    kvwi_device_seq *d = seq->device;
    size_t one = mark_bytes(seq->worker);
    void *rows = NULL;
    kvc_status st = kvwi_cuda_sync(seq);
    if (st == KVC_OK) {
        st = grow_workspace(seq, cap);
    }
    if (st == KVC_OK) {
        st = kvk_cuda_alloc(d->device->cuda, KVK_CUDA_DEVICE, cap * one, &rows);
    }
    if (st == KVC_OK && m->n != 0) {
        st = kvk_cuda_copy(d->device->cuda, rows, m->rows, m->n * one, d->stream);
    }
    if (st == KVC_OK) {
        st = kvwi_cuda_sync(seq);
    }
    if (st != KVC_OK) {
        kvk_cuda_free(d->device->cuda, KVK_CUDA_DEVICE, rows);
        return st;
    }
    kvk_cuda_free(d->device->cuda, KVK_CUDA_DEVICE, m->rows);
    d->device_bytes += (cap - m->cap) * one;
    m->rows = rows;
    m->cap = cap;
    return KVC_OK;
}

kvc_status kvwi_cuda_marks(kvw_seq *seq, uint32_t layer, uint32_t n)
{
    const kvwi_pages *pages = &seq->layers[layer].level[0];
    kvwi_device_marks *m = &seq->device->marks[layer];
    size_t one = mark_bytes(seq->worker);
    kvc_status st = n <= m->cap ? KVC_OK : grow_marks(seq, m, n + n / 2u);
    while (st == KVC_OK && m->n < n) {
        uint32_t run = 0;
        const uint8_t *rows = kvwi_pages_row(pages, m->n * KVW_CHUNK_TOKENS, &run);
        run = kvwi_min_u32(run / KVW_CHUNK_TOKENS, n - m->n);
        st = kvk_cuda_copy(seq->device->device->cuda, (uint8_t *)m->rows + m->n * one, rows,
                           run * one, seq->device->stream);
        m->n += st == KVC_OK ? run : 0;
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "landmarks");
}

/* ---- a sequence ---- */

static kvc_status chunks_seq_open(kvw_seq *seq, uint32_t n_tokens, void *stream)
{
    const kvw_opts *o = &seq->worker->opts;
    uint32_t cap = kvwi_max_u32(o->max_tokens == 0 ? KVWI_DEVICE_TOKENS : o->max_tokens, n_tokens);
    kvwi_device_seq *d = calloc(1, sizeof(*d));
    if (d == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    seq->device = d;
    d->device = seq->worker->device;
    d->marks = calloc(o->n_layers, sizeof(*d->marks));
    kvc_status st = d->marks == NULL ? KVC_NO_MEMORY : kvwi_cuda_streams(seq, stream);
    for (uint32_t i = 0; st == KVC_OK && i < o->n_layers; i++) {
        st = grow_marks(seq, &d->marks[i], cap / KVW_CHUNK_TOKENS + 1u);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "memory of a sequence");
}

static void chunks_seq_close(kvw_seq *seq)
{
    kvwi_device_seq *d = seq->device;
    if (d == NULL) {
        return;
    }
    for (uint32_t i = 0; d->marks != NULL && i < seq->worker->opts.n_layers; i++) {
        kvk_cuda_free(d->device->cuda, KVK_CUDA_DEVICE, d->marks[i].rows);
    }
    kvk_cuda_free(d->device->cuda, KVK_CUDA_DEVICE, d->select_space);
    kvwi_cuda_streams_close(d);
    free(d->marks);
    free(d);
    seq->device = NULL;
}

const kvwi_device_ops kvwi_device_cuda_chunks = {
    .name = "cuda",
    .chunks = true,
    .open = chunks_open,
    .close = kvwi_cuda_device_close,
    .isa = kvwi_cuda_isa,
    .map = chunks_map,
    .unmap = chunks_unmap,
    .seq_open = chunks_seq_open,
    .seq_close = chunks_seq_close,
    .settle = chunks_settle,
    .truncate = chunks_truncate,
    .copy = kvwi_cuda_copy,
    .bytes = kvwi_cuda_bytes,
    .retriever_open = kvwi_cuda_retriever_open,
    .retriever_close = kvwi_cuda_retriever_close,
    .retriever_choose = kvwi_cuda_retriever_choose,
    .retriever_attend = kvwi_cuda_retriever_attend,
};
