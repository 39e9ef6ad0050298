/*
 * state.h: what the files of the CUDA device share. Plain C over kvk/cuda.h.
 *
 * Owners: a device is immutable after open; a sequence's state belongs to its thread. Everything
 * that a sequence enqueues goes to one stream, in order. Memory is taken when a sequence opens, and
 * when it outgrows max_tokens, between passes; a step takes none.
 */
#ifndef KVWI_DEVICE_STATE_H
#define KVWI_DEVICE_STATE_H

#include <stdatomic.h>

#include "carve.h"
#include "internal.h"
#include "kvk/cuda_frame.h"
#include "kvk/cuda_pass.h"
#include "kvk/cuda_rerank.h"

#define KVWI_DEVICE_TOKENS 131072u /* max_tokens, where the options have none */

typedef struct kvwi_lane kvwi_lane;

/* What steps do differently by selector; cuda_select.c has them. */
typedef struct kvwi_cuda_selector {
    const char *name;
    uint32_t levels; /* of an index, at most */
    /* What beside the common limits it cannot do, and what the GPU cannot. UNSUPPORTED. */
    kvc_status (*check)(const kvw_worker *w);
    kvc_status (*supports)(const kvw_worker *w, const kvk_cuda *cuda);
    size_t (*workspace_bytes)(const kvw_worker *w, uint32_t n_seqs, uint32_t rows_max);
    /* The first bytes of those, that are cleared where n_seqs or rows_max is another. */
    size_t (*cleared_bytes)(uint32_t n_seqs, uint32_t rows_max);
    /* From the frame's queries to the lane's picks, in the order in which they are attended. */
    kvc_status (*select)(const kvw_worker *w, const kvwi_lane *lane, kvk_stream *stream);
    /* The same for the queries of a pass, at prefill.q; candidates are there. pass_bytes: of a
     * workspace of its own; NULL: it uses that of single queries. */
    kvc_status (*select_pass)(kvw_step *step);
    size_t (*pass_bytes)(const kvw_seq *seq);
} kvwi_cuda_selector;

struct kvwi_device {
    kvk_cuda *cuda;
    uint32_t number;
    const kvwi_cuda_selector *selector; /* NULL: of chunks */
    char isa[16];
    /* device: the levels' a and b, [n_layers, heads, d_in, dims] */
    float *query_proj[KVWI_MAX_LEVELS], *key_proj[KVWI_MAX_LEVELS];
    double *inv_freq;           /* device; NULL: no rotary embedding */
    atomic_bool no_gpu_staging; /* no RDMA device writes to its memory: none is tried again */
};

/*
 * What the graphs of a step read and write, for one layer of n_seqs sequences: arrays of an entry a
 * sequence. A sequence has a lane of its own in each layer, a batch one of all its sequences.
 */
struct kvwi_lane {
    uint32_t n_seqs, rows_max; /* rows_max: candidates of a sequence, at most */
    /* device */
    kvk_cuda_residency *res, *ring_res;
    kvk_cuda_candidates *cands;
    kvk_cuda_source *source;
    uint32_t *picks, *n_picks, *fetch, *n_list, *n_near, *near_first;
    uint32_t *counts;   /* [2], of attend's result */
    uint32_t *resolved; /* of an attend that resolves */
    uint32_t *ordered;  /* the picks as they are resolved: ascending, or picks itself */
    int32_t *list;
    int32_t *k_positions; /* of what is listed; NULL: keys are not rotated */
    float *q_far, *q_near, *q_index;
    kvk_cuda_candidates *finer; /* of an index of two levels, as what follows: its second one */
    uint32_t *wide, *n_wide;    /* what is ranked again */
    float *q_fine;
    float *last; /* of the Selection Cache: what selected last; NULL: there is none */
    uint32_t *keep;
    void *frame_space, *attend_space,
        *select_space; /* other lanes of the same stream use them too */
    size_t frame_bytes, attend_bytes, select_bytes;
    /* pinned: the host writes n_tokens, kept_first and tokens, the device the others */
    uint32_t *n_tokens, *n_misses, *differs;
    uint32_t *kept_first, *kept; /* where near began with picks that may be kept; they were */
    uint32_t *done;              /* one */
    kvk_cuda_token *tokens;
    const void *kv; /* where the token of a whole step of one sequence is; NULL: by tokens */
    /* pinned; device memory where the engine's is */
    void *q_in, *q_select, *out;
    float *lse;
    uint32_t n_done; /* what done will be when all that was launched has been done */
};

/* Missing rows of an open step that its query has not waited for: cuda_ahead.c. */
typedef enum kvwi_ahead {
    KVWI_AHEAD_NONE = 0,
    KVWI_AHEAD_BROUGHT, /* on their way to their slots */
    KVWI_AHEAD_ASKED,   /* those without an address, to staging, if there are any */
    KVWI_AHEAD_LOST,    /* they were, until another step needed staging */
} kvwi_ahead;

typedef struct kvwi_device_layer {
    void *slab, *grown, *pinned; /* the three memories that all below lie in */
    kvwi_lane lane;
    /* device, of fixed size */
    uint8_t *slots, *ring; /* [n_sink + residency_slots] and [ring_rows] rows */
    uint32_t *pos_of, *used, *step;
    /* device, by capacity */
    uint8_t *index[KVWI_MAX_LEVELS];
    int32_t *slot_of;
    const void **blocks;
    /* pinned */
    uint32_t *n_far;
    kvk_cuda_candidates *chunk_cands; /* of a chunk's step; host writes */
    uint32_t *miss_pos;
    int8_t *status;
    uint8_t *kv_in; /* K and V of a new token that waits for a whole step or is coded, where the
                       engine's memory is the host's */
    uint32_t *bad;  /* set to 1 where what was appended is not finite; NULL: the host has looked */
    /* host */
    uint32_t cap_tokens, cap_blocks; /* what it has memory for; the sequence's, unless growing */
    const void **shadow;             /* [cap_blocks], as blocks on the device */
    const kvwi_lane *picks_in;       /* of the last selection: its own lane, or a batch's */
    uint32_t picks_at;               /* the sequence's place there */
    uint32_t n_blank;                /* released blocks without an address */
    uint32_t n_index;                /* index rows that the device has, of each level */
    size_t grown_bytes;
    uint32_t near_from, near_to; /* positions whose rows are in the ring */
    uint32_t n_sinks;            /* sinks in their slots */
    bool reads_kv;               /* the device may still read kv_in: a token went without a step */
    bool unchecked;              /* bad has not been read since the last append */
    bool pending; /* the lane's token is not on its way yet: the step that follows at once takes it
                   */
    kvk_cuda_graph *select, *attend, *whole;
    kvk_cuda_graph *attend_here; /* all rows are in their slots; NULL: not used yet */
    kvk_cuda_event *brought;     /* by the side stream */
    /* of the open step, or the last one */
    bool prefill; /* several queries, or attends everything: cuda_prefill.c */
    bool chosen;  /* its picks are made, from the queries that it began with */
    bool one_query, selected, attended;
    bool reselected;  /* the step made picks, and did not keep the last ones */
    bool near_failed; /* its far rows come by a fetch: the server did not attend over them */
    kvwi_ahead ahead;
    uint64_t n_writes;  /* the sequence's, before its attention */
    uint64_t stamp;     /* of the map that the attention reads; the tables may have left it since */
    kvc_map_hold *hold; /* on it, until the device has read; NULL: none */
    kvwi_flight flight;
} kvwi_device_layer;

/* Landmarks of a layer, where chunks are retrieved. */
typedef struct kvwi_device_marks {
    float *rows;     /* device, [cap, landmark_dim] */
    uint32_t n, cap; /* chunks that the device has, and has room for */
} kvwi_device_marks;

/* Working memory of passes of several tokens; NULL until the first one. */
typedef struct kvwi_device_prefill {
    void *memory, *select, *workspace;
    size_t select_bytes, workspace_bytes;
    uint8_t *kv; /* K, then V of a pass, where rows are coded and the engine's memory is the host's
                  */
    void *q;   /* of the step that is being enqueued; out may be the same memory as the engine's */
    void *out; /* where the engine's memory is the host's; lse likewise */
    float *lse, *q_far, *q_near, *q_index, *q_fine, *o_far, *lse_far, *o_near, *lse_near;
} kvwi_device_prefill;

typedef struct kvwi_device_near kvwi_device_near; /* cuda_near.c */

/* Memory of the device that a fetch may bring rows to; cuda_staging.c. */
typedef struct kvwi_gpu_staging {
    kvk_cuda *cuda;
    kvc_client *client;
    void *memory;
    size_t len_bytes;
    kvwi_regions regions; /* of the one server */
    bool refused;         /* no RDMA device writes there: it is not used */
    kvc_mutex mutex;      /* LEAF; guards what is enqueued on stream */
    kvk_stream *stream;   /* copies, where nobody writes there yet */
} kvwi_gpu_staging;

struct kvwi_device_seq {
    kvwi_device *device;
    kvk_stream *stream;       /* enqueued on: its own, or that of the batch that it is in */
    kvk_stream *own;          /* the engine's, or capture */
    kvk_stream *capture;      /* graphs are made on; the stream too where the engine gave none */
    kvk_stream *side;         /* rows come on, while the other one has other things to do */
    kvk_cuda_event *chosen;   /* what they are is known */
    kvwi_device_batch *batch; /* NULL: none */
    uint32_t generation;      /* of the layers' memories that grow */
    uint32_t cap_tokens, cap_blocks;
    bool growing;    /* NO_MEMORY halfway: not every layer has the capacity, and none has graphs */
    uint32_t staged; /* the first position of staging, behind all blocks */
    uint32_t n_staging; /* blocks of both kinds, and how many of them are pinned */
    uint32_t n_pinned;
    /* device: 0, 1, ... up to what a step attends; each is also a count or a pick, in memory */
    int32_t *near_pos;
    const uint32_t *counts;
    int32_t *ring_list; /* device: slots of the ring, more than once around */
    kvwi_device_prefill prefill;
    kvwi_device_near *near;                          /* NULL: no server attends for it */
    void *frame_space, *attend_space, *select_space; /* of all lanes */
    size_t frame_bytes, attend_bytes, select_bytes;
    uint8_t *staging; /* pinned, [k] rows: those that a fetch brings */
    kvwi_regions staging_regions;
    kvwi_gpu_staging *gpu_staging; /* NULL: none */
    kvwi_device_layer *staged_for; /* whose fetch is under way; NULL: none */
    kvwi_device_layer *layers;
    uint64_t stamp;                /* of the map that addresses are from; 0: none */
    bool mixed, no_maps;           /* while they are asked for: of several maps; none is wanted */
    uint32_t n_released, n_tabled; /* blocks whose addresses are in the tables: released; all */
    uint64_t device_bytes;
    /* writes to what is the host's too: enqueued; known to be done */
    uint64_t n_writes, n_settled;
    /* of chunks; then nothing above is used but device, stream, capture, select_* and device_bytes
     */
    kvwi_device_marks *marks; /* [n_layers] */
};

/* Entries of a lane's lists, and rows of a ring of recent ones. */
static inline uint32_t kvwi_stride(const kvw_worker *w)
{
    return w->opts.n_sink + w->opts.k;
}

/* Recent and new rows that the step of a token attends, at most. */
static inline uint32_t kvwi_near_max(const kvw_worker *w)
{
    uint32_t near = w->opts.n_recent + (w->selector->recent_holds_new ? 0u : 1u);
    return w->opts.reselect_cos != 0 ? near + w->opts.n_recent : near;
}

static inline uint32_t kvwi_ring_rows(const kvw_worker *w)
{
    /* what a pass of several tokens attends lies in one piece */
    return kvwi_max_u32(w->opts.n_recent + w->opts.chunk_tokens, kvwi_near_max(w)) + 64u;
}

/* NULL without a store. */
static inline kvc_context *kvwi_cuda_context(const kvw_seq *seq)
{
    return seq->servers == NULL ? NULL : seq->servers[0].context;
}

/* The first n writes are done. */
static inline void kvwi_settled(kvwi_device_seq *d, uint64_t n)
{
    d->n_settled = n > d->n_settled ? n : d->n_settled;
}

static inline uint32_t kvwi_slots(const kvw_worker *w)
{
    return w->opts.n_sink + w->opts.residency_slots;
}

/* Whether index rows, and what scores them, have a part for each kv head. */
static inline bool kvwi_per_head(const kvw_worker *w)
{
    return w->selector->form == KVWI_PER_HEAD;
}

/* Whether the index meets queries as they are, or rotated by far_position. */
static inline bool kvwi_scores_raw(const kvw_worker *w)
{
    return w->inv_freq == NULL || w->projection->rope == KVWI_PROJECTION_RAW;
}

/* A layer's matrices of a level, of the index rows or of the queries that meet them. */
static inline const float *kvwi_layer_proj(const kvw_worker *w, float *const *proj, uint32_t level,
                                           uint32_t layer)
{
    const kvwi_level *l = &w->level[level];
    return proj[level] + (size_t)layer * l->heads * l->d_in * l->dims;
}

/* The level whose columns begin with those of all others. */
static inline uint32_t kvwi_finest(const kvw_worker *w)
{
    return w->n_levels - 1u;
}

/* Its dims, where it is not the only one; else 0. */
static inline uint32_t kvwi_fine_dims(const kvw_worker *w)
{
    return w->n_levels == 1 ? 0 : w->level[1].dims;
}

/* How many picks of the first level the second one ranks; 0: there is none. */
static inline uint32_t kvwi_wide(const kvw_worker *w)
{
    return w->n_levels == 1 ? 0 : w->opts.k * w->opts.rerank_factor;
}

/* cuda_staging.c. open: n_staging is what the pinned one shall have; then it is that of both. */
kvc_status kvwi_cuda_staging_open(kvw_seq *seq) KVC_MUST_CHECK;
void kvwi_cuda_staging_close(kvw_seq *seq);
/* staged, after the capacity changed. */
void kvwi_cuda_staging_place(kvw_seq *seq);
/* Where block i of n_staging lies. */
const void *kvwi_cuda_staging_block(const kvwi_device_seq *d, uint32_t i, size_t block_bytes);
/* Before a fetch is planned: which one it shall go to, by staged and these regions. */
void kvwi_cuda_staging_choose(kvw_seq *seq);
const kvwi_regions *kvwi_cuda_staging_regions(const kvwi_device_seq *d);

/* cuda.c: what is the same whatever the device does for a worker. open: nothing in device memory
 * yet; close frees that too. */
kvc_status kvwi_cuda_device_open(const kvw_worker *worker, uint32_t number,
                                 kvwi_device **device_p) KVC_MUST_CHECK;
void kvwi_cuda_device_close(kvwi_device *device);
const char *kvwi_cuda_isa(const kvwi_device *device);
kvc_status kvwi_cuda_map(kvwi_device *device, void *base, size_t len_bytes) KVC_MUST_CHECK;
void kvwi_cuda_unmap(kvwi_device *device, void *base);
kvc_status kvwi_cuda_copy(kvw_seq *seq, void *to, const void *from,
                          size_t len_bytes) KVC_MUST_CHECK;
uint64_t kvwi_cuda_bytes(const kvw_seq *seq);

/* cuda_chunks.c: room for the landmarks of n chunks of a layer, and those that the host has. */
kvc_status kvwi_cuda_marks(kvw_seq *seq, uint32_t layer, uint32_t n) KVC_MUST_CHECK;

/* cuda_retrieve.c: retriever slots of the table. */
kvc_status kvwi_cuda_retriever_open(kvw_retriever *r) KVC_MUST_CHECK;
void kvwi_cuda_retriever_close(kvw_retriever *r);
kvc_status kvwi_cuda_retriever_choose(kvw_retriever *r, const float *query,
                                      uint32_t n) KVC_MUST_CHECK;
kvc_status kvwi_cuda_retriever_attend(kvw_retriever *r, const void *q, uint32_t n_q,
                                      void *out) KVC_MUST_CHECK;

/* cuda_seq.c: what says that CUDA refused. */
kvc_status kvwi_cuda_fail(kvc_status st, const char *what) KVC_MUST_CHECK;
kvc_status kvwi_cuda_seq_open(kvw_seq *seq, uint32_t n_tokens, void *stream) KVC_MUST_CHECK;
void kvwi_cuda_seq_close(kvw_seq *seq);
/* Room for n_tokens; drops the graphs where it has to grow. NO_MEMORY: no step can run until a
 * later call has taken the rest. */
kvc_status kvwi_cuda_grow(kvw_seq *seq, uint32_t n_tokens) KVC_MUST_CHECK;
kvc_status kvwi_cuda_sync(kvw_seq *seq) KVC_MUST_CHECK;
/* The streams of a sequence; capture is made here. */
kvc_status kvwi_cuda_streams(kvw_seq *seq, void *stream) KVC_MUST_CHECK;
void kvwi_cuda_streams_close(kvwi_device_seq *d);

/* What the ops are told of a layer's memories. */
kvk_cuda_residency kvwi_residency_of(const kvwi_device_layer *l);
kvk_cuda_source kvwi_source_of(const kvw_seq *seq, const kvwi_device_layer *l);
kvk_cuda_candidates kvwi_candidates_of(const kvw_worker *w, const kvwi_device_layer *l);
kvk_cuda_candidates kvwi_finer_of(const kvwi_device_layer *l); /* at their positions */

/* cuda_memory.c.
 * The parts of a lane of n_seqs sequences that are device memory, and those that are pinned. */
void kvwi_carve_lane(kvwi_carver *c, const kvw_worker *w, uint32_t n_seqs, kvwi_lane *lane);
void kvwi_carve_lane_pinned(kvwi_carver *c, const kvw_worker *w, uint32_t n_seqs, kvwi_lane *lane);
/* What such a lane is before its first step: only sinks are listed. Waits. */
kvc_status kvwi_cuda_lane_clear(const kvw_worker *w, kvwi_lane *lane,
                                kvk_stream *stream) KVC_MUST_CHECK;
/* A layer's memories. */
kvc_status kvwi_cuda_layer_open(kvw_seq *seq, kvwi_device_layer *l) KVC_MUST_CHECK;
/* To the sequence's capacity; a failure leaves it as it was. */
kvc_status kvwi_cuda_layer_grow(kvw_seq *seq, kvwi_device_layer *l) KVC_MUST_CHECK;
void kvwi_cuda_layer_close(kvw_seq *seq, kvwi_device_layer *l);

/* cuda_graph.c: what a graph does: select and resolve; attend, bringing what is missing or with all
 * rows in their slots; or all of a step, new tokens too. */
typedef enum kvwi_graph_part {
    KVWI_SELECT,
    KVWI_ATTEND,
    KVWI_ATTEND_HERE,
    KVWI_WHOLE,
} kvwi_graph_part;
/* Captures it on a stream that does nothing else meanwhile. */
kvc_status kvwi_cuda_capture(const kvw_worker *w, uint32_t layer, const kvwi_lane *lane,
                             kvwi_graph_part part, kvk_stream *stream,
                             kvk_cuda_graph **graph_p) KVC_MUST_CHECK;
/* Enqueues the attention alone, which gives a partial in device memory. */
kvc_status kvwi_cuda_partial(const kvw_worker *w, uint32_t layer, const kvwi_lane *lane, float *o,
                             float *lse, kvk_stream *stream) KVC_MUST_CHECK;
/* A layer's graphs, if it has none. */
kvc_status kvwi_cuda_graphs(kvw_seq *seq, uint32_t layer) KVC_MUST_CHECK;
/* And attend_here. */
kvc_status kvwi_cuda_graph_here(kvw_seq *seq, uint32_t layer) KVC_MUST_CHECK;
void kvwi_cuda_graphs_drop(kvw_seq *seq, kvwi_device_layer *l);

/* cuda_select.c: what the worker's selector does; NULL: not for this device. */
const kvwi_cuda_selector *kvwi_cuda_selector_of(const kvw_worker *w);
/* The last selection's picks, with the query that made them, come to place `at` of a lane. */
kvc_status kvwi_cuda_bring_picks(kvw_seq *seq, kvwi_device_layer *l, kvwi_lane *lane,
                                 uint32_t at) KVC_MUST_CHECK;
/* The Selection Cache around a launch that selects for place `at` of a lane: which picks may be
 * kept; after it has been done, whether they were; or that nobody knows. */
kvc_status kvwi_cuda_cache_offer(kvw_step *step, kvwi_lane *lane, uint32_t at) KVC_MUST_CHECK;
/* The place is used for nothing in this launch. */
kvc_status kvwi_cuda_cache_apart(kvw_step *step, kvwi_lane *lane, uint32_t at) KVC_MUST_CHECK;
void kvwi_cuda_cache_decided(kvw_step *step, kvwi_lane *lane, uint32_t at);
void kvwi_cuda_cache_lose(kvw_step *step);

/* cuda_tables.c: the addresses of every block's rows, as they are now; those in a server's memory
 * only with maps. */
kvc_status kvwi_cuda_tables(kvw_seq *seq, bool maps) KVC_MUST_CHECK;
/* What they name stays mapped until let go, which is after a wait for the device, for the layer's
 * attention, which is about to be launched. False: the map has gone. */
bool kvwi_cuda_tables_take(kvw_seq *seq, kvwi_device_layer *l);
void kvwi_cuda_tables_let_go(kvwi_device_layer *l);
/* Whether what was read through them was the values', where they were of the map of this stamp. */
bool kvwi_cuda_tables_hold(const kvw_seq *seq, uint64_t stamp);

/* cuda_mirror.c: a layer's copies are whole, with the rows of its last `near` tokens. */
kvc_status kvwi_cuda_mirror(kvw_seq *seq, uint32_t layer, uint32_t near) KVC_MUST_CHECK;
/* Rows of [from, to) out of block buffers into the ring. */
kvc_status kvwi_cuda_push_ring(kvw_seq *seq, uint32_t layer, uint32_t from,
                               uint32_t to) KVC_MUST_CHECK;
/* The ring has the rows up to `end` now. */
void kvwi_cuda_near_grew(kvw_seq *seq, kvwi_device_layer *l, uint32_t end);
kvc_status kvwi_cuda_pass(kvw_seq *seq, uint32_t n_tokens, uint32_t n) KVC_MUST_CHECK;
kvc_status kvwi_cuda_append(kvw_seq *seq, uint32_t layer, const void *k, const void *v, uint32_t n,
                            bool whole) KVC_MUST_CHECK;
/* A token that waits for a step sets off without it. */
kvc_status kvwi_cuda_flush(kvw_seq *seq, uint32_t layer) KVC_MUST_CHECK;
kvc_status kvwi_cuda_settle(kvw_seq *seq) KVC_MUST_CHECK;
kvc_status kvwi_cuda_truncate(kvw_seq *seq, uint32_t n_tokens) KVC_MUST_CHECK;
/* What the device has of one layer ends with n_tokens, which lie in the last pass. */
kvc_status kvwi_cuda_layer_truncate(kvw_seq *seq, uint32_t layer, uint32_t n_tokens) KVC_MUST_CHECK;

/* cuda_append.c: a pass of several tokens in one layer. */
kvc_status kvwi_cuda_append_pass(kvw_seq *seq, uint32_t layer, const void *k, const void *v,
                                 uint32_t n) KVC_MUST_CHECK;

/* cuda_finite.c: whether what a layer appended in its last pass is finite; INVALID if not.
 * The device has done it: if not, the layer is as it was before the pass. */
kvc_status kvwi_cuda_finite(kvw_seq *seq, uint32_t layer) KVC_MUST_CHECK;
/* The device has done all layers'; if not, the pass stays until it is taken back. */
kvc_status kvwi_cuda_finite_all(kvw_seq *seq) KVC_MUST_CHECK;
/* Before the layer appends again. */
kvc_status kvwi_cuda_finite_next(kvw_seq *seq, uint32_t layer) KVC_MUST_CHECK;
/* Before the pass is taken back to n_tokens: INVALID where some of them stay and were not finite.
 */
kvc_status kvwi_cuda_finite_kept(kvw_seq *seq, uint32_t n_tokens) KVC_MUST_CHECK;

/* cuda_step.c: what was launched last on the lane has been done. */
kvc_status kvwi_cuda_await(kvwi_lane *lane, kvk_cuda *cuda, kvk_stream *stream) KVC_MUST_CHECK;
/* A step has been done: what it counts for, and the end of its claims. */
void kvwi_cuda_step_done(kvw_step *step, uint32_t n_misses, uint32_t n_far);
/* Rows of sequence `at` of a lane that resolve gave slots to and that did not come: those whose
 * status says so, or without one all. Waits. */
kvc_status kvwi_cuda_forget(kvw_seq *seq, const kvwi_lane *lane, uint32_t at,
                            const int8_t *status) KVC_MUST_CHECK;
/* The same, and does not wait: the status stays as it is until somebody has. */
kvc_status kvwi_cuda_forget_later(kvw_seq *seq, const kvwi_lane *lane, uint32_t at,
                                  const int8_t *status) KVC_MUST_CHECK;
kvc_status kvwi_cuda_step_begin(kvw_step *step, const void *q_select, bool whole) KVC_MUST_CHECK;
kvc_status kvwi_cuda_step_attend(kvw_step *step, const void *q) KVC_MUST_CHECK;
kvc_status kvwi_cuda_step_finish(kvw_step *step, const void *q, void *out,
                                 float *lse) KVC_MUST_CHECK;
void kvwi_cuda_step_abandon(kvw_step *step);
kvc_status kvwi_cuda_picks(const kvw_seq *seq, uint32_t layer) KVC_MUST_CHECK;

/* cuda_near.c: memory for steps whose far rows a server attends over; none where no step may. */
kvc_status kvwi_cuda_near_open(kvw_seq *seq) KVC_MUST_CHECK;
void kvwi_cuda_near_close(kvw_seq *seq);
/* Before the far rows are listed, which waits: the query sets off to where the client reads it. */
kvc_status kvwi_cuda_near_query(kvw_step *step) KVC_MUST_CHECK;
/* Once they are: whether that is the way. */
bool kvwi_cuda_near_is_way(const kvw_step *step);
/* The step's result by that way, which the device has done; or near_failed is set, and the
 * selection is to be resolved again. */
kvc_status kvwi_cuda_near(kvw_step *step) KVC_MUST_CHECK;
/* Which rows have no address: n_far, miss_pos; and their fetch to staging. list waits. */
kvc_status kvwi_cuda_far_list(kvw_step *step) KVC_MUST_CHECK;
void kvwi_cuda_far_send(kvw_step *step);
/* cuda_ahead.c: what a step that has just selected lacks sets off, if it can. */
kvc_status kvwi_cuda_ahead(kvw_step *step) KVC_MUST_CHECK;
/* What the stream does from now on finds those rows. */
kvc_status kvwi_cuda_ahead_join(kvw_step *step) KVC_MUST_CHECK;
/* The stream waits for what is on its way by addresses of the tables, of all layers. */
kvc_status kvwi_cuda_ahead_read(kvw_seq *seq) KVC_MUST_CHECK;
/* Whether what set off is not, and will not be, what was picked. */
bool kvwi_cuda_ahead_failed(const kvw_step *step);
/* Staging is for another step now. */
void kvwi_cuda_ahead_yield(kvw_seq *seq);
/* Nothing is under way any more; rows that are brought have been waited for. */
void kvwi_cuda_ahead_end(kvw_step *step);

/* cuda_prefill.c: passes of several tokens. Their working memory, by the sequence's capacity. */
/* What a step's layer lacks, from where its table says into its slots, on a stream. */
kvc_status kvwi_cuda_gather(kvw_step *step, kvk_stream *stream) KVC_MUST_CHECK;
kvc_status kvwi_cuda_prefill_open(kvw_seq *seq) KVC_MUST_CHECK;
void kvwi_cuda_prefill_close(kvw_seq *seq);
/* The parts of such a step, in this order: its windows; its queries (until the next call of it);
 * the selection; the attention, to out and lse where these are the device's; else give. */
void kvwi_cuda_prefill_begin(kvw_step *step);
kvc_status kvwi_cuda_prefill_query(kvw_step *step, const void *q) KVC_MUST_CHECK;
/* Query i of the step in f32, at position first + i * by; raw: as it is. */
kvc_status kvwi_cuda_prefill_rotate(kvw_step *step, bool raw, uint32_t first, uint32_t by,
                                    float *out) KVC_MUST_CHECK;
kvc_status kvwi_cuda_prefill_select(kvw_step *step) KVC_MUST_CHECK;
kvc_status kvwi_cuda_prefill_attend(kvw_step *step, void *out, float *lse) KVC_MUST_CHECK;
kvc_status kvwi_cuda_prefill_give(kvw_step *step, void *out, float *lse) KVC_MUST_CHECK;
/* How many rows it picks. */
uint32_t kvwi_cuda_prefill_picks(const kvw_step *step);
/* cuda_batch.c: several sequences' steps as one. */
kvc_status kvwi_cuda_batch_open(kvw_worker *worker, uint32_t n_max, void *stream,
                                kvwi_device_batch **batch_p) KVC_MUST_CHECK;
void kvwi_cuda_batch_close(kvwi_device_batch *batch);
kvc_status kvwi_cuda_batch_join(kvwi_device_batch *batch, kvw_seq *const *seqs,
                                uint32_t n) KVC_MUST_CHECK;
kvc_status kvwi_cuda_batch_finish(kvwi_device_batch *batch, kvw_seq *const *seqs,
                                  kvw_step *const *steps, uint32_t n, const void *q, void *out,
                                  float *lse) KVC_MUST_CHECK;
/* Its sequences are on their own again; waits for the device. */
void kvwi_cuda_batch_part(kvwi_device_batch *batch);

/* segments.c: memory of servers that this process has mapped. */
/* Contexts of the client are mapped from now on, where its connection can; what the server has in
 * a GPU is opened on device `number`. */
void kvwi_segments_watch(kvc_client *client, uint32_t number);
/* Where device `number` sees the mapped byte at host; NULL: it cannot. */
const void *kvwi_segments_find(uint32_t number, const void *host);
/* Whether the device address is in memory of a server's GPU that was opened on that device. */
bool kvwi_segments_on_device(uint32_t number, const void *address);

#endif
