/*
 * index.c: pages of index rows; see index.h. Owned by the sequence's thread.
 *
 * Invariant: every row below n_rows lies in an allocated page; a page never moves.
 */
#include "index.h"

#include <stdlib.h>
#include <string.h>

void kvwi_pages_init(kvwi_pages *pages, size_t row_bytes)
{
    *pages = (kvwi_pages){.row_bytes = row_bytes};
}

void kvwi_pages_fini(kvwi_pages *pages)
{
    for (uint32_t i = 0; i < pages->n_pages; i++) {
        free(pages->page[i]);
    }
    free(pages->page);
    *pages = (kvwi_pages){0};
}

static kvc_status reserve_table(kvwi_pages *pages, uint32_t n_pages)
{
    if (n_pages <= pages->cap_pages) {
        return KVC_OK;
    }
    uint32_t cap = n_pages + n_pages / 2u + 4u;
    uint8_t **page = realloc(pages->page, cap * sizeof(*page));
    if (page == NULL) {
        return KVC_NO_MEMORY;
    }
    pages->page = page;
    pages->cap_pages = cap;
    return KVC_OK;
}

kvc_status kvwi_pages_reserve(kvwi_pages *pages, uint32_t n_rows)
{
    uint32_t need = n_rows / KVWI_PAGE_ROWS + (n_rows % KVWI_PAGE_ROWS != 0);
    kvc_status st = reserve_table(pages, need);
    while (st == KVC_OK && pages->n_pages < need) {
        uint8_t *page = malloc(KVWI_PAGE_ROWS * pages->row_bytes);
        if (page == NULL) {
            return KVC_NO_MEMORY;
        }
        pages->page[pages->n_pages++] = page;
    }
    return st;
}

void kvwi_pages_write(kvwi_pages *pages, uint32_t first, uint32_t n, const void *rows,
                      size_t stride_bytes)
{
    const uint8_t *src = rows;
    for (uint32_t i = 0; i < n; i++) {
        memcpy(kvwi_pages_row(pages, first + i, NULL), src + i * stride_bytes, pages->row_bytes);
    }
}

void kvwi_pages_read(const kvwi_pages *pages, uint32_t first, uint32_t n, void *out,
                     size_t stride_bytes)
{
    uint8_t *dst = out;
    for (uint32_t i = 0; i < n; i++) {
        memcpy(dst + i * stride_bytes, kvwi_pages_row(pages, first + i, NULL), pages->row_bytes);
    }
}
