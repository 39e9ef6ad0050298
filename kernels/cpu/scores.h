/*
 * scores.h: what score_keys and score_rows share: dot products of queries with keys that lie at a
 * stride or at pointers.
 */
#ifndef KVKI_SCORES_H
#define KVKI_SCORES_H

#include "internal.h"

typedef struct kvki_scores {
    const float *q; /* [m, n_q_heads, head_dim] */
    uint32_t m, n_q_heads, n_kv_heads, head_dim;
    const void *const *rows; /* [n], or NULL: key j at data + j * stride_bytes */
    const char *data;
    size_t stride_bytes;
    kvk_dtype dtype;
    uint32_t n;
    float *out; /* out[(i * n_q_heads + h) * out_stride + j] */
    size_t out_stride;
} kvki_scores;

bool kvki_scores_ok(const kvki_scores *s);
void kvki_scores_ref(const kvki_scores *s);
void kvki_scores_fast(kvk_backend *be, const kvki_scores *s);

#endif
