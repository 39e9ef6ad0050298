/* cases_rows.c: convert, mean, group_sum, rope, project, quantize, merge, cosine, gather. */
#include "cases.h"

typedef struct shape {
    uint32_t n, heads, dim;
    size_t pad_bytes; /* stride beyond the row */
} shape;

static const shape shapes[] = {{0, 2, 8, 0},   {1, 1, 2, 0},    {1, 3, 64, 0}, {7, 3, 22, 6},
                               {33, 2, 66, 2}, {130, 9, 64, 0}, {3, 1, 130, 1}};

#define N_SHAPES (sizeof(shapes) / sizeof(shapes[0]))

static kvk_rows rows_of(support_random *random, uint32_t n, size_t width, size_t pad,
                        kvk_dtype dtype)
{
    size_t stride = width * kvk_dtype_bytes(dtype) + pad;
    return (kvk_rows){encode_rows(random_floats(random, n * width), n, width, stride, dtype),
                      stride, dtype};
}

static float at(const kvk_rows *rows, size_t i, size_t j)
{
    return decoded((const char *)rows->data + i * rows->stride_bytes, rows->dtype, j);
}

void case_convert(const subject *s, support_random *random)
{
    for (size_t t = 0; t < N_SHAPES * 4; t++) {
        shape p = shapes[t / 4];
        uint32_t width = p.heads * p.dim;
        kvk_rows in = rows_of(random, p.n, width, p.pad_bytes, all_dtypes[t % 4]);
        float *out = get_floats(p.n * width);
        CALL(s, convert, .in = in, .n = p.n, .width = width, .out = out);
        for (size_t i = 0; i < p.n * (size_t)width; i++)
            assert_near(s, "convert", i, (double)out[i], (double)at(&in, i / width, i % width), 0);
        free_all();
    }
    kvk_rows in = rows_of(random, 2, 4, 0, KVK_F32);
    float out[8] = {5};
    REFUSE(s, convert, .in = in, .n = 2, .width = 0, .out = out);
    REFUSE(s, convert, .in = in, .n = 2, .width = 4, .out = NULL);
    REFUSE(s, convert, .in = in, .n = 2, .width = 5, .out = out); /* stride below the row */
    in.dtype = (kvk_dtype)9;
    REFUSE(s, convert, .in = in, .n = 2, .width = 4, .out = out);
    in = (kvk_rows){NULL, 16, KVK_F32};
    REFUSE(s, convert, .in = in, .n = 2, .width = 4, .out = out);
    assert_true(out[0] == 5);
}

void case_mean(const subject *s, support_random *random)
{
    for (size_t t = 0; t < N_SHAPES * 4; t++) {
        shape p = shapes[t / 4];
        uint32_t width = p.heads * p.dim;
        kvk_rows in = rows_of(random, p.n, width, p.pad_bytes, all_dtypes[t % 4]);
        float *got = get_floats(width), *want = get_floats(width);
        CALL(s, mean, .in = in, .n = p.n, .width = width, .out = got);
        CALL(reference(), mean, .in = in, .n = p.n, .width = width, .out = want);
        for (size_t j = 0; j < width; j++)
            assert_near(s, "mean", j, (double)got[j], (double)want[j], 1e-6);
        free_all();
    }
    kvk_rows in = rows_of(random, 2, 4, 0, KVK_F32);
    REFUSE(s, mean, .in = in, .n = 2, .width = 4, .out = NULL);
}

void case_group_sum(const subject *s, support_random *random)
{
    static const uint32_t heads[][2] = {{9, 3}, {4, 4}, {8, 1}, {32, 8}};
    float out[16] = {5};

    for (size_t t = 0; t < 16; t++) {
        uint32_t hq = heads[t / 4][0], hkv = heads[t / 4][1], d = 6 + (uint32_t)t, n = 5;
        kvk_rows in = rows_of(random, n, hq * d, 3, all_dtypes[t % 4]);
        float *got = get_floats(n * hkv * d), *want = get_floats(n * hkv * d);
        CALL(s, group_sum, in, n, hq, hkv, d, got);
        CALL(reference(), group_sum, in, n, hq, hkv, d, want);
        for (size_t i = 0; i < (size_t)n * hkv * d; i++)
            assert_near(s, "group_sum", i, (double)got[i], (double)want[i], 127 * 8 * 1e-6);
        CALL(s, group_sum, in, 0, hq, hkv, d, NULL);
        free_all();
    }
    kvk_rows in = rows_of(random, 1, 16, 0, KVK_F32);
    REFUSE(s, group_sum, in, 1, 4, 3, 4, out); /* 4 heads do not share out over 3 */
    REFUSE(s, group_sum, in, 1, 4, 0, 4, out);
    REFUSE(s, group_sum, in, 1, 0, 1, 4, out);
    assert_true(out[0] == 5);
}

void case_rope(const subject *s, support_random *random)
{
    static const int32_t special[] = {0, 1, -1, 511, 1 << 20, INT32_MAX, INT32_MIN, 123456789};
    kvk_rope_params params = {.theta = 500000};
    float out[8] = {5};

    for (size_t t = 0; t < N_SHAPES * 4; t++) {
        shape p = shapes[t / 4];
        size_t n = (size_t)p.n * p.heads * p.dim;
        kvk_rows in = rows_of(random, p.n, p.heads * p.dim, p.pad_bytes, all_dtypes[t % 4]);
        double *freq = get(p.dim * sizeof(double));
        int32_t *positions = get(p.n * sizeof(int32_t));
        float *got = get_floats(n), *want = get_floats(n);
        assert_ok(kvk_rope_inv_freq(&params, p.dim, freq));
        for (size_t i = 0; i < p.n; i++)
            positions[i] = i < 8 ? special[i] : (int32_t)support_below(random, 1 << 20);
        for (int form = 0; form < 3; form++) {
            const double *f = form == 2 ? NULL : freq;
            const int32_t *pos = form == 0 ? positions : NULL;
            CALL(s, rope, in, p.n, p.heads, p.dim, f, pos, 4096, got);
            CALL(reference(), rope, in, p.n, p.heads, p.dim, f, pos, 4096, want);
            for (size_t i = 0; i < n; i++) /* |x| <= 127: two products, one sum, rounded angles */
                assert_near(s, "rope", i, (double)got[i], (double)want[i],
                            (t % 4 == 3 ? 127 : 4) * 4 * 0x1p-24);
        }
        free_all();
    }
    kvk_rows in = rows_of(random, 1, 8, 0, KVK_F32);
    REFUSE(s, rope, in, 1, 1, 7, NULL, NULL, 0, out);
    REFUSE(s, rope, in, 1, 0, 8, NULL, NULL, 0, out);
    REFUSE(s, rope, in, 1, 1, 8, NULL, NULL, 0, NULL);
    assert_true(out[0] == 5);
}

static void compare_project(const subject *s, const kvk_project_args *a)
{
    size_t n = (size_t)a->n * a->n_heads * a->dim_out;
    kvk_project_args mine = *a, truth = *a;
    mine.out = get_floats(n);
    truth.out = get_floats(n);

    assert_ok(s->ops->project(s->be, &mine, NULL));
    assert_ok(reference()->ops->project(reference()->be, &truth, NULL));
    for (size_t o = 0; o < n; o++) {
        size_t col = o % a->dim_out, head = o / a->dim_out % a->n_heads;
        size_t i = o / a->dim_out / a->n_heads;
        double sum = 0;
        for (size_t k = 0; k < a->dim_in; k++)
            sum += fabs((double)at(&a->in, i, head * a->dim_in + k) *
                        (double)a->proj[(head * a->dim_in + k) * a->dim_out + col]);
        assert_near(s, "project", o, (double)mine.out[o], (double)truth.out[o],
                    chain_bound(a->dim_in, sum));
    }
}

void case_project(const subject *s, support_random *random)
{
    static const uint32_t dims[][4] = {{0, 1, 4, 4},    {1, 1, 1, 1},     {1, 1, 192, 24},
                                       {50, 3, 64, 22}, {5, 1, 300, 126}, {7, 2, 16, 65}};
    float out[4] = {5};

    for (size_t t = 0; t < 24; t++) {
        const uint32_t *d = dims[t / 4];
        kvk_rows in = rows_of(random, d[0], d[1] * d[2], 4, all_dtypes[t % 4]);
        compare_project(s, &(kvk_project_args){in, d[0], d[1], d[2], d[3],
                                               random_floats(random, (size_t)d[1] * d[2] * d[3]),
                                               NULL});
        free_all();
    }
    kvk_rows in = rows_of(random, 1, 4, 0, KVK_F32);
    REFUSE(s, project, in, 1, 1, 4, 0, out, out);
    REFUSE(s, project, in, 1, 1, 4, 1, NULL, out);
    REFUSE(s, project, in, 1, UINT32_MAX, UINT32_MAX, UINT32_MAX, out, out);
    assert_true(out[0] == 5);
}

void case_quantize(const subject *s, support_random *random)
{
    static const uint32_t dims[][3] = {{0, 1, 4}, {1, 1, 1}, {9, 3, 22}, {40, 1, 126}, {3, 8, 65}};
    char out[64] = {5};
    float bad[4] = {1, 2, 3, 4};

    for (size_t t = 0; t < 5; t++) {
        const uint32_t *d = dims[t];
        size_t row = kvk_index_row_bytes(d[1], d[2]), stride = row + 3, n = d[0];
        float *in = random_floats(random, n * d[1] * d[2]);
        char *got = get(n * stride + 1), *want = get(n * stride + 1);
        for (size_t i = 0; i < n; i++) { /* scales from the subnormal to the huge */
            for (size_t j = 0; j < d[1] * d[2]; j++)
                in[i * d[1] * d[2] + j] *= ldexpf(1.0f, (int)(i * 6) - 140);
        }
        if (n > 2)
            memset(in, 0, d[2] * sizeof(float)); /* a zero head */
        CALL(s, quantize, in, d[0], d[1], d[2], got, stride);
        CALL(reference(), quantize, in, d[0], d[1], d[2], want, stride);
        assert_same_bits(s, "quantize", got, want, n * stride);
        free_all();
    }
    bad[2] = NAN;
    REFUSE(s, quantize, bad, 1, 1, 4, out, 6);
    bad[2] = INFINITY;
    REFUSE(s, quantize, bad, 1, 1, 4, out, 6);
    bad[2] = 0;
    REFUSE(s, quantize, bad, 2, 1, 2, out, 3); /* rows would overlap */
    REFUSE(s, quantize, bad, 1, 1, 0, out, 6);
    REFUSE(s, quantize, bad, 1, 1, 4, NULL, 6);
    assert_int_equal(out[0], 5);
}

void case_merge(const subject *s, support_random *random)
{
    static const uint32_t dims[] = {1, 64, 66, 257};
    float empty[2] = {-INFINITY, 7};

    for (size_t t = 0; t < 4; t++) {
        uint32_t n = 40, d = dims[t];
        size_t bytes = (size_t)n * d * sizeof(float);
        float *o_a = random_floats(random, (size_t)n * d), *lse_a = random_floats(random, n);
        float *o_b = random_floats(random, (size_t)n * d), *lse_b = random_floats(random, n);
        float *o_w = memcpy(get(bytes), o_a, bytes), *lse_w = get_floats(n);
        lse_a[0] = -INFINITY; /* empty a, empty b, both, far apart */
        lse_b[1] = -INFINITY;
        lse_a[2] = lse_b[2] = -INFINITY;
        lse_a[3] = 500;
        lse_b[4] = 500;
        memset(o_b + d, 0xff, d * sizeof(float)); /* NaN in what must not be read */
        memcpy(lse_w, lse_a, n * sizeof(float));
        CALL(s, merge, o_a, lse_a, o_b, lse_b, n, d);
        CALL(reference(), merge, o_w, lse_w, o_b, lse_b, n, d);
        for (size_t i = 0; i < (size_t)n * d; i++)
            assert_near(s, "merge", i, (double)o_a[i], (double)o_w[i], 4 * 4 * 0x1p-24);
        for (size_t i = 0; i < n; i++)
            assert_near(s, "lse", i, (double)lse_a[i], (double)lse_w[i], 500 * 0x1p-24);
        free_all();
    }
    CALL(s, merge, NULL, NULL, NULL, NULL, 0, 4);
    REFUSE(s, merge, empty, empty, empty, NULL, 1, 1);
    REFUSE(s, merge, empty, empty, empty, empty, 1, 0);
}

void case_cosine(const subject *s, support_random *random)
{
    for (uint32_t n = 0; n < 600; n += 37) {
        float *a = random_floats(random, n), *b = random_floats(random, n);
        double got = 9, want = 9;
        CALL(s, cosine, a, b, n, &got);
        CALL(reference(), cosine, a, b, n, &want);
        assert_near(s, "cosine", n, got, want, 1e-14);
        CALL(s, cosine, a, a, n, &got);
        assert_near(s, "cosine with itself", n, got, n > 0, 1e-14);
        free_all();
    }
    float zero[3] = {0}, one[3] = {1, 2, 3};
    double got = 9;
    CALL(s, cosine, zero, one, 3, &got);
    assert_true(got == 0);
    REFUSE(s, cosine, zero, NULL, 3, &got);
    REFUSE(s, cosine, zero, one, 3, NULL);
}

void case_gather(const subject *s, support_random *random)
{
    static const size_t row_bytes[] = {1, 6, 4096, 300001};

    for (size_t t = 0; t < 4; t++) {
        uint32_t n = t == 3 ? 3 : 500;
        size_t len = row_bytes[t] * 7;
        char *from = get(len), *got = get(n * row_bytes[t]);
        const void **rows = get(n * sizeof(*rows));
        support_fill(random, from, len);
        for (size_t i = 0; i < n; i++)
            rows[i] = from + support_below(random, 6 * row_bytes[t] + 1);
        CALL(s, gather, rows, n, row_bytes[t], got);
        for (size_t i = 0; i < n; i++)
            assert_same_bits(s, "gather", got + i * row_bytes[t], rows[i], row_bytes[t]);
        if (t == 0) {
            rows[n - 1] = NULL;
            memset(got, 5, n);
            REFUSE(s, gather, rows, n, row_bytes[t], got);
            assert_int_equal(got[0], 5);
        }
        free_all();
    }
    CALL(s, gather, NULL, 0, 8, NULL);
    REFUSE(s, gather, NULL, 0, 0, NULL);
}
