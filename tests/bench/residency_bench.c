/*
 * residency_bench.c: how many rows a part's slots miss by what kvk_cuda_resolve does (the oldest
 * goes first, and each time that a row was picked again, up to two, makes it four steps younger)
 * and under least recently used, beside the bound that knows the future (Belady), over made-up
 * picks.
 *
 * A step picks K positions: a share of those of the step before, some of the twelve steps before
 * that, and others, of which a few are much likelier than most. Policies go by steps: no row
 * gives way to another of its step. Deterministic. Ends with 1 where one misses less than the
 * bound, which cannot be. Single-threaded.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { K = 2048, POSITIONS = 1 << 17, STEPS = 400, QUICK_STEPS = 60, WARM = 40, BACK = 12 };
#define NEVER UINT32_MAX

typedef enum policy { LRU, RESOLVE, BELADY } policy;

typedef struct picks_trace {
    uint32_t n_steps;
    uint32_t *picks; /* [n_steps, K] */
    uint32_t *next;  /* [n_steps, K] the step that picks it again, or NEVER */
} picks_trace;

typedef struct resident {
    uint32_t position, last, next; /* the steps that picked it, and will */
    uint32_t again;                /* how often it was picked again, at most 2 */
    uint32_t key;                  /* the least gives way first, then the lowest position */
} resident;

static uint64_t random64(uint64_t *state)
{
    uint64_t x = (*state += 0x9e3779b97f4a7c15ull);
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static double uniform(uint64_t *state)
{
    return (double)(random64(state) >> 11) * 0x1p-53;
}

static void *get(size_t n, size_t size)
{
    void *p = calloc(n, size);
    if (!p) {
        fputs("residency_bench: no memory\n", stderr);
        exit(1);
    }
    return p;
}

/* One more pick of step t, which has n so far: from the past, or by its heat. */
static uint32_t another(const picks_trace *trace, uint32_t t, double back, uint64_t *state)
{
    double u = uniform(state);
    if (t > BACK && uniform(state) < back) {
        uint32_t from = t - 2 - (uint32_t)(random64(state) % (BACK - 1));
        return trace->picks[(size_t)from * K + random64(state) % K];
    }
    return (uint32_t)(u * u * u * POSITIONS) * 40503u % POSITIONS; /* heat, spread out */
}

static picks_trace make_trace(double keep, double back, uint32_t n_steps)
{
    picks_trace trace = {n_steps, get((size_t)n_steps * K, 4), get((size_t)n_steps * K, 4)};
    uint32_t *picked = get(POSITIONS, 4); /* step + 1 that picked it last */
    uint64_t state = 1;

    for (uint32_t t = 0; t < n_steps; t++) {
        uint32_t *now = trace.picks + (size_t)t * K, n = 0;
        for (uint32_t i = 0; t > 0 && i < K; i++) {
            if (uniform(&state) < keep)
                picked[now[n++] = trace.picks[(size_t)(t - 1) * K + i]] = t + 1;
        }
        while (n < K) {
            uint32_t position = another(&trace, t, back, &state);
            if (picked[position] != t + 1)
                picked[now[n++] = position] = t + 1;
        }
    }
    memset(picked, 0xff, (size_t)POSITIONS * 4);
    for (size_t i = (size_t)n_steps * K; i-- > 0; picked[trace.picks[i]] = (uint32_t)(i / K))
        trace.next[i] = picked[trace.picks[i]];
    free(picked);
    return trace;
}

static int by_key(const void *a, const void *b)
{
    const resident *x = a, *y = b;
    if (x->key != y->key)
        return x->key < y->key ? -1 : 1;
    return (x->position > y->position) - (x->position < y->position);
}

static uint32_t key_of(const resident *row, uint32_t t, policy by)
{
    if (row->last == t)
        return NEVER;
    return by == BELADY ? NEVER - row->next : row->last + (by == RESOLVE ? 4 * row->again : 0);
}

/* Leaves capacity of n rows; those of step t stay. */
static uint32_t evict(resident *rows, uint32_t n, uint32_t capacity, uint32_t t, policy by,
                      uint32_t *place)
{
    uint32_t out = n > capacity ? n - capacity : 0;

    for (uint32_t i = 0; i < n; i++)
        rows[i].key = key_of(&rows[i], t, by);
    qsort(rows, n, sizeof(*rows), by_key);
    for (uint32_t i = 0; i < n; i++)
        place[rows[i].position] = i < out ? 0 : i - out + 1;
    memmove(rows, rows + out, (n - out) * sizeof(*rows));
    return n - out;
}

/* The share of picks after WARM steps that are not resident. */
static double misses(const picks_trace *trace, uint32_t capacity, policy by)
{
    uint32_t *place = get(POSITIONS, 4), n = 0; /* place + 1 in rows, 0: not resident */
    resident *rows = get((size_t)capacity + K, sizeof(*rows));
    uint64_t missed = 0;

    for (uint32_t t = 0; t < trace->n_steps; t++) {
        for (uint32_t i = 0; i < K; i++) {
            size_t at = (size_t)t * K + i;
            uint32_t position = trace->picks[at];
            if (!place[position]) {
                missed += t >= WARM;
                rows[n] = (resident){.position = position};
                place[position] = ++n;
            } else if (rows[place[position] - 1].again < 2) {
                rows[place[position] - 1].again++;
            }
            rows[place[position] - 1].last = t;
            rows[place[position] - 1].next = trace->next[at];
        }
        n = evict(rows, n, capacity, t, by, place);
    }
    free(place);
    free(rows);
    return (double)missed / ((double)(trace->n_steps - WARM) * K);
}

int main(int argc, char **argv)
{
    static const double kept[][2] = {{0.40, 0.5}, {0.60, 0.6}, {0.80, 0.7}, {0.90, 0.7}};
    uint32_t n_steps = argc > 1 && strcmp(argv[1], "--quick") == 0 ? QUICK_STEPS : STEPS;
    int failed = 0;

    printf("%u picks a step of %u positions, %u steps\n\n", K, POSITIONS, n_steps);
    puts("| kept from the step before | slots | resolve misses | LRU | Belady | resolve / Belady | "
         "LRU / Belady |");
    puts("|---|---|---|---|---|---|---|");
    for (size_t i = 0; i < sizeof(kept) / sizeof(kept[0]); i++) {
        picks_trace trace = make_trace(kept[i][0], kept[i][1], n_steps);
        for (uint32_t capacity = K; capacity <= 4 * K; capacity *= 2) {
            double ours = misses(&trace, capacity, RESOLVE), lru = misses(&trace, capacity, LRU);
            double bound = misses(&trace, capacity, BELADY);
            printf("| %.0f %% | %u | %.1f %% | %.1f %% | %.1f %% | %.2f | %.2f |\n",
                   100 * kept[i][0], capacity, 100 * ours, 100 * lru, 100 * bound, ours / bound,
                   lru / bound);
            failed |= lru < bound || ours < bound;
        }
        free(trace.picks);
        free(trace.next);
    }
    if (failed)
        fputs("residency_bench: misses below the bound\n", stderr);
    return failed;
}
