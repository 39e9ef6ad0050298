/* fake_cuda.c: see fake_cuda.h. Ops run on the caller's thread; the counters are atomic. */
#include "fake_cuda_internal.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_OPS = 32, MAX_ARGS = 256 };

struct kvk_cuda_graph {
    uint32_t n;
    struct {
        fake_op *fn;
        _Alignas(16) uint8_t args[MAX_ARGS];
    } op[MAX_OPS];
};

struct kvk_stream {
    kvk_cuda_graph *captured; /* NULL: ops run at once */
    uint64_t n_enqueued;
};

static atomic_bool absent;
static atomic_uint ops_left = UINT32_MAX, copies_left = UINT32_MAX;
static atomic_ullong rows_read;
static void (*before_launch)(void *arg);
static void *before_arg;

void fake_cuda_absent(bool is_absent)
{
    atomic_store(&absent, is_absent);
}

void fake_cuda_ops(uint32_t n)
{
    atomic_store(&ops_left, n);
}

void fake_cuda_copies(uint32_t n)
{
    atomic_store(&copies_left, n);
}

bool fake_cuda_take(atomic_uint *counter)
{
    uint32_t n = atomic_load(counter);
    if (n != 0 && n != UINT32_MAX)
        atomic_fetch_sub(counter, 1);
    return n != 0;
}

bool fake_cuda_take_op(void)
{
    return fake_cuda_take(&ops_left);
}

void fake_cuda_before_launch(void (*fn)(void *arg), void *arg)
{
    before_launch = fn;
    before_arg = arg;
}

void fake_cuda_count_row(void)
{
    atomic_fetch_add(&rows_read, 1);
}

void fake_cuda_announce(void)
{
    if (before_launch != NULL)
        before_launch(before_arg);
}

kvk_stream *fake_cuda_stream(void)
{
    return calloc(1, sizeof(kvk_stream));
}

uint64_t fake_cuda_enqueued(const kvk_stream *stream)
{
    return stream->n_enqueued;
}

void fake_cuda_stream_free(kvk_stream *stream)
{
    free(stream);
}

uint64_t fake_cuda_rows_read(void)
{
    return atomic_load(&rows_read);
}

/* ---- device, memory, streams, graphs ---- */

kvc_status kvk_cuda_open(uint32_t device, kvk_cuda **cuda_p)
{
    const kvk_backend_opts opts = {.size_bytes = sizeof(opts), .n_threads = 1};
    *cuda_p = NULL;
    if (device > 0 || atomic_load(&absent))
        return KVC_UNSUPPORTED;
    kvk_cuda *cuda = calloc(1, sizeof(*cuda));
    if (cuda == NULL)
        return KVC_NO_MEMORY;
    kvc_status st = kvk_backend_open("cpu", &opts, &cuda->be);
    if (st != KVC_OK) {
        free(cuda);
        return st;
    }
    cuda->ops = kvk_backend_ops(cuda->be);
    *cuda_p = cuda;
    return KVC_OK;
}

void kvk_cuda_close(kvk_cuda *cuda)
{
    if (cuda != NULL)
        kvk_backend_close(cuda->be);
    free(cuda);
}

void kvk_cuda_describe(const kvk_cuda *cuda, kvk_cuda_info *info_p)
{
    (void)cuda;
    *info_p = (kvk_cuda_info){.name = "fake", .sm = 0, .n_multiprocessors = 1, .uuid = "fake"};
}

kvc_status kvk_cuda_copy(kvk_cuda *cuda, void *to, const void *from, size_t len_bytes,
                         kvk_stream *stream)
{
    (void)cuda;
    (void)stream;
    if (!fake_cuda_take(&copies_left))
        return KVC_DEVICE;
    if (len_bytes != 0)
        memcpy(to, from, len_bytes);
    return KVC_OK;
}

kvc_status kvk_cuda_fill(kvk_cuda *cuda, void *to, uint8_t byte, size_t len_bytes,
                         kvk_stream *stream)
{
    (void)cuda;
    (void)stream;
    memset(to, byte, len_bytes);
    return KVC_OK;
}

kvc_status kvk_cuda_stream_create(kvk_cuda *cuda, kvk_stream **stream_p)
{
    (void)cuda;
    *stream_p = calloc(1, sizeof(**stream_p));
    return *stream_p == NULL ? KVC_NO_MEMORY : KVC_OK;
}

void kvk_cuda_stream_destroy(kvk_cuda *cuda, kvk_stream *stream)
{
    (void)cuda;
    free(stream);
}

kvc_status kvk_cuda_stream_sync(kvk_cuda *cuda, kvk_stream *stream)
{
    (void)cuda;
    (void)stream;
    return KVC_OK;
}

kvc_status kvk_cuda_graph_begin(kvk_cuda *cuda, kvk_stream *stream)
{
    (void)cuda;
    stream->captured = calloc(1, sizeof(*stream->captured));
    return stream->captured == NULL ? KVC_NO_MEMORY : KVC_OK;
}

kvc_status kvk_cuda_graph_end(kvk_cuda *cuda, kvk_stream *stream, kvk_cuda_graph **graph_p)
{
    (void)cuda;
    *graph_p = stream->captured;
    stream->captured = NULL;
    return KVC_OK;
}

kvc_status kvk_cuda_graph_launch(kvk_cuda *cuda, kvk_cuda_graph *graph, kvk_stream *stream)
{
    kvc_status st = KVC_OK;
    fake_cuda_announce();
    if (stream != NULL)
        stream->n_enqueued++;
    for (uint32_t i = 0; st == KVC_OK && i < graph->n; i++)
        st = graph->op[i].fn(cuda, graph->op[i].args);
    return st;
}

void kvk_cuda_graph_destroy(kvk_cuda *cuda, kvk_cuda_graph *graph)
{
    (void)cuda;
    free(graph);
}

/* Now, or when the graph that the stream is captured into runs. */
kvc_status fake_cuda_enqueue(kvk_cuda *cuda, kvk_stream *stream, fake_op *fn, const void *args,
                             size_t len_bytes)
{
    kvk_cuda_graph *graph = stream == NULL ? NULL : stream->captured;
    if (!fake_cuda_take(&ops_left))
        return KVC_UNSUPPORTED;
    if (stream != NULL && graph == NULL)
        stream->n_enqueued++;
    if (graph == NULL)
        return fn(cuda, args);
    if (graph->n == MAX_OPS || len_bytes > MAX_ARGS)
        return KVC_INVALID;
    graph->op[graph->n].fn = fn;
    memcpy(graph->op[graph->n++].args, args, len_bytes);
    return KVC_OK;
}

/* ---- the ops that the worker uses, for one sequence ---- */

kvc_status fake_cuda_project(kvk_cuda *cuda, const void *x, kvk_dtype dtype, uint32_t inputs,
                             const float *proj, uint32_t dims, float *out)
{
    const kvk_project_args args = {.in = {x, inputs * sizeof(float), dtype},
                                   .n = 1,
                                   .n_heads = 1,
                                   .dim_in = inputs,
                                   .dim_out = dims,
                                   .proj = proj,
                                   .out = out};
    return cuda->ops->project(cuda->be, &args, NULL);
}

FAKE_CUDA_OP(token)
{
    const kvk_cuda_token_args *a = args;
    uint32_t inputs = a->n_heads * a->head_dim;
    float x[256];
    memcpy(a->row, a->k, inputs * 2u);
    memcpy((uint8_t *)a->row + inputs * 2u, a->v, inputs * 2u);
    if (a->copy != NULL)
        memcpy(a->copy, a->row, inputs * 4u);
    const kvk_quantize_args quantize = {.in = x,
                                        .n = 1,
                                        .n_heads = 1,
                                        .dims = a->dims,
                                        .out = a->index_row,
                                        .out_stride_bytes = kvk_index_row_bytes(1, a->dims)};
    kvc_status st = fake_cuda_project(cuda, a->k, KVK_BF16, inputs, a->proj, a->dims, x);
    return st == KVC_OK ? cuda->ops->quantize(cuda->be, &quantize, NULL) : st;
}

size_t kvk_cuda_select_workspace_bytes(uint32_t n_seqs, uint32_t rows_max)
{
    return (size_t)n_seqs * rows_max * 2u * sizeof(float);
}

FAKE_CUDA_OP(select)
{
    const kvk_cuda_select_args *a = args;
    const kvk_cuda_candidates *c = a->cands;
    uint32_t n = c->n_rows < a->rows_max ? c->n_rows : a->rows_max;
    float *scores = a->workspace, *wide = scores + a->rows_max;
    const kvk_score_index_args score = {.q = a->q,
                                        .m = 1,
                                        .n_q_heads = 1,
                                        .n_kv_heads = 1,
                                        .dims = a->dims,
                                        .index = c->index,
                                        .index_stride_bytes = kvk_index_row_bytes(1, a->dims),
                                        .n = n,
                                        .out = scores,
                                        .out_stride = n};
    const kvk_window_max_args window = {.in = scores, .n = n, .eps = a->eps, .out = wide};
    kvk_topk_args top = {.scores = a->eps != 0 ? wide : scores,
                         .n = n,
                         .k = a->k,
                         .base = c->base,
                         .ids = a->picks,
                         .n_out_p = a->n_picks};
    kvc_status st = cuda->ops->score_index(cuda->be, &score, NULL);
    if (st == KVC_OK && a->eps != 0)
        st = cuda->ops->window_max(cuda->be, &window, NULL);
    top.workspace_bytes = kvk_topk_workspace_bytes(n, a->k);
    top.workspace = malloc(top.workspace_bytes + 1u);
    if (st == KVC_OK)
        st = cuda->ops->topk(cuda->be, &top, NULL);
    free(top.workspace);
    return st;
}

/* The slot that is empty or was used longest ago, the lowest of them. */
static uint32_t victim(const kvk_cuda_residency *r, uint32_t first, uint32_t n, uint32_t step)
{
    uint32_t best = first, most = 0;
    for (uint32_t s = first; s < n; s++) {
        uint32_t age = r->used[s] == 0 || step - r->used[s] > 1023 ? 1023 : step - r->used[s];
        if (age > most) {
            most = age;
            best = s;
        }
    }
    return best;
}

/* A slot's row is no longer there; its position may have been set to -1 from outside. */
static void leave(const kvk_cuda_residency *r, uint32_t slot)
{
    uint32_t pos = r->pos_of[slot];
    if (pos < r->n_positions && r->slot_of[pos] == (int32_t)slot)
        r->slot_of[pos] = -1;
}

FAKE_CUDA_OP(resolve)
{
    const kvk_cuda_resolve_args *a = args;
    const kvk_cuda_residency *r = a->res;
    uint32_t step = ++*r->step, n = *a->n_picks;
    (void)cuda;
    *a->n_misses = 0;
    for (uint32_t i = 0; i < n; i++) {
        int32_t slot = r->slot_of[a->picks[i]];
        if (slot >= 0)
            r->used[slot] = step;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t pos = a->picks[i], slot = (uint32_t)r->slot_of[pos];
        a->fetch[a->off + i] = KVK_CUDA_RESIDENT;
        if (r->slot_of[pos] < 0) {
            slot = victim(r, a->n_pinned, a->n_slots, step);
            leave(r, slot);
            r->pos_of[slot] = pos;
            r->slot_of[pos] = (int32_t)slot;
            r->used[slot] = step;
            a->fetch[a->off + i] = pos;
            ++*a->n_misses;
        }
        a->list[a->off + i] = (int32_t)slot;
    }
    *a->n_list = a->off + n;
    return KVC_OK;
}

const uint8_t *fake_cuda_source_row(const kvk_cuda_source *s, uint32_t pos, uint32_t row_bytes)
{
    uint32_t block = pos / s->block_tokens;
    if (block >= s->n_blocks || s->blocks[block] == NULL)
        return NULL;
    return (const uint8_t *)s->blocks[block] + (size_t)(pos % s->block_tokens) * row_bytes;
}

size_t kvk_cuda_attend_workspace_bytes(uint32_t n_seqs, uint32_t stride, uint32_t n_q_heads,
                                       uint32_t head_dim)
{
    (void)n_q_heads;
    (void)head_dim;
    return (size_t)n_seqs * stride * (sizeof(void *) + sizeof(int32_t));
}

/* As on sm_90: rows a little apart from each other. */
kvc_status kvk_cuda_attend_supports(const kvk_cuda *cuda, const kvk_cuda_attend_args *args)
{
    (void)cuda;
    return 16u * (args->row_bytes + 16u) <= 232448u ? KVC_OK : KVC_UNSUPPORTED;
}

FAKE_CUDA_OP(attend)
{
    const kvk_cuda_attend_args *a = args;
    const void **rows = a->workspace;
    int32_t *pos = (int32_t *)(void *)(rows + a->stride);
    uint32_t n = 0;
    for (uint32_t i = 0; i < *a->n_list; i++) {
        if (a->list[i] < 0)
            continue;
        uint8_t *slot = (uint8_t *)a->res->slots + (size_t)a->list[i] * a->row_bytes;
        if (a->fetch != NULL && a->fetch[i] != KVK_CUDA_RESIDENT) {
            const uint8_t *row = fake_cuda_source_row(a->source, a->fetch[i], a->row_bytes);
            if (row == NULL)
                continue;
            memcpy(slot, row, a->row_bytes);
            fake_cuda_count_row();
        }
        pos[n] = a->k_positions != NULL ? a->k_positions[i] : 0;
        rows[n++] = slot;
    }
    bool rotates = a->k_positions != NULL && a->inv_freq != NULL;
    const kvk_attend_args attend = {.q = a->q,
                                    .n_q = 1,
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
                                    .scale = a->scale,
                                    .softcap = a->softcap,
                                    .o = a->o,
                                    .lse = a->lse};
    return cuda->ops->attend(cuda->be, &attend, NULL);
}

static kvc_status rotate(kvk_cuda *cuda, const kvk_cuda_frame_args *a, uint32_t position,
                         float *out)
{
    const kvk_rope_args rope = {.in = {a->q, a->n_q_heads * a->head_dim * 2u, a->dtype},
                                .n = 1,
                                .n_heads = a->n_q_heads,
                                .head_dim = a->head_dim,
                                .inv_freq = position == UINT32_MAX ? NULL : a->inv_freq,
                                .const_position = (int32_t)position,
                                .out = out};
    return out == NULL ? KVC_OK : cuda->ops->rope(cuda->be, &rope, NULL);
}

static kvc_status index_query(kvk_cuda *cuda, const kvk_cuda_frame_args *a)
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
    kvc_status st = rotate(cuda, a, a->score_raw ? UINT32_MAX : a->far_position, rotated);
    if (st == KVC_OK)
        st = cuda->ops->group_sum(cuda->be, &group, NULL);
    if (st == KVC_OK)
        st = fake_cuda_project(cuda, sum, KVK_F32, inputs, a->proj, a->dims, a->q_index);
    free(rotated);
    free(sum);
    return st;
}

FAKE_CUDA_OP(frame)
{
    const kvk_cuda_frame_args *a = args;
    uint32_t n = *a->n_tokens, near = n < a->n_recent + 1u ? n : a->n_recent + 1u;
    kvc_status st = a->q_index == NULL ? KVC_OK : index_query(cuda, a);
    if (st == KVC_OK)
        st = rotate(cuda, a, a->far_position, a->q_far);
    if (st == KVC_OK)
        st = rotate(cuda, a, near - 1u, a->q_near);
    for (uint32_t i = 0; a->near_list != NULL && i < near; i++)
        a->near_list[i] = (int32_t)((n - near + i) % a->ring_rows);
    if (a->n_near != NULL)
        *a->n_near = near;
    if (a->cands != NULL)
        *a->cands = (kvk_cuda_candidates){.index = (const uint8_t *)a->index +
                                                   (size_t)a->n_sink * a->index_row_bytes,
                                          .n_rows = n - near > a->n_sink ? n - near - a->n_sink : 0,
                                          .base = a->n_sink};
    if (a->expected != NULL && memcmp(a->q, a->expected, a->n_q_heads * a->head_dim * 2u) != 0)
        *a->differs_p = 1;
    return st;
}

FAKE_CUDA_OP(finish)
{
    const kvk_cuda_finish_args *a = args;
    size_t width = (size_t)a->n * a->dim;
    float *o = malloc((width + a->n) * sizeof(float)), *lse = o + width;
    memcpy(o, a->o_a, width * sizeof(float));
    memcpy(lse, a->lse_a, a->n * sizeof(float));
    const kvk_merge_args merge = {
        .o_a = o, .lse_a = lse, .o_b = a->o_b, .lse_b = a->lse_b, .n = a->n, .dim = a->dim};
    kvc_status st = cuda->ops->merge(cuda->be, &merge, NULL);
    kvk_from_f32(o, width, a->dtype, a->out);
    if (a->lse != NULL)
        memcpy(a->lse, lse, a->n * sizeof(float));
    free(o);
    return st;
}

FAKE_CUDA_OP(misses)
{
    const kvk_cuda_misses_args *a = args;
    (void)cuda;
    *a->n_far = 0;
    for (uint32_t i = 0; i < *a->n_list; i++) {
        if (a->fetch[i] == KVK_CUDA_RESIDENT ||
            fake_cuda_source_row(a->source, a->fetch[i], 1) != NULL)
            continue;
        a->miss_pos[*a->n_far] = a->fetch[i];
        a->fetch[i] = a->staged + (*a->n_far)++;
    }
    return KVC_OK;
}

FAKE_CUDA_OP(forget)
{
    const kvk_cuda_forget_args *a = args;
    const kvk_cuda_residency *r = a->res;
    (void)cuda;
    for (uint32_t i = 0; i < *a->n_list; i++) {
        if (a->list[i] < 0 || a->fetch[i] == KVK_CUDA_RESIDENT)
            continue;
        if (a->status != NULL &&
            (a->fetch[i] < a->staged || a->status[a->fetch[i] - a->staged] == 0))
            continue;
        uint32_t slot = (uint32_t)a->list[i];
        leave(r, slot);
        r->pos_of[slot] = UINT32_MAX;
        r->used[slot] = 0;
        a->list[i] = -1;
    }
    return KVC_OK;
}
