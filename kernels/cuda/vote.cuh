/*
 * vote.cuh: the parts of vote.cu that go over the index: sample and scan. Device code, called by
 * the whole block.
 */
#ifndef KVKI_CUDA_VOTE_CUH
#define KVKI_CUDA_VOTE_CUH

#include "vote_tiles.cuh"

/* How many groups of a sequence are sampled: a sixteenth of its tiles, but at least 16 groups. */
__device__ static inline uint32_t sampled_groups(uint32_t n_tiles)
{
    return min(GROUPS, max(16u, n_tiles / (16u * TOPK_WARPS)));
}

/* (maximum, sum) of the logits of one tile that has been fetched, for each slot, to parts. */
template <class Form>
__device__ static __noinline__ void sample_tile(const struct vote_params *p, uint32_t seq,
                                                uint32_t tile)
{
    struct vote_block<Form> *sh = vote_shared<Form>();
    uint32_t n = sh->topk.n_rows[seq], lane = threadIdx.x & 31u, row = lane / 4;
    uint32_t left = tile == VOTE_NONE ? 0 : n - tile * VOTE_TILE;
    size_t stride = Form::kStaged ? Form::kRow : p->shape.row_bytes;
    const uint8_t *rows = Form::kStaged
                              ? tile_room<Form>(0)
                              : index_of<Form>(p, seq) + (size_t)tile * VOTE_TILE * stride;
    struct vote_query<Form> query;
    typename Form::two_rows mine;
    float2 all[Form::kQuads];

    query.load(p->shape);
    if (comes_whole<Form>() && tile != VOTE_NONE) {
        uint32_t phases = sh->phases[threadIdx.x / 32u];
        await_tile<Form>(0, &phases);
        __syncwarp();
        sh->phases[threadIdx.x / 32u] = phases; /* all lanes the same */
    } else if (Form::kStaged) {
        kvki_async_wait();
    }
    __syncwarp();
    for (uint32_t i = 0; i < Form::kQuads; i++)
        all[i] = make_float2(-INFINITY, 0);
    if (left > 0) {
        if constexpr (Form::kStaged)
            Form::take(rows, left, &mine);
        else
            mine = {rows + min(row, left - 1) * stride, rows + min(row + 8, left - 1) * stride};
        query.form.score(p->shape, sh->query, mine, [&](uint32_t i, float x, float y) {
            x = row < left ? x * query.scale[i] : -INFINITY;
            y = row + 8 < left ? y * query.scale[i] : -INFINITY;
            all[i] = join(make_float2(x, 1.0f), make_float2(y, 1.0f));
        });
    }
#pragma unroll
    for (uint32_t first = 0; first < Form::kQuads; first += 8) {
        transpose(*(float2(*)[8])(all + first), [](float2 mine, float2 send, uint32_t step) {
            return join(mine, make_float2(__shfl_xor_sync(KVKI_FULL_WARP, send.x, step),
                                          __shfl_xor_sync(KVKI_FULL_WARP, send.y, step)));
        });
        sh->parts[first * 4 + lane][threadIdx.x / 32u] = all[first];
    }
}

/* The sample of all sequences; the blocks take turns at groups of tiles. The grid calls. */
template <class Form> __device__ static void sample_all(const struct vote_params *p)
{
    struct vote_block<Form> *sh = vote_shared<Form>();

    for (uint32_t item = blockIdx.x; item < p->job.n_seqs * GROUPS; item += gridDim.x) {
        uint32_t seq = item / GROUPS, group = item % GROUPS, tile = VOTE_NONE;
        uint32_t n = sh->topk.n_rows[seq], n_tiles = (n + VOTE_TILE - 1) / VOTE_TILE;
        uint32_t groups = sampled_groups(n_tiles), most = min(n_tiles, groups * TOPK_WARPS);
        uint32_t number = group * TOPK_WARPS + threadIdx.x / 32u;
        if (group >= groups)
            continue;
        tile = number < most ? (uint32_t)((uint64_t)number * n_tiles / most) : VOTE_NONE;
        if (Form::kStaged)
            fetch_tile<Form>(index_of<Form>(p, seq), n, tile, 0);
        load_query<Form>(p, seq);
        sample_tile<Form>(p, seq, tile);
        __syncthreads();
        for (uint32_t slot = threadIdx.x / 16u; slot < n_slots<Form>(p);
             slot += TOPK_THREADS / 16u) {
            float2 all = sh->parts[slot][threadIdx.x % 16u];
            for (uint32_t step = 1; step < 16; step *= 2)
                all = join(all, make_float2(__shfl_xor_sync(KVKI_FULL_WARP, all.x, step),
                                            __shfl_xor_sync(KVKI_FULL_WARP, all.y, step)));
            if (threadIdx.x % 16u == 0)
                p->space.sample[((size_t)seq * VOTE_SLOTS_MAX + slot) * GROUPS + group] = all;
        }
        __syncthreads();
    }
}

/* Makes seq's shifts the block's: from its sample or, in a second scan, from its maxima. */
template <class Form>
__device__ static __noinline__ void load_shifts(const struct vote_params *p, uint32_t seq,
                                                bool again)
{
    const struct vote_space *space = &p->space;
    struct vote_block<Form> *sh = vote_shared<Form>();
    uint32_t n_tiles = (sh->topk.n_rows[seq] + VOTE_TILE - 1) / VOTE_TILE;
    uint32_t groups = sampled_groups(n_tiles), lane = threadIdx.x & 31u;

    if (sh->shift_seq == seq && !again)
        return;
    __syncthreads();
#pragma unroll 2
    for (uint32_t slot = threadIdx.x / 32u; slot < n_slots<Form>(p); slot += TOPK_WARPS) {
        size_t at = (size_t)seq * VOTE_SLOTS_MAX + slot;
        uint32_t key = __ldcg(space->most + at);
        float2 all = make_float2(-INFINITY, 0), part[GROUPS / 32];
        float shift = 0;
#pragma unroll
        for (uint32_t i = 0; i < GROUPS / 32; i++) /* what was not sampled is not used */
            part[i] = __ldcg(space->sample + at * GROUPS + i * 32 + lane);
#pragma unroll
        for (uint32_t i = 0; i < GROUPS / 32; i++) {
            if (i * 32 + lane < groups)
                all = join(all, part[i]);
        }
        for (uint32_t step = 1; step < 32; step *= 2)
            all = join(all, make_float2(__shfl_xor_sync(KVKI_FULL_WARP, all.x, step),
                                        __shfl_xor_sync(KVKI_FULL_WARP, all.y, step)));
        shift = again ? (key ? topk_score(key) : 0.0f) : all.x + log2f(all.y);
        if (lane == 0)
            sh->shift[slot] = Form::head_of(p->shape, slot) == VOTE_NONE ? INFINITY : shift;
    }
    if (threadIdx.x == 0)
        sh->shift_seq = seq;
    __syncthreads();
}

/* Adds x >= 0 to a sum that is kept by exponents; says whether it was finite. */
__device__ static inline bool add_exactly(unsigned long long *sum, float x)
{
    uint32_t bits = __float_as_uint(x), exponent = bits >> 23;

    if (exponent == 0)
        return true;
    if (exponent >= 255u)
        return false;
    atomicAdd(sum + exponent / BUCKETS, (unsigned long long)((bits & 0x7fffffu) | 0x800000u)
                                            << exponent % BUCKETS);
    return true;
}

__device__ static inline double total_of(const unsigned long long *sum)
{
    unsigned long long all[BUCKETS];
    double total = 0;

#pragma unroll
    for (uint32_t b = 0; b < BUCKETS; b++)
        all[b] = __ldcg(sum + b);
#pragma unroll
    for (int b = (int)BUCKETS - 1; b >= 0; b--)
        total += (double)all[b] * __hiloint2double((1023 + b * (int)BUCKETS - 150) << 20, 0);
    return total;
}

/* The lanes' sums over a unit's rows into the block's. */
template <class Form> __device__ static inline void add_unit(float (&z)[Form::kQuads])
{
    struct vote_block<Form> *sh = vote_shared<Form>();

#pragma unroll
    for (uint32_t first = 0; first < Form::kQuads; first += 8) {
        transpose(*(float(*)[8])(z + first), [](float mine, float send, uint32_t step) {
            return mine + __shfl_xor_sync(KVKI_FULL_WARP, send, step);
        });
        if (!add_exactly(sh->sums[first * 4 + (threadIdx.x & 31u)], z[first]))
            sh->overflow = 1;
    }
#pragma unroll
    for (uint32_t i = 0; i < Form::kQuads; i++)
        z[i] = 0;
}

/* Joins x of row g and y of row g + 8 over the four lanes of g: lane 4 g ends with x, the others
 * with y. */
template <class Value, class Join>
__device__ static inline Value join_rows(Value x, Value y, Join join_two)
{
    for (uint32_t step = 1; step < 4; step *= 2) {
        x = join_two(x, __shfl_xor_sync(KVKI_FULL_WARP, x, step));
        y = join_two(y, __shfl_xor_sync(KVKI_FULL_WARP, y, step));
    }
    return threadIdx.x % 4 ? y : x;
}

/* The row of a tile that the lane has after join_rows; at least VOTE_TILE: none. */
__device__ static inline uint32_t joined_row()
{
    uint32_t lane = threadIdx.x & 31u;
    return lane % 4 < 2 ? lane / 4 + lane % 4 * 8 : VOTE_TILE;
}

/* Where a row is counted that has its greatest e, `bits` without its lowest ones, in `slot`: by
 * slot and size, or VOTE_COUNTS where e is too small. The least e of a bin is edge_of it. */
template <class Form> __device__ static inline uint32_t bin_of(uint32_t slot, uint32_t bits)
{
    int bin = (int)(bits >> Form::kBinBit) - (int)(Form::kLeastBits >> Form::kBinBit);
    return bin < 0 ? VOTE_COUNTS : slot * Form::kBins + min((uint32_t)bin, Form::kBins - 1);
}

template <class Form> __device__ static inline float edge_of(uint32_t at)
{
    return __uint_as_float(Form::kLeastBits + (at % Form::kBins << Form::kBinBit));
}

/* Adds the block's counts and sums of a run to the sequence's. */
template <class Form> __device__ static void publish_scan(const struct vote_params *p, uint32_t seq)
{
    const struct vote_space *space = &p->space;
    struct vote_block<Form> *sh = vote_shared<Form>();
    unsigned long long *sums = space->sums + (size_t)seq * VOTE_SLOTS_MAX * BUCKETS;

    __syncthreads();
    for (uint32_t i = threadIdx.x; i < VOTE_COUNTS; i += TOPK_THREADS) {
        if (sh->counts[i])
            atomicAdd(space->counts + (size_t)seq * VOTE_COUNTS + i, sh->counts[i]);
    }
    for (uint32_t i = threadIdx.x; i < n_slots<Form>(p) * BUCKETS; i += TOPK_THREADS) {
        if (sh->sums[0][i])
            atomicAdd(sums + i, sh->sums[0][i]);
    }
    if (threadIdx.x == 0 && sh->overflow) {
        atomicOr(space->overflow + seq, 1u);
        atomicOr(space->overflow + p->job.n_seqs, 1u);
    }
}

/* First votes and sums of a run whose walk has begun. */
template <class Form>
__device__ static __noinline__ void scan_run(const struct vote_params *p, struct vote_run run,
                                             struct vote_feed feed)
{
    constexpr uint32_t kSlotBits = Form::kSlots - 1;
    struct vote_block<Form> *sh = vote_shared<Form>();
    float2 *firsts = p->space.firsts + run.seq * p->job.space.stride;
    uint32_t n = sh->topk.n_rows[run.seq], row = (threadIdx.x & 31u) / 4, at = joined_row();
    struct vote_query<Form> query;
    float z[Form::kQuads] = {};

    for (uint32_t i = threadIdx.x; i < VOTE_COUNTS; i += TOPK_THREADS)
        sh->counts[i] = 0;
    for (uint32_t i = threadIdx.x; i < n_slots<Form>(p) * BUCKETS; i += TOPK_THREADS)
        sh->sums[0][i] = 0;
    if (threadIdx.x == 0)
        sh->overflow = 0;
    __syncthreads();
    query.load(p->shape);
    walk<Form>(
        p, run, feed, [&](uint32_t tile, uint32_t left, const typename Form::two_rows &rows) {
            float one = row < left ? 1.0f : 0.0f, two = row + 8 < left ? 1.0f : 0.0f, a = 0, b = 0;
            uint32_t top_a = 0, top_b = 0;
            query.form.score(p->shape, sh->query, rows, [&](uint32_t i, float x, float y) {
                float ex = exp2_of(fmaf(x, query.scale[i], -query.shift[i]));
                float ey = exp2_of(fmaf(y, query.scale[i], -query.shift[i]));
                z[i] = fmaf(ey, two, fmaf(ex, one, z[i]));
                a += ex;
                b += ey;
                top_a = max(top_a, (__float_as_uint(ex) & ~kSlotBits) | i * 4);
                top_b = max(top_b, (__float_as_uint(ey) & ~kSlotBits) | i * 4);
            });
            float vote = join_rows(a, b, [](float mine, float other) { return mine + other; });
            uint32_t top =
                join_rows(top_a | threadIdx.x % 4, top_b | threadIdx.x % 4,
                          [](uint32_t mine, uint32_t other) { return max(mine, other); });
            if (at < min(left, VOTE_TILE)) {
                uint32_t bin = bin_of<Form>(top & kSlotBits, top & ~kSlotBits);
                firsts[tile * VOTE_TILE + at] = make_float2(vote, __uint_as_float(top));
                if (bin < VOTE_COUNTS)
                    atomicAdd(&sh->counts[bin], 1u);
            }
            if ((tile + 1) % UNIT == 0 || (tile + 1) * VOTE_TILE >= n)
                add_unit<Form>(z);
        });
    publish_scan<Form>(p, run.seq);
}

/* Largest logits of a run, for a second scan. */
template <class Form>
__device__ static __noinline__ void most_of_run(const struct vote_params *p, struct vote_run run,
                                                struct vote_feed feed)
{
    struct vote_block<Form> *sh = vote_shared<Form>();
    uint32_t lane = threadIdx.x & 31u;
    struct vote_query<Form> query;
    float most[Form::kQuads];

    for (uint32_t i = 0; i < Form::n_quads(p->shape); i++)
        most[i] = -INFINITY;
    for (uint32_t i = threadIdx.x; i < n_slots<Form>(p); i += TOPK_THREADS)
        sh->most[i] = 0;
    __syncthreads();
    query.load(p->shape);
    walk<Form>(p, run, feed, [&](uint32_t, uint32_t, const typename Form::two_rows &rows) {
        query.form.score(p->shape, sh->query, rows, [&](uint32_t i, float x, float y) {
            most[i] = fmaxf(most[i], fmaxf(x * query.scale[i], y * query.scale[i]));
        });
    });
    for (uint32_t i = 0; i < Form::n_quads(p->shape); i++)
        atomicMax(&sh->most[i * 4 + lane % 4], topk_key(most[i]));
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < n_slots<Form>(p); i += TOPK_THREADS)
        atomicMax(p->space.most + (size_t)run.seq * VOTE_SLOTS_MAX + i, sh->most[i]);
}

#endif
