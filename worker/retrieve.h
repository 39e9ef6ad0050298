/*
 * retrieve.h: a retriever, between retrieve_choose.c, which chooses chunks, retrieve_ways.c, which
 * decides how they come and asks for them, retrieve.c, which holds them and attends over them, and
 * retrieve_near.c, which has servers attend instead. Its sequence's thread.
 */
#ifndef KVWI_RETRIEVE_H
#define KVWI_RETRIEVE_H

#include "internal.h"

#define KVWI_NO_CHUNK   UINT32_MAX
/* Of fetch_timeout_ns, what attention beside the data has; the rest is for bringing the chunks. */
#define KVWI_NEAR_SHARE 2u

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
    uint32_t n_misses; /* rows, by server; a flight that has landed has none */
    kvwi_buf near_q, near_out;
    uint64_t deadline_ns, near_deadline_ns;
    /* of whole chunks; [k], in the order of the misses; NULL: chunks are no blocks */
    uint32_t *whole_slot;
    uint8_t *whole_tier;
    kvc_digest *whole_name;
    uint64_t n_calls, n_queries;       /* since the last retrieval */
    uint64_t last_calls, last_queries; /* of the one before that was used */
    uint64_t n_brought, n_stayed;      /* chunks: asked for; chosen again while here */
    kvwi_buf all_scores, topk, q, part, out;
    kvwi_device_retriever *device; /* NULL without one */
    kvwi_flight flights[];         /* of each server */
};

/* The k best of chunks 0 .. n - 1 for query [landmark_dim]: ids, scores, weights and n of r. */
kvc_status kvwi_retriever_choose(kvw_retriever *r, const float *query, uint32_t n);

/* Decides near and whole of each flight. because: why near, which failed, is out; CHEAPEST: it may
 * be in. */
void kvwi_retriever_decide(kvw_retriever *r, kvc_way_why because);
/* Bits of the servers whose chunks stay where they are. */
uint64_t kvwi_retriever_near_servers(const kvw_retriever *r);
/* Asks for all that is to be brought. */
void kvwi_retriever_send(kvw_retriever *r, uint64_t deadline_ns);
/* Waits for what was asked of a server; its status is the flight's, those of rows in miss_status.
 */
void kvwi_retriever_land(kvw_retriever *r, uint32_t server);
/* Which of the chosen is chunk j of the misses. */
uint32_t kvwi_retriever_chosen(const kvw_retriever *r, uint32_t j);

/* Bytes of n_q queries, and of one chunk's result for them. */
size_t kvwi_retriever_q_bytes(const kvw_retriever *r, uint32_t n_q);
size_t kvwi_retriever_part_bytes(const kvw_retriever *r, uint32_t n_q);
/* Sends q [n_q, query heads, head_dim] in the worker's dtype to the servers that attend. What could
 * not be sent is told by the land that follows. */
void kvwi_retriever_near_send(kvw_retriever *r, const void *q, uint32_t n_q);
/* Waits for all; writes the partials of chosen chunk i, where they were made afar, to o + i * n_q *
 * heads * head_dim and lse + i * n_q * heads. Any failure, a missing row too, is that of all:
 * nothing was written. */
kvc_status kvwi_retriever_near_land(kvw_retriever *r, uint32_t n_q, float *o, float *lse);

#endif
