/*
 * cuda_bench.c: times of the CUDA decode path beside the memory floor of this device, and beside
 * dense attention where dense_sdpa.py ran before (--dense FILE).
 *
 * A time is that of one step in a graph of STEPS, each over its own index, slots and tables (as
 * the layers of a model), so nothing is found in L2 that a real step would not find there; L2 is
 * flushed and the slot tables are put back before each replay. Median and spread of REPEATS
 * replays. Llama-3-8B: 32 query heads, 8 kv heads, 128 dimensions, bf16: rows of 4,096 bytes.
 * Arguments: --quick (small sizes, a smoke test), --rows (attention over each kind of row alone),
 * --prefill (attention of chunks, in both its forms), --votes, --rerank or --window (those parts
 * alone), or numbers of tokens (one sequence of each). Single-threaded.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/prefill_forms.h"
#include "cuda_bench_rig.h"

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
    if (n_seqs == 1) {
        report(&w, "floor: reading the index", do_read, index_us);
        report(&w, "floor: a launch", do_launch, 0);
    }
    for (size_t i = 0; i < sizeof(missing) / sizeof(missing[0]); i++) {
        set_missing(&w, missing[i]);
        if (i < 2 || n_seqs == 1)
            report(&w, "step: select, attend", do_step, index_us + rows_us);
        if (i == 0)
            report(&w, "step: select resolve attend", do_step_apart, index_us + rows_us);
        if (n_seqs > 1 && i >= 2)
            continue;
        report(&w, "resolve", do_resolve, 0);
        report(&w, "resolve + attend (fetching)", do_resolve_attend, rows_us);
        report(&w, "attend, resolving", do_picked, rows_us);
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
            report(&w, "attend, resolving", do_picked, rows_us);
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

static void do_prefill_portable(world *w, uint32_t t)
{
    OK(kvki_cuda_prefill_portable(gpu(), &w->prefill[t], gpu_stream()));
}

static void make_prefill(world *w, uint32_t t, numbers *from, uint32_t n_q)
{
    uint32_t n_list = w->n, row = w->rows->row_bytes;
    size_t width = (size_t)n_q * HEADS * DIM;
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
                                            .lse = device_bytes((size_t)n_q * HEADS * 4)};
    w->prefill[t].workspace_bytes = kvk_cuda_prefill_workspace_bytes(&w->prefill[t]);
    w->prefill[t].workspace = device_bytes(w->prefill[t].workspace_bytes);
}

/* Attention of a chunk over picks, and over itself; the floor is its products at 800 TFLOP/s.
 * portable: the form of all devices. */
static void bench_prefill(uint32_t n_list, uint32_t n_q, bool portable)
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
        (void)snprintf(what, sizeof(what), "prefill %u, %s%s", n_q, kind % 2 ? "exact" : "fast",
                       portable ? ", portable" : "");
        report(&w, what, portable ? do_prefill_portable : do_prefill, tera / 800 * 1e6);
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
    report(&w, "step: vote, attend", do_vote_step, index_us + rows_us);
    release_all();
}

static void bench_votes(const char *arena, size_t arena_bytes)
{
    bench_vote(1 << 17, 1, arena, arena_bytes);
    bench_vote(1 << 19, 1, arena, arena_bytes);
    bench_vote(1 << 20, 1, arena, arena_bytes);
    bench_vote(1 << 17, 8, arena, arena_bytes);
}

/* Finer index rows of the device: few different ones, since only their places matter. */
static void *finer_rows(numbers *from, uint32_t n, uint32_t dims)
{
    size_t row = kvk_index_row_bytes(KV_HEADS, dims), some = n < 4096 ? n : 4096;
    const uint8_t *rows = index_rows(from, (uint32_t)some, KV_HEADS, dims);
    uint8_t *all = device_bytes(n * row);

    for (size_t at = 0; at < n; at += some)
        upload(all + at * row, rows, (n - at < some ? n - at : some) * row);
    return all;
}

/* A vote over a small index, whose candidates a finer one ranks. */
static void bench_rerank(uint32_t n, uint32_t n_seqs, uint32_t dims, uint32_t finer,
                         uint32_t factor)
{
    numbers from = {n};
    world w = {.rows = &plain, .n = n, .n_seqs = n_seqs, .dims = dims};
    const void *rows = index_rows(&from, n, KV_HEADS, dims), *fine = finer_rows(&from, n, finer);
    double index_us = 0, fine_us = 0;
    char what[64];

    w.index_bytes = (uint32_t)kvk_index_row_bytes(KV_HEADS, dims);
    index_us = floor_us((double)n * n_seqs * w.index_bytes);
    fine_us = floor_us((double)n_seqs * factor * K * (double)kvk_index_row_bytes(KV_HEADS, finer));
    make_flush(&w);
    for (uint32_t t = 0; t < STEPS; t++)
        make_rerank(&w, t, &from, rows, fine, finer, factor);
    gpu_sync();
    (void)snprintf(what, sizeof(what), "vote of %u x %u", factor, K);
    report(&w, what, do_vote, index_us);
    (void)snprintf(what, sizeof(what), "rerank by %u dims", finer);
    report(&w, what, do_rerank, fine_us);
    report(&w, "vote, rerank", do_vote_rerank, index_us + fine_us);
    release_all();
}

static void bench_reranks(void)
{
    for (uint32_t factor = 2; factor <= 4; factor += 2) {
        bench_rerank(1 << 17, 1, 16, 48, factor);
        bench_rerank(1 << 20, 1, 16, 48, factor);
    }
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
        bench_prefill(200, 64, false);
        bench_vote(20000, 1, arena, arena_bytes);
        bench_rerank(20000, 1, 16, 48, 2);
    } else if (argc > 1 && strcmp(argv[1], "--rows") == 0) {
        for (uint32_t n_seqs = 1; n_seqs <= 32; n_seqs = n_seqs == 1 ? 8 : n_seqs * 4)
            bench_rows(1 << 17, n_seqs, arena, arena_bytes);
    } else if (argc > 1 && strcmp(argv[1], "--prefill") == 0) {
        for (int portable = 0; portable < 2; portable++) {
            bench_prefill(2700, 512, portable);
            bench_prefill(3500, 128, portable);
        }
    } else if (argc > 1 && strcmp(argv[1], "--votes") == 0) {
        bench_votes(arena, arena_bytes);
    } else if (argc > 1 && strcmp(argv[1], "--rerank") == 0) {
        bench_reranks();
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
        bench_prefill(2700, 512, false);
        bench_prefill(3500, 128, false);
        bench_votes(arena, arena_bytes);
        bench_reranks();
    }
    kvk_cuda_free(gpu(), KVK_CUDA_PINNED, arena);
    return 0;
}
