/*
 * cuda_retrieve.c: a retriever on the device: scores, top-k and weights, the chosen chunks' rows,
 * attention over them.
 *
 * Runs on the sequence's thread; all that a retriever enqueues goes to the sequence's stream. The
 * retriever's slab, where block buffers and fetches leave rows, is pinned and is the staging: a
 * slot that is fresh is copied to the slot of the same number here when it is first attended. A
 * choice waits for the device once, so what the host writes for a choice or reads of it (`io`, the
 * slab) is in nobody's use between it and the attention that follows. Attention waits where out is
 * host memory.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../retrieve.h"
#include "base/log.h"
#include "carve.h"
#include "state.h"

#define QUERIES_MAX 64u         /* attended at once */
#define PART_BYTES  (16u << 20) /* of the partials of so many, unless one query has more */

/* What the host tells the device of a choice. */
typedef struct choice_io {
    _Alignas(16) kvk_cuda_candidates cands;
    _Alignas(16) kvk_cuda_residency res;
    _Alignas(16) uint32_t n_list;
    _Alignas(16) uint32_t first_head;
} choice_io;

struct kvwi_device_retriever {
    void *memory, *pinned;
    uint32_t n_queries;  /* attended at once */
    uint32_t stride;     /* of lists that lie one behind the other: k, in whole 16 bytes */
    bool mapped, listed; /* the slab is; the chosen slots are on the device */
    /* device */
    uint8_t *slots; /* [k] chunks */
    choice_io *head;
    float *query, *q, *o, *lse, *out, *zero, *none;
    uint32_t *picks, *n_picks; /* picks, then scores, then weights */
    float *scores, *weights;
    int32_t *list; /* slots, -1: none; then their weights */
    float *list_weights;
    /* pinned: what the device's pieces of these names are copied from or to */
    choice_io *io;
    float *io_query, *io_q, *io_out, *io_zero, *io_none;
    uint32_t *io_picks;
    int32_t *io_list;
};

static uint32_t heads_of(const kvw_retriever *r)
{
    const kvw_opts *o = &r->seq->worker->opts;
    return o->n_q_heads / o->n_kv_heads * r->n_heads;
}

static size_t width_of(const kvw_retriever *r)
{
    return (size_t)heads_of(r) * r->seq->worker->opts.head_dim;
}

static kvk_cuda *cuda_of(const kvw_retriever *r)
{
    return r->seq->device->device->cuda;
}

static kvc_status copy(kvw_retriever *r, void *to, const void *from, size_t len_bytes)
{
    return kvk_cuda_copy(cuda_of(r), to, from, len_bytes, r->seq->device->stream);
}

/* ---- open and close ---- */

static void carve_device(kvwi_carver *c, const kvw_retriever *r, kvwi_device_retriever *d)
{
    const kvw_worker *w = r->seq->worker;
    size_t k = w->opts.k, rows = (size_t)d->n_queries * heads_of(r) * sizeof(float);
    size_t q = d->n_queries * width_of(r) * sizeof(float);
    d->slots = kvwi_carve(c, k * KVW_CHUNK_TOKENS * w->row_bytes);
    d->head = kvwi_carve(c, sizeof(*d->head));
    d->query = kvwi_carve(c, r->dim * sizeof(float));
    d->picks = kvwi_carve(c, 3u * d->stride * sizeof(uint32_t));
    d->n_picks = kvwi_carve(c, sizeof(uint32_t));
    d->list = kvwi_carve(c, 2u * d->stride * sizeof(uint32_t));
    d->q = kvwi_carve(c, q);
    d->out = kvwi_carve(c, q);
    d->o = kvwi_carve(c, k * q);
    d->lse = kvwi_carve(c, k * rows);
    d->zero = kvwi_carve(c, rows);
    d->none = kvwi_carve(c, rows);
    d->scores = (float *)(void *)d->picks + d->stride;
    d->weights = d->scores + d->stride;
    d->list_weights = (float *)(void *)d->list + d->stride;
}

static void carve_pinned(kvwi_carver *c, const kvw_retriever *r, kvwi_device_retriever *d)
{
    size_t rows = (size_t)d->n_queries * heads_of(r) * sizeof(float);
    size_t q = d->n_queries * width_of(r) * sizeof(float);
    d->io = kvwi_carve(c, sizeof(*d->io));
    d->io_query = kvwi_carve(c, r->dim * sizeof(float));
    d->io_picks = kvwi_carve(c, 3u * d->stride * sizeof(uint32_t));
    d->io_list = kvwi_carve(c, 2u * d->stride * sizeof(uint32_t));
    d->io_q = kvwi_carve(c, q);
    d->io_out = kvwi_carve(c, q);
    d->io_zero = kvwi_carve(c, rows);
    d->io_none = kvwi_carve(c, rows);
}

/* The slab is pinned, and what does not change is on the device. */
static kvc_status fill(kvw_retriever *r, kvwi_device_retriever *d)
{
    size_t rows = (size_t)d->n_queries * heads_of(r);
    for (size_t i = 0; i < rows; i++) {
        d->io_zero[i] = 0;
        d->io_none[i] = -INFINITY;
    }
    d->io->res.slots = d->slots;
    d->io->first_head = r->first_head;
    kvc_status st = kvwi_cuda_map(r->seq->device->device, r->slab, r->slab_bytes);
    d->mapped = st == KVC_OK;
    if (st == KVC_OK) {
        st = copy(r, d->zero, d->io_zero, rows * sizeof(float));
    }
    return st == KVC_OK ? copy(r, d->none, d->io_none, rows * sizeof(float)) : st;
}

kvc_status kvwi_cuda_retriever_open(kvw_retriever *r)
{
    size_t one = r->seq->worker->opts.k * width_of(r) * sizeof(float);
    kvwi_device_retriever *d = calloc(1, sizeof(*d));
    kvwi_carver memory = {0}, pinned = {0};
    if (d == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    r->device = d;
    if (r->dim % 4u != 0) {
        return kvwi_fail(KVC_UNSUPPORTED, "kv_head: a head's piece of a landmark must be of whole "
                                          "16 bytes where chunks are retrieved on cuda");
    }
    d->stride = (r->seq->worker->opts.k + 3u) / 4u * 4u;
    d->n_queries = one >= PART_BYTES ? 1u : kvwi_min_u32(QUERIES_MAX, PART_BYTES / (uint32_t)one);
    carve_device(&memory, r, d);
    carve_pinned(&pinned, r, d);
    kvc_status st = kvk_cuda_alloc(cuda_of(r), KVK_CUDA_DEVICE, memory.at, &d->memory);
    if (st == KVC_OK) {
        r->seq->device->device_bytes += memory.at;
        st = kvk_cuda_alloc(cuda_of(r), KVK_CUDA_PINNED, pinned.at, &d->pinned);
    }
    if (st != KVC_OK) {
        return kvwi_cuda_fail(st, "memory of a retriever");
    }
    memset(d->pinned, 0, pinned.at);
    memory = (kvwi_carver){.base = d->memory};
    pinned = (kvwi_carver){.base = d->pinned};
    carve_device(&memory, r, d);
    carve_pinned(&pinned, r, d);
    st = fill(r, d);
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "memory of a retriever");
}

void kvwi_cuda_retriever_close(kvw_retriever *r)
{
    kvwi_device_retriever *d = r->device;
    kvwi_carver memory = {0};
    if (d == NULL) {
        return;
    }
    if (kvwi_cuda_sync(r->seq) != KVC_OK) {
        KVC_LOG_WARN(WORKER, "a retriever ends and the device does not answer");
    }
    if (d->mapped) {
        kvwi_cuda_unmap(r->seq->device->device, r->slab);
    }
    if (d->memory != NULL) {
        carve_device(&memory, r, d);
        r->seq->device->device_bytes -= memory.at;
    }
    kvk_cuda_free(cuda_of(r), KVK_CUDA_DEVICE, d->memory);
    kvk_cuda_free(cuda_of(r), KVK_CUDA_PINNED, d->pinned);
    free(d);
    r->device = NULL;
}

/* ---- choose ---- */

/* Scores of the landmarks and their weights, on their way to io_picks. */
static kvc_status enqueue_choice(kvw_retriever *r, uint32_t n)
{
    const kvw_worker *w = r->seq->worker;
    kvwi_device_seq *s = r->seq->device;
    kvwi_device_retriever *d = r->device;
    const kvk_cuda_chunk_select_args select = {
        .n_seqs = 1,
        .dims = r->dim,
        .k = w->opts.k,
        .rows_max = n,
        .dtype = KVK_F32,
        .stride_bytes = (size_t)w->opts.landmark_dim * sizeof(float),
        .q = d->query,
        .cands = &d->head->cands,
        .picks = d->picks,
        .scores = d->scores,
        .n_picks = d->n_picks,
        .workspace = s->select_space,
        .workspace_bytes = s->select_bytes,
    };
    const kvk_chunk_weights_args weigh = {.scores = d->scores,
                                          .ids = d->picks,
                                          .n = 1,
                                          .k = w->opts.k,
                                          .fusion = w->selector->fusion,
                                          .scale = 1.0f / sqrtf((float)r->dim),
                                          .weights = d->weights};
    kvc_status st = kvk_cuda_chunk_select(cuda_of(r), &select, s->stream);
    if (st == KVC_OK) {
        st = kvk_cuda_chunk_weights(cuda_of(r), &weigh, s->stream);
    }
    return st == KVC_OK ? copy(r, d->io_picks, d->picks, 3u * (size_t)d->stride * sizeof(uint32_t))
                        : st;
}

/* The query and what it meets. */
static kvc_status enqueue_query(kvw_retriever *r, const float *query, uint32_t n)
{
    kvwi_device_retriever *d = r->device;
    const kvwi_device_marks *m = &r->seq->device->marks[r->layer];
    memcpy(d->io_query, query + r->dim_off, r->dim * sizeof(float));
    d->io->cands = (kvk_cuda_candidates){.index = m->rows + r->dim_off, .n_rows = n};
    kvc_status st = copy(r, d->query, d->io_query, r->dim * sizeof(float));
    return st == KVC_OK ? copy(r, d->head, d->io, sizeof(*d->io)) : st;
}

kvc_status kvwi_cuda_retriever_choose(kvw_retriever *r, const float *query, uint32_t n)
{
    kvwi_device_retriever *d = r->device;
    d->listed = false;
    kvc_status st = n == 0 ? KVC_OK : kvwi_cuda_marks(r->seq, r->layer, n);
    if (st == KVC_OK && n != 0) {
        st = enqueue_query(r, query, n);
        st = st == KVC_OK ? enqueue_choice(r, n) : st;
    }
    kvc_status synced = kvwi_cuda_sync(r->seq); /* also where it failed: see the top */
    st = st == KVC_OK ? synced : st;
    if (st != KVC_OK) {
        return st;
    }
    r->n = kvwi_min_u32(r->seq->worker->opts.k, n);
    memcpy(r->order_ids, d->io_picks, r->n * sizeof(*r->order_ids));
    memcpy(r->order_scores, d->io_picks + d->stride, r->n * sizeof(*r->order_scores));
    memcpy(r->order_w, d->io_picks + 2u * d->stride, r->n * sizeof(*r->order_w));
    r->seq->stats.steps_device++;
    return KVC_OK;
}

/* ---- attend ---- */

/* Rows that came since the choice before, and which slots count with what weight. */
static kvc_status list_chosen(kvw_retriever *r)
{
    const kvw_worker *w = r->seq->worker;
    kvwi_device_retriever *d = r->device;
    size_t bytes = KVW_CHUNK_TOKENS * w->row_bytes;
    float *weights = (float *)(void *)d->io_list + d->stride;
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; i < w->opts.k; i++) {
        d->io_list[i] = i < r->n ? (int32_t)r->slot[i] : -1;
        weights[i] = i < r->n ? r->weights[i] : 0;
    }
    for (uint32_t i = 0; st == KVC_OK && i < r->n; i++) {
        uint32_t s = r->slot[i];
        if (r->fresh[s] != 0) {
            st = copy(r, d->slots + s * bytes, r->slab + s * bytes, bytes);
            r->fresh[s] = st != KVC_OK;
        }
    }
    d->io->n_list = r->n;
    if (st == KVC_OK) {
        st = copy(r, d->head, d->io, sizeof(*d->io));
    }
    if (st == KVC_OK) {
        st = copy(r, d->list, d->io_list, 2u * (size_t)d->stride * sizeof(uint32_t));
    }
    d->listed = st == KVC_OK;
    return st;
}

static kvc_status enqueue_attend(kvw_retriever *r, const float *q, uint32_t n_q, float *out)
{
    const kvw_worker *w = r->seq->worker;
    kvwi_device_retriever *d = r->device;
    const kvk_cuda_chunk_attend_args attend = {
        .n_seqs = 1,
        .k = w->opts.k,
        .n_q = n_q,
        .n_q_heads = heads_of(r),
        .n_kv_heads = r->n_heads,
        .head_dim = w->opts.head_dim,
        .q = q,
        .list = d->list,
        .n_list = &d->head->n_list,
        .res = &d->head->res,
        .first_head = &d->head->first_head,
        .n_rows = KVW_CHUNK_TOKENS,
        .row_bytes = (uint32_t)w->row_bytes,
        .chunk_bytes = (uint32_t)(KVW_CHUNK_TOKENS * w->row_bytes),
        .v_off_bytes = (uint32_t)w->k_bytes,
        .dtype = w->opts.dtype,
        .scale = w->scale,
        .o = d->o,
        .lse = d->lse,
    };
    const kvk_cuda_chunk_fuse_args fuse = {.n_seqs = 1,
                                           .k = w->opts.k,
                                           .n = n_q * heads_of(r),
                                           .dim = w->opts.head_dim,
                                           .o = d->o,
                                           .lse = d->lse,
                                           .weights = d->list_weights,
                                           .out = out};
    kvc_status st = kvk_cuda_chunk_attend(cuda_of(r), &attend, r->seq->device->stream);
    return st == KVC_OK ? kvk_cuda_chunk_fuse(cuda_of(r), &fuse, r->seq->device->stream) : st;
}

/* The engine's memory is the host's: there and back, in f32. */
static kvc_status attend_host(kvw_retriever *r, const void *q, uint32_t n_q, void *out)
{
    const kvw_worker *w = r->seq->worker;
    kvwi_device_retriever *d = r->device;
    size_t width = width_of(r), len = n_q * width;
    const kvk_convert_args convert = {.in = {q, width * w->elem_bytes, w->opts.dtype},
                                      .n = n_q,
                                      .width = (uint32_t)width,
                                      .out = d->io_q};
    kvc_status st = w->ops->convert(w->be, &convert, NULL);
    if (st == KVC_OK) {
        st = copy(r, d->q, d->io_q, len * sizeof(float));
    }
    if (st == KVC_OK) {
        st = enqueue_attend(r, d->q, n_q, d->out);
    }
    if (st == KVC_OK) {
        st = copy(r, d->io_out, d->out, len * sizeof(float));
    }
    kvc_status synced = kvwi_cuda_sync(r->seq); /* io_q may be written again in any case */
    st = st == KVC_OK ? synced : st;
    if (st == KVC_OK) {
        kvk_from_f32(d->io_out, len, w->opts.dtype, out);
    }
    return st;
}

/* It is the device's: nothing waits. f32 as it lies, else widened before and rounded after. */
static kvc_status attend_device(kvw_retriever *r, const void *q, uint32_t n_q, void *out)
{
    const kvw_worker *w = r->seq->worker;
    kvwi_device_retriever *d = r->device;
    kvk_stream *stream = r->seq->device->stream;
    if (w->opts.dtype == KVK_F32) {
        return enqueue_attend(r, q, n_q, out);
    }
    const kvk_cuda_mean_args widen = {.in = q,
                                      .dtype = w->opts.dtype,
                                      .n_seqs = n_q,
                                      .n = 1, /* the mean of one row is that row */
                                      .width = (uint32_t)width_of(r),
                                      .out = d->q};
    const kvk_cuda_finish_args round = {.o_a = d->out,
                                        .lse_a = d->zero,
                                        .o_b = d->out, /* which counts nothing */
                                        .lse_b = d->none,
                                        .n = n_q * heads_of(r),
                                        .dim = w->opts.head_dim,
                                        .dtype = w->opts.dtype,
                                        .out = out};
    kvc_status st = kvk_cuda_mean(cuda_of(r), &widen, stream);
    if (st == KVC_OK) {
        st = enqueue_attend(r, d->q, n_q, d->out);
    }
    return st == KVC_OK ? kvk_cuda_finish(cuda_of(r), &round, stream) : st;
}

kvc_status kvwi_cuda_retriever_attend(kvw_retriever *r, const void *q, uint32_t n_q, void *out)
{
    const kvw_worker *w = r->seq->worker;
    size_t row = width_of(r) * w->elem_bytes;
    kvc_status st = r->device->listed ? KVC_OK : list_chosen(r);
    for (uint32_t done = 0; st == KVC_OK && done < n_q;) {
        uint32_t n = kvwi_min_u32(r->device->n_queries, n_q - done);
        const uint8_t *from = (const uint8_t *)q + done * row;
        uint8_t *to = (uint8_t *)out + done * row;
        st = w->opts.device_memory ? attend_device(r, from, n, to) : attend_host(r, from, n, to);
        done += n;
    }
    return st;
}
