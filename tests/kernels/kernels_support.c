/* kernels_support.c: see kernels_support.h. Single-threaded. */
#include "kernels_support.h"

#define POINTERS_MAX 4096

static void *pointers[POINTERS_MAX];
static size_t n_pointers;

const kvk_dtype all_dtypes[4] = {KVK_F32, KVK_F16, KVK_BF16, KVK_I8};

void *get(size_t len_bytes)
{
    void *p = calloc(len_bytes ? len_bytes : 1, 1);

    assert_non_null(p);
    assert_true(n_pointers < POINTERS_MAX);
    pointers[n_pointers++] = p;
    return p;
}

float *get_floats(size_t n)
{
    return get(n * sizeof(float));
}

void free_all(void)
{
    while (n_pointers > 0)
        free(pointers[--n_pointers]);
}

void fill_floats(support_random *random, float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        double sum = 0;
        for (int t = 0; t < 4; t++)
            sum += (double)(support_next(random) >> 11) * 0x1p-53 - 0.5;
        x[i] = (float)(sum * 1.7 + 0.3 * sin((double)i * 0.011));
    }
}

float *random_floats(support_random *random, size_t n)
{
    float *x = get_floats(n);
    fill_floats(random, x, n);
    return x;
}

static uint16_t to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* For the values that fill_floats makes: finite, below 65504; subnormals come out right too. */
static uint16_t to_f16(float x)
{
    int exponent;
    double magnitude = fabs((double)x);
    (void)frexp(magnitude, &exponent); /* magnitude < 2^exponent */
    if (exponent < -13)
        exponent = -13;
    uint32_t mantissa = (uint32_t)rint(ldexp(magnitude, 11 - exponent));
    uint32_t bits = ((uint32_t)(exponent + 13) << 10) + mantissa;
    return (uint16_t)(bits | (signbit(x) ? 0x8000u : 0));
}

static void encode(char *at, kvk_dtype dtype, float x)
{
    uint16_t half = dtype == KVK_BF16 ? to_bf16(x) : dtype == KVK_F16 ? to_f16(x) : 0;
    float scaled = rintf(x * 20);
    int8_t byte = (int8_t)(scaled > 127 ? 127 : scaled < -127 ? -127 : scaled);

    if (dtype == KVK_F32)
        memcpy(at, &x, 4);
    else if (dtype == KVK_I8)
        memcpy(at, &byte, 1);
    else
        memcpy(at, &half, 2);
}

void *encode_rows(const float *x, size_t n, size_t width, size_t stride_bytes, kvk_dtype dtype)
{
    size_t bytes = kvk_dtype_bytes(dtype);
    /* exactly as long as it must be: a read past the last row is seen by the sanitizer */
    char *rows = get(n ? (n - 1) * stride_bytes + width * bytes : 1);

    for (size_t i = 0; i < n; i++) {
        for (size_t j = 0; j < width; j++)
            encode(rows + i * stride_bytes + j * bytes, dtype, x[i * width + j]);
    }
    return rows;
}

float decoded(const void *row, kvk_dtype dtype, size_t i)
{
    const char *at = (const char *)row + i * kvk_dtype_bytes(dtype);
    uint16_t half = 0;
    uint32_t bits = 0;
    int8_t byte = 0;
    float x = 0;

    if (dtype == KVK_F32) {
        memcpy(&x, at, 4);
        return x;
    }
    if (dtype == KVK_E4M3_SCALED) { /* 1.m * 2^(e - 7), or 0.m * 2^-6 where e is 0 */
        int e = (at[0] >> 3) & 15, m = at[0] & 7;
        double size = e ? ldexp(8 + m, e - 10) : ldexp(m, -9);
        return e == 15 && m == 7 ? NAN : (float)(at[0] & 0x80 ? -size : size);
    }
    if (dtype == KVK_I8 || dtype == KVK_I8_SCALED) {
        memcpy(&byte, at, 1);
        return (float)byte;
    }
    memcpy(&half, at, 2);
    if (dtype == KVK_BF16) {
        bits = (uint32_t)half << 16;
        memcpy(&x, &bits, 4);
        return x;
    }
    int exponent = (half >> 10) & 31;
    double magnitude =
        exponent ? ldexp(1024 + (half & 1023), exponent - 25) : ldexp(half & 1023, -24);
    return (float)(half & 0x8000 ? -magnitude : magnitude);
}

void assert_near(const subject *s, const char *what, size_t at, double got, double want,
                 double bound)
{
    if ((isnan(got) && isnan(want)) || got == want || fabs(got - want) <= bound)
        return;
    fail_msg("%s: %s[%zu] is %.9g, wanted %.9g within %.3g (off by %.3g)", s->label, what, at, got,
             want, bound, fabs(got - want));
}

void assert_same_bits(const subject *s, const char *what, const void *got, const void *want,
                      size_t len_bytes)
{
    const unsigned char *a = got, *b = want;

    for (size_t i = 0; i < len_bytes; i++) {
        if (a[i] != b[i])
            fail_msg("%s: %s differs at byte %zu of %zu", s->label, what, i, len_bytes);
    }
}

double chain_bound(size_t n, double sum)
{
    return (double)(n + 2) * 0x1p-24 * sum + 1e-37;
}
