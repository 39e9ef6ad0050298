/*
 * needles_data.h: the synthetic context of the needles example.
 *
 * Keys and values of a context at Llama-3-8B row size (8 kv heads, d 128, bf16: 4,096 bytes a row),
 * made so that any row can be made again at any time and compared bit for bit. Plain rows are
 * Gaussian; a needle's keys add a direction of its own, its values carry its number. Directions
 * live in the slowly rotating pairs of the heads, as the content of real keys does, so that a
 * constant rotation of the query leaves them standing. Pure functions over tables filled once.
 */
#ifndef KVW_NEEDLES_DATA_H
#define KVW_NEEDLES_DATA_H

#include <stdbool.h>
#include <stdint.h>

#include "kvc/status.h"

enum {
    ND_Q_HEADS = 32,
    ND_KV_HEADS = 8,
    ND_HEAD_DIM = 128,
    ND_KEY_DIM = ND_KV_HEADS * ND_HEAD_DIM,
    ND_INDEX_DIMS = 126, /* + 2 bytes of scale: 128 bytes a token */
    ND_ROW_BYTES = 2 * ND_KEY_DIM * 2,
    ND_MAX_NEEDLES = 64,
    ND_SINK =
        128, /* needles lie between the sinks and the recent tokens, so only a pick finds them */
    ND_RECENT = 4096,
};

#define ND_ROPE_THETA 500000.0

typedef struct nd_data {
    uint32_t n_layers, n_tokens, n_needles;
    uint32_t needle_at[ND_MAX_NEEDLES]; /* token positions, ascending */
    float *basis;                       /* [ND_INDEX_DIMS, ND_KEY_DIM] orthonormal rows */
    float *direction;                   /* [n_needles, ND_KEY_DIM] */
    float *noise;                       /* a ring of Gaussian numbers */
} nd_data;

/* Fills the tables. n_needles <= ND_MAX_NEEDLES, spread over the context between ND_SINK tokens at
 * its begin and ND_RECENT at its end; INVALID where that leaves a needle less than 64 tokens. */
kvc_status nd_init(nd_data *data, uint32_t n_layers, uint32_t n_tokens, uint32_t n_needles,
                   uint64_t seed) KVC_MUST_CHECK;
void nd_fini(nd_data *data);
/* K and V [ND_KV_HEADS, ND_HEAD_DIM] bf16 of one token of one layer. */
void nd_row(const nd_data *data, uint32_t layer, uint32_t token, uint16_t *k, uint16_t *v);
/* The query [ND_Q_HEADS, ND_HEAD_DIM] bf16 that asks for needle i. */
void nd_query(const nd_data *data, uint32_t needle, uint16_t *q);
/* Whether an attention output [ND_Q_HEADS, ND_HEAD_DIM] bf16 carries needle i's values in every
 * head: cosine >= 0.9 with what nd_row wrote there. */
bool nd_answer_right(const nd_data *data, uint32_t layer, uint32_t needle, const uint16_t *out);
/* Projection matrix [ND_KEY_DIM, ND_INDEX_DIMS] of the index, the same for queries and keys. */
void nd_projection(const nd_data *data, float *out);

#endif
