/*
 * retrieve.h: a retriever, between retrieve_choose.c, which chooses chunks, retrieve.c, which
 * brings them and attends over them, and retrieve_near.c, which has servers attend instead. Its
 * sequence's thread.
 */
#ifndef KVWI_RETRIEVE_H
#define KVWI_RETRIEVE_H

#include "internal.h"

#define KVWI_NO_CHUNK UINT32_MAX

struct kvw_retriever {
    kvw_seq *seq;
    kvw_retriever *next; /* in the sequence's list */
    uint32_t layer;
    uint32_t first_head, n_heads; /* kv heads that it attends for */
    uint32_t dim, dim_off;        /* elements of a landmark that it scores, and where they begin */
    bool ready;                   /* a retrieval was made and nothing has spoilt it */
    uint32_t n;
    uint32_t *ids, *slot, *held;   /* [k] */
    uint32_t *wanted, n_wanted;    /* [k] of ids: those that are not here */
    uint32_t *fresh;               /* [k] 1: the slot has, or will have, what no device has of it */
    float *scores, *weights;       /* [k] */
    uint32_t *order_ids;           /* [k] as top-k gave them */
    float *order_scores, *order_w; /* [k] likewise */
    uint32_t *miss_pos, *miss_slot; /* [k * chunk] */
    int8_t *miss_status;            /* [k * chunk] */
    const void *rows[KVW_CHUNK_TOKENS];
    uint8_t *slab; /* [k, chunk, row_bytes] */
    size_t slab_bytes;
    kvwi_regions regions;
    uint32_t n_misses; /* rows, by server */
    bool near;         /* the misses stay where they are, and are attended there */
    kvwi_buf near_q, near_out;
    uint64_t deadline_ns;
    kvwi_buf all_scores, topk, q, part, out;
    kvwi_device_retriever *device; /* NULL without one */
    kvwi_flight flights[];         /* of each server */
};

/* The k best of chunks 0 .. n - 1 for query [landmark_dim]: ids, scores, weights and n of r. */
kvc_status kvwi_retriever_choose(kvw_retriever *r, const float *query, uint32_t n);

/* Whether what is not here shall be attended beside the data. */
bool kvwi_retriever_near_wanted(const kvw_retriever *r);
/* Sends q [n_q, query heads, head_dim] in the worker's dtype to the servers of all misses. What
 * could not be sent is told by the land that follows. */
void kvwi_retriever_near_send(kvw_retriever *r, const void *q, uint32_t n_q);
/* Waits for all; writes the partials of chosen chunk i to o + i * n_q * heads * head_dim and lse +
 * i * n_q * heads. Any failure, a missing row too, is that of all: nothing was written. */
kvc_status kvwi_retriever_near_land(kvw_retriever *r, uint32_t n_q, float *o, float *lse);

#endif
