/*
 * prefill_90a.cu: attention of a chunk as prefill.cu's, on the warpgroup products of sm_90a, for
 * which alone this file is compiled.
 *
 * A block is two warpgroups of 64 query rows each and a warp that has the copy engine bring tiles
 * of K and of V, each in a ring of its own. A warpgroup keeps queries, scores, weights and sums in
 * registers. It asks for a tile's scores and for the values of the tile before in one go, and takes
 * the softmax of the one while the other is summed; the two warpgroups ask in turns, so that one's
 * softmax is hidden behind the other's products. The order of sums is that of the keys, whoever
 * is faster.
 */
#include "prefill_rows.cuh"

#define GROUPS  2u /* warpgroups of rows */
#define WARPS   (GROUPS * 4u)
#define THREADS ((GROUPS + 1u) * 128u)
#define STAGES  3u

/* Registers of a thread, after those of the warps that bring tiles have given theirs: the block
 * begins with 168 for each, and what one is given another must have given back. */
#define ROWS_REGISTERS  240
#define BRING_REGISTERS 24

static_assert(GROUPS * (ROWS_REGISTERS - 168) <= 168 - BRING_REGISTERS, "else they wait forever");

template <int kDim, int kPieces> struct form {
    static const int keys = kPieces == 1 ? PREFILL_KEYS_MAX : PREFILL_KEYS;
    static const uint32_t panel = keys * PANEL_ROW_BYTES;
    static const uint32_t piece = keys * kDim * 2;
    static const uint32_t part = kPieces * piece; /* K of a tile, or V */
};

/* What the block's roles share, before the stages. */
struct rings {
    uint64_t k_there[STAGES], k_read[STAGES], v_there[STAGES], v_read[STAGES];
    uint64_t holes[STAGES][PREFILL_KEYS_MAX / 64u];
};

/* The warp that brings the tiles. */
template <int kDim, int kPieces>
__device__ static inline void bring_tiles(const kvk_cuda_prefill_args *a,
                                          const struct prefill_block &b, struct rings *r, char *k,
                                          char *v)
{
    typedef form<kDim, kPieces> F;
    uint32_t found = look_for_holes<F::keys>(a, b, b.tile);

    for (uint32_t i = 0; i < b.end - b.tile; i++) {
        uint32_t stage = i % STAGES, before = (i / STAGES + 1u) % 2u; /* the phase before this */
        const char *from = b.packed + (size_t)(b.tile + i) * 2u * F::part;
        uint64_t holes[F::keys / 64];
        share_holes<F::keys>(found, holes);
        found = look_for_holes<F::keys>(a, b, b.tile + i + 1);
        if ((threadIdx.x & 31u) == 0) {
            if (i >= STAGES)
                bulk_wait(&r->k_read[stage], before);
#pragma unroll
            for (int h = 0; h < F::keys / 64; h++)
                r->holes[stage][h] = holes[h];
            bulk_expect(&r->k_there[stage], F::part);
            bulk_copy_shared(k + stage * F::part, from, F::part, &r->k_there[stage]);
            if (i >= STAGES)
                bulk_wait(&r->v_read[stage], before);
            bulk_expect(&r->v_there[stage], F::part);
            bulk_copy_shared(v + stage * F::part, from + F::part, F::part, &r->v_there[stage]);
        }
        __syncwarp();
    }
}

/* The warp is done with what the barrier guards. */
__device__ static inline void give_back(uint64_t *barrier)
{
    __syncwarp();
    if ((threadIdx.x & 31u) == 0)
        bulk_arrive(barrier);
}

/* Asks for the scores of a tile. */
template <int kDim, int kPieces>
__device__ static inline void ask_scores(const uint32_t (&q)[kPieces][kDim / 16][4], uint64_t tile,
                                         float (&x)[form<kDim, kPieces>::keys / 8][4])
{
    typedef form<kDim, kPieces> F;

#pragma unroll
    for (int step = 0; step < kDim / 16; step++) {
        uint64_t k = wgmma_from(tile, step / 4 * F::panel + step % 4 * 32);
        wgmma<false>(x, q[0][step], k, step > 0);
        if (kPieces == 2) {
            wgmma<false>(x, q[kPieces - 1][step], k, 1);
            wgmma<false>(x, q[0][step], wgmma_from(k, F::piece), 1);
        }
    }
    wgmma_commit();
}

/* Asks for the values of a tile, weighted, to be added. */
template <int kDim, int kPieces>
__device__ static inline void
ask_values(const uint32_t (&w)[kPieces][form<kDim, kPieces>::keys / 16][4], uint64_t tile,
           float (&o)[kDim / 8][4])
{
    typedef form<kDim, kPieces> F;

#pragma unroll
    for (int step = 0; step < F::keys / 16; step++) {
        uint64_t v = wgmma_from(tile, step * 2 * PANEL_GROUP_BYTES);
        wgmma<true>(o, w[0][step], v, 1);
        if (kPieces == 2) {
            wgmma<true>(o, w[kPieces - 1][step], v, 1);
            wgmma<true>(o, w[0][step], wgmma_from(v, F::piece), 1);
        }
    }
    wgmma_commit();
}

/* The warpgroups' turns at asking: a named barrier each, which the other arrives at. */
__device__ static inline void wait_for_turn(uint32_t group)
{
    asm volatile("bar.sync %0, 256;" ::"r"(group + 1u) : "memory");
}

__device__ static inline void pass_turn(uint32_t group)
{
    asm volatile("bar.arrive %0, 256;" ::"r"(2u - group) : "memory");
}

/* Whether `x` holds in any thread of the warpgroup, told to all of them: what decides about a wait
 * for products has to be the same for its four warps. */
__device__ static inline bool any_of_group(uint32_t group, bool x)
{
    uint32_t any;
    asm volatile("{\n\t.reg .pred p, q;\n\tsetp.ne.u32 p, %1, 0;\n\t"
                 "barrier.cta.red.or.pred q, %2, 128, p;\n\tselp.u32 %0, 1, 0, q;\n\t}"
                 : "=r"(any)
                 : "r"((uint32_t)x), "r"(group + 3u)
                 : "memory");
    return any != 0;
}

/* Scores of the block's i-th tile that have come: capped and masked; its keys are done with. */
template <int kDim, int kPieces>
__device__ static inline void
see_scores(const kvk_cuda_prefill_args *a, const struct prefill_block &b, uint32_t first,
           uint32_t i, struct rings *r, float (&x)[form<kDim, kPieces>::keys / 8][4])
{
    typedef form<kDim, kPieces> F;
    uint32_t stage = i % STAGES, tile = b.tile + i;
    uint64_t holes[F::keys / 64], any = 0;

    /* The lane reads that arrives. */
#pragma unroll
    for (int h = 0; h < F::keys / 64; h++) {
        uint64_t own = (threadIdx.x & 31u) == 0 ? r->holes[stage][h] : 0;
        any |= holes[h] = __shfl_sync(KVKI_FULL_WARP, own, 0);
    }
    give_back(&r->k_read[stage]);
    cap_scores<F::keys>(a, x);
    if (any || (tile + 1) * F::keys > b.all_see)
        mask_scores<F::keys>(a, b, first, tile, holes, x);
}

/* An operand from registers: written before the products that read it, and no sooner again than
 * they have ended. */
template <int kPieces, int kSteps>
__device__ static inline void pin_operand(uint32_t (&a)[kPieces][kSteps][4])
{
#pragma unroll
    for (int piece = 0; piece < kPieces; piece++)
        wgmma_pin(a[piece]);
}

/* A warpgroup's rows over the block's tiles, of which there is one at least. */
template <int kDim, int kPieces>
__device__ static inline void
attend_tiles(const kvk_cuda_prefill_args *a, const struct prefill_block &b, uint32_t first,
             struct rings *r, uint64_t k, uint64_t v, struct rows_state<kDim, kPieces> *s)
{
    typedef form<kDim, kPieces> F;
    uint32_t n = b.end - b.tile, group = threadIdx.x / 128u, stage = 0;
    uint32_t w[kPieces][F::keys / 16][4];
    float x[F::keys / 8][4], keep[2];

    if (group == 1)
        pass_turn(group); /* the other begins */
    bulk_wait(&r->k_there[0], 0);
    pin_operand(s->q);
    wgmma_begin();
    ask_scores<kDim, kPieces>(s->q, k, x);
    wgmma_wait_but<0>();
    wgmma_pin(x);
    see_scores<kDim, kPieces>(a, b, first, 0, r, x);
    weigh_scores<kDim, kPieces, F::keys>(x, s, keep);
    split_weights<kPieces, F::keys>(x, w);
    for (uint32_t i = 1; i < n; i++) {
        uint32_t before = stage;
        stage = i % STAGES;
        bulk_wait(&r->k_there[stage], i / STAGES % 2u);
        bulk_wait(&r->v_there[before], (i - 1u) / STAGES % 2u);
        wait_for_turn(group);
        pin_operand(w);
        wgmma_pin(s->o);
        wgmma_begin();
        ask_scores<kDim, kPieces>(s->q, wgmma_from(k, stage * F::part), x);
        ask_values<kDim, kPieces>(w, wgmma_from(v, before * F::part), s->o);
        pass_turn(group);
        wgmma_wait_but<1>();
        wgmma_pin(x);
        see_scores<kDim, kPieces>(a, b, first, i, r, x);
        weigh_scores<kDim, kPieces, F::keys>(x, s, keep);
        /* A wait for either case: one before the branch would be moved before the softmax. */
        if (any_of_group(group, keep[0] != 1.0f || keep[1] != 1.0f)) {
            wgmma_wait_but<0>();
            wgmma_pin(s->o);
            scale_sums<kDim, kPieces>(keep, s);
        } else {
            wgmma_wait_all();
            wgmma_pin(s->o);
        }
        pin_operand(w);
        give_back(&r->v_read[before]);
        split_weights<kPieces, F::keys>(x, w);
    }
    bulk_wait(&r->v_there[stage], (n - 1u) / STAGES % 2u);
    pin_operand(w);
    wgmma_pin(s->o);
    wgmma_begin();
    ask_values<kDim, kPieces>(w, wgmma_from(v, stage * F::part), s->o);
    wgmma_wait_but<0>();
    pin_operand(w);
    wgmma_pin(s->o);
    if (group == 0)
        wait_for_turn(group); /* the last one passed on */
}

__device__ static inline void begin_rings(struct rings *r)
{
    if (threadIdx.x < STAGES) {
        bulk_init(&r->k_there[threadIdx.x], 1);
        bulk_init(&r->v_there[threadIdx.x], 1);
        bulk_init(&r->k_read[threadIdx.x], WARPS);
        bulk_init(&r->v_read[threadIdx.x], WARPS);
    }
    bulk_begin();
    __syncthreads();
}

template <int kDim, int kPieces>
__global__ void __launch_bounds__(THREADS, 1) prefill_90a_kernel(const struct prefill_params p)
{
    typedef form<kDim, kPieces> F;
    extern __shared__ char memory[];
    __shared__ struct rings rings;
    char *k = memory + (0u - bulk_address(memory)) % PANEL_GROUP_BYTES, *v = k + STAGES * F::part;
    uint32_t warp = threadIdx.x / 32u;
    struct prefill_block b;

    /* Packing writes the tiles alone, and began when all before it had ended: what else is read may
     * be read before it ends. */
    begin_rings(&rings);
    if (!prefill_find_block<F::keys>(&p, &b)) {
        kvki_wait_for_previous();
        return;
    }
    if (warp >= WARPS) {
        wgmma_registers<BRING_REGISTERS, false>();
        kvki_wait_for_previous();
        kvki_let_next_start();
        if (warp == WARPS)
            bring_tiles<kDim, kPieces>(&p.a, b, &rings, k, v);
    } else {
        wgmma_registers<ROWS_REGISTERS, true>();
        struct rows_state<kDim, kPieces> s;
        uint32_t first = b.first + warp * 16u;
        load_rows<kDim, kPieces>(&p.a, b, first, &s);
        kvki_wait_for_previous();
        kvki_let_next_start();
        if (b.tile < b.end)
            attend_tiles<kDim, kPieces>(&p.a, b, first, &rings, wgmma_tile(k, F::panel),
                                        wgmma_tile(v, F::panel), &s);
        store_rows<kDim, kPieces>(&p, b, first, s);
    }
}

template <int kDim, int kPieces> static prefill_fn kernel_and_smem(size_t *smem_p)
{
    *smem_p = PANEL_GROUP_BYTES + STAGES * 2u * form<kDim, kPieces>::part;
    return prefill_90a_kernel<kDim, kPieces>;
}

static prefill_fn kernel_of(uint32_t head_dim, uint32_t pieces, size_t *smem_p)
{
    if (head_dim == 128)
        return pieces == 1 ? kernel_and_smem<128, 1>(smem_p) : kernel_and_smem<128, 2>(smem_p);
    return pieces == 1 ? kernel_and_smem<64, 1>(smem_p) : kernel_and_smem<64, 2>(smem_p);
}

bool kvki_prefill_90a_runs(const kvk_cuda *cuda)
{
    return cuda->info.sm == 90;
}

kvc_status kvki_prefill_90a(const kvk_cuda *cuda, const struct prefill_params &p, dim3 grid,
                            kvk_stream *stream)
{
    size_t smem = 0;
    prefill_fn kernel = kernel_of(p.a.head_dim, p.pieces, &smem);

    return prefill_launch(cuda, kernel, grid, THREADS, smem, stream, p);
}
