/*
 * gpu_attend.c: see gpu_attend.h.
 *
 * A lane belongs to whoever took it. Rows are read where they are and kept in a slab of the
 * device's for the length of a kernel, a piece of the group at a time, whose partials are merged
 * there. Everything a group needs (addresses, positions, queries) is laid out in pinned memory and
 * copied at once to the same place of a device buffer; results come back in one copy. A lane's
 * buffer has what goes in, the results, and as much again for partials that are merged into them:
 * those of pieces, one at a time, in the device's, and the host's in pinned memory. Invariants:
 * a lane that is free has nothing enqueued; n_busy lanes are taken.
 */
#include "gpu_attend.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "gpu_pins.h"
#include "tier_registry.h"

#define N_LANES    4u
#define IN_BYTES   ((size_t)4 << 20)    /* queries, and a dozen bytes a row */
#define OUT_BYTES  ((size_t)2304 << 10) /* results in f32: of half as many bytes of bf16, 1 MiB */
#define ROOM_BYTES (IN_BYTES + 2 * OUT_BYTES)
#define SLAB_BYTES ((size_t)16 << 20) /* rows of a piece */
#define WORK_BYTES ((size_t)16 << 20) /* what the kernels need beside them */
#define PIECE_ROWS 8192u              /* at most */
#define TILE       16u                /* pieces are of whole ones */
#define LINE       64u

struct kvs_gpu_lane {
    kvs_gpu_attender *attender;
    kvk_stream *stream;
    uint8_t *host;        /* pinned [ROOM_BYTES] */
    uint8_t *device;      /* [ROOM_BYTES] */
    uint8_t *slab, *work; /* device */
    size_t in_bytes, out_bytes;
    bool busy, dirty; /* dirty: something was enqueued since the last wait */
};

struct kvs_gpu_attender {
    kvk_cuda *cuda;
    kvsi_gpu_pins pins;
    uint32_t *numbers; /* device [PIECE_ROWS] 0, 1, ...: slots and positions of any piece */
    kvc_mutex lock;    /* rank LEAF; guards busy of the lanes */
    kvc_cond free;
    kvs_gpu_lane lanes[N_LANES];
};

static size_t lines(size_t len_bytes)
{
    return (len_bytes + LINE - 1) / LINE * LINE;
}

/* ---- shapes ---------------------------------------------------------------------------------- */

/* How a group goes over the device. */
typedef struct shape {
    bool single;         /* one query: kvk_cuda_attend, else kvk_cuda_prefill */
    uint32_t piece_rows; /* 0: it does not */
    size_t numbers, heads;
} shape;

static kvk_cuda_attend_args attend_args(const kvs_gpu_group *g, uint32_t stride)
{
    const kvk_attend_args *a = &g->attend;
    bool rotated = a->k_positions != NULL && a->inv_freq != NULL;
    return (kvk_cuda_attend_args){
        .n_seqs = 1,
        .n_q_heads = a->n_q_heads,
        .n_kv_heads = a->n_kv_heads,
        .head_dim = a->head_dim,
        .stride = stride,
        .row_bytes = g->row_bytes,
        .k_off_bytes = (uint32_t)a->k_off_bytes,
        .v_off_bytes = (uint32_t)a->v_off_bytes,
        .dtype = a->dtype,
        .k_positions = rotated ? a->k_positions : NULL,
        .inv_freq = rotated ? a->inv_freq : NULL,
        .scale = a->scale,
        .softcap = a->softcap,
    };
}

static kvk_cuda_prefill_args prefill_args(const kvs_gpu_group *g, uint32_t stride)
{
    const kvk_attend_args *a = &g->attend;
    return (kvk_cuda_prefill_args){
        .n_seqs = 1,
        .n_q = a->n_q,
        .n_q_heads = a->n_q_heads,
        .n_kv_heads = a->n_kv_heads,
        .head_dim = a->head_dim,
        .stride = stride,
        .own = KVK_CUDA_OWN_NONE,
        .row_bytes = g->row_bytes,
        .k_off_bytes = (uint32_t)a->k_off_bytes,
        .v_off_bytes = (uint32_t)a->v_off_bytes,
        .dtype = a->dtype,
        .scale = a->scale,
        .softcap = a->softcap,
    };
}

static size_t work_bytes(const kvs_gpu_group *g, bool single, uint32_t n)
{
    const kvk_attend_args *a = &g->attend;
    const kvk_cuda_prefill_args args = prefill_args(g, n);
    return single ? kvk_cuda_attend_workspace_bytes(1, n, a->n_q_heads, a->head_dim)
                  : kvk_cuda_prefill_workspace_bytes(&args);
}

static bool takes(const kvs_gpu_group *g)
{
    const kvk_attend_args *a = &g->attend;
    size_t slice = kvk_slice_bytes(a->dtype, a->n_kv_heads, a->head_dim);
    return (a->dtype == KVK_BF16 || a->dtype == KVK_F16 || kvk_is_coded(a->dtype)) &&
           (a->head_dim == 64 || a->head_dim == 128) && g->row_bytes % 16 == 0 &&
           a->k_off_bytes % 16 == 0 && a->v_off_bytes % 16 == 0 &&
           a->k_off_bytes + slice <= g->row_bytes && a->v_off_bytes + slice <= g->row_bytes;
}

static shape shape_of(const kvs_gpu_attender *attender, const kvs_gpu_group *g)
{
    const kvk_attend_args *a = &g->attend;
    const kvk_cuda_attend_args args = attend_args(g, TILE);
    const kvk_cuda_prefill_args several = prefill_args(g, TILE);
    size_t heads = (size_t)a->n_q * a->n_q_heads;
    shape s = {.heads = heads, .numbers = heads * a->head_dim};
    if (!takes(g))
        return s;
    s.single = a->n_q == 1 && kvk_cuda_attend_supports(attender->cuda, &args) == KVC_OK;
    if (!s.single && kvk_cuda_prefill_supports(attender->cuda, &several) != KVC_OK)
        return s;
    size_t n = SLAB_BYTES / g->row_bytes;
    n = (n < PIECE_ROWS ? n : PIECE_ROWS) / TILE * TILE;
    while (n >= TILE && work_bytes(g, s.single, (uint32_t)n) > WORK_BYTES)
        n = n / 2 / TILE * TILE;
    s.piece_rows = (uint32_t)n;
    return s;
}

static uint32_t pieces_of(const shape *s, uint32_t n_rows)
{
    return (n_rows + s->piece_rows - 1) / s->piece_rows;
}

/* What one piece is told; of each a line. */
typedef struct piece_words {
    kvk_cuda_residency slab;
    kvk_cuda_source source;
    uint32_t n;
} piece_words;

static size_t in_bytes_of(const shape *s, const kvk_attend_args *a)
{
    size_t piece = lines(sizeof(piece_words));
    return lines(a->n_kv * sizeof(void *)) + lines(a->n_kv * sizeof(int32_t)) +
           lines(a->head_dim / 2u * sizeof(double)) + lines(s->numbers * sizeof(float)) +
           pieces_of(s, a->n_kv) * piece;
}

/* Of one partial. */
static size_t partial_bytes(size_t numbers, size_t heads)
{
    return lines(numbers * sizeof(float)) + lines(heads * sizeof(float));
}

static bool op_room(const kvs_gpu_attender *attender, const kvs_gpu_group *g, kvs_gpu_room *room_p)
{
    shape s = shape_of(attender, g);
    if (s.piece_rows == 0 || g->attend.n_kv == 0)
        return false;
    *room_p = (kvs_gpu_room){in_bytes_of(&s, &g->attend), partial_bytes(s.numbers, s.heads)};
    return true;
}

/* ---- a group --------------------------------------------------------------------------------- */

/* Places in the lane: the same offset in host and device memory. */
static size_t carve(size_t *at, size_t len_bytes)
{
    size_t off = *at;
    *at += lines(len_bytes);
    return off;
}

/* Where the group's parts are in a lane. */
typedef struct layout {
    size_t rows, positions, inv_freq, q, words; /* of what goes in */
    size_t o, lse;                              /* a piece's are OUT_BYTES behind */
} layout;

static layout lay_out(kvs_gpu_lane *lane, const shape *s, const kvk_attend_args *a)
{
    layout l;
    size_t in = lane->in_bytes, out = IN_BYTES + lane->out_bytes;
    l.rows = carve(&in, a->n_kv * sizeof(void *));
    l.positions = carve(&in, a->n_kv * sizeof(int32_t));
    l.inv_freq = carve(&in, a->head_dim / 2u * sizeof(double));
    l.q = carve(&in, s->numbers * sizeof(float));
    l.words = carve(&in, pieces_of(s, a->n_kv) * lines(sizeof(piece_words)));
    l.o = carve(&out, s->numbers * sizeof(float));
    l.lse = carve(&out, s->heads * sizeof(float));
    return l;
}

/* What the device needs to know, into pinned memory, and on its way. */
static kvc_status send(kvs_gpu_lane *lane, const shape *s, const kvk_attend_args *a,
                       const layout *l)
{
    uint8_t *to = lane->host;
    size_t end = l->words;
    memcpy(to + l->rows, a->rows, a->n_kv * sizeof(void *));
    if (a->k_positions != NULL)
        memcpy(to + l->positions, a->k_positions, a->n_kv * sizeof(int32_t));
    if (a->inv_freq != NULL)
        memcpy(to + l->inv_freq, a->inv_freq, a->head_dim / 2u * sizeof(double));
    memcpy(to + l->q, a->q, s->numbers * sizeof(float));
    for (uint32_t first = 0; first < a->n_kv; first += s->piece_rows) {
        uint32_t n = a->n_kv - first < s->piece_rows ? a->n_kv - first : s->piece_rows;
        const piece_words words = {
            .slab = {.slots = lane->slab},
            .source = {.blocks =
                           (const void *const *)(const void *)(lane->device + l->rows) + first,
                       .n_blocks = n,
                       .block_tokens = 1},
            .n = n,
        };
        memcpy(to + end, &words, sizeof(words));
        end += lines(sizeof(words));
    }
    lane->dirty = true;
    return kvk_cuda_copy(lane->attender->cuda, lane->device + l->rows, to + l->rows, end - l->rows,
                         lane->stream);
}

/* One piece's rows and where its partial goes. */
typedef struct piece {
    uint32_t first, number, stride;
    float *o, *lse;
} piece;

static const piece_words *words_of(const kvs_gpu_lane *lane, const layout *l, const piece *p)
{
    return (const void *)(lane->device + l->words + p->number * lines(sizeof(piece_words)));
}

static kvc_status attend_single(kvs_gpu_lane *lane, const kvs_gpu_group *g, const layout *l,
                                const piece *p)
{
    const piece_words *words = words_of(lane, l, p);
    const uint32_t *numbers = lane->attender->numbers;
    kvk_cuda_attend_args args = attend_args(g, p->stride);
    args.q = (const float *)(const void *)(lane->device + l->q);
    args.list = (const int32_t *)(const void *)numbers;
    args.fetch = numbers;
    args.n_list = &words->n;
    args.res = &words->slab;
    args.source = &words->source;
    if (args.inv_freq != NULL) {
        args.k_positions = (const int32_t *)(const void *)(lane->device + l->positions) + p->first;
        args.inv_freq = (const double *)(const void *)(lane->device + l->inv_freq);
    }
    args.o = p->o;
    args.lse = p->lse;
    args.workspace = lane->work;
    args.workspace_bytes = WORK_BYTES;
    return kvk_cuda_attend(lane->attender->cuda, &args, lane->stream);
}

static kvc_status attend_several(kvs_gpu_lane *lane, const kvs_gpu_group *g, const layout *l,
                                 const piece *p)
{
    const piece_words *words = words_of(lane, l, p);
    const uint32_t *numbers = lane->attender->numbers;
    kvk_cuda *cuda = lane->attender->cuda;
    const kvk_cuda_gather_args gather = {
        .n_seqs = 1,
        .stride = p->stride,
        .list = (const int32_t *)(const void *)numbers,
        .fetch = numbers,
        .n_list = &words->n,
        .res = &words->slab,
        .source = &words->source,
        .row_bytes = g->row_bytes,
    };
    kvk_cuda_prefill_args args = prefill_args(g, p->stride);
    args.q = (const float *)(const void *)(lane->device + l->q);
    args.list = gather.list;
    args.n_list = gather.n_list;
    args.res = gather.res;
    if (g->attend.k_positions != NULL && g->attend.inv_freq != NULL) {
        args.k_positions = (const int32_t *)(const void *)(lane->device + l->positions) + p->first;
        args.inv_freq = (const double *)(const void *)(lane->device + l->inv_freq);
    }
    args.o = p->o;
    args.lse = p->lse;
    args.workspace = lane->work;
    args.workspace_bytes = WORK_BYTES;
    kvc_status status = kvk_cuda_gather(cuda, &gather, lane->stream);
    return status == KVC_OK ? kvk_cuda_prefill(cuda, &args, lane->stream) : status;
}

/* b, which the device reads, into the result at o and lse. */
static kvc_status merge(kvs_gpu_lane *lane, const shape *s, float *o, float *lse, const float *o_b,
                        const float *lse_b)
{
    const kvk_merge_args args = {.o_a = o,
                                 .lse_a = lse,
                                 .o_b = o_b,
                                 .lse_b = lse_b,
                                 .n = (uint32_t)s->heads,
                                 .dim = (uint32_t)(s->numbers / s->heads)};
    return kvk_cuda_merge(lane->attender->cuda, &args, lane->stream);
}

static kvc_status op_attend(kvs_gpu_lane *lane, const kvs_gpu_group *g, kvs_gpu_partial *partial_p)
{
    const kvk_attend_args *a = &g->attend;
    shape s = shape_of(lane->attender, g);
    memset(partial_p, 0, sizeof(*partial_p));
    if (s.piece_rows == 0 || a->n_kv == 0)
        return KVC_UNSUPPORTED;
    size_t in = in_bytes_of(&s, a), out = partial_bytes(s.numbers, s.heads);
    if (in > IN_BYTES - lane->in_bytes || out > OUT_BYTES - lane->out_bytes)
        return KVC_AGAIN;
    layout l = lay_out(lane, &s, a);
    float *o = (float *)(void *)(lane->device + l.o),
          *lse = (float *)(void *)(lane->device + l.lse);
    kvc_status status = send(lane, &s, a, &l);
    for (uint32_t i = 0; status == KVC_OK && i < pieces_of(&s, a->n_kv); i++) {
        uint32_t first = i * s.piece_rows, n = a->n_kv - first;
        piece p = {first, i, n < s.piece_rows ? (n + TILE - 1) / TILE * TILE : s.piece_rows, o,
                   lse};
        if (i > 0) {
            p.o = (float *)(void *)(lane->device + l.o + OUT_BYTES);
            p.lse = (float *)(void *)(lane->device + l.lse + OUT_BYTES);
        }
        status = s.single ? attend_single(lane, g, &l, &p) : attend_several(lane, g, &l, &p);
        if (status == KVC_OK && i > 0)
            status = merge(lane, &s, o, lse, p.o, p.lse);
    }
    if (status != KVC_OK)
        return status;
    *partial_p = (kvs_gpu_partial){.o = (const float *)(const void *)(lane->host + l.o),
                                   .lse = (const float *)(const void *)(lane->host + l.lse),
                                   .n = (uint32_t)s.heads,
                                   .dim = a->head_dim,
                                   .off_bytes = l.o};
    lane->in_bytes += in;
    lane->out_bytes += out;
    return KVC_OK;
}

static kvc_status op_add(kvs_gpu_lane *lane, const kvs_gpu_partial *partial, const float *o,
                         const float *lse)
{
    size_t numbers = (size_t)partial->n * partial->dim;
    const shape s = {.numbers = numbers, .heads = partial->n};
    size_t to_lse = partial->off_bytes + lines(numbers * sizeof(float));
    size_t mine = partial->off_bytes + OUT_BYTES;
    float *host_o = (float *)(void *)(lane->host + mine);
    float *host_lse = (float *)(void *)(lane->host + mine + lines(numbers * sizeof(float)));
    memcpy(host_o, o, numbers * sizeof(float));
    memcpy(host_lse, lse, partial->n * sizeof(float));
    return merge(lane, &s, (float *)(void *)(lane->device + partial->off_bytes),
                 (float *)(void *)(lane->device + to_lse), host_o, host_lse);
}

static kvc_status op_finish(kvs_gpu_lane *lane)
{
    kvk_cuda *cuda = lane->attender->cuda;
    size_t first = IN_BYTES;
    kvc_status status = KVC_OK;
    if (lane->out_bytes > 0)
        status = kvk_cuda_copy(cuda, lane->host + first, lane->device + first, lane->out_bytes,
                               lane->stream);
    if (status == KVC_OK)
        status = kvk_cuda_stream_sync(cuda, lane->stream);
    lane->dirty = lane->dirty && status != KVC_OK;
    return status;
}

/* ---- lanes ----------------------------------------------------------------------------------- */

static kvs_gpu_lane *op_take(kvs_gpu_attender *attender, bool wait, uint64_t until_ns)
{
    kvs_gpu_lane *found = NULL;
    kvc_mutex_lock(&attender->lock);
    for (;;) {
        for (uint32_t i = 0; found == NULL && i < N_LANES; i++)
            found = attender->lanes[i].busy ? NULL : &attender->lanes[i];
        if (found != NULL || !wait || (until_ns != 0 && kvc_expired(until_ns)))
            break;
        if (until_ns == 0)
            kvc_cond_wait(&attender->free, &attender->lock);
        else
            (void)!kvc_cond_wait_until(&attender->free, &attender->lock, until_ns);
    }
    if (found != NULL)
        found->busy = true;
    kvc_mutex_unlock(&attender->lock);
    return found;
}

static void op_give(kvs_gpu_lane *lane)
{
    kvs_gpu_attender *attender = lane->attender;
    if (lane->dirty) /* where it fails, nothing runs there any more */
        (void)!kvk_cuda_stream_sync(attender->cuda, lane->stream);
    lane->dirty = false;
    lane->in_bytes = lane->out_bytes = 0;
    kvc_mutex_lock(&attender->lock);
    lane->busy = false;
    kvc_cond_signal(&attender->free);
    kvc_mutex_unlock(&attender->lock);
}

static kvc_status take_memory(kvk_cuda *cuda, kvk_cuda_memory kind, size_t len_bytes, uint8_t **p)
{
    void *memory = NULL;
    kvc_status status = kvk_cuda_alloc(cuda, kind, len_bytes, &memory);
    *p = memory;
    return status;
}

static kvc_status open_lane(kvs_gpu_attender *attender, kvs_gpu_lane *lane)
{
    kvk_cuda *cuda = attender->cuda;
    lane->attender = attender;
    kvc_status status = take_memory(cuda, KVK_CUDA_PINNED, ROOM_BYTES, &lane->host);
    if (status == KVC_OK)
        status = take_memory(cuda, KVK_CUDA_DEVICE, ROOM_BYTES, &lane->device);
    if (status == KVC_OK)
        status = take_memory(cuda, KVK_CUDA_DEVICE, SLAB_BYTES, &lane->slab);
    if (status == KVC_OK)
        status = take_memory(cuda, KVK_CUDA_DEVICE, WORK_BYTES, &lane->work);
    return status == KVC_OK ? kvk_cuda_stream_create(cuda, &lane->stream) : status;
}

static void close_lane(kvs_gpu_attender *attender, kvs_gpu_lane *lane)
{
    kvk_cuda_stream_destroy(attender->cuda, lane->stream);
    kvk_cuda_free(attender->cuda, KVK_CUDA_PINNED, lane->host);
    kvk_cuda_free(attender->cuda, KVK_CUDA_DEVICE, lane->device);
    kvk_cuda_free(attender->cuda, KVK_CUDA_DEVICE, lane->slab);
    kvk_cuda_free(attender->cuda, KVK_CUDA_DEVICE, lane->work);
}

static void op_close(kvs_gpu_attender *attender)
{
    if (attender == NULL)
        return;
    kvsi_gpu_pins_fini(&attender->pins);
    for (uint32_t i = 0; i < N_LANES; i++)
        close_lane(attender, &attender->lanes[i]);
    kvk_cuda_free(attender->cuda, KVK_CUDA_DEVICE, attender->numbers);
    kvk_cuda_close(attender->cuda);
    kvc_cond_fini(&attender->free);
    kvc_mutex_fini(&attender->lock);
    free(attender);
}

/* 0, 1, ... by way of the first lane's pinned memory. */
static kvc_status count_up(kvs_gpu_attender *attender)
{
    const kvs_gpu_lane *lane = &attender->lanes[0];
    uint32_t *from = (uint32_t *)(void *)lane->host;
    uint8_t *to = NULL;
    kvc_status status =
        take_memory(attender->cuda, KVK_CUDA_DEVICE, PIECE_ROWS * sizeof(*from), &to);
    attender->numbers = (uint32_t *)(void *)to;
    for (uint32_t i = 0; i < PIECE_ROWS; i++)
        from[i] = i;
    if (status == KVC_OK)
        status = kvk_cuda_copy(attender->cuda, to, from, PIECE_ROWS * sizeof(*from), lane->stream);
    return status == KVC_OK ? kvk_cuda_stream_sync(attender->cuda, lane->stream) : status;
}

static kvc_status op_open(uint32_t device, uint64_t pin_bytes, uint64_t segment_bytes,
                          kvs_gpu_attender **attender_p)
{
    kvk_cuda *cuda;
    *attender_p = NULL;
    kvc_status status = kvk_cuda_open(device, &cuda);
    if (status != KVC_OK)
        return status;
    kvs_gpu_attender *attender = calloc(1, sizeof(*attender));
    if (attender == NULL) {
        kvk_cuda_close(cuda);
        return KVC_NO_MEMORY;
    }
    attender->cuda = cuda;
    kvc_mutex_init(&attender->lock, KVC_RANK_LEAF);
    kvc_cond_init(&attender->free);
    kvsi_gpu_pins_init(&attender->pins, cuda, pin_bytes, segment_bytes);
    for (uint32_t i = 0; status == KVC_OK && i < N_LANES; i++)
        status = open_lane(attender, &attender->lanes[i]);
    if (status == KVC_OK)
        status = count_up(attender);
    if (status != KVC_OK) {
        op_close(attender);
        return status;
    }
    *attender_p = attender;
    return KVC_OK;
}

static bool op_claim(kvs_gpu_attender *attender, uint32_t number, const void *base,
                     size_t len_bytes)
{
    return kvsi_gpu_pins_claim(&attender->pins, number, base, len_bytes);
}

static kvc_status op_settle(kvs_gpu_attender *attender, uint32_t number, bool pin)
{
    return kvsi_gpu_pins_settle(&attender->pins, number, pin);
}

static const void *op_find(kvs_gpu_attender *attender, uint32_t number, const void *row,
                           bool *may_claim_p)
{
    return kvsi_gpu_pins_find(&attender->pins, number, row, may_claim_p);
}

const kvs_gpu_attend_ops kvsi_gpu_attend_ops = {
    .open = op_open,
    .close = op_close,
    .room = op_room,
    .lane_room = {IN_BYTES, OUT_BYTES},
    .claim = op_claim,
    .settle = op_settle,
    .find = op_find,
    .take = op_take,
    .attend = op_attend,
    .add = op_add,
    .finish = op_finish,
    .give = op_give,
};
