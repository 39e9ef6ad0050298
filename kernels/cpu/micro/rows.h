/*
 * rows.h: loops over one row of floats: conversion, sums, maxima, quantisation. Plain loops are
 * left to the compiler's vectoriser where the order of operations is free of consequence; the rest
 * is written with vec.h.
 */
#ifndef KVKI_ROWS_H
#define KVKI_ROWS_H

#include "../elem.h"
#include "exp.h"

/* VF_LANES elements at p (n of them where n < VF_LANES) */
KVKI_INLINE vf vf_load_as(const char *p, kvk_dtype dtype, size_t n)
{
    bool full = n >= VF_LANES;

    switch (dtype) {
    case KVK_F32:
        return full ? vf_load((const float *)(const void *)p)
                    : vf_load_n((const float *)(const void *)p, n);
    case KVK_F16:
        return full ? vf_load_f16(p) : vf_load_f16_n(p, n);
    case KVK_BF16:
        return full ? vf_load_bf16(p) : vf_load_bf16_n(p, n);
    case KVK_I8:
    case KVK_I8_SCALED:
        return full ? vf_load_i8(p) : vf_load_i8_n(p, n);
    case KVK_E4M3_SCALED:
        return full ? vf_load_e4m3(p) : vf_load_e4m3_n(p, n);
    }
    return vf_zero();
}

KVKI_INLINE void convert_as(const char *in, kvk_dtype dtype, size_t elem_bytes, size_t n,
                            float *out)
{
    size_t i = 0;

    for (; i + VF_LANES <= n; i += VF_LANES)
        vf_store(out + i, vf_load_as(in + i * elem_bytes, dtype, VF_LANES));
    if (i < n)
        vf_store_n(out + i, vf_load_as(in + i * elem_bytes, dtype, n - i), n - i);
}

static void row_convert(const void *in, kvk_dtype dtype, size_t n, float *out)
{
    switch (dtype) {
    case KVK_F32:
        memcpy(out, in, n * sizeof(float));
        break;
    case KVK_F16:
        convert_as(in, KVK_F16, 2, n, out);
        break;
    case KVK_BF16:
        convert_as(in, KVK_BF16, 2, n, out);
        break;
    case KVK_I8:
    case KVK_I8_SCALED:
        convert_as(in, KVK_I8, 1, n, out);
        break;
    case KVK_E4M3_SCALED:
        convert_as(in, KVK_E4M3_SCALED, 1, n, out);
        break;
    }
}

static void row_add(float *acc, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        acc[i] += x[i];
}

static void row_add_f64(double *acc, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        acc[i] += (double)x[i];
}

static void row_axpby(float *x, float a, const float *y, float b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = x[i] * a + y[i] * b;
}

/* Eight sums, added pairwise at the end: the order is the same on every isa. */
static double row_dot_f64(const float *a, const float *b, size_t n)
{
    double acc[8] = {0};
    size_t i = 0;

    for (; i + 8 <= n; i += 8) {
        for (size_t l = 0; l < 8; l++)
            acc[l] += (double)a[i + l] * (double)b[i + l];
    }
    for (size_t l = 0; i < n; i++, l++)
        acc[l] += (double)a[i] * (double)b[i];
    return ((acc[0] + acc[4]) + (acc[2] + acc[6])) + ((acc[1] + acc[5]) + (acc[3] + acc[7]));
}

/* |x / scale| <= 127 makes the magic constant round to nearest even. */
static void row_quantize(const float *x, uint32_t n, float scale, int8_t *out)
{
    const float magic = 0x1.8p23f;

    for (uint32_t i = 0; i < n; i++)
        out[i] = (int8_t)(int32_t)((x[i] / scale + magic) - magic);
}

/* Below 2^-6 e4m3 counts in steps of 2^-9, which the magic constant rounds to; above, the low 20
 * bits of the mantissa are rounded away. */
static void row_e4m3(const float *x, uint32_t n, float scale, uint8_t *out)
{
    const float magic = 0x1.8p14f;

    for (uint32_t i = 0; i < n; i++) {
        uint32_t bits = kvki_bits_of_f32(x[i] / scale), sign = bits >> 24 & 0x80u;
        uint32_t abs_bits = bits & 0x7fffffffu;
        uint32_t large = (abs_bits + 0x7ffffu + (abs_bits >> 20 & 1u) - (120u << 23)) >> 20;
        uint32_t small = kvki_bits_of_f32(kvki_f32_of_bits(abs_bits) + magic) & 0xffu;
        out[i] = (uint8_t)(sign | (abs_bits < (121u << 23) ? small : large));
    }
}

static float row_max(const float *x, size_t n, float start)
{
    vf m0 = vf_set1(start), m1 = m0, m2 = m0, m3 = m0;
    size_t i = 0;

    for (; i + 4 * VF_LANES <= n; i += 4 * VF_LANES) {
        m0 = vf_max(vf_load(x + i), m0);
        m1 = vf_max(vf_load(x + i + VF_LANES), m1);
        m2 = vf_max(vf_load(x + i + 2 * VF_LANES), m2);
        m3 = vf_max(vf_load(x + i + 3 * VF_LANES), m3);
    }
    for (; i + VF_LANES <= n; i += VF_LANES)
        m0 = vf_max(vf_load(x + i), m0);
    start = vf_hmax(vf_max(vf_max(m0, m1), vf_max(m2, m3)));
    for (; i < n; i++)
        start = x[i] > start ? x[i] : start;
    return start;
}

/* exp(x - max) of the n < VF_LANES last elements, 0 in the lanes beyond */
KVKI_INLINE vf exp_tail(const float *x, size_t n, vf max)
{
    float t[VF_LANES];

    for (size_t i = 0; i < VF_LANES; i++)
        t[i] = i < n ? x[i] : -INFINITY;
    vf_store(t, vf_exp(vf_sub(vf_load(t), max)));
    for (size_t i = n; i < VF_LANES; i++)
        t[i] = 0;
    return vf_load(t);
}

/* Runs of 4096 are summed in float lanes, the runs in double. */
static double row_exp_sum(const float *x, size_t n, float max)
{
    vf shift = vf_set1(max);
    double total = 0;

    for (size_t from = 0; from < n; from += 4096) {
        size_t to = n - from < 4096 ? n : from + 4096;
        size_t i = from;
        vf sum = vf_zero();
        for (; i + VF_LANES <= to; i += VF_LANES)
            sum = vf_add(sum, vf_exp(vf_sub(vf_load(x + i), shift)));
        if (i < to)
            sum = vf_add(sum, exp_tail(x + i, to - i, shift));
        total += (double)vf_hsum(sum);
    }
    return total;
}

static void row_exp_add(const float *x, size_t n, float max, float weight, float *out)
{
    vf shift = vf_set1(max), w = vf_set1(weight);
    size_t i = 0;

    for (; i + VF_LANES <= n; i += VF_LANES) {
        vf e = vf_exp(vf_sub(vf_load(x + i), shift));
        vf_store(out + i, vf_fma(e, w, vf_load(out + i)));
    }
    if (i < n) {
        vf sum = vf_fma(exp_tail(x + i, n - i, shift), w, vf_load_n(out + i, n - i));
        vf_store_n(out + i, sum, n - i);
    }
}

static void row_fold_max(const float *x, size_t n, float shift, float *out)
{
    for (size_t i = 0; i < n; i++) {
        float d = x[i] - shift;
        out[i] = d > out[i] ? d : out[i];
    }
}

static void row_max2(const float *x, const float *y, size_t n, float *out)
{
    size_t i = 0;

    for (; i + VF_LANES <= n; i += VF_LANES)
        vf_store(out + i, vf_max(vf_load(x + i), vf_load(y + i)));
    for (; i < n; i++)
        out[i] = x[i] > y[i] ? x[i] : y[i];
}

/* The positions of the set bits; few are set once the bound is near the k-th score. */
KVKI_INLINE uint32_t put_positions(uint32_t bits, uint32_t from, uint32_t *pos)
{
    uint32_t n = 0;

    for (; bits != 0; bits &= bits - 1)
        pos[n++] = from + (uint32_t)__builtin_ctz(bits);
    return n;
}

static uint32_t row_filter(const float *x, uint32_t from, uint32_t to, float low, uint32_t *pos)
{
    const uint32_t step = 32 / VF_LANES;
    vf bound = vf_set1(low);
    uint32_t n = 0, j = from;

    for (; to - j >= 32; j += 32) {
        uint32_t bits = 0;
        KVKI_UNROLL
        for (uint32_t t = 0; t < step; t++)
            bits |= vf_ge_bits(vf_load(x + j + t * VF_LANES), bound) << (t * VF_LANES);
        if (__builtin_expect(bits != 0, 0))
            n += put_positions(bits, j, pos + n);
    }
    for (; j < to; j++) {
        if (x[j] >= low)
            pos[n++] = j;
    }
    return n;
}

#endif
