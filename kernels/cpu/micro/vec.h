/*
 * vec.h: one vector of floats, as wide as the isa has. The micro headers are written in these words
 * only. KVKI_ISA_AVX512 or KVKI_ISA_AVX2 picks the intrinsics; with neither, GCC's vector types of
 * four floats serve any machine (there vf_fma rounds twice: no isa below promises a fused one).
 *
 * vf_max(x, acc) gives acc where x is NaN. *_n forms touch only the first n lanes (n < VF_LANES).
 */
#ifndef KVKI_VEC_H
#define KVKI_VEC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__clang__)
#define KVKI_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVKI_UNROLL _Pragma("GCC unroll 16")
#endif

#define KVKI_INLINE static inline __attribute__((always_inline, unused))

/* Four results at a time: what is left of four vectors when their lanes are summed. */
typedef float v4f __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));

#if defined(KVKI_ISA_AVX512)
#include "vec_avx512.h"
#elif defined(KVKI_ISA_AVX2)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

/* The bits of a vector, for masks: a comparison of two vf gives all ones where it holds. */
typedef int32_t vf_bits __attribute__((vector_size(4 * VF_LANES)));

KVKI_INLINE vf vf_select(vf_bits mask, vf yes, vf no)
{
    return (vf)(((vf_bits)yes & mask) | ((vf_bits)no & ~mask));
}

KVKI_INLINE v4f v4f_of(v4i x)
{
    return __builtin_convertvector(x, v4f);
}

/* The first n <= 4 lanes. */
KVKI_INLINE void v4f_store_n(float *p, v4f x, uint32_t n)
{
    if (n == 4)
        memcpy(p, &x, sizeof(x));
    else
        memcpy(p, &x, n * sizeof(float));
}

#define GEMM_PANEL (GEMM_NV * VF_LANES)

#endif
