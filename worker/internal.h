/*
 * internal.h: what the files of the worker share: the worker, a sequence, a layer, a step.
 *
 * Owners: the worker's first block is immutable after kvw_open; its pool and its put queue have
 * locks of their own. A sequence belongs to the one thread that uses it, except `put`, which the
 * put threads share under the put queue's mutex.
 *
 * Where a row lies: a block that is not yet released has a block buffer, whose layout is that of
 * its values: [n_layers][block_tokens][row_bytes] of kv, then the same of index rows. Rows of
 * released blocks are in the layer's residency, or only in the store.
 */
#ifndef KVWI_INTERNAL_H
#define KVWI_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/thread.h"
#include "buf.h"
#include "device/device.h"
#include "error.h"
#include "index.h"
#include "kvc/client.h"
#include "kvk/compute.h"
#include "kvw/worker.h"
#include "projection.h"
#include "put.h"
#include "residency.h"
#include "selector/selector.h"
#include "servers.h"

/* Part ids: rank * 2000 + layer for kv, 1000 more for the index of that layer. */
#define KVWI_MAX_LAYERS       1000u
#define KVWI_PART_RANK_STRIDE 2000u
#define KVWI_PART_INDEX       1000u
#define KVWI_MAX_TOKENS       (1u << 30)

/* Memory of one block over all layers; pooled, since registration is dear. */
typedef struct kvwi_block {
    uint8_t *base;
    kvwi_regions regions;
    struct kvwi_block *next;
} kvwi_block;

typedef struct kvwi_pool {
    kvc_mutex mutex; /* LEAF; guards free */
    kvwi_block *free;
    uint32_t n_free;
} kvwi_pool;

struct kvw_worker {
    kvw_opts opts; /* defaults filled in; strings are owned; client is servers.all[0]'s */
    kvwi_servers servers;
    const kvw_selector_ops *selector;
    kvk_backend *be;
    const kvk_ops *ops;
    const kvwi_device_ops *device_ops;
    kvwi_device *device; /* decode steps run on it; NULL: on be, as all the rest */
    double *inv_freq;    /* [head_dim/2]; NULL: no rotary embedding */
    float scale;
    kvc_way way;                 /* asked for; KVC_WAY_COUNT: auto */
    kvk_dtype row_dtype;         /* of kv rows: the model's, or coded */
    size_t elem_bytes, in_bytes; /* of one element, and of K of one token, as the engine has them */
    size_t k_bytes, row_bytes;   /* of K in one kv row, of the row */
    uint32_t n_levels;
    kvwi_level level[KVWI_MAX_LEVELS];
    size_t index_row_bytes; /* stored index row, all levels; 0: rebuilt from kv rows */
    kvwi_projection *projection;
    kvc_digest schema;
    size_t block_kv_bytes, block_bytes; /* of a block buffer: its kv part, all of it */
    uint32_t *kv_parts, *index_parts;   /* [n_layers] part ids */
    uint32_t *group_parts;              /* [tp_size * n_layers] kv part ids of every rank */
    kvwi_pool pool;
    kvwi_putter *putter; /* NULL without a store */
};

/* The picks of a layer's last selection, and the Selection Cache over them. */
typedef struct kvwi_picks {
    uint32_t *pos; /* [k], ascending */
    uint32_t n;
    bool cached;         /* pos may be reused by a like query */
    bool on_device;      /* pos is to be brought from the device first */
    uint32_t near_begin; /* where recent began at the reselect */
    float *query;        /* [n_q_heads, head_dim] of the reselect */
} kvwi_picks;

typedef struct kvwi_layer {
    uint32_t n_tokens;
    kvwi_pages level[KVWI_MAX_LEVELS];
    kvwi_residency residency;
    kvwi_picks picks;
    kvw_step *step; /* open, or NULL */
} kvwi_layer;

/* One block of a sequence. */
typedef struct kvwi_seq_block {
    kvwi_block *buf; /* NULL: released, or reused and never here */
    kvc_digest digest;
    uint32_t server, local; /* its owner, and its number among this owner's blocks */
} kvwi_seq_block;

/* What a sequence has to do with one server. */
typedef struct kvwi_seq_server {
    kvc_context *context; /* over the blocks that it owns */
    uint32_t n_blocks;    /* that are its own, of those submitted or reused */
    uint64_t rows, bytes, requests, rows_near, rows_missing;
} kvwi_seq_server;

typedef struct kvwi_pass {
    uint32_t first, n;
} kvwi_pass;

struct kvw_seq {
    kvw_worker *worker;
    kvwi_layer *layers;
    uint32_t *tokens; /* [n_named] */
    uint32_t n_named, cap_tokens;
    kvwi_pass pass; /* the current one; n 0: none */
    kvwi_pass *passes;
    uint32_t n_passes, cap_passes;
    kvwi_seq_block *blocks;
    uint32_t n_blocks, cap_blocks; /* blocks with a slot */
    uint32_t n_submitted;          /* blocks handed to put, or reused */
    uint32_t released_to;          /* blocks before this one (sinks apart) have no buffer */
    uint32_t n_reused;             /* tokens */
    kvwi_seq_server *servers;      /* [n] of the worker's */
    uint8_t *residency_rows;       /* [n_layers, slots, row_bytes] */
    size_t residency_bytes;
    kvwi_regions residency_regions;
    kvwi_put_state put; /* guarded by the put queue */
    kvw_select_ctx select;
    kvwi_buf append_buf;
    kvwi_device_seq *device; /* NULL without one */
    kvwi_buf host[2];        /* host copies of what the engine has in the device's memory */
    char label[2u * KVC_MAX_NAME_BYTES + 24u]; /* of digests, see names.c; not terminated */
    uint32_t label_bytes;
    kvw_step *free_steps;
    kvw_retriever *retrievers;
    uint8_t taint[16]; /* rows were dropped or a query predicted: nobody may reuse what follows */
    bool tainted;
    uint64_t n_fetched, n_reused_rows; /* rows that came to the residency; uses of rows in it */
    kvw_stats stats;
};

/* A run of a step's rows that is attended with one set of query positions. */
typedef struct kvwi_segment {
    uint32_t first, n;
    bool near; /* keys numbered from 0, causal; else keys unrotated, queries at far_position */
} kvwi_segment;

typedef enum kvwi_row_state {
    KVWI_ROW_HERE = 0,
    KVWI_ROW_COMING,
    KVWI_ROW_MISSING,
    KVWI_ROW_AFAR, /* attended beside the data: in the step's near partials */
} kvwi_row_state;

/* The misses of one segment that go to a server as one group. */
typedef struct kvwi_near_part {
    uint32_t segment, first, n; /* of the near list */
} kvwi_near_part;

/*
 * The misses of a step that one server has, in row order, and how they come. A leg goes its own
 * way, and fails alone.
 */
typedef struct kvwi_leg {
    struct kvw_step *step;
    uint32_t server;
    /* misses: those that go or went by rows; those of the near partials are no more among them */
    uint32_t n_misses;
    kvc_way way;
    uint32_t tried;  /* bits 1 << kvc_way: ways that failed in this step */
    kvc_way_why why; /* of having tried: BROKEN, BUSY or REST */
    kvwi_buf miss_row, miss_pos, miss_slot, miss_status;
    kvwi_buf miss_pick; /* with several servers; else picks are positions */
    bool lost;          /* its server is: nothing was asked */
    kvwi_flight flight;
    kvwi_near_part near_part[2];
    uint32_t n_near_parts;
    bool near_sent, near_here; /* asked for; its partials are to be merged */
    kvwi_buf near_out, near_rank;
} kvwi_leg;

struct kvw_step {
    kvw_seq *seq;
    uint32_t layer, n_q;
    bool on_device;    /* what follows is not used, but deadline_ns */
    uint32_t n_tokens; /* of the layer when it began */
    bool foretold;     /* select_sum is that of q_select, which may be a prediction */
    uint64_t select_sum;
    bool full; /* short enough to attend everything */
    uint32_t near_begin;
    kvwi_segment segment[2];
    uint32_t n_segments, n_rows;
    kvwi_buf pos, rows, state;   /* per row: position, address, kvwi_row_state */
    uint32_t n_misses;           /* of all legs */
    kvwi_buf near_q, near_q_pos; /* the query, and its positions in each segment */
    bool attended;
    kvc_status attend_status; /* a failure of kvw_step_attend, which finish returns */
    uint64_t asked_ns;        /* when the misses set off */
    uint64_t deadline_ns;
    /* attention */
    kvwi_buf q_rot, q_pos, sub_rows, sub_pos, visible, acc, part;
    bool has_acc;
    kvw_step *next;
    uint32_t n_legs; /* servers; without a store one, which has no misses */
    kvwi_leg legs[];
};

static inline uint32_t kvwi_min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* Whether a caller's size_bytes can be that of a struct of which we know `now` bytes: `first` when
 * it was first published, then longer. Whole words, so that no member is taken in part. */
static inline bool kvwi_size_fits(size_t size_bytes, size_t first, size_t now)
{
    return size_bytes >= first && size_bytes <= now && size_bytes % sizeof(size_t) == 0;
}

static inline uint32_t kvwi_max_u32(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

/* The server that has a position's block, and the row's name there. */
static inline uint32_t kvwi_server_of(const kvw_seq *seq, uint32_t pos)
{
    return seq->worker->servers.n <= 1 ? 0
                                       : seq->blocks[pos / seq->worker->opts.block_tokens].server;
}
static inline uint32_t kvwi_pick_of(const kvw_seq *seq, uint32_t pos)
{
    uint32_t bt = seq->worker->opts.block_tokens;
    return seq->worker->servers.n <= 1 ? pos : seq->blocks[pos / bt].local * bt + pos % bt;
}

/* blocks.c --------------------------------------------------------------------------------------
 */

void kvwi_pool_init(kvwi_pool *pool);
void kvwi_pool_fini(kvw_worker *worker);
/* A block buffer; contents undefined. NO_MEMORY. */
kvc_status kvwi_pool_take(kvw_worker *worker, kvwi_block **block_p) KVC_MUST_CHECK;
void kvwi_pool_give(kvw_worker *worker, kvwi_block *block);
/* Slots and buffers for blocks up to the one of token n_tokens - 1. */
kvc_status kvwi_blocks_reserve(kvw_seq *seq, uint32_t n_tokens) KVC_MUST_CHECK;
/* A slot and buffer for this block. */
kvc_status kvwi_blocks_fill(kvw_seq *seq, uint32_t block) KVC_MUST_CHECK;
/* Gives back buffers of blocks that the store has and no window needs. */
void kvwi_blocks_release(kvw_seq *seq);
/* Digests and hands every full, accepted block to put, waiting for its window up to the deadline.
 * n_tokens: accepted. */
kvc_status kvwi_blocks_submit(kvw_seq *seq, uint32_t n_tokens, uint64_t deadline_ns) KVC_MUST_CHECK;
/* Row of layer in a block buffer; index rows likewise (all levels, in order). */
static inline uint8_t *kvwi_block_row(const kvw_worker *w, const kvwi_block *b, uint32_t layer,
                                      uint32_t in_block)
{
    return b->base + ((size_t)layer * w->opts.block_tokens + in_block) * w->row_bytes;
}
static inline uint8_t *kvwi_block_index(const kvw_worker *w, const kvwi_block *b, uint32_t layer)
{
    return b->base + w->block_kv_bytes + (size_t)layer * w->opts.block_tokens * w->index_row_bytes;
}

/* names.c ---------------------------------------------------------------------------------------
 */

/* Keeps what sets this sequence's blocks apart from those of others; NULL or "": nothing. Once.
 * INVALID: too long, or with a line's end. */
kvc_status kvwi_names_label(kvw_seq *seq, const char *adapter, const char *salt) KVC_MUST_CHECK;
/* Digest of a block as a cold prefill of whole chunks computes it; the parent has its own. */
kvc_status kvwi_names_cold(kvw_seq *seq, const uint32_t *tokens, uint32_t block) KVC_MUST_CHECK;
/* Digest of a block as it was computed here. */
kvc_status kvwi_names_block(kvw_seq *seq, uint32_t block) KVC_MUST_CHECK;
/* What is computed from here on is this sequence's alone: its digests get a random number. */
void kvwi_names_taint(kvw_seq *seq);

/* append.c --------------------------------------------------------------------------------------
 */

/* kvw_append; whole: a step of the same query follows at once, or a device is told to settle. */
kvc_status kvwi_append(kvw_seq *seq, uint32_t layer, const void *k, const void *v,
                       uint32_t n_tokens, bool whole) KVC_MUST_CHECK;
/* Index rows for n keys (stride apart, in the model's dtype) at positions first.. of a layer. */
kvc_status kvwi_index_append(kvw_seq *seq, uint32_t layer, uint32_t first, const void *k,
                             size_t stride_bytes, uint32_t n) KVC_MUST_CHECK;
/* K and V of n tokens into their blocks' buffers, in dtype or coded: then a value that is not
 * finite is INVALID. */
kvc_status kvwi_write_rows(kvw_seq *seq, uint32_t layer, uint32_t first, const void *keys,
                           const void *values, uint32_t n) KVC_MUST_CHECK;

/* step.c ----------------------------------------------------------------------------------------
 */

/* A step that finish follows at once with the same query, where kvwi_append was told so. */
kvc_status kvwi_begin_whole(kvw_seq *seq, uint32_t layer, const void *q, uint32_t n_q,
                            kvw_step **step_p) KVC_MUST_CHECK;
/* A finished step goes back to its sequence. */
void kvwi_step_give(kvw_step *step);

/* select.c --------------------------------------------------------------------------------------
 */

/* Where the recent window begins for a step of n_q queries over n_tokens. */
uint32_t kvwi_near_begin(const kvw_worker *worker, uint32_t n_tokens, uint32_t n_q);
/* Whether a step over these windows attends everything. */
static inline bool kvwi_is_full(const kvw_worker *w, uint32_t near_begin)
{
    return near_begin <= w->opts.n_sink || near_begin - w->opts.n_sink <= w->opts.k;
}
/* Decides what the step attends: full, near_begin, and the layer's picks. */
kvc_status kvwi_select(kvw_step *step, const void *q_select) KVC_MUST_CHECK;

/* resolve.c -------------------------------------------------------------------------------------
 */

/* Lists the step's rows in attention order and finds which are here. */
kvc_status kvwi_resolve(kvw_step *step) KVC_MUST_CHECK;

/* fetch.c ---------------------------------------------------------------------------------------
 */

/* Takes residency slots for the misses and submits their fetch; a failure to submit is kept for
 * kvwi_fetch_wait. NO_SPACE: more misses than slots. */
kvc_status kvwi_fetch_submit(kvwi_leg *leg) KVC_MUST_CHECK;
/* Waits for the fetch to end, however it does; its status. */
kvc_status kvwi_fetch_complete(kvwi_leg *leg);
/* After that: marks rows HERE or MISSING, applies the policy. */
kvc_status kvwi_fetch_settle(kvwi_leg *leg) KVC_MUST_CHECK;
/* Waits for an op's end, whatever it takes, since memory is the op's until then; TIMED_OUT where it
 * had to be cancelled after its deadline. */
kvc_status kvwi_op_complete(kvc_op *op, uint64_t deadline_ns) KVC_MUST_CHECK;
/* Ends fetches that nobody waits for. */
void kvwi_fetch_abandon(kvw_step *step);

/* ways.c ----------------------------------------------------------------------------------------
 */

/* How often a row that is fetched now will be used again without being fetched. */
double kvwi_way_reuse(const kvw_seq *seq);
/* The way that was asked for where it is possible to the server, else the cheapest; counted.
 * COUNT: none is possible. */
kvc_way kvwi_way_choose(const kvw_worker *worker, uint32_t server, kvc_way_ask ask);
/* Chooses how the misses are reached and sets off what needs no query. NO_SPACE. */
kvc_status kvwi_misses_begin(kvw_step *step) KVC_MUST_CHECK;
/* With the real query: asks those servers to attend where that is the way. */
kvc_status kvwi_misses_query(kvw_step *step, const void *q) KVC_MUST_CHECK;
/* Waits for the misses, by another way where one fails; marks rows, applies the policy. */
kvc_status kvwi_misses_wait(kvw_step *step) KVC_MUST_CHECK;

/* near.c ----------------------------------------------------------------------------------------
 */

/* Keeps the query for the legs that go this way. NO_MEMORY. */
kvc_status kvwi_near_query(kvw_step *step, const void *q) KVC_MUST_CHECK;
/* Sends it with the leg's misses. Errors as of kvc_attend: nothing was sent. */
kvc_status kvwi_near_submit(kvwi_leg *leg) KVC_MUST_CHECK;
/* Waits for the partials. OK: near_here is set, and the misses that they cover are none any more.
 */
kvc_status kvwi_near_wait(kvwi_leg *leg) KVC_MUST_CHECK;
/* Merges the leg's partials into the step's accumulator. */
kvc_status kvwi_near_merge(kvwi_leg *leg) KVC_MUST_CHECK;

static inline kvc_dtype kvwi_wire_dtype(kvk_dtype dtype)
{
    return dtype == KVK_F32 ? KVC_DTYPE_F32 : dtype == KVK_F16 ? KVC_DTYPE_F16 : KVC_DTYPE_BF16;
}

/* retrieve.c ------------------------------------------------------------------------------------
 */

void kvwi_retrievers_close(kvw_seq *seq);
/* Chunks from n_chunks on are gone: nobody may attend to their rows. */
void kvwi_retrievers_forget(kvw_seq *seq, uint32_t n_chunks);
/* Of chunks held by retrievers. */
uint64_t kvwi_retrievers_bytes(const kvw_seq *seq);

/* attend.c --------------------------------------------------------------------------------------
 */

typedef enum kvwi_which { KVWI_ALL = 0, KVWI_RESIDENT, KVWI_ARRIVED } kvwi_which;

/* Merges a partial o [n, dim] then lse [n], f32, into the step's accumulator. */
kvc_status kvwi_attend_merge(kvw_step *step, float *part) KVC_MUST_CHECK;
/* Where query i of a segment stands, for its rotary embedding. */
void kvwi_query_positions(const kvw_step *step, const kvwi_segment *seg, int32_t *pos);
/* Attends q over the rows of a kind and merges into the step's accumulator. */
kvc_status kvwi_attend(kvw_step *step, const void *q, kvwi_which which) KVC_MUST_CHECK;
/* The accumulator as out (dtype) and lse. */
kvc_status kvwi_attend_result(kvw_step *step, void *out, float *lse) KVC_MUST_CHECK;

/* options.c, schema.c ---------------------------------------------------------------------------
 */

kvc_status kvwi_options_fill(kvw_worker *worker, const kvw_opts *opts) KVC_MUST_CHECK;
void kvwi_options_fini(kvw_worker *worker);
/* Levels of the index, from options and projection. */
kvc_status kvwi_levels_open(kvw_worker *worker) KVC_MUST_CHECK;
void kvwi_levels_close(kvw_worker *worker);
/* Part ids, schema and its digest; registers it where there is a store. */
kvc_status kvwi_schema_open(kvw_worker *worker) KVC_MUST_CHECK;

/* reuse.c ---------------------------------------------------------------------------------------
 */

/* Matches tokens in the store and brings back what the worker needs; opens the context. */
kvc_status kvwi_reuse(kvw_seq *seq, const uint32_t *tokens, uint32_t n_tokens) KVC_MUST_CHECK;

/* group.c ---------------------------------------------------------------------------------------
 */

/* st: how this rank fares. Its own failure where it has one, CANCELLED where only another rank
 * has: all go on or none does. Without a group, st. */
kvc_status kvwi_group_agree(const kvw_worker *worker, kvc_status st) KVC_MUST_CHECK;
/* The same; and INVALID where ranks differ in heads or in anything that the schema names. */
kvc_status kvwi_group_check(const kvw_worker *worker, kvc_status st) KVC_MUST_CHECK;
/* The least of every rank's numbers, so that all go on at one position. A rank whose st is not OK
 * takes part with 0; its st is returned. */
kvc_status kvwi_group_least(const kvw_worker *worker, kvc_status st, uint32_t *n,
                            uint32_t *n_indexed) KVC_MUST_CHECK;

/* step.c ----------------------------------------------------------------------------------------
 */

/* Frees open and pooled steps. */
void kvwi_steps_free(kvw_seq *seq);

#endif
