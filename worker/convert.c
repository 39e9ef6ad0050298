/*
 * convert.c: whether numbers as a caller gives them are finite. Pure, any thread: the bits decide,
 * so nothing is converted.
 */
#include "convert.h"

#include <stdint.h>
#include <string.h>

bool kvwi_all_finite(const void *in, size_t n, kvk_dtype dtype)
{
    /* an exponent of all ones, found without branches so that the loop is vectorised */
    uint32_t bad = 0;
    if (dtype == KVK_F32) {
        const uint8_t *x = in;
        for (size_t i = 0; i < n; i++) {
            uint32_t u;
            memcpy(&u, x + i * sizeof(u), sizeof(u));
            bad |= (u & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
        }
        return bad == 0;
    }
    const uint16_t mask = dtype == KVK_BF16 ? 0x7f80u : 0x7c00u;
    const uint8_t *x = in;
    for (size_t i = 0; i < n; i++) {
        uint16_t u;
        memcpy(&u, x + i * sizeof(u), sizeof(u));
        bad |= (u & mask) == mask ? 1u : 0u;
    }
    return bad == 0;
}
