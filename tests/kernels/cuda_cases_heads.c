/* cuda_cases_heads.c: how a step of TokenSelect begins: the Selection Cache, windows, queries and
 * new tokens against the CPU's cosine, rope, project and encode; and picks in order. */
#include <math.h>
#include <string.h>

#include "cuda_cases.h"
#include "kvk/cuda_frame.h"

enum { SEQS = 3, SINKS = 4, RECENT = 100 };

typedef struct setting {
    uint32_t heads, kv_heads, dim, dims, fine, width, inputs; /* fine 0: there is no finer index */
    bool raw;
    kvk_dtype row_dtype; /* 0: as they are */
    uint16_t *q, *k;     /* [SEQS, width]; [SEQS, K and V] */
    float *proj, *key_proj;
    double inv_freq[64];
    uint32_t n_tokens[SEQS], kept_first[SEQS], first[SEQS]; /* first: where near is to begin */
    uint8_t *rows, *copies, *index_rows, *fine_rows;        /* device, pinned, device, device */
    kvk_cuda_frame_args a;
} setting;

static uint16_t *halves(numbers *from, size_t n)
{
    uint16_t *x = host_bytes(n * 2);

    for (size_t i = 0; i < n; i++)
        x[i] = bf16_of(normal(from));
    return x;
}

static size_t slice_of(const setting *s)
{
    return kvk_is_coded(s->row_dtype) ? s->kv_heads * ((size_t)s->dim + 2u) : s->inputs * 2ul;
}

/* Of the matrices. */
static uint32_t columns_of(const setting *s)
{
    return s->fine ? s->fine : s->dims;
}

static const kvk_cuda_token *tokens_of(setting *s)
{
    kvk_cuda_token *tokens = pinned_bytes(SEQS * sizeof(*tokens));
    const uint16_t *k = device_copy(s->k, (size_t)SEQS * s->inputs * 4);
    size_t row = s->inputs * 4ul, index_row = s->kv_heads * (s->dims + 2ul);
    size_t fine_row = s->kv_heads * (s->fine + 2ul);

    s->rows = device_bytes(SEQS * row);
    s->copies = pinned_bytes(SEQS * row);
    s->index_rows = device_bytes(SEQS * index_row);
    s->fine_rows = device_bytes(SEQS * fine_row);
    for (uint32_t i = 0; i < SEQS; i++)
        tokens[i] = (kvk_cuda_token){.k = k + (size_t)i * s->inputs * 2,
                                     .v = k + (size_t)i * s->inputs * 2 + s->inputs,
                                     .row = i == 1 ? NULL : s->rows + i * row,
                                     .copy = i == 2 ? s->copies + i * row : NULL,
                                     .index_row = s->index_rows + i * index_row,
                                     .fine_row = s->fine_rows + i * fine_row};
    return tokens;
}

static void set_up(numbers *from, setting *s)
{
    size_t q = (size_t)SEQS * s->width, proj = (size_t)s->inputs * columns_of(s);
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
                                 .q_index = device_bytes((size_t)SEQS * s->heads * s->dims * 4),
                                 .q_near = device_bytes(q * 4),
                                 .n_tokens = device_copy(s->n_tokens, sizeof(s->n_tokens)),
                                 .n_sink = SINKS,
                                 .n_recent = RECENT,
                                 .n_near = device_bytes(SEQS * 4),
                                 .near_first = device_bytes(SEQS * 4),
                                 .cands = device_bytes(SEQS * sizeof(kvk_cuda_candidates)),
                                 .differs = pinned_bytes(SEQS * 4),
                                 .tokens = tokens_of(s),
                                 .row_dtype = s->row_dtype,
                                 .key_proj = device_copy(s->key_proj, proj * 4),
                                 .per_head = 1,
                                 .fine_dims = s->fine,
                                 .q_fine = device_bytes((size_t)SEQS * s->heads * s->fine * 4 + 4),
                                 .threshold = 0.9,
                                 .last = device_bytes(q * 4),
                                 .kept_first = pinned_bytes(SEQS * 4),
                                 .keep = device_bytes(SEQS * 4),
                                 .kept = pinned_bytes(SEQS * 4)};
    memset(s->a.differs, 0, SEQS * 4);
}

static const float *turned(const setting *s, uint32_t seq, uint32_t position)
{
    float *out = host_bytes(s->width * 4ul);

    CPU(false, rope, {s->q + (size_t)seq * s->width, s->width * 2ul, KVK_BF16}, 1, s->heads, s->dim,
        position ? s->inv_freq : NULL, NULL, (int32_t)position, out);
    return out;
}

/* x [dim] through proj [dim, columns]; *bound_p: what sums of f32 in any order may be off, with x a
 * little off too. */
static void project(const setting *s, const float *x, const float *proj, float *out, double *bound)
{
    uint32_t columns = columns_of(s);

    CPU(false, project, {x, s->dim * 4ul, KVK_F32}, 1, 1, s->dim, columns, proj, out);
    for (uint32_t d = 0; d < columns; d++) {
        bound[d] = 0;
        for (uint32_t i = 0; i < s->dim; i++)
            bound[d] +=
                (fabs((double)x[i]) + 1) * fabs((double)proj[(size_t)i * columns + d]) * 2e-6;
    }
}

/* How large the pair of a query's element is, which rotation mixes. */
static double pair_of(const setting *s, uint32_t seq, uint32_t i)
{
    uint32_t half = s->dim / 2, other = i % s->dim < half ? i + half : i - half;
    const uint16_t *q = s->q + (size_t)seq * s->width;

    return fabs((double)of_bf16(q[i])) + fabs((double)of_bf16(q[other]));
}

static void check_queries(const setting *s, uint32_t seq)
{
    uint32_t n_near = s->n_tokens[seq] - s->first[seq];
    const float *near = fetched(s->a.q_near, (size_t)SEQS * s->width * 4);
    const float *index = fetched(s->a.q_index, (size_t)SEQS * s->heads * s->dims * 4);
    const float *fine = fetched(s->a.q_fine, (size_t)SEQS * s->heads * s->fine * 4 + 4);
    const float *want_near = turned(s, seq, n_near - 1), *q = turned(s, seq, s->raw ? 0 : RECENT);
    float *want = host_bytes(columns_of(s) * 4ul);
    double *bound = host_bytes(columns_of(s) * sizeof(double));

    for (size_t i = 0; i < s->width; i++)
        REQUIRE(fabs((double)near[seq * s->width + i] - (double)want_near[i]) <=
                    2e-6 * (1 + pair_of(s, seq, (uint32_t)i)),
                "near query of %u: [%zu] is %.9g, wanted %.9g", seq, i,
                (double)near[seq * s->width + i], (double)want_near[i]);
    for (uint32_t h = 0; h < s->heads; h++) {
        const float *got = index + ((size_t)seq * s->heads + h) * s->dims;
        project(s, q + (size_t)h * s->dim,
                s->proj + (size_t)(h * s->kv_heads / s->heads) * s->dim * columns_of(s), want,
                bound);
        for (uint32_t d = 0; d < s->fine; d++)
            REQUIRE(fabs((double)fine[((size_t)seq * s->heads + h) * s->fine + d] -
                         (double)want[d]) <= bound[d],
                    "finer query of %u, head %u, at %u", seq, h, d);
        for (uint32_t d = 0; d < s->dims; d++)
            REQUIRE(fabs((double)got[d] - (double)want[d]) <= bound[d],
                    "index query of %u, head %u: [%u] is %.9g, wanted %.9g", seq, h, d,
                    (double)got[d], (double)want[d]);
    }
}

static void check_windows(const setting *s, const uint32_t *keep)
{
    const uint32_t *n = fetched(s->a.n_near, SEQS * 4), *first = fetched(s->a.near_first, SEQS * 4);
    const kvk_cuda_candidates *c = fetched(s->a.cands, SEQS * sizeof(*c));
    const uint32_t *kept = fetched(s->a.keep, SEQS * 4);

    for (uint32_t i = 0; i < SEQS; i++) {
        uint32_t begin = s->first[i];
        REQUIRE(kept[i] == keep[i] && s->a.kept[i] == keep[i], "kept %u of %u", kept[i], i);
        REQUIRE(first[i] == begin && n[i] == s->n_tokens[i] - begin && c[i].base == SINKS &&
                    c[i].n_rows == (begin > SINKS ? begin - SINKS : 0),
                "windows of %u: %u from %u, %u candidates", i, n[i], first[i], c[i].n_rows);
    }
}

static void check_rows(const setting *s, uint32_t seq)
{
    size_t slice = slice_of(s), row = s->inputs * 4ul;
    const uint8_t *rows = fetched(s->rows, SEQS * row);
    const uint16_t *k = s->k + (size_t)seq * s->inputs * 2;
    uint8_t *want = host_bytes(2 * slice);

    memcpy(want, k, kvk_is_coded(s->row_dtype) ? 0 : 2 * slice);
    for (uint32_t v = 0; v < 2 && kvk_is_coded(s->row_dtype); v++)
        CPU(false, encode, {k + (size_t)v * s->inputs, s->inputs * 2ul, KVK_BF16}, 1, s->kv_heads,
            s->dim, s->row_dtype, want + v * slice, slice);
    REQUIRE(memcmp(rows + seq * row, want, 2 * slice) == 0, "row of %u", seq);
    REQUIRE(seq != 2 || memcmp(s->copies + seq * row, want, 2 * slice) == 0, "copy of %u", seq);
}

/* Of rows of dims, the first columns. */
static void check_index_row(const setting *s, uint32_t seq, const uint8_t *rows, uint32_t dims)
{
    size_t row = s->kv_heads * (dims + 2ul);
    const uint8_t *index = (uint8_t *)fetched(rows, SEQS * row) + seq * row;
    float *x = host_bytes(s->dim * 4ul), *want = host_bytes(columns_of(s) * 4ul);
    double *bound = host_bytes(columns_of(s) * sizeof(double));

    for (uint32_t h = 0; h < s->kv_heads; h++) {
        uint16_t bits;
        float most = 0;
        for (uint32_t i = 0; i < s->dim; i++)
            x[i] = of_bf16(s->k[(size_t)seq * s->inputs * 2 + h * s->dim + i]);
        project(s, x, s->key_proj + (size_t)h * s->dim * columns_of(s), want, bound);
        memcpy(&bits, index + s->kv_heads * dims + 2ul * h, 2);
        double scale = (double)of_bf16(bits);
        for (uint32_t d = 0; d < dims; d++) {
            double off = fabs(scale * (int8_t)index[h * dims + d] - (double)want[d]);
            most = fmaxf(most, fabsf(want[d]));
            REQUIRE(off <= scale * 0.50001 + bound[d], "index row of %u, head %u: off %g", seq, h,
                    off);
        }
        REQUIRE(scale * 127 >= (double)most * 0.9999 && scale * 127 <= (double)most * 1.01,
                "scale of %u, head %u", seq, h);
    }
}

/* A launch after which near begins where `first` says, with these kept. */
static void launch(setting *s, const uint32_t *keep)
{
    size_t q = (size_t)SEQS * s->width;

    memcpy((void *)(uintptr_t)s->a.kept_first, s->kept_first, sizeof(s->kept_first));
    OK(kvk_cuda_frame(gpu(), &s->a, gpu_stream()));
    gpu_sync();
    for (uint32_t i = 0; i < SEQS; i++) {
        uint32_t n = s->n_tokens[i];
        s->first[i] = keep[i] ? s->kept_first[i] : n - (n < RECENT ? n : RECENT);
        check_queries(s, i);
    }
    check_windows(s, keep);
    const float *last = fetched(s->a.last, q * 4);
    for (size_t i = 0; i < q; i++)
        REQUIRE(keep[i / s->width] || last[i] == of_bf16(s->q[i]), "last[%zu]", i);
}

static void run(numbers *from, setting *s)
{
    size_t q = (size_t)SEQS * s->width, row = s->inputs * 4ul;

    set_up(from, s);
    for (uint32_t i = 0; i < SEQS; i++)
        s->kept_first[i] = UINT32_MAX;
    launch(s, (uint32_t[]){0, 0, 0}); /* whatever was there before */
    for (uint32_t i = 0; i < SEQS; i += 2) {
        check_rows(s, i);
        check_index_row(s, i, s->index_rows, s->dims);
        if (s->fine)
            check_index_row(s, i, s->fine_rows, s->fine);
    }
    REQUIRE(((uint8_t *)fetched(s->rows, SEQS * row))[row] == 0xee, "a token that is not there");
    for (uint32_t i = 0; i < SEQS; i++) {
        s->kept_first[i] = s->first[i];
        s->n_tokens[i] += 5;
    }
    s->q[s->width] = bf16_of(3 * sqrtf((float)s->width)); /* far from what it was */
    upload((void *)(uintptr_t)s->a.n_tokens, s->n_tokens, sizeof(s->n_tokens));
    upload((void *)(uintptr_t)s->a.q, s->q, q * 2);
    launch(s, (uint32_t[]){1, 0, 1});
    s->kept_first[2] = UINT32_MAX; /* the same query, which may not */
    launch(s, (uint32_t[]){1, 1, 0});
}

/* The real query, after another one chose the windows. */
static void run_late(setting *s)
{
    uint16_t *expected = host_bytes((size_t)SEQS * s->width * 2);
    kvk_cuda_frame_args a = s->a;

    memcpy(expected, s->q, (size_t)SEQS * s->width * 2);
    expected[s->width] ^= 1;
    a.expected = device_copy(expected, (size_t)SEQS * s->width * 2);
    a.q_index = NULL;
    a.cands = NULL;
    a.tokens = NULL;
    a.near_first = NULL;
    a.last = NULL;
    OK(kvk_cuda_fill(gpu(), a.q_near, 0xee, (size_t)SEQS * s->width * 4, gpu_stream()));
    OK(kvk_cuda_frame(gpu(), &a, gpu_stream()));
    gpu_sync();
    REQUIRE(a.differs[0] == 0 && a.differs[1] == 1 && a.differs[2] == 0, "differs");
    for (uint32_t i = 0; i < SEQS; i++)
        check_queries(s, i);
    a.q_far = a.q_near;
    REQUIRE(kvk_cuda_frame(gpu(), &a, gpu_stream()) == KVC_INVALID, "there is no far query");
    a = s->a;
    a.fine_dims = s->dims - 1;
    REQUIRE(s->dims == 1 || kvk_cuda_frame(gpu(), &a, gpu_stream()) == KVC_INVALID, "finer");
}

/* A finer index without its row, and one beside the index of all heads. */
static void refuse_finer(const setting *s)
{
    kvk_cuda_frame_args a = s->a;

    a.n_seqs = 1;
    a.token = s->a.tokens[0];
    a.tokens = NULL;
    a.q = NULL;
    a.q_index = NULL;
    OK(kvk_cuda_frame(gpu(), &a, gpu_stream()));
    a.token.fine_row = NULL;
    if (s->fine)
        REQUIRE(kvk_cuda_frame(gpu(), &a, gpu_stream()) == KVC_INVALID, "no finer row");
    a.token.row = NULL;
    a.per_head = 0;
    a.fine_dims = 0;
    OK(kvk_cuda_frame(gpu(), &a, gpu_stream()));
    a.fine_dims = s->dims;
    REQUIRE(kvk_cuda_frame(gpu(), &a, gpu_stream()) == KVC_INVALID, "a finer index of all heads");
    gpu_sync();
}

static bool untouched(const uint8_t *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (bytes[i] != 0xee)
            return false;
    }
    return true;
}

/* The first token's row, index rows and copy, where a launch left them. */
static void check_told(const setting *s, int way, bool there)
{
    size_t row = s->inputs * 4ul, slice = slice_of(s), index = s->kv_heads * (s->dims + 2ul);
    size_t fine = s->fine ? s->kv_heads * (s->fine + 2ul) : 0;

    if (!there) {
        REQUIRE(untouched(fetched(s->rows, row), row) &&
                    untouched(fetched(s->index_rows, index), index) &&
                    untouched(fetched(s->fine_rows, fine + 1), fine) && untouched(s->copies, row),
                "a token that is not there");
        return;
    }
    check_rows(s, 0);
    REQUIRE(memcmp(s->copies, fetched(s->rows, row), 2 * slice) == 0, "copy, way %d", way);
    check_index_row(s, 0, s->index_rows, s->dims);
    if (s->fine)
        check_index_row(s, 0, s->fine_rows, s->fine);
}

/* The first token, with a copy, whose K and V lie where the arguments say and not where it says: by
 * value, in memory, and not there. */
static void run_told(setting *s)
{
    enum { BY_VALUE, IN_MEMORY, NOT_THERE, WAYS };
    kvk_cuda_frame_args a = s->a;
    kvk_cuda_token *token = pinned_bytes(sizeof(*token));
    size_t row = s->inputs * 4ul, index = s->kv_heads * (s->dims + 2ul);

    *token = s->a.tokens[0];
    token->k = token->v = device_bytes(row);
    token->copy = s->copies;
    a.n_seqs = 1;
    a.q = NULL;
    a.q_index = NULL;
    a.token = *token;
    a.kv = s->a.tokens[0].k;
    for (int way = BY_VALUE; way < WAYS; way++) {
        a.tokens = way == BY_VALUE ? NULL : token;
        token->row = way == NOT_THERE ? NULL : s->rows;
        OK(kvk_cuda_fill(gpu(), s->rows, 0xee, row, gpu_stream()));
        OK(kvk_cuda_fill(gpu(), s->index_rows, 0xee, index, gpu_stream()));
        OK(kvk_cuda_fill(gpu(), s->fine_rows, 0xee, s->kv_heads * (s->fine + 2ul), gpu_stream()));
        memset(s->copies, 0xee, row);
        OK(kvk_cuda_frame(gpu(), &a, gpu_stream()));
        gpu_sync();
        check_told(s, way, way != NOT_THERE);
    }
}

void cuda_case_frame_heads(numbers *from)
{
    static const uint32_t shapes[][5] = {
        {32, 8, 128, 32, 0}, {8, 4, 64, 30, 0},     {16, 2, 64, 256, 0}, {9, 9, 24, 5, 0},
        {28, 4, 128, 62, 0}, {32, 8, 128, 32, 100}, {9, 3, 64, 16, 48},  {8, 8, 24, 5, 6}};
    static const kvk_dtype rows[] = {(kvk_dtype)0, KVK_I8_SCALED, KVK_E4M3_SCALED};

    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        for (int kind = 0; kind < 3; kind++) {
            setting s = {.heads = shapes[i][0],
                         .kv_heads = shapes[i][1],
                         .dim = shapes[i][2],
                         .dims = shapes[i][3],
                         .fine = shapes[i][4],
                         .width = shapes[i][0] * shapes[i][2],
                         .inputs = shapes[i][1] * shapes[i][2],
                         .raw = kind == 1,
                         .row_dtype = rows[kind]};
            run(from, &s);
            run_told(&s);
            run_late(&s);
            refuse_finer(&s);
            release_all();
        }
    }
}

/* Any numbers of picks, in place of no other sequence's. */
void cuda_case_order(numbers *from)
{
    static const uint32_t sizes[] = {1, 3, 33, 2048, 4095, 4096};

    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        uint32_t k = sizes[i], n[SEQS] = {k, k / 2, 0}, at = 0;
        uint32_t *picks = host_bytes((size_t)SEQS * k * 4);
        for (uint32_t j = 0; j < SEQS * k; j++) /* distinct, in no order */
            picks[j] = (j * 40503u + 7u) % 65536u * 16u + number_below(from, 16);
        const kvk_cuda_order_args a = {.n_seqs = SEQS,
                                       .k = k,
                                       .picks = device_copy(picks, (size_t)SEQS * k * 4),
                                       .n_picks = device_copy(n, sizeof(n)),
                                       .ordered = device_bytes((size_t)SEQS * k * 4)};
        OK(kvk_cuda_order(gpu(), &a, gpu_stream()));
        const uint32_t *got = fetched(a.ordered, (size_t)SEQS * k * 4);
        for (uint32_t s = 0; s < SEQS; s++) {
            uint64_t sum = 0;
            for (at = 0; at < n[s]; at++) {
                sum += (uint64_t)got[s * k + at] - picks[s * k + at];
                REQUIRE(at == 0 || got[s * k + at] > got[s * k + at - 1], "%u of %u", at, k);
            }
            REQUIRE(sum == 0, "other picks than there were");
            REQUIRE(at == k || got[s * k + at] == 0xeeeeeeeeu, "more than %u", at);
        }
        release_all();
    }
}
