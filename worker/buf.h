/*
 * buf.h: growable scratch memory, so that a step allocates nothing once it has warmed up.
 *
 * Not thread-safe: a buffer belongs to whoever owns the struct that it lies in. kvwi_buf_need may
 * lose the contents. Pointers into a buffer die at its next growth.
 */
#ifndef KVWI_BUF_H
#define KVWI_BUF_H

#include <stddef.h>
#include <stdlib.h>

#include "kvc/status.h"

typedef struct kvwi_buf {
    void *p;
    size_t cap_bytes;
} kvwi_buf;

/* At least len_bytes (64-byte aligned); contents are lost when it has to grow. */
kvc_status kvwi_buf_need(kvwi_buf *buf, size_t len_bytes) KVC_MUST_CHECK;

static inline void kvwi_buf_fini(kvwi_buf *buf)
{
    free(buf->p);
    buf->p = NULL;
    buf->cap_bytes = 0;
}

#endif
