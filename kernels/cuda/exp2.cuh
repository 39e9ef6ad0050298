/*
 * exp2.cuh: powers of two as the softmaxes of votes and chunks take them, by the device's own
 * instruction: logits are kept in units of log 2 there, so that no product is between.
 *
 * Device code; any lanes.
 */
#ifndef KVKI_CUDA_EXP2_CUH
#define KVKI_CUDA_EXP2_CUH

#define LOG2_E 1.4426950408889634f

/* 2^x, within 2^-22 of it. */
__device__ static inline float exp2_of(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif
