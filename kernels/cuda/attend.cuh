/*
 * attend.cuh: what the two forms of the attention kernel share: a tile of 16 listed rows in shared
 * memory, fetched from slots or sources, and the partials of a tile in the workspace. Device code.
 *
 * Rows of a tile that do not exist are zeros and marked; their logits do not count.
 */
#ifndef KVKI_CUDA_ATTEND_CUH
#define KVKI_CUDA_ATTEND_CUH

#include "bulk.cuh"
#include "resolve.cuh"
#include "rows.cuh"

#define ATTEND_TILE      16u /* rows; two lanes each */
#define ATTEND_ALL       ((1u << ATTEND_TILE) - 1u)
#define ATTEND_THREADS   256u
#define ATTEND_WARPS     (ATTEND_THREADS / 32u)
#define ATTEND_PAD       16u /* bytes between rows in shared memory: no two lanes meet in a bank */
#define ATTEND_GROUP_MAX 8u
#define ATTEND_GROUP_FEW 4u

struct attend_params {
    kvk_cuda_attend_args a;
    float *o;     /* [n_seqs, n_tiles, n_q_heads, head_dim], not yet divided by total */
    float *most;  /* [n_seqs, n_q_heads, n_tiles] */
    float *total; /* [n_seqs, n_q_heads, n_tiles] */
    uint32_t n_tiles;
    uint32_t n_far; /* of them the list's; then those of near */
    uint32_t
        resolver_rows; /* of the grid, before those of tiles: a block a sequence, the others idle */
};

static inline __host__ __device__ bool attend_is_rotated(const kvk_cuda_attend_args *a)
{
    return a->inv_freq && a->k_positions;
}

/* Shared memory of a block: rows, rotations, and what the scalar form (f16) needs: q and weights.
 */
struct attend_layout {
    size_t q, weights, rotation, bytes;
    uint32_t row_stride;
};

static inline __host__ __device__ struct attend_layout
attend_layout_of(const kvk_cuda_attend_args *a)
{
    struct attend_layout l;

    l.row_stride = (a->row_bytes + 127u) / 128u * 128u + ATTEND_PAD;
    l.rotation = (size_t)ATTEND_TILE * l.row_stride;
    l.q = l.rotation + (attend_is_rotated(a) || (a->near.n_max && a->near.inv_freq)
                            ? (size_t)ATTEND_TILE * a->head_dim * sizeof(float)
                            : 0);
    l.weights = l.q + (size_t)a->n_q_heads * a->head_dim * sizeof(float);
    l.bytes =
        a->dtype != KVK_F16 ? l.q : l.weights + (size_t)a->n_q_heads * ATTEND_TILE * sizeof(float);
    if (a->resolve.k && l.bytes < sizeof(struct resolve_state))
        l.bytes = sizeof(struct resolve_state);
    return l;
}

/* Where the rows of a tile come from, NULL: nowhere; bit sets of those that exist and those that
 * are fetched; where these go, NULL: that is not known yet; and what says that the resident
 * ones have come. */
struct attend_rows {
    const char *from[ATTEND_TILE];
    char *keep[ATTEND_TILE];
    uint32_t there, fetched;
    uint64_t come;
};

/* One thread, before attend_find_rows or its like. */
__device__ static inline void attend_begin(struct attend_rows *rows)
{
    if (threadIdx.x != 0)
        return;
    bulk_init(&rows->come, 1);
    bulk_begin();
}

/* The list's length, which the kernel after may ask for as well, before this one ends. */
__device__ static inline uint32_t attend_list_rows(const kvk_cuda_attend_args *a, uint32_t seq)
{
    const kvk_cuda_resolve_args *r = &a->resolve;
    return r->k ? r->off + min(__ldcg(r->n_picks + seq), r->k)
                : min(__ldcg(a->n_list + seq), a->stride);
}

/* Where rows and their slots are, asked for here: not only once a slot is known, which is where a
 * compiler puts it. */
__device__ static inline kvk_cuda_residency attend_residency(const kvk_cuda_residency *res)
{
    kvk_cuda_residency r = {};

    r.slots = *(void *const volatile *)&res->slots;
    r.slot_of = *(int32_t *const volatile *)&res->slot_of;
    r.n_positions = *(const volatile uint32_t *)&res->n_positions;
    return r;
}

/* Slot and fetch of an entry: as listed, or of a pick that is being resolved; a missing one has no
 * slot yet. */
__device__ static inline int32_t attend_entry(const kvk_cuda_attend_args *a,
                                              const kvk_cuda_residency *res, uint32_t seq,
                                              uint32_t entry, uint32_t *fetch_p)
{
    const kvk_cuda_resolve_args *r = &a->resolve;
    size_t at = (size_t)seq * a->stride + entry;
    uint32_t position = 0;
    int32_t slot = -1;

    if (!r->k || entry < r->off) {
        *fetch_p = a->fetch ? a->fetch[at] : KVK_CUDA_RESIDENT;
        return a->list[at];
    }
    *fetch_p = KVK_CUDA_RESIDENT;
    if (entry - r->off >= r->k)
        return -1;
    position = r->picks[(size_t)seq * r->k + entry - r->off];
    if (position < res->n_positions) {
        slot = res->slot_of[position];
        *fetch_p = slot < 0 ? position : KVK_CUDA_RESIDENT;
    }
    return slot;
}

/*
 * Fills rows for the entries of a list from `first` on; one thread an entry. The list is read at
 * once with its length and with where slots lie, not after them. Gives the length, to all threads;
 * all call.
 */
__device__ static inline uint32_t attend_find_rows(const kvk_cuda_attend_args *a, uint32_t seq,
                                                   uint32_t first, struct attend_rows *rows)
{
    uint32_t r = threadIdx.x, n = attend_list_rows(a, seq), position = KVK_CUDA_RESIDENT;
    const kvk_cuda_residency res = attend_residency(a->res + seq);
    const char *from = NULL;
    char *slot_at = NULL;
    bool fetched = false;

    if (r < ATTEND_TILE && first + r < a->stride) {
        int32_t slot = attend_entry(a, &res, seq, first + r, &position);
        fetched = first + r < n && position != KVK_CUDA_RESIDENT && (slot >= 0 || a->resolve.k);
        if (slot >= 0)
            slot_at = (char *)res.slots + (size_t)slot * a->row_bytes;
        if (first + r < n)
            from = fetched ? kvki_source_row(a->source + seq, position, a->row_bytes) : slot_at;
    }
    if (r < 32u) {
        uint32_t there = __ballot_sync(KVKI_FULL_WARP, from != NULL);
        uint32_t lanes = __ballot_sync(KVKI_FULL_WARP, fetched && from);
        if (r < ATTEND_TILE) {
            rows->from[r] = from;
            rows->keep[r] = slot_at;
        }
        if (r == 0) {
            rows->there = there;
            rows->fetched = lanes;
        }
    }
    __syncthreads();
    return n;
}

/* One fetched row by a warp: all its loads in flight (up to 4 KiB), then to the tile and its slot,
 * if that is known. */
__device__ static inline void attend_fetch_row(const char *from, char *tile_row, char *slot,
                                               uint32_t row_bytes)
{
    for (uint32_t start = (threadIdx.x & 31u) * 16u; start < row_bytes; start += 8u * 512u) {
        uint4 d[8];
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            if (start + i * 512u < row_bytes)
                d[i] = kvki_load_once(from + start + i * 512u);
        }
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            if (start + i * 512u < row_bytes) {
                *(uint4 *)(tile_row + start + i * 512u) = d[i];
                if (slot)
                    *(uint4 *)(slot + start + i * 512u) = d[i];
            }
        }
    }
}

/* Asks for the resident rows of a tile: each warp the copy engine for its share, which keeps more
 * bytes on their way than copies of the threads' own; older devices have only those. Warps may copy
 * before thread 0 expects (bulk.cuh): its arrival is the only one, and there is one phase. */
__device__ static inline void attend_ask_rows(const kvk_cuda_attend_args *a,
                                              const struct attend_layout *l,
                                              struct attend_rows *rows, char *tile)
{
    uint32_t resident = rows->there & ~rows->fetched;

#if __CUDA_ARCH__ >= 900
    const uint32_t each = ATTEND_TILE / ATTEND_WARPS, lane = threadIdx.x & 31u;
    uint32_t r = threadIdx.x / 32u * each + lane;
    if (threadIdx.x == 0)
        bulk_expect(&rows->come, (uint32_t)__popc(resident) * a->row_bytes);
    if (lane < each && resident >> r & 1u)
        bulk_copy_shared(tile + (size_t)r * l->row_stride, rows->from[r], a->row_bytes,
                         &rows->come);
#else
    for (uint32_t r = 0; r < ATTEND_TILE; r++) {
        for (uint32_t c = threadIdx.x * 16u; c < a->row_bytes; c += ATTEND_THREADS * 16u) {
            if (resident >> r & 1u)
                kvki_async_copy(tile + (size_t)r * l->row_stride + c, rows->from[r] + c);
        }
    }
#endif
}

/* Brings the tile: resident rows are asked for without waiting (attend_await_tile), then the
 * missing ones are fetched. Rows that do not exist become 0. All threads call. */
__device__ static inline void attend_load_tile(const kvk_cuda_attend_args *a,
                                               const struct attend_layout *l,
                                               struct attend_rows *rows, char *tile)
{
    attend_ask_rows(a, l, rows, tile);
    for (uint32_t r = 0; rows->there != ATTEND_ALL && r < ATTEND_TILE; r++) {
        for (uint32_t c = threadIdx.x * 16u; c < a->row_bytes; c += ATTEND_THREADS * 16u) {
            if (!(rows->there >> r & 1u))
                *(uint4 *)(tile + (size_t)r * l->row_stride + c) = make_uint4(0, 0, 0, 0);
        }
    }
    for (uint32_t r = threadIdx.x / 32u; r < ATTEND_TILE; r += ATTEND_WARPS) {
        if (rows->fetched >> r & 1u)
            attend_fetch_row(rows->from[r], tile + (size_t)r * l->row_stride, rows->keep[r],
                             a->row_bytes);
    }
}

/* Returns when the tile is there, and what the block's threads wrote before. All threads call. */
__device__ static inline void attend_await_tile(struct attend_rows *rows)
{
#if __CUDA_ARCH__ < 900
    kvki_async_wait();
#endif
    __syncthreads();
    bulk_wait(&rows->come, 0);
}

/*
 * Where a launch resolves: the resolver's work, in the first rows of the grid, and true; else the
 * sequence of a tile. Resolvers come first and wait for nobody but the kernel before; tiles wait
 * for them only to put away what they fetched. All threads call, before anything else.
 */
__device__ static inline bool attend_resolves(const struct attend_params *p, char *shared,
                                              uint32_t *seq_p)
{
    const kvk_cuda_resolve_args *r = &p->a.resolve;
    uint32_t seq = blockIdx.y * gridDim.x + blockIdx.x;

    *seq_p = blockIdx.y - p->resolver_rows;
    if (r->k && threadIdx.x == 0 &&
        blockIdx.y >= p->resolver_rows) { /* whatever these say by then */
        kvki_prefetch(p->a.res + *seq_p);
        kvki_prefetch(p->a.source + *seq_p);
    }
    if (blockIdx.y >= p->resolver_rows)
        return false;
    if (seq >= p->a.n_seqs)
        return true;
    kvki_let_next_start();
    kvki_wait_for_previous();
    resolve_sequence<ATTEND_THREADS>((struct resolve_state *)shared, r, seq, p->a.resolved);
    return true;
}

/* Slots + 1 of the fetched rows of a warp, 0: the resolver has not found them yet. */
struct attend_places {
    uint32_t of[ATTEND_TILE / ATTEND_WARPS];
};

__device__ static inline const volatile uint32_t *attend_place(const kvk_cuda_attend_args *a,
                                                               uint32_t seq, uint32_t entry)
{
    return (const volatile uint32_t *)(a->resolved + (size_t)seq * a->stride + entry);
}

/* Asks for them while the tile is attended; attend_put_away asks again. */
__device__ static inline struct attend_places attend_ask_places(const kvk_cuda_attend_args *a,
                                                                const struct attend_rows *rows,
                                                                uint32_t seq, uint32_t first)
{
    struct attend_places places;

#pragma unroll
    for (uint32_t i = 0; i < ATTEND_TILE / ATTEND_WARPS; i++) {
        uint32_t r = threadIdx.x / 32u + i * ATTEND_WARPS;
        places.of[i] =
            rows->fetched >> r & 1u && !rows->keep[r] ? *attend_place(a, seq, first + r) : 0;
    }
    return places;
}

/* Puts the fetched rows of a tile into the slots that the resolver found for them. All threads
 * call, with the tile as it was loaded. */
__device__ static inline void attend_put_away(const struct attend_params *p,
                                              const struct attend_layout *l,
                                              const struct attend_rows *rows,
                                              struct attend_places places, uint32_t seq,
                                              uint32_t first, const char *tile)
{
    const kvk_cuda_attend_args *a = &p->a;

#pragma unroll
    for (uint32_t i = 0; i < ATTEND_TILE / ATTEND_WARPS; i++) {
        uint32_t r = threadIdx.x / 32u + i * ATTEND_WARPS, place = places.of[i];
        if (!(rows->fetched >> r & 1u) || rows->keep[r])
            continue;
        while (!place)
            place = *attend_place(a, seq, first + r);
        char *to = (char *)a->res[seq].slots + (size_t)(place - 1u) * a->row_bytes;
        for (uint32_t at = (threadIdx.x & 31u) * 16u; at < a->row_bytes; at += 512u)
            *(uint4 *)(to + at) = *(const uint4 *)(tile + (size_t)r * l->row_stride + at);
    }
}

/* (cos, sin) of position * frequency: in double, as parts of a turn, of which the last counts. */
__device__ static inline float2 attend_turn(int32_t position, double frequency)
{
    double turns = position * frequency * 0.15915494309189535;
    float s = 0, c = 0;

    sincospif((float)(2 * (turns - rint(turns))), &s, &c);
    return make_float2(c, s);
}

/* rotation [ATTEND_TILE, head_dim / 2] of the tile's keys. */
__device__ static inline void attend_find_rotation(const kvk_cuda_attend_args *a, uint32_t seq,
                                                   uint32_t first, uint32_t n_here,
                                                   float2 *rotation)
{
    uint32_t part = a->head_dim / 2;

    for (uint32_t i = threadIdx.x; i < n_here * part; i += ATTEND_THREADS)
        rotation[i] = attend_turn(a->k_positions[(size_t)seq * a->stride + first + i / part],
                                  a->inv_freq[i % part]);
}

/* exp(x - most), where nothing was seen 0; NaN stays NaN. */
__device__ static inline float attend_weight(float x, float most)
{
    return most == -INFINITY ? (x != x ? x : 0.0f) : expf(x - most);
}

/* The kernels on the tensor cores: bf16 rows as they lie; rotated or coded ones; both lists. NULL
 * for other widths. few: a group has at most ATTEND_GROUP_FEW heads. */
typedef void (*attend_fn)(const struct attend_params p);
attend_fn kvki_attend_mma(uint32_t head_dim, bool few);
attend_fn kvki_attend_split(kvk_dtype dtype, uint32_t head_dim, bool rotated, bool few);
attend_fn kvki_attend_near(kvk_dtype dtype, uint32_t head_dim, bool near_rotated, bool rotated,
                           bool few);

#endif
