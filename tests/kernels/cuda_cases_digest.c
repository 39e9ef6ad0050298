/* cuda_cases_digest.c: index rows and index queries against group_sum, project and quantize. */
#include <math.h>
#include <string.h>

#include "cuda_cases.h"

static uint16_t *bf16_rows(numbers *from, size_t n)
{
    uint16_t *rows = host_bytes(n * 2);

    for (size_t i = 0; i < n; i++)
        rows[i] = bf16_of(normal(from));
    return rows;
}

/* got within the bound of project: (dim_in + 2) 2^-24 of the sum of |products|. */
static void compare_projected(const float *got, const float *x, const float *proj, uint32_t dim_in,
                              uint32_t dims, const char *what)
{
    for (uint32_t d = 0; d < dims; d++) {
        double sum = 0, size = 0;
        for (uint32_t i = 0; i < dim_in; i++) {
            double product = (double)x[i] * (double)proj[(size_t)i * dims + d];
            sum += product;
            size += fabs(product);
        }
        REQUIRE(fabs((double)got[d] - sum) <= (dim_in + 2) * 0x1p-24 * size + 1e-37,
                "%s: output %u of %u is %.9g, wanted %.9g", what, d, dims, (double)got[d], sum);
    }
}

/* Keys that lie in rows with something between them: the bytes of those that lie densely. */
static void compare_strided(kvk_cuda_digest_args a, const uint16_t *in, size_t width)
{
    size_t stride = width * 2 + 48, bytes = a.n * kvk_index_row_bytes(a.n_heads, a.dims);
    uint8_t *rows = host_bytes(a.n * stride);
    const void *dense = fetched(a.out, bytes);

    memset(rows, 0xee, a.n * stride);
    for (uint32_t i = 0; i < a.n; i++)
        memcpy(rows + i * stride, in + i * width, width * 2);
    a.in = device_copy(rows, a.n * stride);
    a.in_stride_bytes = stride;
    a.out = device_bytes(bytes);
    OK(kvk_cuda_digest(gpu(), &a, gpu_stream()));
    REQUIRE(memcmp(fetched(a.out, bytes), dense, bytes) == 0, "%u tokens, strided", a.n);
    a.in_stride_bytes = width * 2 - 2;
    REQUIRE(kvk_cuda_digest(gpu(), &a, gpu_stream()) == KVC_INVALID, "a stride below a row");
}

static void run_digest(numbers *from, uint32_t n, uint32_t heads_in, uint32_t dim, uint32_t heads,
                       uint32_t dims)
{
    size_t width = (size_t)heads_in * dim, dim_in = width / heads;
    size_t row = kvk_index_row_bytes(heads, dims), outputs = (size_t)n * heads * dims;
    uint16_t *in = bf16_rows(from, n * width);
    float *proj = normals(from, dim_in * heads * dims), *x = host_bytes(dim_in * 4);
    uint8_t *want = host_bytes(n * row);
    kvk_cuda_digest_args a = {.n = n,
                              .n_heads_in = heads_in,
                              .head_dim = dim,
                              .n_heads = heads,
                              .dims = dims,
                              .proj = device_copy(proj, dim_in * heads * dims * 4),
                              .projected = device_bytes(outputs * 4),
                              .out = device_bytes(n * row)};

    if (n > 2)
        memset(in + 2 * width, 0, width * 2); /* a zero row has scale 0 */
    a.in = device_copy(in, n * width * 2);
    OK(kvk_cuda_digest(gpu(), &a, gpu_stream()));
    const float *projected = fetched(a.projected, outputs * 4);
    for (size_t j = 0; j < (size_t)n * heads; j++) {
        for (size_t i = 0; i < dim_in; i++)
            x[i] = of_bf16(in[j / heads * width + j % heads * dim_in + i]);
        compare_projected(projected + j * dims, x, proj + j % heads * dim_in * dims,
                          (uint32_t)dim_in, dims, "digest");
    }
    CPU(false, quantize, projected, n, heads, dims, want, row);
    REQUIRE(memcmp(fetched(a.out, n * row), want, n * row) == 0,
            "%u tokens, %u heads of %u: other bytes than quantize's", n, heads, dims);
    compare_strided(a, in, width);
    release_all();
}

void cuda_case_digest(numbers *from)
{
    kvk_cuda_digest_args none = {.n = 0, .n_heads_in = 8, .head_dim = 128, .n_heads = 1, .dims = 4};

    run_digest(from, 1, 8, 128, 1, 126);
    run_digest(from, 300, 8, 128, 1, 126);
    run_digest(from, 5, 3, 64, 1, 24);
    run_digest(from, 33, 8, 128, 8, 32);
    run_digest(from, 7, 3, 64, 3, 34);
    run_digest(from, 4, 2, 64, 1, 256);
    run_digest(from, 3, 2, 64, 2, 1);
    OK(kvk_cuda_digest(gpu(), &none, gpu_stream()));
    none.n_heads = 3;
    REQUIRE(kvk_cuda_digest(gpu(), &none, gpu_stream()) == KVC_INVALID, "3 heads of 8");
    none.n_heads = 1;
    none.dims = 257;
    REQUIRE(kvk_cuda_digest(gpu(), &none, gpu_stream()) == KVC_INVALID, "257 dims");
}

/* Each query head by the matrix of its kv head. */
static void run_query_heads(numbers *from, uint32_t heads, uint32_t kv, uint32_t dim, uint32_t dims)
{
    enum { SEQS = 3 };
    size_t matrix = (size_t)dim * dims, n = (size_t)SEQS * heads;
    float *q = normals(from, n * dim), *proj = normals(from, kv * matrix);
    kvk_cuda_query_args a = {.q = device_copy(q, n * dim * 4),
                             .n_seqs = SEQS,
                             .n_q_heads = heads,
                             .n_kv_heads = kv,
                             .head_dim = dim,
                             .dims = dims,
                             .proj = device_copy(proj, kv * matrix * 4),
                             .out = device_bytes(n * dims * 4),
                             .per_head = 1};
    const float *out;

    OK(kvk_cuda_query(gpu(), &a, gpu_stream()));
    out = fetched(a.out, n * dims * 4);
    for (size_t i = 0; i < n; i++)
        compare_projected(out + i * dims, q + i * dim, proj + i % heads / (heads / kv) * matrix,
                          dim, dims, "query of a head");
    a.per_head = 2;
    REQUIRE(kvk_cuda_query(gpu(), &a, gpu_stream()) == KVC_INVALID, "per_head 2");
    release_all();
}

void cuda_case_query(numbers *from)
{
    static const uint32_t shapes[][4] = {/* query heads, kv heads, dim, dims */
                                         {32, 8, 128, 126},
                                         {9, 3, 64, 24},
                                         {8, 8, 128, 62},
                                         {5, 1, 33, 256},
                                         {2, 2, 1, 1}};

    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        enum { SEQS = 3 };
        uint32_t heads = shapes[i][0], kv = shapes[i][1], dim = shapes[i][2], dims = shapes[i][3];
        size_t width = (size_t)kv * dim;
        float *q = normals(from, (size_t)SEQS * heads * dim), *proj = normals(from, width * dims);
        float *sums = host_bytes(SEQS * width * 4);
        kvk_cuda_query_args a = {.q = device_copy(q, (size_t)SEQS * heads * dim * 4),
                                 .n_seqs = SEQS,
                                 .n_q_heads = heads,
                                 .n_kv_heads = kv,
                                 .head_dim = dim,
                                 .dims = dims,
                                 .proj = device_copy(proj, width * dims * 4),
                                 .out = device_bytes((size_t)SEQS * dims * 4)};
        OK(kvk_cuda_query(gpu(), &a, gpu_stream()));
        const float *out = fetched(a.out, (size_t)SEQS * dims * 4);
        CPU(false, group_sum, {q, (size_t)heads * dim * 4, KVK_F32}, SEQS, heads, kv, dim, sums);
        for (size_t s = 0; s < SEQS; s++)
            compare_projected(out + s * dims, sums + s * width, proj, (uint32_t)width, dims,
                              "query");
        a.n_q_heads = kv + 1;
        REQUIRE(kv == 1 || kvk_cuda_query(gpu(), &a, gpu_stream()) == KVC_INVALID, "uneven groups");
        release_all();
        run_query_heads(from, heads, kv, dim, dims);
    }
}
