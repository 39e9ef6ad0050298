/*
 * evict_trace.c: the traces; see evict_trace.h.
 *
 * zipf: values of unequal popularity, nothing else. scan: such values, and runs of others that are
 * read once. loop: the same values round and round, more than fit. churn: popular values change.
 * sessions: conversations over shared system prompts; a turn reads all blocks so far and adds some,
 * a few conversations fork others. decode: long contexts whose steps pick blocks, most of them
 * those of the step before.
 */
#include "evict_trace.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

typedef struct maker {
    evict_trace *out;
    uint32_t room;
    uint64_t state;
} maker;

static uint64_t next(maker *m)
{
    m->state ^= m->state << 13;
    m->state ^= m->state >> 7;
    m->state ^= m->state << 17;
    return m->state * 0x2545f4914f6cdd1dull;
}

static uint32_t below(maker *m, uint32_t n)
{
    return (uint32_t)((next(m) >> 32) * n >> 32);
}

static bool full(const maker *m)
{
    return m->out->n >= m->room;
}

static void emit(maker *m, uint32_t key)
{
    if (full(m))
        return;
    m->out->keys[m->out->n++] = key;
    if (key >= m->out->n_keys)
        m->out->n_keys = key + 1;
}

/* Cumulative weights of ranks 1..n by rank^-alpha. */
static double *zipf_table(uint32_t n, double alpha)
{
    double *sums = malloc(n * sizeof(*sums)), sum = 0;
    for (uint32_t i = 0; sums && i < n; i++)
        sums[i] = sum += pow(i + 1, -alpha);
    return sums;
}

static uint32_t zipf(maker *m, const double *sums, uint32_t n)
{
    double want = (double)(next(m) >> 11) * 0x1p-53 * sums[n - 1];
    uint32_t lo = 0, hi = n - 1;
    while (lo < hi) {
        uint32_t mid = (lo + hi) / 2;
        if (sums[mid] < want)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static int make_zipf(maker *m)
{
    enum { KEYS = 20000 };
    double *sums = zipf_table(KEYS, 0.9);
    while (sums && !full(m))
        emit(m, zipf(m, sums, KEYS));
    free(sums);
    return sums ? 0 : 1;
}

static int make_scan(maker *m)
{
    enum { HOT = 10000, RUN = 4000 };
    double *sums = zipf_table(HOT, 0.9);
    uint32_t fresh = HOT;
    while (sums && !full(m)) {
        for (uint32_t i = 0; i < 3 * RUN; i++)
            emit(m, zipf(m, sums, HOT));
        for (uint32_t i = 0; i < RUN; i++)
            emit(m, fresh++);
    }
    free(sums);
    return sums ? 0 : 1;
}

static int make_loop(maker *m)
{
    enum { KEYS = 10000 };
    for (uint32_t i = 0; !full(m); i = (i + 1) % KEYS)
        emit(m, i);
    return 0;
}

/* Every so often each rank goes to a value that was never read. */
static int make_churn(maker *m)
{
    enum { RANKS = 10000, PERIOD = 20 };
    double *sums = zipf_table(RANKS, 0.9);
    uint32_t *keys = malloc(RANKS * sizeof(*keys)), fresh = RANKS;
    for (uint32_t i = 0; keys && i < RANKS; i++)
        keys[i] = i;
    for (uint32_t i = 0; sums && keys && !full(m); i++) {
        emit(m, keys[zipf(m, sums, RANKS)]);
        if (i % PERIOD == 0)
            keys[below(m, RANKS)] = fresh++;
    }
    int failed = !sums || !keys;
    free(sums);
    free(keys);
    return failed;
}

/* ---- sessions -------------------------------------------------------------------------------- */

enum { PROMPTS = 24, PROMPT_BLOCKS = 32, ALIVE = 150, MAX_BLOCKS = 512 };

typedef struct session {
    uint32_t blocks[MAX_BLOCKS];
    uint32_t n;
} session;

static void session_new(maker *m, session *s, const session *others, const double *prompts)
{
    uint32_t prompt = zipf(m, prompts, PROMPTS);
    const session *parent = &others[below(m, ALIVE)];
    if (parent->n > 0 && parent != s && below(m, 8) == 0) { /* a fork, cut somewhere */
        s->n = PROMPT_BLOCKS + below(m, parent->n - PROMPT_BLOCKS + 1);
        memcpy(s->blocks, parent->blocks, s->n * sizeof(s->blocks[0]));
        return;
    }
    s->n = PROMPT_BLOCKS;
    for (uint32_t i = 0; i < PROMPT_BLOCKS; i++)
        s->blocks[i] = prompt * PROMPT_BLOCKS + i;
}

static int make_sessions(maker *m)
{
    double *prompts = zipf_table(PROMPTS, 1.0), *recent = zipf_table(ALIVE, 0.6);
    session *alive = calloc(ALIVE, sizeof(*alive));
    uint32_t order[ALIVE], fresh = PROMPTS * PROMPT_BLOCKS;
    for (uint32_t i = 0; i < ALIVE; i++)
        order[i] = i;
    while (prompts && recent && alive && !full(m)) {
        uint32_t at = zipf(m, recent, ALIVE), which = order[at];
        session *s = &alive[which];
        memmove(order + 1, order, at * sizeof(order[0]));
        order[0] = which;
        if (s->n == 0 || below(m, 10) == 0)
            session_new(m, s, alive, prompts);
        for (uint32_t i = 0; i < s->n; i++)
            emit(m, s->blocks[i]);
        uint32_t more = 2 + below(m, 14);
        for (uint32_t i = 0; i < more && s->n < MAX_BLOCKS; i++)
            emit(m, s->blocks[s->n++] = fresh++);
    }
    int failed = !prompts || !recent || !alive;
    free(prompts);
    free(recent);
    free(alive);
    return failed;
}

/* ---- decode ---------------------------------------------------------------------------------- */

static int make_decode(maker *m)
{
    enum { CONTEXTS = 16, BLOCKS = 1024, PICKS = 48, STEPS = 250 };
    static uint32_t picks[CONTEXTS][PICKS], first[CONTEXTS], left[CONTEXTS];
    double *sums = zipf_table(BLOCKS, 0.7);
    uint32_t fresh = 0;
    memset(left, 0, sizeof(left));
    while (sums && !full(m)) {
        uint32_t c = below(m, CONTEXTS);
        if (left[c] == 0) { /* a new context: all its blocks are put, one after the other */
            first[c] = fresh;
            left[c] = STEPS / 2 + below(m, STEPS);
            for (uint32_t i = 0; i < BLOCKS; i++)
                emit(m, fresh++);
            for (uint32_t i = 0; i < PICKS; i++)
                picks[c][i] = zipf(m, sums, BLOCKS);
        }
        left[c]--;
        for (uint32_t i = 0; i < PICKS; i++) {
            if (below(m, 10) < 3) /* which block a rank is differs by context */
                picks[c][i] = zipf(m, sums, BLOCKS) * 389 % BLOCKS;
            emit(m, first[c] + picks[c][i]);
        }
    }
    free(sums);
    return sums ? 0 : 1;
}

int evict_trace_make(uint32_t i, uint32_t n, uint64_t seed, evict_trace *trace_p)
{
    static const struct {
        const char *name;
        int (*make)(maker *m);
    } traces[EVICT_TRACES] = {{"zipf", make_zipf},         {"scan", make_scan},
                              {"loop", make_loop},         {"churn", make_churn},
                              {"sessions", make_sessions}, {"decode", make_decode}};
    maker m = {.out = trace_p, .room = n, .state = seed * 0x9e3779b97f4a7c15ull + i + 1};
    *trace_p = (evict_trace){.name = traces[i].name, .keys = malloc(n * sizeof(uint32_t))};
    return trace_p->keys ? traces[i].make(&m) : 1;
}

void evict_trace_free(evict_trace *trace)
{
    free(trace->keys);
    trace->keys = NULL;
}
