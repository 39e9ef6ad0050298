/*
 * attend.h: attention of a tile of query rows over one packed block of keys.
 *
 * A block's partial is taken against the block's own maximum, so it depends on nothing but the row
 * and the block; partials are merged in block order. That is why the bits of a query are the same
 * however calls, tiles and threads are cut. Columns that a row may not see carry weight 0; where V
 * holds an Inf or NaN (0 x Inf would leak) rows go one by one over exactly what they see.
 */
#ifndef KVKI_ATTEND_H
#define KVKI_ATTEND_H

#include <math.h>

#include "exp.h"
#include "gemm.h"
#include "rotary.h"
#include "rows.h"

#define PACK_AHEAD 32u /* keys asked for before they are packed */

/* x [n] of a coded row, times the scale of its head. */
KVKI_INLINE void apply_scale(const kvki_attend_pack *p, uint32_t j, size_t off_bytes, float *x,
                             uint32_t n)
{
    float scale = kvki_scale_at((const char *)p->rows[j] + off_bytes);

    for (uint32_t i = 0; i < n; i++)
        x[i] *= scale;
}

/* VF_LANES keys from j on, converted and rotated into tmp [VF_LANES, ld]; zeros beyond n. */
static void load_keys(const kvki_attend_pack *p, uint32_t j, float *tmp, size_t ld)
{
    uint32_t d = p->head_dim, half = d / 2;

    for (uint32_t t = 0; t < VF_LANES; t++, j++) {
        float *x = tmp + t * ld;
        if (j >= p->n) {
            memset(x, 0, d * sizeof(float));
            continue;
        }
        row_convert((const char *)p->rows[j] + p->k_off_bytes, p->dtype, d, x);
        if (p->coded)
            apply_scale(p, j, p->k_scale_off_bytes, x, d);
        if (p->cos)
            rotary_rotate(x, p->cos + (size_t)j * half, p->sin + (size_t)j * half, half, x);
    }
}

/* Turns them into VF_LANES columns of a panel [d][GEMM_PANEL]. */
static void pack_keys(const kvki_attend_pack *p, uint32_t j)
{
    uint32_t d = p->head_dim;
    size_t ld = (d + VF_LANES - 1) / VF_LANES * VF_LANES;
    float *to = p->kt + (size_t)(j / GEMM_PANEL) * d * GEMM_PANEL + j % GEMM_PANEL;

    load_keys(p, j, p->tmp, ld);
    for (uint32_t from = 0; from < d; from += VF_LANES) {
        uint32_t n = d - from < VF_LANES ? d - from : VF_LANES;
        vf x[VF_LANES];
        KVKI_UNROLL
        for (uint32_t t = 0; t < VF_LANES; t++)
            x[t] = vf_load(p->tmp + t * ld + from);
        vf_transpose(x);
        if (n == VF_LANES) {
            KVKI_UNROLL
            for (uint32_t t = 0; t < VF_LANES; t++)
                vf_store(to + (size_t)(from + t) * GEMM_PANEL, x[t]);
        } else {
            for (uint32_t t = 0; t < n; t++)
                vf_store(to + (size_t)(from + t) * GEMM_PANEL, x[t]);
        }
    }
}

static bool pack_value(const kvki_attend_pack *p, uint32_t j)
{
    const char *row = (const char *)p->rows[j] + p->v_off_bytes;
    size_t bytes = kvk_dtype_bytes(p->dtype);
    uint32_t d = p->head_dim, bad = 0;

    for (uint32_t from = 0; from < d; from += GEMM_PANEL) {
        uint32_t n = d - from < GEMM_PANEL ? d - from : GEMM_PANEL;
        float *to = p->v + ((size_t)from * KVKI_ATTEND_KEYS) + (size_t)j * GEMM_PANEL;
        row_convert(row + from * bytes, p->dtype, n, to);
        if (p->coded)
            apply_scale(p, j, p->v_scale_off_bytes, to, n);
        memset(to + n, 0, (GEMM_PANEL - n) * sizeof(float));
        for (uint32_t i = 0; i < n; i++)
            bad |= (kvki_bits_of_f32(to[i]) & 0x7f800000u) == 0x7f800000u;
    }
    return bad == 0;
}

/* Asks for the rows [j, j + n) at off_bytes: they lie anywhere, so no hardware foresees them. */
static void fetch_rows(const kvki_attend_pack *p, uint32_t j, uint32_t n, size_t off_bytes)
{
    size_t len_bytes = p->head_dim * kvk_dtype_bytes(p->dtype);

    for (uint32_t t = j; t < j + n && t < p->n; t++) {
        const char *at = (const char *)p->rows[t] + off_bytes;
        for (size_t b = 0; b < len_bytes; b += 64)
            __builtin_prefetch(at + b);
        __builtin_prefetch(at + len_bytes - 1);
    }
}

static void attend_pack(const kvki_attend_pack *p)
{
    uint32_t padded = (p->n + GEMM_PANEL - 1) / GEMM_PANEL * GEMM_PANEL;
    bool finite = true;

    fetch_rows(p, 0, PACK_AHEAD, p->k_off_bytes);
    for (uint32_t j = 0; j < padded; j += VF_LANES) {
        fetch_rows(p, j + PACK_AHEAD, VF_LANES, p->k_off_bytes);
        fetch_rows(p, j, VF_LANES, p->v_off_bytes);
        pack_keys(p, j);
    }
    for (uint32_t j = 0; j < p->n; j++)
        finite = pack_value(p, j) && finite;
    *p->finite_p = finite;
}

/* s [n] becomes cap * tanh(s / cap), in whole vectors: the row has room. */
static void softcap_row(float *s, uint32_t n, float cap)
{
    vf c = vf_set1(cap);

    for (uint32_t j = 0; j < n; j += VF_LANES)
        vf_store(s + j, vf_mul(c, vf_tanh(vf_load(s + j) / c)));
}

/* s [n] becomes exp(s - max), zero in [n, padded); max and sum are the row's. */
static void softmax_row(float *s, uint32_t n, uint32_t padded, float *max_p, float *sum_p)
{
    float max = row_max(s, n, -INFINITY);
    vf shift = vf_set1(max), sum = vf_zero();
    uint32_t j = 0;

    *max_p = max;
    *sum_p = 0;
    for (uint32_t i = n; i < padded; i++)
        s[i] = -INFINITY;
    if (max == -INFINITY) { /* sees nothing, or only logits of -Inf */
        bool nan = false;
        for (uint32_t i = 0; i < n; i++)
            nan = nan || isnan(s[i]);
        memset(s, 0, padded * sizeof(float));
        *sum_p = nan ? NAN : 0;
        *max_p = nan ? NAN : max;
        return;
    }
    for (; j < padded; j += VF_LANES) {
        vf e = vf_exp(vf_sub(vf_load(s + j), shift));
        vf_store(s + j, e);
        sum = vf_add(sum, e);
    }
    *sum_p = vf_hsum(sum);
}

static void block_scores(const kvki_attend_block *b, uint32_t first, uint32_t m, uint32_t keys)
{
    kvki_gemm g = {.a = b->q + (size_t)first * b->head_dim,
                   .lda = b->head_dim,
                   .ldb = GEMM_PANEL,
                   .ldc = KVKI_ATTEND_KEYS,
                   .m = m,
                   .n = GEMM_PANEL,
                   .k = b->head_dim};

    for (uint32_t from = 0; from < keys; from += GEMM_PANEL) {
        g.b = b->kt + (size_t)from * b->head_dim;
        g.c = b->s + (size_t)first * KVKI_ATTEND_KEYS + from;
        gemm(&g);
    }
}

static void block_values(const kvki_attend_block *b, uint32_t first, uint32_t m, uint32_t keys)
{
    kvki_gemm g = {.a = b->s + (size_t)first * KVKI_ATTEND_KEYS,
                   .lda = KVKI_ATTEND_KEYS,
                   .ldb = GEMM_PANEL,
                   .ldc = b->ldo,
                   .m = m,
                   .n = GEMM_PANEL,
                   .k = keys};

    for (uint32_t from = 0; from < b->head_dim; from += GEMM_PANEL) {
        g.b = b->v + (size_t)from * KVKI_ATTEND_KEYS;
        g.c = b->o + (size_t)first * b->ldo + from;
        gemm(&g);
    }
}

static void attend_block(const kvki_attend_block *b)
{
    uint32_t keys = b->limit[b->m - 1];
    uint32_t padded = (keys + VF_LANES - 1) / VF_LANES * VF_LANES;

    block_scores(b, 0, b->m, keys);
    for (uint32_t i = 0; i < b->m; i++) {
        float *s = b->s + (size_t)i * KVKI_ATTEND_KEYS;
        if (b->softcap != 0)
            softcap_row(s, b->limit[i], b->softcap);
        softmax_row(s, b->limit[i], padded, &b->max[i], &b->sum[i]);
    }
    if (b->finite) {
        block_values(b, 0, b->m, keys);
        return;
    }
    for (uint32_t i = 0; i < b->m; i++)
        block_values(b, i, 1, b->limit[i]);
}

static void attend_merge(uint32_t m, uint32_t n, size_t ldo, const float *max, const float *sum,
                         const float *o, float *max_a, float *sum_a, float *o_a)
{
    float keep[KVKI_ATTEND_ROWS] = {0}, take[KVKI_ATTEND_ROWS] = {0};

    for (uint32_t i = 0; i < m; i++) {
        float top = max[i] > max_a[i] || isnan(max[i]) ? max[i] : max_a[i];
        keep[i] = max_a[i] == -INFINITY ? -INFINITY : max_a[i] - top;
        take[i] = max[i] == -INFINITY ? -INFINITY : max[i] - top;
        max_a[i] = top;
    }
    for (uint32_t i = 0; i < m; i += VF_LANES) { /* lanes beyond m are not used */
        vf_store(keep + i, vf_exp(vf_load(keep + i)));
        vf_store(take + i, vf_exp(vf_load(take + i)));
    }
    for (uint32_t i = 0; i < m; i++) {
        vf k = vf_set1(keep[i]), t = vf_set1(take[i]);
        sum_a[i] = sum_a[i] * keep[i] + sum[i] * take[i];
        if (max[i] == -INFINITY)
            continue;
        for (uint32_t j = 0; j < n; j += VF_LANES) {
            vf kept = vf_mul(vf_load(o_a + i * ldo + j), k);
            vf_store(o_a + i * ldo + j, vf_fma(vf_load(o + i * ldo + j), t, kept));
        }
    }
}

#endif
