/*
 * cuda_chunks_bench.c: retrieval of whole chunks on a GPU: times of its ops beside the floors of
 * landmarks and transfers, and how much of a 64-token period of a stated model it takes, with
 * chunks fetched ahead and without.
 *
 * The models are stood in for by products of their weights with one vector (the scan of a
 * selection, which reads them at the memory's rate), layer by layer, from memory of their size.
 * Half of the layers come before the first retrieval group, a quarter belongs to each of two
 * groups. A group's query is known at the 64th token of a chunk, before the group's layers; its
 * chunks are attended from the next token's same layer on. Ahead: the retrieval runs on a second
 * stream meanwhile. Not ahead: on the model's stream, where the chunks are wanted. Every retrieval
 * wants chunks that are not there. Chunks lie in one pinned arena, of which a long context sees the
 * start again. Argument: --quick (small sizes, a smoke test). Single-threaded.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_support.h"

#define STEPS   8u
#define COPIES  4u /* of the landmarks, so that no step finds its own in L2 */
#define REPEATS 9u
#define K       8u
#define GROUPS  2u
#define CHUNK   64u
#define QUERIES 64u /* of a prefill chunk */

typedef struct model {
    const char *name;
    uint32_t hidden, heads, kv_heads, dim, layers;
    uint32_t layer_rows, head_rows; /* weights: rows of `hidden` elements */
} model;

/* What a retrieval writes and attention reads; a group has two, used in turns. */
typedef struct retrieval {
    kvk_cuda_chunk_select_args select;
    kvk_chunk_weights_args weights;
    kvk_cuda_resolve_args resolve;
    kvk_cuda_gather_args gather;
    kvk_cuda_chunk_attend_args attend;
    kvk_cuda_chunk_fuse_args fuse;
} retrieval;

typedef struct world {
    const model *m;
    uint32_t n_chunks, chunk_bytes;
    const void *marks[COPIES];
    const float *queries; /* [STEPS * GROUPS, hidden] */
    retrieval step[STEPS];
    retrieval group[GROUPS][2];
    kvk_cuda_chunk_select_args layer, head;
    char *weights;
    size_t held_bytes; /* GPU memory of retrieval, the model's weights not included */
    kvk_cuda_graph *lower, *upper[GROUPS][2];
    kvk_stream *side;
} world;

static double copy_gb_s, pcie_gb_s;
static char *arena;
static size_t arena_bytes;

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static kvk_cuda_event *event(void)
{
    kvk_cuda_event *e = NULL;
    OK(kvk_cuda_event_create(gpu(), &e));
    return e;
}

static void record(kvk_cuda_event *e, kvk_stream *stream)
{
    OK(kvk_cuda_event_record(gpu(), e, stream));
}

static double elapsed_us(const kvk_cuda_event *from, const kvk_cuda_event *to)
{
    float ms = 0;
    OK(kvk_cuda_event_elapsed(gpu(), from, to, &ms));
    return (double)ms * 1e3;
}

static double copy_rate(void *to, const void *from, size_t bytes)
{
    kvk_cuda_event *begin = event(), *end = event();
    double best = 0;

    for (int i = 0; i < 5; i++) {
        record(begin, gpu_stream());
        OK(kvk_cuda_copy(gpu(), to, from, bytes, gpu_stream()));
        record(end, gpu_stream());
        gpu_sync();
        double rate = (double)bytes / elapsed_us(begin, end) * 1e-3;
        best = rate > best ? rate : best;
    }
    kvk_cuda_event_destroy(gpu(), begin);
    kvk_cuda_event_destroy(gpu(), end);
    return best;
}

static void *held(world *w, size_t bytes)
{
    w->held_bytes += bytes;
    return device_bytes(bytes);
}

/* Landmarks of plausible sizes: bf16 of either sign in [0.5, 2). */
static void make_marks(world *w, numbers *from)
{
    size_t bytes = (size_t)w->n_chunks * w->m->hidden * 2;
    uint64_t *rows = host_bytes(bytes);

    for (size_t i = 0; i < bytes / 8; i++)
        rows[i] = (number(from) & 0x80ff80ff80ff80ffu) | 0x3f003f003f003f00u;
    w->marks[0] = device_copy(rows, bytes);
    w->held_bytes += bytes;
    for (uint32_t c = 1; c < COPIES; c++) {
        void *copy = device_bytes(bytes);
        OK(kvk_cuda_copy(gpu(), copy, w->marks[0], bytes, gpu_stream()));
        w->marks[c] = copy;
    }
}

static const kvk_cuda_candidates *candidates(const void *rows, uint32_t n)
{
    const kvk_cuda_candidates cands = {rows, n, 0};
    return device_copy(&cands, sizeof(cands));
}

static kvk_cuda_chunk_select_args make_select(world *w, const kvk_cuda_candidates *cands,
                                              uint32_t n, uint32_t k)
{
    size_t bytes = kvk_cuda_chunk_select_workspace_bytes(1, n);

    return (kvk_cuda_chunk_select_args){.n_seqs = 1,
                                        .dims = w->m->hidden,
                                        .k = k,
                                        .rows_max = n,
                                        .dtype = KVK_BF16,
                                        .stride_bytes = w->m->hidden * 2u,
                                        .q = w->queries,
                                        .cands = cands,
                                        .picks = held(w, k * 4),
                                        .scores = held(w, k * 4),
                                        .n_picks = held(w, 4),
                                        .workspace = held(w, bytes),
                                        .workspace_bytes = bytes};
}

/* Slots for the chunks of two retrievals, all empty. */
static const kvk_cuda_residency *make_residency(world *w)
{
    kvk_cuda_residency res = {.slots = held(w, (size_t)2 * K * w->chunk_bytes),
                              .slot_of = held(w, w->n_chunks * 4),
                              .pos_of = held(w, 2 * K * 4),
                              .used = held(w, 2 * K * 4),
                              .step = held(w, 4),
                              .n_positions = w->n_chunks};

    OK(kvk_cuda_fill(gpu(), res.slot_of, 0xff, w->n_chunks * 4, gpu_stream()));
    OK(kvk_cuda_fill(gpu(), res.pos_of, 0xff, 2 * K * 4, gpu_stream()));
    OK(kvk_cuda_fill(gpu(), res.used, 0, 2 * K * 4, gpu_stream()));
    OK(kvk_cuda_fill(gpu(), res.step, 0, 4, gpu_stream()));
    return device_copy(&res, sizeof(res));
}

static const kvk_cuda_source *make_source(world *w)
{
    const void **blocks = host_bytes(w->n_chunks * sizeof(*blocks));
    kvk_cuda_source source = {NULL, w->n_chunks, 1};

    for (size_t b = 0; b < w->n_chunks; b++)
        blocks[b] = arena + b % (arena_bytes / w->chunk_bytes) * w->chunk_bytes;
    w->held_bytes += w->n_chunks * sizeof(*blocks);
    source.blocks = device_copy(blocks, w->n_chunks * sizeof(*blocks));
    return device_copy(&source, sizeof(source));
}

static retrieval make_retrieval(world *w, const kvk_cuda_chunk_select_args *select,
                                const kvk_cuda_residency *res, const kvk_cuda_source *source,
                                uint32_t n_q)
{
    const model *m = w->m;
    size_t rows = (size_t)n_q * m->heads;
    retrieval r = {.select = *select};

    r.weights = (kvk_chunk_weights_args){select->scores, select->picks, 1, K, KVK_FUSE_SOFTMAX,
                                         0.0156f,        held(w, K * 4)};
    r.resolve = (kvk_cuda_resolve_args){.n_seqs = 1,
                                        .k = K,
                                        .n_slots = 2 * K,
                                        .picks = select->picks,
                                        .n_picks = select->n_picks,
                                        .res = res,
                                        .list = held(w, K * 4),
                                        .fetch = held(w, K * 4),
                                        .stride = K,
                                        .n_list = held(w, 4),
                                        .n_misses = held(w, 4)};
    r.gather = (kvk_cuda_gather_args){.n_seqs = 1,
                                      .stride = K,
                                      .list = r.resolve.list,
                                      .fetch = r.resolve.fetch,
                                      .n_list = r.resolve.n_list,
                                      .res = res,
                                      .source = source,
                                      .row_bytes = w->chunk_bytes};
    r.attend = (kvk_cuda_chunk_attend_args){.n_seqs = 1,
                                            .k = K,
                                            .n_q = n_q,
                                            .n_q_heads = m->heads,
                                            .n_kv_heads = m->kv_heads,
                                            .head_dim = m->dim,
                                            .q = device_bytes(rows * m->dim * 4),
                                            .list = r.resolve.list,
                                            .n_list = r.resolve.n_list,
                                            .res = res,
                                            .n_rows = CHUNK,
                                            .row_bytes = w->chunk_bytes / CHUNK,
                                            .chunk_bytes = w->chunk_bytes,
                                            .v_off_bytes = w->chunk_bytes / CHUNK / 2,
                                            .dtype = KVK_BF16,
                                            .scale = 0.09f,
                                            .o = held(w, K * rows * m->dim * 4),
                                            .lse = held(w, K * rows * 4)};
    OK(kvk_cuda_fill(gpu(), (void *)(uintptr_t)r.attend.q, 0, rows * m->dim * 4, gpu_stream()));
    r.fuse = (kvk_cuda_chunk_fuse_args){.n_seqs = 1,
                                        .k = K,
                                        .n = (uint32_t)rows,
                                        .dim = m->dim,
                                        .o = r.attend.o,
                                        .lse = r.attend.lse,
                                        .weights = r.weights.weights,
                                        .out = held(w, rows * m->dim * 4)};
    return r;
}

static void do_select(const retrieval *r, kvk_stream *stream)
{
    OK(kvk_cuda_chunk_select(gpu(), &r->select, stream));
}

static void do_weights(const retrieval *r, kvk_stream *stream)
{
    OK(kvk_cuda_chunk_weights(gpu(), &r->weights, stream));
}

static void do_fetch(const retrieval *r, kvk_stream *stream)
{
    OK(kvk_cuda_resolve(gpu(), &r->resolve, stream));
    OK(kvk_cuda_gather(gpu(), &r->gather, stream));
}

static void do_attend(const retrieval *r, kvk_stream *stream)
{
    OK(kvk_cuda_chunk_attend(gpu(), &r->attend, stream));
    OK(kvk_cuda_chunk_fuse(gpu(), &r->fuse, stream));
}

static void do_all(const retrieval *r, kvk_stream *stream)
{
    do_select(r, stream);
    do_weights(r, stream);
    do_fetch(r, stream);
    do_attend(r, stream);
}

/* ---- the ops ---- */

typedef void (*enqueue_fn)(const retrieval *r, kvk_stream *stream);

/* Median time of a step in a graph of STEPS, each with a query of its own. */
static void report(world *w, const char *what, enqueue_fn enqueue, double floor_us)
{
    kvk_cuda_graph *graph = NULL;
    kvk_cuda_event *begin = event(), *end = event();
    float us[REPEATS];

    OK(kvk_cuda_graph_begin(gpu(), gpu_stream()));
    for (uint32_t t = 0; t < STEPS; t++)
        enqueue(&w->step[t], gpu_stream());
    OK(kvk_cuda_graph_end(gpu(), gpu_stream(), &graph));
    for (uint32_t i = 0; i < REPEATS + 2; i++) {
        record(begin, gpu_stream());
        OK(kvk_cuda_graph_launch(gpu(), graph, gpu_stream()));
        record(end, gpu_stream());
        gpu_sync();
        us[i < 2 ? 0 : i - 2] = (float)(elapsed_us(begin, end) / STEPS);
    }
    qsort(us, REPEATS, sizeof(us[0]), by_value);
    printf("%-8s %9u  %-30s %9.1f %9.1f %9.1f %9.1f\n", w->m->name, w->n_chunks * CHUNK, what,
           (double)us[REPEATS / 2], (double)us[0], (double)us[REPEATS - 1], floor_us);
    kvk_cuda_graph_destroy(gpu(), graph);
    kvk_cuda_event_destroy(gpu(), begin);
    kvk_cuda_event_destroy(gpu(), end);
}

static void time_ops(world *w, const kvk_cuda_residency *res, const kvk_cuda_source *source)
{
    double marks_us = (double)w->n_chunks * w->m->hidden * 2 / copy_gb_s * 1e-3;
    double rows_us = (double)K * w->chunk_bytes / copy_gb_s * 1e-3;
    double pcie_us = (double)K * w->chunk_bytes / pcie_gb_s * 1e-3;
    const kvk_cuda_candidates *cands[COPIES];
    size_t before = w->held_bytes;

    for (uint32_t c = 0; c < COPIES; c++)
        cands[c] = candidates(w->marks[c], w->n_chunks);
    for (uint32_t t = 0; t < STEPS; t++) {
        kvk_cuda_chunk_select_args select = make_select(w, cands[t % COPIES], w->n_chunks, K);
        select.q += (size_t)t * w->m->hidden;
        w->step[t] = make_retrieval(w, &select, res, source, 1);
    }
    report(w, "select: scan and the 8 best", do_select, marks_us);
    report(w, "weights", do_weights, 0);
    report(w, "resolve, fetch of 8 chunks", do_fetch, pcie_us);
    report(w, "attend and fuse, 1 query", do_attend, rows_us);
    report(w, "all five, 1 query", do_all, marks_us + pcie_us);
    for (uint32_t t = 0; t < STEPS; t++) {
        w->step[t] = make_retrieval(w, &w->step[t].select, res, source, QUERIES);
        do_all(&w->step[t], gpu_stream()); /* lists that attention can read */
    }
    report(w, "attend and fuse, 64 queries", do_attend, rows_us);
    for (uint32_t t = 0; t < STEPS; t++)
        w->step[t].select = make_select(w, cands[t % COPIES], w->n_chunks, 64);
    report(w, "select: scan and the 64 best", do_select, marks_us);
    w->held_bytes = before; /* a real step has one set */
}

/* ---- the period ---- */

typedef enum mode { WITHOUT, NOT_AHEAD, AHEAD } mode;

/* Points of the last chunk's 64th token and the next one, of each group where there are two. */
typedef struct timeline {
    kvk_cuda_event *start, *known[GROUPS], *began[GROUPS], *scored[GROUPS], *fetched[GROUPS];
    kvk_cuda_event *next, *wanted[GROUPS], *had[GROUPS];
} timeline;

static void enqueue_layers(const world *w, uint32_t first, uint32_t n, const retrieval *r)
{
    for (uint32_t i = first; i < first + n; i++) {
        kvk_cuda_chunk_select_args layer = w->layer;
        layer.cands += i;
        OK(kvk_cuda_chunk_select(gpu(), &layer, gpu_stream()));
        if (r)
            do_attend(r, gpu_stream());
    }
}

static void make_model(world *w)
{
    const model *m = w->m;
    uint32_t rows = m->layers * m->layer_rows + m->head_rows, quarter = m->layers / 4;
    kvk_cuda_candidates *cands = host_bytes((m->layers + 1u) * sizeof(*cands));
    size_t before = w->held_bytes, row_bytes = m->hidden * 2u;

    w->weights = device_bytes(rows * row_bytes);
    for (uint32_t at = 0; at < rows; at += w->n_chunks) { /* any numbers that differ */
        uint32_t n = rows - at < w->n_chunks ? rows - at : w->n_chunks;
        OK(kvk_cuda_copy(gpu(), w->weights + at * row_bytes, w->marks[0], n * row_bytes,
                         gpu_stream()));
    }
    for (uint32_t i = 0; i <= m->layers; i++)
        cands[i] = (kvk_cuda_candidates){w->weights + (size_t)i * m->layer_rows * row_bytes,
                                         i < m->layers ? m->layer_rows : m->head_rows, 0};
    cands = device_copy(cands, (m->layers + 1u) * sizeof(*cands));
    w->layer = make_select(w, cands, m->layer_rows, 1);
    w->head = make_select(w, cands + m->layers, m->head_rows, 1);
    w->held_bytes = before;
    OK(kvk_cuda_graph_begin(gpu(), gpu_stream()));
    enqueue_layers(w, 0, 2 * quarter, NULL);
    OK(kvk_cuda_graph_end(gpu(), gpu_stream(), &w->lower));
    for (uint32_t g = 0; g < GROUPS; g++) {
        for (uint32_t turn = 0; turn < 2; turn++) {
            OK(kvk_cuda_graph_begin(gpu(), gpu_stream()));
            enqueue_layers(w, (2 + g) * quarter, quarter, &w->group[g][turn]);
            if (g == GROUPS - 1)
                OK(kvk_cuda_chunk_select(gpu(), &w->head, gpu_stream()));
            OK(kvk_cuda_graph_end(gpu(), gpu_stream(), &w->upper[g][turn]));
        }
    }
}

/* One retrieval of a group, its marks on the way. */
static void retrieve(const world *w, uint32_t g, uint32_t period, kvk_stream *stream,
                     const timeline *t)
{
    retrieval r = w->group[g][(period + 1) % 2];

    r.select.q = w->queries + (size_t)((period * GROUPS + g) % (STEPS * GROUPS)) * w->m->hidden;
    record(t->began[g], stream);
    do_select(&r, stream);
    do_weights(&r, stream);
    record(t->scored[g], stream);
    do_fetch(&r, stream);
    record(t->fetched[g], stream);
}

static void one_token(const world *w, mode how, uint32_t period, uint32_t token, const timeline *t)
{
    if (token == CHUNK - 1)
        record(t->start, gpu_stream());
    if (token == 0)
        record(t->next, gpu_stream());
    OK(kvk_cuda_graph_launch(gpu(), w->lower, gpu_stream()));
    for (uint32_t g = 0; g < GROUPS; g++) {
        if (token == CHUNK - 1 && how == AHEAD) {
            record(t->known[g], gpu_stream());
            OK(kvk_cuda_stream_wait(gpu(), w->side, t->known[g]));
            retrieve(w, g, period, w->side, t);
        }
        if (token == 0 && period > 0) {
            record(t->wanted[g], gpu_stream());
            if (how == AHEAD)
                OK(kvk_cuda_stream_wait(gpu(), gpu_stream(), t->fetched[g]));
            else if (how == NOT_AHEAD)
                retrieve(w, g, period - 1, gpu_stream(), t);
            record(t->had[g], gpu_stream());
        }
        OK(kvk_cuda_graph_launch(gpu(), w->upper[g][period % 2], gpu_stream()));
    }
}

/* Time of a period in us: n_periods + 1 chunks, the first of which waits for nothing. */
static double run_periods(const world *w, mode how, uint32_t n_periods, const timeline *t)
{
    kvk_cuda_event *begin = event(), *end = event();
    double us = 0;

    for (uint32_t period = 0; period <= n_periods; period++) {
        if (period == 1)
            record(begin, gpu_stream());
        for (uint32_t token = 0; token < CHUNK; token++)
            one_token(w, how, period, token, t);
    }
    record(end, gpu_stream());
    gpu_sync();
    OK(kvk_cuda_stream_sync(gpu(), w->side));
    us = elapsed_us(begin, end) / n_periods;
    kvk_cuda_event_destroy(gpu(), begin);
    kvk_cuda_event_destroy(gpu(), end);
    return us;
}

static double median_period(const world *w, mode how, uint32_t n_periods, const timeline *t)
{
    float us[3];

    for (int i = 0; i < 3; i++)
        us[i] = (float)run_periods(w, how, n_periods, t);
    qsort(us, 3, sizeof(us[0]), by_value);
    return (double)us[1];
}

/* Times of the last retrieval, from the start of the 64th token on; the next token follows it. */
static void print_timeline(const world *w, mode how, uint32_t n_periods, const timeline *t)
{
    uint32_t last = n_periods; /* its end is a retrieval that nobody waits for: one token more */

    (void)run_periods(w, how, last, t);
    one_token(w, how, last + 1, 0, t);
    gpu_sync();
    printf("#   %s: next token %.0f us after the 64th began\n",
           how == AHEAD ? "ahead" : "not ahead", elapsed_us(t->start, t->next));
    for (uint32_t g = 0; g < GROUPS; g++) {
        const kvk_cuda_event *known = how == AHEAD ? t->known[g] : t->wanted[g];
        printf("#   group %u: query %.0f, scan from %.0f to %.0f, chunks there at %.0f, wanted at "
               "%.0f, waited %.1f us\n",
               g + 1, elapsed_us(t->start, known), elapsed_us(t->start, t->began[g]),
               elapsed_us(t->start, t->scored[g]), elapsed_us(t->start, t->fetched[g]),
               elapsed_us(t->start, t->wanted[g]), elapsed_us(t->wanted[g], t->had[g]));
    }
}

static void time_periods(world *w, uint32_t n_periods)
{
    timeline t = {.start = event(), .next = event()};
    double without = 0, not_ahead = 0, ahead = 0;

    for (uint32_t g = 0; g < GROUPS; g++) {
        kvk_cuda_event **const all[] = {&t.known[g],   &t.began[g],  &t.scored[g],
                                        &t.fetched[g], &t.wanted[g], &t.had[g]};
        for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
            *all[i] = event();
    }
    (void)run_periods(w, WITHOUT, 1, &t);
    without = median_period(w, WITHOUT, n_periods, &t);
    not_ahead = median_period(w, NOT_AHEAD, n_periods, &t);
    ahead = median_period(w, AHEAD, n_periods, &t);
    printf("# %s, %u tokens: 64 tokens take %.0f us without retrieval (a token %.0f); exposed: not "
           "ahead %.0f us (%.3f %%), ahead %.0f us (%.3f %%); GPU memory of retrieval %.1f MB, of "
           "it landmarks %.1f MB\n",
           w->m->name, w->n_chunks * CHUNK, without, without / CHUNK, not_ahead - without,
           100 * (not_ahead / without - 1), ahead - without, 100 * (ahead / without - 1),
           (double)w->held_bytes * 1e-6, (double)w->n_chunks * w->m->hidden * 2e-6);
    print_timeline(w, NOT_AHEAD, n_periods, &t);
    print_timeline(w, AHEAD, n_periods, &t);
    (void)fflush(stdout);
}

static void bench(const model *m, uint32_t n_tokens, uint32_t n_periods)
{
    numbers from = {n_tokens + m->hidden};
    world w = {
        .m = m, .n_chunks = n_tokens / CHUNK, .chunk_bytes = CHUNK * 2 * m->kv_heads * m->dim * 2};
    const kvk_cuda_source *source = NULL;

    w.queries = device_copy(normals(&from, (size_t)STEPS * GROUPS * m->hidden),
                            (size_t)STEPS * GROUPS * m->hidden * 4);
    OK(kvk_cuda_stream_create(gpu(), &w.side));
    make_marks(&w, &from);
    source = make_source(&w);
    for (uint32_t g = 0; g < GROUPS; g++) {
        const kvk_cuda_residency *res = make_residency(&w);
        const kvk_cuda_candidates *cands = candidates(w.marks[0], w.n_chunks);
        for (uint32_t turn = 0; turn < 2; turn++) {
            kvk_cuda_chunk_select_args select = make_select(&w, cands, w.n_chunks, K);
            w.group[g][turn] = make_retrieval(&w, &select, res, source, 1);
            do_all(&w.group[g][turn], gpu_stream()); /* lists that attention can read */
        }
        if (g == 0)
            time_ops(&w, res, source);
    }
    make_model(&w);
    time_periods(&w, n_periods);
    OK(kvk_cuda_stream_sync(gpu(), w.side));
    kvk_cuda_stream_destroy(gpu(), w.side);
    kvk_cuda_graph_destroy(gpu(), w.lower);
    for (uint32_t g = 0; g < GROUPS; g++) {
        for (uint32_t turn = 0; turn < 2; turn++)
            kvk_cuda_graph_destroy(gpu(), w.upper[g][turn]);
    }
    release_all();
}

int main(int argc, char **argv)
{
    /* Llama-3-8B: 41.9 M weights of attention and 176 M of the MLP a layer, 525 M of the head. */
    static const model large = {"8B", 4096, 32, 8, 128, 32, 53248, 128256};
    /* The released GCA: 12 layers of hidden 768, 12 heads of 64, 50,265 words. */
    static const model small = {"128M", 768, 12, 12, 64, 12, 9216, 50265};
    static const model tiny = {"tiny", 256, 4, 2, 64, 4, 512, 1024};
    bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    size_t bytes = quick ? (size_t)32 << 20 : (size_t)1 << 30;

    arena_bytes = quick ? (size_t)64 << 20 : (size_t)4 << 30;
    void *memory = NULL;
    OK(kvk_cuda_alloc(gpu(), KVK_CUDA_PINNED, arena_bytes, &memory));
    arena = memory;
    memset(arena, 0, arena_bytes);
    copy_gb_s = 2 * copy_rate(device_bytes(bytes), device_bytes(bytes), bytes);
    pcie_gb_s = copy_rate(device_bytes(arena_bytes / 2), arena, arena_bytes / 2);
    printf("# device copy %.0f GB/s (read + written), from pinned memory %.1f GB/s; the floor is "
           "bytes over these\n",
           copy_gb_s, pcie_gb_s);
    release_all();
    printf("%-8s %9s  %-30s %9s %9s %9s %9s\n", "model", "tokens", "what", "us", "least", "most",
           "floor");
    if (quick) {
        bench(&tiny, 1 << 16, 2);
    } else {
        for (uint32_t shift = 20; shift <= 24; shift += 2) {
            bench(&large, 1u << shift, 3);
            bench(&small, 1u << shift, 20);
        }
    }
    kvk_cuda_free(gpu(), KVK_CUDA_PINNED, memory);
    return 0;
}
