/*
 * attend_support.h: made-up attention problems for the tests of attend: rows scattered in memory,
 * the stated error bound, and room for the results.
 */
#ifndef ATTEND_SUPPORT_H
#define ATTEND_SUPPORT_H

#include "kernels_support.h"

typedef struct problem {
    kvk_attend_args a;
    uint32_t *visible; /* [n_q], what a.visible points at where set */
} problem;

typedef struct problem_shape {
    uint32_t n_q, n_q_heads, n_kv_heads, head_dim, n_kv;
    kvk_dtype dtype;
    bool rope, causal;
    float softcap;
} problem_shape;

/* Element t of a kv head of K (off_bytes k_off_bytes) or V in a row of the problem. */
double slice_element(const kvk_attend_args *a, size_t row, size_t off_bytes, size_t head, size_t t);

/* All memory comes from get(); o and lse are zeroed. */
problem make_problem(support_random *random, const problem_shape *p);

/* The bound of kernels/README.md on |o error| and |lse error| of one query head. */
double attend_bound(const kvk_attend_args *a, size_t query, size_t head);

/* Compares o and lse of two results for the same problem, within the bound. */
void compare_attend(const subject *s, const kvk_attend_args *a, const float *o, const float *lse,
                    const float *want_o, const float *want_lse);

#endif
