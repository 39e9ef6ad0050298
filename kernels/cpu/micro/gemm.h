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

/* One tile of mr x nv vectors; tail != 0: the only vector has that many columns. */
KVKI_INLINE void gemm_tile(const kvki_gemm *g, uint32_t row, uint32_t col, uint32_t mr, uint32_t nv,
                           uint32_t tail)
{
    const float *a = g->a + row * g->lda;
    const float *b = g->b + col;
    float *c = g->c + row * g->ldc + col;
    vf acc[6][GEMM_NV];

    KVKI_UNROLL
    for (uint32_t i = 0; i < mr; i++) {
        KVKI_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            const float *from = c + i * g->ldc + j * VF_LANES;
            acc[i][j] = !g->accumulate ? vf_zero() : tail ? vf_load_n(from, tail) : vf_load(from);
        }
    }
    for (uint32_t p = 0; p < g->k; p++) {
        vf bv[GEMM_NV];
        KVKI_UNROLL
        for (uint32_t j = 0; j < nv; j++)
            bv[j] = tail ? vf_load_n(b, tail) : vf_load(b + j * VF_LANES);
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
            if (tail)
                vf_store_n(c + i * g->ldc, acc[i][j], tail);
            else
                vf_store(c + i * g->ldc + j * VF_LANES, acc[i][j]);
        }
    }
}

/* All rows of the columns [col, col + nv vectors). */
KVKI_INLINE void gemm_columns(const kvki_gemm *g, uint32_t col, uint32_t nv, uint32_t tail)
{
    uint32_t row = 0;

    for (; row + 6 <= g->m; row += 6)
        gemm_tile(g, row, col, 6, nv, tail);
    for (; row + 3 <= g->m; row += 3)
        gemm_tile(g, row, col, 3, nv, tail);
    for (; row < g->m; row++)
        gemm_tile(g, row, col, 1, nv, tail);
}

static void gemm(const kvki_gemm *g)
{
    uint32_t col = 0;

    for (; col + GEMM_PANEL <= g->n; col += GEMM_PANEL)
        gemm_columns(g, col, GEMM_NV, 0);
    for (; col + VF_LANES <= g->n; col += VF_LANES)
        gemm_columns(g, col, 1, 0);
    if (col < g->n)
        gemm_columns(g, col, 1, g->n - col);
}

#endif
