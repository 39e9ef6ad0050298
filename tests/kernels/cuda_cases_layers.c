/*
 * cuda_cases_layers.c: the pieces of a small transformer on the device against the same in double;
 * and that a row's bits do not depend on the rows beside it.
 */
#include <math.h>
#include <string.h>

#include "cuda_cases.h"
#include "cuda_layers_oracle.h"

#define U 0x1p-24

static float *uploaded(const float *host, size_t n)
{
    return device_copy(host, n * sizeof(float));
}

static void check_near(const char *what, const float *got, const float *want, size_t n,
                       double bound)
{
    for (size_t i = 0; i < n; i++)
        REQUIRE(fabs((double)got[i] - (double)want[i]) <= bound, "%s [%zu]: %.9g, wanted %.9g",
                what, i, (double)got[i], (double)want[i]);
}

void cuda_case_embed(numbers *from)
{
    for (uint32_t before = 0; before <= 5; before += 5) {
        kvk_cuda_embed_args a = {.n = 77, .n_before = before, .n_taps = 8, .vocab = 50, .dim = 128};
        uint32_t tokens[82];
        float *table = normals(from, (size_t)50 * 128), *taps = normals(from, (size_t)8 * 128);
        for (size_t i = 0; i < 77 + before; i++)
            tokens[i] = number_below(from, 51); /* one of them has no embedding */
        a.tokens = device_copy(tokens, (77 + before) * sizeof(*tokens));
        a.table = uploaded(table, (size_t)50 * 128);
        a.taps = uploaded(taps, (size_t)8 * 128);
        a.out = device_bytes(sizeof(float) * 77 * 128);
        OK(kvk_cuda_embed(gpu(), &a, gpu_stream()));
        const float *got = fetched(a.out, sizeof(float) * 77 * 128);
        a.tokens = tokens;
        a.table = table;
        a.taps = taps;
        a.out = host_bytes(sizeof(float) * 77 * 128);
        oracle_embed(&a);
        check_near("embed", got, a.out, (size_t)77 * 128, 9 * U * 9 * 25);
    }
}

void cuda_case_rms_norm(numbers *from)
{
    static const uint32_t shapes[][3] = {
        {1, 4, 4}, {65, 128, 128}, {3, 1024, 4096}, {1000, 64, 64}};
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        size_t n = shapes[i][0], dim = shapes[i][1], stride = shapes[i][2];
        float *x = normals(from, n * stride), *weight = normals(from, dim);
        kvk_cuda_rms_norm_args a = {.x = uploaded(x, n * stride),
                                    .n = (uint32_t)n,
                                    .dim = (uint32_t)dim,
                                    .stride = (uint32_t)stride,
                                    .weight = uploaded(weight, dim),
                                    .out = device_bytes(n * dim * sizeof(float))};
        memset(x, 0, dim * sizeof(float)); /* a row of zeros stays one */
        upload((void *)(uintptr_t)a.x, x, dim * sizeof(float));
        OK(kvk_cuda_rms_norm(gpu(), &a, gpu_stream()));
        const float *got = fetched(a.out, n * dim * sizeof(float));
        a.x = x;
        a.weight = weight;
        a.out = host_bytes(n * dim * sizeof(float));
        oracle_rms_norm(&a);
        for (size_t j = 0; j < n * dim; j++)
            REQUIRE(fabs((double)got[j] - (double)a.out[j]) <=
                        ((double)dim / 2 + 8) * U * fabs((double)a.out[j]),
                    "norm of %zu [%zu]: %.9g, wanted %.9g", dim, j, (double)got[j],
                    (double)a.out[j]);
    }
}

/* Rows from `first` on alone, which must have the bits that they have among all. */
static void check_rows_alone(kvk_cuda_linear_args a, const float *out, const float *all,
                             uint32_t first)
{
    float *alone = device_copy(out, (size_t)a.n * a.n_out * sizeof(float));
    a.in += (size_t)first * a.n_in;
    a.out = alone + (size_t)first * a.n_out;
    a.n -= first;
    OK(kvk_cuda_linear(gpu(), &a, gpu_stream()));
    size_t len = (size_t)a.n * a.n_out * sizeof(float);
    REQUIRE(memcmp(fetched(a.out, len), all + (size_t)first * a.n_out, len) == 0,
            "rows from %u on have other bits alone", first);
}

void cuda_case_linear(numbers *from)
{
    static const uint32_t shapes[][3] = {{1, 128, 128}, {64, 128, 384}, {300, 256, 128},
                                         {65, 20, 68},  {129, 4, 4},    {63, 1000, 260}};
    for (size_t i = 0; i < 3 * sizeof(shapes) / sizeof(shapes[0]); i++) {
        const uint32_t *s = shapes[i / 3];
        size_t n_in = (size_t)s[0] * s[1], n_out = (size_t)s[0] * s[2], n_w = (size_t)s[1] * s[2];
        float *in = normals(from, n_in), *w = normals(from, n_w), *out = normals(from, n_out);
        kvk_cuda_linear_args a = {.in = uploaded(in, n_in),
                                  .n = s[0],
                                  .n_in = s[1],
                                  .n_out = s[2],
                                  .weight = uploaded(w, n_w),
                                  .form = (kvk_cuda_linear_form)(i % 3),
                                  .out = uploaded(out, n_out)};
        OK(kvk_cuda_linear(gpu(), &a, gpu_stream()));
        const float *got = fetched(a.out, n_out * sizeof(float));
        check_rows_alone(a, out, got, s[0] / 2);
        kvk_cuda_linear_args want = a;
        want.in = in;
        want.weight = w;
        want.out = out;
        oracle_linear(&want);
        /* the sum of |products| of normal numbers is below 1.2 a term, for gelu's slope 1.2 more */
        check_near("linear", got, out, n_out,
                   (s[1] + 2.0) * U * 1.5 * (s[1] + 8.0) + 0x1p-20 * 4 * sqrt((double)s[1]));
    }
}

void cuda_case_rotate(numbers *from)
{
    enum { N = 130, HEADS = 8, DIM = 32, STRIDE = 384, PERIOD = 64 };
    float *x = normals(from, (size_t)N * STRIDE), *angles = normals(from, (size_t)PERIOD * DIM);
    float *there = uploaded(angles, (size_t)PERIOD * DIM);
    kvk_cuda_rotate_args a = {.x = uploaded(x, (size_t)N * STRIDE),
                              .n = N,
                              .stride = STRIDE,
                              .n_heads = HEADS,
                              .head_dim = DIM,
                              .period = PERIOD,
                              .cos = there,
                              .sin = there + PERIOD * DIM / 2};
    OK(kvk_cuda_rotate(gpu(), &a, gpu_stream()));
    const float *got = fetched(a.x, (size_t)N * STRIDE * sizeof(float));
    a.x = x;
    a.cos = angles;
    a.sin = angles + PERIOD * DIM / 2;
    oracle_rotate(&a);
    check_near("rotate", got, x, (size_t)N * STRIDE, 3 * U * 40);
}

/* Rows of q, K and V side by side, as a product leaves them. */
static void check_local(numbers *from, kvk_cuda_local_attend_args a)
{
    size_t h = (size_t)a.n_heads * a.head_dim, n = a.n_keys * 3 * h, first = a.n_keys - a.n;
    float *rows = normals(from, n), *slopes = host_bytes(a.n_heads * sizeof(float));
    for (uint32_t i = 0; i < a.n_heads; i++)
        slopes[i] = exp2f(-8.0f * (float)(i + 1) / (float)a.n_heads);
    const float *there = uploaded(rows, n);
    a.q_stride = a.kv_stride = (uint32_t)(3 * h);
    a.scale = 1 / sqrtf((float)a.head_dim);
    a.q = there + first * 3 * h;
    a.k = there + h;
    a.v = there + 2 * h;
    a.slopes = uploaded(slopes, a.n_heads);
    a.out = device_bytes(a.n * h * sizeof(float));
    OK(kvk_cuda_local_attend(gpu(), &a, gpu_stream()));
    const float *got = fetched(a.out, a.n * h * sizeof(float));
    a.q = rows + first * 3 * h;
    a.k = rows + h;
    a.v = rows + 2 * h;
    a.slopes = slopes;
    a.out = host_bytes(a.n * h * sizeof(float));
    oracle_local_attend(&a);
    double e = (a.head_dim + 8.0) * U * (double)a.scale * 1.3 * a.head_dim +
               0x1p-20 * (1 + log2(a.n_keys + 1.0));
    check_near("local", got, a.out, a.n * h, 2 * e * 4.5);
}

void cuda_case_local_attend(numbers *from)
{
    static const uint32_t windows[][5] = {/* queries, keys, heads, dim, window */
                                          {1, 1, 4, 32, 128},    {1, 129, 4, 32, 128},
                                          {64, 192, 4, 32, 128}, {300, 428, 4, 32, 128},
                                          {130, 130, 2, 64, 17}, {129, 700, 3, 32, 512}};
    static const uint32_t chunks[][4] = {{64, 4, 32, 64}, {640, 4, 32, 64}, {90, 2, 64, 30}};
    for (size_t i = 0; i < sizeof(windows) / sizeof(windows[0]); i++)
        check_local(from, (kvk_cuda_local_attend_args){.n = windows[i][0],
                                                       .n_keys = windows[i][1],
                                                       .n_heads = windows[i][2],
                                                       .head_dim = windows[i][3],
                                                       .window = windows[i][4]});
    for (size_t i = 0; i < sizeof(chunks) / sizeof(chunks[0]); i++)
        check_local(from, (kvk_cuda_local_attend_args){.n = chunks[i][0],
                                                       .n_keys = chunks[i][0],
                                                       .n_heads = chunks[i][1],
                                                       .head_dim = chunks[i][2],
                                                       .chunk = chunks[i][3]});
}

/* What is wrong is refused before anything is enqueued. */
void cuda_case_layers_edges(numbers *from)
{
    float *p = uploaded(normals(from, 4096), 4096);
    const kvk_cuda_linear_args linear = {
        .in = p, .n = 4, .n_in = 8, .n_out = 8, .weight = p + 1024, .out = p + 2048};
    kvk_cuda_linear_args l[] = {linear, linear, linear, linear, linear};
    l[0].n_in = 6;
    l[1].n_out = 0;
    l[2].out = p;
    l[3].weight = NULL;
    l[4].weight = p + 1;
    for (size_t i = 0; i < sizeof(l) / sizeof(l[0]); i++)
        REQUIRE(kvk_cuda_linear(gpu(), &l[i], gpu_stream()) == KVC_INVALID, "linear %zu", i);
    const kvk_cuda_local_attend_args local = {.q = p,
                                              .k = p + 32,
                                              .v = p + 64,
                                              .n = 2,
                                              .n_keys = 2,
                                              .n_heads = 1,
                                              .head_dim = 32,
                                              .q_stride = 96,
                                              .kv_stride = 96,
                                              .chunk = 2,
                                              .scale = 1,
                                              .out = p + 2048};
    kvk_cuda_local_attend_args a[] = {local, local, local, local};
    a[0].chunk = 0;
    a[1].n_keys = 3;
    a[2].window = 4; /* and no slopes */
    a[3].kv_stride = 30;
    for (size_t i = 0; i < sizeof(a) / sizeof(a[0]); i++)
        REQUIRE(kvk_cuda_local_attend(gpu(), &a[i], gpu_stream()) == KVC_INVALID, "local %zu", i);
    a[0] = local;
    a[0].head_dim = 16;
    REQUIRE(kvk_cuda_local_attend(gpu(), &a[0], gpu_stream()) == KVC_UNSUPPORTED, "heads of 16");
    const kvk_cuda_embed_args embed = {.n_before = 3, .n_taps = 2, .dim = 4};
    REQUIRE(kvk_cuda_embed(gpu(), &embed, gpu_stream()) == KVC_INVALID, "more before than taps");
    const kvk_cuda_rms_norm_args norm = {.dim = 8, .stride = 4};
    REQUIRE(kvk_cuda_rms_norm(gpu(), &norm, gpu_stream()) == KVC_INVALID, "rows overlap");
    OK(kvk_cuda_linear(gpu(), &(kvk_cuda_linear_args){.n_in = 4, .n_out = 4}, gpu_stream()));
}
