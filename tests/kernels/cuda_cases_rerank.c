/*
 * cuda_cases_rerank.c: kvk_cuda_rerank against score_index, softmax_stats and vote of the CPU over
 * the rows of the list alone, with the bounds of cuda_votes.h.
 *
 * The oracle sees the listed rows densely, in ascending positions, so that the order of its rows is
 * that of positions.
 */
#include <stdlib.h>
#include <string.h>

#include "cuda_cases.h"
#include "cuda_votes.h"
#include "kvk/cuda_rerank.h"

/* A sequence's finer index, what is listed of it, and the same for the oracle. */
typedef struct finer {
    uint32_t n_rows, base, n_list;
    uint8_t *rows;
    uint32_t *list;
    votes_sequence dense;
} finer;

static int by_position(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void make_dense(finer *f, votes_shape s)
{
    size_t row = kvk_index_row_bytes(s.n_kv_heads, s.dims);
    uint32_t *at = host_bytes(f->n_list * 4 + 4);

    memcpy(at, f->list, f->n_list * 4);
    qsort(at, f->n_list, 4, by_position);
    f->dense.n = f->n_list;
    f->dense.at = at;
    f->dense.rows = host_bytes(f->n_list * row + 1);
    for (uint32_t i = 0; i < f->n_list; i++)
        memcpy(f->dense.rows + i * row, f->rows + (size_t)(at[i] - f->base) * row, row);
}

/* n_list of n_rows positions, in any order; kind below VOTES_SPOILED: rows that fool a bound. */
static finer finer_of(numbers *from, uint32_t n_rows, uint32_t n_list, votes_shape s, int kind)
{
    votes_sequence all = votes_sequence_of(from, n_rows, s);
    finer f = {.n_rows = n_rows, .base = all.base, .n_list = n_list, .dense = {.q = all.q}};
    uint32_t *positions = host_bytes(n_rows * 4 + 4);

    if (kind < VOTES_SPOILED)
        votes_spoil(from, &all, s, kind);
    f.rows = all.rows;
    for (uint32_t i = 0; i < n_rows; i++)
        positions[i] = f.base + i;
    for (uint32_t i = 0; i < n_list; i++) {
        uint32_t other = i + number_below(from, n_rows - i), moved = positions[i];
        positions[i] = positions[other];
        positions[other] = moved;
    }
    f.list = positions;
    make_dense(&f, s);
    return f;
}

static kvk_cuda_rerank_args prepare(votes_shape s, const finer *f, uint32_t n_seqs, uint32_t n_max,
                                    uint32_t k, uint32_t eps)
{
    size_t width = (size_t)s.n_q_heads * s.dims, row = kvk_index_row_bytes(s.n_kv_heads, s.dims);
    kvk_cuda_candidates *rows = host_bytes(n_seqs * sizeof(*rows));
    float *q = host_bytes(n_seqs * width * 4);
    uint32_t *list = host_bytes((size_t)n_seqs * n_max * 4), *n_list = host_bytes(n_seqs * 4);
    size_t bytes = kvk_cuda_rerank_workspace_bytes(n_seqs, n_max, s.n_q_heads);

    for (uint32_t i = 0; i < n_seqs; i++) {
        void *index = f[i].n_rows ? device_copy(f[i].rows, f[i].n_rows * row) : NULL;
        rows[i] = (kvk_cuda_candidates){index, f[i].n_rows, f[i].base};
        memcpy(q + i * width, f[i].dense.q, width * 4);
        memcpy(list + (size_t)i * n_max, f[i].list, f[i].n_list * 4);
        n_list[i] = f[i].n_list;
    }
    return (kvk_cuda_rerank_args){.n_seqs = n_seqs,
                                  .n_q_heads = s.n_q_heads,
                                  .n_kv_heads = s.n_kv_heads,
                                  .dims = s.dims,
                                  .k = k,
                                  .eps = eps,
                                  .n_max = n_max,
                                  .q = device_copy(q, n_seqs * width * 4),
                                  .finer = device_copy(rows, n_seqs * sizeof(*rows)),
                                  .list = device_copy(list, (size_t)n_seqs * n_max * 4),
                                  .n_list = device_copy(n_list, n_seqs * 4),
                                  .picks = device_bytes((size_t)n_seqs * k * 4),
                                  .scores = device_bytes((size_t)n_seqs * k * 4),
                                  .n_picks = device_bytes(n_seqs * 4),
                                  .workspace = device_bytes(bytes),
                                  .workspace_bytes = bytes};
}

/* Runs it; the answers go to the sequences, as rows of the oracle's. */
static void answer(const kvk_cuda_rerank_args *args, finer *f)
{
    size_t all = (size_t)args->n_seqs * args->k;
    const uint32_t *n_picks, *picks;
    const float *scores;

    OK(kvk_cuda_fill(gpu(), args->picks, 0xee, all * 4, gpu_stream()));
    OK(kvk_cuda_rerank(gpu(), args, gpu_stream()));
    n_picks = fetched(args->n_picks, args->n_seqs * 4);
    picks = fetched(args->picks, all * 4);
    scores = fetched(args->scores, all * 4);
    for (uint32_t i = 0; i < args->n_seqs; i++) {
        votes_sequence *seq = &f[i].dense;
        uint32_t *rows = host_bytes(args->k * 4);
        seq->n_picks = n_picks[i];
        seq->scores = scores + (size_t)i * args->k;
        for (uint32_t j = 0; j < seq->n_picks && j < args->k; j++) {
            uint32_t pick = picks[(size_t)i * args->k + j];
            uint32_t *at = bsearch(&pick, seq->at, seq->n, 4, by_position);
            REQUIRE(at != NULL, "pick %u is %u, which is not listed", j, pick);
            rows[j] = (uint32_t)(at - seq->at);
        }
        seq->picks = rows;
    }
}

static void run(votes_shape s, finer *f, uint32_t k, uint32_t eps, const char *what)
{
    kvk_cuda_rerank_args args = prepare(s, f, 1, f->n_list ? f->n_list : 1u, k, eps);

    answer(&args, f);
    votes_compare(s, &f->dense, k, eps, what);
}

void cuda_case_rerank_edges(numbers *from)
{
    votes_shape s = {32, 8, 48};
    finer f = finer_of(from, 100, 40, s, VOTES_SPOILED);
    kvk_cuda_rerank_args good = prepare(s, &f, 1, 40, 8, 0), args;

#define REFUSED(field, value)                                                                      \
    args = good;                                                                                   \
    args.field = value;                                                                            \
    REQUIRE(kvk_cuda_rerank(gpu(), &args, gpu_stream()) == KVC_INVALID, #field)
    REFUSED(k, 0);
    REFUSED(k, KVK_CUDA_K_MAX + 1);
    REFUSED(n_max, 0);
    REFUSED(n_max, KVK_CUDA_WIDE_MAX + 1);
    REFUSED(dims, 0);
    REFUSED(dims, 257);
    REFUSED(n_kv_heads, 0);
    REFUSED(n_kv_heads, 7);
    REFUSED(n_q_heads, 0);
    REFUSED(n_q_heads, 136);
    REFUSED(q, NULL);
    REFUSED(finer, NULL);
    REFUSED(list, NULL);
    REFUSED(workspace_bytes, good.workspace_bytes - 1);
    REFUSED(n_seqs, KVK_CUDA_SEQS_MAX + 1);
#undef REFUSED
    REQUIRE(kvk_cuda_rerank_workspace_bytes(1, KVK_CUDA_WIDE_MAX + 1, 1) == 0, "workspace");
    args = good;
    args.n_seqs = 0;
    OK(kvk_cuda_rerank(gpu(), &args, gpu_stream()));
    args = good;
    args.scores = NULL;
    OK(kvk_cuda_rerank(gpu(), &args, gpu_stream()));
    args.eps = 3;
    OK(kvk_cuda_rerank(gpu(), &args, gpu_stream()));
    gpu_sync();
    f = finer_of(from, 200, 130, (votes_shape){128, 128, 128}, VOTES_SPOILED);
    run((votes_shape){128, 128, 128}, &f, 60, 2, "tiles of rows that come one at a time");
    s = (votes_shape){2, 1, 8};
    f = finer_of(from, 3000, 2100, s, VOTES_SPOILED);
    run(s, &f, 40, 1, "more keys than a block widens by at a time");
    f = finer_of(from, 5000, 4200, s, VOTES_SPOILED);
    run(s, &f, 40, 0, "more keys than a block ranks against at a time");
}

void cuda_case_rerank(numbers *from)
{
    static const votes_shape shapes[] = {{32, 8, 64},  {9, 3, 48},      {28, 4, 32},
                                         {16, 8, 30},  {9, 3, 5},       {1, 1, 1},
                                         {32, 8, 126}, {128, 128, 128}, {64, 8, 256}};
    static const uint32_t sizes[] = {0, 1, 2, 63, 64, 65, 700, 3000};

    for (size_t h = 0; h < sizeof(shapes) / sizeof(shapes[0]); h++) {
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            finer f = finer_of(from, sizes[i] * 3 / 2, sizes[i], shapes[h], VOTES_SPOILED);
            run(shapes[h], &f, 1, 0, "one of a list");
            run(shapes[h], &f, 300, 0, "best of a list");
            run(shapes[h], &f, 2048, 4, "best of a list within a window");
            release_all();
        }
    }
    for (size_t h = 0; h < 2; h++) {
        for (uint32_t n = 8192; n <= KVK_CUDA_WIDE_MAX; n *= 2) {
            finer f = finer_of(from, 40000, n, shapes[h], VOTES_SPOILED);
            run(shapes[h], &f, 2048, 0, "best of a long list");
            run(shapes[h], &f, KVK_CUDA_K_MAX, 1, "best of a long list within a window");
            release_all();
        }
    }
}

void cuda_case_rerank_ties(numbers *from)
{
    votes_shape s = {9, 3, 48};

    for (int kind = 0; kind < VOTES_SPOILED; kind++) {
        finer f = finer_of(from, 9000, 5000, s, kind);
        run(s, &f, 700, 0, "listed votes of a kind");
        run(s, &f, 700, 2, "listed votes of a kind within a window");
        release_all();
    }
}

/* Scales that are not finite, and positions that the index does not have, which differ from those
 * that no head tells apart: one of the query's is all zeros. */
static void rerank_odd(numbers *from, votes_shape s, uint32_t eps)
{
    static const uint16_t special[] = {0x7f80, 0x7fc0, 0xff80, 0x3c00};
    enum { LISTED = 900, THERE = 300, K = 500 };
    finer f = finer_of(from, 1000, LISTED, s, VOTES_SPOILED), there;
    size_t row = kvk_index_row_bytes(s.n_kv_heads, s.dims);
    memset(f.dense.q + s.dims, 0, s.dims * 4);
    kvk_cuda_rerank_args args = prepare(s, &f, 1, LISTED, K, eps);

    there = f;
    there.dense.n = there.n_list = 0;
    for (uint32_t i = 0; i < LISTED; i++)
        there.n_list += f.list[i] - f.base < THERE;
    there.list = host_bytes(LISTED * 4);
    for (uint32_t i = 0, n = 0; i < LISTED; i++)
        if (f.list[i] - f.base < THERE)
            there.list[n++] = f.list[i];
    make_dense(&there, s);
    kvk_cuda_candidates *rows = fetched(args.finer, sizeof(*rows));
    rows->n_rows = THERE;
    upload((void *)args.finer, rows, sizeof(*rows));
    answer(&args, &f);
    REQUIRE(f.dense.n_picks == K, "%u picks", f.dense.n_picks);
    for (uint32_t i = 0; i < K; i++) {
        bool absent = f.dense.at[f.dense.picks[i]] - f.base >= THERE;
        REQUIRE(absent == (i >= there.n_list), "pick %u: what is absent is not last", i);
        REQUIRE(!absent || f.dense.scores[i] == -1.0f, "score %u", i);
    }
    there.dense.n_picks = there.n_list;
    uint32_t *picks = host_bytes(K * 4);
    for (uint32_t i = 0; i < there.n_list; i++) {
        uint32_t at = f.dense.at[f.dense.picks[i]];
        picks[i] =
            (uint32_t)((uint32_t *)bsearch(&at, there.dense.at, there.n_list, 4, by_position) -
                       there.dense.at);
    }
    there.dense.picks = picks;
    there.dense.scores = f.dense.scores;
    votes_compare(s, &there.dense, K, eps, "what is there");
    for (uint32_t j = 0; j < f.n_rows; j++)
        memcpy(f.rows + j * row + (size_t)s.n_kv_heads * s.dims, &special[number_below(from, 4)],
               2);
    args = prepare(s, &f, 1, LISTED, K, 1);
    answer(&args, &f);
    REQUIRE(f.dense.n_picks == K, "%u picks of what is not finite", f.dense.n_picks);
}

/* Equal bits alone and in a batch; sequences that are kept stay as they are. */
void cuda_case_rerank_batch(numbers *from)
{
    enum { SEQS = 7, K = 500, MOST = 4000 };
    votes_shape s = {32, 8, 64};
    finer f[SEQS], alone[SEQS];
    uint32_t keep[SEQS] = {[3] = 1};
    kvk_cuda_rerank_args args;

    for (uint32_t i = 0; i < SEQS; i++) {
        uint32_t n = i == 2 ? 0 : 1u + number_below(from, MOST);
        f[i] = finer_of(from, n + 50, n, s, i == 4 ? 3 : VOTES_SPOILED);
        alone[i] = f[i];
    }
    args = prepare(s, f, SEQS, MOST, K, 2);
    answer(&args, f);
    for (uint32_t i = 0; i < SEQS; i++) {
        votes_compare(s, &f[i].dense, K, 2, "lists of a batch");
        args = prepare(s, &alone[i], 1, f[i].n_list + 1, K, 2);
        answer(&args, &alone[i]);
        REQUIRE(memcmp(f[i].dense.picks, alone[i].dense.picks, f[i].dense.n_picks * 4) == 0 &&
                    memcmp(f[i].dense.scores, alone[i].dense.scores, f[i].dense.n_picks * 4) == 0,
                "list %u: other bits alone than in a batch", i);
    }
    args = prepare(s, f, SEQS, MOST, K, 0);
    args.keep = device_copy(keep, sizeof(keep));
    OK(kvk_cuda_fill(gpu(), args.picks, 0x77, (size_t)SEQS * K * 4, gpu_stream()));
    OK(kvk_cuda_fill(gpu(), args.n_picks, 0x77, SEQS * 4, gpu_stream()));
    OK(kvk_cuda_rerank(gpu(), &args, gpu_stream()));
    const uint32_t *n_picks = fetched(args.n_picks, SEQS * 4);
    const uint32_t *picks = fetched(args.picks, (size_t)SEQS * K * 4);
    REQUIRE(n_picks[3] == 0x77777777u && n_picks[4] != 0x77777777u, "what is kept");
    for (uint32_t i = 0; i < K; i++)
        REQUIRE(picks[3 * K + i] == 0x77777777u, "pick %u of what is kept", i);
    rerank_odd(from, s, 0);
    rerank_odd(from, s, 2);
}
