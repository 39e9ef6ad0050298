/*
 * cuda_batch.c: the steps of several sequences as one: one graph for each layer and number of
 * sequences, over lists of what the sequences have on the device.
 *
 * Runs on the thread that uses the batch, whose sequences are this thread's too. Sequences of a
 * batch enqueue on its stream until they part, which is when others are stepped, or one or the
 * batch is closed. One that has rows without an address, or attends everything, is blank in the
 * launch and stepped alone behind it, as is one whose map went away under it. Invariants: a
 * member's entries in the lanes are those of its memories' generation; after a launch each member
 * is settled, whatever became of the others; at most SIZES_MAX numbers of sequences have graphs.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "state.h"

/* Numbers of sequences whose graphs are kept; the one that was stepped longest ago goes first. */
#define SIZES_MAX 8u

typedef struct batch_layer {
    kvwi_lane lane;
    kvk_cuda_graph **graphs; /* [n_max + 1], by number of sequences */
} batch_layer;

struct kvwi_device_batch {
    kvw_worker *worker;
    kvk_stream *stream, *capture; /* as a sequence's */
    uint32_t n_max;
    void *slab, *pinned;
    void *frame_space, *attend_space, *select_space;
    size_t frame_bytes, attend_bytes, select_bytes;
    uint32_t rows_max;
    uint32_t n_cut; /* sequences that the spaces are cut for: other numbers find them dirty */
    batch_layer *layers;
    kvw_seq **members; /* [n_members] */
    uint32_t *generations;
    uint32_t n_members;
    bool *apart;       /* [n_members] of the step: not in the launch */
    uint64_t *stepped; /* [n_max + 1] when this number of sequences was last; 0: it has no graphs */
    uint64_t n_stepped;
    void *entries; /* host, of one list */
};

static kvk_cuda *cuda_of(const kvwi_device_batch *b)
{
    return b->worker->device->cuda;
}

/* ---- memory ---- */

static void drop_size(kvwi_device_batch *b, uint32_t n)
{
    for (uint32_t i = 0; b->stepped[n] != 0 && i < b->worker->opts.n_layers; i++) {
        kvk_cuda_graph_destroy(cuda_of(b), b->layers[i].graphs[n]);
        b->layers[i].graphs[n] = NULL;
    }
    b->stepped[n] = 0;
}

static void drop_graphs(kvwi_device_batch *b)
{
    for (uint32_t n = 0; b->stepped != NULL && n <= b->n_max; n++) {
        drop_size(b, n);
    }
}

/* Graphs of n sequences are about to be launched, or made: room for them. */
static void take_size(kvwi_device_batch *b, uint32_t n)
{
    uint32_t n_kept = 0, oldest = 0;
    for (uint32_t i = 0; i <= b->n_max; i++) {
        bool kept = b->stepped[i] != 0 && i != n;
        n_kept += kept;
        oldest =
            kept && (b->stepped[oldest] == 0 || b->stepped[i] < b->stepped[oldest]) ? i : oldest;
    }
    if (n_kept >= SIZES_MAX) {
        drop_size(b, oldest);
    }
    b->stepped[n] = ++b->n_stepped;
}

static void carve(kvwi_device_batch *b, kvwi_carver *fixed, kvwi_carver *pinned)
{
    for (uint32_t i = 0; i < b->worker->opts.n_layers; i++) {
        kvwi_carve_lane(fixed, b->worker, b->n_max, &b->layers[i].lane);
        kvwi_carve_lane_pinned(pinned, b->worker, b->n_max, &b->layers[i].lane);
    }
    b->frame_space = kvwi_carve(fixed, b->frame_bytes);
    b->attend_space = kvwi_carve(fixed, b->attend_bytes);
}

static kvc_status open_memory(kvwi_device_batch *b)
{
    const kvw_opts *o = &b->worker->opts;
    uint32_t rows = kvwi_stride(b->worker) + kvwi_near_max(b->worker) + 16u;
    kvwi_carver fixed = {0}, pinned = {0};
    b->attend_bytes = kvk_cuda_attend_workspace_bytes(b->n_max, rows, o->n_q_heads, o->head_dim);
    b->frame_bytes = kvk_cuda_frame_workspace_bytes(b->n_max, o->n_kv_heads * o->head_dim,
                                                    b->worker->level[0].dims);
    carve(b, &fixed, &pinned);
    kvc_status st = kvk_cuda_alloc(cuda_of(b), KVK_CUDA_DEVICE, fixed.at, &b->slab);
    if (st == KVC_OK) {
        st = kvk_cuda_alloc(cuda_of(b), KVK_CUDA_PINNED, pinned.at, &b->pinned);
    }
    if (st != KVC_OK) {
        return st;
    }
    memset(b->pinned, 0, pinned.at);
    fixed = (kvwi_carver){.base = b->slab};
    pinned = (kvwi_carver){.base = b->pinned};
    carve(b, &fixed, &pinned);
    return KVC_OK;
}

static kvc_status open_layers(kvwi_device_batch *b)
{
    const kvw_opts *o = &b->worker->opts;
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < o->n_layers; i++) {
        batch_layer *l = &b->layers[i];
        l->lane.frame_space = b->frame_space;
        l->lane.frame_bytes = b->frame_bytes;
        l->lane.attend_space = b->attend_space;
        l->lane.attend_bytes = b->attend_bytes;
        l->graphs = (kvk_cuda_graph **)calloc(b->n_max + 1u, sizeof(kvk_cuda_graph *));
        st = l->graphs == NULL ? KVC_NO_MEMORY
                               : kvwi_cuda_lane_clear(b->worker, &l->lane, b->stream);
    }
    return st;
}

kvc_status kvwi_cuda_batch_open(kvw_worker *worker, uint32_t n_max, void *stream,
                                kvwi_device_batch **batch_p)
{
    kvwi_device_batch *b = calloc(1, sizeof(*b));
    *batch_p = NULL;
    if (b == NULL) {
        return KVC_NO_MEMORY;
    }
    b->worker = worker;
    b->n_max = n_max;
    b->layers = calloc(worker->opts.n_layers, sizeof(*b->layers));
    b->members = (kvw_seq **)calloc(n_max, sizeof(kvw_seq *));
    b->generations = calloc(n_max, sizeof(*b->generations));
    b->entries = calloc(n_max, sizeof(kvk_cuda_residency) + sizeof(kvk_cuda_source));
    b->apart = calloc(n_max, sizeof(*b->apart));
    b->stepped = calloc(n_max + 1u, sizeof(*b->stepped));
    bool there = b->layers != NULL && b->members != NULL && b->generations != NULL &&
                 b->entries != NULL && b->apart != NULL && b->stepped != NULL;
    kvc_status st = there ? kvk_cuda_stream_create(cuda_of(b), &b->capture) : KVC_NO_MEMORY;
    b->stream = worker->opts.device_memory ? (kvk_stream *)stream : b->capture;
    if (st == KVC_OK) {
        st = open_memory(b);
    }
    if (st == KVC_OK) {
        st = open_layers(b);
    }
    if (st != KVC_OK) {
        kvwi_cuda_batch_close(b);
        return kvwi_cuda_fail(st, "memory of a batch");
    }
    *batch_p = b;
    return KVC_OK;
}

void kvwi_cuda_batch_close(kvwi_device_batch *b)
{
    if (b == NULL) {
        return;
    }
    kvwi_cuda_batch_part(b);
    drop_graphs(b);
    for (uint32_t i = 0; b->layers != NULL && i < b->worker->opts.n_layers; i++) {
        free((void *)b->layers[i].graphs);
    }
    kvk_cuda_free(cuda_of(b), KVK_CUDA_DEVICE, b->select_space);
    kvk_cuda_free(cuda_of(b), KVK_CUDA_DEVICE, b->slab);
    kvk_cuda_free(cuda_of(b), KVK_CUDA_PINNED, b->pinned);
    if (b->capture != NULL) {
        kvk_cuda_stream_destroy(cuda_of(b), b->capture);
    }
    free(b->layers);
    free((void *)b->members);
    free(b->generations);
    free(b->apart);
    free(b->stepped);
    free(b->entries);
    free(b);
}

/* Scores of the longest sequence, times n_max. */
static kvc_status grow_select(kvwi_device_batch *b, uint32_t rows_max)
{
    void *space = NULL;
    size_t bytes = b->worker->device->selector->workspace_bytes(b->worker, b->n_max, rows_max);
    if (rows_max <= b->rows_max) {
        return KVC_OK;
    }
    drop_graphs(b);
    kvc_status st = kvk_cuda_alloc(cuda_of(b), KVK_CUDA_DEVICE, bytes, &space);
    if (st == KVC_OK) { /* nothing uses the old one any more */
        st = kvk_cuda_stream_sync(cuda_of(b), b->stream);
    }
    if (st != KVC_OK) {
        kvk_cuda_free(cuda_of(b), KVK_CUDA_DEVICE, space);
        return st;
    }
    kvk_cuda_free(cuda_of(b), KVK_CUDA_DEVICE, b->select_space);
    b->select_space = space;
    b->select_bytes = bytes;
    b->n_cut = 0;
    b->rows_max = rows_max;
    return KVC_OK;
}

static kvc_status clear_spaces(kvwi_device_batch *b, uint32_t n)
{
    if (n == b->n_cut) {
        return KVC_OK;
    }
    kvc_status st = kvk_cuda_fill(cuda_of(b), b->frame_space, 0, b->frame_bytes, b->stream);
    if (st == KVC_OK) {
        size_t bytes = b->worker->device->selector->cleared_bytes(n, b->rows_max);
        st = kvk_cuda_fill(cuda_of(b), b->select_space, 0, bytes, b->stream);
    }
    b->n_cut = st == KVC_OK ? n : 0;
    return st;
}

/* ---- members ---- */

/* A member's last picks to where it has them itself. */
static kvc_status save_picks(kvwi_device_batch *b, uint32_t at)
{
    kvw_seq *seq = b->members[at];
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < b->worker->opts.n_layers; i++) {
        kvwi_device_layer *l = &seq->device->layers[i];
        st = kvwi_cuda_bring_picks(seq, l, &l->lane, 0);
    }
    return st;
}

void kvwi_cuda_batch_part(kvwi_device_batch *b)
{
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; i < b->n_members; i++) {
        kvc_status saved = save_picks(b, i);
        st = st == KVC_OK ? saved : st;
    }
    if (b->n_members != 0) {
        kvc_status synced = kvk_cuda_stream_sync(cuda_of(b), b->stream);
        st = st == KVC_OK ? synced : st;
    }
    if (st != KVC_OK) {
        KVC_LOG_WARN(WORKER, "a batch parts and the device does not answer");
    }
    for (uint32_t i = 0; i < b->n_members; i++) {
        kvwi_device_seq *d = b->members[i]->device;
        d->batch = NULL;
        d->stream = d->own;
    }
    b->n_members = 0;
}

static kvc_status put_list(kvwi_device_batch *b, void *list, size_t entry_bytes)
{
    return kvk_cuda_copy(cuda_of(b), list, b->entries, b->n_members * entry_bytes, b->stream);
}

/* The lane's lists of what the members have in a layer. */
static kvc_status list_layer(kvwi_device_batch *b, uint32_t layer)
{
    kvwi_lane *lane = &b->layers[layer].lane;
    kvk_cuda_residency *res = b->entries;
    kvk_cuda_source *source = b->entries;
    kvk_cuda_candidates *cands = b->entries;
    for (uint32_t i = 0; i < b->n_members; i++) {
        res[i] = kvwi_residency_of(&b->members[i]->device->layers[layer]);
    }
    kvc_status st = put_list(b, lane->res, sizeof(*res));
    for (uint32_t i = 0; i < b->n_members; i++) {
        res[i] = (kvk_cuda_residency){.slots = b->members[i]->device->layers[layer].ring};
    }
    st = st == KVC_OK ? put_list(b, lane->ring_res, sizeof(*res)) : st;
    for (uint32_t i = 0; i < b->n_members; i++) {
        source[i] = kvwi_source_of(b->members[i], &b->members[i]->device->layers[layer]);
    }
    st = st == KVC_OK ? put_list(b, lane->source, sizeof(*source)) : st;
    for (uint32_t i = 0; i < b->n_members; i++) {
        cands[i] = kvwi_candidates_of(b->worker, &b->members[i]->device->layers[layer]);
    }
    st = st == KVC_OK ? put_list(b, lane->cands, sizeof(*cands)) : st;
    for (uint32_t i = 0; i < b->n_members; i++) {
        cands[i] = kvwi_finer_of(&b->members[i]->device->layers[layer]);
    }
    return st == KVC_OK && lane->finer != NULL ? put_list(b, lane->finer, sizeof(*cands)) : st;
}

static bool are_members(const kvwi_device_batch *b, kvw_seq *const *seqs, uint32_t n)
{
    bool same = n == b->n_members;
    for (uint32_t i = 0; same && i < n; i++) {
        same = seqs[i] == b->members[i] && seqs[i]->device->generation == b->generations[i];
    }
    return same;
}

static void take_members(kvwi_device_batch *b, kvw_seq *const *seqs, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        kvwi_device_seq *d = seqs[i]->device;
        b->members[i] = seqs[i];
        b->generations[i] = d->generation;
        d->batch = b;
        d->stream = b->stream;
    }
    b->n_members = n;
}

/* The sequences become the batch's. */
static kvc_status join(kvwi_device_batch *b, kvw_seq *const *seqs, uint32_t n)
{
    kvc_status st = KVC_OK;
    uint32_t rows_max = 0;
    if (are_members(b, seqs, n)) {
        return KVC_OK;
    }
    kvwi_cuda_batch_part(b);
    for (uint32_t i = 0; st == KVC_OK && i < n; i++) {
        kvwi_device_seq *d = seqs[i]->device;
        if (d->batch != NULL) {
            kvwi_cuda_batch_part(d->batch);
        }
        st = kvk_cuda_stream_sync(cuda_of(b), d->stream); /* what comes next is on another one */
        rows_max = kvwi_max_u32(rows_max, d->cap_tokens);
    }
    if (st == KVC_OK) {
        st = grow_select(b, rows_max);
    }
    if (st != KVC_OK) {
        return st;
    }
    take_members(b, seqs, n);
    for (uint32_t i = 0; st == KVC_OK && i < b->worker->opts.n_layers; i++) {
        st = list_layer(b, i);
    }
    if (st != KVC_OK) {
        kvwi_cuda_batch_part(b);
    }
    return st;
}

/* ---- a step ---- */

static kvc_status graph_of(kvwi_device_batch *b, uint32_t layer, uint32_t n,
                           kvk_cuda_graph **graph_p)
{
    batch_layer *l = &b->layers[layer];
    kvc_status st = KVC_OK;
    take_size(b, n);
    if (l->graphs[n] == NULL) {
        l->lane.n_seqs = n;
        l->lane.rows_max = b->rows_max;
        l->lane.select_space = b->select_space;
        l->lane.select_bytes = b->select_bytes;
        st = kvwi_cuda_capture(b->worker, layer, &l->lane, KVWI_WHOLE, b->capture, &l->graphs[n]);
    }
    *graph_p = l->graphs[n];
    return st;
}

static size_t q_bytes(const kvw_worker *w)
{
    return (size_t)w->opts.n_q_heads * w->opts.head_dim * w->elem_bytes;
}

/* What the graph reads of this step. Of a member that is apart: one token, which picks nothing. */
static kvc_status write_lane(kvwi_device_batch *b, kvw_step *const *steps, uint32_t n,
                             const void *q)
{
    kvwi_lane *lane = &b->layers[steps[0]->layer].lane;
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < n; i++) {
        kvwi_device_layer *l = &steps[i]->seq->device->layers[steps[i]->layer];
        lane->n_tokens[i] = b->apart[i] ? 1u : steps[i]->n_tokens;
        lane->tokens[i] = l->pending && !b->apart[i] ? l->lane.tokens[0] : (kvk_cuda_token){0};
        st = b->apart[i] ? kvwi_cuda_cache_apart(steps[i], lane, i)
                         : kvwi_cuda_cache_offer(steps[i], lane, i);
    }
    if (st != KVC_OK) {
        return st;
    }
    if (b->worker->opts.device_memory) {
        return kvk_cuda_copy(cuda_of(b), lane->q_in, q, n * q_bytes(b->worker), b->stream);
    }
    memcpy(lane->q_in, q, n * q_bytes(b->worker));
    return KVC_OK;
}

/* What resolve gave slots to in a step that did not end well is in none of them. */
static void forget_all(kvwi_device_batch *b, kvw_step *const *steps, uint32_t n)
{
    const kvwi_lane *lane = &b->layers[steps[0]->layer].lane;
    for (uint32_t i = 0; i < n; i++) {
        if (!b->apart[i] && kvwi_cuda_forget(steps[i]->seq, lane, i, NULL) != KVC_OK) {
            KVC_LOG_WARN(WORKER, "a batch's step failed and the device does not answer");
        }
    }
}

static void lose_caches(kvw_step *const *steps, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        kvwi_cuda_cache_lose(steps[i]);
    }
}

static kvc_status launch(kvwi_device_batch *b, kvw_step *const *steps, uint32_t n, const void *q)
{
    kvwi_lane *lane = &b->layers[steps[0]->layer].lane;
    kvk_cuda_graph *graph = NULL;
    kvc_status st = graph_of(b, steps[0]->layer, n, &graph);
    if (st == KVC_OK) {
        st = write_lane(b, steps, n, q);
    }
    if (st == KVC_OK) {
        st = clear_spaces(b, n);
    }
    if (st == KVC_OK) {
        st = kvk_cuda_graph_launch(cuda_of(b), graph, b->stream);
    }
    if (st != KVC_OK) {
        lose_caches(steps, n);
        return st;
    }
    for (uint32_t i = 0; i < n; i++) {
        kvwi_device_seq *d = steps[i]->seq->device;
        if (b->apart[i]) {
            continue;
        }
        d->layers[steps[i]->layer].pending = false;
        d->layers[steps[i]->layer].n_writes = d->n_writes;
    }
    lane->n_done++;
    st = kvwi_cuda_await(lane, cuda_of(b), b->stream);
    steps[0]->seq->stats.host_syncs++;
    if (st != KVC_OK) {
        forget_all(b, steps, n);
        lose_caches(steps, n);
    }
    return st;
}

/* Of the members [first, end). */
static kvc_status give_results(kvwi_device_batch *b, uint32_t layer, uint32_t first, uint32_t end,
                               void *out, float *lse)
{
    const kvwi_lane *lane = &b->layers[layer].lane;
    const size_t one = q_bytes(b->worker), heads = b->worker->opts.n_q_heads, n = end - first;
    uint8_t *to = (uint8_t *)out + first * one;
    const uint8_t *from = (const uint8_t *)lane->out + first * one;
    float *to_lse = lse == NULL ? NULL : lse + first * heads;
    const float *from_lse = lane->lse + first * heads;
    if (n == 0) {
        return KVC_OK;
    }
    if (!b->worker->opts.device_memory) {
        memcpy(to, from, n * one);
        if (lse != NULL) {
            memcpy(to_lse, from_lse, n * heads * sizeof(*lse));
        }
        return KVC_OK;
    }
    kvc_status st = kvk_cuda_copy(cuda_of(b), to, from, n * one, b->stream);
    if (st == KVC_OK && lse != NULL) {
        st = kvk_cuda_copy(cuda_of(b), to_lse, from_lse, n * heads * sizeof(*lse), b->stream);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "a result of a batch");
}

static kvc_status finish_alone(kvw_step *step, uint32_t at, const void *q, void *out, float *lse)
{
    const kvw_worker *w = step->seq->worker;
    size_t offset = at * q_bytes(w);
    return kvwi_cuda_step_finish(step, (const uint8_t *)q + offset, (uint8_t *)out + offset,
                                 lse == NULL ? NULL : lse + (size_t)at * w->opts.n_q_heads);
}

/* Who is in the launch: whose rows all have addresses that stay for the step. Gives how many. */
static uint32_t choose(kvwi_device_batch *b, kvw_step *const *steps, uint32_t n)
{
    uint32_t n_in = 0;
    for (uint32_t i = 0; i < n; i++) {
        kvwi_device_layer *l = &steps[i]->seq->device->layers[steps[i]->layer];
        b->apart[i] = l->prefill || l->n_blank != 0 || !kvwi_cuda_tables_take(steps[i]->seq, l);
        n_in += !b->apart[i];
    }
    return n_in;
}

/* Whether sequence `at` has been stepped, and that counts. If not, it is apart, or its map went
 * away under it or its token was not finite, and what it read is forgotten. *status_p: of that. */
static bool settle(kvwi_device_batch *b, kvw_step *step, uint32_t at, kvc_status *status_p)
{
    kvw_seq *seq = step->seq;
    kvwi_device_layer *l = &seq->device->layers[step->layer];
    kvwi_lane *lane = &b->layers[step->layer].lane;
    *status_p = KVC_OK;
    if (b->apart[at]) {
        return false;
    }
    kvwi_settled(seq->device, l->n_writes);
    kvwi_cuda_cache_decided(step, lane, at);
    *status_p = kvwi_cuda_finite(seq, step->layer);
    if (*status_p != KVC_OK) {
        kvc_status forgot = kvwi_cuda_forget(seq, lane, at, NULL);
        *status_p = forgot == KVC_OK ? *status_p : forgot;
        return false;
    }
    if (lane->n_misses[at] == 0 || kvwi_cuda_tables_hold(seq, l->stamp)) {
        kvwi_cuda_step_done(step, lane->n_misses[at], 0);
        return true;
    }
    *status_p = kvwi_cuda_forget(seq, lane, at, NULL);
    return false;
}

static kvc_status first_of(kvc_status first, kvc_status next)
{
    return first == KVC_OK ? next : first;
}

/* All members, whatever becomes of one: rows that did not come must not stay resident. Nothing of a
 * member's is written before it is settled, since out may be q. */
static kvc_status finish_together(kvwi_device_batch *b, kvw_step *const *steps, uint32_t n,
                                  const void *q, void *out, float *lse)
{
    uint32_t layer = steps[0]->layer, first = 0; /* of those whose results are not given yet */
    kvc_status st = launch(b, steps, n, q), forgot = KVC_OK;
    if (st != KVC_OK) {
        return kvwi_cuda_fail(st, "a step of a batch");
    }
    for (uint32_t i = 0; i < n; i++) {
        if (settle(b, steps[i], i, &forgot)) {
            continue;
        }
        st = first_of(st, give_results(b, layer, first, i, out, lse));
        st = first_of(st, forgot);
        kvc_status again = forgot == KVC_OK ? finish_alone(steps[i], i, q, out, lse) : forgot;
        st = first_of(st, again);
        first = i + 1u;
    }
    return first_of(st, give_results(b, layer, first, n, out, lse));
}

kvc_status kvwi_cuda_batch_join(kvwi_device_batch *b, kvw_seq *const *seqs, uint32_t n)
{
    kvc_status st = join(b, seqs, n);
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "a batch");
}

kvc_status kvwi_cuda_batch_finish(kvwi_device_batch *b, kvw_seq *const *seqs,
                                  kvw_step *const *steps, uint32_t n, const void *q, void *out,
                                  float *lse)
{
    uint64_t t0 = kvc_now_ns();
    kvc_status st = kvwi_cuda_batch_join(b, seqs, n); /* again where one has grown since */
    if (st != KVC_OK) {
        return st;
    }
    if (choose(b, steps, n) != 0) {
        st = finish_together(b, steps, n, q, out, lse);
    } else {
        for (uint32_t i = 0; i < n; i++) {
            st = first_of(st, finish_alone(steps[i], i, q, out, lse));
        }
    }
    steps[0]->seq->stats.ns_attend += kvc_now_ns() - t0;
    return st;
}
