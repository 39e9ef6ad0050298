/*
 * check.h: the argument checks that ops share. Nothing here writes; each helper answers whether the
 * argument may be used. Sizes are multiplied with overflow checks, so that an op may then compute
 * any offset within its shapes in size_t.
 */
#ifndef KVKI_CHECK_H
#define KVKI_CHECK_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvk/compute.h"

static inline bool kvki_dtype_ok(kvk_dtype dtype)
{
    return dtype >= KVK_F32 && dtype <= KVK_I8;
}

/* True where a * b * c * 8 fits in size_t. */
static inline bool kvki_shape_ok(size_t a, size_t b, size_t c)
{
    size_t ab = 0, abc = 0;
    return !__builtin_mul_overflow(a, b, &ab) && !__builtin_mul_overflow(ab, c, &abc) &&
           abc <= SIZE_MAX / 8;
}

/* Row stride: rows must not overlap, and the last row's end must be addressable. */
static inline bool kvki_stride_ok(size_t n, size_t stride, size_t row)
{
    size_t span = 0;
    return n <= 1 || (stride >= row && !__builtin_mul_overflow(n, stride, &span));
}

/* rows [n, width]: empty needs no data, but always a dtype and a width. */
static inline bool kvki_rows_ok(const kvk_rows *rows, size_t n, size_t width)
{
    if (!kvki_dtype_ok(rows->dtype) || width == 0 || !kvki_shape_ok(n, width, 1))
        return false;
    return n == 0 || (rows->data &&
                      kvki_stride_ok(n, rows->stride_bytes, width * kvk_dtype_bytes(rows->dtype)));
}

/* Query heads are shared out over kv heads evenly. */
static inline bool kvki_heads_ok(uint32_t n_q_heads, uint32_t n_kv_heads)
{
    return n_kv_heads > 0 && n_q_heads > 0 && n_q_heads % n_kv_heads == 0;
}

/* A float matrix [m, n] with a stride in elements. */
static inline bool kvki_matrix_ok(const float *data, size_t m, size_t n, size_t stride)
{
    if (m == 0 || n == 0)
        return true;
    return data && stride >= n && kvki_shape_ok(m, stride, 1);
}

static inline bool kvki_pointers_ok(const void *const *rows, size_t n)
{
    if (n && !rows)
        return false;
    for (size_t i = 0; i < n; i++) {
        if (!rows[i])
            return false;
    }
    return true;
}

#endif
