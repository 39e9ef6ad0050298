/* cuda_bench_rig.c: see cuda_bench_rig.h. Single-threaded. */
#include "cuda_bench_rig.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_floor.h"

const row_kind plain = {"bf16", KVK_BF16, false, 4096};

enum { FLUSH_BYTES = 256 << 20 };

static double copy_gb_s; /* bytes read and written, per second */

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

void restore(world *w)
{
    for (uint32_t t = 0; w->saved[0] && t < STEPS; t++)
        OK(kvk_cuda_copy(gpu(), w->tables[t], w->saved[t], w->table_bytes, gpu_stream()));
    REQUIRE(floor_read(w->flush, FLUSH_BYTES, w->sink, gpu_stream()) == 0, "a flush");
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

void report(world *w, const char *what, enqueue_fn enqueue, double floor_us)
{
    double low = 0, high = 0, us = time_steps(w, enqueue, &low, &high);

    printf("%8u %5u %5u %-7s %4u  %-28s %9.1f %9.1f %9.1f %9.1f\n", w->n, w->n_seqs, w->index_bytes,
           w->rows->name, 100 - w->missing_percent, what, us, low, high, floor_us);
    (void)fflush(stdout);
}

void do_select(world *w, uint32_t t)
{
    OK(kvk_cuda_select(gpu(), &w->select[t], gpu_stream()));
}

void do_vote(world *w, uint32_t t)
{
    OK(kvk_cuda_select_vote(gpu(), &w->vote[t], gpu_stream()));
}

void do_resolve(world *w, uint32_t t)
{
    OK(kvk_cuda_resolve(gpu(), &w->resolve[t], gpu_stream()));
}

void do_attend(world *w, uint32_t t)
{
    OK(kvk_cuda_attend(gpu(), &w->attend[t], gpu_stream()));
}

void do_gather(world *w, uint32_t t)
{
    OK(kvk_cuda_gather(gpu(), &w->gather[t], gpu_stream()));
}

void do_resolve_attend(world *w, uint32_t t)
{
    do_resolve(w, t);
    do_attend(w, t);
}

/* resolve and attend as one op. */
void do_picked(world *w, uint32_t t)
{
    kvk_cuda_attend_args a = w->attend[t];

    a.resolve = w->resolve[t];
    OK(kvk_cuda_attend(gpu(), &a, gpu_stream()));
}

void do_step(world *w, uint32_t t)
{
    do_select(w, t);
    do_picked(w, t);
}

void do_step_apart(world *w, uint32_t t)
{
    do_select(w, t);
    do_resolve_attend(w, t);
}

/* The index's bytes alone. */
void do_read(world *w, uint32_t t)
{
    size_t bytes = (size_t)w->n * w->index_bytes / 16 * 16;

    REQUIRE(floor_read(w->index[t], bytes, w->sink, gpu_stream()) == 0, "a read");
}

void do_launch(world *w, uint32_t t)
{
    (void)t;
    REQUIRE(floor_launch(132, w->sink, gpu_stream()) == 0, "a launch");
}

void do_vote_step(world *w, uint32_t t)
{
    do_vote(w, t);
    do_picked(w, t);
}

void do_rerank(world *w, uint32_t t)
{
    OK(kvk_cuda_rerank(gpu(), &w->rerank[t], gpu_stream()));
}

void do_vote_rerank(world *w, uint32_t t)
{
    do_vote(w, t);
    do_rerank(w, t);
}

void measure_copy(size_t bytes)
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

double floor_us(double bytes)
{
    return bytes / copy_gb_s * 1e-3;
}

/* The rows of the context lie in one pinned arena, of which a long context sees the start again. */
kvk_cuda_source source_of(uint32_t n, uint32_t row_bytes, const char *arena, size_t arena_bytes)
{
    uint32_t n_blocks = (n + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    size_t block = (size_t)BLOCK_TOKENS * row_bytes;
    const void **blocks = host_bytes(n_blocks * sizeof(*blocks));

    for (uint32_t b = 0; b < n_blocks; b++)
        blocks[b] = arena + (size_t)b % (arena_bytes / block) * block;
    return (kvk_cuda_source){device_copy(blocks, n_blocks * sizeof(*blocks)), n_blocks,
                             BLOCK_TOKENS};
}

void make_select(world *w, uint32_t t, numbers *from, const void *rows)
{
    size_t bytes = (size_t)w->n * kvk_index_row_bytes(1, w->dims);
    size_t work = kvk_cuda_select_workspace_bytes(w->n_seqs, w->n);
    kvk_cuda_candidates *cands = host_bytes(w->n_seqs * sizeof(*cands));
    void *workspace = device_bytes(work);
    float *q = normals(from, (size_t)w->n_seqs * w->dims);

    for (uint32_t s = 0; s < w->n_seqs; s++)
        cands[s] = (kvk_cuda_candidates){device_copy(rows, bytes), w->n, 0};
    w->index[t] = cands[0].index;
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

void make_vote(world *w, uint32_t t, numbers *from, const void *rows)
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

void make_rerank(world *w, uint32_t t, numbers *from, const void *rows, const void *finer,
                 uint32_t dims, uint32_t factor)
{
    size_t width = (size_t)w->n_seqs * HEADS * dims;
    kvk_cuda_candidates *lists = host_bytes(w->n_seqs * sizeof(*lists));
    kvk_cuda_select_vote_args *vote = &w->vote[t];

    make_vote(w, t, from, rows);
    vote->k = factor * K;
    vote->picks = device_bytes((size_t)w->n_seqs * factor * K * 4);
    for (uint32_t s = 0; s < w->n_seqs; s++)
        lists[s] = (kvk_cuda_candidates){finer, w->n, 0};
    w->rerank[t] = (kvk_cuda_rerank_args){
        .n_seqs = w->n_seqs,
        .n_q_heads = HEADS,
        .n_kv_heads = KV_HEADS,
        .dims = dims,
        .k = K,
        .n_max = factor * K,
        .q = device_copy(normals(from, width), width * 4),
        .finer = device_copy(lists, w->n_seqs * sizeof(*lists)),
        .list = vote->picks,
        .n_list = vote->n_picks,
        .picks = device_bytes((size_t)w->n_seqs * K * 4),
        .n_picks = device_bytes(w->n_seqs * 4),
        .workspace_bytes = kvk_cuda_rerank_workspace_bytes(w->n_seqs, factor * K, HEADS),
    };
    w->rerank[t].workspace = device_bytes(w->rerank[t].workspace_bytes);
    do_vote_rerank(w, t);
}

void make_flush(world *w)
{
    w->flush = device_bytes(FLUSH_BYTES);
    w->sink = device_bytes(4);
}

/* Bytes of one sequence's tables: slot_of, pos_of, used, step. */
size_t tables_of(uint32_t n)
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
        used[i] = i < K ? 4 * (1 + i % 7) : 0;
    used[SLOTS] = 10; /* step */
    for (uint32_t i = 0; i < K; i++) {
        uint32_t position = picks[(size_t)s * K + i], slot = i * 5u % SLOTS;
        if (i * 37u % 100u < w->missing_percent)
            continue;
        slot_of[position] = slot;
        pos_of[slot] = position;
        used[slot] = 4 * 9 + 1; /* picked again once */
    }
}

void make_residency(world *w, uint32_t t, const kvk_cuda_source *source)
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

void make_attend(world *w, uint32_t t, numbers *from)
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
                                          .workspace_bytes = work,
                                          .resolved = device_bytes((size_t)w->n_seqs * K * 4)};
    OK(kvk_cuda_fill(gpu(), w->attend[t].resolved, 0, (size_t)w->n_seqs * K * 4, gpu_stream()));
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
void set_missing(world *w, uint32_t missing_percent)
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
