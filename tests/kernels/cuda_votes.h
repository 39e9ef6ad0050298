/*
 * cuda_votes.h: what the cases of soft votes share (cuda_cases_vote.c): made-up rows and queries,
 * and the check of picks against the CPU's score_index, softmax_stats and vote. Single-threaded.
 */
#ifndef CUDA_VOTES_H
#define CUDA_VOTES_H

#include "cuda_support.h"

typedef struct votes_shape {
    uint32_t n_q_heads, n_kv_heads, dims;
} votes_shape;

/* One sequence of a batch, and what the device answered. */
typedef struct votes_sequence {
    uint32_t n, base;
    uint8_t *rows;
    float *q;
    const uint32_t *at; /* [n] ascending: where rows are for a window; NULL: one after the other */
    uint32_t n_picks;
    const uint32_t *picks; /* base + row */
    const float *scores;
} votes_sequence;

votes_sequence votes_sequence_of(numbers *from, uint32_t n, votes_shape s);
/* Ends the program unless the answer is the k best votes within eps, within the bounds. */
void votes_compare(votes_shape s, const votes_sequence *seq, uint32_t k, uint32_t eps,
                   const char *what);

/* What fools a sample or a bound: equal rows, few kinds of rows, growing ones, a hot region far
 * above the rest (whose sums overflow), peaked heads, a query of zeros, nearly flat votes. */
enum { VOTES_SPOILED = 7 };
void votes_spoil(numbers *from, votes_sequence *seq, votes_shape s, int kind);

#endif
