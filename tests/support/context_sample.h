/*
 * context_sample.h: a small context file in memory, and reading one from memory.
 *
 * Single thread. For the tests of the format and for its fuzzer.
 */
#ifndef TESTS_SUPPORT_CONTEXT_SAMPLE_H
#define TESTS_SUPPORT_CONTEXT_SAMPLE_H

#include <stdlib.h>
#include <string.h>

#include "context_file.h"

typedef struct memory_file {
    uint8_t *bytes;
    size_t len_bytes, at;
} memory_file;

static inline bool memory_read(void *arg, void *dst, size_t n)
{
    memory_file *file = arg;
    if (n > file->len_bytes - file->at)
        return false;
    memcpy(dst, file->bytes + file->at, n);
    file->at += n;
    return true;
}

static inline bool memory_write(void *arg, const void *src, size_t n)
{
    memory_file *file = arg;
    uint8_t *more = realloc(file->bytes, file->len_bytes + n + 1);
    if (more == NULL)
        return false;
    memcpy(more + file->len_bytes, src, n);
    file->bytes = more;
    file->len_bytes += n;
    return true;
}

#endif
