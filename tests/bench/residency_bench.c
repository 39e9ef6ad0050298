/*
 * residency_bench.c: how many rows a part's slots miss by what kvk_cuda_resolve does (the oldest
 * goes first, and each time that a row was picked again, up to three, makes it four steps younger)
 * and under least recently used, beside the bound that knows the future (Belady): over made-up
 * picks, or over those of a real model's layers (residency_bench --trace FILE ...).
 *
 * Policies go by steps: no row gives way to another of its step. Deterministic. Ends with 1 where
 * one misses less than the bound, which cannot be, and 2 where a file is no trace. Single-threaded.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "residency_trace.h"

enum { K = 2048, POSITIONS = 1 << 17, STEPS = 400, QUICK_STEPS = 60, WARM = 40 };
enum { AGAIN_MAX = 3, YOUNGER = 4 }; /* as in kernels/cuda/resolve.cuh */

typedef enum policy { LRU, RESOLVE, BELADY, N_POLICIES } policy;

typedef struct resident {
    uint32_t position, last, next; /* the steps that picked it, and will */
    uint32_t again;                /* how often it was picked again, at most AGAIN_MAX */
} resident;

/* What is resident after some steps. */
typedef struct slots {
    policy by;
    uint32_t capacity, n;
    uint32_t *place;  /* [n_positions] place + 1 in rows, 0: not resident */
    uint32_t *at_key; /* [n_steps + AGAIN_MAX * YOUNGER + 2] rows of each key */
    resident *rows;   /* [capacity + k] */
    resident *equal;  /* [capacity + k] scratch of evict */
} slots;

/* The least gives way first, then the lowest position; those of step t have the greatest. */
static uint32_t key_of(const picks_trace *trace, const resident *row, uint32_t t, policy by)
{
    uint32_t most = trace->n_steps + AGAIN_MAX * YOUNGER + 1;
    if (row->last == t)
        return most;
    if (by == BELADY)
        return row->next == TRACE_NEVER ? 0 : trace->n_steps - row->next;
    return row->last + (by == RESOLVE ? YOUNGER * row->again : 0);
}

static int by_position(const void *a, const void *b)
{
    const resident *x = a, *y = b;
    return (x->position > y->position) - (x->position < y->position);
}

/* Drops the rows of the lowest positions among s->equal [n]; the others stay. */
static void drop_some(slots *s, uint32_t n, uint32_t drop)
{
    qsort(s->equal, n, sizeof(*s->equal), by_position);
    for (uint32_t i = 0; i < n; i++) {
        if (i >= drop)
            s->rows[s->n++] = s->equal[i];
        else
            s->place[s->equal[i].position] = 0;
    }
}

/* Leaves `capacity` rows; those of step t stay. */
static void evict(slots *s, const picks_trace *trace, uint32_t t)
{
    uint32_t n = s->n, out = n > s->capacity ? n - s->capacity : 0, cut = 0, below = 0, equal = 0;

    if (out == 0)
        return;
    memset(s->at_key, 0, (trace->n_steps + AGAIN_MAX * YOUNGER + 2u) * sizeof(*s->at_key));
    for (uint32_t i = 0; i < n; i++)
        s->at_key[key_of(trace, &s->rows[i], t, s->by)]++;
    while (below + s->at_key[cut] < out)
        below += s->at_key[cut++];
    s->n = 0;
    for (uint32_t i = 0; i < n; i++) {
        resident row = s->rows[i];
        uint32_t key = key_of(trace, &row, t, s->by);
        if (key > cut)
            s->rows[s->n++] = row;
        else if (key == cut)
            s->equal[equal++] = row;
        else
            s->place[row.position] = 0;
    }
    drop_some(s, equal, out - below);
    for (uint32_t i = 0; i < s->n; i++)
        s->place[s->rows[i].position] = i + 1;
}

/* Step t picks; how many of its picks were not resident. */
static uint32_t step(slots *s, const picks_trace *trace, uint32_t t)
{
    uint32_t missed = 0;

    for (uint32_t i = trace->first[t]; i < trace->first[t + 1]; i++) {
        uint32_t *place = &s->place[trace->picks[i]];
        if (*place == 0) {
            missed++;
            s->rows[s->n] = (resident){.position = trace->picks[i]};
            *place = ++s->n;
        } else if (s->rows[*place - 1].again < AGAIN_MAX) {
            s->rows[*place - 1].again++;
        }
        s->rows[*place - 1].last = t;
        s->rows[*place - 1].next = trace->next[i];
    }
    evict(s, trace, t);
    return missed;
}

/* How many picks after WARM steps are not resident. */
static uint64_t misses(const picks_trace *trace, uint32_t capacity, policy by)
{
    slots s = {.by = by, .capacity = capacity};
    uint64_t missed = 0;

    s.place = trace_get(trace->n_positions, sizeof(*s.place));
    s.at_key = trace_get(trace->n_steps + AGAIN_MAX * YOUNGER + 2u, sizeof(*s.at_key));
    s.rows = trace_get((size_t)capacity + trace->k, sizeof(*s.rows));
    s.equal = trace_get((size_t)capacity + trace->k, sizeof(*s.equal));
    for (uint32_t t = 0; t < trace->n_steps; t++) {
        uint32_t n = step(&s, trace, t);
        missed += t >= WARM ? n : 0;
    }
    free(s.place);
    free(s.at_key);
    free(s.rows);
    free(s.equal);
    return missed;
}

/* A row of the table, of all layers together; 1 where one misses less than the bound. */
static int report(const char *name, const picks_trace *layers, uint32_t n_layers, uint32_t capacity)
{
    uint64_t missed[N_POLICIES] = {0}, picked = 0;
    double worst = 0;
    int failed = 0;

    for (uint32_t i = 0; i < n_layers; i++) {
        const picks_trace *trace = &layers[i];
        uint64_t here[N_POLICIES];
        uint32_t warm = trace->n_steps < WARM ? trace->n_steps : WARM;
        for (policy by = LRU; by < N_POLICIES; by++)
            missed[by] += here[by] = misses(trace, capacity, by);
        picked += trace->first[trace->n_steps] - trace->first[warm];
        failed |= here[LRU] < here[BELADY] || here[RESOLVE] < here[BELADY];
        if (here[BELADY] > 0 && (double)here[RESOLVE] / (double)here[BELADY] > worst)
            worst = (double)here[RESOLVE] / (double)here[BELADY];
    }
    double bound = (double)missed[BELADY], all = picked > 0 ? (double)picked : 1;
    double ratio = bound > 0 ? bound : NAN;
    printf("| %s | %u | %.1f %% | %.1f %% | %.1f %% | %.2f | %.2f | %.2f |\n", name, capacity,
           100 * (double)missed[RESOLVE] / all, 100 * (double)missed[LRU] / all, 100 * bound / all,
           (double)missed[RESOLVE] / ratio, (double)missed[LRU] / ratio, worst);
    return failed;
}

static void head(const char *what)
{
    printf("| %s | slots | resolve misses | LRU | Belady | resolve / Belady | LRU / Belady | "
           "worst layer |\n|---|---|---|---|---|---|---|---|\n",
           what);
}

static int made_up(uint32_t n_steps)
{
    static const double kept[][2] = {{0.40, 0.5}, {0.60, 0.6}, {0.80, 0.7}, {0.90, 0.7}};
    int failed = 0;

    printf("%u picks a step of %u positions, %u steps\n\n", K, POSITIONS, n_steps);
    head("kept from the step before");
    for (size_t i = 0; i < sizeof(kept) / sizeof(kept[0]); i++) {
        picks_trace trace = trace_make_up(n_steps, K, POSITIONS, kept[i][0], kept[i][1]);
        char name[16];
        (void)snprintf(name, sizeof(name), "%.0f %%", 100 * kept[i][0]);
        for (uint32_t capacity = K; capacity <= 4 * K; capacity *= 2)
            failed |= report(name, &trace, 1, capacity);
        trace_free(&trace);
    }
    return failed;
}

/* The share of picks that the step before had too. */
static double kept(const picks_trace *layers, uint32_t n_layers)
{
    uint64_t n = 0, again = 0;
    for (uint32_t i = 0; i < n_layers; i++) {
        for (uint32_t t = 0; t + 1 < layers[i].n_steps; t++) {
            for (uint32_t j = layers[i].first[t]; j < layers[i].first[t + 1]; j++, n++)
                again += layers[i].next[j] == t + 1;
        }
    }
    return n > 0 ? (double)again / (double)n : 0;
}

static int recorded(const char *path)
{
    uint32_t n_layers = 0, k = 0;
    picks_trace *layers = trace_read(path, &n_layers);
    const char *slash = strrchr(path, '/');
    int failed = 0;

    if (layers == NULL)
        return 2;
    for (uint32_t i = 0; i < n_layers; i++)
        k = layers[i].k > k ? layers[i].k : k;
    printf("\n%u layers, %u steps over %u positions, at most %u picks, of which the step before "
           "had %.0f %%\n\n",
           n_layers, layers[0].n_steps, layers[0].n_positions, k, 100 * kept(layers, n_layers));
    head("trace");
    for (uint32_t capacity = 2 * k; capacity <= 4 * k && capacity > 0; capacity *= 2)
        failed |= report(slash != NULL ? slash + 1 : path, layers, n_layers, capacity);
    for (uint32_t i = 0; i < n_layers; i++)
        trace_free(&layers[i]);
    free(layers);
    return failed;
}

int main(int argc, char **argv)
{
    int status = 0;

    if (argc > 1 && strcmp(argv[1], "--trace") == 0) {
        if (argc == 2) {
            fputs("residency_bench: --trace without a file\n", stderr);
            status = 2;
        }
        for (int i = 2; i < argc && status == 0; i++)
            status = recorded(argv[i]);
    } else {
        status = made_up(argc > 1 && strcmp(argv[1], "--quick") == 0 ? QUICK_STEPS : STEPS);
    }
    if (status == 1)
        fputs("residency_bench: misses below the bound\n", stderr);
    return status;
}
