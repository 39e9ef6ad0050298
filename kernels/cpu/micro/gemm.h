/*
 * gemm.h: the one matrix product: c = a x b in float, a read by broadcast, b by rows of lanes.
 *
 * Each element of c is one chain of vf_fma over k in order, whatever tile it falls in; attend,
 * project and their tests rely on that. Tiles are up to 6 rows by GEMM_NV vectors; tile sizes are
 * compile-time constants so that the sums stay in registers.
 */
#ifndef KVKI_GEMM_H
#define KVKI_GEMM_H

#include "../isa.h"
#include "vec.h"

/* Vector j of nv at p; the last one has `last` columns where it is partial. */
KVKI_INLINE vf gemm_load(const float *p, uint32_t j, uint32_t nv, bool partial, uint32_t last)
{
    return partial && j == nv - 1 ? vf_load_n(p + j * VF_LANES, last) : vf_load(p + j * VF_LANES);
}

/* One tile of mr x nv vectors. */
KVKI_INLINE void gemm_tile(const kvki_gemm *g, uint32_t row, uint32_t col, uint32_t mr, uint32_t nv,
                           bool partial, uint32_t last)
{
    const float *a = g->a + row * g->lda;
    const float *b = g->b + col;
    float *c = g->c + row * g->ldc + col;
    vf acc[6][GEMM_NV];

    KVKI_UNROLL
    for (uint32_t i = 0; i < mr; i++) {
        KVKI_UNROLL
        for (uint32_t j = 0; j < nv; j++)
            acc[i][j] = g->accumulate ? gemm_load(c + i * g->ldc, j, nv, partial, last) : vf_zero();
    }
    for (uint32_t p = 0; p < g->k; p++) {
        vf bv[GEMM_NV];
        KVKI_UNROLL
        for (uint32_t j = 0; j < nv; j++)
            bv[j] = gemm_load(b, j, nv, partial, last);
        KVKI_UNROLL
        for (uint32_t i = 0; i < mr; i++) {
            vf av = vf_set1(a[i * g->lda + p]);
            KVKI_UNROLL
            for (uint32_t j = 0; j < nv; j++)
                acc[i][j] = vf_fma(av, bv[j], acc[i][j]);
        }
        b += g->ldb;
    }
    KVKI_UNROLL
    for (uint32_t i = 0; i < mr; i++) {
        KVKI_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            if (partial && j == nv - 1)
                vf_store_n(c + i * g->ldc + j * VF_LANES, acc[i][j], last);
            else
                vf_store(c + i * g->ldc + j * VF_LANES, acc[i][j]);
        }
    }
}

/* All rows of the columns [col, col + nv vectors). */
KVKI_INLINE void gemm_columns(const kvki_gemm *g, uint32_t col, uint32_t nv, bool partial,
                              uint32_t last)
{
    uint32_t row = 0;

    for (; row + 6 <= g->m; row += 6)
        gemm_tile(g, row, col, 6, nv, partial, last);
    for (; row + 3 <= g->m; row += 3)
        gemm_tile(g, row, col, 3, nv, partial, last);
    for (; row < g->m; row++)
        gemm_tile(g, row, col, 1, nv, partial, last);
}

/* The n < GEMM_PANEL last columns. */
static void gemm_rest(const kvki_gemm *g, uint32_t col, uint32_t n)
{
    uint32_t last = n % VF_LANES ? n % VF_LANES : VF_LANES;
    bool partial = last != VF_LANES;

    switch ((n + VF_LANES - 1) / VF_LANES * 2 + partial) {
    case 2:
        gemm_columns(g, col, 1, false, 0);
        break;
    case 3:
        gemm_columns(g, col, 1, true, last);
        break;
    case 4:
        gemm_columns(g, col, 2, false, 0);
        break;
    case 5:
        gemm_columns(g, col, 2, true, last);
        break;
#if GEMM_NV > 2
    case 6:
        gemm_columns(g, col, 3, false, 0);
        break;
    case 7:
        gemm_columns(g, col, 3, true, last);
        break;
    case 9:
        gemm_columns(g, col, 4, true, last);
        break;
#endif
    default: /* nothing is left */
        break;
    }
}

static void gemm(const kvki_gemm *g)
{
    uint32_t col = 0;

    for (; col + GEMM_PANEL <= g->n; col += GEMM_PANEL)
        gemm_columns(g, col, GEMM_NV, false, 0);
    gemm_rest(g, col, g->n - col);
}

#endif
