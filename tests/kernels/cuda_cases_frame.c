/* cuda_cases_frame.c: how a step begins: queries, windows and new tokens, against the CPU's rope,
 * group_sum, project and quantize. */
#include <math.h>
#include <string.h>

#include "cuda_cases.h"
#include "kvk/cuda_frame.h"

enum { SEQS = 3, SINKS = 4, RECENT = 100, FAR = 5000 };

typedef struct setting {
    uint32_t heads, kv_heads, dim, dims, inputs;
    bool raw;
    kvk_dtype row_dtype; /* 0: as they are */
    uint16_t *q, *k;     /* [SEQS, heads, dim]; [SEQS, K and V] */
    float *proj, *key_proj;
    double inv_freq[64];
    uint32_t n_tokens[SEQS];
    uint8_t *rows, *copies, *index_rows; /* device */
    kvk_cuda_frame_args a;
} setting;

static uint16_t *halves(numbers *from, size_t n)
{
    uint16_t *x = host_bytes(n * 2);

    for (size_t i = 0; i < n; i++)
        x[i] = bf16_of(normal(from));
    return x;
}

static const kvk_cuda_token *tokens_of(setting *s)
{
    kvk_cuda_token *tokens = pinned_bytes(SEQS * sizeof(*tokens));
    const uint16_t *k = device_copy(s->k, (size_t)SEQS * s->inputs * 4);
    size_t row = (size_t)s->inputs * 4, index_row = s->dims + 2;

    s->rows = device_bytes(SEQS * row);
    s->copies = pinned_bytes(SEQS * row);
    s->index_rows = device_bytes(SEQS * index_row);
    for (uint32_t i = 0; i < SEQS; i++) {
        tokens[i] = (kvk_cuda_token){.k = k + (size_t)i * s->inputs * 2,
                                     .v = k + (size_t)i * s->inputs * 2 + s->inputs,
                                     .row = s->rows + i * row,
                                     .copy = i == 2 ? s->copies : NULL,
                                     .index_row = s->index_rows + i * index_row};
    }
    tokens[1].row = NULL; /* this one has none */
    return tokens;
}

static void set_up(numbers *from, setting *s)
{
    size_t q = (size_t)SEQS * s->heads * s->dim, proj = (size_t)s->inputs * s->dims;
    size_t bytes = kvk_cuda_frame_workspace_bytes(SEQS, s->inputs, s->dims);
    kvk_rope_params rope = {.theta = 500000};

    s->q = halves(from, q);
    s->k = halves(from, (size_t)SEQS * s->inputs * 2);
    s->proj = normals(from, proj);
    s->key_proj = normals(from, proj);
    OK(kvk_rope_inv_freq(&rope, s->dim, s->inv_freq));
    s->n_tokens[0] = 1u << 20;
    s->n_tokens[1] = RECENT / 2;
    s->n_tokens[2] = RECENT + SINKS + 10;
    s->a = (kvk_cuda_frame_args){.n_seqs = SEQS,
                                 .n_q_heads = s->heads,
                                 .n_kv_heads = s->kv_heads,
                                 .head_dim = s->dim,
                                 .dims = s->dims,
                                 .q = device_copy(s->q, q * 2),
                                 .dtype = KVK_BF16,
                                 .score_raw = s->raw,
                                 .inv_freq = device_copy(s->inv_freq, s->dim / 2 * sizeof(double)),
                                 .proj = device_copy(s->proj, proj * 4),
                                 .q_index = device_bytes((size_t)SEQS * s->dims * 4),
                                 .q_far = device_bytes(q * 4),
                                 .q_near = device_bytes(q * 4),
                                 .n_tokens = device_copy(s->n_tokens, sizeof(s->n_tokens)),
                                 .n_sink = SINKS,
                                 .n_recent = RECENT,
                                 .far_position = FAR,
                                 .n_near = device_bytes(SEQS * 4),
                                 .near_first = device_bytes(SEQS * 4),
                                 .cands = device_bytes(SEQS * sizeof(kvk_cuda_candidates)),
                                 .differs = pinned_bytes(SEQS * 4),
                                 .tokens = tokens_of(s),
                                 .row_dtype = s->row_dtype,
                                 .key_proj = device_copy(s->key_proj, proj * 4),
                                 .workspace = device_bytes(bytes),
                                 .workspace_bytes = bytes};
    OK(kvk_cuda_fill(gpu(), s->a.workspace, 0, bytes, gpu_stream()));
    memset(s->a.differs, 0, SEQS * 4);
}

static uint32_t near_of(const setting *s, uint32_t seq)
{
    return s->n_tokens[seq] < RECENT + 1u ? s->n_tokens[seq] : RECENT + 1u;
}

static const float *turned(const setting *s, uint32_t seq, uint32_t position)
{
    size_t width = (size_t)s->heads * s->dim;
    float *out = host_bytes(width * 4);

    CPU(false, rope, {s->q + seq * width, width * 2, KVK_BF16}, 1, s->heads, s->dim, s->inv_freq,
        NULL, (int32_t)position, out);
    return out;
}

/* x [inputs] through proj; *bound_p: what sums of f32 in any order may be off. */
static void project(const setting *s, const float *x, const float *proj, float *out, double *bound)
{
    CPU(false, project, {x, s->inputs * 4, KVK_F32}, 1, 1, s->inputs, s->dims, proj, out);
    for (uint32_t d = 0; d < s->dims; d++) {
        bound[d] = 0;
        for (uint32_t i = 0; i < s->inputs; i++)
            bound[d] += fabs((double)x[i] * (double)proj[(size_t)i * s->dims + d]);
        bound[d] *= 2e-6;
    }
}

static void check_queries(const setting *s, uint32_t seq)
{
    size_t width = (size_t)s->heads * s->dim;
    const float *far = fetched(s->a.q_far, SEQS * width * 4);
    const float *near = fetched(s->a.q_near, SEQS * width * 4);
    const float *index = fetched(s->a.q_index, (size_t)SEQS * s->dims * 4);
    const float *want_far = turned(s, seq, FAR), *want_near = turned(s, seq, near_of(s, seq) - 1);
    const float *raw = turned(s, seq, 0);
    float *sum = host_bytes(s->inputs * 4), *want = host_bytes(s->dims * 4);
    double *bound = host_bytes(s->dims * sizeof(double));

    for (size_t i = 0; i < width; i++) {
        double a = (double)far[seq * width + i] - (double)want_far[i];
        double b = (double)near[seq * width + i] - (double)want_near[i];
        REQUIRE(fabs(a) <= 1e-6 && fabs(b) <= 1e-6, "query of %u, element %zu: off %g, %g", seq, i,
                a, b);
    }
    CPU(false, group_sum, {s->raw ? raw : want_far, width * 4, KVK_F32}, 1, s->heads, s->kv_heads,
        s->dim, sum);
    project(s, sum, s->proj, want, bound);
    for (uint32_t d = 0; d < s->dims; d++)
        REQUIRE(fabs((double)index[seq * s->dims + d] - (double)want[d]) <= bound[d] + 1e-5,
                "index query of %u: [%u] is %.9g, wanted %.9g", seq, d,
                (double)index[seq * s->dims + d], (double)want[d]);
}

static void check_windows(const setting *s)
{
    const uint32_t *n = fetched(s->a.n_near, SEQS * 4), *first = fetched(s->a.near_first, SEQS * 4);
    const kvk_cuda_candidates *c = fetched(s->a.cands, SEQS * sizeof(*c));

    for (uint32_t i = 0; i < SEQS; i++) {
        uint32_t near = near_of(s, i), begin = s->n_tokens[i] - near;
        REQUIRE(n[i] == near && first[i] == begin && c[i].base == SINKS &&
                    c[i].n_rows == (begin > SINKS ? begin - SINKS : 0),
                "windows of %u: %u from %u, %u candidates", i, n[i], first[i], c[i].n_rows);
    }
}

/* A token's row as it should be. */
static const void *want_row(const setting *s, const uint16_t *k, size_t *bytes_p)
{
    size_t slice = s->kv_heads * ((size_t)s->dim + 2u);
    uint8_t *row = host_bytes(2 * slice);

    *bytes_p = (size_t)s->inputs * 4;
    if (!kvk_is_coded(s->row_dtype))
        return k;
    *bytes_p = 2 * slice;
    for (uint32_t v = 0; v < 2; v++)
        CPU(false, encode, {k + (size_t)v * s->inputs, s->inputs * 2, KVK_BF16}, 1, s->kv_heads,
            s->dim, s->row_dtype, row + v * slice, slice);
    return row;
}

static void check_token(const setting *s, uint32_t seq)
{
    size_t row = (size_t)s->inputs * 4, index_row = s->dims + 2, bytes = 0;
    const uint8_t *rows = fetched(s->rows, SEQS * row);
    const uint8_t *index = (uint8_t *)fetched(s->index_rows, SEQS * index_row) + seq * index_row;
    const uint16_t *k = s->k + (size_t)seq * s->inputs * 2;
    float *x = host_bytes(s->inputs * 4), *want = host_bytes(s->dims * 4), scale, most = 0;
    double *bound = host_bytes(s->dims * sizeof(double)), off = 0;

    const void *whole = want_row(s, k, &bytes);
    REQUIRE(memcmp(rows + seq * row, whole, bytes) == 0, "row of %u", seq);
    REQUIRE(seq != 2 || memcmp(s->copies, whole, bytes) == 0, "copy of %u", seq);
    for (uint32_t i = 0; i < s->inputs; i++)
        x[i] = of_bf16(k[i]);
    project(s, x, s->key_proj, want, bound);
    scale = of_bf16((uint16_t)(index[s->dims] | index[s->dims + 1] << 8));
    for (uint32_t d = 0; d < s->dims; d++) {
        most = fmaxf(most, fabsf(want[d]));
        off = fmax(off, fabs((double)scale * (int8_t)index[d] - (double)want[d]) - bound[d]);
    }
    REQUIRE(off <= (double)scale * 0.50001, "index row of %u: off %g at a scale of %g", seq, off,
            (double)scale);
    REQUIRE(scale * 127 >= most * 0.99999f && scale * 127 <= most * 1.01f, "scale of %u", seq);
}

static bool untouched(const uint8_t *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (bytes[i] != 0xee)
            return false;
    }
    return true;
}

/* The first token, with a copy, whose K and V lie where the arguments say and not where it says: by
 * value, in memory, and not there. */
static void run_told(const setting *s, kvk_cuda_frame_args a)
{
    enum { BY_VALUE, IN_MEMORY, NOT_THERE, WAYS };
    kvk_cuda_token *token = pinned_bytes(sizeof(*token));
    size_t row = (size_t)s->inputs * 4, index_row = s->dims + 2, bytes = 0;
    const void *whole = want_row(s, s->k, &bytes);

    *token = s->a.tokens[0];
    token->k = token->v = device_bytes(row);
    token->copy = s->copies;
    a.token = *token;
    a.kv = s->a.tokens[0].k;
    for (int way = BY_VALUE; way < WAYS; way++) {
        a.tokens = way == BY_VALUE ? NULL : token;
        token->row = way == NOT_THERE ? NULL : s->rows;
        OK(kvk_cuda_fill(gpu(), s->rows, 0xee, row, gpu_stream()));
        OK(kvk_cuda_fill(gpu(), s->index_rows, 0xee, index_row, gpu_stream()));
        memset(s->copies, 0xee, row);
        OK(kvk_cuda_frame(gpu(), &a, gpu_stream()));
        gpu_sync();
        if (way != NOT_THERE)
            check_token(s, 0);
        REQUIRE(way == NOT_THERE || memcmp(s->copies, whole, bytes) == 0, "copy, way %d", way);
        REQUIRE(way != NOT_THERE || (untouched(fetched(s->rows, row), row) &&
                                     untouched(fetched(s->index_rows, index_row), index_row) &&
                                     untouched(s->copies, row)),
                "a token that is not there");
    }
    a.n_seqs = 2;
    REQUIRE(kvk_cuda_frame(gpu(), &a, gpu_stream()) == KVC_INVALID, "of one sequence");
    a.n_seqs = 1;
    a.kv = (const uint8_t *)a.kv + 8;
    REQUIRE(kvk_cuda_frame(gpu(), &a, gpu_stream()) == KVC_INVALID, "pieces of 16 bytes");
}

/* Twice, since a launch must leave the workspace ready; then a token by value. */
static void run(numbers *from, setting *s)
{
    const uint8_t *index = NULL;
    size_t row = (size_t)s->inputs * 4, index_row = s->dims + 2;

    set_up(from, s);
    for (int pass = 0; pass < 2; pass++) {
        OK(kvk_cuda_frame(gpu(), &s->a, gpu_stream()));
        for (uint32_t i = 0; i < SEQS; i++)
            check_queries(s, i);
        check_windows(s);
        check_token(s, 0);
        check_token(s, 2);
        REQUIRE(((uint8_t *)fetched(s->rows, 3 * row))[row] == 0xee, "a token that is not there");
    }
    index = fetched(s->index_rows, index_row);
    const kvk_cuda_frame_args one = {.n_seqs = 1,
                                     .n_q_heads = s->heads,
                                     .n_kv_heads = s->kv_heads,
                                     .head_dim = s->dim,
                                     .dims = s->dims,
                                     .dtype = KVK_BF16,
                                     .token = s->a.tokens[0],
                                     .row_dtype = s->row_dtype,
                                     .key_proj = s->a.key_proj,
                                     .workspace = s->a.workspace,
                                     .workspace_bytes = s->a.workspace_bytes};
    OK(kvk_cuda_fill(gpu(), s->index_rows, 0xee, index_row, gpu_stream()));
    OK(kvk_cuda_frame(gpu(), &one, gpu_stream()));
    REQUIRE(memcmp(index, fetched(s->index_rows, index_row), index_row) == 0, "by value");
    run_told(s, one);
}

/* A query that is not the one expected is found out, in its sequence alone. */
static void run_expected(setting *s)
{
    size_t q = (size_t)SEQS * s->heads * s->dim;
    uint16_t *expected = host_bytes(q * 2);
    kvk_cuda_frame_args a = s->a;

    memcpy(expected, s->q, q * 2);
    expected[q - 1] ^= 1;
    a.expected = device_copy(expected, q * 2);
    a.q_index = NULL;
    a.cands = NULL;
    a.tokens = NULL;
    OK(kvk_cuda_frame(gpu(), &a, gpu_stream()));
    gpu_sync();
    REQUIRE(a.differs[0] == 0 && a.differs[1] == 0 && a.differs[2] == 1, "differs");
}

/* K that is not finite is told of, V too where it is coded; tokens that are not there are not. */
static void run_bad(setting *s)
{
    kvk_cuda_token *tokens = pinned_bytes(SEQS * sizeof(*tokens));
    uint32_t *bad = pinned_bytes(SEQS * sizeof(*bad));
    bool coded = kvk_is_coded(s->row_dtype);
    kvk_cuda_frame_args a = s->a;

    a.tokens = tokens;
    for (uint32_t at = 0; at < 2; at++) { /* the last of K, the last of V */
        uint16_t *k = host_bytes((size_t)SEQS * s->inputs * 4);
        memcpy(k, s->k, (size_t)SEQS * s->inputs * 4);
        for (uint32_t i = 1; i < SEQS; i++)
            k[(i * 2 + at + 1) * s->inputs - 1] = 0x7f80;
        const uint16_t *rows = device_copy(k, (size_t)SEQS * s->inputs * 4);
        for (uint32_t i = 0; i < SEQS; i++) {
            tokens[i] = s->a.tokens[i];
            tokens[i].k = rows + (size_t)i * s->inputs * 2;
            tokens[i].v = rows + (size_t)i * s->inputs * 2 + s->inputs;
            tokens[i].bad = &bad[i];
            bad[i] = 0;
        }
        OK(kvk_cuda_frame(gpu(), &a, gpu_stream()));
        gpu_sync();
        REQUIRE(bad[0] == 0 && bad[1] == 0 && bad[2] == (at == 0 || coded),
                "%s not finite: bad %u %u %u", at == 0 ? "K" : "V", bad[0], bad[1], bad[2]);
    }
}

void cuda_case_frame(numbers *from)
{
    static const uint32_t shapes[][4] = {
        {32, 8, 128, 126}, {8, 4, 64, 30}, {16, 2, 64, 256}, {6, 6, 8, 62}, {9, 9, 24, 5}};

    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        static const kvk_dtype rows[] = {(kvk_dtype)0, KVK_I8_SCALED, KVK_E4M3_SCALED};
        for (int kind = 0; kind < 3; kind++) {
            setting s = {.heads = shapes[i][0],
                         .kv_heads = shapes[i][1],
                         .dim = shapes[i][2],
                         .dims = shapes[i][3],
                         .inputs = shapes[i][1] * shapes[i][2],
                         .raw = kind == 1,
                         .row_dtype = rows[kind]};
            run(from, &s);
            run_expected(&s);
            run_bad(&s);
            release_all();
        }
    }
}
