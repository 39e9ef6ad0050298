/*
 * cuda_append.c: the tokens of a pass of several into the ring, the blocks' buffers and the index.
 *
 * Runs on the sequence's thread and only enqueues, but for rows of the host's that are coded, which
 * are copied first. Rows of the host that are not coded go to the buffers by the CPU and to the
 * ring from there; all others go to the ring, and from there, or beside it, to the buffers, which
 * are the host's: d->n_writes counts that.
 */
#include "base/log.h"
#include "state.h"

/* A pass in one layer that is being appended: its rows as they come. */
typedef struct incoming {
    const uint8_t *k, *v; /* [n, in_bytes], on the device unless rows that are not coded are the
                             host's */
    uint32_t first, n;
} incoming;

/* Tokens of the pass from `done` on, the first at pos, that lie in one piece in block and ring. */
static uint32_t run_of(const kvw_worker *w, uint32_t pos, uint32_t left)
{
    uint32_t block = w->opts.block_tokens - pos % w->opts.block_tokens;
    uint32_t ring = kvwi_ring_rows(w) - pos % kvwi_ring_rows(w);
    return kvwi_min_u32(left, kvwi_min_u32(block, ring));
}

/* Into the ring, and from there to the block's buffer, which is the host's. */
static kvc_status code_rows(kvw_seq *seq, uint32_t layer, const incoming *in)
{
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    uint32_t bt = w->opts.block_tokens, run = 0;
    kvc_status st = KVC_OK;
    for (uint32_t done = 0; st == KVC_OK && done < in->n; done += run) {
        uint32_t pos = in->first + done;
        uint8_t *row = d->layers[layer].ring + (pos % kvwi_ring_rows(w)) * w->row_bytes;
        run = run_of(w, pos, in->n - done);
        const kvk_cuda_encode_args args = {
            .k = in->k + done * w->in_bytes,
            .v = in->v + done * w->in_bytes,
            .n = run,
            .n_heads = w->opts.n_kv_heads,
            .head_dim = w->opts.head_dim,
            .dtype = w->row_dtype,
            .row_bytes = (uint32_t)w->row_bytes,
            .v_off_bytes = (uint32_t)w->k_bytes,
            .out = row,
        };
        st = kvk_cuda_encode(d->device->cuda, &args, d->stream);
        if (st == KVC_OK) {
            st = kvk_cuda_copy(d->device->cuda,
                               kvwi_block_row(w, seq->blocks[pos / bt].buf, layer, pos % bt), row,
                               run * w->row_bytes, d->stream);
        }
    }
    return st;
}

/* Rows that are not coded into the ring and the blocks' buffers. */
static kvc_status place_rows(kvw_seq *seq, uint32_t layer, const incoming *in)
{
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    uint32_t bt = w->opts.block_tokens, run = 0;
    kvc_status st = KVC_OK;
    for (uint32_t done = 0; st == KVC_OK && done < in->n; done += run) {
        uint32_t pos = in->first + done;
        run = kvwi_min_u32(bt - pos % bt, in->n - done);
        const kvk_cuda_rows_args args = {
            .k = in->k + done * w->k_bytes,
            .v = in->v + done * w->k_bytes,
            .n = run,
            .slice_bytes = (uint32_t)w->k_bytes,
            .ring = d->layers[layer].ring,
            .first = pos,
            .ring_rows = kvwi_ring_rows(w),
            .copy = kvwi_block_row(w, seq->blocks[pos / bt].buf, layer, pos % bt),
        };
        st = kvk_cuda_rows(d->device->cuda, &args, d->stream);
    }
    return st;
}

/* K and V of the host to where the device codes them from; they stay the engine's. */
static kvc_status stage_rows(kvw_seq *seq, incoming *in)
{
    kvwi_device_seq *d = seq->device;
    size_t len_bytes = in->n * seq->worker->in_bytes;
    uint8_t *k = d->prefill.kv, *v = k + len_bytes;
    kvc_status st = kvk_cuda_copy(d->device->cuda, k, in->k, len_bytes, d->stream);
    if (st == KVC_OK) {
        st = kvk_cuda_copy(d->device->cuda, v, in->v, len_bytes, d->stream);
    }
    in->k = k;
    in->v = v;
    return st == KVC_OK ? kvwi_cuda_sync(seq) : st;
}

static kvc_status write_rows(kvw_seq *seq, uint32_t layer, incoming *in)
{
    const kvw_worker *w = seq->worker;
    kvc_status st = KVC_OK;
    if (kvk_is_coded(w->row_dtype)) {
        st = w->opts.device_memory ? KVC_OK : stage_rows(seq, in);
        return st == KVC_OK ? code_rows(seq, layer, in) : st;
    }
    if (w->opts.device_memory) {
        return place_rows(seq, layer, in);
    }
    st = kvwi_write_rows(seq, layer, in->first, in->k, in->v, in->n);
    return st == KVC_OK ? kvwi_cuda_push_ring(seq, layer, in->first, in->first + in->n) : st;
}

/* Index rows of the pass in one level, of its keys as they came: those in the ring, unless these
 * are coded. */
static kvc_status digest(kvw_seq *seq, uint32_t layer, uint32_t i, const incoming *in)
{
    const kvw_worker *w = seq->worker;
    const kvwi_level *level = &w->level[i];
    kvwi_device_seq *d = seq->device;
    kvwi_device_layer *l = &d->layers[layer];
    bool coded = kvk_is_coded(w->row_dtype);
    uint32_t run = 0;
    kvc_status st = KVC_OK;
    for (uint32_t done = 0; st == KVC_OK && done < in->n; done += run) {
        uint32_t pos = in->first + done, slot = pos % kvwi_ring_rows(w);
        run = coded ? in->n : kvwi_min_u32(kvwi_ring_rows(w) - slot, in->n - done);
        const kvk_cuda_digest_args args = {
            .in = coded ? in->k : l->ring + slot * w->row_bytes,
            .n = run,
            .n_heads_in = w->opts.n_kv_heads,
            .head_dim = w->opts.head_dim,
            .n_heads = level->heads,
            .dims = level->dims,
            .proj = kvwi_layer_proj(w, d->device->key_proj, i, layer),
            .out = l->index[i] + (size_t)pos * level->row_bytes,
            .in_stride_bytes = coded ? w->in_bytes : w->row_bytes,
        };
        st = kvk_cuda_digest(d->device->cuda, &args, d->stream);
    }
    return st;
}

/* What the host has not looked at. */
static kvc_status look(kvw_seq *seq, uint32_t layer, const incoming *in)
{
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    kvk_cuda_finite_args args = {
        .in = in->k, .len_bytes = in->n * w->in_bytes, .bad = d->layers[layer].bad};
    kvc_status st = args.bad == NULL ? KVC_OK : kvk_cuda_finite(d->device->cuda, &args, d->stream);
    if (st == KVC_OK && args.bad != NULL && kvk_is_coded(w->row_dtype)) {
        args.in = in->v;
        st = kvk_cuda_finite(d->device->cuda, &args, d->stream);
    }
    return st;
}

kvc_status kvwi_cuda_append_pass(kvw_seq *seq, uint32_t layer, const void *k, const void *v,
                                 uint32_t n)
{
    kvwi_device_seq *d = seq->device;
    kvwi_device_layer *l = &d->layers[layer];
    incoming in = {.k = k, .v = v, .first = seq->pass.first, .n = n};
    uint32_t end = in.first + n;
    kvc_status st = kvwi_cuda_finite_next(seq, layer);
    if (st != KVC_OK) {
        return st;
    }
    st = look(seq, layer, &in);
    if (st == KVC_OK) {
        st = write_rows(seq, layer, &in);
    }
    d->n_writes++; /* also where it failed halfway */
    for (uint32_t i = 0; st == KVC_OK && i < seq->worker->n_levels; i++) {
        st = digest(seq, layer, i, &in);
    }
    if (st != KVC_OK) { /* what was enqueued reads the caller's memory, and may set bad */
        if (kvwi_cuda_sync(seq) != KVC_OK) {
            KVC_LOG_WARN(WORKER, "an append failed and the device does not answer");
        }
        return kvwi_cuda_fail(st, "append");
    }
    l->unchecked = l->bad != NULL;
    l->n_index = end;
    kvwi_cuda_near_grew(seq, l, end);
    seq->layers[layer].n_tokens = end;
    return KVC_OK;
}
