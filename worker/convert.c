/*
 * convert.c: whether numbers as a caller gives them are finite. Pure, any thread: the bits decide,
 * so nothing is converted.
 */
#include "convert.h"

#include <stdint.h>
#include <string.h>

/* Elements looked at in one go: a loop of known length without branches is vectorised. */
#define RUN 64u

/* Not 0 where one has an exponent of all ones. */
static uint32_t bad_f32(const uint8_t *x, size_t n)
{
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, x + i * sizeof(u), sizeof(u));
        bad |= (u & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
    }
    return bad;
}

static inline uint16_t bad_half(const uint8_t *x, size_t n, uint16_t mask)
{
    uint16_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        uint16_t u;
        memcpy(&u, x + i * sizeof(u), sizeof(u));
        bad |= (uint16_t)((u & mask) == mask);
    }
    return bad;
}

bool kvwi_all_finite(const void *in, size_t n, kvk_dtype dtype)
{
    if (dtype == KVK_F32) {
        return bad_f32(in, n) == 0;
    }
    const uint16_t mask = dtype == KVK_BF16 ? 0x7f80u : 0x7c00u;
    const uint8_t *x = in;
    size_t done = 0;
    uint16_t bad = 0;
    for (; done + RUN <= n; done += RUN) {
        bad |= bad_half(x + done * sizeof(bad), RUN, mask);
    }
    return (bad | bad_half(x + done * sizeof(bad), n - done, mask)) == 0;
}
