/* vec_portable.h: vec.h in plain C with GCC's vector types of four floats. */
#include "../elem.h"

#define ISA_NAME "portable"
#define VF_LANES 4
#define GEMM_NV  2

typedef float vf __attribute__((vector_size(16)));
typedef v4i vf_int;

KVKI_INLINE vf vf_zero(void)
{
    return (vf){0, 0, 0, 0};
}

KVKI_INLINE vf vf_set1(float x)
{
    return (vf){x, x, x, x};
}

KVKI_INLINE vf vf_load(const float *p)
{
    vf x;
    memcpy(&x, p, sizeof(x));
    return x;
}

KVKI_INLINE vf vf_load_n(const float *p, size_t n)
{
    float t[VF_LANES] = {0};
    memcpy(t, p, n * sizeof(float));
    return vf_load(t);
}

KVKI_INLINE void vf_store(float *p, vf x)
{
    memcpy(p, &x, sizeof(x));
}

KVKI_INLINE void vf_store_n(float *p, vf x, size_t n)
{
    memcpy(p, &x, n * sizeof(float));
}

KVKI_INLINE vf vf_add(vf a, vf b)
{
    return a + b;
}

KVKI_INLINE vf vf_sub(vf a, vf b)
{
    return a - b;
}

KVKI_INLINE vf vf_mul(vf a, vf b)
{
    return a * b;
}

/* a * b + c */
KVKI_INLINE vf vf_fma(vf a, vf b, vf c)
{
    return a * b + c;
}

KVKI_INLINE vf vf_max(vf x, vf acc)
{
    vf_int greater = x > acc;
    return (vf)(((vf_int)x & greater) | ((vf_int)acc & ~greater));
}

KVKI_INLINE float vf_hmax(vf x)
{
    float a = x[0] > x[1] ? x[0] : x[1];
    float b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
}

KVKI_INLINE float vf_hsum(vf x)
{
    return (x[0] + x[2]) + (x[1] + x[3]);
}

/* round to nearest even, for |x| < 2^22 */
KVKI_INLINE vf vf_round(vf x)
{
    vf magic = vf_set1(0x1.8p23f);
    return (x + magic) - magic;
}

/* p * 2^z for integral z >= -126 and p in [0.5, 2) */
KVKI_INLINE vf vf_scale2(vf p, vf z)
{
    vf_int e = (vf_int)(z + vf_set1(0x1.8p23f)) - (vf_int)vf_set1(0x1.8p23f);
    return p * (vf)((e + 127) << 23);
}

/* r, but 0 where x < bound */
KVKI_INLINE vf vf_zero_below(vf r, vf x, vf bound)
{
    vf_int below = x < bound;
    return (vf)((vf_int)r & ~below);
}

/* bit j: a[j] >= b[j] */
KVKI_INLINE uint32_t vf_ge_bits(vf a, vf b)
{
    vf_int m = a >= b;
    return (m[0] & 1u) | (m[1] & 2u) | (m[2] & 4u) | (m[3] & 8u);
}

KVKI_INLINE vf vf_load_elems(const void *p, kvk_dtype dtype, size_t n)
{
    vf x = vf_zero();
    for (size_t i = 0; i < n; i++)
        x[i] = kvki_elem(p, dtype, i);
    return x;
}

KVKI_INLINE vf vf_load_f16_n(const void *p, size_t n)
{
    return vf_load_elems(p, KVK_F16, n);
}

KVKI_INLINE vf vf_load_bf16_n(const void *p, size_t n)
{
    return vf_load_elems(p, KVK_BF16, n);
}

KVKI_INLINE vf vf_load_i8_n(const void *p, size_t n)
{
    return vf_load_elems(p, KVK_I8, n);
}

KVKI_INLINE vf vf_load_e4m3_n(const void *p, size_t n)
{
    return vf_load_elems(p, KVK_E4M3_SCALED, n);
}

KVKI_INLINE vf vf_load_e4m3(const void *p)
{
    return vf_load_e4m3_n(p, VF_LANES);
}

KVKI_INLINE vf vf_load_f16(const void *p)
{
    return vf_load_f16_n(p, VF_LANES);
}

KVKI_INLINE vf vf_load_bf16(const void *p)
{
    return vf_load_bf16_n(p, VF_LANES);
}

KVKI_INLINE vf vf_load_i8(const void *p)
{
    return vf_load_i8_n(p, VF_LANES);
}

/* lane i = sum of the lanes of a_i */
KVKI_INLINE v4f vf_sum4(vf a0, vf a1, vf a2, vf a3)
{
    return (v4f){vf_hsum(a0), vf_hsum(a1), vf_hsum(a2), vf_hsum(a3)};
}

/* x[i][j] becomes x[j][i] */
KVKI_INLINE void vf_transpose(vf x[VF_LANES])
{
    vf t[VF_LANES];

    for (int i = 0; i < VF_LANES; i++)
        t[i] = (vf){x[0][i], x[1][i], x[2][i], x[3][i]};
    memcpy(x, t, sizeof(t));
}

/* Integers: 8 int16 at a time in a plain array, sums in int32. */
#define VI_WORDS 8

typedef struct vi {
    int32_t x[VI_WORDS];
} vi;

KVKI_INLINE vi vi_zero(void)
{
    return (vi){{0}};
}

KVKI_INLINE vi vi_load_words(const int16_t *p)
{
    vi v;
    for (int i = 0; i < VI_WORDS; i++)
        v.x[i] = p[i];
    return v;
}

/* n int8 widened, the rest zero */
KVKI_INLINE vi vi_load_bytes(const char *p, size_t n, const char *end)
{
    int8_t t[VI_WORDS] = {0};
    vi v;

    (void)end;
    memcpy(t, p, n < VI_WORDS ? n : VI_WORDS);
    for (int i = 0; i < VI_WORDS; i++)
        v.x[i] = t[i];
    return v;
}

KVKI_INLINE vi vi_dot(vi acc, vi a, vi b)
{
    for (int i = 0; i < VI_WORDS; i++)
        acc.x[i] += a.x[i] * b.x[i];
    return acc;
}

KVKI_INLINE int32_t vi_sum(vi a)
{
    int32_t sum = 0;
    for (int i = 0; i < VI_WORDS; i++)
        sum += a.x[i];
    return sum;
}

KVKI_INLINE v4i vi_sum4(vi a0, vi a1, vi a2, vi a3)
{
    return (v4i){vi_sum(a0), vi_sum(a1), vi_sum(a2), vi_sum(a3)};
}
