/*
 * attend_few.h: attention of a few query rows over one block of keys, straight from the rows.
 *
 * For decoding, where each row is met by one group of queries only: packing K and V to floats first
 * would move every byte four times. Keys are turned in registers, VF_LANES at a time; V is read row
 * by row. Sums are those of the packed form (attend.h): a score is one chain over the dimension, an
 * output one chain over the keys, so the bits are the same. Rows of the next block are asked for
 * all the while, a few lines at a time, since memory is what takes longest here.
 */
#ifndef KVKI_ATTEND_FEW_H
#define KVKI_ATTEND_FEW_H

#include "attend.h"

#define FEW_ROWS     4u /* query rows that share a pass over the keys */
#define FEW_NV       4u /* vectors of V and of o in registers for each of them */
#define AHEAD_SCORES 8u /* lines asked for in a step over VF_LANES dimensions of keys */
#define ASK_EVERY    4u /* vectors of keys between two askings */
#define AHEAD_VALUES 2u /* ... and at each key's V */

KVKI_INLINE bool is_other_page(const char *a, const char *b)
{
    return (((uintptr_t)a ^ (uintptr_t)b) >> 12) != 0;
}

/* Asks for the next n lines. */
KVKI_INLINE void ask(kvki_ahead *a, uint32_t n)
{
    for (uint32_t i = 0; i < n && a->row < a->n; i++) {
        const char *row = a->rows[a->row], *at = row + a->off_bytes[a->side];
        /* An asking alone often gives up where the page is not known yet; one load makes it so. */
        if (a->at_bytes == 0 && (a->side == 0 || is_other_page(at, row + a->off_bytes[0])))
            (void)*(const volatile char *)at;
        __builtin_prefetch(at + a->at_bytes, 0, 3);
        a->at_bytes += 64;
        if (a->at_bytes < a->len_bytes)
            continue;
        a->at_bytes = 0;
        a->row += a->side;
        a->side ^= 1u;
    }
}

/* Two neighbouring bf16 in each lane, as two vectors of floats. */
typedef uint32_t vf_pairs __attribute__((vector_size(4 * VF_LANES)));

KVKI_INLINE vf pair_low(vf x)
{
    return (vf)((vf_pairs)x << 16);
}

KVKI_INLINE vf pair_high(vf x)
{
    return (vf)((vf_pairs)x & 0xffff0000u);
}

/* Scores of mr query rows against VF_LANES keys from j on: bf16, two dimensions to a lane. */
KVKI_INLINE void few_scores_bf16(const kvki_attend_pack *p, const kvki_attend_block *b,
                                 uint32_t first, uint32_t mr, uint32_t j, kvki_ahead *ahead)
{
    uint32_t d = p->head_dim;
    const float *q = b->q + (size_t)first * d;
    const char *key[VF_LANES];
    vf acc[FEW_ROWS];

    for (uint32_t t = 0; t < VF_LANES; t++)
        key[t] = (const char *)p->rows[j + t < p->n ? j + t : p->n - 1] + p->k_off_bytes;
    KVKI_UNROLL
    for (uint32_t i = 0; i < mr; i++)
        acc[i] = vf_zero();
    for (uint32_t from = 0; from < d; from += 2 * VF_LANES) {
        vf x[VF_LANES];
        KVKI_UNROLL
        for (uint32_t t = 0; t < VF_LANES; t++)
            memcpy(&x[t], key[t] + from * 2, sizeof(x[t]));
        vf_transpose(x);
        KVKI_UNROLL
        for (uint32_t t = 0; t < VF_LANES; t++) {
            vf low = pair_low(x[t]), high = pair_high(x[t]);
            if (t % ASK_EVERY == 0)
                ask(ahead, ASK_EVERY * AHEAD_SCORES / VF_LANES * 2);
            KVKI_UNROLL
            for (uint32_t i = 0; i < mr; i++) {
                const float *at = q + (size_t)i * d + from + 2 * t;
                acc[i] = vf_fma(vf_set1(at[0]), low, acc[i]);
                acc[i] = vf_fma(vf_set1(at[1]), high, acc[i]);
            }
        }
    }
    KVKI_UNROLL
    for (uint32_t i = 0; i < mr; i++)
        vf_store(b->s + (size_t)(first + i) * KVKI_ATTEND_KEYS + j, acc[i]);
}

/*
 * The same of keys that are rotated by p's turned angles, on lanes of keys: K is turned as it lies,
 * in pairs, which takes half the moves that it would take rotated. The second half of the
 * dimensions waits in tmp, since a sum goes over the dimensions in their order.
 */
KVKI_INLINE void few_scores_turned(const kvki_attend_pack *p, const kvki_attend_block *b,
                                   uint32_t first, uint32_t mr, uint32_t j, kvki_ahead *ahead)
{
    uint32_t d = p->head_dim, half = d / 2;
    const float *q = b->q + (size_t)first * d;
    const float *cosine = p->cos + (size_t)j * half, *sine = p->sin + (size_t)j * half;
    const char *key[VF_LANES];
    vf acc[FEW_ROWS];

    for (uint32_t t = 0; t < VF_LANES; t++)
        key[t] = (const char *)p->rows[j + t < p->n ? j + t : p->n - 1] + p->k_off_bytes;
    KVKI_UNROLL
    for (uint32_t i = 0; i < mr; i++)
        acc[i] = vf_zero();
    for (uint32_t from = 0; from < half; from += 2 * VF_LANES) {
        vf x[VF_LANES], y[VF_LANES];
        KVKI_UNROLL
        for (uint32_t t = 0; t < VF_LANES; t++)
            memcpy(&x[t], key[t] + from * 2, sizeof(x[t]));
        vf_transpose(x);
        KVKI_UNROLL
        for (uint32_t t = 0; t < VF_LANES; t++)
            memcpy(&y[t], key[t] + (half + from) * 2, sizeof(y[t]));
        vf_transpose(y);
        KVKI_UNROLL
        for (uint32_t t = 0; t < 2 * VF_LANES; t++) {
            vf a = t % 2 ? pair_high(x[t / 2]) : pair_low(x[t / 2]);
            vf c = t % 2 ? pair_high(y[t / 2]) : pair_low(y[t / 2]);
            vf cs = vf_load(cosine + (size_t)(from + t) * VF_LANES);
            vf sn = vf_load(sine + (size_t)(from + t) * VF_LANES);
            vf k = vf_sub(vf_mul(a, cs), vf_mul(c, sn));
            if (t % ASK_EVERY == 0) /* a few at a time: many at once keep the loads here waiting */
                ask(ahead, ASK_EVERY * AHEAD_SCORES / VF_LANES * 2);
            vf_store(p->tmp + (size_t)(from + t) * VF_LANES, vf_add(vf_mul(c, cs), vf_mul(a, sn)));
            KVKI_UNROLL
            for (uint32_t i = 0; i < mr; i++)
                acc[i] = vf_fma(vf_set1(q[(size_t)i * d + from + t]), k, acc[i]);
        }
    }
    for (uint32_t t = 0; t < half; t++) {
        vf k = vf_load(p->tmp + (size_t)t * VF_LANES);
        KVKI_UNROLL
        for (uint32_t i = 0; i < mr; i++)
            acc[i] = vf_fma(vf_set1(q[(size_t)i * d + half + t]), k, acc[i]);
    }
    KVKI_UNROLL
    for (uint32_t i = 0; i < mr; i++)
        vf_store(b->s + (size_t)(first + i) * KVKI_ATTEND_KEYS + j, acc[i]);
}

static void turn_angles(const float *const *from, uint32_t half, float *cosine, float *sine)
{
    for (uint32_t at = 0; at < 2 * half; at += VF_LANES) {
        float *to =
            at < half ? cosine + (size_t)at * VF_LANES : sine + (size_t)(at - half) * VF_LANES;
        vf x[VF_LANES];
        KVKI_UNROLL
        for (uint32_t t = 0; t < VF_LANES; t++)
            x[t] = vf_load(from[t] + at);
        vf_transpose(x);
        KVKI_UNROLL
        for (uint32_t t = 0; t < VF_LANES; t++)
            vf_store(to + (size_t)t * VF_LANES, x[t]);
    }
}

/* 2 * nv vectors of o from column `from` on, of mr query rows: bf16, likewise. */
KVKI_INLINE void few_values_bf16(const kvki_attend_pack *p, const kvki_attend_block *b,
                                 uint32_t first, uint32_t mr, uint32_t from, uint32_t nv,
                                 kvki_ahead *ahead)
{
    const float *s = b->s + (size_t)first * KVKI_ATTEND_KEYS;
    size_t off_bytes = p->v_off_bytes + from * 2;
    vf low[FEW_ROWS][FEW_NV / 2], high[FEW_ROWS][FEW_NV / 2];

    KVKI_UNROLL
    for (uint32_t i = 0; i < mr; i++) {
        KVKI_UNROLL
        for (uint32_t c = 0; c < nv; c++)
            low[i][c] = high[i][c] = vf_zero();
    }
    for (uint32_t j = 0; j < p->n; j++) {
        const char *v = (const char *)p->rows[j] + off_bytes;
        vf x[FEW_NV / 2];
        ask(ahead, AHEAD_VALUES);
        KVKI_UNROLL
        for (uint32_t c = 0; c < nv; c++)
            memcpy(&x[c], v + c * sizeof(x[c]), sizeof(x[c]));
        KVKI_UNROLL
        for (uint32_t i = 0; i < mr; i++) {
            vf w = vf_set1(s[(size_t)i * KVKI_ATTEND_KEYS + j]);
            KVKI_UNROLL
            for (uint32_t c = 0; c < nv; c++) {
                low[i][c] = vf_fma(w, pair_low(x[c]), low[i][c]);
                high[i][c] = vf_fma(w, pair_high(x[c]), high[i][c]);
            }
        }
    }
    for (uint32_t i = 0; i < mr; i++) {
        for (uint32_t c = 0; c < nv; c++) {
            float even[VF_LANES], odd[VF_LANES];
            float *o = b->o + (first + i) * b->ldo + from + c * 2 * VF_LANES;
            vf_store(even, low[i][c]);
            vf_store(odd, high[i][c]);
            for (uint32_t t = 0; t < VF_LANES; t++) {
                o[2 * t] = even[t];
                o[2 * t + 1] = odd[t];
            }
        }
    }
}

/* Scores of mr query rows against VF_LANES keys from j on. */
KVKI_INLINE void few_scores(const kvki_attend_pack *p, const kvki_attend_block *b, uint32_t first,
                            uint32_t mr, uint32_t j, kvk_dtype dtype, size_t elem_bytes,
                            kvki_ahead *ahead)
{
    uint32_t d = p->head_dim;
    const float *q = b->q + (size_t)first * d;
    const char *key[VF_LANES];
    bool made = p->cos || p->coded; /* in tmp: rotated, scaled */
    vf acc[FEW_ROWS];

    if (made)
        load_keys(p, j, p->tmp, d);
    for (uint32_t t = 0; t < VF_LANES; t++) /* keys beyond the last are never looked at */
        key[t] = made ? (const char *)(p->tmp + (size_t)t * d)
                      : (const char *)p->rows[j + t < p->n ? j + t : p->n - 1] + p->k_off_bytes;
    KVKI_UNROLL
    for (uint32_t i = 0; i < mr; i++)
        acc[i] = vf_zero();
    for (uint32_t from = 0; from < d; from += VF_LANES) {
        vf x[VF_LANES];
        ask(ahead, AHEAD_SCORES);
        KVKI_UNROLL
        for (uint32_t t = 0; t < VF_LANES; t++)
            x[t] = vf_load_as(key[t] + from * elem_bytes, dtype, VF_LANES);
        vf_transpose(x);
        KVKI_UNROLL
        for (uint32_t t = 0; t < VF_LANES; t++) {
            KVKI_UNROLL
            for (uint32_t i = 0; i < mr; i++)
                acc[i] = vf_fma(vf_set1(q[(size_t)i * d + from + t]), x[t], acc[i]);
        }
    }
    KVKI_UNROLL
    for (uint32_t i = 0; i < mr; i++)
        vf_store(b->s + (size_t)(first + i) * KVKI_ATTEND_KEYS + j, acc[i]);
}

/* nv vectors of o from column `from` on, of mr query rows. */
KVKI_INLINE void few_values(const kvki_attend_pack *p, const kvki_attend_block *b, uint32_t first,
                            uint32_t mr, uint32_t from, uint32_t nv, kvk_dtype dtype,
                            size_t elem_bytes, kvki_ahead *ahead)
{
    const float *s = b->s + (size_t)first * KVKI_ATTEND_KEYS;
    size_t off_bytes = p->v_off_bytes + from * elem_bytes;
    vf acc[FEW_ROWS][FEW_NV];

    KVKI_UNROLL
    for (uint32_t i = 0; i < mr; i++) {
        KVKI_UNROLL
        for (uint32_t c = 0; c < nv; c++)
            acc[i][c] = vf_zero();
    }
    for (uint32_t j = 0; j < p->n; j++) {
        const char *v = (const char *)p->rows[j] + off_bytes;
        vf x[FEW_NV];
        ask(ahead, AHEAD_VALUES);
        KVKI_UNROLL
        for (uint32_t c = 0; c < nv; c++)
            x[c] = vf_load_as(v + c * VF_LANES * elem_bytes, dtype, VF_LANES);
        if (kvk_is_coded(dtype)) {
            vf scale = vf_set1(kvki_scale_at((const char *)p->rows[j] + p->v_scale_off_bytes));
            KVKI_UNROLL
            for (uint32_t c = 0; c < nv; c++)
                x[c] = vf_mul(x[c], scale);
        }
        KVKI_UNROLL
        for (uint32_t i = 0; i < mr; i++) {
            vf w = vf_set1(s[(size_t)i * KVKI_ATTEND_KEYS + j]);
            KVKI_UNROLL
            for (uint32_t c = 0; c < nv; c++)
                acc[i][c] = vf_fma(w, x[c], acc[i][c]);
        }
    }
    KVKI_UNROLL
    for (uint32_t i = 0; i < mr; i++) {
        KVKI_UNROLL
        for (uint32_t c = 0; c < nv; c++)
            vf_store(b->o + (first + i) * b->ldo + from + c * VF_LANES, acc[i][c]);
    }
}

KVKI_INLINE void few_all_scores(const kvki_attend_pack *p, const kvki_attend_block *b,
                                uint32_t first, uint32_t mr, kvk_dtype dtype, size_t elem_bytes,
                                kvki_ahead *ahead)
{
    bool pairs = dtype == KVK_BF16 && p->head_dim % (2 * VF_LANES) == 0;

    for (uint32_t j = 0; j < p->n; j += VF_LANES) {
        if (p->turned)
            few_scores_turned(p, b, first, mr, j, ahead);
        else if (pairs && !p->cos)
            few_scores_bf16(p, b, first, mr, j, ahead);
        else if (p->cos || p->coded)
            few_scores(p, b, first, mr, j, KVK_F32, 4, ahead);
        else
            few_scores(p, b, first, mr, j, dtype, elem_bytes, ahead);
    }
}

KVKI_INLINE void few_all_values(const kvki_attend_pack *p, const kvki_attend_block *b,
                                uint32_t first, uint32_t mr, kvk_dtype dtype, size_t elem_bytes,
                                kvki_ahead *ahead)
{
    uint32_t from = 0, wide = FEW_NV * VF_LANES;

    if (dtype == KVK_BF16 && p->head_dim % wide == 0) {
        for (; from < p->head_dim; from += wide)
            few_values_bf16(p, b, first, mr, from, FEW_NV / 2, ahead);
    }
    for (; from + FEW_NV * VF_LANES <= p->head_dim; from += FEW_NV * VF_LANES)
        few_values(p, b, first, mr, from, FEW_NV, dtype, elem_bytes, ahead);
    for (; from < p->head_dim; from += VF_LANES)
        few_values(p, b, first, mr, from, 1, dtype, elem_bytes, ahead);
}

/* One pass of up to FEW_ROWS query rows: what is 0 is scores, 1 is values. */
KVKI_INLINE void few_pass(const kvki_attend_pack *p, const kvki_attend_block *b, uint32_t first,
                          uint32_t mr, bool values, kvk_dtype dtype, size_t elem_bytes,
                          kvki_ahead *ahead)
{
    if (values)
        few_all_values(p, b, first, mr, dtype, elem_bytes, ahead);
    else
        few_all_scores(p, b, first, mr, dtype, elem_bytes, ahead);
}

KVKI_INLINE void few_rows(const kvki_attend_pack *p, const kvki_attend_block *b, bool values,
                          kvk_dtype dtype, size_t elem_bytes, kvki_ahead *ahead)
{
    uint32_t row = 0;

    for (; row + FEW_ROWS <= b->m; row += FEW_ROWS)
        few_pass(p, b, row, FEW_ROWS, values, dtype, elem_bytes, ahead);
    for (; row < b->m; row++)
        few_pass(p, b, row, 1, values, dtype, elem_bytes, ahead);
}

static void few_as(const kvki_attend_pack *p, const kvki_attend_block *b, bool values,
                   kvki_ahead *ahead)
{
    switch (p->dtype) {
    case KVK_F32:
        few_rows(p, b, values, KVK_F32, 4, ahead);
        break;
    case KVK_F16:
        few_rows(p, b, values, KVK_F16, 2, ahead);
        break;
    case KVK_BF16:
        few_rows(p, b, values, KVK_BF16, 2, ahead);
        break;
    case KVK_I8:
        few_rows(p, b, values, KVK_I8, 1, ahead);
        break;
    case KVK_E4M3_SCALED:
        few_rows(p, b, values, KVK_E4M3_SCALED, 1, ahead);
        break;
    case KVK_I8_SCALED:
        few_rows(p, b, values, KVK_I8_SCALED, 1, ahead);
        break;
    }
}

static void attend_few(const kvki_attend_pack *p, const kvki_attend_block *b, kvki_ahead *ahead)
{
    uint32_t padded = (p->n + VF_LANES - 1) / VF_LANES * VF_LANES;

    few_as(p, b, false, ahead);
    for (uint32_t i = 0; i < b->m; i++) {
        float *s = b->s + (size_t)i * KVKI_ATTEND_KEYS;
        if (b->softcap != 0)
            softcap_row(s, p->n, b->softcap);
        softmax_row(s, p->n, padded, &b->max[i], &b->sum[i]);
    }
    few_as(p, b, true, ahead);
}

#endif
