/*
 * from_f32.c: f32 results back into a model's dtype. Pure functions, any thread.
 *
 * Rounding is to nearest even; NaN stays NaN (quiet), overflow becomes infinity, and f16 keeps its
 * subnormals.
 */
#include <string.h>

#include "kvk/compute.h"

static uint32_t bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof(u));
    return u;
}

static uint16_t to_bf16(float x)
{
    uint32_t u = bits_of(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)((u >> 16) | 0x40u);
    }
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

/* Shifts value right by n (1..31), rounding to nearest even. */
static uint32_t shift_even(uint32_t value, uint32_t n)
{
    uint32_t half = 1u << (n - 1u), rest = value & ((1u << n) - 1u), out = value >> n;
    return out + (rest > half || (rest == half && (out & 1u)) ? 1u : 0u);
}

static uint16_t to_f16(float x)
{
    uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u);
    }
    if (a >= 0x477ff000u) { /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00u);
    }
    if (a < 0x38800000u) { /* subnormal in f16: units of 2^-24 */
        if (a < 0x33000000u) {
            return (uint16_t)sign;
        }
        uint32_t mantissa = (a & 0x7fffffu) | 0x800000u;
        return (uint16_t)(sign | shift_even(mantissa, 126u - (a >> 23)));
    }
    return (uint16_t)(sign | shift_even(a - 0x38000000u, 13u));
}

void kvk_from_f32(const float *in, size_t n, kvk_dtype dtype, void *out)
{
    char *at = out;

    if (dtype == KVK_F32) {
        memcpy(out, in, n * sizeof(float));
        return;
    }
    for (size_t i = 0; i < n; i++, at += sizeof(uint16_t)) {
        uint16_t half = dtype == KVK_BF16 ? to_bf16(in[i]) : to_f16(in[i]);
        memcpy(at, &half, sizeof(half));
    }
}
