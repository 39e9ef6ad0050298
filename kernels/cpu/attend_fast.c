/*
 * attend_fast.c: the fast form of attend.
 *
 * Keys go in blocks of KVKI_ATTEND_KEYS, in the order given; a block's K (rotated) and V of one kv
 * head are packed to f32 once and serve all queries of that head's group. A block gives each query
 * row a partial against the block's own maximum, and partials are merged in block order. So the
 * result of a query depends on its own values and the rows it sees, not on threads, tiles or the
 * other queries. Two ways to share out the work, with the same arithmetic:
 *   by tiles   many queries: blocks are packed first, an item is (kv head, a few tiles of rows);
 *              the tiles take turns on each block while it is in cache;
 *   by blocks  one tile of rows: an item is (kv head, block), which packs, attends, keeps its
 *              state; a few rows that see the same keys are attended without packing, a few heads
 *              of a block in an item.
 * Both go over the blocks in runs, and only merged states pass from one run to the next: so
 * what a call takes for its keys has a bound, RUN_BYTES for each thread, however often rows are
 * named.
 */
#include <math.h>
#include <string.h>

#include "elem.h"
#include "internal.h"
#include "isa.h"

#define ALIGN_FLOATS 16u
#define SHARE_MAX    6u
/* Query rows of a kv head up to which packing does not pay: one pass over the keys for each four.
 */
#define FEW_ROWS_MAX 8u
#define RUN_BYTES    ((size_t)2 << 20)
#define SCORE_FLOATS ((size_t)KVKI_ATTEND_ROWS * KVKI_ATTEND_KEYS)

static size_t max_of(size_t a, size_t b)
{
    return a > b ? a : b;
}

static size_t min_of(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* A query row of a kv head is (query, head in group), query-major. */
typedef struct job {
    const kvk_attend_args *a;
    const kvki_isa *isa;
    size_t group, n_rows, tiles, blocks;
    size_t run;          /* blocks of a run, at most */
    size_t first, n;     /* the run's first block; how many it has */
    size_t share;        /* of one item: tiles, or heads where few */
    size_t dpad;         /* head_dim rounded up to a panel */
    size_t pack_floats;  /* K and V of one block and head, packed */
    size_t state_rows;   /* of a state: KVKI_ATTEND_ROWS, by blocks n_rows */
    size_t state_floats; /* a state of state_rows rows */
    size_t work_floats;  /* scratch of one worker */
    float *q;            /* [n_kv_heads, n_rows, head_dim] scaled */
    bool few;            /* rows are attended over where they lie */
    bool rotate, turned; /* turned: the angles, as isa.h says */
    float *cos, *sin;    /* [run * KVKI_ATTEND_KEYS, head_dim / 2], if rotate and not few */
    const float *kept;   /* angles of positions from 0 on, or NULL */
    float *packed;       /* by tiles: [n_kv_heads, run, pack_floats] */
    bool *finite;        /* by tiles: [n_kv_heads, run] */
    float *states;       /* by blocks: [n_kv_heads, run, state] */
    float *merged;       /* [n_kv_heads, tiles, state] of the runs before */
    float *work;         /* [threads, work_floats] */
} job;

/* Result of up to KVKI_ATTEND_ROWS rows, running or of one block: o is [rows, dpad]. */
typedef struct state {
    float *max, *sum, *o;
} state;

static state state_at(const job *w, float *at)
{
    return (state){at, at + w->state_rows, at + 2 * w->state_rows};
}

static void state_clear(const job *w, state s, size_t m)
{
    for (size_t i = 0; i < m; i++)
        s.max[i] = -INFINITY;
    memset(s.sum, 0, m * sizeof(float));
    memset(s.o, 0, m * w->dpad * sizeof(float));
}

/* Queries regrouped by kv head and scaled. */
static void item_query(void *arg, size_t query, uint32_t worker)
{
    const job *w = arg;
    const kvk_attend_args *a = w->a;
    size_t d = a->head_dim;

    (void)worker;
    for (size_t head = 0; head < a->n_q_heads; head++) {
        const float *from = a->q + (query * a->n_q_heads + head) * d;
        float *to = w->q + (head / w->group * w->n_rows + query * w->group + head % w->group) * d;
        for (size_t t = 0; t < d; t++)
            to[t] = from[t] * a->scale;
    }
}

/* Angles of key j, [2, head_dim / 2]: kept ones, or computed at `to`. */
static const float *angles_of(const job *w, size_t j, float *to)
{
    const kvk_attend_args *a = w->a;
    size_t half = a->head_dim / 2;

    if (w->kept)
        return w->kept + (size_t)a->k_positions[j] * 2 * half;
    w->isa->angles(a->k_positions[j], a->inv_freq, (uint32_t)half, to, to + half);
    return to;
}

/* Angles of a block's keys, into cos and sin [KVKI_ATTEND_KEYS, head_dim / 2]; tmp is scratch. */
static void fill_angles(const job *w, size_t block, float *tmp, float *cos, float *sin)
{
    size_t d = w->a->head_dim, half = d / 2, first = block * KVKI_ATTEND_KEYS;
    size_t n = min_of(w->a->n_kv - first, KVKI_ATTEND_KEYS), group = w->turned ? w->isa->lanes : 1;

    for (size_t j = 0; j < n; j += group) {
        const float *from[KVKI_PACK_ROWS];
        for (size_t t = 0; t < group; t++) /* beyond the last key: its angles again */
            from[t] = angles_of(w, first + min_of(j + t, n - 1), tmp + t * d);
        if (w->turned) {
            w->isa->turn_angles(from, (uint32_t)half, cos + j * half, sin + j * half);
        } else {
            memcpy(cos + j * half, from[0], half * sizeof(float));
            memcpy(sin + j * half, from[0] + half, half * sizeof(float));
        }
    }
}

/* at: of the run. */
static void item_angles(void *arg, size_t at, uint32_t worker)
{
    const job *w = arg;
    size_t off = at * KVKI_ATTEND_KEYS * (w->a->head_dim / 2);

    fill_angles(w, w->first + at, w->work + worker * w->work_floats, w->cos + off, w->sin + off);
}

/* Kept angles that serve every key, or NULL. */
static const float *kept_angles(kvk_backend *be, const kvk_attend_args *a)
{
    int32_t least = 0, most = -1;

    for (uint32_t j = 0; j < a->n_kv; j++) {
        least = a->k_positions[j] < least ? a->k_positions[j] : least;
        most = a->k_positions[j] > most ? a->k_positions[j] : most;
    }
    if (least < 0 || most < 0 || most == INT32_MAX)
        return NULL;
    return kvki_angles_of(be, a->inv_freq, a->head_dim / 2, (uint32_t)most + 1);
}

/* One block of one head; angles, kt, v and finite_p are not set. */
static kvki_attend_pack pack_of(const job *w, size_t kv_head, size_t block, float *tmp)
{
    const kvk_attend_args *a = w->a;
    size_t first = block * KVKI_ATTEND_KEYS;
    size_t left = a->n_kv - first;
    size_t head_bytes = kv_head * a->head_dim * kvk_dtype_bytes(a->dtype);
    size_t scale_off = kvki_scale_off(a->n_kv_heads, a->head_dim, kv_head);
    return (kvki_attend_pack){
        .rows = a->rows + first,
        .n = (uint32_t)(left < KVKI_ATTEND_KEYS ? left : KVKI_ATTEND_KEYS),
        .head_dim = a->head_dim,
        .k_off_bytes = a->k_off_bytes + head_bytes,
        .v_off_bytes = a->v_off_bytes + head_bytes,
        .dtype = a->dtype,
        .coded = kvk_is_coded(a->dtype),
        .k_scale_off_bytes = a->k_off_bytes + scale_off,
        .v_scale_off_bytes = a->v_off_bytes + scale_off,
        .turned = w->turned,
        .tmp = tmp,
    };
}

/* Packs one block of one head to `to`; true where V is finite. tmp is scratch. */
static bool pack_block(const job *w, size_t kv_head, size_t block, float *tmp, float *to)
{
    bool finite = false;
    size_t angles = (block - w->first) * KVKI_ATTEND_KEYS * (w->a->head_dim / 2);
    kvki_attend_pack p = pack_of(w, kv_head, block, tmp);

    p.cos = w->rotate ? w->cos + angles : NULL;
    p.sin = w->rotate ? w->sin + angles : NULL;
    p.kt = to;
    p.v = to + (size_t)KVKI_ATTEND_KEYS * w->a->head_dim;
    p.finite_p = &finite;
    w->isa->attend_pack(&p);
    return finite;
}

/* The partial of rows [first, first + m) over a packed block, into out; false: they see nothing. */
static bool attend_rows(const job *w, size_t kv_head, size_t first, size_t m, size_t block,
                        const float *packed, bool finite, float *scores, state out)
{
    const kvk_attend_args *a = w->a;
    size_t from = block * KVKI_ATTEND_KEYS;
    uint32_t limit[KVKI_ATTEND_ROWS];
    kvki_attend_block b = {.q = w->q + (kv_head * w->n_rows + first) * a->head_dim,
                           .m = (uint32_t)m,
                           .head_dim = a->head_dim,
                           .limit = limit,
                           .kt = packed,
                           .v = packed + (size_t)KVKI_ATTEND_KEYS * a->head_dim,
                           .finite = finite,
                           .softcap = a->softcap,
                           .s = scores,
                           .o = out.o,
                           .ldo = w->dpad,
                           .max = out.max,
                           .sum = out.sum};

    for (size_t i = 0; i < m; i++) {
        size_t seen = a->visible ? a->visible[(first + i) / w->group] : a->n_kv;
        size_t here = seen > from ? seen - from : 0;
        limit[i] = (uint32_t)(here < KVKI_ATTEND_KEYS ? here : KVKI_ATTEND_KEYS);
    }
    if (m == 0 || limit[m - 1] == 0)
        return false;
    w->isa->attend_block(&b);
    return true;
}

static void merge_rows(const job *w, size_t m, state from, state into)
{
    w->isa->attend_merge((uint32_t)m, (uint32_t)w->dpad, w->dpad, from.max, from.sum, from.o,
                         into.max, into.sum, into.o);
}

/* o and lse of rows [first, first + m) of a kv head, out of their merged state. */
static void finish_rows(const job *w, size_t kv_head, size_t first, size_t m, state s)
{
    const kvk_attend_args *a = w->a;
    size_t d = a->head_dim;

    for (size_t i = 0; i < m; i++) {
        size_t head = kv_head * w->group + (first + i) % w->group;
        size_t out = (first + i) / w->group * a->n_q_heads + head;
        float inverse = s.sum[i] == 0 ? 0 : 1.0f / s.sum[i];
        for (size_t t = 0; t < d; t++)
            a->o[out * d + t] = s.o[i * w->dpad + t] * inverse;
        a->lse[out] = s.sum[i] == 0 ? -INFINITY : (float)((double)s.max[i] + log((double)s.sum[i]));
    }
}

/* What a worker of the few form has for the angles of a block. */
static size_t few_angle_floats(const job *w)
{
    return w->rotate ? (size_t)KVKI_ATTEND_KEYS * w->a->head_dim : 0;
}

static size_t tmp_floats(const job *w)
{
    return KVKI_PACK_ROWS * (((size_t)w->a->head_dim + 15) / 16 * 16);
}

static bool is_last(const job *w)
{
    return w->first + w->n == w->blocks;
}

static state merged_at(const job *w, size_t kv_head, size_t tile)
{
    return state_at(w, w->merged + (kv_head * w->tiles + tile) * w->state_floats);
}

/* ---- by tiles ---- */

static void item_pack(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    float *tmp = w->work + worker * w->work_floats;
    size_t kv_head = item / w->n, at = kv_head * w->run + item % w->n;

    w->finite[at] =
        pack_block(w, kv_head, w->first + item % w->n, tmp, w->packed + at * w->pack_floats);
}

static void item_tiles(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    size_t shares = (w->tiles + w->share - 1) / w->share;
    size_t kv_head = item / shares, first = item % shares * w->share;
    size_t end = min_of(w->tiles, first + w->share);
    float *scores = w->work + worker * w->work_floats;
    state one = state_at(w, scores + SCORE_FLOATS);

    for (size_t t = first; t < end && w->first == 0; t++)
        state_clear(w, merged_at(w, kv_head, t), KVKI_ATTEND_ROWS);
    for (size_t i = 0; i < w->n; i++) {
        size_t at = kv_head * w->run + i;
        const float *packed = w->packed + at * w->pack_floats;
        for (size_t t = first; t < end; t++) {
            size_t row = t * KVKI_ATTEND_ROWS, m = min_of(w->n_rows - row, KVKI_ATTEND_ROWS);
            if (attend_rows(w, kv_head, row, m, w->first + i, packed, w->finite[at], scores, one))
                merge_rows(w, m, one, merged_at(w, kv_head, t));
        }
    }
    for (size_t t = first; t < end && is_last(w); t++) {
        size_t row = t * KVKI_ATTEND_ROWS;
        finish_rows(w, kv_head, row, min_of(w->n_rows - row, KVKI_ATTEND_ROWS),
                    merged_at(w, kv_head, t));
    }
}

static void run_tiles(kvk_backend *be, job *w)
{
    kvki_pool_run(be->pool, w->a->n_kv_heads * w->n, item_pack, w);
    kvki_pool_run(be->pool, w->a->n_kv_heads * ((w->tiles + w->share - 1) / w->share), item_tiles,
                  w);
}

/* ---- by blocks ---- */

/* The part of the next block's rows that the item of this head asks for. */
static kvki_ahead ahead_of(const job *w, size_t kv_head, size_t block)
{
    const kvk_attend_args *a = w->a;
    size_t first = (block + 1) * KVKI_ATTEND_KEYS;
    size_t n = first < a->n_kv ? min_of(a->n_kv - first, KVKI_ATTEND_KEYS) : 0;
    size_t from = n * kv_head / a->n_kv_heads, to = n * (kv_head + 1) / a->n_kv_heads;

    return (kvki_ahead){
        .rows = n ? a->rows + first + from : NULL,
        .n = (uint32_t)(to - from),
        .off_bytes = {a->k_off_bytes, a->v_off_bytes},
        .len_bytes = kvk_slice_bytes(a->dtype, a->n_kv_heads, a->head_dim),
    };
}

/* n keys of a block, for few rows; angles is what a worker has before its scores, or NULL. */
static void attend_few(const job *w, size_t kv_head, size_t block, size_t n, float *angles,
                       float *scratch, state out)
{
    const kvk_attend_args *a = w->a;
    kvki_attend_pack p = pack_of(w, kv_head, block, scratch + SCORE_FLOATS);
    p.n = (uint32_t)n;
    p.cos = angles;
    p.sin = angles ? angles + (size_t)KVKI_ATTEND_KEYS * (a->head_dim / 2) : NULL;
    kvki_attend_block b = {.q = w->q + kv_head * w->n_rows * a->head_dim,
                           .m = (uint32_t)w->n_rows,
                           .head_dim = a->head_dim,
                           .softcap = a->softcap,
                           .s = scratch,
                           .o = out.o,
                           .ldo = w->dpad,
                           .max = out.max,
                           .sum = out.sum};
    kvki_ahead ahead = ahead_of(w, kv_head, block);
    if (w->dpad != a->head_dim)
        memset(out.o, 0, w->n_rows * w->dpad * sizeof(float));
    w->isa->attend_few(&p, &b, &ahead);
}

static state block_state(const job *w, size_t kv_head, size_t i)
{
    return state_at(w, w->states + (kv_head * w->run + i) * w->state_floats);
}

/*
 * A few heads of a block, one after the other: so its rows are read from memory once, and its
 * angles are made once while they are in cache.
 */
static void item_few(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    const kvk_attend_args *a = w->a;
    size_t shares = (a->n_kv_heads + w->share - 1) / w->share, i = item / shares;
    size_t head = item % shares * w->share, end = min_of(a->n_kv_heads, head + w->share);
    size_t from = (w->first + i) * KVKI_ATTEND_KEYS, seen = a->visible ? a->visible[0] : a->n_kv;
    float *angles = w->work + worker * w->work_floats, *scratch = angles + few_angle_floats(w);

    if (w->rotate && seen > from)
        fill_angles(w, w->first + i, scratch, angles, angles + few_angle_floats(w) / 2);
    for (; head < end; head++) {
        state out = block_state(w, head, i);
        if (seen > from)
            attend_few(w, head, w->first + i, min_of(seen - from, KVKI_ATTEND_KEYS),
                       w->rotate ? angles : NULL, scratch, out);
        else
            state_clear(w, out, w->n_rows);
    }
}

static void item_block(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    size_t kv_head = item / w->n, i = item % w->n, block = w->first + i;
    float *packed = w->work + worker * w->work_floats;
    float *scores = packed + w->pack_floats;
    bool finite = pack_block(w, kv_head, block, scores + SCORE_FLOATS, packed);
    state out = block_state(w, kv_head, i);

    if (!attend_rows(w, kv_head, 0, w->n_rows, block, packed, finite, scores, out))
        state_clear(w, out, w->n_rows);
}

static void item_merge(void *arg, size_t kv_head, uint32_t worker)
{
    const job *w = arg;
    state all = merged_at(w, kv_head, 0);

    (void)worker;
    if (w->first == 0)
        state_clear(w, all, w->n_rows);
    for (size_t i = 0; i < w->n; i++)
        merge_rows(w, w->n_rows, block_state(w, kv_head, i), all);
    if (is_last(w))
        finish_rows(w, kv_head, 0, w->n_rows, all);
}

static void run_blocks(kvk_backend *be, job *w)
{
    size_t heads = w->a->n_kv_heads;

    if (w->few)
        kvki_pool_run(be->pool, (heads + w->share - 1) / w->share * w->n, item_few, w);
    else
        kvki_pool_run(be->pool, heads * w->n, item_block, w);
    kvki_pool_run(be->pool, heads, item_merge, w);
}

/* ---- the whole ---- */

static job job_of(const kvk_backend *be, const kvk_attend_args *a)
{
    size_t group = a->n_q_heads / a->n_kv_heads, panel = be->isa->panel;
    job w = {.a = a, .isa = be->isa, .group = group, .n_rows = a->n_q * group};

    w.tiles = (w.n_rows + KVKI_ATTEND_ROWS - 1) / KVKI_ATTEND_ROWS;
    w.blocks = ((size_t)a->n_kv + KVKI_ATTEND_KEYS - 1) / KVKI_ATTEND_KEYS;
    w.dpad = (a->head_dim + panel - 1) / panel * panel;
    w.pack_floats = KVKI_ATTEND_KEYS * (a->head_dim + w.dpad);
    w.state_rows = min_of(w.n_rows, KVKI_ATTEND_ROWS);
    w.state_floats = (w.state_rows * (2 + w.dpad) + ALIGN_FLOATS - 1) / ALIGN_FLOATS * ALIGN_FLOATS;
    w.rotate = a->inv_freq && a->k_positions;
    w.few = w.n_rows <= FEW_ROWS_MAX && a->head_dim % w.isa->lanes == 0 &&
            (!a->visible || a->visible[0] == a->visible[a->n_q - 1]);
    w.turned = w.few && w.rotate && a->dtype == KVK_BF16 && a->head_dim % (4 * w.isa->lanes) == 0;
    return w;
}

/* How the work is cut. Gives the floats that a run's blocks keep. */
static size_t plan(job *w, size_t threads)
{
    size_t heads = w->a->n_kv_heads;
    size_t block_floats = heads * (w->tiles == 1 ? w->state_floats : w->pack_floats);
    size_t angles = w->rotate && !w->few ? (size_t)KVKI_ATTEND_KEYS * w->a->head_dim : 0;
    size_t most = threads * RUN_BYTES / ((block_floats + angles) * sizeof(float));

    w->run = max_of(1, min_of(most, w->blocks));
    /* As many tiles, or heads of a block, to an item as leaves each thread four items. */
    if (w->few) {
        w->share = min_of(heads, max_of(1, w->run * heads / (threads * 4)));
        w->work_floats = few_angle_floats(w) + SCORE_FLOATS + tmp_floats(w);
    } else {
        w->share = min_of(SHARE_MAX, max_of(1, w->tiles * heads / (threads * 4)));
        w->work_floats = w->tiles == 1 ? w->pack_floats + SCORE_FLOATS + tmp_floats(w)
                                       : max_of(SCORE_FLOATS + w->state_floats, tmp_floats(w));
    }
    return w->run * block_floats;
}

/* All memory of a call, in one piece; NULL: there is none. Every part keeps the alignment. */
static float *place(kvk_backend *be, job *w)
{
    const kvk_attend_args *a = w->a;
    size_t threads = kvki_pool_threads(be->pool), kept_floats = plan(w, threads);
    size_t q_floats = ((size_t)a->n_q * a->n_q_heads * a->head_dim + ALIGN_FLOATS - 1) /
                      ALIGN_FLOATS * ALIGN_FLOATS;
    size_t angle_floats = w->rotate && !w->few ? w->run * KVKI_ATTEND_KEYS * (a->head_dim / 2) : 0;
    size_t merged_floats = a->n_kv_heads * w->tiles * w->state_floats;
    size_t n_floats = kept_floats + merged_floats + threads * w->work_floats + q_floats;
    float *memory = kvki_scratch_take(be->scratch, (n_floats + 2 * angle_floats) * sizeof(float) +
                                                       a->n_kv_heads * w->run * sizeof(bool));

    if (!memory)
        return NULL;
    w->packed = w->states = memory;
    w->merged = memory + kept_floats;
    w->work = w->merged + merged_floats;
    w->q = w->work + threads * w->work_floats;
    w->cos = w->q + q_floats;
    w->sin = w->cos + angle_floats;
    w->finite = (bool *)(w->sin + angle_floats);
    return memory;
}

kvc_status kvki_fast_attend(kvk_backend *be, const kvk_attend_args *a)
{
    float *memory = NULL;

    if (a->n_q == 0)
        return KVC_OK;
    job w = job_of(be, a);
    memory = place(be, &w);
    if (!memory)
        return KVC_NO_MEMORY;
    kvki_pool_run(be->pool, a->n_q, item_query, &w);
    w.kept = w.rotate ? kept_angles(be, a) : NULL;
    do {
        w.n = min_of(w.run, w.blocks - w.first);
        if (w.rotate && !w.few)
            kvki_pool_run(be->pool, w.n, item_angles, &w);
        if (w.tiles == 1)
            run_blocks(be, &w);
        else
            run_tiles(be, &w);
        w.first += w.n;
    } while (w.first < w.blocks);
    kvki_scratch_give(be->scratch, memory);
    return KVC_OK;
}
