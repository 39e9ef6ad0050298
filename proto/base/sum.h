/*
 * sum.h: checksums of rows (32 bits) and values (64 bits), both from XXH3.
 */
#ifndef KVC_BASE_SUM_H
#define KVC_BASE_SUM_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* Low 32 bits of XXH3-64 of one row. */
uint32_t kvc_row_sum(const void *row, size_t row_bytes);
/* XXH3-64 of a whole value. */
uint64_t kvc_value_sum(const void *value, size_t len_bytes);
/* XXH3-64 of pieces [n] as one run of bytes. */
uint64_t kvc_pieces_sum(const struct iovec *pieces, uint32_t n);
/* XXH3-64 with a secret seed: for hash tables whose keys others choose. Never stored. */
uint64_t kvc_seeded_sum(const void *bytes, size_t len_bytes, uint64_t seed);
/* sums[i] = kvc_row_sum of row i; rows are dense. */
void kvc_row_sums(const void *rows, size_t row_bytes, uint32_t n, uint32_t *sums);

#endif
