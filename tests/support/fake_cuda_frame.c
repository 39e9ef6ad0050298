/*
 * fake_cuda_frame.c: the fake's op that begins a step. See fake_cuda.h. Ops run on the caller's
 * thread.
 */
#include <stdlib.h>
#include <string.h>

#include "fake_cuda_internal.h"
#include "kvk/cuda_frame.h"

/* The first dims of each of heads' width numbers. */
static void take_columns(const float *in, uint32_t heads, uint32_t width, uint32_t dims, float *out)
{
    for (uint32_t h = 0; h < heads; h++)
        memmove(out + (size_t)h * dims, in + (size_t)h * width, dims * sizeof(*out));
}

/* A new token's index row, and its finer one. */
static kvc_status index_token(kvk_cuda *cuda, const kvk_cuda_frame_args *a, const kvk_cuda_token *t)
{
    uint32_t inputs = a->n_kv_heads * a->head_dim, heads = a->per_head ? a->n_kv_heads : 1u;
    uint32_t width = a->fine_dims != 0 ? a->fine_dims : a->dims;
    float x[16 * 256];
    kvk_quantize_args quantize = {.in = x, .n = 1, .n_heads = heads};
    if (heads * width > sizeof(x) / sizeof(*x))
        return KVC_INVALID;
    kvc_status st =
        fake_cuda_project(cuda, t->k, KVK_BF16, heads, inputs / heads, a->key_proj, width, x);
    for (uint32_t i = a->fine_dims != 0 ? 0 : 1; st == KVC_OK && i < 2; i++) {
        quantize.dims = i == 0 ? width : a->dims;
        quantize.out = i == 0 ? t->fine_row : t->index_row;
        quantize.out_stride_bytes = kvk_index_row_bytes(heads, quantize.dims);
        take_columns(x, heads, width, quantize.dims, x);
        st = cuda->ops->quantize(cuda->be, &quantize, NULL);
    }
    return st;
}

/* The row of a new token, its copy and its index row. */
static kvc_status take_token(kvk_cuda *cuda, const kvk_cuda_frame_args *a, const kvk_cuda_token *t)
{
    uint32_t inputs = a->n_kv_heads * a->head_dim, heads = a->per_head ? a->n_kv_heads : 1u;
    size_t slice = kvk_slice_bytes(a->row_dtype, a->n_kv_heads, a->head_dim);
    bool coded = kvk_is_coded(a->row_dtype), finite = fake_cuda_all_finite(t->k, inputs, t->bad);
    if (coded)
        finite = fake_cuda_all_finite(t->v, inputs, t->bad) && finite;
    if (!finite) { /* no bytes of it are right */
        memset(t->row, 0xff, coded ? 2u * slice : inputs * 4u);
        memset(t->index_row, 0, kvk_index_row_bytes(heads, a->dims));
        if (a->fine_dims != 0)
            memset(t->fine_row, 0, kvk_index_row_bytes(heads, a->fine_dims));
        return KVC_OK;
    }
    if (coded) {
        kvk_encode_args code = {.in = {t->k, inputs * 2u, KVK_BF16},
                                .n = 1,
                                .n_heads = a->n_kv_heads,
                                .dims = a->head_dim,
                                .dtype = a->row_dtype,
                                .out = t->row,
                                .out_stride_bytes = slice};
        kvc_status st = cuda->ops->encode(cuda->be, &code, NULL);
        code.in.data = t->v;
        code.out = (uint8_t *)t->row + slice;
        if (st != KVC_OK || (st = cuda->ops->encode(cuda->be, &code, NULL)) != KVC_OK)
            return st;
    } else {
        slice = inputs * 2u;
        memcpy(t->row, t->k, slice);
        memcpy((uint8_t *)t->row + slice, t->v, slice);
    }
    if (t->copy != NULL)
        memcpy(t->copy, t->row, 2u * slice);
    return index_token(cuda, a, t);
}

static kvc_status rotate(kvk_cuda *cuda, const kvk_cuda_frame_args *a, const void *q,
                         uint32_t position, float *out)
{
    const kvk_rope_args rope = {.in = {q, a->n_q_heads * a->head_dim * 2u, a->dtype},
                                .n = 1,
                                .n_heads = a->n_q_heads,
                                .head_dim = a->head_dim,
                                .inv_freq = position == UINT32_MAX ? NULL : a->inv_freq,
                                .const_position = (int32_t)position,
                                .out = out};
    return cuda->ops->rope(cuda->be, &rope, NULL);
}

static kvc_status index_query(kvk_cuda *cuda, const kvk_cuda_frame_args *a, const void *q,
                              float *out)
{
    uint32_t inputs = a->n_kv_heads * a->head_dim;
    float *rotated = malloc(a->n_q_heads * a->head_dim * sizeof(float));
    float *sum = malloc(inputs * sizeof(float));
    const kvk_group_sum_args group = {
        .in = {rotated, a->n_q_heads * a->head_dim * sizeof(float), KVK_F32},
        .n = 1,
        .n_q_heads = a->n_q_heads,
        .n_kv_heads = a->n_kv_heads,
        .head_dim = a->head_dim,
        .out = sum};
    kvc_status st = rotate(cuda, a, q, a->score_raw ? UINT32_MAX : a->far_position, rotated);
    if (st == KVC_OK)
        st = cuda->ops->group_sum(cuda->be, &group, NULL);
    if (st == KVC_OK)
        st = fake_cuda_project(cuda, sum, KVK_F32, 1, inputs, a->proj, a->dims, out);
    free(rotated);
    free(sum);
    return st;
}

static kvc_status frame_one(kvk_cuda *cuda, const kvk_cuda_frame_args *a, uint32_t seq)
{
    size_t width = (size_t)a->n_q_heads * a->head_dim;
    uint32_t n = a->n_tokens[seq], near = n < a->n_recent + 1u ? n : a->n_recent + 1u;
    const uint8_t *q = (const uint8_t *)a->q + seq * width * 2u;
    kvc_status st = KVC_OK;
    if (a->q_index != NULL)
        st = index_query(cuda, a, q, a->q_index + (size_t)seq * a->dims);
    if (st == KVC_OK && a->q_far != NULL)
        st = rotate(cuda, a, q, a->far_position, a->q_far + seq * width);
    if (st == KVC_OK && a->q_near != NULL)
        st = rotate(cuda, a, q, near - 1u, a->q_near + seq * width);
    if (a->n_near != NULL) {
        a->n_near[seq] = near;
        a->near_first[seq] = n - near;
    }
    if (a->cands != NULL) {
        a->cands[seq].n_rows = n - near > a->n_sink ? n - near - a->n_sink : 0;
        a->cands[seq].base = a->n_sink;
    }
    if (a->expected != NULL &&
        memcmp(q, (const uint8_t *)a->expected + seq * width * 2u, width * 2u) != 0)
        a->differs[seq] = 1;
    return st;
}

/* Where the near rows begin; whether the last picks are kept. flat: the query in f32. */
static kvc_status decide(kvk_cuda *cuda, const kvk_cuda_frame_args *a, uint32_t seq,
                         const float *flat)
{
    uint32_t n = a->n_tokens[seq], width = a->n_q_heads * a->head_dim;
    uint32_t first = n - (n < a->n_recent ? n : a->n_recent);
    if (a->last != NULL) {
        float *last = a->last + (size_t)seq * width;
        double c = 0;
        const kvk_cosine_args cosine = {.a = flat, .b = last, .n = width, .cos_p = &c};
        kvc_status st = cuda->ops->cosine(cuda->be, &cosine, NULL);
        bool keep = a->kept_first[seq] != UINT32_MAX && c >= a->threshold;
        if (st != KVC_OK)
            return st;
        if (!keep)
            memcpy(last, flat, width * sizeof(*flat));
        a->keep[seq] = a->kept[seq] = keep;
        first = keep ? a->kept_first[seq] : first;
    }
    a->near_first[seq] = first;
    a->n_near[seq] = n - first;
    if (a->cands != NULL) {
        a->cands[seq].n_rows = first > a->n_sink ? first - a->n_sink : 0;
        a->cands[seq].base = a->n_sink;
    }
    return KVC_OK;
}

/* The query as the index meets it, and a finer one. */
static kvc_status query_heads(kvk_cuda *cuda, const kvk_cuda_frame_args *a, uint32_t seq,
                              const float *turned)
{
    uint32_t width = a->fine_dims != 0 ? a->fine_dims : a->dims;
    float *out = malloc((size_t)a->n_q_heads * width * sizeof(*out));
    const kvk_cuda_query_args query = {.q = turned,
                                       .n_seqs = 1,
                                       .n_q_heads = a->n_q_heads,
                                       .n_kv_heads = a->n_kv_heads,
                                       .head_dim = a->head_dim,
                                       .dims = width,
                                       .proj = a->proj,
                                       .out = out,
                                       .per_head = 1};
    kvc_status st = out == NULL ? KVC_NO_MEMORY : fake_cuda_query_heads(cuda, &query, 0);
    if (st == KVC_OK) {
        take_columns(out, a->n_q_heads, width, a->dims,
                     a->q_index + (size_t)seq * a->n_q_heads * a->dims);
        if (a->fine_dims != 0)
            memcpy(a->q_fine + (size_t)seq * a->n_q_heads * width, out,
                   (size_t)a->n_q_heads * width * sizeof(*out));
    }
    free(out);
    return st;
}

static kvc_status frame_heads(kvk_cuda *cuda, const kvk_cuda_frame_args *a, uint32_t seq)
{
    size_t width = (size_t)a->n_q_heads * a->head_dim;
    const uint8_t *q = (const uint8_t *)a->q + seq * width * 2u;
    float *turned = malloc(width * sizeof(*turned));
    kvc_status st = turned == NULL ? KVC_NO_MEMORY : rotate(cuda, a, q, UINT32_MAX, turned);
    if (st == KVC_OK && a->near_first != NULL)
        st = decide(cuda, a, seq, turned);
    if (st == KVC_OK && a->q_index != NULL && !a->score_raw)
        st = rotate(cuda, a, q, a->n_recent, turned);
    if (st == KVC_OK && a->q_index != NULL)
        st = query_heads(cuda, a, seq, turned);
    if (st == KVC_OK && a->q_near != NULL)
        st = rotate(cuda, a, q, a->n_near[seq] - 1u, a->q_near + seq * width);
    if (a->expected != NULL &&
        memcmp(q, (const uint8_t *)a->expected + seq * width * 2u, width * 2u) != 0)
        a->differs[seq] = 1;
    free(turned);
    return st;
}

size_t kvk_cuda_frame_workspace_bytes(uint32_t n_seqs, uint32_t inputs, uint32_t dims)
{
    return (size_t)n_seqs * inputs * dims + FAKE_CUDA_TAG_BYTES;
}

FAKE_CUDA_OP(frame)
{
    const kvk_cuda_frame_args *a = args;
    bool clean = a->per_head || fake_cuda_is_clean(a->workspace, a->n_seqs);
    bool told = a->kv == NULL || (a->n_seqs == 1 && (uintptr_t)a->kv % 16u == 0);
    bool fine = a->per_head || a->fine_dims == 0;
    kvc_status st = clean && told && fine ? KVC_OK : KVC_INVALID;
    for (uint32_t s = 0; st == KVC_OK && s < a->n_seqs; s++) {
        kvk_cuda_token token = a->tokens != NULL ? a->tokens[s] : a->token;
        if (a->kv != NULL) {
            token.k = a->kv;
            token.v = (const uint16_t *)a->kv + (size_t)a->n_kv_heads * a->head_dim;
        }
        st = token.row == NULL ? KVC_OK : take_token(cuda, a, &token);
        if (st == KVC_OK && a->q != NULL)
            st = a->per_head ? frame_heads(cuda, a, s) : frame_one(cuda, a, s);
    }
    return st;
}
