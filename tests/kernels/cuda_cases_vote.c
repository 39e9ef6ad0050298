/*
 * cuda_cases_vote.c: kvk_cuda_select_vote against score_index, softmax_stats and vote of the CPU.
 *
 * Votes carry a bound, so picks are held to the oracle's votes: each returned score within the
 * bound of its row's, every pick no further than two bounds below the k-th vote, nothing left out
 * that lies further above it; and the returned order is exact on the returned scores.
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_cases.h"
#include "cuda_votes.h"
#include "kvk/cuda_frame.h"

votes_sequence votes_sequence_of(numbers *from, uint32_t n, votes_shape s)
{
    return (votes_sequence){.n = n,
                            .base = number_below(from, 1000),
                            .rows = index_rows(from, n, s.n_kv_heads, s.dims),
                            .q = normals(from, (size_t)s.n_q_heads * s.dims)};
}

static kvk_cuda_select_vote_args prepare(votes_shape s, votes_sequence *seqs, uint32_t n_seqs,
                                         uint32_t k, uint32_t eps)
{
    kvk_cuda_candidates *cands = host_bytes(n_seqs * sizeof(*cands));
    size_t width = (size_t)s.n_q_heads * s.dims, row = kvk_index_row_bytes(s.n_kv_heads, s.dims);
    float *q = host_bytes(n_seqs * width * sizeof(float));
    uint32_t rows_max = 1;
    kvk_cuda_select_vote_args args = {.n_seqs = n_seqs,
                                      .n_q_heads = s.n_q_heads,
                                      .n_kv_heads = s.n_kv_heads,
                                      .dims = s.dims,
                                      .k = k,
                                      .eps = eps};

    for (uint32_t i = 0; i < n_seqs; i++) {
        void *index = seqs[i].n ? device_copy(seqs[i].rows, seqs[i].n * row) : NULL;
        cands[i] = (kvk_cuda_candidates){index, seqs[i].n, seqs[i].base};
        memcpy(q + i * width, seqs[i].q, width * sizeof(float));
        rows_max = seqs[i].n > rows_max ? seqs[i].n : rows_max;
    }
    args.rows_max = rows_max;
    args.q = device_copy(q, n_seqs * width * sizeof(float));
    args.cands = device_copy(cands, n_seqs * sizeof(*cands));
    args.picks = device_bytes((size_t)n_seqs * k * 4);
    args.scores = device_bytes((size_t)n_seqs * k * 4);
    args.n_picks = device_bytes(n_seqs * 4);
    args.workspace_bytes = kvk_cuda_select_vote_workspace_bytes(n_seqs, rows_max);
    args.workspace = device_bytes(args.workspace_bytes);
    OK(kvk_cuda_fill(gpu(), args.workspace, 0, args.workspace_bytes, gpu_stream()));
    return args;
}

/* Runs it; the answers go to the sequences. */
static void answer(const kvk_cuda_select_vote_args *args, votes_sequence *seqs)
{
    size_t all = (size_t)args->n_seqs * args->k;
    const uint32_t *n_picks, *picks;
    const float *scores;

    OK(kvk_cuda_fill(gpu(), args->picks, 0xee, all * 4, gpu_stream()));
    OK(kvk_cuda_select_vote_supports(gpu(), args));
    OK(kvk_cuda_select_vote(gpu(), args, gpu_stream()));
    n_picks = fetched(args->n_picks, args->n_seqs * 4);
    picks = fetched(args->picks, all * 4);
    scores = fetched(args->scores, all * 4);
    for (uint32_t i = 0; i < args->n_seqs; i++) {
        seqs[i].n_picks = n_picks[i];
        seqs[i].picks = picks + (size_t)i * args->k;
        seqs[i].scores = scores + (size_t)i * args->k;
    }
}

/* The oracle's votes, and the bound relative to a vote. */
static float *votes_of(votes_shape s, const votes_sequence *seq, double *bound_p)
{
    bool large = seq->n > 20000;
    float *logits = host_bytes((size_t)s.n_q_heads * seq->n * 4);
    float *max = host_bytes(s.n_q_heads * 4), *sum = host_bytes(s.n_q_heads * 4);
    float *out = host_bytes(seq->n * 4);
    double most = 0;

    for (uint32_t h = 0; h < s.n_q_heads; h++)
        max[h] = -INFINITY;
    CPU(large, score_index, seq->q, 1, s.n_q_heads, s.n_kv_heads, s.dims, seq->rows,
        kvk_index_row_bytes(s.n_kv_heads, s.dims), seq->n, logits, seq->n);
    CPU(large, softmax_stats, logits, seq->n, s.n_q_heads, seq->n, max, sum);
    CPU(large, vote, logits, seq->n, s.n_q_heads, seq->n, max, sum, out);
    for (size_t i = 0; i < (size_t)s.n_q_heads * seq->n; i++)
        most = fabs((double)logits[i]) > most ? fabs((double)logits[i]) : most;
    *bound_p = (4 * most + 64) * 0x1p-24 + (large ? (most + 100) * 2e-7 : 0x1p-23);
    return out;
}

/* The best vote within eps, in place. */
static void widen(const votes_sequence *seq, uint32_t eps, float *votes)
{
    float *in = host_bytes(seq->n * 4 + 4);
    uint32_t first = 0;

    memcpy(in, votes, seq->n * 4);
    for (uint32_t i = 0; i < seq->n; i++) {
        uint32_t here = seq->at ? seq->at[i] : i;
        while (here - (seq->at ? seq->at[first] : first) > eps)
            first++;
        for (uint32_t j = first; j < seq->n && (seq->at ? seq->at[j] : j) <= here + eps; j++)
            votes[i] = in[j] > votes[i] ? in[j] : votes[i];
    }
}

static int by_score(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

void votes_compare(votes_shape s, const votes_sequence *seq, uint32_t k, uint32_t eps,
                   const char *what)
{
    uint32_t room = k < seq->n ? k : seq->n, above = 0;
    double bound = 0, tiny = s.n_q_heads * 0x1p-120, kth = 0, slack = 0;
    float *votes = votes_of(s, seq, &bound), *sorted = host_bytes(seq->n * 4 + 4);
    uint8_t *picked = host_bytes(seq->n + 1);

    REQUIRE(seq->n_picks == room, "%s: %u picks, wanted %u", what, seq->n_picks, room);
    if (room == 0)
        return;
    widen(seq, eps, votes);
    memcpy(sorted, votes, seq->n * 4);
    qsort(sorted, seq->n, 4, by_score);
    kth = (double)sorted[room - 1];
    slack = 2 * (bound * kth + tiny);
    for (uint32_t i = 0; i < room; i++) {
        uint32_t row = seq->picks[i] - seq->base;
        REQUIRE(row < seq->n && !picked[row], "%s: pick %u is %u", what, i, seq->picks[i]);
        picked[row] = 1;
        REQUIRE(fabs((double)seq->scores[i] - (double)votes[row]) <=
                    bound * (double)votes[row] + tiny,
                "%s: %u rows, heads %u/%u of %u, k %u: vote of row %u is %.9g, wanted %.9g", what,
                seq->n, s.n_q_heads, s.n_kv_heads, s.dims, k, row, (double)seq->scores[i],
                (double)votes[row]);
        REQUIRE((double)votes[row] >= kth - slack, "%s: pick %u of vote %.9g, the k-th is %.9g",
                what, i, (double)votes[row], kth);
        REQUIRE(i == 0 || seq->scores[i - 1] > seq->scores[i] ||
                    (seq->scores[i - 1] == seq->scores[i] && seq->picks[i - 1] < seq->picks[i]),
                "%s: order at %u", what, i);
    }
    for (uint32_t j = 0; j < seq->n; j++)
        above += !picked[j] && (double)votes[j] > kth + slack;
    REQUIRE(above == 0, "%s: %u rows, heads %u/%u of %u, k %u: %u rows left out", what, seq->n,
            s.n_q_heads, s.n_kv_heads, s.dims, k, above);
}

static void run(votes_shape s, votes_sequence *seqs, uint32_t n_seqs, uint32_t k, uint32_t eps,
                const char *what)
{
    kvk_cuda_select_vote_args args = prepare(s, seqs, n_seqs, k, eps);

    for (int pass = 0; pass < 2; pass++) { /* the second finds the workspace as the first left it */
        answer(&args, seqs);
        for (uint32_t i = 0; i < n_seqs; i++)
            votes_compare(s, &seqs[i], k, eps, what);
    }
    release_all();
}

void cuda_case_vote_edges(numbers *from)
{
    votes_shape s = {32, 8, 32};
    votes_sequence seq = votes_sequence_of(from, 100, s);
    kvk_cuda_select_vote_args good = prepare(s, &seq, 1, 8, 0), args;

#define REFUSED(field, value)                                                                      \
    args = good;                                                                                   \
    args.field = value;                                                                            \
    REQUIRE(kvk_cuda_select_vote(gpu(), &args, gpu_stream()) == KVC_INVALID, #field)
    REFUSED(k, 0);
    REFUSED(k, KVK_CUDA_WIDE_MAX + 1);
    REFUSED(dims, 0);
    REFUSED(dims, 257);
    REFUSED(n_kv_heads, 0);
    REFUSED(n_kv_heads, 7);
    REFUSED(n_q_heads, 0);
    REFUSED(n_q_heads, 136);
    REFUSED(rows_max, 0);
    REFUSED(q, NULL);
    REFUSED(workspace_bytes, good.workspace_bytes - 1);
    REFUSED(n_seqs, KVK_CUDA_SEQS_MAX + 1);
#undef REFUSED
    args = good;
    args.n_seqs = 0;
    OK(kvk_cuda_select_vote(gpu(), &args, gpu_stream()));
}

/* Small enough for the slow tools: runs of several tiles a warp, of two sequences, the last cut.
 * Rows of 136 bytes come in an even number: the copy reads 8 of the last 16 bytes of an odd one,
 * and memcheck counts all. */
void cuda_case_vote_small(numbers *from)
{
    static const votes_shape shapes[] = {{32, 8, 32}, {28, 4, 32}, {32, 8, 16}};

    for (size_t h = 0; h < 3; h++) {
        votes_sequence seqs[] = {votes_sequence_of(from, 18, shapes[h]),
                                 votes_sequence_of(from, 700, shapes[h])};
        run(shapes[h], seqs, 2, 8, 0, "small votes");
    }
}

enum { BEHIND_K = 50, BEHIND_TIMES = 20 };

/* One of two frames that make the vote's query and how many rows it has. */
static kvk_cuda_frame_args frame_before(numbers *from, votes_shape s,
                                        const kvk_cuda_select_vote_args *vote, uint32_t n)
{
    enum { DIM = 128 };
    size_t width = (size_t)s.n_q_heads * DIM, proj = (size_t)s.n_kv_heads * DIM * s.dims;
    uint16_t *q = pinned_bytes(width * 2); /* over PCIe: the vote has time to begin too early */
    uint32_t *n_tokens = pinned_bytes(4);

    for (size_t i = 0; i < width; i++)
        q[i] = bf16_of(normal(from));
    *n_tokens = n + 1; /* of which one is near */
    return (kvk_cuda_frame_args){.n_seqs = 1,
                                 .n_q_heads = s.n_q_heads,
                                 .n_kv_heads = s.n_kv_heads,
                                 .head_dim = DIM,
                                 .dims = s.dims,
                                 .q = q,
                                 .dtype = KVK_BF16,
                                 .proj = device_copy(normals(from, proj), proj * 4),
                                 .q_index = (float *)(uintptr_t)vote->q,
                                 .n_tokens = n_tokens,
                                 .n_recent = 1,
                                 .n_near = device_bytes(4),
                                 .near_first = device_bytes(4),
                                 .cands = (kvk_cuda_candidates *)(uintptr_t)vote->cands,
                                 .per_head = 1};
}

/* A vote waits for the frame before it, which lets it begin: by turns behind one of two frames, it
 * finds what it finds when that is long done. */
void cuda_case_vote_behind(numbers *from)
{
    votes_shape s = {32, 8, 32};
    votes_sequence seq = votes_sequence_of(from, 3000, s);
    kvk_cuda_select_vote_args vote = prepare(s, &seq, 1, BEHIND_K, 0), args = vote;
    kvk_cuda_frame_args frames[] = {frame_before(from, s, &vote, 3000),
                                    frame_before(from, s, &vote, 500)};
    size_t bytes = BEHIND_K * 4;
    uint8_t *picks = device_bytes(BEHIND_TIMES * bytes), *scores = device_bytes(bytes);
    const uint8_t *want[2] = {NULL}, *got = NULL;
    kvk_cuda_graph *graph = NULL;

    for (uint32_t i = 0; i < 2; i++) {
        OK(kvk_cuda_frame(gpu(), &frames[i], gpu_stream()));
        gpu_sync();
        OK(kvk_cuda_select_vote(gpu(), &vote, gpu_stream()));
        want[i] = fetched(vote.picks, bytes);
    }
    REQUIRE(memcmp(want[0], want[1], bytes) != 0, "two frames of equal picks");
    args.scores = (float *)scores;
    OK(kvk_cuda_graph_begin(gpu(), gpu_stream())); /* one by one the frame would be done before */
    for (uint32_t i = 0; i < BEHIND_TIMES; i++) {
        args.picks = (uint32_t *)(picks + i * bytes);
        OK(kvk_cuda_frame(gpu(), &frames[i % 2], gpu_stream()));
        OK(kvk_cuda_select_vote(gpu(), &args, gpu_stream()));
    }
    OK(kvk_cuda_graph_end(gpu(), gpu_stream(), &graph));
    OK(kvk_cuda_graph_launch(gpu(), graph, gpu_stream()));
    got = fetched(picks, BEHIND_TIMES * bytes);
    for (uint32_t i = 0; i < BEHIND_TIMES; i++)
        REQUIRE(memcmp(got + i * bytes, want[i % 2], bytes) == 0,
                "vote %u has the picks of another frame", i);
    kvk_cuda_graph_destroy(gpu(), graph);
    release_all();
}

void cuda_case_vote(numbers *from)
{
    static const votes_shape shapes[] = {{32, 8, 32},  {28, 4, 32}, {8, 8, 32}, {16, 4, 32},
                                         {32, 8, 16},  {24, 8, 16}, {9, 3, 24}, {14, 2, 32},
                                         {32, 8, 126}, {1, 1, 1}};
    static const uint32_t sizes[] = {0, 1, 15, 17, 128, 129, 2500, 8193, 30011};
    static const uint32_t ks[] = {1, 300, 2048};

    for (size_t h = 0; h < sizeof(shapes) / sizeof(shapes[0]); h++) {
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            for (size_t k = 0; k < 3; k++) {
                votes_sequence seq = votes_sequence_of(from, sizes[i], shapes[h]);
                run(shapes[h], &seq, 1, ks[k], 0, "vote");
            }
        }
    }
}

void votes_spoil(numbers *from, votes_sequence *seq, votes_shape s, int kind)
{
    size_t row = kvk_index_row_bytes(s.n_kv_heads, s.dims), keys = (size_t)s.n_kv_heads * s.dims;

    for (uint32_t j = 0; j < seq->n; j++) {
        float scale = kind == 2   ? 1e-7f * (float)(j + 1)
                      : kind == 3 ? (j - 5000 < 90 ? 0.5f : 0.01f)
                      : kind == 4 ? 0.05f
                      : kind == 6 ? 1e-4f
                                  : 0.01f;
        uint16_t bits = bf16_of(scale);
        if (kind == 0 || kind == 1)
            memset(seq->rows + j * row, kind ? (int)number_below(from, 4) : 3, keys);
        for (uint32_t h = 0; kind != 5 && h < s.n_kv_heads; h++)
            memcpy(seq->rows + j * row + keys + 2 * h, &bits, 2);
    }
    for (size_t i = 0; kind == 5 && i < (size_t)s.n_q_heads * s.dims; i++)
        seq->q[i] = 0;
}

void cuda_case_vote_ties(numbers *from)
{
    static const votes_shape shapes[] = {{32, 8, 32}, {9, 3, 24}, {32, 8, 16}};

    for (int kind = 0; kind < VOTES_SPOILED; kind++) {
        for (size_t h = 0; h < 3; h++) {
            for (uint32_t n = 9000; n <= 150001; n += 141001) {
                votes_sequence seq = votes_sequence_of(from, h == 1 ? n / 10 : n, shapes[h]);
                votes_spoil(from, &seq, shapes[h], kind);
                run(shapes[h], &seq, 1, 2048, 0, "votes of a kind");
            }
        }
    }
}

/* Equal bits alone and in a batch; scales that are not finite stay within the picks' range. */
void cuda_case_vote_batch(numbers *from)
{
    enum { SEQS = 7, K = 500 };
    votes_shape s = {32, 8, 32};
    votes_sequence seqs[SEQS], alone[SEQS];
    kvk_cuda_select_vote_args args;

    for (uint32_t i = 0; i < SEQS; i++) {
        seqs[i] = votes_sequence_of(from, i == 2 ? 0 : number_below(from, 60000), s);
        if (i == 4)
            votes_spoil(from, &seqs[i], s, 3);
        alone[i] = seqs[i];
    }
    args = prepare(s, seqs, SEQS, K, 0);
    answer(&args, seqs);
    for (uint32_t i = 0; i < SEQS; i++) {
        args = prepare(s, &alone[i], 1, K, 0);
        answer(&args, &alone[i]);
        votes_compare(s, &seqs[i], K, 0, "batch");
        REQUIRE(memcmp(seqs[i].picks, alone[i].picks, seqs[i].n_picks * 4) == 0 &&
                    memcmp(seqs[i].scores, alone[i].scores, seqs[i].n_picks * 4) == 0,
                "sequence %u: other bits alone than in a batch", i);
    }
    for (uint32_t j = 0; j < seqs[0].n; j++) {
        static const uint16_t special[] = {0x7f80, 0x7fc0, 0xff80, 0x3c00};
        memcpy(seqs[0].rows + j * 272 + 256, &special[number_below(from, 4)], 2);
    }
    for (int pass = 0; pass < 2; pass++) {
        args = prepare(s, seqs, 1, K, 0);
        answer(&args, seqs);
        REQUIRE(seqs[0].n_picks == (seqs[0].n < K ? seqs[0].n : K), "picks of what is not finite");
        for (uint32_t i = 0; i < seqs[0].n_picks; i++)
            REQUIRE(seqs[0].picks[i] - seqs[0].base < seqs[0].n, "pick %u is out of range", i);
    }
}

void cuda_case_vote_large(numbers *from)
{
    static const votes_shape shapes[] = {{32, 8, 32}, {28, 4, 32}, {32, 8, 16}};

    for (size_t h = 0; h < 3; h++) {
        votes_sequence seq = votes_sequence_of(from, 1000003, shapes[h]);
        run(shapes[h], &seq, 1, 2048, 0, "large");
    }
}

/* The best within a window: of plain votes, and of those that fool a bound. */
void cuda_case_vote_window(numbers *from)
{
    static const votes_shape shapes[] = {{32, 8, 32}, {9, 3, 24}};
    static const uint32_t sizes[] = {0, 1, 17, 700, 8193, 30011}, reach[] = {1, 5, 40};

    for (size_t h = 0; h < 2; h++) {
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            for (size_t e = 0; e < 3; e++) {
                votes_sequence seq = votes_sequence_of(from, sizes[i], shapes[h]);
                run(shapes[h], &seq, 1, 600, reach[e], "vote within a window");
            }
        }
        for (int kind = 0; kind < VOTES_SPOILED; kind++) {
            votes_sequence seq = votes_sequence_of(from, 9000, shapes[h]);
            votes_spoil(from, &seq, shapes[h], kind);
            run(shapes[h], &seq, 1, 2048, 3, "votes of a kind within a window");
        }
    }
}

/* More picks than attention takes, as re-ranking wants them. */
void cuda_case_vote_wide(numbers *from)
{
    static const votes_shape shapes[] = {{32, 8, 16}, {9, 3, 24}};
    static const uint32_t ks[] = {8192, KVK_CUDA_WIDE_MAX, 8192};

    for (size_t h = 0; h < 2; h++) {
        for (uint32_t n = 5000; n <= 95000; n += 45000) {
            for (size_t i = 0; i < 3; i++) {
                votes_sequence seq = votes_sequence_of(from, n, shapes[h]);
                if (i == 2)
                    votes_spoil(from, &seq, shapes[h], h ? 0 : 6);
                run(shapes[h], &seq, 1, ks[i], 0, i == 2 ? "many votes of a kind" : "many votes");
            }
        }
    }
}
