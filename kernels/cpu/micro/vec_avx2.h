/* vec_avx2.h: vec.h with AVX2, FMA and F16C. */
#include <immintrin.h>

#define ISA_NAME "avx2"
#define VF_LANES 8
#define GEMM_NV  2 /* 6 x 2 sums, 2 columns, 1 broadcast: 15 of 16 registers */

typedef __m256 vf;

KVKI_INLINE __m256i vf_mask(size_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

KVKI_INLINE vf vf_zero(void)
{
    return _mm256_setzero_ps();
}

KVKI_INLINE vf vf_set1(float x)
{
    return _mm256_set1_ps(x);
}

KVKI_INLINE vf vf_load(const float *p)
{
    return _mm256_loadu_ps(p);
}

KVKI_INLINE vf vf_load_n(const float *p, size_t n)
{
    return _mm256_maskload_ps(p, vf_mask(n));
}

KVKI_INLINE void vf_store(float *p, vf x)
{
    _mm256_storeu_ps(p, x);
}

KVKI_INLINE void vf_store_n(float *p, vf x, size_t n)
{
    _mm256_maskstore_ps(p, vf_mask(n), x);
}

KVKI_INLINE vf vf_add(vf a, vf b)
{
    return _mm256_add_ps(a, b);
}

KVKI_INLINE vf vf_sub(vf a, vf b)
{
    return _mm256_sub_ps(a, b);
}

KVKI_INLINE vf vf_mul(vf a, vf b)
{
    return _mm256_mul_ps(a, b);
}

/* a * b + c */
KVKI_INLINE vf vf_fma(vf a, vf b, vf c)
{
    return _mm256_fmadd_ps(a, b, c);
}

KVKI_INLINE vf vf_max(vf x, vf acc)
{
    return _mm256_max_ps(x, acc);
}

KVKI_INLINE float vf_hmax(vf x)
{
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    t = _mm_max_ss(t, _mm_movehdup_ps(t));
    return _mm_cvtss_f32(t);
}

KVKI_INLINE float vf_hsum(vf x)
{
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    t = _mm_add_ss(t, _mm_movehdup_ps(t));
    return _mm_cvtss_f32(t);
}

/* p * 2^z for integral z >= -126 and p in [0.5, 2) */
KVKI_INLINE vf vf_scale2(vf p, vf z)
{
    __m256i e =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(z), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(e));
}

KVKI_INLINE vf vf_round(vf x)
{
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* r, but 0 where x < bound */
KVKI_INLINE vf vf_zero_below(vf r, vf x, vf bound)
{
    return _mm256_and_ps(r, _mm256_cmp_ps(x, bound, _CMP_NLT_UQ));
}

/* bit j: a[j] >= b[j] */
KVKI_INLINE uint32_t vf_ge_bits(vf a, vf b)
{
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ));
}

KVKI_INLINE vf vf_load_f16(const void *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128(p));
}

KVKI_INLINE vf vf_load_bf16(const void *p)
{
    __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}

KVKI_INLINE vf vf_load_i8(const void *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)));
}

KVKI_INLINE vf vf_load_f16_n(const void *p, size_t n)
{
    uint16_t t[8] = {0};
    memcpy(t, p, 2 * n);
    return vf_load_f16(t);
}

KVKI_INLINE vf vf_load_bf16_n(const void *p, size_t n)
{
    uint16_t t[8] = {0};
    memcpy(t, p, 2 * n);
    return vf_load_bf16(t);
}

KVKI_INLINE vf vf_load_i8_n(const void *p, size_t n)
{
    int8_t t[8] = {0};
    memcpy(t, p, n);
    return vf_load_i8(t);
}

/* The bits are those of an f16 that is 2^8 too small; what would be 480 is NaN. */
KVKI_INLINE vf vf_load_e4m3(const void *p)
{
    __m128i b = _mm_cvtepu8_epi16(_mm_loadl_epi64(p));
    __m128i h = _mm_or_si128(_mm_slli_epi16(_mm_and_si128(b, _mm_set1_epi16(0x80)), 8),
                             _mm_slli_epi16(_mm_and_si128(b, _mm_set1_epi16(0x7f)), 7));
    vf x = _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(256));
    vf size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    return _mm256_blendv_ps(x, _mm256_set1_ps(__builtin_nanf("")),
                            _mm256_cmp_ps(size, _mm256_set1_ps(480), _CMP_EQ_OQ));
}

KVKI_INLINE vf vf_load_e4m3_n(const void *p, size_t n)
{
    uint8_t t[8] = {0};
    memcpy(t, p, n);
    return vf_load_e4m3(t);
}

/* lane i = sum of the lanes of a_i */
KVKI_INLINE v4f vf_sum4(vf a0, vf a1, vf a2, vf a3)
{
    vf t = _mm256_hadd_ps(_mm256_hadd_ps(a0, a1), _mm256_hadd_ps(a2, a3));
    return (v4f)_mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
}

/* x[i][j] becomes x[j][i]: pairs, fours, then the two 128-bit lanes */
KVKI_INLINE void vf_transpose(vf x[VF_LANES])
{
    vf t[VF_LANES];

    KVKI_UNROLL
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    KVKI_UNROLL
    for (int i = 0; i < 8; i += 4) {
        x[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        x[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        x[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        x[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    KVKI_UNROLL
    for (int i = 0; i < 4; i++) {
        vf low = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
        x[i] = low;
    }
}

/* Integers: 16 int16 at a time, sums in int32. */
#define VI_WORDS 16

typedef __m256i vi;

KVKI_INLINE vi vi_zero(void)
{
    return _mm256_setzero_si256();
}

KVKI_INLINE vi vi_load_words(const int16_t *p)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

/* n int8 widened; what is read beyond them meets zeros in q; bytes from end on are not read */
KVKI_INLINE vi vi_load_bytes(const char *p, size_t n, const char *end)
{
    int8_t t[VI_WORDS] = {0};

    if ((size_t)(end - p) >= VI_WORDS)
        return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)p));
    memcpy(t, p, n < VI_WORDS ? n : VI_WORDS);
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)t));
}

KVKI_INLINE vi vi_dot(vi acc, vi a, vi b)
{
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}

KVKI_INLINE v4i vi_sum4(vi a0, vi a1, vi a2, vi a3)
{
    vi t = _mm256_hadd_epi32(_mm256_hadd_epi32(a0, a1), _mm256_hadd_epi32(a2, a3));
    return (v4i)_mm_add_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1));
}
