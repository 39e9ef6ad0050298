/*
 * buf.c: growable scratch memory; see buf.h. Thread-compatible, no global state.
 */
#include "buf.h"

#include <stdint.h>
#include <string.h>

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

kvc_status kvwi_buf_grow(kvwi_buf *buf, size_t len_bytes)
{
    if (len_bytes <= buf->cap_bytes && buf->p != NULL) {
        return KVC_OK;
    }
    size_t want = buf->cap_bytes + buf->cap_bytes / 2u;
    size_t cap = 0;
    void *p = alloc_rounded(want > len_bytes ? want : len_bytes, &cap);
    if (p == NULL) {
        return KVC_NO_MEMORY;
    }
    if (buf->p != NULL) {
        memcpy(p, buf->p, buf->cap_bytes);
    }
    free(buf->p);
    buf->p = p;
    buf->cap_bytes = cap;
    return KVC_OK;
}
