/*
 * cuda_rig.h: made-up residency and rows for the cases of cuda_conformance. Memory is that of
 * cuda_support.h, until release_all. Single-threaded.
 */
#ifndef CUDA_RIG_H
#define CUDA_RIG_H

#include "cuda_support.h"

/* A host model of one sequence's residency, and its device side. */
typedef struct model {
    uint32_t n_positions, n_slots, n_pinned, step;
    int32_t *slot_of;
    uint32_t *pos_of, *used, *again; /* again: how often a row was picked again */
    kvk_cuda_residency res;
} model;

/* Nothing resident but positions 0 .. n_pinned - 1, in the slots of the same numbers. */
model model_of(uint32_t n_positions, uint32_t n_slots, uint32_t n_pinned, size_t row_bytes);

/* n positions below `below`, all different, in picks. */
void distinct_positions(numbers *from, uint32_t *picks, uint32_t n, uint32_t below);

/* Rows in pinned memory, cut into blocks. */
typedef struct context {
    uint32_t n, block_tokens, row_bytes, v_off_bytes;
    uint8_t *rows;
    kvk_cuda_source source;
} context;

/* Rows of any bf16 numbers. */
context context_of(numbers *from, uint32_t n, uint32_t row_bytes);
/* Rows of K and V in dtype, about normal(0, 1), V on a multiple of 16 bytes. */
context kv_context_of(numbers *from, uint32_t n, uint32_t kv_heads, uint32_t dim, kvk_dtype dtype);

#endif
