/* cuda_cases_select.c: kvk_cuda_select against score_index, window_max and topk of the CPU. */
#include <math.h>
#include <string.h>

#include "cuda_cases.h"
#include "kvk/cuda_frame.h"

/* One sequence of a batch, with its own length. */
typedef struct sequence {
    uint32_t n, base;
    uint8_t *rows;
    float *q;
} sequence;

typedef struct batch {
    uint32_t n_seqs, dims, k, eps, rows_max;
    const sequence *seqs;
    kvk_cuda_select_args args;
} batch;

static sequence sequence_of(numbers *from, uint32_t n, uint32_t dims)
{
    return (sequence){n, number_below(from, 1000), index_rows(from, n, 1, dims),
                      normals(from, dims)};
}

/* Device side of a batch; the workspace is cleared once. */
static void prepare(batch *b)
{
    kvk_cuda_candidates *cands = host_bytes(b->n_seqs * sizeof(*cands));
    float *q = host_bytes((size_t)b->n_seqs * b->dims * sizeof(float));
    size_t row = kvk_index_row_bytes(1, b->dims);
    size_t bytes = kvk_cuda_select_workspace_bytes(b->n_seqs, b->rows_max);
    void *workspace = device_bytes(bytes);

    for (uint32_t s = 0; s < b->n_seqs; s++) {
        const sequence *seq = &b->seqs[s];
        void *index = seq->n ? device_copy(seq->rows, seq->n * row) : NULL;
        cands[s] = (kvk_cuda_candidates){index, seq->n, seq->base};
        memcpy(q + (size_t)s * b->dims, seq->q, b->dims * sizeof(float));
    }
    OK(kvk_cuda_fill(gpu(), workspace, 0, bytes, gpu_stream()));
    b->args =
        (kvk_cuda_select_args){.n_seqs = b->n_seqs,
                               .dims = b->dims,
                               .k = b->k,
                               .eps = b->eps,
                               .rows_max = b->rows_max,
                               .q = device_copy(q, (size_t)b->n_seqs * b->dims * sizeof(float)),
                               .cands = device_copy(cands, b->n_seqs * sizeof(*cands)),
                               .picks = device_bytes((size_t)b->n_seqs * b->k * 4),
                               .scores = device_bytes((size_t)b->n_seqs * b->k * 4),
                               .n_picks = device_bytes(b->n_seqs * 4),
                               .workspace = workspace,
                               .workspace_bytes = bytes};
}

/* Scores as the CPU makes them. */
static float *scores_of(const batch *b, const sequence *seq)
{
    bool large = seq->n > 20000;
    float *raw = host_bytes(seq->n * sizeof(float)), *out = raw;

    CPU(large, score_index, seq->q, 1, 1, 1, b->dims, seq->rows, kvk_index_row_bytes(1, b->dims),
        seq->n, raw, seq->n);
    if (b->eps) {
        out = host_bytes(seq->n * sizeof(float));
        CPU(large, window_max, raw, seq->n, b->eps, out);
    }
    return out;
}

static void compare(const batch *b, const char *what)
{
    const uint32_t *n_picks = fetched(b->args.n_picks, b->n_seqs * 4);
    const uint32_t *picks = fetched(b->args.picks, (size_t)b->n_seqs * b->k * 4);
    const float *scores = fetched(b->args.scores, (size_t)b->n_seqs * b->k * 4);

    for (uint32_t s = 0; s < b->n_seqs; s++) {
        const sequence *seq = &b->seqs[s];
        uint32_t want_n = 0, room = b->k < seq->n ? b->k : seq->n;
        float *want_scores = scores_of(b, seq);
        uint32_t *want = host_bytes((room + 1) * sizeof(*want));
        size_t bytes = kvk_topk_workspace_bytes(seq->n, b->k);
        CPU(seq->n > 20000, topk, want_scores, seq->n, b->k, seq->base, want, NULL, &want_n,
            host_bytes(bytes), bytes);
        REQUIRE(n_picks[s] == room && want_n == room, "%s: seq %u has %u picks, wanted %u", what, s,
                n_picks[s], room);
        for (uint32_t i = 0; i < room; i++) {
            float got = scores[(size_t)s * b->k + i], score = want_scores[want[i] - seq->base];
            REQUIRE(picks[(size_t)s * b->k + i] == want[i],
                    "%s: seq %u of %u rows, k %u, eps %u, dims %u: pick %u is %u, wanted %u", what,
                    s, seq->n, b->k, b->eps, b->dims, i, picks[(size_t)s * b->k + i], want[i]);
            REQUIRE(got == score || (isnan(got) && isnan(score)),
                    "%s: seq %u: score %u is %.9g, wanted %.9g", what, s, i, (double)got,
                    (double)score);
        }
    }
}

static void run(batch *b, const char *what)
{
    for (uint32_t s = 0; s < b->n_seqs; s++)
        b->rows_max = b->seqs[s].n > b->rows_max ? b->seqs[s].n : b->rows_max;
    b->rows_max = b->rows_max ? b->rows_max : 1;
    prepare(b);
    for (int pass = 0; pass < 2; pass++) { /* the second finds the workspace as the first left it */
        OK(kvk_cuda_fill(gpu(), b->args.picks, 0xee, (size_t)b->n_seqs * b->k * 4, gpu_stream()));
        OK(kvk_cuda_select(gpu(), &b->args, gpu_stream()));
        compare(b, what);
    }
    release_all();
}

static void run_one(numbers *from, uint32_t n, uint32_t dims, uint32_t k, uint32_t eps)
{
    sequence seq = sequence_of(from, n, dims);
    batch b = {.n_seqs = 1, .dims = dims, .k = k, .eps = eps, .seqs = &seq};

    run(&b, "select");
}

void cuda_case_edges(numbers *from)
{
    sequence seq = sequence_of(from, 100, 126);
    batch b = {.n_seqs = 1, .dims = 126, .k = 8, .rows_max = 100, .seqs = &seq};
    kvk_cuda_select_args args;
    kvk_cuda *none = NULL;

    prepare(&b);
#define REFUSED(field, value)                                                                      \
    args = b.args;                                                                                 \
    args.field = value;                                                                            \
    REQUIRE(kvk_cuda_select(gpu(), &args, gpu_stream()) == KVC_INVALID, #field)
    REFUSED(k, 0);
    REFUSED(k, KVK_CUDA_K_MAX + 1);
    REFUSED(dims, 0);
    REFUSED(dims, 257);
    REFUSED(rows_max, 0);
    REFUSED(picks, NULL);
    REFUSED(workspace_bytes, b.args.workspace_bytes - 1);
    REFUSED(n_seqs, KVK_CUDA_SEQS_MAX + 1);
#undef REFUSED
    args = b.args;
    args.n_seqs = 0;
    OK(kvk_cuda_select(gpu(), &args, gpu_stream()));
    REQUIRE(kvk_cuda_open(1000, &none) == KVC_UNSUPPORTED && !none, "a device that is not there");
}

/* Small enough for the slow tools, and more rows than an H200's rings take at once. */
void cuda_case_select_small(numbers *from)
{
    static const uint32_t widths[] = {126, 62};

    for (size_t w = 0; w < 2; w++) {
        sequence seqs[] = {sequence_of(from, 17, widths[w]), sequence_of(from, 150001, widths[w])};
        batch both = {.n_seqs = 2, .dims = widths[w], .k = 8, .seqs = seqs};
        run(&both, "small");
        run_one(from, 700, widths[w], 8, 0);
    }
}

void cuda_case_select(numbers *from)
{
    static const uint32_t sizes[] = {0, 1, 2, 31, 32, 33, 100, 4095, 8192, 8193, 20011, 70001};
    static const uint32_t widths[] = {126, 62, 24, 66, 1, 256};
    static const uint32_t ks[] = {1, 5, 2048, 4096};

    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        for (size_t w = 0; w < sizeof(widths) / sizeof(widths[0]); w++) {
            for (size_t k = 0; k < 4; k++)
                run_one(from, sizes[i], widths[w], ks[k], 0);
        }
    }
}

/* What fools a sample: equal scores, few values, sorted, one hot region, scales 0, Inf and NaN, and
 * every other group of 32 rows far better, which are those that an H200 samples. */
static void spoil(numbers *from, sequence *seq, uint32_t dims, int kind)
{
    static const uint16_t special[] = {0, 0x7f80, 0x7fc0, 0x0001, 0x3f80};
    size_t row = kvk_index_row_bytes(1, dims);

    for (uint32_t j = 0; j < seq->n; j++) {
        uint8_t *at = seq->rows + j * row;
        uint16_t scale = bf16_of(kind == 2                    ? 1e-6f * (float)(j + 1)
                                 : kind == 3 && j - 5000 < 99 ? 1.0f
                                                              : 0.01f);
        if (kind == 4)
            scale = special[number_below(from, 5)];
        if (kind == 5)
            scale = bf16_of(j / 32 % 2 ? 1e-4f : 0.01f);
        if (kind == 0 || kind == 2)
            memset(at, 3, dims);
        if (kind == 1)
            memset(at, (int)number_below(from, 4), dims);
        memcpy(at + dims, &scale, 2);
    }
    for (uint32_t i = 0; i < dims; i++)
        seq->q[i] = kind == 3 || kind == 5 ? seq->q[i] : fabsf(seq->q[i]);
}

void cuda_case_select_ties(numbers *from)
{
    static const uint32_t sizes[] = {100, 9000, 150001};

    for (int kind = 0; kind < 6; kind++) {
        for (size_t i = 0; i < 3; i++) {
            for (uint32_t eps = 0; eps < 3; eps += 2) {
                sequence seq = sequence_of(from, sizes[i], 126);
                batch b = {.n_seqs = 1, .dims = 126, .k = 2048, .eps = eps, .seqs = &seq};
                spoil(from, &seq, 126, kind);
                run(&b, "ties");
            }
        }
    }
}

void cuda_case_select_batch(numbers *from)
{
    sequence seqs[40];

    for (uint32_t n_seqs = 2; n_seqs <= 40; n_seqs += 19) {
        for (uint32_t dims = 24; dims <= 126; dims += 51) {
            batch b = {.n_seqs = n_seqs, .dims = dims, .k = 300, .seqs = seqs};
            for (uint32_t s = 0; s < n_seqs; s++)
                seqs[s] = sequence_of(from, s % 5 == 1 ? 0 : number_below(from, 40000), dims);
            if (dims == 126)
                spoil(from, &seqs[n_seqs - 1], dims, 0);
            run(&b, "batch");
        }
    }
}

void cuda_case_select_window(numbers *from)
{
    static const uint32_t sizes[] = {1, 7, 2000, 50021};
    static const uint32_t windows[] = {1, 3, 40};

    for (size_t i = 0; i < 4; i++) {
        for (size_t e = 0; e < 3; e++)
            run_one(from, sizes[i], 126, 2048, windows[e]);
    }
}

/* Rows that are not all different: what they are does not matter here. */
static sequence many_rows(numbers *from, uint32_t n, uint32_t dims)
{
    size_t row = kvk_index_row_bytes(1, dims);
    sequence seq = {n, 0, host_bytes(n * row), normals(from, dims)};
    const uint8_t *some = index_rows(from, 1000, 1, dims);

    for (uint32_t i = 0; i < n; i++) {
        memcpy(seq.rows + i * row, some + i % 1000 * row, row);
        seq.rows[i * row + i % dims] ^= (uint8_t)(i / 1000);
    }
    return seq;
}

/* Behind a frame that finds how many rows there are, which were fewer or more before: the same as
 * from a launch that begins after it. */
static void run_early(numbers *from, uint32_t dims, uint32_t most, const uint32_t *n, size_t n_n)
{
    sequence seq = many_rows(from, most, dims);
    batch b = {.n_seqs = 1, .dims = dims, .k = 2048, .rows_max = most, .seqs = &seq};
    uint32_t *n_tokens = pinned_bytes(4);
    const uint32_t *picks = NULL, *n_picks = NULL;
    const kvk_cuda_frame_args frame = {.n_seqs = 1,
                                       .n_q_heads = 1,
                                       .n_kv_heads = 1,
                                       .head_dim = 8,
                                       .dims = dims,
                                       .q = device_bytes(16),
                                       .dtype = KVK_BF16,
                                       .n_tokens = n_tokens,
                                       .n_recent = 1,
                                       .n_near = device_bytes(4),
                                       .near_first = device_bytes(4)};
    kvk_cuda_frame_args a = frame;

    kvk_cuda_graph *graph = NULL;

    prepare(&b);
    a.cands = (kvk_cuda_candidates *)(uintptr_t)b.args.cands;
    b.args.early = 1;
    gpu_sync();
    OK(kvk_cuda_graph_begin(gpu(), gpu_stream())); /* one by one the frame would be done before */
    OK(kvk_cuda_frame(gpu(), &a, gpu_stream()));
    OK(kvk_cuda_select(gpu(), &b.args, gpu_stream()));
    OK(kvk_cuda_graph_end(gpu(), gpu_stream(), &graph));
    for (size_t i = 0; i < n_n; i++) {
        *n_tokens = n[i] + 2; /* of which two are near */
        OK(kvk_cuda_graph_launch(gpu(), graph, gpu_stream()));
        picks = fetched(b.args.picks, b.k * 4);
        n_picks = fetched(b.args.n_picks, 4);
        b.args.early = 0; /* the graph has its own */
        OK(kvk_cuda_fill(gpu(), b.args.picks, 0xee, b.k * 4, gpu_stream()));
        OK(kvk_cuda_select(gpu(), &b.args, gpu_stream()));
        const uint32_t *want = fetched(b.args.picks, b.k * 4);
        uint32_t room = n[i] < b.k ? n[i] : b.k;
        REQUIRE(*n_picks == room && *(const uint32_t *)fetched(b.args.n_picks, 4) == room &&
                    memcmp(picks, want, room * 4) == 0,
                "early: %u rows of %u dims, %u picks", n[i], dims, *n_picks);
    }
    kvk_cuda_graph_destroy(gpu(), graph);
    release_all();
}

void cuda_case_select_early(numbers *from)
{
    /* from each to the next, warps begin with other groups, or with the same */
    static const uint32_t some[] = {20000, 70000,  20000,  20001, 20033, 140000, 70000,
                                    9000,  140000, 139000, 30,    0,     140000, 20000};
    static const uint32_t many[] = {860000, 860000, 860001, 860031, 860063,
                                    600000, 860000, 899900, 500,    860000};

    run_early(from, 126, 150000, some, sizeof(some) / sizeof(some[0]));
    run_early(from, 62, 150000, some, sizeof(some) / sizeof(some[0]));
    run_early(from, 24, 150000, some, sizeof(some) / sizeof(some[0]));
    run_early(from, 126, 900000, many, sizeof(many) / sizeof(many[0]));
}

void cuda_case_early_small(numbers *from)
{
    static const uint32_t some[] = {20000, 9000, 20001, 30, 20000, 20000};

    run_early(from, 126, 20100, some, sizeof(some) / sizeof(some[0]));
    run_early(from, 62, 20100, some, sizeof(some) / sizeof(some[0]));
}

void cuda_case_select_large(numbers *from)
{
    run_one(from, 1000003, 126, 2048, 0);
    run_one(from, 1 << 20, 62, 2048, 0);
    run_one(from, 1 << 20, 126, 2048, 3);
    run_one(from, 4 << 20, 126, 4096, 0);
    run_one(from, 1 << 24, 62, 2048, 0);
}
