/*
 * fake_cuda_pass.c: the fake's ops of passes of several tokens. See fake_cuda.h. Ops run on the
 * caller's thread.
 */
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "fake_cuda_internal.h"
#include "kvk/cuda_pass.h"

FAKE_CUDA_OP(rope)
{
    const kvk_cuda_rope_args *a = args;
    kvc_status st = KVC_OK;
    uint32_t width = a->n_heads * a->head_dim;
    for (uint32_t i = 0; st == KVC_OK && i < a->n; i++) {
        const kvk_rope_args rope = {
            .in = {(const uint16_t *)a->in + (size_t)i * width, width * 2u, KVK_BF16},
            .n = 1,
            .n_heads = a->n_heads,
            .head_dim = a->head_dim,
            .inv_freq = a->inv_freq,
            .const_position = (int32_t)(a->first + i * a->step),
            .out = a->out + (size_t)i * width};
        st = cuda->ops->rope(cuda->be, &rope, NULL);
    }
    return st;
}

FAKE_CUDA_OP(rows)
{
    const kvk_cuda_rows_args *a = args;
    (void)cuda;
    for (uint32_t i = 0; i < a->n; i++) {
        uint8_t *row = (uint8_t *)a->ring + (a->first + i) % a->ring_rows * 2ul * a->slice_bytes;
        memcpy(row, (const uint8_t *)a->k + (size_t)i * a->slice_bytes, a->slice_bytes);
        memcpy(row + a->slice_bytes, (const uint8_t *)a->v + (size_t)i * a->slice_bytes,
               a->slice_bytes);
        if (a->copy != NULL)
            memcpy((uint8_t *)a->copy + i * 2ul * a->slice_bytes, row, 2ul * a->slice_bytes);
    }
    return KVC_OK;
}

FAKE_CUDA_OP(digest)
{
    const kvk_cuda_digest_args *a = args;
    uint32_t inputs = a->n_heads_in * a->head_dim;
    size_t row = kvk_index_row_bytes(a->n_heads, a->dims);
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < a->n; i++) {
        float x[16 * 256];
        const uint8_t *in = (const uint8_t *)a->in + i * a->in_stride_bytes;
        if (!fake_cuda_all_finite(in, inputs, NULL)) {
            memset((uint8_t *)a->out + i * row, 0, row);
            continue;
        }
        const kvk_quantize_args quantize = {.in = x,
                                            .n = 1,
                                            .n_heads = a->n_heads,
                                            .dims = a->dims,
                                            .out = (uint8_t *)a->out + i * row,
                                            .out_stride_bytes = row};
        st = a->n_heads * a->dims > sizeof(x) / sizeof(*x)
                 ? KVC_INVALID
                 : fake_cuda_project(cuda, in, KVK_BF16, a->n_heads, inputs / a->n_heads, a->proj,
                                     a->dims, x);
        if (st == KVC_OK)
            st = cuda->ops->quantize(cuda->be, &quantize, NULL);
    }
    return st;
}

/* K or V of one token; what is not finite has no bytes of its own. */
static kvc_status code_slice(kvk_cuda *cuda, const kvk_cuda_encode_args *a, const void *all,
                             uint32_t i, uint32_t off)
{
    size_t width = (size_t)a->n_heads * a->head_dim;
    const uint16_t *in = (const uint16_t *)all + i * width;
    const kvk_encode_args code = {.in = {in, width * 2u, KVK_BF16},
                                  .n = 1,
                                  .n_heads = a->n_heads,
                                  .dims = a->head_dim,
                                  .dtype = a->dtype,
                                  .out = (uint8_t *)a->out + (size_t)i * a->row_bytes + off,
                                  .out_stride_bytes =
                                      kvk_slice_bytes(a->dtype, a->n_heads, a->head_dim)};
    return fake_cuda_all_finite(in, width, NULL) ? cuda->ops->encode(cuda->be, &code, NULL)
                                                 : KVC_OK;
}

FAKE_CUDA_OP(finite)
{
    const kvk_cuda_finite_args *a = args;
    (void)cuda;
    (void)fake_cuda_all_finite(a->in, a->len_bytes / sizeof(uint16_t), a->bad);
    return KVC_OK;
}

FAKE_CUDA_OP(encode)
{
    const kvk_cuda_encode_args *a = args;
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < a->n; i++) {
        st = code_slice(cuda, a, a->k, i, a->k_off_bytes);
        if (st == KVC_OK)
            st = code_slice(cuda, a, a->v, i, a->v_off_bytes);
    }
    return st;
}

kvc_status fake_cuda_query_heads(kvk_cuda *cuda, const kvk_cuda_query_args *a, uint32_t seq)
{
    kvc_status st = KVC_OK;
    for (uint32_t h = 0; st == KVC_OK && h < a->n_q_heads; h++) {
        size_t head = (size_t)seq * a->n_q_heads + h, kv_head = h / (a->n_q_heads / a->n_kv_heads);
        st = fake_cuda_project(cuda, a->q + head * a->head_dim, KVK_F32, 1, a->head_dim,
                               a->proj + kv_head * a->head_dim * a->dims, a->dims,
                               a->out + head * a->dims);
    }
    return st;
}

FAKE_CUDA_OP(query)
{
    const kvk_cuda_query_args *a = args;
    uint32_t inputs = a->n_kv_heads * a->head_dim, width = a->n_q_heads * a->head_dim;
    float *sum = malloc(inputs * sizeof(float));
    kvc_status st = sum == NULL ? KVC_NO_MEMORY : KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && a->per_head && i < a->n_seqs; i++)
        st = fake_cuda_query_heads(cuda, a, i);
    for (uint32_t i = 0; st == KVC_OK && !a->per_head && i < a->n_seqs; i++) {
        const kvk_group_sum_args group = {
            .in = {a->q + (size_t)i * width, width * sizeof(float), KVK_F32},
            .n = 1,
            .n_q_heads = a->n_q_heads,
            .n_kv_heads = a->n_kv_heads,
            .head_dim = a->head_dim,
            .out = sum};
        st = cuda->ops->group_sum(cuda->be, &group, NULL);
        if (st == KVC_OK)
            st = fake_cuda_project(cuda, sum, KVK_F32, 1, inputs, a->proj, a->dims,
                                   a->out + (size_t)i * a->dims);
    }
    free(sum);
    return st;
}

size_t kvk_cuda_select_many_workspace_bytes(const kvk_cuda_select_many_args *args)
{
    return args->rows_max * 3ul * sizeof(float);
}

/* Folds one query's scores into out. */
static kvc_status fold_query(kvk_cuda *cuda, const kvk_cuda_select_many_args *a, uint32_t query,
                             float *scores, float *out)
{
    float most = -INFINITY;
    uint32_t n = a->cands->n_rows;
    const kvk_score_index_args score = {.q = a->q + (size_t)query * a->dims,
                                        .m = 1,
                                        .n_q_heads = 1,
                                        .n_kv_heads = 1,
                                        .dims = a->dims,
                                        .index = a->cands->index,
                                        .index_stride_bytes = kvk_index_row_bytes(1, a->dims),
                                        .n = n,
                                        .out = scores,
                                        .out_stride = n};
    const kvk_row_max_args max = {.scores = scores, .stride = n, .m = 1, .n = n, .row_max = &most};
    const kvk_chunk_fold_args fold = {
        .scores = scores, .stride = n, .m = 1, .n = n, .row_max = &most, .out = out};
    kvc_status st = cuda->ops->score_index(cuda->be, &score, NULL);
    if (st == KVC_OK)
        st = cuda->ops->row_max(cuda->be, &max, NULL);
    return st == KVC_OK ? cuda->ops->chunk_fold(cuda->be, &fold, NULL) : st;
}

FAKE_CUDA_OP(select_many)
{
    const kvk_cuda_select_many_args *a = args;
    uint32_t n = a->cands->n_rows;
    float *folded = a->workspace, *scores = folded + a->rows_max, *wide = scores + a->rows_max;
    kvc_status st = n > a->rows_max ? KVC_INVALID : KVC_OK;
    const kvk_window_max_args window = {.in = folded, .n = n, .eps = a->eps, .out = wide};
    kvk_topk_args top = {.scores = a->eps != 0 ? wide : folded,
                         .n = n,
                         .k = a->k,
                         .base = a->cands->base,
                         .ids = a->picks,
                         .n_out_p = a->n_picks};
    for (uint32_t i = 0; st == KVC_OK && i < n; i++)
        folded[i] = -INFINITY;
    for (uint32_t i = 0; st == KVC_OK && i < a->n_q; i++)
        st = fold_query(cuda, a, i, scores, folded);
    if (st == KVC_OK && a->eps != 0)
        st = cuda->ops->window_max(cuda->be, &window, NULL);
    top.workspace_bytes = kvk_topk_workspace_bytes(n, a->k);
    top.workspace = malloc(top.workspace_bytes + 1u);
    if (st == KVC_OK)
        st = cuda->ops->topk(cuda->be, &top, NULL);
    free(top.workspace);
    return st;
}

FAKE_CUDA_OP(gather)
{
    const kvk_cuda_gather_args *a = args;
    (void)cuda;
    fake_cuda_announce();
    for (uint32_t i = 0; i < *a->n_list; i++) {
        if (a->fetch[i] == KVK_CUDA_RESIDENT || a->list[i] < 0)
            continue;
        const uint8_t *row = fake_cuda_source_row(a->source, a->fetch[i], a->row_bytes);
        if (row == NULL)
            continue;
        memcpy((uint8_t *)a->res->slots + (size_t)a->list[i] * a->row_bytes, row, a->row_bytes);
        fake_cuda_count_row();
    }
    return KVC_OK;
}

size_t kvk_cuda_prefill_workspace_bytes(const kvk_cuda_prefill_args *args)
{
    return args->stride * (sizeof(void *) + sizeof(int32_t)) + args->n_q * sizeof(uint32_t);
}

/* Two tiles of 64 keys, K and V, in one piece or two. */
kvc_status kvk_cuda_prefill_supports(const kvk_cuda *cuda, const kvk_cuda_prefill_args *args)
{
    uint32_t tile_bytes = 64u * (args->head_dim * 2u + 16u);
    (void)cuda;
    return (args->fast ? 4u : 8u) * tile_bytes <= fake_cuda_shared_bytes() ? KVC_OK
                                                                           : KVC_UNSUPPORTED;
}

/* Lists without a chunk of their own. */
FAKE_CUDA_OP(prefill)
{
    const kvk_cuda_prefill_args *a = args;
    const void **rows = a->workspace;
    int32_t *pos = (int32_t *)(void *)(rows + a->stride);
    uint32_t *visible = (uint32_t *)(pos + a->stride), n = 0, listed = *a->n_list;
    if (a->own == KVK_CUDA_OWN_CHUNK || listed > a->stride ||
        a->workspace_bytes < kvk_cuda_prefill_workspace_bytes(a))
        return KVC_INVALID;
    if (kvk_cuda_prefill_supports(cuda, a) != KVC_OK)
        return KVC_UNSUPPORTED;
    for (uint32_t i = 0; i < listed; i++) {
        uint32_t after = listed - i - 1u; /* the first query that sees it has so many behind it */
        for (uint32_t q = 0; q < a->n_q && a->own == KVK_CUDA_OWN_LISTED; q++)
            visible[q] = after == a->n_q - 1u - q ? n + (a->list[i] >= 0) : visible[q];
        if (a->list[i] < 0)
            continue;
        pos[n] = a->k_positions != NULL ? a->k_positions[i] : 0;
        rows[n++] = (const uint8_t *)a->res->slots + (size_t)a->list[i] * a->row_bytes;
    }
    bool rotates = a->k_positions != NULL && a->inv_freq != NULL;
    const kvk_attend_args attend = {.q = a->q,
                                    .n_q = a->n_q,
                                    .n_q_heads = a->n_q_heads,
                                    .n_kv_heads = a->n_kv_heads,
                                    .head_dim = a->head_dim,
                                    .rows = rows,
                                    .n_kv = n,
                                    .k_off_bytes = a->k_off_bytes,
                                    .v_off_bytes = a->v_off_bytes,
                                    .dtype = a->dtype,
                                    .k_positions = rotates ? pos : NULL,
                                    .inv_freq = rotates ? a->inv_freq : NULL,
                                    .visible = a->own == KVK_CUDA_OWN_LISTED ? visible : NULL,
                                    .scale = a->scale,
                                    .softcap = a->softcap,
                                    .o = a->o,
                                    .lse = a->lse};
    return cuda->ops->attend(cuda->be, &attend, NULL);
}

static kvc_status run_merge(kvk_cuda *cuda, const void *args)
{
    return cuda->ops->merge(cuda->be, args, NULL);
}

kvc_status kvk_cuda_merge(kvk_cuda *cuda, const kvk_merge_args *args, kvk_stream *stream)
{
    return fake_cuda_enqueue(cuda, stream, run_merge, args, sizeof(*args));
}
