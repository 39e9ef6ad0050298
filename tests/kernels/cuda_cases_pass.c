/*
 * cuda_cases_pass.c: what a pass of several tokens is made of, against the table's ops: queries at
 * their positions, rows into a ring, what is not finite, and the selection of a chunk (score_index,
 * row_max, chunk_fold, window_max, topk).
 */
#include <math.h>
#include <string.h>

#include "cuda_cases.h"
#include "kvk/cuda_pass.h"

static void run_rope(numbers *from, uint32_t n, uint32_t heads, uint32_t dim, bool rotated,
                     uint32_t first, uint32_t step)
{
    size_t len = (size_t)n * heads * dim;
    uint16_t *in = host_bytes(len * 2);
    int32_t *positions = host_bytes(n * 4);
    float *want = host_bytes(len * 4);
    double inv_freq[128];
    kvk_rope_params rope = {.theta = 500000};
    kvk_rows rows = {in, (size_t)heads * dim * 2, KVK_BF16};

    for (size_t i = 0; i < len; i++)
        in[i] = bf16_of(normal(from));
    for (uint32_t i = 0; i < n; i++)
        positions[i] = (int32_t)(first + i * step);
    OK(kvk_rope_inv_freq(&rope, dim, inv_freq));
    const kvk_cuda_rope_args a = {
        .in = device_copy(in, len * 2),
        .n = n,
        .n_heads = heads,
        .head_dim = dim,
        .inv_freq = rotated ? device_copy(inv_freq, dim / 2 * sizeof(double)) : NULL,
        .first = first,
        .step = step,
        .out = device_bytes(len * 4)};
    OK(kvk_cuda_rope(gpu(), &a, gpu_stream()));
    CPU(true, rope, rows, n, heads, dim, rotated ? inv_freq : NULL, positions, 0, want);
    const float *out = fetched(a.out, len * 4);
    for (size_t i = 0; i < len; i++)
        REQUIRE(fabs((double)out[i] - (double)want[i]) <= 0x1p-21 * 8,
                "%u tokens from %u by %u: element %zu is %.9g, wanted %.9g", n, first, step, i,
                (double)out[i], (double)want[i]);
    release_all();
}

void cuda_case_rope(numbers *from)
{
    kvk_cuda_rope_args bad = {.n = 0, .n_heads = 1, .head_dim = 64};

    run_rope(from, 512, 32, 128, true, 4096, 0);
    run_rope(from, 512, 32, 128, true, 1000000, 1);
    run_rope(from, 7, 9, 64, true, 0, 1);
    run_rope(from, 1, 3, 256, true, 77, 1);
    run_rope(from, 33, 2, 64, false, 1000, 1);
    OK(kvk_cuda_rope(gpu(), &bad, gpu_stream()));
    bad.head_dim = 258;
    REQUIRE(kvk_cuda_rope(gpu(), &bad, gpu_stream()) == KVC_INVALID, "258 dims");
    bad.head_dim = 64;
    bad.step = 2;
    REQUIRE(kvk_cuda_rope(gpu(), &bad, gpu_stream()) == KVC_INVALID, "step 2");
}

static void run_rows(numbers *from, uint32_t n, uint32_t slice, uint32_t ring_rows, uint32_t first,
                     bool copied)
{
    size_t row = 2 * (size_t)slice;
    uint8_t *k = host_bytes((size_t)n * slice), *v = host_bytes((size_t)n * slice);
    uint8_t *want = host_bytes(ring_rows * row);
    uint8_t *copy = copied ? pinned_bytes(n * row) : NULL;

    for (size_t i = 0; i < (size_t)n * slice; i++) {
        k[i] = (uint8_t)number(from);
        v[i] = (uint8_t)number(from);
    }
    const kvk_cuda_rows_args a = {.k = device_copy(k, (size_t)n * slice),
                                  .v = device_copy(v, (size_t)n * slice),
                                  .n = n,
                                  .slice_bytes = slice,
                                  .ring = device_bytes(ring_rows * row),
                                  .first = first,
                                  .ring_rows = ring_rows,
                                  .copy = copy};
    memset(want, 0xee, ring_rows * row);
    for (uint32_t i = 0; i < n; i++) {
        memcpy(want + (first + i) % ring_rows * row, k + (size_t)i * slice, slice);
        memcpy(want + (first + i) % ring_rows * row + slice, v + (size_t)i * slice, slice);
    }
    OK(kvk_cuda_rows(gpu(), &a, gpu_stream()));
    REQUIRE(memcmp(fetched(a.ring, ring_rows * row), want, ring_rows * row) == 0,
            "%u rows of %zu from %u: the ring has other bytes", n, row, first);
    for (uint32_t i = 0; copied && i < n; i++)
        REQUIRE(memcmp(copy + i * row, want + (first + i) % ring_rows * row, row) == 0,
                "%u rows of %zu from %u: row %u of the copy", n, row, first, i);
    release_all();
}

void cuda_case_rows(numbers *from)
{
    kvk_cuda_rows_args bad = {.n = 5, .slice_bytes = 64, .ring_rows = 4};

    run_rows(from, 512, 2048, 700, 300, true);
    run_rows(from, 3, 384, 3, 1000001, true);
    run_rows(from, 1, 16, 9, 8, false);
    run_rows(from, 64, 1024, 64, 0, false);
    REQUIRE(kvk_cuda_rows(gpu(), &bad, gpu_stream()) == KVC_INVALID, "more than the ring");
    bad.n = 0;
    OK(kvk_cuda_rows(gpu(), &bad, gpu_stream()));
}

/* One number of n that is not finite is found wherever it lies; the largest that is, is not. */
void cuda_case_finite(numbers *from)
{
    static const uint32_t lengths[] = {8, 264, 512 * 1024, 4 << 20};
    static const uint16_t not_finite[] = {0x7f80, 0xff80, 0x7fc1, 0xffff};
    kvk_cuda_finite_args a = {.len_bytes = 0};

    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        uint32_t n = lengths[i], places[] = {0, n - 1, number_below(from, n)};
        uint16_t *x = host_bytes(n * sizeof(*x));
        for (uint32_t j = 0; j < n; j++)
            x[j] = j % 3 == 0 ? 0xff7f : bf16_of(normal(from));
        a.bad = pinned_bytes(sizeof(*a.bad));
        a.in = device_copy(x, n * sizeof(*x));
        a.len_bytes = n * sizeof(*x);
        for (uint32_t j = 0; j < 4; j++) {
            *a.bad = 0;
            if (j != 0)
                upload((void *)(uintptr_t)((const uint16_t *)a.in + places[j - 1]),
                       &not_finite[(i + j) % 4], sizeof(*x));
            OK(kvk_cuda_finite(gpu(), &a, gpu_stream()));
            gpu_sync();
            REQUIRE(*a.bad == (j != 0), "%u numbers, place %u: bad %u", n, j, *a.bad);
            if (j != 0)
                upload((void *)(uintptr_t)((const uint16_t *)a.in + places[j - 1]),
                       x + places[j - 1], sizeof(*x));
        }
        release_all();
    }
    a = (kvk_cuda_finite_args){.len_bytes = 0};
    OK(kvk_cuda_finite(gpu(), &a, gpu_stream()));
    a.len_bytes = 24;
    REQUIRE(kvk_cuda_finite(gpu(), &a, gpu_stream()) == KVC_INVALID, "24 bytes");
}

/* ---- the selection of a chunk ---- */

typedef struct chunk_case {
    uint32_t n, n_q, dims, k, eps;
    int spoilt; /* 1: few different rows; 2: all alike; 3: NaN, Inf and zero scales */
} chunk_case;

static uint8_t *candidate_rows(numbers *from, const chunk_case *is)
{
    static const uint16_t special[] = {0, 0x7f80, 0x7fc0, 0x0001, 0x3f80};
    size_t row = kvk_index_row_bytes(1, is->dims);
    uint8_t *rows = index_rows(from, is->n, 1, is->dims);

    for (uint32_t j = 0; is->spoilt && j < is->n; j++) {
        uint16_t scale = is->spoilt == 3 ? special[number_below(from, 5)] : bf16_of(0.01f);
        if (is->spoilt != 3)
            memset(rows + j * row, is->spoilt == 1 ? (int)number_below(from, 4) : 3, is->dims);
        memcpy(rows + j * row + is->dims, &scale, 2);
    }
    return rows;
}

/* The chunk's scores as the table makes them. */
static float *folded_scores(const chunk_case *is, const uint8_t *rows, const float *q)
{
    size_t len = (size_t)is->n_q * is->n;
    bool large = len > 20000;
    float *plane = host_bytes(len * 4), *most = host_bytes(is->n_q * 4);
    float *out = host_bytes(is->n * 4), *wide = host_bytes(is->n * 4);

    for (uint32_t i = 0; i < is->n_q; i++)
        most[i] = -INFINITY;
    for (uint32_t j = 0; j < is->n; j++)
        out[j] = -INFINITY;
    CPU(large, score_index, q, is->n_q, 1, 1, is->dims, rows, kvk_index_row_bytes(1, is->dims),
        is->n, plane, is->n);
    CPU(large, row_max, plane, is->n, is->n_q, is->n, most);
    CPU(large, chunk_fold, plane, is->n, is->n_q, is->n, most, out);
    if (is->eps == 0)
        return out;
    CPU(large, window_max, out, is->n, is->eps, wide);
    return wide;
}

static void compare_picks(const chunk_case *is, const kvk_cuda_select_many_args *a,
                          const float *scores, uint32_t base)
{
    uint32_t room = is->k < is->n ? is->k : is->n, want_n = 0;
    uint32_t *want = host_bytes((room + 1) * 4);
    size_t bytes = kvk_topk_workspace_bytes(is->n, is->k);
    const uint32_t *picks = fetched(a->picks, is->k * 4);
    const float *got = fetched(a->scores, is->k * 4);

    CPU(is->n > 20000, topk, scores, is->n, is->k, base, want, NULL, &want_n, host_bytes(bytes),
        bytes);
    REQUIRE(*(const uint32_t *)fetched(a->n_picks, 4) == room && want_n == room, "%u picks", room);
    for (uint32_t i = 0; i < room; i++) {
        float score = scores[want[i] - base];
        REQUIRE(picks[i] == want[i],
                "%u queries, %u rows, %u dims, k %u, eps %u, spoilt %d: pick %u is %u, wanted %u",
                is->n_q, is->n, is->dims, is->k, is->eps, is->spoilt, i, picks[i], want[i]);
        REQUIRE(got[i] == score || (isnan(got[i]) && isnan(score)),
                "%u queries, %u rows: score %u is %.9g, wanted %.9g", is->n_q, is->n, i,
                (double)got[i], (double)score);
    }
}

static void run_many(numbers *from, const chunk_case *is)
{
    size_t row = kvk_index_row_bytes(1, is->dims);
    uint32_t base = number_below(from, 1000);
    uint8_t *rows = candidate_rows(from, is);
    float *q = normals(from, (size_t)is->n_q * is->dims);
    const kvk_cuda_candidates cands = {is->n ? device_copy(rows, is->n * row) : NULL, is->n, base};
    const float *scores = folded_scores(is, rows, q);
    kvk_cuda_select_many_args a = {.n_q = is->n_q,
                                   .dims = is->dims,
                                   .k = is->k,
                                   .eps = is->eps,
                                   .rows_max = is->n + 1,
                                   .q = device_copy(q, (size_t)is->n_q * is->dims * 4),
                                   .cands = device_copy(&cands, sizeof(cands)),
                                   .picks = device_bytes(is->k * 4),
                                   .scores = device_bytes(is->k * 4),
                                   .n_picks = device_bytes(4)};

    a.workspace_bytes = kvk_cuda_select_many_workspace_bytes(&a);
    a.workspace = device_bytes(a.workspace_bytes);
    OK(kvk_cuda_fill(gpu(), a.workspace, 0, a.workspace_bytes, gpu_stream()));
    for (int pass = 0; pass < 2; pass++) { /* the second finds the workspace as the first left it */
        OK(kvk_cuda_select_many(gpu(), &a, gpu_stream()));
        compare_picks(is, &a, scores, base);
    }
    release_all();
}

void cuda_case_select_many(numbers *from)
{
    static const chunk_case cases[] = {
        {40000, 512, 126, 2048, 0, 0}, {40000, 512, 22, 2048, 1, 0}, {30011, 100, 62, 512, 3, 0},
        {20000, 33, 256, 1000, 0, 0},  {9000, 700, 126, 64, 0, 0},   {9000, 300, 200, 64, 0, 0},
        {63, 512, 24, 10, 0, 0},       {64, 1, 30, 64, 2, 0},        {65, 2, 1, 100, 0, 0},
        {1, 5, 126, 3, 0, 0},          {0, 5, 126, 3, 0, 0},         {33000, 512, 31, 4096, 0, 0},
        {12000, 64, 126, 2048, 0, 1},  {12000, 64, 126, 2048, 0, 2}, {12000, 64, 126, 2048, 2, 2},
        {9000, 40, 126, 1000, 0, 3},   {9000, 40, 61, 1000, 1, 3},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        run_many(from, &cases[i]);
}

void cuda_case_many_edges(numbers *from)
{
    kvk_cuda_candidates *cands = device_bytes(sizeof(*cands));
    float *q = device_copy(normals(from, 8 * 126), 8 * 126 * 4);
    kvk_cuda_select_many_args good = {.n_q = 8,
                                      .dims = 126,
                                      .k = 4,
                                      .rows_max = 100,
                                      .q = q,
                                      .cands = cands,
                                      .picks = device_bytes(16),
                                      .n_picks = device_bytes(4)};
    kvk_cuda_select_many_args args;

    good.workspace_bytes = kvk_cuda_select_many_workspace_bytes(&good);
    good.workspace = device_bytes(good.workspace_bytes);
#define REFUSED(field, value)                                                                      \
    args = good;                                                                                   \
    args.field = value;                                                                            \
    REQUIRE(kvk_cuda_select_many(gpu(), &args, gpu_stream()) == KVC_INVALID, #field)
    REFUSED(k, 0);
    REFUSED(k, KVK_CUDA_K_MAX + 1);
    REFUSED(dims, 257);
    REFUSED(n_q, 0);
    REFUSED(n_q, KVK_CUDA_CHUNK_MAX + 1);
    REFUSED(rows_max, 0);
    REFUSED(cands, NULL);
    REFUSED(workspace_bytes, good.workspace_bytes - 1);
#undef REFUSED
}
