/* fake_cuda.c: see fake_cuda.h. Ops run on the caller's thread; the counters are atomic. */
#include "fake_cuda_internal.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static atomic_bool absent;
static atomic_uint ops_left = UINT32_MAX, copies_left = UINT32_MAX;
static atomic_uint shared_bytes = 227u << 10;
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

void fake_cuda_shared(uint32_t bytes)
{
    atomic_store(&shared_bytes, bytes);
}

uint32_t fake_cuda_shared_bytes(void)
{
    return atomic_load(&shared_bytes);
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
    if (!fake_cuda_take(&copies_left))
        return KVC_DEVICE;
    memset(to, byte, len_bytes);
    return KVC_OK;
}

/* ---- the ops that the worker uses ---- */

bool fake_cuda_all_finite(const void *x, size_t n, uint32_t *bad)
{
    bool finite = true;
    for (size_t i = 0; i < n; i++)
        finite = finite && (((const uint16_t *)x)[i] & 0x7f80u) != 0x7f80u;
    if (!finite && bad != NULL)
        *bad = 1;
    return finite;
}

kvc_status fake_cuda_project(kvk_cuda *cuda, const void *x, kvk_dtype dtype, uint32_t heads,
                             uint32_t inputs, const float *proj, uint32_t dims, float *out)
{
    const kvk_project_args args = {.in = {x, (size_t)heads * inputs * sizeof(float), dtype},
                                   .n = 1,
                                   .n_heads = heads,
                                   .dim_in = inputs,
                                   .dim_out = dims,
                                   .proj = proj,
                                   .out = out};
    return cuda->ops->project(cuda->be, &args, NULL);
}

size_t kvk_cuda_select_workspace_bytes(uint32_t n_seqs, uint32_t rows_max)
{
    return (size_t)n_seqs * rows_max * 2u * sizeof(float) + FAKE_CUDA_TAG_BYTES;
}

static kvc_status select_one(kvk_cuda *cuda, const kvk_cuda_select_args *a, uint32_t seq)
{
    const kvk_cuda_candidates *c = a->cands + seq;
    uint32_t n = c->n_rows < a->rows_max ? c->n_rows : a->rows_max;
    float *scores = a->workspace, *wide = NULL;
    scores += FAKE_CUDA_TAG_BYTES / sizeof(*scores);
    wide = scores + a->rows_max;
    const kvk_score_index_args score = {.q = a->q + (size_t)seq * a->dims,
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
                         .ids = a->picks + (size_t)seq * a->k,
                         .n_out_p = a->n_picks + seq};
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

bool fake_cuda_is_clean(void *workspace, uint32_t n_seqs)
{
    uint32_t *tag = workspace;
    bool clean = *tag == 0 || *tag == n_seqs;
    *tag = n_seqs;
    return clean;
}

FAKE_CUDA_OP(select)
{
    const kvk_cuda_select_args *a = args;
    kvc_status st = fake_cuda_is_clean(a->workspace, a->n_seqs) ? KVC_OK : KVC_INVALID;
    for (uint32_t s = 0; st == KVC_OK && s < a->n_seqs; s++)
        st = select_one(cuda, a, s);
    return st;
}

#define AGAIN_MAX 3u /* as kvk_cuda_resolve says */

/* How often the row of a slot was picked again, once it is. */
static uint32_t again_of(uint32_t used)
{
    return used % 4u < AGAIN_MAX ? used % 4u + 1u : AGAIN_MAX;
}

/* 0: used in this step. */
static uint32_t age_of(uint32_t used, uint32_t step)
{
    uint32_t since = step - used / 4u, age = since + 4u * (AGAIN_MAX - used % 4u);
    return used == 0 || age > 1023 ? 1023 : since == 0 ? 0 : age;
}

/* The slot that is empty or the oldest, the lowest of them. */
static uint32_t victim(const kvk_cuda_residency *r, uint32_t first, uint32_t n, uint32_t step)
{
    uint32_t best = first, most = 0;
    for (uint32_t s = first; s < n; s++) {
        uint32_t age = age_of(r->used[s], step);
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

static void resolve_one(const kvk_cuda_resolve_args *a, uint32_t seq)
{
    const kvk_cuda_residency *r = a->res + seq;
    const uint32_t *picks = a->picks + (size_t)seq * a->k;
    int32_t *list = a->list + (size_t)seq * a->stride + a->off;
    uint32_t *fetch = a->fetch + (size_t)seq * a->stride + a->off;
    uint32_t step = ++*r->step, n = a->n_picks[seq];
    a->n_misses[seq] = 0;
    for (uint32_t i = 0; i < n; i++) {
        int32_t slot = r->slot_of[picks[i]];
        if (slot >= 0)
            r->used[slot] = 4u * step + again_of(r->used[slot]);
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t pos = picks[i], slot = (uint32_t)r->slot_of[pos];
        fetch[i] = KVK_CUDA_RESIDENT;
        if (r->slot_of[pos] < 0) {
            slot = victim(r, a->n_pinned, a->n_slots, step);
            leave(r, slot);
            r->pos_of[slot] = pos;
            r->slot_of[pos] = (int32_t)slot;
            r->used[slot] = 4u * step;
            fetch[i] = pos;
            ++a->n_misses[seq];
        }
        list[i] = (int32_t)slot;
    }
    a->n_list[seq] = a->off + n;
}

FAKE_CUDA_OP(resolve)
{
    const kvk_cuda_resolve_args *a = args;
    (void)cuda;
    for (uint32_t s = 0; s < a->n_seqs; s++)
        resolve_one(a, s);
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

/* Rows a little apart from each other. */
kvc_status kvk_cuda_attend_supports(const kvk_cuda *cuda, const kvk_cuda_attend_args *args)
{
    (void)cuda;
    return 16u * (args->row_bytes + 16u) <= fake_cuda_shared_bytes() ? KVC_OK : KVC_UNSUPPORTED;
}

/* The listed rows of a sequence that are there; their number. */
static uint32_t list_rows(const kvk_cuda_attend_args *a, uint32_t seq, const void **rows,
                          int32_t *pos)
{
    size_t first = (size_t)seq * a->stride;
    uint32_t n = 0;
    for (size_t i = first; i < first + a->n_list[seq]; i++) {
        if (a->list[i] < 0)
            continue;
        uint8_t *slot = (uint8_t *)a->res[seq].slots + (size_t)a->list[i] * a->row_bytes;
        if (a->fetch != NULL && a->fetch[i] != KVK_CUDA_RESIDENT) {
            const uint8_t *row = fake_cuda_source_row(a->source + seq, a->fetch[i], a->row_bytes);
            if (row == NULL)
                continue;
            memcpy(slot, row, a->row_bytes);
            fake_cuda_count_row();
        }
        pos[n] = a->k_positions != NULL ? a->k_positions[i] : 0;
        rows[n++] = slot;
    }
    return n;
}

static uint32_t near_rows(const kvk_cuda_attend_args *a, uint32_t seq, const void **rows,
                          int32_t *pos)
{
    const kvk_cuda_near *near = &a->near;
    uint32_t n = near->n_max == 0 ? 0 : near->n[seq];
    for (uint32_t i = 0; i < n; i++) {
        pos[i] = (int32_t)i;
        rows[i] = (const uint8_t *)near->ring[seq].slots +
                  (size_t)((near->first[seq] + i) % near->ring_rows) * a->row_bytes;
    }
    return n;
}

static kvc_status attend_rows(kvk_cuda *cuda, const kvk_cuda_attend_args *a, const float *q,
                              const void **rows, const int32_t *pos, const double *inv_freq,
                              uint32_t n, float *o, float *lse)
{
    const kvk_attend_args attend = {.q = q,
                                    .n_q = 1,
                                    .n_q_heads = a->n_q_heads,
                                    .n_kv_heads = a->n_kv_heads,
                                    .head_dim = a->head_dim,
                                    .rows = rows,
                                    .n_kv = n,
                                    .k_off_bytes = a->k_off_bytes,
                                    .v_off_bytes = a->v_off_bytes,
                                    .dtype = a->dtype,
                                    .k_positions = inv_freq == NULL ? NULL : pos,
                                    .inv_freq = inv_freq,
                                    .scale = a->scale,
                                    .softcap = a->softcap,
                                    .o = o,
                                    .lse = lse};
    return cuda->ops->attend(cuda->be, &attend, NULL);
}

static kvc_status attend_one(kvk_cuda *cuda, const kvk_cuda_attend_args *a, uint32_t seq)
{
    uint32_t heads = a->n_q_heads, n = 0;
    size_t width = (size_t)heads * a->head_dim;
    const void **rows = a->workspace;
    int32_t *pos = (int32_t *)(void *)(rows + a->stride + a->near.n_max);
    float *o = malloc(2u * (width + heads) * sizeof(float)), *lse = o + width;
    float *o_near = lse + heads, *lse_near = o_near + width;
    n = list_rows(a, seq, rows, pos);
    kvc_status st = attend_rows(cuda, a, a->q + seq * width, rows, pos,
                                a->k_positions == NULL ? NULL : a->inv_freq, n, o, lse);
    if (st == KVC_OK && a->near.n_max != 0) {
        n = near_rows(a, seq, rows, pos);
        st = attend_rows(cuda, a, a->near.q + seq * width, rows, pos, a->near.inv_freq, n, o_near,
                         lse_near);
        const kvk_merge_args merge = {.o_a = o,
                                      .lse_a = lse,
                                      .o_b = o_near,
                                      .lse_b = lse_near,
                                      .n = heads,
                                      .dim = a->head_dim};
        if (st == KVC_OK)
            st = cuda->ops->merge(cuda->be, &merge, NULL);
    }
    float *to_lse = a->result.out != NULL ? a->result.lse : a->lse;
    if (a->result.out != NULL)
        kvk_from_f32(o, width, a->result.dtype, (uint8_t *)a->result.out + seq * width * 2u);
    else
        memcpy(a->o + seq * width, o, width * sizeof(float));
    if (to_lse != NULL)
        memcpy(to_lse + (size_t)seq * heads, lse, heads * sizeof(float));
    free(o);
    return st;
}

FAKE_CUDA_OP(attend)
{
    const kvk_cuda_attend_args *a = args;
    kvc_status st = KVC_OK;
    for (uint32_t s = 0; a->resolve.k != 0 && s < a->n_seqs; s++)
        resolve_one(&a->resolve, s);
    for (uint32_t s = 0; st == KVC_OK && s < a->n_seqs; s++)
        st = attend_one(cuda, a, s);
    if (st == KVC_OK && a->result.counts != NULL)
        *a->result.done = ++a->result.counts[1];
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
