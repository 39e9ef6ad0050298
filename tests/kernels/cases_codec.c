/* cases_codec.c: encode and decode of coded rows. */
#include <float.h>

#include "cases.h"

static const kvk_dtype coded[2] = {KVK_E4M3_SCALED, KVK_I8_SCALED};
static const kvk_dtype plain[3] = {KVK_F32, KVK_F16, KVK_BF16};
static const uint32_t shapes[][3] = {/* rows, heads, dims */
                                     {0, 1, 4},  {1, 1, 1},   {40, 3, 22},
                                     {9, 8, 65}, {5, 2, 128}, {3, 1, 300}};

/* The scale is the least bf16 that lets the largest element in. */
static void check_scale(const subject *s, size_t at, double scale, double max, double largest)
{
    double ulp = scale > 0 ? fmax(ldexp(1, ilogb(scale) - 7), 0x1p-133) : 0;

    if (max == 0)
        assert_near(s, "zero scale", at, scale, 0, 0);
    else if (scale * largest < max || (scale - ulp) * largest >= max)
        fail_msg("%s: scale %.9g of a head up to %.9g", s->label, scale, max);
}

/* No code is nearer to x than the one that was chosen, but for the rounding of the quotient. */
static void check_nearest(const subject *s, kvk_dtype dtype, double x, double scale, double got)
{
    for (int code = 0; code < 256; code++) {
        char byte = (char)code;
        double other = (double)decoded(&byte, dtype, 0) * scale;
        if (!isnan(other) && code != 0x80 &&
            fabs(x - other) * (1 + 0x1p-20) < fabs(x - got) * (1 - 0x1p-20))
            fail_msg("%s: %.9g became %.9g, though there is %.9g", s->label, x, got, other);
    }
}

static void check_slice(const subject *s, const kvk_encode_args *a, size_t row)
{
    const char *in = (const char *)a->in.data + row * a->in.stride_bytes;
    const char *slice = (const char *)a->out + row * a->out_stride_bytes;
    const char *scales = slice + (size_t)a->n_heads * a->dims;

    for (size_t head = 0; head < a->n_heads; head++) {
        double max = 0, scale = (double)decoded(scales, KVK_BF16, head);
        for (size_t t = 0; t < a->dims; t++)
            max = fmax(max, fabs((double)decoded(in, a->in.dtype, head * a->dims + t)));
        check_scale(s, row, scale, max, a->dtype == KVK_I8_SCALED ? 127 : 448);
        for (size_t t = 0; t < a->dims && row < 4; t++) {
            size_t at = head * a->dims + t;
            check_nearest(s, a->dtype, (double)decoded(in, a->in.dtype, at), scale,
                          (double)decoded(slice, a->dtype, at) * scale);
        }
    }
}

static void encode_shape(const subject *s, support_random *random, const uint32_t *d,
                         kvk_dtype from, kvk_dtype to)
{
    size_t width = (size_t)d[1] * d[2], n = d[0];
    size_t stride = kvk_slice_bytes(to, d[1], d[2]) + 3;
    float *x = random_floats(random, n * width);
    char *want = get(n * stride + 1);

    for (size_t i = 0; from != KVK_F16 && i < n * width; i++) /* scales from tiny to huge */
        x[i] *= ldexpf(1.0f, (int)(i / width * 6) - 120);
    for (size_t i = 0; i < n * width; i += 5) /* some below the least normal of their head */
        x[i] *= 0x1p-9f;
    if (n > 2)
        memset(x, 0, d[2] * sizeof(float)); /* a zero head */
    kvk_encode_args a = {.in = {encode_rows(x, n, width, width * kvk_dtype_bytes(from), from),
                                width * kvk_dtype_bytes(from), from},
                         .n = d[0],
                         .n_heads = d[1],
                         .dims = d[2],
                         .dtype = to,
                         .out = get(n * stride + 1),
                         .out_stride_bytes = stride};
    assert_ok(s->ops->encode(s->be, &a, NULL));
    for (size_t i = 0; i < n; i++)
        check_slice(s, &a, i);
    CALL(reference(), encode, a.in, a.n, a.n_heads, a.dims, to, want, stride);
    assert_same_bits(s, "encode", a.out, want, n * stride);
    free_all();
}

/* Heads up to the end of the stated range come back finite and within the bound; of larger ones
 * only the bits are said. */
static void encode_largest(const subject *s, kvk_dtype dtype, float top)
{
    float x[4] = {top, -top, top / 3, 1}, y[4];
    kvk_rows in = {x, sizeof(x), KVK_F32};
    char out[6], want[6];

    CALL(s, encode, in, 1, 1, 4, dtype, out, 6);
    CALL(reference(), encode, in, 1, 1, 4, dtype, want, 6);
    assert_same_bits(s, "encode", out, want, 6);
    if (top > 0x1p127f)
        return;
    CALL(s, decode, (kvk_rows){out, 6, dtype}, 1, 1, 4, y);
    double scale = (double)decoded(out + 4, KVK_BF16, 0);
    for (size_t t = 0; t < 4; t++)
        assert_near(s, "decoded", t, (double)y[t], (double)x[t],
                    dtype == KVK_I8_SCALED ? scale / 2 : fabs((double)x[t]) / 16 + scale / 1024);
}

void case_encode(const subject *s, support_random *random)
{
    char out[16] = {5};
    float bad[4] = {1, 2, 3, 4};
    kvk_rows in = {bad, 8, KVK_F32};

    for (size_t t = 0; t < 6 * 6; t++)
        encode_shape(s, random, shapes[t / 6], plain[t % 3], coded[t / 3 % 2]);
    for (size_t t = 0; t < 2; t++) {
        for (int i = 0; i <= 256; i++)
            encode_largest(s, coded[t], ldexpf(256.0f + (float)i, 118));
        encode_largest(s, coded[t], FLT_MAX);
    }
    REFUSE(s, encode, in, 2, 1, 2, KVK_I8, out, 4);
    REFUSE(s, encode, in, 2, 1, 2, (kvk_dtype)5, out, 4);
    REFUSE(s, encode, in, 2, 1, 2, KVK_E4M3_SCALED, out, 3); /* slices would overlap */
    REFUSE(s, encode, in, 2, 0, 2, KVK_E4M3_SCALED, out, 4);
    REFUSE(s, encode, in, 2, 1, 0, KVK_E4M3_SCALED, out, 4);
    REFUSE(s, encode, in, 2, 1, 2, KVK_E4M3_SCALED, NULL, 4);
    bad[2] = NAN;
    REFUSE(s, encode, in, 2, 1, 2, KVK_E4M3_SCALED, out, 4);
    bad[2] = -INFINITY;
    REFUSE(s, encode, in, 2, 1, 2, KVK_I8_SCALED, out, 4);
    bad[2] = 1;
    in.dtype = KVK_I8;
    REFUSE(s, encode, in, 2, 1, 2, KVK_I8_SCALED, out, 4);
    in = (kvk_rows){NULL, 8, KVK_F32};
    REFUSE(s, encode, in, 2, 1, 2, KVK_I8_SCALED, out, 4);
    assert_int_equal(out[0], 5);
}

/* Every code, the NaN among them, and a plain dtype refused. */
void case_decode(const subject *s, support_random *random)
{
    enum { HEADS = 2, DIMS = 130, WIDTH = HEADS * DIMS };
    static const char scales[4] = {0x20, 0x3f, (char)0xc0, 0x40}; /* 0.625 and 6 */
    float out[3 * WIDTH] = {0};
    char rows[3 * (WIDTH + 4)];

    for (size_t k = 0; k < 2; k++) {
        kvk_rows in = {rows, WIDTH + 4, coded[k]};
        for (size_t i = 0; i < 3 * WIDTH; i++)
            rows[i / WIDTH * (WIDTH + 4) + i % WIDTH] =
                (char)(i < WIDTH ? i : support_next(random) & 0xff);
        for (size_t i = 0; i < 3; i++)
            memcpy(rows + i * (WIDTH + 4) + WIDTH, scales, 4);
        CALL(s, decode, in, 3, HEADS, DIMS, out);
        for (size_t i = 0; i < 3 * WIDTH; i++)
            assert_near(s, "decode", i, (double)out[i],
                        (double)decoded(rows + i / WIDTH * (WIDTH + 4), coded[k], i % WIDTH) *
                            (i % WIDTH < DIMS ? 0.625 : 6),
                        0);
        REFUSE(s, decode, in, 3, HEADS, DIMS + 1, out);
        REFUSE(s, decode, in, 3, 0, DIMS, out);
        REFUSE(s, decode, in, 3, HEADS, DIMS, NULL);
    }
    REFUSE(s, decode, (kvk_rows){rows, WIDTH + 4, KVK_I8}, 3, HEADS, DIMS, out);
    CALL(s, decode, (kvk_rows){NULL, 0, KVK_I8_SCALED}, 0, 1, 1, NULL);
}
