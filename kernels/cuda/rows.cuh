/*
 * rows.cuh: where a row lies. Device code.
 */
#ifndef KVKI_CUDA_ROWS_CUH
#define KVKI_CUDA_ROWS_CUH

#include "device.cuh"

/* The row of a position in its source; NULL where the source does not have it. */
__device__ static inline const char *kvki_source_row(const kvk_cuda_source *source,
                                                     uint32_t position, uint32_t row_bytes)
{
    uint32_t block = position / source->block_tokens;

    if (block >= source->n_blocks || !source->blocks[block])
        return NULL;
    return (const char *)source->blocks[block] +
           (size_t)(position % source->block_tokens) * row_bytes;
}

#endif
