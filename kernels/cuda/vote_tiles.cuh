/*
 * vote_tiles.cuh: what a block of a vote keeps in shared memory: the query of one sequence at a
 * time, in registers as its form wants it, and tiles of 16 rows on their way. Device code.
 *
 * A warp has room for two tiles, which the copy engine fills where it can (sm_90, rows of whole
 * pieces of 16 bytes), else copies of each lane. It takes a tile into registers first, so that two
 * are on their way while it scores one. Functions on a view are called by the whole block unless
 * they say otherwise.
 */
#ifndef KVKI_CUDA_VOTE_TILES_CUH
#define KVKI_CUDA_VOTE_TILES_CUH

#include "bulk.cuh"
#include "exp2.cuh"
#include "vote_form.cuh"

#define GROUPS  128u  /* of TOPK_WARPS sampled tiles, at most */
#define UNIT    4u    /* tiles */
#define BINS    2048u /* of least votes, by the upper bits of the float */
#define BIN_BIT 20
#define BUCKETS 16u /* of a sum, by the upper bits of the exponent */
#define CHUNK   (16u * TOPK_THREADS)

/* The workspace past topk's. All but sample is 0 between launches. */
struct vote_space {
    float2 *sample;           /* [n_seqs, VOTE_SLOTS_MAX, GROUPS] maximum, sum */
    float2 *firsts;           /* [n_seqs, topk's stride] a row's first vote, and its greatest e */
    uint32_t *counts;         /* [n_seqs, VOTE_COUNTS] */
    unsigned long long *sums; /* [n_seqs, VOTE_SLOTS_MAX, BUCKETS] */
    uint32_t *most;           /* [n_seqs, VOTE_SLOTS_MAX] keys of maxima, for a second scan */
    uint32_t *overflow;       /* [n_seqs + 1]; the last: of any */
};

struct vote_params {
    struct topk_job job;
    struct vote_space space;
    struct vote_shape shape;
    const float *q;
};

/* Shared memory of a block. The staged candidates of topk come last: tiles lie there before. */
template <class Form> struct vote_block {
    float scale[Form::kSlots], shift[Form::kSlots], weight[Form::kSlots];
    union {
        unsigned long long sums[Form::kSlots][BUCKETS];
        float2 parts[Form::kSlots][TOPK_WARPS];
    };
    uint32_t counts[VOTE_COUNTS];
    uint32_t most[Form::kSlots];
    uint32_t next_unit, overflow, n_listed;
    uint32_t query_seq, shift_seq; /* whose the query and the shifts are */
    float least, most_weight;
    uint32_t words[Form::kWords][32];
    uint64_t arrived[TOPK_WARPS][2]; /* of a warp's tiles by the copy engine */
    uint32_t phases[TOPK_WARPS];     /* bit i: which phase of arrived[i] comes next */
    __align__(16) int16_t query[Form::kQuery];
    struct topk_block topk;
};

/* A run of a block: units [from, to) of seq, then of [spare, end) those that it is handed. */
struct vote_run {
    uint32_t seq, from, to, spare, end;
};

/* A warp's tiles that are on their way into shared memory. */
struct vote_feed {
    uint32_t now, then, stage, phases;
};

template <class Form> __device__ static inline struct vote_block<Form> *vote_shared() {
    extern __shared__ __align__(16) uint8_t vote_memory[];
    return (struct vote_block<Form> *)vote_memory;
}

/* Sums over 2^x: (maximum, sum relative to it) of two lists as one. */
__device__ static inline float2
join(float2 a, float2 b)
{
    float most = fmaxf(a.x, b.x);

    if (most == -INFINITY)
        return make_float2(-INFINITY, 0);
    return make_float2(most, a.y * exp2_of(a.x - most) + b.y * exp2_of(b.x - most));
}

/*
 * x[i] of the eight lanes that have t in common, joined over them; lane 4 g + t ends with that of
 * x[g] in x[0]. Each value travels once, halved in number at each step.
 */
template <class Value, class Join>
__device__ static inline void transpose(Value (&x)[8], Join join_two)
{
#pragma unroll
    for (uint32_t step = 4; step > 0; step /= 2) {
        bool high = threadIdx.x & (step * 4);
#pragma unroll
        for (uint32_t i = 0; i < step; i++) {
            Value send = high ? x[i] : x[i + step], keep = high ? x[i + step] : x[i];
            x[i] = join_two(keep, send, step * 4);
        }
    }
}

template <class Form> __device__ static inline uint32_t n_slots(const struct vote_params *p)
{
    return Form::n_quads(p->shape) * 4u;
}

template <class Form> __device__ static inline uint8_t *tile_room(uint32_t stage)
{
    return (uint8_t *)vote_shared<Form>()->topk.staged + stage * Form::kStageBytes +
           threadIdx.x / 32u * (VOTE_TILE * Form::kRow);
}

template <class Form>
__device__ static inline const uint8_t *index_of(const struct vote_params *p, uint32_t seq)
{
    return (const uint8_t *)p->job.seqs[seq].index;
}

/* Makes seq's query the view's. The block calls. */
template <class Form>
__device__ static __noinline__ void load_query(const struct vote_params *p, uint32_t seq)
{
    const struct vote_shape *shape = &p->shape;
    struct vote_block<Form> *sh = vote_shared<Form>();
    uint32_t lane = threadIdx.x & 31u;

    if (sh->query_seq == seq)
        return;
    __syncthreads();
#pragma unroll 2
    for (uint32_t slot = threadIdx.x / 32u; slot < n_slots<Form>(p); slot += TOPK_WARPS) {
        uint32_t head = Form::head_of(*shape, slot);
        const float *q = p->q + ((size_t)seq * shape->n_q_heads + head) * shape->dims;
        [[maybe_unused]] float most = 0;
        float scale = 0;
        if constexpr (Form::kStaged) { /* a number a lane, at most */
            float x = head != VOTE_NONE && lane < Form::kDims ? q[lane] : 0.0f;
            scale = __fdiv_rn(kvki_lanes_max(fabsf(x), 32), 32767.0f);
            if (lane < Form::kDims)
                sh->query[slot * Form::kDims + lane] =
                    (int16_t)(scale > 0 ? kvki_quantized(x, scale) : 0);
        } else {
            for (uint32_t d = lane; head != VOTE_NONE && d < shape->dims; d += 32)
                most = fmaxf(most, fabsf(q[d]));
            scale = __fdiv_rn(kvki_lanes_max(most, 32), 32767.0f);
            for (uint32_t d = lane; head != VOTE_NONE && d < shape->dims; d += 32)
                sh->query[slot * shape->dims + d] =
                    (int16_t)(scale > 0 ? kvki_quantized(q[d], scale) : 0);
        }
        if (lane == 0)
            sh->scale[slot] = scale * LOG2_E;
    }
    __syncthreads();
    Form::cut(sh->query, sh->words);
    if (threadIdx.x == 0)
        sh->query_seq = seq;
    __syncthreads();
}

/* The query of the block in the registers of a lane: its form, and for each quad the scale of the
 * lane's head and its shift, for base 2. */
template <class Form> struct vote_query {
    Form form;
    float scale[Form::kQuads], shift[Form::kQuads];

    __device__ void load(const struct vote_shape &shape)
    {
        const struct vote_block<Form> *sh = vote_shared<Form>();

        form.load(sh->words);
        for (uint32_t i = 0; i < Form::n_quads(shape); i++) {
            scale[i] = sh->scale[i * 4 + threadIdx.x % 4];
            shift[i] = sh->shift[i * 4 + threadIdx.x % 4];
        }
    }
};

/* Whether the copy engine brings tiles: rows are whole pieces of 16 bytes, and it is there. */
template <class Form> __device__ constexpr bool comes_whole()
{
#if __CUDA_ARCH__ >= 900
    return Form::kStaged && Form::kRow % 16 == 0;
#else
    return false;
#endif
}

template <class Form> __device__ static inline uint64_t *arrival_of(uint32_t stage)
{
    return &vote_shared<Form>()->arrived[threadIdx.x / 32u][stage];
}

/* Before the first fetch; the block waits for itself after it. */
template <class Form> __device__ static inline void begin_fetches()
{
    if (!comes_whole<Form>())
        return;
    if ((threadIdx.x & 31u) < 2u)
        bulk_init(arrival_of<Form>(threadIdx.x & 31u), 1);
    if ((threadIdx.x & 31u) == 0)
        vote_shared<Form>()->phases[threadIdx.x / 32u] = 0;
    bulk_begin();
}

/* Waits for the tile of a stage, but not for one that was asked for after it. */
template <class Form> __device__ static inline void await_tile(uint32_t stage, uint32_t *phases)
{
    if (comes_whole<Form>()) {
        bulk_wait(arrival_of<Form>(stage), *phases >> stage & 1u);
        *phases ^= 1u << stage;
    } else {
        kvki_async_wait_but<1>();
        __syncwarp();
    }
}

/* Tile `tile` of a sequence of n rows on its way to a stage; VOTE_NONE: nothing. One batch of
 * copies. The warp is done with what was there. */
template <class Form>
__device__ static inline void fetch_tile(const uint8_t *index, uint32_t n, uint32_t tile,
                                         uint32_t stage)
{
    constexpr uint32_t kBytes = VOTE_TILE * Form::kRow;
    uint32_t lane = threadIdx.x & 31u;

    if (comes_whole<Form>()) {
        if (lane != 0 || tile == VOTE_NONE)
            return;
        uint32_t bytes = min(n - tile * VOTE_TILE, VOTE_TILE) * Form::kRow;
        bulk_expect(arrival_of<Form>(stage), bytes);
        bulk_copy(tile_room<Form>(stage), index + (size_t)tile * kBytes, bytes,
                  arrival_of<Form>(stage));
        return;
    }
    uint8_t *to = tile_room<Form>(stage) + lane * 16u;
    const uint8_t *from = index + (size_t)tile * kBytes + lane * 16u;

    if (tile != VOTE_NONE && n - tile * VOTE_TILE >= VOTE_TILE) {
#pragma unroll
        for (uint32_t at = 0; at + 1 <= kBytes; at += 512u) {
            if (at + 512u <= kBytes || lane * 16u < kBytes - at)
                kvki_async_copy(to + at, from + at);
        }
    } else if (tile != VOTE_NONE) {
        uint32_t bytes = (n - tile * VOTE_TILE) * Form::kRow;
#pragma unroll 1
        for (uint32_t at = 0; at + lane * 16u < bytes; at += 512u)
            kvki_async_copy_part(to + at, from + at, min(bytes - at - lane * 16u, 16u));
    }
    kvki_async_commit();
}

/* The warp's tile after `tile`: the next of its unit, or the first of the next unit of the run. */
template <class Form>
__device__ static inline uint32_t next_tile(const struct vote_params *p, const struct vote_run &run,
                                            uint32_t n, uint32_t tile)
{
    uint32_t unit = 0, end = run.to;

    if (tile != VOTE_NONE && (tile + 1) % UNIT != 0 && (tile + 1) * VOTE_TILE < n)
        return tile + 1;
    if ((threadIdx.x & 31u) == 0)
        unit = atomicAdd(&vote_shared<Form>()->next_unit, 1u);
    unit = __shfl_sync(KVKI_FULL_WARP, unit, 0);
    if (unit >= run.to && run.spare < run.end) {
        if ((threadIdx.x & 31u) == 0)
            unit = run.spare + atomicAdd(&p->job.space.counters->tickets[0][0], 1u);
        unit = __shfl_sync(KVKI_FULL_WARP, unit, 0);
        end = run.end;
    }
    return unit < end ? unit * UNIT : VOTE_NONE;
}

/* Begins to go through a run: its first tiles are on their way. The block calls. */
template <class Form>
__device__ static inline struct vote_feed begin_walk(const struct vote_params *p,
                                                     const struct vote_run &run)
{
    struct vote_block<Form> *sh = vote_shared<Form>();
    const uint8_t *index = index_of<Form>(p, run.seq);
    uint32_t n = sh->topk.n_rows[run.seq];
    struct vote_feed feed = {};

    __syncthreads();
    if (threadIdx.x == 0)
        sh->next_unit = run.from;
    __syncthreads();
    if (comes_whole<Form>())
        feed.phases = sh->phases[threadIdx.x / 32u];
    feed.now = next_tile<Form>(p, run, n, VOTE_NONE);
    feed.then = feed.now == VOTE_NONE ? VOTE_NONE : next_tile<Form>(p, run, n, feed.now);
    if (Form::kStaged) {
        fetch_tile<Form>(index, n, feed.now, 0);
        fetch_tile<Form>(index, n, feed.then, 1);
    }
    return feed;
}

/* Calls each(tile, left, rows) for the warp's tiles: the tile has `left` rows or 16, of which rows
 * has the lane's two; a row that is not there is another that is. Their place in shared memory is
 * free by then, so that two tiles are on their way meanwhile. */
template <class Form, class Each>
__device__ static inline void walk(const struct vote_params *p, const struct vote_run &run,
                                   struct vote_feed feed, Each each)
{
    const uint8_t *index = index_of<Form>(p, run.seq);
    uint32_t n = vote_shared<Form>()->topk.n_rows[run.seq], row = (threadIdx.x & 31u) / 4;
    size_t stride = p->shape.row_bytes;

    while (feed.now != VOTE_NONE) {
        uint32_t tile = feed.now, left = n - tile * VOTE_TILE, after = VOTE_NONE;
        const uint8_t *at = index + (size_t)tile * VOTE_TILE * stride;
        typename Form::two_rows rows;
        if constexpr (Form::kStaged) {
            await_tile<Form>(feed.stage, &feed.phases);
            Form::take(tile_room<Form>(feed.stage), left, &rows);
        } else {
            rows = {at + min(row, left - 1) * stride, at + min(row + 8, left - 1) * stride};
        }
        if (feed.then != VOTE_NONE)
            after = next_tile<Form>(p, run, n, feed.then);
        __syncwarp();
        if (Form::kStaged)
            fetch_tile<Form>(index, n, after, feed.stage);
        each(tile, left, rows);
        feed.now = feed.then;
        feed.then = after;
        feed.stage ^= 1u;
    }
    if (comes_whole<Form>() && (threadIdx.x & 31u) == 0)
        vote_shared<Form>()->phases[threadIdx.x / 32u] = feed.phases;
    else if (Form::kStaged)
        kvki_async_wait();
    __syncwarp();
}

#endif
