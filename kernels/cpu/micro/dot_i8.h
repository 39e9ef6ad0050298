/*
 * dot_i8.h: scores of int8 index rows. Products are exact in int32, so every isa and every tile
 * gives the same bits; the two scales are applied in the contract's order.
 */
#ifndef KVKI_DOT_I8_H
#define KVKI_DOT_I8_H

#include "../elem.h"
#include "../isa.h"
#include "vec.h"

#define I8_KEYS 4u

KVKI_INLINE float i8_scale(const kvki_dot_i8 *d, uint32_t j)
{
    uint16_t bits;
    memcpy(&bits, d->index + j * d->stride_bytes + d->scale_off_bytes, sizeof(bits));
    return kvki_f32_of_bf16(bits);
}

KVKI_INLINE void dot_i8_tile(const kvki_dot_i8 *d, uint32_t nq, uint32_t j)
{
    uint32_t left = d->n - j < I8_KEYS ? d->n - j : I8_KEYS;
    const char *key[I8_KEYS];
    vi acc[KVKI_DOT_QUERIES][I8_KEYS];
    float scale[I8_KEYS];

    KVKI_UNROLL
    for (uint32_t t = 0; t < I8_KEYS; t++) {
        uint32_t row = t < left ? j + t : d->n - 1;
        key[t] = d->index + row * d->stride_bytes + d->v_off_bytes;
        scale[t] = i8_scale(d, row);
    }
    KVKI_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        KVKI_UNROLL
        for (uint32_t t = 0; t < I8_KEYS; t++)
            acc[i][t] = vi_zero();
    }
    for (uint32_t from = 0; from < d->dim; from += VI_WORDS) {
        vi kv[I8_KEYS];
        KVKI_UNROLL
        for (uint32_t t = 0; t < I8_KEYS; t++)
            kv[t] = vi_load_bytes(key[t] + from, d->dim - from, d->end);
        KVKI_UNROLL
        for (uint32_t i = 0; i < nq; i++) {
            vi qv = vi_load_words(d->q[i] + from);
            KVKI_UNROLL
            for (uint32_t t = 0; t < I8_KEYS; t++)
                acc[i][t] = vi_dot(acc[i][t], qv, kv[t]);
        }
    }
    KVKI_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        int32_t sums[I8_KEYS];
        float scores[I8_KEYS];
        vi_sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3], sums);
        KVKI_UNROLL
        for (uint32_t t = 0; t < I8_KEYS; t++)
            scores[t] = ((float)sums[t] * scale[t]) * d->q_scale[i];
        if (left == I8_KEYS)
            memcpy(d->out[i] + j, scores, sizeof(scores));
        else
            memcpy(d->out[i] + j, scores, left * sizeof(float));
    }
}

static void dot_i8(const kvki_dot_i8 *d)
{
    for (uint32_t j = 0; j < d->n; j += I8_KEYS) {
        switch (d->nq) {
        case 1:
            dot_i8_tile(d, 1, j);
            break;
        case 2:
            dot_i8_tile(d, 2, j);
            break;
        case 3:
            dot_i8_tile(d, 3, j);
            break;
        default:
            dot_i8_tile(d, 4, j);
        }
    }
}

#endif
