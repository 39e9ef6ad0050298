/*
 * cuda_bench.c: times of the CUDA decode path beside the memory floor of this device, and beside
 * dense attention where dense_sdpa.py ran before (--dense FILE).
 *
 * A time is that of one step in a graph of STEPS, each over its own index, slots and tables (as
 * the layers of a model), so nothing is found in L2 that a real step would not find there; L2 is
 * flushed and the slot tables are put back before each replay. Median and spread of REPEATS
 * replays. Llama-3-8B: 32 query heads, 8 kv heads, 128 dimensions, bf16: rows of 4,096 bytes.
 * Arguments: --quick (small sizes, a smoke test), --rows (attention over each kind of row alone),
 * --prefill (attention of chunks), --votes or --window (those parts alone), or numbers of tokens
 * (one sequence of each). Single-threaded.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_support.h"

#define STEPS        8u
#define REPEATS      15u
#define HEADS        32u
#define KV_HEADS     8u
#define DIM          128u
#define K            2048u
#define SLOTS        4096u
#define BLOCK_TOKENS 256u

/* What a row is: bf16 (4,096 bytes), or coded (2,080), its keys to be rotated on the way or not. */
typedef struct row_kind {
    const char *name;
    kvk_dtype dtype;
    bool rotated;
    uint32_t row_bytes;
} row_kind;

static const row_kind plain = {"bf16", KVK_BF16, false, 4096};

/* One batch shape: every step has its own copies. */
typedef struct world {
    const row_kind *rows;
    uint32_t n, n_seqs, dims, missing_percent;
    uint32_t index_bytes; /* a token's */
    kvk_cuda_select_args select[STEPS];
    kvk_cuda_select_vote_args vote[STEPS]; /* a world of votes: select has its picks alone */
    kvk_cuda_resolve_args resolve[STEPS];
    kvk_cuda_attend_args attend[STEPS];
    kvk_cuda_gather_args gather[STEPS];
    kvk_cuda_prefill_args prefill[STEPS];
    kvk_cuda_residency *res; /* host copy, [STEPS, n_seqs] */
    void *saved[STEPS];      /* tables with the wanted share missing, [n_seqs] each */
    void *tables[STEPS];
    size_t table_bytes;
    kvk_cuda_select_args flush; /* a scan of other bytes: L2 holds them after, and clean */
} world;

typedef void (*enqueue_fn)(world *w, uint32_t step);

static double copy_gb_s; /* bytes read and written, per second */

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void restore(world *w)
{
    for (uint32_t t = 0; w->saved[0] && t < STEPS; t++)
        OK(kvk_cuda_copy(gpu(), w->tables[t], w->saved[t], w->table_bytes, gpu_stream()));
    OK(kvk_cuda_select(gpu(), &w->flush, gpu_stream()));
}

/* Median time of a step in us; *low_p and *high_p the least and the greatest. */
static double time_steps(world *w, enqueue_fn enqueue, double *low_p, double *high_p)
{
    kvk_cuda_graph *graph = NULL;
    kvk_cuda_event *begin = NULL, *end = NULL;
    float ms[REPEATS];

    OK(kvk_cuda_event_create(gpu(), &begin));
    OK(kvk_cuda_event_create(gpu(), &end));
    OK(kvk_cuda_graph_begin(gpu(), gpu_stream()));
    for (uint32_t t = 0; t < STEPS; t++)
        enqueue(w, t);
    OK(kvk_cuda_graph_end(gpu(), gpu_stream(), &graph));
    for (uint32_t i = 0; i < REPEATS + 2; i++) {
        restore(w);
        OK(kvk_cuda_event_record(gpu(), begin, gpu_stream()));
        OK(kvk_cuda_graph_launch(gpu(), graph, gpu_stream()));
        OK(kvk_cuda_event_record(gpu(), end, gpu_stream()));
        gpu_sync();
        OK(kvk_cuda_event_elapsed(gpu(), begin, end, &ms[i < 2 ? 0 : i - 2]));
    }
    qsort(ms, REPEATS, sizeof(ms[0]), by_value);
    kvk_cuda_graph_destroy(gpu(), graph);
    kvk_cuda_event_destroy(gpu(), begin);
    kvk_cuda_event_destroy(gpu(), end);
    *low_p = (double)ms[0] * 1e3 / STEPS;
    *high_p = (double)ms[REPEATS - 1] * 1e3 / STEPS;
    return (double)ms[REPEATS / 2] * 1e3 / STEPS;
}

static void report(world *w, const char *what, enqueue_fn enqueue, double floor_us)
{
    double low = 0, high = 0, us = time_steps(w, enqueue, &low, &high);

    printf("%8u %5u %5u %-7s %4u  %-28s %9.1f %9.1f %9.1f %9.1f\n", w->n, w->n_seqs, w->index_bytes,
           w->rows->name, 100 - w->missing_percent, what, us, low, high, floor_us);
    (void)fflush(stdout);
}

static void do_select(world *w, uint32_t t)
{
    OK(kvk_cuda_select(gpu(), &w->select[t], gpu_stream()));
}

static void do_vote(world *w, uint32_t t)
{
    OK(kvk_cuda_select_vote(gpu(), &w->vote[t], gpu_stream()));
}

static void do_resolve(world *w, uint32_t t)
{
    OK(kvk_cuda_resolve(gpu(), &w->resolve[t], gpu_stream()));
}

static void do_attend(world *w, uint32_t t)
{
    OK(kvk_cuda_attend(gpu(), &w->attend[t], gpu_stream()));
}

static void do_gather(world *w, uint32_t t)
{
    OK(kvk_cuda_gather(gpu(), &w->gather[t], gpu_stream()));
}

static void do_resolve_attend(world *w, uint32_t t)
{
    do_resolve(w, t);
    do_attend(w, t);
}

static void do_step(world *w, uint32_t t)
{
    do_select(w, t);
    do_resolve_attend(w, t);
}

static void do_vote_step(world *w, uint32_t t)
{
    do_vote(w, t);
    do_resolve_attend(w, t);
}

static void measure_copy(size_t bytes)
{
    void *from = device_bytes(bytes), *to = device_bytes(bytes);
    kvk_cuda_event *begin = NULL, *end = NULL;

    OK(kvk_cuda_event_create(gpu(), &begin));
    OK(kvk_cuda_event_create(gpu(), &end));
    for (int i = 0; i < 9; i++) {
        float ms = 0;
        OK(kvk_cuda_event_record(gpu(), begin, gpu_stream()));
        OK(kvk_cuda_copy(gpu(), to, from, bytes, gpu_stream()));
        OK(kvk_cuda_event_record(gpu(), end, gpu_stream()));
        gpu_sync();
        OK(kvk_cuda_event_elapsed(gpu(), begin, end, &ms));
        if (2.0 * (double)bytes / (double)ms * 1e-6 > copy_gb_s)
            copy_gb_s = 2.0 * (double)bytes / (double)ms * 1e-6;
    }
    printf(
        "# device copy, read + written: %.0f GB/s; the floor of a column is its bytes over this\n",
        copy_gb_s);
    kvk_cuda_event_destroy(gpu(), begin);
    kvk_cuda_event_destroy(gpu(), end);
    release_all();
}

static double floor_us(double bytes)
{
    return bytes / copy_gb_s * 1e-3;
}

/* The rows of the context lie in one pinned arena, of which a long context sees the start again. */
static kvk_cuda_source source_of(uint32_t n, uint32_t row_bytes, const char *arena,
                                 size_t arena_bytes)
{
    uint32_t n_blocks = (n + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    size_t block = (size_t)BLOCK_TOKENS * row_bytes;
    const void **blocks = host_bytes(n_blocks * sizeof(*blocks));

    for (uint32_t b = 0; b < n_blocks; b++)
        blocks[b] = arena + (size_t)b % (arena_bytes / block) * block;
    return (kvk_cuda_source){device_copy(blocks, n_blocks * sizeof(*blocks)), n_blocks,
                             BLOCK_TOKENS};
}

static void make_select(world *w, uint32_t t, numbers *from, const void *rows)
{
    size_t bytes = (size_t)w->n * kvk_index_row_bytes(1, w->dims);
    size_t work = kvk_cuda_select_workspace_bytes(w->n_seqs, w->n);
    kvk_cuda_candidates *cands = host_bytes(w->n_seqs * sizeof(*cands));
    void *workspace = device_bytes(work);
    float *q = normals(from, (size_t)w->n_seqs * w->dims);

    for (uint32_t s = 0; s < w->n_seqs; s++)
        cands[s] = (kvk_cuda_candidates){device_copy(rows, bytes), w->n, 0};
    OK(kvk_cuda_fill(gpu(), workspace, 0, work, gpu_stream()));
    w->select[t] = (kvk_cuda_select_args){.n_seqs = w->n_seqs,
                                          .dims = w->dims,
                                          .k = K,
                                          .rows_max = w->n,
                                          .q = device_copy(q, (size_t)w->n_seqs * w->dims * 4),
                                          .cands = device_copy(cands, w->n_seqs * sizeof(*cands)),
                                          .picks = device_bytes((size_t)w->n_seqs * K * 4),
                                          .n_picks = device_bytes(w->n_seqs * 4),
                                          .workspace = workspace,
                                          .workspace_bytes = work};
    do_select(w, t);
}

static void make_vote(world *w, uint32_t t, numbers *from, const void *rows)
{
    size_t bytes = (size_t)w->n * w->index_bytes, width = (size_t)w->n_seqs * HEADS * w->dims;
    size_t work = kvk_cuda_select_vote_workspace_bytes(w->n_seqs, w->n);
    kvk_cuda_candidates *cands = host_bytes(w->n_seqs * sizeof(*cands));
    void *workspace = device_bytes(work);

    for (uint32_t s = 0; s < w->n_seqs; s++)
        cands[s] = (kvk_cuda_candidates){device_copy(rows, bytes), w->n, 0};
    OK(kvk_cuda_fill(gpu(), workspace, 0, work, gpu_stream()));
    w->vote[t] =
        (kvk_cuda_select_vote_args){.n_seqs = w->n_seqs,
                                    .n_q_heads = HEADS,
                                    .n_kv_heads = KV_HEADS,
                                    .dims = w->dims,
                                    .k = K,
                                    .rows_max = w->n,
                                    .q = device_copy(normals(from, width), width * 4),
                                    .cands = device_copy(cands, w->n_seqs * sizeof(*cands)),
                                    .picks = device_bytes((size_t)w->n_seqs * K * 4),
                                    .n_picks = device_bytes(w->n_seqs * 4),
                                    .workspace = workspace,
                                    .workspace_bytes = work};
    w->select[t].picks = w->vote[t].picks;
    w->select[t].n_picks = w->vote[t].n_picks;
    do_vote(w, t);
}

static void make_flush(world *w)
{
    enum { ROWS = 2 << 20 };
    kvk_cuda_candidates cands = {device_bytes((size_t)ROWS * 128), ROWS, 0};
    size_t work = kvk_cuda_select_workspace_bytes(1, ROWS);
    void *workspace = device_bytes(work);

    OK(kvk_cuda_fill(gpu(), (void *)(uintptr_t)cands.index, 1, (size_t)ROWS * 128, gpu_stream()));
    OK(kvk_cuda_fill(gpu(), workspace, 0, work, gpu_stream()));
    w->flush = (kvk_cuda_select_args){.n_seqs = 1,
                                      .dims = 126,
                                      .k = K,
                                      .rows_max = ROWS,
                                      .q = device_copy((float[126]){1.0f}, 126 * 4),
                                      .cands = device_copy(&cands, sizeof(cands)),
                                      .picks = device_bytes(K * 4),
                                      .n_picks = device_bytes(4),
                                      .workspace = workspace,
                                      .workspace_bytes = work};
}

/* Bytes of one sequence's tables: slot_of, pos_of, used, step. */
static size_t tables_of(uint32_t n)
{
    return ((size_t)n + 2 * SLOTS + 4) * 4;
}

/* All picks resident but the wanted share, which is spread evenly over the order of the picks. */
static void fill_tables(const world *w, uint32_t s, const uint32_t *picks, uint32_t *table)
{
    uint32_t *slot_of = table, *pos_of = table + w->n, *used = pos_of + SLOTS;

    memset(slot_of, 0xff, (size_t)w->n * 4);
    memset(pos_of, 0xff, SLOTS * 4);
    for (uint32_t i = 0; i < SLOTS; i++)
        used[i] = i < K ? 1 + i % 7 : 0;
    used[SLOTS] = 10; /* step */
    for (uint32_t i = 0; i < K; i++) {
        uint32_t position = picks[(size_t)s * K + i], slot = i * 5u % SLOTS;
        if (i * 37u % 100u < w->missing_percent)
            continue;
        slot_of[position] = slot;
        pos_of[slot] = position;
        used[slot] = 9;
    }
}

static void make_residency(world *w, uint32_t t, const kvk_cuda_source *source)
{
    kvk_cuda_residency *res = host_bytes(w->n_seqs * sizeof(*res));
    kvk_cuda_source *sources = host_bytes(w->n_seqs * sizeof(*sources));
    const uint32_t *picks = fetched(w->select[t].picks, (size_t)w->n_seqs * K * 4);
    char *tables = host_bytes(w->table_bytes);
    size_t entries = (size_t)w->n_seqs * K;

    w->tables[t] = device_bytes(w->table_bytes);
    for (uint32_t s = 0; s < w->n_seqs; s++) {
        uint32_t *at = (uint32_t *)w->tables[t] + s * (tables_of(w->n) / 4);
        fill_tables(w, s, picks, (uint32_t *)(void *)tables + s * (tables_of(w->n) / 4));
        res[s] = (kvk_cuda_residency){.slots = device_bytes((size_t)SLOTS * w->rows->row_bytes),
                                      .slot_of = (int32_t *)at,
                                      .pos_of = at + w->n,
                                      .used = at + w->n + SLOTS,
                                      .step = at + w->n + 2 * SLOTS,
                                      .n_positions = w->n};
        sources[s] = *source;
    }
    w->saved[t] = device_copy(tables, w->table_bytes);
    w->resolve[t] = (kvk_cuda_resolve_args){.n_seqs = w->n_seqs,
                                            .k = K,
                                            .n_slots = SLOTS,
                                            .picks = w->select[t].picks,
                                            .n_picks = w->select[t].n_picks,
                                            .res = device_copy(res, w->n_seqs * sizeof(*res)),
                                            .list = device_bytes(entries * 4),
                                            .fetch = device_bytes(entries * 4),
                                            .stride = K,
                                            .n_list = device_bytes(w->n_seqs * 4),
                                            .n_misses = device_bytes(w->n_seqs * 4)};
    w->gather[t] =
        (kvk_cuda_gather_args){.n_seqs = w->n_seqs,
                               .stride = K,
                               .list = w->resolve[t].list,
                               .fetch = w->resolve[t].fetch,
                               .n_list = w->resolve[t].n_list,
                               .res = w->resolve[t].res,
                               .source = device_copy(sources, w->n_seqs * sizeof(*sources)),
                               .row_bytes = w->rows->row_bytes};
}

static void make_attend(world *w, uint32_t t, numbers *from)
{
    size_t width = (size_t)w->n_seqs * HEADS * DIM;
    size_t work = kvk_cuda_attend_workspace_bytes(w->n_seqs, K, HEADS, DIM);

    w->attend[t] = (kvk_cuda_attend_args){.n_seqs = w->n_seqs,
                                          .n_q_heads = HEADS,
                                          .n_kv_heads = KV_HEADS,
                                          .head_dim = DIM,
                                          .q = device_copy(normals(from, width), width * 4),
                                          .list = w->resolve[t].list,
                                          .fetch = w->resolve[t].fetch,
                                          .n_list = w->resolve[t].n_list,
                                          .stride = K,
                                          .res = w->resolve[t].res,
                                          .source = w->gather[t].source,
                                          .row_bytes = w->rows->row_bytes,
                                          .v_off_bytes = w->rows->row_bytes / 2,
                                          .dtype = w->rows->dtype,
                                          .scale = 0.088388f,
                                          .o = device_bytes(width * 4),
                                          .lse = device_bytes((size_t)w->n_seqs * HEADS * 4),
                                          .workspace = device_bytes(work),
                                          .workspace_bytes = work};
    if (w->rows->rotated) {
        kvk_rope_params rope = {.theta = 500000};
        int32_t *ranks = host_bytes((size_t)w->n_seqs * K * 4);
        double inv_freq[DIM / 2];
        for (uint32_t i = 0; i < w->n_seqs * K; i++)
            ranks[i] = (int32_t)(i % K);
        OK(kvk_rope_inv_freq(&rope, DIM, inv_freq));
        w->attend[t].k_positions = device_copy(ranks, (size_t)w->n_seqs * K * 4);
        w->attend[t].inv_freq = device_copy(inv_freq, sizeof(inv_freq));
    }
}

/* missing_percent of the picks in w->missing_percent; remakes what depends on it. */
static void set_missing(world *w, uint32_t missing_percent)
{
    char *tables = host_bytes(w->table_bytes);

    w->missing_percent = missing_percent;
    for (uint32_t t = 0; t < STEPS; t++) {
        const uint32_t *picks = fetched(w->select[t].picks, (size_t)w->n_seqs * K * 4);
        for (uint32_t s = 0; s < w->n_seqs; s++)
            fill_tables(w, s, picks, (uint32_t *)(void *)tables + s * (tables_of(w->n) / 4));
        upload(w->saved[t], tables, w->table_bytes);
    }
}

static void bench(uint32_t n, uint32_t n_seqs, uint32_t dims, const char *arena, size_t arena_bytes)
{
    numbers from = {n + dims};
    world w = {.rows = &plain, .n = n, .n_seqs = n_seqs, .dims = dims, .index_bytes = dims + 2};
    const void *rows = index_rows(&from, n, 1, dims);
    kvk_cuda_source source = source_of(n, plain.row_bytes, arena, arena_bytes);
    double index_us = floor_us((double)n * n_seqs * (dims + 2));
    double rows_us = floor_us((double)n_seqs * K * plain.row_bytes);
    static const uint32_t missing[] = {5, 0, 1, 20, 100};

    make_flush(&w);
    w.table_bytes = n_seqs * tables_of(n);
    for (uint32_t t = 0; t < STEPS; t++) {
        make_select(&w, t, &from, rows);
        make_residency(&w, t, &source);
        make_attend(&w, t, &from);
    }
    gpu_sync();
    report(&w, "select", do_select, index_us);
    for (size_t i = 0; i < sizeof(missing) / sizeof(missing[0]); i++) {
        set_missing(&w, missing[i]);
        if (i < 2 || n_seqs == 1)
            report(&w, "step: select resolve attend", do_step, index_us + rows_us);
        if (n_seqs > 1 && i >= 2)
            continue;
        report(&w, "resolve", do_resolve, 0);
        report(&w, "resolve + attend (fetching)", do_resolve_attend, rows_us);
        if (missing[i] == 100) { /* lists and fetch are those of the last resolve */
            restore(&w);
            for (uint32_t t = 0; t < STEPS; t++)
                do_resolve(&w, t);
            report(&w, "gather alone", do_gather, 0);
        }
        if (missing[i] == 0)
            report(&w, "attend alone", do_attend, rows_us);
    }
    release_all();
}

static void do_encode(world *w, uint32_t t)
{
    kvk_cuda_encode_args a = {.k = w->attend[t].q, /* any bytes */
                              .v = w->attend[t].q,
                              .n = w->n_seqs,
                              .n_heads = KV_HEADS,
                              .head_dim = DIM,
                              .dtype = KVK_E4M3_SCALED,
                              .row_bytes = 2080,
                              .v_off_bytes = 1040,
                              .out = w->attend[t].workspace};

    OK(kvk_cuda_encode(gpu(), &a, gpu_stream()));
}

/* The row side alone, for each kind of row. */
static void bench_rows(uint32_t n, uint32_t n_seqs, const char *arena, size_t arena_bytes)
{
    static const row_kind kinds[] = {
        {"bf16", KVK_BF16, false, 4096},        {"bf16 r", KVK_BF16, true, 4096},
        {"e4m3", KVK_E4M3_SCALED, false, 2080}, {"e4m3 r", KVK_E4M3_SCALED, true, 2080},
        {"int8", KVK_I8_SCALED, false, 2080},   {"f16 r", KVK_F16, true, 4096}};
    static const uint32_t missing[] = {0, 5, 100};

    for (size_t k = 0; k < sizeof(kinds) / sizeof(kinds[0]); k++) {
        numbers from = {n + n_seqs};
        world w = {.rows = &kinds[k], .n = n, .n_seqs = n_seqs, .dims = 126, .index_bytes = 128};
        const void *rows = index_rows(&from, n, 1, 126);
        kvk_cuda_source source = source_of(n, kinds[k].row_bytes, arena, arena_bytes);
        double rows_us = floor_us((double)n_seqs * K * kinds[k].row_bytes);
        make_flush(&w);
        w.table_bytes = n_seqs * tables_of(n);
        for (uint32_t t = 0; t < STEPS; t++) {
            make_select(&w, t, &from, rows);
            make_residency(&w, t, &source);
            make_attend(&w, t, &from);
        }
        gpu_sync();
        for (size_t i = 0; i < sizeof(missing) / sizeof(missing[0]); i++) {
            set_missing(&w, missing[i]);
            report(&w, "resolve + attend (fetching)", do_resolve_attend, rows_us);
            if (missing[i] == 0)
                report(&w, "attend alone", do_attend, rows_us);
        }
        restore(&w);
        for (uint32_t t = 0; t < STEPS; t++)
            do_resolve(&w, t);
        report(&w, "gather alone", do_gather, 0);
        if (k == 0)
            report(&w, "encode, one row a sequence", do_encode, 0);
        release_all();
    }
}

static void do_prefill(world *w, uint32_t t)
{
    OK(kvk_cuda_prefill(gpu(), &w->prefill[t], gpu_stream()));
}

static void make_prefill(world *w, uint32_t t, numbers *from, uint32_t n_q)
{
    uint32_t n_list = w->n, row = w->rows->row_bytes;
    size_t width = (size_t)n_q * HEADS * DIM;
    size_t work = kvk_cuda_prefill_workspace_bytes(1, n_list, n_q, KV_HEADS, DIM, 0);
    kvk_rope_params rope = {.theta = 500000};
    int32_t *list = host_bytes(n_list * 4);
    kvk_cuda_residency res = {.slots = device_bytes((size_t)SLOTS * row)};
    double inv_freq[DIM / 2];

    OK(kvk_rope_inv_freq(&rope, DIM, inv_freq));
    OK(kvk_cuda_fill(gpu(), res.slots, 1, (size_t)SLOTS * row, gpu_stream()));
    for (uint32_t i = 0; i < n_list; i++)
        list[i] = (int32_t)(i * 37u % SLOTS);
    w->prefill[t] = (kvk_cuda_prefill_args){.n_seqs = 1,
                                            .n_q = n_q,
                                            .n_q_heads = HEADS,
                                            .n_kv_heads = KV_HEADS,
                                            .head_dim = DIM,
                                            .q = device_copy(normals(from, width), width * 4),
                                            .list = device_copy(list, n_list * 4),
                                            .n_list = device_copy(&n_list, 4),
                                            .stride = n_list,
                                            .res = device_copy(&res, sizeof(res)),
                                            .chunk = res.slots,
                                            .row_bytes = row,
                                            .v_off_bytes = row / 2,
                                            .dtype = w->rows->dtype,
                                            .k_positions = device_copy(list, n_list * 4),
                                            .chunk_positions = device_copy(list, n_q * 4),
                                            .inv_freq = device_copy(inv_freq, sizeof(inv_freq)),
                                            .scale = 0.088388f,
                                            .o = device_bytes(width * 4),
                                            .lse = device_bytes((size_t)n_q * HEADS * 4),
                                            .workspace = device_bytes(work),
                                            .workspace_bytes = work};
}

/* Attention of a chunk over picks, and over itself; the floor is its products at 800 TFLOP/s. */
static void bench_prefill(uint32_t n_list, uint32_t n_q)
{
    static const row_kind e4m3 = {"e4m3", KVK_E4M3_SCALED, true, 2080};
    double tera = (double)HEADS * DIM * 4 * n_q * (n_list + (n_q + 1) / 2.0) * 1e-12;

    for (int kind = 0; kind < 4; kind++) {
        numbers from = {n_list};
        world w = {.rows = kind < 2 ? &plain : &e4m3, .n = n_list, .n_seqs = 1, .dims = n_q - 2};
        char what[64];
        make_flush(&w);
        for (uint32_t t = 0; t < STEPS; t++) {
            make_prefill(&w, t, &from, n_q);
            w.prefill[t].fast = kind % 2 == 0;
        }
        (void)snprintf(what, sizeof(what), "prefill %u queries, %s", n_q,
                       kind % 2 ? "exact" : "fast");
        report(&w, what, do_prefill, tera / 800 * 1e6);
        release_all();
    }
}

/* eps > 0 takes the exact path over stored scores. */
static void bench_window(uint32_t n)
{
    numbers from = {n};
    world w = {.rows = &plain, .n = n, .n_seqs = 1, .dims = 126, .index_bytes = 128};
    const void *rows = index_rows(&from, n, 1, 126);

    make_flush(&w);
    for (uint32_t t = 0; t < STEPS; t++) {
        make_select(&w, t, &from, rows);
        w.select[t].eps = 3;
    }
    report(&w, "select, eps 3", do_select, floor_us((double)n * 128));
    release_all();
}

/* The soft vote over an index of each kv head, alone and as a step. */
static void bench_vote(uint32_t n, uint32_t n_seqs, const char *arena, size_t arena_bytes)
{
    numbers from = {n};
    world w = {.rows = &plain, .n = n, .n_seqs = n_seqs, .dims = 32};
    kvk_cuda_source source = source_of(n, plain.row_bytes, arena, arena_bytes);
    double index_us = 0, rows_us = floor_us((double)n_seqs * K * plain.row_bytes);
    const void *rows = index_rows(&from, n, KV_HEADS, w.dims);

    w.index_bytes = (uint32_t)kvk_index_row_bytes(KV_HEADS, w.dims);
    index_us = floor_us((double)n * n_seqs * w.index_bytes);
    make_flush(&w);
    w.table_bytes = n_seqs * tables_of(n);
    w.missing_percent = 5;
    for (uint32_t t = 0; t < STEPS; t++) {
        make_vote(&w, t, &from, rows);
        make_residency(&w, t, &source);
        make_attend(&w, t, &from);
    }
    gpu_sync();
    report(&w, "select by vote", do_vote, index_us);
    report(&w, "step: vote resolve attend", do_vote_step, index_us + rows_us);
    release_all();
}

static void bench_votes(const char *arena, size_t arena_bytes)
{
    bench_vote(1 << 17, 1, arena, arena_bytes);
    bench_vote(1 << 19, 1, arena, arena_bytes);
    bench_vote(1 << 20, 1, arena, arena_bytes);
    bench_vote(1 << 17, 8, arena, arena_bytes);
}

int main(int argc, char **argv)
{
    bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    size_t arena_bytes = quick ? (size_t)64 << 20 : (size_t)4 << 30;
    void *arena = NULL;

    OK(kvk_cuda_alloc(gpu(), KVK_CUDA_PINNED, arena_bytes, &arena));
    memset(arena, 0, arena_bytes);
    measure_copy(quick ? (size_t)64 << 20 : (size_t)2 << 30);
    printf("%8s %5s %5s %-7s %4s  %-28s %9s %9s %9s %9s\n", "tokens", "seqs", "B/tok", "rows",
           "hit%", "what", "us", "least", "most", "floor");
    if (quick) {
        bench(20000, 1, 126, arena, arena_bytes);
        bench_rows(20000, 1, arena, arena_bytes);
        bench_prefill(200, 64);
        bench_vote(20000, 1, arena, arena_bytes);
    } else if (argc > 1 && strcmp(argv[1], "--rows") == 0) {
        for (uint32_t n_seqs = 1; n_seqs <= 32; n_seqs = n_seqs == 1 ? 8 : n_seqs * 4)
            bench_rows(1 << 17, n_seqs, arena, arena_bytes);
    } else if (argc > 1 && strcmp(argv[1], "--prefill") == 0) {
        bench_prefill(2700, 512);
        bench_prefill(3500, 128);
    } else if (argc > 1 && strcmp(argv[1], "--votes") == 0) {
        bench_votes(arena, arena_bytes);
    } else if (argc > 1 && strcmp(argv[1], "--window") == 0) {
        bench_window(1 << 20);
    } else if (argc > 1) {
        for (int i = 1; i < argc; i++)
            bench((uint32_t)strtoul(argv[i], NULL, 10), 1, 126, arena, arena_bytes);
    } else {
        bench(1 << 17, 1, 126, arena, arena_bytes);
        bench(1 << 19, 1, 126, arena, arena_bytes);
        bench(1 << 20, 1, 126, arena, arena_bytes);
        bench(1 << 20, 1, 62, arena, arena_bytes);
        bench(1 << 22, 1, 126, arena, arena_bytes);
        bench(1 << 17, 8, 126, arena, arena_bytes);
        bench(1 << 20, 8, 126, arena, arena_bytes);
        bench(1 << 17, 32, 126, arena, arena_bytes);
        bench_window(1 << 20);
        for (uint32_t n_seqs = 1; n_seqs <= 32; n_seqs = n_seqs == 1 ? 8 : n_seqs * 4)
            bench_rows(1 << 17, n_seqs, arena, arena_bytes);
        bench_prefill(2700, 512);
        bench_prefill(3500, 128);
        bench_votes(arena, arena_bytes);
    }
    kvk_cuda_free(gpu(), KVK_CUDA_PINNED, arena);
    return 0;
}
