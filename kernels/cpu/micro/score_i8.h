/*
 * score_i8.h: scores of int8 index rows. Products are exact in int32, so every isa and every tile
 * gives the same bits; the two scales are applied in the contract's order. Up to 4 queries meet 4
 * keys at a time; with AMX, and queries enough for it, 16 meet 16 (score_i8_amx.h).
 */
#ifndef KVKI_SCORE_I8_H
#define KVKI_SCORE_I8_H

#include "../elem.h"
#include "../isa.h"
#include "vec.h"

#define I8_KEYS    4u
#define I8_QUERIES 4u

KVKI_INLINE float i8_scale(const kvki_score_i8 *s, size_t j)
{
    uint16_t bits;
    memcpy(&bits, s->index + j * s->stride_bytes + s->scale_off_bytes, sizeof(bits));
    return kvki_f32_of_bf16(bits);
}

/* The row of q, q_scale and out that belongs to row r of this kv head. */
KVKI_INLINE size_t i8_row(const kvki_score_i8 *s, size_t r)
{
    return r / s->group * s->n_q_heads + s->first_head + r % s->group;
}

/* The nq rows of `rows` and keys [j, j + 4), as far as there are. */
KVKI_INLINE void i8_tile(const kvki_score_i8 *s, const size_t *rows, uint32_t nq, size_t j)
{
    uint32_t n = s->n - j < I8_KEYS ? (uint32_t)(s->n - j) : I8_KEYS;
    const int16_t *q[I8_QUERIES];
    const char *key[I8_KEYS];
    vi acc[I8_QUERIES][I8_KEYS];
    float scale[I8_KEYS];
    v4f scales;

    KVKI_UNROLL
    for (uint32_t t = 0; t < I8_KEYS; t++) {
        size_t row = t < n ? j + t : s->n - 1;
        key[t] = s->index + row * s->stride_bytes + s->v_off_bytes;
        scale[t] = i8_scale(s, row);
    }
    memcpy(&scales, scale, sizeof(scales));
    KVKI_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        q[i] = s->q + rows[i] * s->q_stride;
        KVKI_UNROLL
        for (uint32_t t = 0; t < I8_KEYS; t++)
            acc[i][t] = vi_zero();
    }
    for (uint32_t from = 0; from < s->dim; from += VI_WORDS) {
        vi kv[I8_KEYS];
        KVKI_UNROLL
        for (uint32_t t = 0; t < I8_KEYS; t++)
            kv[t] = vi_load_bytes(key[t] + from, s->dim - from, s->end);
        KVKI_UNROLL
        for (uint32_t i = 0; i < nq; i++) {
            vi qv = vi_load_words(q[i] + from);
            KVKI_UNROLL
            for (uint32_t t = 0; t < I8_KEYS; t++)
                acc[i][t] = vi_dot(acc[i][t], qv, kv[t]);
        }
    }
    KVKI_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        v4f dot = v4f_of(vi_sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
        v4f_store_n(s->out + rows[i] * s->out_stride + j, (dot * scales) * s->q_scale[rows[i]], n);
    }
}

KVKI_INLINE void i8_rows(const kvki_score_i8 *s, const size_t *rows, uint32_t nq)
{
    for (size_t j = 0; j < s->n; j += I8_KEYS)
        i8_tile(s, rows, nq, j);
}

static void score_i8_tiles(const kvki_score_i8 *s)
{
    for (size_t r = 0; r < s->n_rows; r += I8_QUERIES) {
        size_t nq = s->n_rows - r, rows[I8_QUERIES];
        for (size_t i = 0; i < I8_QUERIES && i < nq; i++)
            rows[i] = i8_row(s, r + i);
        if (nq >= 4)
            i8_rows(s, rows, 4);
        else if (nq == 3)
            i8_rows(s, rows, 3);
        else if (nq == 2)
            i8_rows(s, rows, 2);
        else
            i8_rows(s, rows, 1);
    }
}

#if defined(KVKI_ISA_AMX)
#include "score_i8_amx.h"
#endif

static void score_i8(const kvki_score_i8 *s)
{
#if defined(KVKI_ISA_AMX)
    if (s->n_rows >= AMX_ROWS_MIN) {
        score_i8_amx(s);
        return;
    }
#endif
    score_i8_tiles(s);
}

#endif
