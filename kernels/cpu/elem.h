/*
 * elem.h: one element of a row as a float, for the reference forms and the quiet corners of the
 * fast ones. Elements need no alignment: rows come from byte stores.
 */
#ifndef KVKI_ELEM_H
#define KVKI_ELEM_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kvk/compute.h"

static inline float kvki_f32_of_bits(uint32_t bits)
{
    float x = 0;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static inline uint32_t kvki_bits_of_f32(float x)
{
    uint32_t bits = 0;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

static inline float kvki_f32_of_bf16(uint16_t x)
{
    return kvki_f32_of_bits((uint32_t)x << 16);
}

static inline float kvki_f32_of_f16(uint16_t x)
{
    uint32_t sign = (uint32_t)(x & 0x8000u) << 16;
    uint32_t exponent = (x >> 10) & 0x1fu;
    uint32_t mantissa = x & 0x3ffu;
    float sub = (float)mantissa * 0x1p-24f;

    if (exponent == 0) /* zero or subnormal: exact in f32 */
        return kvki_f32_of_bits(kvki_bits_of_f32(sub) | sign);
    if (exponent == 31) /* a NaN comes out quiet, as the hardware conversion makes it */
        return kvki_f32_of_bits(sign | 0x7f800000u | mantissa << 13 | (mantissa ? 0x400000u : 0));
    return kvki_f32_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

static inline float kvki_f32_of_e4m3(uint8_t x)
{
    uint32_t sign = (uint32_t)(x & 0x80u) << 24, magnitude = x & 0x7fu;
    float sub = (float)magnitude * 0x1p-9f;

    if (magnitude < 8)
        return kvki_f32_of_bits(kvki_bits_of_f32(sub) | sign);
    return kvki_f32_of_bits(sign |
                            (magnitude == 0x7f ? 0x7fc00000u : (magnitude << 20) + (120u << 23)));
}

/* Element i of a row that starts at `row`; of a coded one, before its scale. */
static inline float kvki_elem(const void *row, kvk_dtype dtype, size_t i)
{
    const char *p = row;
    uint16_t h = 0;
    float f = 0;
    int8_t b = 0;

    switch (dtype) {
    case KVK_F32:
        memcpy(&f, p + 4 * i, sizeof(f));
        return f;
    case KVK_F16:
        memcpy(&h, p + 2 * i, sizeof(h));
        return kvki_f32_of_f16(h);
    case KVK_BF16:
        memcpy(&h, p + 2 * i, sizeof(h));
        return kvki_f32_of_bf16(h);
    case KVK_E4M3_SCALED:
        memcpy(&b, p + i, sizeof(b));
        return kvki_f32_of_e4m3((uint8_t)b);
    case KVK_I8:
    case KVK_I8_SCALED:
        memcpy(&b, p + i, sizeof(b));
        return (float)b;
    }
    return 0;
}

/* The bf16 at p as a float. */
static inline float kvki_scale_at(const char *p)
{
    uint16_t bits = 0;
    memcpy(&bits, p, sizeof(bits));
    return kvki_f32_of_bf16(bits);
}

/* Where a coded slice has the scale of a head. */
static inline size_t kvki_scale_off(uint32_t n_heads, uint32_t dim, size_t head)
{
    return (size_t)n_heads * dim + 2 * head;
}

/* Element t of a head of a slice in dtype, coded or not. */
static inline float kvki_slice_elem(const void *slice, kvk_dtype dtype, uint32_t n_heads,
                                    uint32_t dim, size_t head, size_t t)
{
    float x = kvki_elem(slice, dtype, head * dim + t);

    if (kvk_is_coded(dtype))
        x *= kvki_scale_at((const char *)slice + kvki_scale_off(n_heads, dim, head));
    return x;
}

static inline const char *kvki_row(const kvk_rows *rows, size_t i)
{
    return (const char *)rows->data + i * rows->stride_bytes;
}

#endif
