/*
 * sum.c: XXH3 sums; the only file that sees xxhash.h.
 *
 * Any thread, no state. The 32-bit row sum is the low half of the 64-bit one, so both ends need one
 * algorithm only.
 */
#include "base/sum.h"

/* Debian's libxxhash is built for the oldest CPU of its architecture; on x86-64 it has faster
 * versions beside that and picks one at run time. The sums are the same. */
#define XXH_STATIC_LINKING_ONLY /* for a state on the stack */
#ifdef __x86_64__
#include <xxh_x86dispatch.h>
#else
#include <xxhash.h>
#endif

uint64_t kvc_value_sum(const void *value, size_t len_bytes)
{
    return XXH3_64bits(value, len_bytes);
}

uint64_t kvc_seeded_sum(const void *bytes, size_t len_bytes, uint64_t seed)
{
    return XXH3_64bits_withSeed(bytes, len_bytes, seed);
}

uint64_t kvc_pieces_sum(const struct iovec *pieces, uint32_t n)
{
    XXH3_state_t state;
    XXH3_INITSTATE(&state);
    (void)XXH3_64bits_reset(&state);
    for (uint32_t i = 0; i < n; i++) {
        if (pieces[i].iov_len > 0)
            (void)XXH3_64bits_update(&state, pieces[i].iov_base, pieces[i].iov_len);
    }
    return XXH3_64bits_digest(&state);
}

uint32_t kvc_row_sum(const void *row, size_t row_bytes)
{
    return (uint32_t)XXH3_64bits(row, row_bytes);
}

void kvc_row_sums(const void *rows, size_t row_bytes, uint32_t n, uint32_t *sums)
{
    const char *row = rows;
    for (uint32_t i = 0; i < n; i++, row += row_bytes)
        sums[i] = kvc_row_sum(row, row_bytes);
}
