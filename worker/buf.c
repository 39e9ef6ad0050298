/*
 * buf.c: growable scratch memory; see buf.h. Thread-compatible, no global state.
 */
#include "buf.h"

#include <stdint.h>

#define ALIGN_BYTES 64u

static void *alloc_rounded(size_t len_bytes, size_t *cap_p)
{
    if (len_bytes > SIZE_MAX - 2u * ALIGN_BYTES) {
        return NULL;
    }
    *cap_p = (len_bytes + ALIGN_BYTES) / ALIGN_BYTES * ALIGN_BYTES;
    return aligned_alloc(ALIGN_BYTES, *cap_p);
}

kvc_status kvwi_buf_need(kvwi_buf *buf, size_t len_bytes)
{
    if (len_bytes <= buf->cap_bytes && buf->p != NULL) {
        return KVC_OK;
    }
    kvwi_buf_fini(buf);
    size_t cap = 0;
    buf->p = alloc_rounded(len_bytes, &cap);
    if (buf->p == NULL) {
        return KVC_NO_MEMORY;
    }
    buf->cap_bytes = cap;
    return KVC_OK;
}
