/*
 * runners_up_bench.c: whether it pays to bring, between steps, the rows that a selection ranked
 * right behind its picks: misses of a part's slots under least recently used with and without, over
 * made-up scores of steps whose query drifts, or wavers about one.
 *
 * A score is a normal number. Drifting, each step keeps a share of it and adds noise; wavering,
 * each step adds noise to the same base. After a step the runners-up that are not resident are
 * brought; they count as used just before that step's picks. Deterministic. Ends with 1 where a
 * step without runners-up misses what the one before picked, which cannot be. Single-threaded.
 */
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { K = 512, POSITIONS = 1 << 18, SLOTS = 2 * K, WARM = 25, STEPS = 60, QUICK_STEPS = 30 };

typedef struct walk {
    const char *name;
    double kept, noise; /* of a score; wavering: kept 1 */
    bool wavers;
} walk;

typedef struct world {
    float *base, *score;
    uint32_t *order;     /* positions, best first */
    uint32_t *last_used; /* [POSITIONS] 0: not resident */
    bool *brought;       /* and not picked since */
    uint64_t random;
} world;

static uint64_t random64(uint64_t *state)
{
    uint64_t x = (*state += 0x9e3779b97f4a7c15ull);
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static double normal(uint64_t *state)
{
    double u = ((double)(random64(state) >> 11) + 0.5) * 0x1p-53;
    double v = (double)(random64(state) >> 11) * 0x1p-53;
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

static void *get(size_t n, size_t size)
{
    void *p = calloc(n, size);
    if (p == NULL) {
        (void)fputs("runners_up_bench: no memory\n", stderr);
        exit(1);
    }
    return p;
}

static const float *sorted_by;

static int best_first(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return sorted_by[x] != sorted_by[y]
               ? (sorted_by[x] < sorted_by[y]) - (sorted_by[x] > sorted_by[y])
               : (x > y) - (x < y);
}

/* The n best to the head of order. */
static void rank(world *w, uint32_t n)
{
    uint32_t found = 0;
    for (float bound = 3.0f; found < n; bound -= 0.1f) {
        found = 0;
        for (uint32_t i = 0; i < POSITIONS; i++) {
            if (w->score[i] > bound)
                w->order[found++] = i;
        }
    }
    sorted_by = w->score;
    qsort(w->order, found, sizeof(*w->order), best_first);
}

/* Until the slots hold what is resident, the longest unused goes. */
static void evict(world *w, uint32_t *resident)
{
    while (*resident > SLOTS) {
        uint32_t oldest = UINT32_MAX, n = 0;
        for (uint32_t i = 0; i < POSITIONS; i++) {
            if (w->last_used[i] != 0 && w->last_used[i] < oldest)
                oldest = w->last_used[i];
        }
        for (uint32_t i = 0; i<POSITIONS && * resident> SLOTS; i++) {
            if (w->last_used[i] != oldest)
                continue;
            w->last_used[i] = 0;
            w->brought[i] = false;
            --*resident;
            n++;
        }
    }
}

static void move_scores(world *w, const walk *how)
{
    for (uint32_t i = 0; i < POSITIONS; i++) {
        double noise = how->noise * normal(&w->random);
        w->score[i] =
            (float)((how->wavers ? (double)w->base[i] : how->kept * (double)w->score[i]) + noise);
    }
}

/* A walk with m runners-up; misses, brought and of these picked later, a step. False: see above. */
static bool run(const walk *how, uint32_t m, uint32_t n_steps)
{
    world w = {.base = get(POSITIONS, sizeof(float)),
               .score = get(POSITIONS, sizeof(float)),
               .order = get(POSITIONS, sizeof(uint32_t)),
               .last_used = get(POSITIONS, sizeof(uint32_t)),
               .brought = get(POSITIONS, sizeof(bool)),
               .random = 88172645463325252ull};
    uint32_t resident = 0, misses = 0, n_brought = 0, n_used = 0;
    bool holds = true;
    for (uint32_t i = 0; i < POSITIONS; i++)
        w.base[i] = w.score[i] = (float)normal(&w.random);
    for (uint32_t t = 1; t <= n_steps; t++) {
        uint32_t missed = 0, used = 0, came = 0, twice = 2u * t;
        move_scores(&w, how);
        rank(&w, K + m);
        for (uint32_t i = 0; i < K + m; i++) {
            uint32_t pos = w.order[i], last = w.last_used[pos];
            bool picked = i < K;
            holds = holds && !(m == 0 && picked && last == 0 && w.brought[pos]);
            missed += picked && last == 0;
            used += picked && w.brought[pos];
            came += !picked && last == 0;
            resident += last == 0;
            if (picked || last == 0)
                w.last_used[pos] = picked ? twice : twice - 1u;
            w.brought[pos] = !picked && (last == 0 || w.brought[pos]);
        }
        evict(&w, &resident);
        for (uint32_t i = 0; i < K; i++)
            holds = holds && w.last_used[w.order[i]] == twice;
        misses += t > WARM ? missed : 0;
        n_brought += t > WARM ? came : 0;
        n_used += t > WARM ? used : 0;
    }
    double n = n_steps - WARM;
    printf("%-22s %6u %8.2f %% %9.1f %9.1f\n", how->name, m, 100 * misses / n / K, n_brought / n,
           n_used / n);
    free(w.base);
    free(w.score);
    free(w.order);
    free(w.last_used);
    free(w.brought);
    return holds;
}

int main(int argc, char **argv)
{
    static const walk walks[] = {{"drifts, 0.995 kept", 0.995, 0.0998749, false},
                                 {"drifts, 0.999 kept", 0.999, 0.0447102, false},
                                 {"wavers by 0.12", 1, 0.12, true},
                                 {"wavers by 0.3", 1, 0.3, true}};
    bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0, holds = true;
    printf("%-22s %6s %10s %9s %9s\n", "query", "ahead", "misses", "brought", "of use");
    for (size_t i = 0; i < (quick ? 1 : sizeof(walks) / sizeof(walks[0])); i++) {
        for (uint32_t m = 0; m <= K / 2; m = m == 0 ? K / 16 : m * 2)
            holds = run(&walks[i], m, quick ? QUICK_STEPS : STEPS) && holds;
    }
    return holds ? 0 : 1;
}
