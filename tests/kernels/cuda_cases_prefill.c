/*
 * cuda_cases_prefill.c: attention of chunks against the table's attend: lists with and without
 * holes, chunks of any length, every dtype, rotated and not, exact and fast, in the device's form
 * and that of all devices.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cuda/prefill_forms.h"
#include "cuda_cases.h"
#include "cuda_rig.h"

#define SEQS      3u /* at most */
#define POSITIONS 3000u

typedef struct chunk_case {
    uint32_t heads, kv_heads, dim, stride, n_q;
    kvk_dtype dtype;
    bool rotated, fast;
    float softcap;
    kvk_cuda_own own;
    uint32_t n_seqs, splits; /* splits: blocks that share the keys, which the case is there for */
} chunk_case;

/* A batch of chunks over one context; slot i holds row i of it. */
typedef struct chunk_batch {
    const chunk_case *is;
    context rows, chunk; /* the chunk of sequence s begins at row s * n_q */
    uint32_t n_list[SEQS], n_queries[SEQS];
    int32_t *list, *k_positions, *chunk_positions;
    float *q;
    double inv_freq[64];
    kvk_cuda_prefill_args a;
    float *want[SEQS], *want_lse[SEQS]; /* the table's results */
    uint32_t n_kv[SEQS];                /* rows at hand */
} chunk_batch;

/* Lengths: all, none (or, where they are listed, the queries alone) and some of the list; all, one
 * and some of the queries. */
static void fill_lists(numbers *from, chunk_batch *b)
{
    const chunk_case *is = b->is;

    for (uint32_t s = 0; s < is->n_seqs; s++) {
        b->n_queries[s] = s == 0 ? is->n_q : s == 1 ? 1 : 1 + number_below(from, is->n_q);
        uint32_t least = is->own == KVK_CUDA_OWN_LISTED ? b->n_queries[s] : 0;
        b->n_list[s] = s == 0   ? is->stride
                       : s == 1 ? least
                                : least + number_below(from, is->stride + 1 - least);
    }
    for (size_t i = 0; i < (size_t)is->n_seqs * is->stride; i++) {
        b->list[i] = number_below(from, 20) == 0 ? -1 : (int32_t)number_below(from, POSITIONS);
        b->k_positions[i] = (int32_t)number_below(from, 100000);
    }
    for (size_t i = 0; i < (size_t)is->n_seqs * is->n_q; i++)
        b->chunk_positions[i] = (int32_t)(100000 + i);
}

static void make_args(chunk_batch *b)
{
    const chunk_case *is = b->is;
    size_t lists = (size_t)is->n_seqs * is->stride, queries = (size_t)is->n_seqs * is->n_q;
    size_t width = (size_t)is->heads * is->dim, row = b->rows.row_bytes;
    kvk_cuda_residency res[SEQS] = {{.slots = device_copy(b->rows.rows, POSITIONS * row)}};

    res[1] = res[2] = res[0];
    b->a = (kvk_cuda_prefill_args){
        .n_seqs = is->n_seqs,
        .n_q = is->n_q,
        .n_q_heads = is->heads,
        .n_kv_heads = is->kv_heads,
        .head_dim = is->dim,
        .q = device_copy(b->q, queries * width * 4),
        .n_queries = device_copy(b->n_queries, sizeof(b->n_queries)),
        .list = device_copy(b->list, lists * 4),
        .n_list = device_copy(b->n_list, sizeof(b->n_list)),
        .stride = is->stride,
        .res = device_copy(res, sizeof(res)),
        .own = is->own,
        .chunk = is->own == KVK_CUDA_OWN_CHUNK ? device_copy(b->chunk.rows, queries * row) : NULL,
        .row_bytes = b->rows.row_bytes,
        .v_off_bytes = b->rows.v_off_bytes,
        .dtype = is->dtype,
        .k_positions = is->rotated ? device_copy(b->k_positions, lists * 4) : NULL,
        .chunk_positions = is->rotated ? device_copy(b->chunk_positions, queries * 4) : NULL,
        .inv_freq = is->rotated ? device_copy(b->inv_freq, is->dim / 2 * sizeof(double)) : NULL,
        .scale = 1.0f / sqrtf((float)is->dim),
        .softcap = is->softcap,
        .fast = is->fast,
        .o = device_bytes(queries * width * 4),
        .lse = device_bytes(queries * is->heads * 4)};
    b->a.workspace_bytes = kvk_cuda_prefill_workspace_bytes(&b->a);
    b->a.workspace = device_bytes(b->a.workspace_bytes);
}

static void make_batch(numbers *from, chunk_batch *b)
{
    const chunk_case *is = b->is;
    kvk_rope_params rope = {.theta = 500000};

    b->rows = kv_context_of(from, POSITIONS, is->kv_heads, is->dim, is->dtype);
    b->chunk = kv_context_of(from, is->n_seqs * is->n_q, is->kv_heads, is->dim, is->dtype);
    b->list = host_bytes((size_t)is->n_seqs * is->stride * 4);
    b->k_positions = host_bytes((size_t)is->n_seqs * is->stride * 4);
    b->chunk_positions = host_bytes((size_t)is->n_seqs * is->n_q * 4);
    b->q = normals(from, (size_t)is->n_seqs * is->n_q * is->heads * is->dim);
    OK(kvk_rope_inv_freq(&rope, is->dim, b->inv_freq));
    fill_lists(from, b);
    make_args(b);
}

/* Rows of the chunk behind the list, of sequence s. */
static uint32_t own_rows(const chunk_batch *b, uint32_t s)
{
    return b->is->own == KVK_CUDA_OWN_CHUNK ? b->n_queries[s] : 0;
}

/* How many of the n rows at hand query i sees: holes are not among them. */
static uint32_t rows_seen(const chunk_batch *b, uint32_t s, uint32_t n, uint32_t i)
{
    uint32_t hidden = 0;

    if (b->is->own != KVK_CUDA_OWN_LISTED)
        return b->is->own == KVK_CUDA_OWN_CHUNK ? n + i + 1 : n;
    for (uint32_t j = b->n_list[s] - (b->n_queries[s] - 1 - i); j < b->n_list[s]; j++)
        hidden += b->list[(size_t)s * b->is->stride + j] >= 0;
    return n - hidden;
}

/* The table's result for sequence s. */
static void make_want(chunk_batch *b, uint32_t s)
{
    const chunk_case *is = b->is;
    uint32_t n = 0, n_q = b->n_queries[s], *visible = host_bytes(n_q * 4);
    const void **rows = host_bytes((is->stride + n_q) * sizeof(*rows));
    int32_t *positions = host_bytes((is->stride + n_q) * 4);

    for (uint32_t j = 0; j < b->n_list[s]; j++) {
        size_t at = (size_t)s * is->stride + j;
        if (b->list[at] < 0)
            continue;
        positions[n] = b->k_positions[at];
        rows[n++] = b->rows.rows + (size_t)b->list[at] * b->rows.row_bytes;
    }
    for (uint32_t i = 0; i < n_q; i++)
        visible[i] = rows_seen(b, s, n, i);
    for (uint32_t i = 0; i < own_rows(b, s); i++) {
        size_t at = (size_t)s * is->n_q + i;
        positions[n + i] = b->chunk_positions[at];
        rows[n + i] = b->chunk.rows + at * b->chunk.row_bytes;
    }
    b->want[s] = host_bytes((size_t)n_q * is->heads * is->dim * 4);
    b->want_lse[s] = host_bytes((size_t)n_q * is->heads * 4);
    CPU(true, attend, b->q + (size_t)s * is->n_q * is->heads * is->dim, n_q, is->heads,
        is->kv_heads, is->dim, rows, n + own_rows(b, s), 0, b->rows.v_off_bytes, is->dtype,
        is->rotated ? positions : NULL, is->rotated ? b->inv_freq : NULL, visible, b->a.scale,
        is->softcap, b->want[s], b->want_lse[s]);
    b->n_kv[s] = n + own_rows(b, s);
}

/* The bound of cuda.h, where sums of |products| stay below 1.2 dim and |v| below 4; and what is far
 * below it for such numbers, the root of the mean square. */
static void compare(const chunk_batch *b, const char *what)
{
    const chunk_case *is = b->is;
    size_t width = (size_t)is->heads * is->dim, all = (size_t)is->n_seqs * is->n_q;
    const float *o = fetched(b->a.o, all * width * 4);
    const float *lse = fetched(b->a.lse, all * is->heads * 4);
    double s_max = (double)b->a.scale * 1.2 * is->dim;

    for (uint32_t s = 0; s < is->n_seqs; s++) {
        size_t n = (size_t)b->n_queries[s] * width, at = (size_t)s * is->n_q * width;
        const float *want = b->want[s], *want_lse = b->want_lse[s];
        uint32_t n_kv = b->n_kv[s];
        double e = is->fast ? 0x1p-7 * s_max + 0x1p-8 : 0x1p-16 * s_max + 0x1p-16 + n_kv * 0x1p-25;
        double squares = 0;
        for (size_t i = 0; i < n; i++) {
            double off = fabs((double)o[at + i] - (double)want[i]);
            squares += off * off;
            REQUIRE(off <= 2 * e * 4, "%s: seq %u, %u keys: o[%zu] is %.9g, wanted %.9g", what, s,
                    n_kv, i, (double)o[at + i], (double)want[i]);
        }
        REQUIRE(sqrt(squares / (double)n) <= (is->fast ? 0x1p-8 : 0x1p-17),
                "%s: seq %u: off by %.3g on average", what, s, sqrt(squares / (double)n));
        for (size_t i = 0; i < n / is->dim; i++)
            REQUIRE(lse[at / is->dim + i] == want_lse[i] || /* both -Inf: it sees nothing */
                        fabs((double)lse[at / is->dim + i] - (double)want_lse[i]) <= 2 * e,
                    "%s: seq %u: lse[%zu] is %.9g, wanted %.9g", what, s, i,
                    (double)lse[at / is->dim + i], (double)want_lse[i]);
    }
}

typedef kvc_status (*prefill_fn)(kvk_cuda *cuda, const kvk_cuda_prefill_args *args,
                                 kvk_stream *stream);

/* Results that are fetched twice, and what they were filled with before. */
typedef struct filled {
    void *on_device;
    size_t len_bytes, query_bytes;
    const uint8_t *was[2];
} filled;

static void fill(const filled *f)
{
    OK(kvk_cuda_fill(gpu(), f->on_device, 0xee, f->len_bytes, gpu_stream()));
}

/* The same bits both times; and sequence 1 has one query, so that the next was not touched. */
static void require_same(const chunk_batch *b, const filled *f, const char *what)
{
    const chunk_case *is = b->is;

    REQUIRE(memcmp(f->was[0], f->was[1], f->len_bytes) == 0, "%s: not the same again", what);
    for (size_t i = 0; is->n_seqs > 1 && is->n_q > 1 && i < f->query_bytes; i++)
        REQUIRE(f->was[0][(is->n_q + 1) * f->query_bytes + i] == 0xee, "%s: beyond, byte %zu", what,
                i);
}

/* One form of the op, twice. */
static void run_form(chunk_batch *b, prefill_fn prefill, const char *what)
{
    const chunk_case *is = b->is;
    size_t queries = (size_t)is->n_seqs * is->n_q, lse_bytes = (size_t)is->heads * 4;
    filled o = {b->a.o, queries * lse_bytes * is->dim, lse_bytes * is->dim, {NULL, NULL}};
    filled lse = {b->a.lse, queries * lse_bytes, lse_bytes, {NULL, NULL}};

    for (int i = 0; i < 2; i++) {
        fill(&o);
        fill(&lse);
        OK(kvk_cuda_fill(gpu(), b->a.workspace, 0xff, b->a.workspace_bytes, gpu_stream()));
        OK(prefill(gpu(), &b->a, gpu_stream()));
        o.was[i] = fetched(o.on_device, o.len_bytes);
        lse.was[i] = fetched(lse.on_device, lse.len_bytes);
    }
    compare(b, what);
    require_same(b, &o, what);
    require_same(b, &lse, what);
}

static void run_case(numbers *from, const chunk_case *is)
{
    chunk_batch b = {.is = is};

    make_batch(from, &b);
    REQUIRE(kvki_cuda_prefill_splits(&b.a) == is->splits, "%u queries over %u: %u splits, not %u",
            is->n_q, is->stride, kvki_cuda_prefill_splits(&b.a), is->splits);
    for (uint32_t s = 0; s < is->n_seqs; s++)
        make_want(&b, s);
    for (int portable = 0; portable < 2; portable++) {
        char what[112];
        (void)snprintf(
            what, sizeof(what), "%u/%u heads of %u, %u listed, %u queries, dtype %d%s%s%s",
            is->heads, is->kv_heads, is->dim, is->stride, is->n_q, (int)is->dtype,
            is->rotated ? ", rotated" : "", is->fast ? ", fast" : "", portable ? ", portable" : "");
        run_form(&b, portable ? kvki_cuda_prefill_portable : kvk_cuda_prefill, what);
    }
    release_all();
}

static void refuse_bad(numbers *from)
{
    static const chunk_case is = {4, 2, 64, 10, 5, KVK_BF16, false, false, 0, KVK_CUDA_OWN_CHUNK,
                                  3, 1};
    chunk_batch b = {.is = &is};
    kvk_cuda_prefill_args bad[10];

    make_batch(from, &b);
    for (int i = 0; i < 10; i++)
        bad[i] = b.a;
    bad[0].n_q = KVK_CUDA_CHUNK_MAX + 1;
    bad[1].n_q_heads = 5;
    bad[2].dtype = KVK_F32;
    bad[3].row_bytes = 128; /* V leaves the row */
    bad[4].workspace_bytes--;
    bad[5].chunk = NULL;
    bad[6].stride = 0;
    bad[7].scale = NAN;
    bad[8].own = KVK_CUDA_OWN_NONE; /* with a chunk */
    bad[9].chunk = (const char *)b.a.chunk + 8;
    for (int i = 0; i < 10; i++)
        REQUIRE(kvk_cuda_prefill(gpu(), &bad[i], gpu_stream()) == KVC_INVALID, "argument %d", i);
    b.a.head_dim = 32; /* narrower: it fits, and is not built */
    REQUIRE(kvk_cuda_prefill(gpu(), &b.a, gpu_stream()) == KVC_UNSUPPORTED, "dimension 32");
    release_all();
}

/* Small enough for every tool of compute-sanitizer: rings that wrap, with the keys in parts and
 * not, both forms, exact and fast. */
void cuda_case_prefill_edges(numbers *from)
{
    static const chunk_case cases[] = {
        {8, 8, 128, 1100, 70, KVK_BF16, true, false, 0, KVK_CUDA_OWN_CHUNK, 3, 5},
        {32, 32, 64, 500, 70, KVK_BF16, false, true, 0, KVK_CUDA_OWN_LISTED, 3, 1},
        {4, 2, 64, 200, 5, KVK_E4M3_SCALED, true, false, 0, KVK_CUDA_OWN_NONE, 1, 4},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        run_case(from, &cases[i]);
    refuse_bad(from);
}

void cuda_case_prefill(numbers *from)
{
    static const chunk_case cases[] = {
        {32, 8, 128, 2700, 512, KVK_BF16, true, false, 0, KVK_CUDA_OWN_CHUNK, 3, 1},
        {32, 8, 128, 2700, 512, KVK_BF16, true, true, 0, KVK_CUDA_OWN_CHUNK, 3, 1},
        {9, 3, 64, 333, 130, KVK_BF16, true, false, 0, KVK_CUDA_OWN_CHUNK, 3, 3},
        {9, 3, 64, 333, 130, KVK_BF16, false, true, 0, KVK_CUDA_OWN_CHUNK, 3, 3},
        {8, 8, 128, 17, 1, KVK_BF16, false, false, 0, KVK_CUDA_OWN_CHUNK, 3, 2},
        {16, 2, 64, 64, 64, KVK_F16, true, false, 20, KVK_CUDA_OWN_CHUNK, 3, 2},
        {28, 4, 128, 65, 33, KVK_E4M3_SCALED, true, false, 0, KVK_CUDA_OWN_CHUNK, 3, 2},
        {32, 8, 128, 300, 200, KVK_E4M3_SCALED, true, true, 0, KVK_CUDA_OWN_CHUNK, 3, 1},
        {5, 1, 64, 31, 129, KVK_I8_SCALED, true, false, 0, KVK_CUDA_OWN_CHUNK, 3, 4},
        {12, 2, 128, 1, 257, KVK_I8_SCALED, false, true, 30, KVK_CUDA_OWN_CHUNK, 3, 1},
        {4, 2, 64, 128, 2, KVK_F16, false, true, 0, KVK_CUDA_OWN_CHUNK, 3, 2},
        {32, 8, 128, 4608, 512, KVK_BF16, true, false, 0, KVK_CUDA_OWN_LISTED, 3, 1},
        {32, 8, 128, 2176, 512, KVK_BF16, false, false, 0, KVK_CUDA_OWN_NONE, 3, 1},
        {9, 3, 64, 333, 130, KVK_BF16, true, true, 0, KVK_CUDA_OWN_LISTED, 3, 3},
        {9, 3, 64, 333, 130, KVK_E4M3_SCALED, true, false, 0, KVK_CUDA_OWN_NONE, 3, 3},
        {9, 3, 64, 130, 130, KVK_BF16, true, false, 0, KVK_CUDA_OWN_LISTED, 3, 3},
        {8, 4, 64, 112, 1, KVK_BF16, true, false, 0, KVK_CUDA_OWN_LISTED, 3, 2},
        {8, 4, 64, 56, 1, KVK_BF16, true, false, 0, KVK_CUDA_OWN_NONE, 3, 2},
        {32, 8, 128, 3500, 128, KVK_BF16, true, true, 0, KVK_CUDA_OWN_CHUNK, 3, 1},
        {64, 8, 128, 1000, 64, KVK_BF16, true, false, 0, KVK_CUDA_OWN_CHUNK, 3, 1},
        {8, 8, 64, 128, 128, KVK_F16, false, true, 0, KVK_CUDA_OWN_LISTED, 3, 2},
        {8, 1, 128, 129, 127, KVK_BF16, true, true, 25, KVK_CUDA_OWN_CHUNK, 3, 2},
        /* As a worker has them: one sequence, and several tiles a ring in each part of the keys. */
        {32, 8, 128, 3500, 128, KVK_BF16, true, false, 0, KVK_CUDA_OWN_NONE, 1, 4},
        {32, 8, 128, 3500, 128, KVK_BF16, true, true, 0, KVK_CUDA_OWN_CHUNK, 1, 4},
        {32, 8, 128, 2176, 128, KVK_E4M3_SCALED, true, false, 0, KVK_CUDA_OWN_LISTED, 1, 4},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        run_case(from, &cases[i]);
}
