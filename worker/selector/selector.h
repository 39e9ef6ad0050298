/*
 * selector.h: the table that every selector fills, and its contract.
 *
 * A selector turns the queries of a step into one score per candidate token; ranking (proximity
 * window, exact top-k, re-ranking by a finer index) is common code in selector/pick.c, and index
 * rows are made by common code in index.c from the selector's form of projection. So a new selector
 * is one file with two functions and one line in selector/registry.c.
 *
 * All slots are pure: no state of their own, any thread, memory only from the context's scratch.
 * They do not wait for anything but the tensor-parallel hook.
 */
#ifndef KVW_SELECTOR_H
#define KVW_SELECTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "buf.h"
#include "index.h"
#include "kvw/worker.h"
#include "projection.h"

/* How far keys are numbered. */
typedef enum kvw_position_rule {
    KVW_FAR_NEAR = 1, /* far keys at 0, queries at far_position; near keys from 0 in order */
    KVW_RENUMBER = 2, /* sinks, picks ascending, recent: numbered from 0 without gaps */
} kvw_position_rule;

enum { KVW_SCRATCH_SLOTS = 12 };

/* What a call of a slot works with; belongs to one sequence, thus to one thread. */
typedef struct kvw_select_ctx {
    const kvw_worker *worker;
    uint32_t layer;
    kvwi_buf buf[KVW_SCRATCH_SLOTS]; /* see enum kvw_scratch */
} kvw_select_ctx;

/* Who uses which scratch buffer, so that no two users of one call overlap. */
enum kvw_scratch {
    KVW_SCRATCH_Q = 0,      /* prepare: queries as scored */
    KVW_SCRATCH_Q_LEVEL0,   /* prepare: projected for level 0 */
    KVW_SCRATCH_Q_LEVEL1,   /* prepare: projected for level 1 */
    KVW_SCRATCH_TMP,        /* prepare: intermediate */
    KVW_SCRATCH_SCORES,     /* aggregate: score planes */
    KVW_SCRATCH_STATS,      /* aggregate: per-head numbers */
    KVW_SCRATCH_AGG,        /* pick: one score per candidate */
    KVW_SCRATCH_WINDOW,     /* pick: after the proximity window */
    KVW_SCRATCH_TOPK,       /* pick: workspace of top-k */
    KVW_SCRATCH_CANDIDATES, /* pick: positions to re-rank */
    KVW_SCRATCH_ROWS,       /* pick: gathered rows of the finer index */
    KVW_SCRATCH_APPEND,     /* index.c: projected keys */
};

/* The queries of a step as a selector scores them: q[level] is f32 [m, heads, level's d_score]. */
typedef struct kvw_query {
    uint32_t m, heads;
    const float *q[KVWI_MAX_LEVELS];
} kvw_query;

/* Rows to score: rows first .. first + n - 1 of an index level, or dense rows. */
typedef struct kvw_source {
    const kvwi_level *level;
    const kvwi_pages *pages; /* NULL: dense */
    const void *dense;
    uint32_t first, n, level_i;
} kvw_source;

typedef struct kvw_selector_ops {
    const char *name;
    kvw_index_kind default_index;
    uint32_t default_recent;
    kvwi_form form;
    kvw_position_rule positions;
    bool recent_holds_new; /* the recent window counts the new tokens */
    kvk_fusion fusion;     /* of whole chunks, see retrieve.c; 0: it picks tokens */
    bool reuses;           /* the Selection Cache (kvw_opts.reselect_cos) makes sense for it */
    /* REQ, as aggregate is, unless fusion is given. q [n_q, n_q_heads, head_dim] in the worker's
       dtype, before RoPE -> *query_p, in scratch until the next prepare. */
    kvc_status (*prepare)(kvw_select_ctx *ctx, const void *q, uint32_t n_q, kvw_query *query_p);
    /* out [source->n]: one score per row, higher is better; the whole group agrees on it. */
    kvc_status (*aggregate)(kvw_select_ctx *ctx, const kvw_query *query, const kvw_source *source,
                            float *out);
} kvw_selector_ops;

/* The selector by name; NULL: none. */
const kvw_selector_ops *kvw_selector_find(const char *name);
/* The i-th selector of tokens, NULL past the end; the conformance suite loops over them. */
const kvw_selector_ops *kvw_selector_at(uint32_t i);

/*
 * Scores of every row of source for every query row and head:
 * out[(i * heads + h) * stride + j]. stride >= source->n.
 */
kvc_status kvwi_score(kvw_select_ctx *ctx, const float *q, uint32_t m, uint32_t heads,
                      const kvw_source *source, float *out, size_t stride) KVC_MUST_CHECK;

/*
 * The k best candidates among positions begin .. end - 1 of levels' rows, ascending, into picks
 * [k]; *n_p = min(k, end - begin). Exact on the selector's own scores: score descending, position
 * ascending.
 */
kvc_status kvwi_pick(kvw_select_ctx *ctx, const kvwi_pages *levels, const void *q, uint32_t n_q,
                     uint32_t begin, uint32_t end, uint32_t *picks, uint32_t *n_p) KVC_MUST_CHECK;

/* Sorts values [n] ascending; tmp [n]. */
void kvwi_sort_u32(uint32_t *values, uint32_t n, uint32_t *tmp);

#endif
