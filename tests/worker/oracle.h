/*
 * oracle.h: brute force in double, written from the papers' formulas and not from the worker.
 *
 * No paging, no blocking, no compression tricks: every score and every attention weight is computed
 * from the rig's doubles. A compressed index is modelled as the exact product of the projections,
 * with a bound on what int8 may change.
 */
#ifndef TESTS_WORKER_ORACLE_H
#define TESTS_WORKER_ORACLE_H

#include "rig.h"

/* Scores of positions [begin, end), each with a bound on what the worker's rounding may change. */
typedef struct oracle_scores {
    uint32_t begin, n;
    double *score, *bound;
} oracle_scores;

/* Scores of a step whose queries are those of positions first .. first + n_q - 1; dims 0: exact. */
oracle_scores oracle_score(const rig *r, uint32_t layer, uint32_t first, uint32_t n_q,
                           uint32_t begin, uint32_t end, uint32_t dims);
void oracle_scores_fini(oracle_scores *s);
/* Fails unless picks are k best of s within the bounds, ascending and without repeats. */
void oracle_check_picks(const oracle_scores *s, uint32_t k, const uint32_t *picks, uint32_t n);
/* The k best with ties by position, ascending; out [k]. */
void oracle_top(const oracle_scores *s, uint32_t k, uint32_t *out);

/* Where recent begins for a step. */
uint32_t oracle_near(const rig *r, uint32_t n_tokens, uint32_t n_q);

/*
 * Attention of a step over sinks, picks and [near, first + n_q), with positions as the selector
 * has them; everything at its own position where picks is NULL. skip [n_skip]: positions left out
 * (numbering as if they were there). out [n_q, q_width], lse [n_q, n_q_heads].
 */
void oracle_attend(const rig *r, uint32_t layer, uint32_t first, uint32_t n_q,
                   const uint32_t *picks, uint32_t n_picks, uint32_t near, const uint32_t *skip,
                   uint32_t n_skip, double *out, double *lse);

/* A rig_check: picks and attention of every step against the above; arg: uint32_t *dims. */
void oracle_check_step(void *arg, const rig *r, const rig_step *step);
/* Fails unless out and lse of a step are the oracle's within the dtype's bound. */
void oracle_check_out(const rig *r, const rig_step *step, const double *out, const double *lse);

#endif
