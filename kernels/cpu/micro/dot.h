/*
 * dot.h: scores of rows that are read once: up to 4 queries meet 4 keys at a time, lanes run along
 * the dimension, and four sums are reduced together. A score's bits depend on its query and its key
 * only: sums start at zero, take VF_LANES dimensions at a time, and are added in one fixed tree.
 */
#ifndef KVKI_DOT_H
#define KVKI_DOT_H

#include "../isa.h"
#include "rows.h"

#define DOT_KEYS 4u

KVKI_INLINE void dot_tile(const kvki_dot *d, kvk_dtype dtype, size_t elem_bytes, uint32_t nq,
                          uint32_t j)
{
    uint32_t left = d->n - j;
    const char *key[DOT_KEYS];
    vf acc[KVKI_DOT_QUERIES][DOT_KEYS];
    uint32_t from = 0;

    KVKI_UNROLL
    for (uint32_t t = 0; t < DOT_KEYS; t++)
        key[t] = (const char *)d->rows[t < left ? j + t : d->n - 1] + d->off_bytes;
    KVKI_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        KVKI_UNROLL
        for (uint32_t t = 0; t < DOT_KEYS; t++)
            acc[i][t] = vf_zero();
    }
    for (; from + VF_LANES <= d->dim; from += VF_LANES) {
        vf kv[DOT_KEYS];
        KVKI_UNROLL
        for (uint32_t t = 0; t < DOT_KEYS; t++)
            kv[t] = vf_load_as(key[t] + from * elem_bytes, dtype, VF_LANES);
        KVKI_UNROLL
        for (uint32_t i = 0; i < nq; i++) {
            vf qv = vf_load(d->q[i] + from);
            KVKI_UNROLL
            for (uint32_t t = 0; t < DOT_KEYS; t++)
                acc[i][t] = vf_fma(qv, kv[t], acc[i][t]);
        }
    }
    if (from < d->dim) {
        KVKI_UNROLL
        for (uint32_t t = 0; t < DOT_KEYS; t++) {
            vf kv = vf_load_as(key[t] + from * elem_bytes, dtype, d->dim - from);
            KVKI_UNROLL
            for (uint32_t i = 0; i < nq; i++)
                acc[i][t] = vf_fma(vf_load_n(d->q[i] + from, d->dim - from), kv, acc[i][t]);
        }
    }
    KVKI_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        v4f sums = vf_sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
        v4f_store_n(d->out[i] + j, sums, left < DOT_KEYS ? left : DOT_KEYS);
    }
}

KVKI_INLINE void dot_as(const kvki_dot *d, kvk_dtype dtype, size_t elem_bytes)
{
    for (uint32_t j = 0; j < d->n; j += DOT_KEYS) {
        switch (d->nq) {
        case 1:
            dot_tile(d, dtype, elem_bytes, 1, j);
            break;
        case 2:
            dot_tile(d, dtype, elem_bytes, 2, j);
            break;
        case 3:
            dot_tile(d, dtype, elem_bytes, 3, j);
            break;
        default:
            dot_tile(d, dtype, elem_bytes, 4, j);
        }
    }
}

static void dot(const kvki_dot *d)
{
    switch (d->dtype) {
    case KVK_F32:
        dot_as(d, KVK_F32, 4);
        break;
    case KVK_F16:
        dot_as(d, KVK_F16, 2);
        break;
    case KVK_BF16:
        dot_as(d, KVK_BF16, 2);
        break;
    case KVK_I8:
        dot_as(d, KVK_I8, 1);
        break;
    case KVK_E4M3_SCALED: /* no op gives these */
    case KVK_I8_SCALED:
        break;
    }
}

#endif
