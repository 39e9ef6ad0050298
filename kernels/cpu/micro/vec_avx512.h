/* vec_avx512.h: vec.h with AVX-512 F, BW, VL, DQ and VNNI. */
#include <immintrin.h>

#if defined(KVKI_ISA_AMX)
#define ISA_NAME "amx"
#else
#define ISA_NAME "avx512"
#endif
#define VF_LANES 16
#define GEMM_NV  4 /* 6 x 4 sums, 4 columns, 1 broadcast: 29 of 32 registers */

typedef __m512 vf;

KVKI_INLINE __mmask16 vf_mask(size_t n)
{
    return (__mmask16)((1u << n) - 1u);
}

KVKI_INLINE vf vf_zero(void)
{
    return _mm512_setzero_ps();
}

KVKI_INLINE vf vf_set1(float x)
{
    return _mm512_set1_ps(x);
}

KVKI_INLINE vf vf_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

KVKI_INLINE vf vf_load_n(const float *p, size_t n)
{
    return _mm512_maskz_loadu_ps(vf_mask(n), p);
}

KVKI_INLINE void vf_store(float *p, vf x)
{
    _mm512_storeu_ps(p, x);
}

KVKI_INLINE void vf_store_n(float *p, vf x, size_t n)
{
    _mm512_mask_storeu_ps(p, vf_mask(n), x);
}

KVKI_INLINE vf vf_add(vf a, vf b)
{
    return _mm512_add_ps(a, b);
}

KVKI_INLINE vf vf_sub(vf a, vf b)
{
    return _mm512_sub_ps(a, b);
}

KVKI_INLINE vf vf_mul(vf a, vf b)
{
    return _mm512_mul_ps(a, b);
}

/* a * b + c */
KVKI_INLINE vf vf_fma(vf a, vf b, vf c)
{
    return _mm512_fmadd_ps(a, b, c);
}

KVKI_INLINE vf vf_max(vf x, vf acc)
{
    return _mm512_max_ps(x, acc);
}

KVKI_INLINE float vf_hmax(vf x)
{
    return _mm512_reduce_max_ps(x);
}

KVKI_INLINE float vf_hsum(vf x)
{
    return _mm512_reduce_add_ps(x);
}

/* p * 2^z for integral z */
KVKI_INLINE vf vf_scale2(vf p, vf z)
{
    return _mm512_scalef_ps(p, z);
}

KVKI_INLINE vf vf_round(vf x)
{
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* r, but 0 where x < bound */
KVKI_INLINE vf vf_zero_below(vf r, vf x, vf bound)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), r);
}

/* bit j: a[j] >= b[j] */
KVKI_INLINE uint32_t vf_ge_bits(vf a, vf b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
}

KVKI_INLINE vf vf_load_f16(const void *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256(p));
}

KVKI_INLINE vf vf_load_f16_n(const void *p, size_t n)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(vf_mask(n), p));
}

KVKI_INLINE vf vf_of_bf16(__m256i x)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

KVKI_INLINE vf vf_load_bf16(const void *p)
{
    return vf_of_bf16(_mm256_loadu_si256(p));
}

KVKI_INLINE vf vf_load_bf16_n(const void *p, size_t n)
{
    return vf_of_bf16(_mm256_maskz_loadu_epi16(vf_mask(n), p));
}

KVKI_INLINE vf vf_load_i8(const void *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
}

KVKI_INLINE vf vf_load_i8_n(const void *p, size_t n)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(vf_mask(n), p)));
}

/* The bits are those of an f16 that is 2^8 too small; what would be 480 is NaN. */
KVKI_INLINE vf vf_of_e4m3(__m128i bytes)
{
    __m256i b = _mm256_cvtepu8_epi16(bytes);
    __m256i h = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(b, _mm256_set1_epi16(0x80)), 8),
                                _mm256_slli_epi16(_mm256_and_si256(b, _mm256_set1_epi16(0x7f)), 7));
    vf x = _mm512_mul_ps(_mm512_cvtph_ps(h), _mm512_set1_ps(256));
    __mmask16 nan = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(480), _CMP_EQ_OQ);
    return _mm512_mask_mov_ps(x, nan, _mm512_set1_ps(__builtin_nanf("")));
}

KVKI_INLINE vf vf_load_e4m3(const void *p)
{
    return vf_of_e4m3(_mm_loadu_si128(p));
}

KVKI_INLINE vf vf_load_e4m3_n(const void *p, size_t n)
{
    return vf_of_e4m3(_mm_maskz_loadu_epi8(vf_mask(n), p));
}

/* lane i = sum of the lanes of a_i */
KVKI_INLINE v4f vf_sum4(vf a0, vf a1, vf a2, vf a3)
{
    vf t01 = _mm512_add_ps(_mm512_unpacklo_ps(a0, a1), _mm512_unpackhi_ps(a0, a1));
    vf t23 = _mm512_add_ps(_mm512_unpacklo_ps(a2, a3), _mm512_unpackhi_ps(a2, a3));
    __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(t01), _mm512_castps_pd(t23));
    __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(t01), _mm512_castps_pd(t23));
    vf t = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
    __m256 u = _mm256_add_ps(_mm512_castps512_ps256(t), _mm512_extractf32x8_ps(t, 1));
    return (v4f)_mm_add_ps(_mm256_castps256_ps128(u), _mm256_extractf128_ps(u, 1));
}

/* x[i][j] becomes x[j][i]: pairs, fours, then the four 128-bit lanes */
KVKI_INLINE void vf_transpose(vf x[VF_LANES])
{
    vf t[VF_LANES];

    KVKI_UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    KVKI_UNROLL
    for (int i = 0; i < 16; i += 4) {
        __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
        __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
        x[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        x[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        x[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        x[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    KVKI_UNROLL
    for (int i = 0; i < 4; i++) {
        vf low01 = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x44);
        vf low23 = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x44);
        vf high01 = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xee);
        vf high23 = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xee);
        x[i] = _mm512_shuffle_f32x4(low01, low23, 0x88);
        x[i + 4] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
        x[i + 8] = _mm512_shuffle_f32x4(high01, high23, 0x88);
        x[i + 12] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
    }
}

/* Integers: 32 int16 at a time, sums in int32. */
#define VI_WORDS 32

typedef __m512i vi;

KVKI_INLINE vi vi_zero(void)
{
    return _mm512_setzero_si512();
}

KVKI_INLINE vi vi_load_words(const int16_t *p)
{
    return _mm512_loadu_si512(p);
}

/* n (at most VI_WORDS) int8 widened; bytes at and after end are not read */
KVKI_INLINE vi vi_load_bytes(const char *p, size_t n, const char *end)
{
    (void)end;
    if (n >= VI_WORDS)
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)p));
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((__mmask32)((1u << n) - 1u), p));
}

KVKI_INLINE vi vi_dot(vi acc, vi a, vi b)
{
    return _mm512_dpwssd_epi32(acc, a, b);
}

KVKI_INLINE v4i vi_sum4(vi a0, vi a1, vi a2, vi a3)
{
    vi t01 = _mm512_add_epi32(_mm512_unpacklo_epi32(a0, a1), _mm512_unpackhi_epi32(a0, a1));
    vi t23 = _mm512_add_epi32(_mm512_unpacklo_epi32(a2, a3), _mm512_unpackhi_epi32(a2, a3));
    vi t = _mm512_add_epi32(_mm512_unpacklo_epi64(t01, t23), _mm512_unpackhi_epi64(t01, t23));
    __m256i u = _mm256_add_epi32(_mm512_castsi512_si256(t), _mm512_extracti64x4_epi64(t, 1));
    return (v4i)_mm_add_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
}
