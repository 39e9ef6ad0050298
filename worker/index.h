/*
 * index.h: the compressed (or exact) keys of one layer of one sequence, resident on the worker.
 *
 * A worker has one or two levels: what the scan reads, and for RERANKED a finer one. A level is
 * described once per worker; its rows lie in pages of KVWI_PAGE_ROWS rows per layer and sequence.
 * Rows are written once, in order; pages never move, so row pointers stay good until the sequence
 * ends. Owned by the sequence's thread.
 */
#ifndef KVWI_INDEX_H
#define KVWI_INDEX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvc/status.h"

enum { KVWI_MAX_LEVELS = 2, KVWI_PAGE_ROWS = 4096 };

typedef struct kvwi_level {
    bool exact;     /* raw keys in the model's dtype */
    uint32_t heads; /* key heads of a row */
    uint32_t dims;  /* elements per head of a row */
    size_t row_bytes;
    float *a, *b; /* [n_layers, heads, d_in, dims]; NULL where exact */
    uint32_t d_in;
} kvwi_level;

/* Rows of one level in one layer. */
typedef struct kvwi_pages {
    uint8_t **page;
    uint32_t n_pages, cap_pages;
    uint32_t n_rows;
    size_t row_bytes;
} kvwi_pages;

void kvwi_pages_init(kvwi_pages *pages, size_t row_bytes);
void kvwi_pages_fini(kvwi_pages *pages);
/* Room for rows up to n_rows in all. NO_MEMORY: unchanged. */
kvc_status kvwi_pages_reserve(kvwi_pages *pages, uint32_t n_rows) KVC_MUST_CHECK;
/* Where row `row` lies and how many rows from it on are contiguous (*run_p, may be NULL). */
static inline uint8_t *kvwi_pages_row(const kvwi_pages *pages, uint32_t row, uint32_t *run_p)
{
    uint32_t in_page = row % KVWI_PAGE_ROWS;
    if (run_p != NULL) {
        *run_p = KVWI_PAGE_ROWS - in_page;
    }
    return pages->page[row / KVWI_PAGE_ROWS] + in_page * pages->row_bytes;
}
/* Writes dense rows [n] at `first`; reserved before. */
void kvwi_pages_write(kvwi_pages *pages, uint32_t first, uint32_t n, const void *rows,
                      size_t stride_bytes);
/* Reads rows [n] from `first` on to out, stride apart. */
void kvwi_pages_read(const kvwi_pages *pages, uint32_t first, uint32_t n, void *out,
                     size_t stride_bytes);

#endif
