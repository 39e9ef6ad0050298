/*
 * cuda_cases_chunks.c: selection of chunks by landmarks, and their weights, on the device against
 * the CPU's ops.
 */
#include <math.h>
#include <string.h>

#include "cuda_cases.h"

/* ---- selection ---- */

typedef struct marks {
    uint32_t n, base, dims;
    kvk_dtype dtype;
    size_t stride; /* elements from row to row on the device */
    float *rows;   /* [n, dims]: what the device has, exactly */
    float *q;
} marks;

/* whole: numbers whose sums are exact in f32, so scores tie and have one value everywhere. */
static marks marks_of(numbers *from, uint32_t n, uint32_t dims, kvk_dtype dtype, bool whole)
{
    marks m = {n, number_below(from, 1000), dims, dtype, dims + 32, NULL, normals(from, dims)};

    m.rows = normals(from, (size_t)n * dims);
    for (size_t i = 0; i < (size_t)n * dims; i++)
        m.rows[i] = whole ? rintf(m.rows[i]) : of_bf16(bf16_of(m.rows[i]));
    for (uint32_t i = 0; whole && i < dims; i++)
        m.q[i] = rintf(m.q[i]);
    return m;
}

static const void *marks_on_device(const marks *m)
{
    size_t elem = m->dtype == KVK_F32 ? 4 : 2, row = m->stride * elem;
    uint8_t *rows = host_bytes(m->n * row + 1);

    for (uint32_t j = 0; j < m->n; j++) {
        for (uint32_t i = 0; i < m->dims; i++) {
            const float *x = m->rows + (size_t)j * m->dims + i;
            uint16_t bits = bf16_of(*x);
            memcpy(rows + j * row + i * elem, elem == 4 ? (const void *)x : &bits, elem);
        }
    }
    return device_copy(rows, m->n * row + 1);
}

static kvk_cuda_chunk_select_args select_args(const marks *m, uint32_t n_lists, uint32_t k)
{
    kvk_cuda_candidates *cands = host_bytes(n_lists * sizeof(*cands));
    float *q = host_bytes((size_t)n_lists * m[0].dims * 4);
    uint32_t rows_max = 1;
    size_t elem = m[0].dtype == KVK_F32 ? 4 : 2, entries = (size_t)n_lists * k, bytes = 0;

    for (uint32_t s = 0; s < n_lists; s++) {
        cands[s] = (kvk_cuda_candidates){marks_on_device(&m[s]), m[s].n, m[s].base};
        memcpy(q + (size_t)s * m[0].dims, m[s].q, m[0].dims * sizeof(float));
        rows_max = m[s].n > rows_max ? m[s].n : rows_max;
    }
    bytes = kvk_cuda_chunk_select_workspace_bytes(n_lists, rows_max);
    return (kvk_cuda_chunk_select_args){.n_seqs = n_lists,
                                        .dims = m[0].dims,
                                        .k = k,
                                        .rows_max = rows_max,
                                        .dtype = m[0].dtype,
                                        .stride_bytes = m[0].stride * elem,
                                        .q = device_copy(q, (size_t)n_lists * m[0].dims * 4),
                                        .cands = device_copy(cands, n_lists * sizeof(*cands)),
                                        .picks = device_bytes(entries * 4),
                                        .scores = device_bytes(entries * 4),
                                        .n_picks = device_bytes(n_lists * 4),
                                        .workspace = device_bytes(bytes),
                                        .workspace_bytes = bytes};
}

/* What a launch gave, on the host. */
typedef struct chosen {
    uint32_t *n, *picks;
    float *scores;
} chosen;

static chosen selected(const kvk_cuda_chunk_select_args *a)
{
    size_t entries = (size_t)a->n_seqs * a->k;

    OK(kvk_cuda_chunk_select(gpu(), a, gpu_stream()));
    return (chosen){fetched(a->n_picks, a->n_seqs * 4), fetched(a->picks, entries * 4),
                    fetched(a->scores, entries * 4)};
}

static float *oracle_scores(const marks *m)
{
    float *scores = host_bytes((m->n + 1) * sizeof(float));

    CPU((size_t)m->n * m->dims > 1 << 20, score_keys, m->q, 1, 1, 1, m->dims,
        {m->rows, m->dims * sizeof(float), KVK_F32}, m->n, scores, m->n);
    return scores;
}

/* Places past the last pick say so. */
static void check_rest(const chosen *c, uint32_t s, uint32_t n, uint32_t k)
{
    REQUIRE(c->n[s] == n, "list %u has %u picks, wanted %u", s, c->n[s], n);
    for (uint32_t i = n; i < k; i++)
        REQUIRE(c->picks[(size_t)s * k + i] == UINT32_MAX &&
                    c->scores[(size_t)s * k + i] == -INFINITY,
                "list %u: place %u is not empty", s, i);
}

/* List s of the outcome has the picks and the scores that topk makes of `scores`. */
static void check_equal(const chosen *c, uint32_t s, const marks *m, const float *scores,
                        uint32_t k, const char *what)
{
    size_t bytes = kvk_topk_workspace_bytes(m->n, k), at = (size_t)s * k;
    uint32_t *ids = host_bytes(k * 4), n = 0;
    float *best = host_bytes(k * 4);

    CPU(m->n > 20000, topk, scores, m->n, k, m->base, ids, best, &n, host_bytes(bytes), bytes);
    check_rest(c, s, n, k);
    for (uint32_t i = 0; i < n; i++) {
        REQUIRE(c->picks[at + i] == ids[i], "%s: %u marks of %u, k %u: pick %u is %u, wanted %u",
                what, m->n, m->dims, k, i, c->picks[at + i], ids[i]);
        REQUIRE(c->scores[at + i] == best[i] || (isnan(best[i]) && isnan(c->scores[at + i])),
                "%s: score %u is %.9g, wanted %.9g", what, i, (double)c->scores[at + i],
                (double)best[i]);
    }
}

/* List s is in order, and within the bound of the oracle's scores nothing better was left out. */
static void check_close(const chosen *c, uint32_t s, const marks *m, uint32_t k)
{
    const float *want = oracle_scores(m);
    uint8_t *taken = host_bytes(m->n + 1);
    uint32_t n = k < m->n ? k : m->n;
    double least = INFINITY, bound = 0;

    for (uint32_t j = 0; j < m->dims; j++) /* of |q| |mark|, generously */
        bound += fabs((double)m->q[j]) * 4;
    bound *= m->dims * 0x1p-23;
    check_rest(c, s, n, k);
    for (uint32_t i = 0; i < n; i++) {
        size_t at = (size_t)s * k + i;
        uint32_t row = c->picks[at] - m->base;
        REQUIRE(row < m->n && !taken[row]++, "pick %u is %u", i, c->picks[at]);
        REQUIRE(fabs((double)c->scores[at] - (double)want[row]) <= bound,
                "score %u is %.9g, wanted %.9g", i, (double)c->scores[at], (double)want[row]);
        REQUIRE((double)c->scores[at] <= least, "score %u is out of order", i);
        least = (double)c->scores[at];
    }
    for (uint32_t j = 0; n == k && j < m->n; j++)
        REQUIRE(taken[j] || (double)want[j] <= least + 2 * bound, "%u was left out", j);
}

void cuda_case_chunk_select(numbers *from)
{
    static const uint32_t shapes[][3] = {/* marks, dims, k */
                                         {0, 32, 8},       {1, 128, 8},      {3, 8, 8},
                                         {8, 768, 8},      {9, 40, 8},       {1000, 4096, 8},
                                         {5000, 2048, 64}, {70001, 64, 8},   {20000, 136, 1024},
                                         {70000, 8, 1},    {1023, 16, 1024}, {300000, 8, 8}};

    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        for (int kind = 0; kind < 4; kind++) {
            bool whole = kind % 2 == 0;
            marks m =
                marks_of(from, shapes[i][0], shapes[i][1], kind < 2 ? KVK_F32 : KVK_BF16, whole);
            kvk_cuda_chunk_select_args a = select_args(&m, 1, shapes[i][2]);
            chosen c = selected(&a);
            if (whole)
                check_equal(&c, 0, &m, oracle_scores(&m), a.k, "whole numbers");
            else
                check_close(&c, 0, &m, a.k);
            release_all();
        }
    }
}

/* Many equal scores, NaN and infinities among them, more at the k-th place than there is room for
 * in a first try; then everything equal. */
void cuda_case_chunk_select_ties(numbers *from)
{
    static const uint32_t ks[] = {1, 8, 64, 1000};
    static const uint32_t ns[] = {30000, 200000, 50000, 40000};

    for (size_t i = 0; i < 4; i++) {
        marks m = marks_of(from, ns[i], 16, KVK_F32, true);
        for (uint32_t j = 0; j < m.n; j++) {
            memset(m.rows + (size_t)j * 16, 0, 16 * sizeof(float));
            m.rows[(size_t)j * 16] = j % 100 == 99   ? NAN
                                     : j % 100 == 98 ? -INFINITY
                                     : j == 17000    ? INFINITY
                                                     : (float)(j / 7 % 3);
        }
        m.q[0] = 2;
        memset(m.q + 1, 0, 15 * sizeof(float));
        kvk_cuda_chunk_select_args a = select_args(&m, 1, ks[i]);
        chosen c = selected(&a);
        float *scores = host_bytes(m.n * sizeof(float));
        for (uint32_t j = 0; j < m.n; j++)
            scores[j] = 2 * m.rows[(size_t)j * 16];
        check_equal(&c, 0, &m, scores, ks[i], "ties");
        for (uint32_t j = 0; j < m.n; j++)
            m.rows[(size_t)j * 16] = scores[j] = i % 2 ? NAN : 0;
        a = select_args(&m, 1, ks[i]);
        c = selected(&a);
        check_equal(&c, 0, &m, scores, ks[i], "all equal");
        release_all();
    }
}

/* Lists of a batch give what each gives alone, to the bit; rows_max cuts; pieces of landmarks. */
void cuda_case_chunk_select_batch(numbers *from)
{
    enum { LISTS = 21, K = 8, DIMS = 256, HEADS = 4 };
    marks m[LISTS];

    for (uint32_t s = 0; s < LISTS; s++)
        m[s] = marks_of(from, s == 4 ? 0 : number_below(from, s % 5 ? 3000 : 9), DIMS, KVK_BF16,
                        false);
    kvk_cuda_chunk_select_args a = select_args(m, LISTS, K);
    chosen all = selected(&a);
    a.rows_max = 50;
    chosen cut = selected(&a);
    for (uint32_t s = 0; s < LISTS; s++) {
        kvk_cuda_chunk_select_args one = select_args(&m[s], 1, K);
        chosen c = selected(&one);
        REQUIRE(memcmp(c.picks, all.picks + (size_t)s * K, K * 4) == 0 &&
                    memcmp(c.scores, all.scores + (size_t)s * K, K * 4) == 0 && c.n[0] == all.n[s],
                "list %u differs in its batch", s);
        m[s].n = m[s].n < 50 ? m[s].n : 50;
        check_close(&cut, s, &m[s], K);
    }
    release_all();
    m[0] = marks_of(from, 500, DIMS, KVK_F32, true);
    a = select_args(m, 1, K);
    kvk_cuda_candidates cands[HEADS];
    const char *rows = marks_on_device(&m[0]);
    for (size_t h = 0; h < HEADS; h++)
        cands[h] = (kvk_cuda_candidates){rows + h * (DIMS / HEADS) * 4, 500, m[0].base};
    size_t bytes = kvk_cuda_chunk_select_workspace_bytes(HEADS, 500);
    a = (kvk_cuda_chunk_select_args){.n_seqs = HEADS,
                                     .dims = DIMS / HEADS,
                                     .k = K,
                                     .rows_max = 500,
                                     .dtype = KVK_F32,
                                     .stride_bytes = a.stride_bytes,
                                     .q = a.q, /* its pieces lie one after the other */
                                     .cands = device_copy(cands, sizeof(cands)),
                                     .picks = device_bytes(HEADS * K * 4),
                                     .scores = device_bytes(HEADS * K * 4),
                                     .n_picks = device_bytes(HEADS * 4),
                                     .workspace = device_bytes(bytes),
                                     .workspace_bytes = bytes};
    chosen c = selected(&a);
    for (uint32_t h = 0; h < HEADS; h++) {
        float *scores = host_bytes(500 * sizeof(float));
        CPU(false, score_keys, m[0].q + h * (DIMS / HEADS), 1, 1, 1, DIMS / HEADS,
            {m[0].rows + h * (DIMS / HEADS), DIMS * sizeof(float), KVK_F32}, 500, scores, 500);
        check_equal(&c, h, &m[0], scores, K, "a head's piece");
    }
}

void cuda_case_chunk_edges(numbers *from)
{
    marks m = marks_of(from, 10, 32, KVK_F32, true);
    kvk_cuda_chunk_select_args a = select_args(&m, 1, 8), b = a;
    kvk_chunk_weights_args w = {a.scores, a.picks, 1, 8, KVK_FUSE_STICK, 1, a.scores};

#define REFUSED(field, value)                                                                      \
    b = a;                                                                                         \
    b.field = (value);                                                                             \
    REQUIRE(kvk_cuda_chunk_select(gpu(), &b, gpu_stream()) == KVC_INVALID, #field)
    REFUSED(dims, 0);
    REFUSED(dims, 30);
    REFUSED(dims, KVK_CUDA_LANDMARK_MAX + 4);
    REFUSED(k, 0);
    REFUSED(k, KVK_CHUNKS_MAX + 1);
    REFUSED(dtype, KVK_I8);
    REFUSED(stride_bytes, 64);
    REFUSED(q, NULL);
    REFUSED(workspace_bytes, 8);
    REFUSED(workspace, NULL);
    b = a;
    b.n_seqs = 0;
    OK(kvk_cuda_chunk_select(gpu(), &b, gpu_stream()));
    w.ids = NULL;
    REQUIRE(kvk_cuda_chunk_weights(gpu(), &w, gpu_stream()) == KVC_INVALID, "no ids");
    w.scale = 0;
    w.ids = a.picks;
    REQUIRE(kvk_cuda_chunk_weights(gpu(), &w, gpu_stream()) == KVC_INVALID, "scale 0");
    w.k = 0;
    w.scale = 1;
    OK(kvk_cuda_chunk_weights(gpu(), &w, gpu_stream()));
}

/* ---- weights ---- */

void cuda_case_chunk_weights(numbers *from)
{
    static const uint32_t shapes[][2] = {{1, 1},   {5, 8}, {64, 8}, {3, 64}, {2, KVK_CHUNKS_MAX},
                                         {2000, 8}};

    for (size_t t = 0; t < sizeof(shapes) / sizeof(shapes[0]); t++) {
        uint32_t n = shapes[t][0], k = shapes[t][1], *ids = host_bytes((size_t)n * k * 4);
        size_t bytes = (size_t)n * k * 4;
        float *x = normals(from, (size_t)n * k), *want = host_bytes(bytes);
        for (size_t i = 0; i < (size_t)n * k; i++) {
            x[i] *= 20;
            ids[i] = (uint32_t)(i % k ^ 5) * 3; /* distinct, not in order, 0 among them */
            if (number_below(from, 9) == 0) {   /* as selection leaves an empty place */
                x[i] = -INFINITY;
                ids[i] = UINT32_MAX;
            }
        }
        for (uint32_t i = 0; i < k && t == 1; i++) {
            x[i] = -INFINITY;                              /* nothing chosen */
            x[2 * k + i] = i ? x[2 * k + i] : NAN;         /* a NaN */
            x[3 * k + i] = (float)i * 40 - 100;            /* far apart */
            ids[2 * k + i] = ids[3 * k + i] = (i ^ 5) * 3; /* none of them empty */
        }
        for (int fusion = KVK_FUSE_SOFTMAX; fusion <= KVK_FUSE_STICK; fusion++) {
            kvk_chunk_weights_args a = {
                device_copy(x, bytes), device_copy(ids, bytes), n, k, (kvk_fusion)fusion, 0.25f,
                device_bytes(bytes)};
            OK(kvk_cuda_chunk_weights(gpu(), &a, gpu_stream()));
            CPU(false, chunk_weights, x, ids, n, k, (kvk_fusion)fusion, 0.25f, want);
            const float *got = fetched(a.weights, bytes);
            for (size_t i = 0; i < (size_t)n * k; i++)
                REQUIRE(memcmp(got + i, want + i, 4) == 0 || (isnan(got[i]) && isnan(want[i])),
                        "fusion %d, k %u: weight %zu is %.9g, wanted %.9g", fusion, k, i,
                        (double)got[i], (double)want[i]);
        }
        release_all();
    }
}
