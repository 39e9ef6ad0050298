/*
 * append.c: new tokens of one layer: rows into block buffers, keys into the index.
 *
 * Runs on the sequence's thread and never waits for the store. A layer's n_tokens moves last, so a
 * failed append leaves the layer as it was (bytes beyond n_tokens mean nothing).
 */
#include <string.h>

#include "base/clock.h"
#include "convert.h"
#include "internal.h"

/* The leading `dims` of each head: in [n, heads, dims_in] -> out [n, heads, dims]. */
static void take_dims(const float *in, uint32_t n, uint32_t heads, uint32_t dims_in, uint32_t dims,
                      float *out)
{
    for (size_t i = 0; i < (size_t)n * heads; i++) {
        memcpy(out + i * dims, in + i * dims_in, dims * sizeof(float));
    }
}

/* Quantises x [n, heads, dims] into the pages of a level, run by run. */
static kvc_status quantize_rows(const kvw_worker *w, const kvwi_level *level, kvwi_pages *pages,
                                uint32_t first, const float *x, uint32_t n)
{
    for (uint32_t done = 0; done < n;) {
        uint32_t run = 0;
        uint8_t *out = kvwi_pages_row(pages, first + done, &run);
        run = kvwi_min_u32(run, n - done);
        const kvk_quantize_args args = {
            .in = x + (size_t)done * level->heads * level->dims,
            .n = run,
            .n_heads = level->heads,
            .dims = level->dims,
            .out = out,
            .out_stride_bytes = pages->row_bytes,
        };
        kvc_status st = w->ops->quantize(w->be, &args, NULL);
        if (st != KVC_OK) {
            return st == KVC_INVALID ? kvwi_fail(st, "a key is not finite") : st;
        }
        done += run;
    }
    return KVC_OK;
}

/* Projects keys to the finest level's dims; a tensor-parallel group sums its shared projection. */
static kvc_status project_keys(kvw_seq *seq, uint32_t layer, const void *k, size_t stride_bytes,
                               uint32_t n, const kvwi_level *level, float **out_p)
{
    const kvw_worker *w = seq->worker;
    size_t len = (size_t)n * level->heads * level->dims;
    *out_p = seq->select.buf[KVW_SCRATCH_APPEND].p;
    const kvk_project_args args = {
        .in = {k, stride_bytes, w->opts.dtype},
        .n = n,
        .n_heads = level->heads,
        .dim_in = level->d_in,
        .dim_out = level->dims,
        .proj = level->b + (size_t)layer * level->heads * level->d_in * level->dims,
        .out = *out_p,
    };
    kvc_status st = w->ops->project(w->be, &args, NULL);
    if (st == KVC_OK && w->selector->form == KVWI_SHARED && w->opts.all_reduce != NULL) {
        st = w->opts.all_reduce(w->opts.all_reduce_arg, "sum", *out_p, (uint32_t)len);
    }
    return st;
}

static kvc_status append_compressed(kvw_seq *seq, uint32_t layer, uint32_t first, const void *k,
                                    size_t stride_bytes, uint32_t n)
{
    const kvw_worker *w = seq->worker;
    kvwi_layer *l = &seq->layers[layer];
    const kvwi_level *finest = &w->level[w->n_levels - 1];
    float *x = NULL;
    kvc_status st = project_keys(seq, layer, k, stride_bytes, n, finest, &x);
    float *part = x + (size_t)n * finest->heads * finest->dims;
    for (uint32_t i = 0; st == KVC_OK && i < w->n_levels; i++) {
        const kvwi_level *level = &w->level[i];
        const float *rows = x;
        if (level->dims != finest->dims) {
            take_dims(x, n, level->heads, finest->dims, level->dims, part);
            rows = part;
        }
        st = quantize_rows(w, level, &l->level[i], first, rows, n);
    }
    return st;
}

/* Index rows up to end, and the scratch that n keys are projected in: twice, see take_dims. */
static kvc_status reserve_index(kvw_seq *seq, uint32_t layer, uint32_t end, uint32_t n)
{
    const kvw_worker *w = seq->worker;
    const kvwi_level *finest = &w->level[w->n_levels - 1];
    size_t len = finest->exact ? 0 : (size_t)n * finest->heads * finest->dims;
    kvc_status st = kvwi_buf_need(&seq->select.buf[KVW_SCRATCH_APPEND], 2u * len * sizeof(float));
    for (uint32_t i = 0; st == KVC_OK && i < w->n_levels; i++) {
        st = kvwi_pages_reserve(&seq->layers[layer].level[i], end);
    }
    return st;
}

kvc_status kvwi_index_append(kvw_seq *seq, uint32_t layer, uint32_t first, const void *k,
                             size_t stride_bytes, uint32_t n)
{
    const kvw_worker *w = seq->worker;
    kvwi_layer *l = &seq->layers[layer];
    kvc_status st = reserve_index(seq, layer, first + n, n);
    if (st != KVC_OK) {
        return st;
    }
    if (w->level[0].exact) {
        kvwi_pages_write(&l->level[0], first, n, k, stride_bytes);
    } else if ((st = append_compressed(seq, layer, first, k, stride_bytes, n)) != KVC_OK) {
        return st;
    }
    for (uint32_t i = 0; i < w->n_levels; i++) {
        l->level[i].n_rows = first + n;
    }
    return KVC_OK;
}

/* Slices (K or V) of n tokens coded to rows of one block. */
static kvc_status encode_slices(const kvw_worker *w, const uint8_t *in, uint32_t n, uint8_t *out)
{
    const kvk_encode_args args = {
        .in = {in, w->in_bytes, w->opts.dtype},
        .n = n,
        .n_heads = w->opts.n_kv_heads,
        .dims = w->opts.head_dim,
        .dtype = w->row_dtype,
        .out = out,
        .out_stride_bytes = w->row_bytes,
    };
    kvc_status st = w->ops->encode(w->be, &args, NULL);
    return st == KVC_INVALID ? kvwi_fail(st, "a value is not finite") : st;
}

kvc_status kvwi_write_rows(kvw_seq *seq, uint32_t layer, uint32_t first, const void *keys,
                           const void *values, uint32_t n)
{
    const kvw_worker *w = seq->worker;
    const uint8_t *k = keys, *v = values;
    uint32_t bt = w->opts.block_tokens, run = 0;
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < n; i += run) {
        uint32_t pos = first + i;
        uint8_t *row = kvwi_block_row(w, seq->blocks[pos / bt].buf, layer, pos % bt);
        if (kvk_is_coded(w->row_dtype)) {
            run = kvwi_min_u32(bt - pos % bt, n - i);
            st = encode_slices(w, k + i * w->in_bytes, run, row);
            if (st == KVC_OK) {
                st = encode_slices(w, v + i * w->in_bytes, run, row + w->k_bytes);
            }
        } else {
            run = 1;
            memcpy(row, k + i * w->in_bytes, w->in_bytes);
            memcpy(row + w->k_bytes, v + i * w->in_bytes, w->in_bytes);
        }
    }
    return st;
}

/* What can fail on one rank alone comes before the group sums keys. */
static kvc_status prepare_append(kvw_seq *seq, uint32_t layer, const void *k, const void *v,
                                 uint32_t n_tokens)
{
    kvwi_layer *l = &seq->layers[layer];
    if (n_tokens == 0 || n_tokens != seq->pass.n || l->n_tokens != seq->pass.first) {
        return kvwi_fail(KVC_INVALID, "layer %u: %u tokens after %u, but the pass has %u after %u",
                         layer, n_tokens, l->n_tokens, seq->pass.n, seq->pass.first);
    }
    if (l->step != NULL) {
        return kvwi_fail(KVC_INVALID, "layer %u: a step is open", layer);
    }
    const kvw_opts *o = &seq->worker->opts;
    if (!o->device_memory &&
        !kvwi_all_finite(k, (size_t)n_tokens * o->n_kv_heads * o->head_dim, o->dtype)) {
        return kvwi_fail(KVC_INVALID, "layer %u: a key is not finite", layer);
    }
    if (!o->device_memory && kvk_is_coded(seq->worker->row_dtype) &&
        !kvwi_all_finite(v, (size_t)n_tokens * o->n_kv_heads * o->head_dim, o->dtype)) {
        return kvwi_fail(KVC_INVALID, "layer %u: a value is not finite", layer);
    }
    if (o->device_memory && kvwi_device_takes_pass(seq->worker, n_tokens) &&
        (((uintptr_t)k | (uintptr_t)v) & 15u) != 0) { /* the device would only fault */
        return kvwi_fail(KVC_INVALID, "layer %u: k and v must be 16-byte aligned", layer);
    }
    uint32_t end = seq->pass.first + n_tokens;
    kvc_status st = kvwi_blocks_reserve(seq, end);
    if (st == KVC_OK) {
        st = kvwi_residency_extend(&l->residency, end);
    }
    return st == KVC_OK ? reserve_index(seq, layer, end, n_tokens) : st;
}

/* The landmarks of the pass's chunks; a chunk's lies in the index rows of its tokens. */
static void write_landmarks(kvw_seq *seq, uint32_t layer, const float *landmarks, uint32_t n_tokens)
{
    kvwi_pages *pages = &seq->layers[layer].level[0];
    kvwi_pages_write(pages, seq->pass.first, n_tokens, landmarks, pages->row_bytes);
    pages->n_rows = seq->pass.first + n_tokens;
}

/* The pass's K and V where the host reads them. */
static kvc_status bring_to_host(kvw_seq *seq, uint32_t layer, const void **k, const void **v,
                                uint32_t n_tokens)
{
    const kvw_opts *o = &seq->worker->opts;
    size_t len_bytes = n_tokens * seq->worker->in_bytes;
    *k = kvwi_device_to_host(seq, *k, len_bytes, &seq->host[0]);
    *v = kvwi_device_to_host(seq, *v, len_bytes, &seq->host[1]);
    if (*k == NULL || *v == NULL) {
        return KVC_DEVICE;
    }
    if (o->device_memory &&
        !kvwi_all_finite(*k, (size_t)n_tokens * o->n_kv_heads * o->head_dim, o->dtype)) {
        return kvwi_fail(KVC_INVALID, "layer %u: a key is not finite", layer);
    }
    return KVC_OK;
}

/* Several tokens, or a worker without a device. */
static kvc_status append_on_host(kvw_seq *seq, uint32_t layer, const void *k, const void *v,
                                 uint32_t n_tokens)
{
    const kvw_worker *w = seq->worker;
    kvc_status st = w->device == NULL ? KVC_OK : w->device_ops->settle(seq);
    if (st == KVC_OK) {
        st = bring_to_host(seq, layer, &k, &v, n_tokens);
    }
    if (st != KVC_OK) {
        return st;
    }
    st = kvwi_write_rows(seq, layer, seq->pass.first, k, v, n_tokens);
    return st == KVC_OK ? kvwi_index_append(seq, layer, seq->pass.first, k, w->in_bytes, n_tokens)
                        : st;
}

/* landmarks: of selectors of chunks, else NULL. whole: see kvwi_append. */
static kvc_status append(kvw_seq *seq, uint32_t layer, const void *k, const void *v,
                         const float *landmarks, uint32_t n_tokens, bool whole)
{
    uint64_t t0 = kvc_now_ns();
    uint32_t end = seq->pass.first + n_tokens;
    kvc_status st = prepare_append(seq, layer, k, v, n_tokens);
    st = kvwi_group_agree(seq->worker, st);
    if (st == KVC_OK && landmarks != NULL) {
        st = bring_to_host(seq, layer, &k, &v, n_tokens);
        if (st == KVC_OK) {
            st = kvwi_write_rows(seq, layer, seq->pass.first, k, v, n_tokens);
        }
    } else if (st == KVC_OK) {
        st = kvwi_device_takes_pass(seq->worker, n_tokens)
                 ? seq->worker->device_ops->append(seq, layer, k, v, n_tokens, whole)
                 : append_on_host(seq, layer, k, v, n_tokens);
    }
    if (st != KVC_OK) {
        return st == KVC_NO_MEMORY ? kvwi_fail(st, "out of memory") : st;
    }
    if (landmarks != NULL) {
        write_landmarks(seq, layer, landmarks, n_tokens);
    }
    seq->layers[layer].n_tokens = end;
    seq->stats.ns_append += kvc_now_ns() - t0;
    return KVC_OK;
}

kvc_status kvwi_append(kvw_seq *seq, uint32_t layer, const void *k, const void *v,
                       uint32_t n_tokens, bool whole)
{
    if (seq == NULL || k == NULL || v == NULL || layer >= seq->worker->opts.n_layers) {
        return kvwi_fail(KVC_INVALID, "seq, k and v must not be NULL, layer must exist");
    }
    if (seq->worker->selector->fusion != 0) {
        return kvwi_fail(KVC_INVALID, "selector: %s needs landmarks: kvw_append_chunks",
                         seq->worker->opts.selector);
    }
    return append(seq, layer, k, v, NULL, n_tokens, whole);
}

kvc_status kvw_append(kvw_seq *seq, uint32_t layer, const void *k, const void *v, uint32_t n_tokens)
{
    return kvwi_append(seq, layer, k, v, n_tokens, false);
}

kvc_status kvw_append_chunks(kvw_seq *seq, uint32_t layer, const void *k, const void *v,
                             const float *landmarks, uint32_t n_tokens)
{
    if (seq == NULL || k == NULL || v == NULL || landmarks == NULL ||
        layer >= seq->worker->opts.n_layers) {
        return kvwi_fail(KVC_INVALID, "seq, k, v and landmarks must not be NULL, layer must exist");
    }
    const kvw_opts *o = &seq->worker->opts;
    if (seq->worker->selector->fusion == 0) {
        return kvwi_fail(KVC_INVALID, "selector: %s has no landmarks", o->selector);
    }
    size_t n = (size_t)n_tokens / KVW_CHUNK_TOKENS * (size_t)o->landmark_dim;
    if (n_tokens % KVW_CHUNK_TOKENS != 0 || !kvwi_all_finite(landmarks, n, KVK_F32)) {
        return kvwi_fail(KVC_INVALID, "layer %u: chunks must be whole, landmarks finite", layer);
    }
    return append(seq, layer, k, v, landmarks, n_tokens, false);
}
