/*
 * resolve.cuh: picks to slots, by one block a sequence: on its own (resolve.cu), or beside the
 * attention that already reads the rows (attend.cu). Device code.
 *
 * Hits keep their slots and are stamped with this step. The misses' slots are the oldest: ages
 * (steps since the last use, and some for rows that have not been picked again, which are those
 * that are least likely to be) are counted in a histogram, which gives the age at which the victims
 * end; they are then dealt out in slot order. A slot used in this step has age 0 and is never
 * taken, which always leaves enough, as n_slots - n_pinned >= k. Ages from AGE_MAX on, and empty
 * slots, count as equal. Until resolve_take nothing but stamps has changed in the tables.
 */
#ifndef KVKI_CUDA_RESOLVE_CUH
#define KVKI_CUDA_RESOLVE_CUH

#include "device.cuh"

#define RESOLVE_AGES      1024u
#define RESOLVE_AGE_MAX   (RESOLVE_AGES - 1u)
#define RESOLVE_SLOTS_MAX (1u << 20)
#define RESOLVE_AGAIN_MAX 3u /* times that a row was picked again, which count, */
#define RESOLVE_YOUNGER   4u /* and by how many steps each makes it younger */
#define RESOLVE_AT_ONCE   8u /* entries of which a thread of resolve_finish asks at once */

struct resolve_state {
    uint32_t sums[32];
    uint32_t ages[RESOLVE_AGES];
    uint32_t cut_age, n_older;
    uint32_t victims[KVK_CUDA_K_MAX];
};

/* What a thread of kThreads does: its picks, and the ages of its slots, as far as they are kept in
 * registers. */
template <uint32_t kThreads> struct resolve_share {
    static constexpr uint32_t kPicks = KVK_CUDA_K_MAX / kThreads;
    static constexpr uint32_t kKept = kThreads >= 1024u ? 8u : 16u;
    uint32_t from, to, known[kKept];
};

/* Exclusive prefix sum over the block's threads; *total_p is the sum. All threads call. */
template <uint32_t kThreads>
__device__ static uint32_t resolve_prefix(struct resolve_state *sh, uint32_t own, uint32_t *total_p)
{
    uint32_t lane = threadIdx.x & 31u, warp = threadIdx.x / 32u, upto = own, sum = 0;

    for (uint32_t step = 1; step < 32; step *= 2) {
        uint32_t other = __shfl_up_sync(KVKI_FULL_WARP, upto, step);
        upto += lane >= step ? other : 0;
    }
    if (lane == 31)
        sh->sums[warp] = upto;
    __syncthreads();
    sum = lane < kThreads / 32u ? sh->sums[lane] : 0;
    for (uint32_t step = 1; step < 32; step *= 2) {
        uint32_t other = __shfl_up_sync(KVKI_FULL_WARP, sum, step);
        sum += lane >= step ? other : 0;
    }
    *total_p = __shfl_sync(KVKI_FULL_WARP, sum, 31);
    sum = __shfl_sync(KVKI_FULL_WARP, sum, (int)((warp + 31u) & 31u));
    __syncthreads();
    return upto - own + (warp ? sum : 0);
}

/* A slot's stamp: the step, whose upper two bits are lost, and how often its row was picked again.
 */
__device__ static inline uint32_t resolve_stamp(uint32_t step, uint32_t again)
{
    return step << 2 | min(again, RESOLVE_AGAIN_MAX);
}

__device__ static inline uint32_t resolve_age(uint32_t used, uint32_t step)
{
    uint32_t since = (step - (used >> 2)) & (UINT32_MAX >> 2);
    uint32_t age = since + RESOLVE_YOUNGER * (RESOLVE_AGAIN_MAX - (used & 3u));
    return used == 0 ? RESOLVE_AGE_MAX : since == 0 ? 0 : min(age, RESOLVE_AGE_MAX);
}

template <uint32_t kThreads>
__device__ static void resolve_load_ages(struct resolve_share<kThreads> *t,
                                         const kvk_cuda_residency *r, uint32_t step,
                                         const kvk_cuda_resolve_args *a)
{
    uint32_t each = (a->n_slots - a->n_pinned + kThreads - 1) / kThreads;

    t->from = min(a->n_pinned + threadIdx.x * each, a->n_slots);
    t->to = min(t->from + each, a->n_slots);
#pragma unroll
    for (uint32_t i = 0; i < t->kKept; i++)
        t->known[i] = t->from + i < t->to ? resolve_age(r->used[t->from + i], step) : 0;
}

/* Counts the ages and finds the greatest age a such that at least n slots are a or older. */
template <uint32_t kThreads>
__device__ static void resolve_find_cut(struct resolve_state *sh,
                                        const struct resolve_share<kThreads> *t,
                                        const kvk_cuda_residency *r, uint32_t step, uint32_t n)
{
    constexpr uint32_t kEach = RESOLVE_AGES / kThreads;
    uint32_t oldest = RESOLVE_AGE_MAX - threadIdx.x * kEach, own = 0, total = 0, before = 0;

    for (uint32_t i = threadIdx.x; i < RESOLVE_AGES; i += kThreads)
        sh->ages[i] = 0;
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < t->kKept; i++) {
        if (t->from + i < t->to)
            atomicAdd(&sh->ages[t->known[i]], 1u);
    }
    for (uint32_t i = t->kKept; t->from + i < t->to; i++)
        atomicAdd(&sh->ages[resolve_age(r->used[t->from + i], step)], 1u);
    __syncthreads();
    for (uint32_t i = 0; i < kEach; i++)
        own += sh->ages[oldest - i];
    before = resolve_prefix<kThreads>(sh, own, &total);
    for (uint32_t i = 0; i < kEach; i++) {
        uint32_t here = sh->ages[oldest - i];
        if (before < n && before + here >= n) {
            sh->cut_age = oldest - i;
            sh->n_older = before;
        }
        before += here;
    }
    __syncthreads();
}

/* Deals one slot, if it is older than the cut or among the first `need` at the cut. */
__device__ static inline void resolve_deal(struct resolve_state *sh, uint32_t slot, uint32_t age,
                                           uint32_t need, uint32_t *older_p, uint32_t *equal_p)
{
    uint32_t at = *older_p + min(*equal_p, need);

    if (age > sh->cut_age) {
        sh->victims[at] = slot;
        ++*older_p;
    } else if (age == sh->cut_age) {
        if (*equal_p < need)
            sh->victims[at] = slot;
        ++*equal_p;
    }
}

/* Fills victims [n], in slot order. */
template <uint32_t kThreads>
__device__ static void resolve_find_victims(struct resolve_state *sh, const kvk_cuda_residency *r,
                                            uint32_t step, const kvk_cuda_resolve_args *a,
                                            uint32_t n)
{
    struct resolve_share<kThreads> t;
    uint32_t older = 0, equal = 0, total = 0, cut = 0, need = 0;

    resolve_load_ages(&t, r, step, a);
    resolve_find_cut(sh, &t, r, step, n);
    cut = sh->cut_age;
    need = n - sh->n_older;
#pragma unroll
    for (uint32_t i = 0; i < t.kKept; i++) {
        older += t.from + i < t.to && t.known[i] > cut;
        equal += t.from + i < t.to && t.known[i] == cut;
    }
    for (uint32_t i = t.kKept; t.from + i < t.to; i++) {
        uint32_t age = resolve_age(r->used[t.from + i], step);
        older += age > cut;
        equal += age == cut;
    }
    older = resolve_prefix<kThreads>(sh, older, &total);
    equal = resolve_prefix<kThreads>(sh, equal, &total);
#pragma unroll
    for (uint32_t i = 0; i < t.kKept; i++) {
        if (t.from + i < t.to)
            resolve_deal(sh, t.from + i, t.known[i], need, &older, &equal);
    }
    for (uint32_t i = t.kKept; t.from + i < t.to; i++)
        resolve_deal(sh, t.from + i, resolve_age(r->used[t.from + i], step), need, &older, &equal);
    __syncthreads();
}

/* The slot of a position that a slot may still name; -1: of none. */
__device__ static inline int32_t resolve_slot_of(const kvk_cuda_residency *r, uint32_t position)
{
    return position < r->n_positions ? r->slot_of[position] : -1;
}

/* Puts position into slot, and out what was there: old, which is in the slot old_slot by now. */
__device__ static inline void resolve_put(const kvk_cuda_residency *r, uint32_t slot,
                                          uint32_t position, uint32_t old, int32_t old_slot,
                                          uint32_t step)
{
    if (old_slot == (int32_t)slot)
        r->slot_of[old] = -1;
    r->pos_of[slot] = position;
    r->slot_of[position] = (int32_t)slot;
    r->used[slot] = resolve_stamp(step, 0);
}

__device__ static inline void resolve_take(const kvk_cuda_residency *r, uint32_t slot,
                                           uint32_t position, uint32_t step)
{
    uint32_t old = r->pos_of[slot];

    resolve_put(r, slot, position, old, resolve_slot_of(r, old), step);
}

/*
 * Resolves the picks of a sequence: list, fetch and the counts. Without `told` the misses take
 * their slots in the tables as well, and the step is counted; else that is left to resolve_finish,
 * slot_of is only read, and told [n_seqs, stride] gets each miss's slot + 1. A block of kThreads
 * calls.
 */
template <uint32_t kThreads>
__device__ static void resolve_sequence(struct resolve_state *sh, const kvk_cuda_resolve_args *a,
                                        uint32_t seq, uint32_t *told)
{
    constexpr uint32_t kPicks = resolve_share<kThreads>::kPicks;
    const kvk_cuda_residency r = a->res[seq];
    const uint32_t *picks = a->picks + (size_t)seq * a->k;
    int32_t *list = a->list + (size_t)seq * a->stride + a->off;
    uint32_t *fetch = a->fetch + (size_t)seq * a->stride + a->off;
    uint32_t step = *r.step + 1, n = min(a->n_picks[seq], a->k), n_misses = 0, missing = 0;
    uint32_t each = (n + kThreads - 1) / kThreads, from = threadIdx.x * each, position[kPicks];
    uint32_t used[kPicks];
    int32_t slot[kPicks];

#pragma unroll
    for (uint32_t i = 0; i < kPicks; i++) {
        position[i] = i < each && from + i < n ? picks[from + i] : UINT32_MAX;
        slot[i] = position[i] < r.n_positions ? r.slot_of[position[i]] : -1;
    }
#pragma unroll
    for (uint32_t i = 0; i < kPicks; i++) /* before any changes: picks are distinct, so slots too */
        used[i] = slot[i] >= 0 ? r.used[slot[i]] : 0;
#pragma unroll
    for (uint32_t i = 0; i < kPicks; i++) {
        if (slot[i] >= 0)
            r.used[slot[i]] = resolve_stamp(step, (used[i] & 3u) + 1u);
        missing += slot[i] < 0 && position[i] < r.n_positions;
    }
    missing = resolve_prefix<kThreads>(sh, missing, &n_misses); /* orders stamps before ages, too */
    if (n_misses)
        resolve_find_victims<kThreads>(sh, &r, step, a, n_misses);
#pragma unroll
    for (uint32_t i = 0; i < kPicks; i++) {
        bool there = i < each && from + i < n, miss = position[i] < r.n_positions && slot[i] < 0;
        if (miss) {
            slot[i] = (int32_t)sh->victims[missing++];
            if (!told)
                resolve_take(&r, (uint32_t)slot[i], position[i], step);
            else
                *(volatile uint32_t *)(told + (size_t)seq * a->stride + a->off + from + i) =
                    (uint32_t)slot[i] + 1u;
        }
        if (there) {
            list[from + i] = slot[i];
            fetch[from + i] = miss ? position[i] : KVK_CUDA_RESIDENT;
        }
    }
    if (threadIdx.x == 0) {
        if (!told)
            *r.step = step;
        a->n_list[seq] = a->off + n;
        a->n_misses[seq] = n_misses;
    }
}

/* What resolve_sequence left, once nobody looks any more; told is 0 again. A block of any size
 * calls. Everything is read before anything changes: picks are distinct, so slots are, and one
 * that comes has no slot. */
__device__ static inline void resolve_finish(const kvk_cuda_resolve_args *a, uint32_t seq,
                                             uint32_t *told)
{
    const kvk_cuda_residency r = a->res[seq];
    size_t at = (size_t)seq * a->stride + a->off;
    uint32_t n = min(a->n_picks[seq], a->k), step = *r.step + 1;

    for (uint32_t first = threadIdx.x; first < n; first += RESOLVE_AT_ONCE * blockDim.x) {
        uint32_t position[RESOLVE_AT_ONCE], slot[RESOLVE_AT_ONCE], old[RESOLVE_AT_ONCE];
        int32_t old_slot[RESOLVE_AT_ONCE];
#pragma unroll
        for (uint32_t j = 0; j < RESOLVE_AT_ONCE; j++) {
            uint32_t i = first + j * blockDim.x;
            position[j] = i < n ? a->fetch[at + i] : KVK_CUDA_RESIDENT;
            slot[j] = i < n ? (uint32_t)a->list[at + i] : 0;
        }
#pragma unroll
        for (uint32_t j = 0; j < RESOLVE_AT_ONCE; j++)
            old[j] = position[j] != KVK_CUDA_RESIDENT ? r.pos_of[slot[j]] : UINT32_MAX;
#pragma unroll
        for (uint32_t j = 0; j < RESOLVE_AT_ONCE; j++)
            old_slot[j] = resolve_slot_of(&r, old[j]);
#pragma unroll
        for (uint32_t j = 0; j < RESOLVE_AT_ONCE; j++) {
            if (position[j] == KVK_CUDA_RESIDENT)
                continue;
            resolve_put(&r, slot[j], position[j], old[j], old_slot[j], step);
            told[at + first + j * blockDim.x] = 0;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0)
        *r.step = step;
}

/* The rules for the arguments. */
static inline bool resolve_args_ok(const kvk_cuda_resolve_args *a)
{
    return a->n_seqs <= KVK_CUDA_SEQS_MAX && a->k > 0 && a->k <= KVK_CUDA_K_MAX &&
           a->n_slots <= RESOLVE_SLOTS_MAX && a->n_pinned <= a->n_slots &&
           a->n_slots - a->n_pinned >= a->k && a->off <= a->stride && a->stride - a->off >= a->k &&
           a->picks && a->n_picks && a->res && a->list && a->fetch && a->n_list && a->n_misses;
}

#endif
