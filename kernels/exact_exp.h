/*
 * exact_exp.h: an exponential in double whose bits are the same everywhere: on every C library, CPU
 * and GPU. For ops that promise equal bits; the libraries' own differ in the last bit.
 *
 * x = n ln 2 + r, |r| <= ln(2) / 2; the Taylor series of degree 13 in r, times 2^n. Every multiply
 * and every add is rounded by itself: the C files that include this are compiled without
 * contraction, and CUDA is told so here. Within 2 ulp. No state.
 */
#ifndef KVKI_EXACT_EXP_H
#define KVKI_EXACT_EXP_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define KVKI_EXACT_FN    __device__ static inline
#define KVKI_MUL(a, b)   __dmul_rn((a), (b))
#define KVKI_PLUS(a, b)  __dadd_rn((a), (b))
#define KVKI_RATIO(a, b) __ddiv_rn((a), (b))
#else
#define KVKI_EXACT_FN    static inline
#define KVKI_MUL(a, b)   ((a) * (b))
#define KVKI_PLUS(a, b)  ((a) + (b))
#define KVKI_RATIO(a, b) ((a) / (b))
#endif

/* 2^n of a whole n in [-1022, 1023]. */
KVKI_EXACT_FN double kvki_exact_power(double n)
{
    uint64_t bits = (uint64_t)((int64_t)n + 1023) << 52;
    double power = 0;

    memcpy(&power, &bits, sizeof(power));
    return power;
}

/* exp(x); 0 below -700, infinity above 709: both far beyond what a float keeps. */
KVKI_EXACT_FN double kvki_exact_exp(double x)
{
    const double terms[] = {1.0 / 479001600,
                            1.0 / 39916800,
                            1.0 / 3628800,
                            1.0 / 362880,
                            1.0 / 40320,
                            1.0 / 5040,
                            1.0 / 720,
                            1.0 / 120,
                            1.0 / 24,
                            1.0 / 6,
                            0.5,
                            1.0,
                            1.0};
    double n = 0, r = 0, sum = 1.0 / 6227020800.0;

    if (x != x)
        return x;
    if (x > 709)
        return INFINITY;
    if (x < -700)
        return 0;
    n = rint(KVKI_MUL(x, 0x1.71547652b82fep0));
    r = KVKI_PLUS(x, -KVKI_MUL(n, 0x1.62e42feep-1)); /* n ln 2 exactly, its upper 32 bits */
    r = KVKI_PLUS(r, -KVKI_MUL(n, 0x1.a39ef35793c76p-33));
    for (int i = 0; i < 13; i++)
        sum = KVKI_PLUS(KVKI_MUL(sum, r), terms[i]);
    return KVKI_MUL(sum, kvki_exact_power(n));
}

/* 1 / (1 + exp(-x)). */
KVKI_EXACT_FN double kvki_exact_sigma(double x)
{
    return KVKI_RATIO(1.0, KVKI_PLUS(1.0, kvki_exact_exp(-x)));
}

#endif
