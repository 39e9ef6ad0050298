/*
 * resolve.cu: picks to slots, one block a sequence.
 *
 * Hits keep their slots and are stamped with this step. The misses' slots are the least recently
 * used: ages (steps since the last use) are counted in a histogram, which gives the age at which
 * the victims end; they are then dealt out in slot order. A slot used in this step has age 0 and is
 * never taken, which always leaves enough, as n_slots - n_pinned >= k. Ages from AGE_MAX on, and
 * empty slots, count as equal.
 */
#include "device.cuh"

#define THREADS   1024u
#define WARPS     (THREADS / 32u)
#define AGE_MAX   (THREADS - 1u)
#define PER_SLOT  4u /* picks a thread handles at most: KVK_CUDA_K_MAX / THREADS */
#define SLOTS_MAX (1u << 20)
#define AGES_KEPT 8u

struct shared_state {
    uint32_t sums[WARPS];
    uint32_t ages[THREADS];
    uint32_t cut_age, n_older;
    uint32_t victims[KVK_CUDA_K_MAX];
};

/* Exclusive prefix sum over the block's threads; *total_p is the sum. All threads call. */
__device__ static uint32_t block_prefix(struct shared_state *sh, uint32_t own, uint32_t *total_p)
{
    uint32_t lane = threadIdx.x & 31u, warp = threadIdx.x / 32u, upto = own, sum = 0;

    for (uint32_t step = 1; step < 32; step *= 2) {
        uint32_t other = __shfl_up_sync(KVKI_FULL_WARP, upto, step);
        upto += lane >= step ? other : 0;
    }
    if (lane == 31)
        sh->sums[warp] = upto;
    __syncthreads();
    sum = sh->sums[lane];
    for (uint32_t step = 1; step < 32; step *= 2) {
        uint32_t other = __shfl_up_sync(KVKI_FULL_WARP, sum, step);
        sum += lane >= step ? other : 0;
    }
    *total_p = __shfl_sync(KVKI_FULL_WARP, sum, 31);
    sum = __shfl_sync(KVKI_FULL_WARP, sum, (int)((warp + 31u) & 31u));
    __syncthreads();
    return upto - own + (warp ? sum : 0);
}

__device__ static uint32_t age_of(uint32_t used, uint32_t step)
{
    uint32_t age = step - used;
    return used == 0 || age > AGE_MAX ? AGE_MAX : age;
}

/* The ages of a thread's slots, kept in registers where they are few. */
struct thread_ages {
    uint32_t from, to, known[AGES_KEPT];
};

__device__ static void load_ages(struct thread_ages *t, const kvk_cuda_residency *r, uint32_t step,
                                 const kvk_cuda_resolve_args *a)
{
    uint32_t each = (a->n_slots - a->n_pinned + THREADS - 1) / THREADS;

    t->from = min(a->n_pinned + threadIdx.x * each, a->n_slots);
    t->to = min(t->from + each, a->n_slots);
#pragma unroll
    for (uint32_t i = 0; i < AGES_KEPT; i++)
        t->known[i] = t->from + i < t->to ? age_of(r->used[t->from + i], step) : 0;
}

/* Counts the ages and finds the greatest age a such that at least n slots are a or older. */
__device__ static void find_cut(struct shared_state *sh, const struct thread_ages *t,
                                const kvk_cuda_residency *r, uint32_t step, uint32_t n)
{
    uint32_t own = 0, total = 0, before = 0;

    sh->ages[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < AGES_KEPT; i++) {
        if (t->from + i < t->to)
            atomicAdd(&sh->ages[t->known[i]], 1u);
    }
    for (uint32_t i = AGES_KEPT; t->from + i < t->to; i++)
        atomicAdd(&sh->ages[age_of(r->used[t->from + i], step)], 1u);
    __syncthreads();
    own = sh->ages[AGE_MAX - threadIdx.x]; /* thread 0: the oldest */
    before = block_prefix(sh, own, &total);
    if (before < n && before + own >= n) {
        sh->cut_age = AGE_MAX - threadIdx.x;
        sh->n_older = before;
    }
    __syncthreads();
}

/* Deals one slot, if it is older than the cut or among the first `need` at the cut. */
__device__ static inline void deal(struct shared_state *sh, uint32_t slot, uint32_t age,
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
__device__ static void find_victims(struct shared_state *sh, const kvk_cuda_residency *r,
                                    uint32_t step, const kvk_cuda_resolve_args *a, uint32_t n)
{
    struct thread_ages t;
    uint32_t older = 0, equal = 0, total = 0, cut = 0, need = 0;

    load_ages(&t, r, step, a);
    find_cut(sh, &t, r, step, n);
    cut = sh->cut_age;
    need = n - sh->n_older;
#pragma unroll
    for (uint32_t i = 0; i < AGES_KEPT; i++) {
        older += t.from + i < t.to && t.known[i] > cut;
        equal += t.from + i < t.to && t.known[i] == cut;
    }
    for (uint32_t i = AGES_KEPT; t.from + i < t.to; i++) {
        uint32_t age = age_of(r->used[t.from + i], step);
        older += age > cut;
        equal += age == cut;
    }
    older = block_prefix(sh, older, &total);
    equal = block_prefix(sh, equal, &total);
#pragma unroll
    for (uint32_t i = 0; i < AGES_KEPT; i++) {
        if (t.from + i < t.to)
            deal(sh, t.from + i, t.known[i], need, &older, &equal);
    }
    for (uint32_t i = AGES_KEPT; t.from + i < t.to; i++)
        deal(sh, t.from + i, age_of(r->used[t.from + i], step), need, &older, &equal);
    __syncthreads();
}

/* Puts position into slot, and out what was there. */
__device__ static void take_slot(const kvk_cuda_residency *r, uint32_t slot, uint32_t position,
                                 uint32_t step)
{
    uint32_t old = r->pos_of[slot];

    if (old < r->n_positions && r->slot_of[old] == (int32_t)slot)
        r->slot_of[old] = -1;
    r->pos_of[slot] = position;
    r->slot_of[position] = (int32_t)slot;
    r->used[slot] = step;
}

__global__ void __launch_bounds__(THREADS) resolve_kernel(const kvk_cuda_resolve_args a)
{
    __shared__ struct shared_state sh;
    uint32_t seq = blockIdx.x, n_misses = 0;
    const kvk_cuda_residency r = a.res[seq];
    const uint32_t *picks = a.picks + (size_t)seq * a.k;
    int32_t *list = a.list + (size_t)seq * a.stride + a.off;
    uint32_t *fetch = a.fetch + (size_t)seq * a.stride + a.off;
    uint32_t step = 0, n = 0, each = 0, from = 0, missing = 0, position[PER_SLOT];
    int32_t slot[PER_SLOT];

    kvki_let_next_start(); /* what needs no list, attend's near rows, goes on beside this */
    kvki_wait_for_previous();
    step = *r.step + 1;
    n = min(a.n_picks[seq], a.k);
    each = (n + THREADS - 1) / THREADS;
    from = threadIdx.x * each;

#pragma unroll
    for (uint32_t i = 0; i < PER_SLOT; i++) {
        position[i] = i < each && from + i < n ? picks[from + i] : UINT32_MAX;
        slot[i] = position[i] < r.n_positions ? r.slot_of[position[i]] : -1;
    }
#pragma unroll
    for (uint32_t i = 0; i < PER_SLOT; i++) {
        if (slot[i] >= 0)
            r.used[slot[i]] = step;
        missing += slot[i] < 0 && position[i] < r.n_positions;
    }
    missing = block_prefix(&sh, missing, &n_misses); /* also orders the stamps before the ages */
    if (n_misses)
        find_victims(&sh, &r, step, &a, n_misses);
#pragma unroll
    for (uint32_t i = 0; i < PER_SLOT; i++) {
        bool there = i < each && from + i < n, miss = position[i] < r.n_positions && slot[i] < 0;
        if (miss) {
            slot[i] = (int32_t)sh.victims[missing++];
            take_slot(&r, (uint32_t)slot[i], position[i], step);
        }
        if (there) {
            list[from + i] = slot[i];
            fetch[from + i] = miss ? position[i] : KVK_CUDA_RESIDENT;
        }
    }
    if (threadIdx.x == 0) {
        *r.step = step;
        a.n_list[seq] = a.off + n;
        a.n_misses[seq] = n_misses;
    }
}

extern "C" kvc_status kvk_cuda_resolve(kvk_cuda *cuda, const kvk_cuda_resolve_args *args,
                                       kvk_stream *stream)
{
    kvc_status st = KVC_OK;

    if (args->n_seqs == 0)
        return KVC_OK;
    if (args->n_seqs > KVK_CUDA_SEQS_MAX || args->k == 0 || args->k > KVK_CUDA_K_MAX ||
        args->n_slots > SLOTS_MAX || args->n_pinned > args->n_slots ||
        args->n_slots - args->n_pinned < args->k || args->off > args->stride ||
        args->stride - args->off < args->k || !args->picks || !args->n_picks || !args->res ||
        !args->list || !args->fetch || !args->n_list || !args->n_misses)
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    return kvki_cuda_launch_next(cuda, resolve_kernel, dim3(args->n_seqs), THREADS, 0, stream,
                                 *args);
}
