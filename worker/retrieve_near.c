/*
 * retrieve_near.c: chosen chunks that stay where they are: each server attends over those that it
 * holds and sends one partial a chunk, which is fused here with its weight.
 *
 * The sequence's thread. One request a server, one group a chunk, all under way together, the query
 * in the first group only. A chunk's softmax is its own, so partials need no merge: they take the
 * place of those made here. Invariant: between send and land the flights, near_q and near_out
 * belong to the requests.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "retrieve.h"

/* Of the time for the chunks: what is left is for fetching them. */
#define SHARE 2u

static uint32_t heads_of(const kvw_retriever *r)
{
    const kvw_opts *o = &r->seq->worker->opts;
    return o->n_q_heads / o->n_kv_heads * r->n_heads;
}

static size_t o_bytes(const kvw_retriever *r, uint32_t n_q)
{
    const kvw_worker *w = r->seq->worker;
    return (size_t)n_q * heads_of(r) * w->opts.head_dim * w->elem_bytes;
}

/* Of one chunk's result: o in the model's dtype, lse behind it on its own alignment. */
static size_t lse_off(const kvw_retriever *r, uint32_t n_q)
{
    return (o_bytes(r, n_q) + sizeof(float) - 1u) / sizeof(float) * sizeof(float);
}

static size_t part_bytes(const kvw_retriever *r, uint32_t n_q)
{
    return lse_off(r, n_q) + (size_t)n_q * heads_of(r) * sizeof(float);
}

bool kvwi_retriever_near_wanted(const kvw_retriever *r)
{
    const kvw_worker *w = r->seq->worker;
    return w->device == NULL && w->way == KVC_WAY_NEAR && !w->opts.exact &&
           r->n_heads == w->opts.n_kv_heads;
}

/* Chunk j of the misses, in their order. */
static kvc_attend_group group_of(kvw_retriever *r, uint32_t server, uint32_t j, uint32_t n_q)
{
    const kvw_worker *w = r->seq->worker;
    uint8_t *out = (uint8_t *)r->near_out.p + j * part_bytes(r, n_q);
    return (kvc_attend_group){
        .context = r->seq->servers[server].context,
        .part = w->kv_parts[r->layer],
        .n_picks = KVW_CHUNK_TOKENS,
        .picks = r->miss_pos + (size_t)j * KVW_CHUNK_TOKENS,
        .row_bytes = (uint32_t)w->row_bytes,
        .n_q = n_q,
        .n_q_heads = heads_of(r),
        .dim = w->opts.head_dim,
        .q_dtype = kvwi_wire_dtype(w->opts.dtype),
        .o_dtype = kvwi_wire_dtype(w->opts.dtype),
        .o = out,
        .lse = (float *)(void *)(out + lse_off(r, n_q)),
    };
}

static void send_to(kvw_retriever *r, uint32_t server, uint32_t n_q)
{
    kvwi_flight *flight = &r->flights[server];
    uint32_t first = flight->first / KVW_CHUNK_TOKENS, n = flight->n / KVW_CHUNK_TOKENS;
    kvc_attend_group *groups = calloc(n, sizeof(*groups));
    if (groups == NULL) {
        flight->status = KVC_NO_MEMORY;
        return;
    }
    for (uint32_t j = 0; j < n; j++) {
        groups[j] = group_of(r, server, first + j, n_q);
    }
    groups[0].q = r->near_q.p;
    memset(&flight->info, 0, sizeof(flight->info));
    kvc_op_init(&flight->op, NULL, NULL);
    flight->status =
        kvc_attend(r->seq->worker->servers.all[server].client, groups, n,
                   r->miss_status + flight->first, &flight->info, r->deadline_ns, &flight->op);
    flight->in_flight = flight->status == KVC_OK;
    free(groups);
}

void kvwi_retriever_near_send(kvw_retriever *r, const void *q, uint32_t n_q)
{
    const kvw_worker *w = r->seq->worker;
    size_t n = r->n_misses / KVW_CHUNK_TOKENS;
    kvc_status st = kvwi_buf_need(&r->near_q, o_bytes(r, n_q));
    if (st == KVC_OK) {
        st = kvwi_buf_need(&r->near_out, n * part_bytes(r, n_q));
    }
    r->deadline_ns = kvc_deadline_ns(w->opts.fetch_timeout_ns / SHARE);
    memset(r->miss_status, KVC_NOT_FOUND, r->n_misses);
    if (st == KVC_OK) {
        memcpy(r->near_q.p, q, o_bytes(r, n_q)); /* the caller's is only borrowed */
    }
    for (uint32_t s = 0; s < w->servers.n; s++) {
        r->flights[s].status = st;
        if (st == KVC_OK && r->flights[s].n != 0) {
            send_to(r, s, n_q);
        }
    }
}

/* The first failure of a request, or of a row in one. */
static kvc_status land(kvw_retriever *r)
{
    kvc_status first = KVC_OK;
    for (uint32_t s = 0; s < r->seq->worker->servers.n; s++) {
        kvc_status st = kvwi_flight_land(&r->flights[s], r->deadline_ns);
        first = first == KVC_OK && r->flights[s].n != 0 ? st : first;
    }
    for (uint32_t i = 0; first == KVC_OK && i < r->n_misses; i++) {
        first = (kvc_status)r->miss_status[i];
    }
    return first;
}

static void count(kvw_retriever *r, uint32_t n_q)
{
    for (uint32_t s = 0; s < r->seq->worker->servers.n; s++) {
        const kvwi_flight *flight = &r->flights[s];
        if (flight->n == 0) {
            continue;
        }
        kvwi_flight_count(r->seq, s, &flight->info, 0, 0);
        r->seq->stats.rows_near += flight->n;
        r->seq->servers[s].rows_near += flight->n;
        r->seq->stats.bytes_near +=
            o_bytes(r, n_q) + flight->n / KVW_CHUNK_TOKENS * part_bytes(r, n_q);
    }
}

kvc_status kvwi_retriever_near_land(kvw_retriever *r, uint32_t n_q, float *o, float *lse)
{
    const kvw_worker *w = r->seq->worker;
    uint32_t rows = n_q * heads_of(r), dim = w->opts.head_dim;
    uint64_t t0 = kvc_now_ns();
    kvc_status st = land(r);
    r->seq->stats.ns_fetch_wait += kvc_now_ns() - t0;
    if (st != KVC_OK) {
        return st;
    }
    count(r, n_q);
    for (uint32_t j = 0; st == KVC_OK && j < r->n_misses / KVW_CHUNK_TOKENS; j++) {
        const uint8_t *out = (const uint8_t *)r->near_out.p + j * part_bytes(r, n_q);
        uint32_t slot = r->miss_slot[(size_t)j * KVW_CHUNK_TOKENS] / KVW_CHUNK_TOKENS, i = 0;
        while (r->slot[i] != slot) {
            i++;
        }
        const kvk_convert_args args = {.in = {out, dim * w->elem_bytes, w->opts.dtype},
                                       .n = rows,
                                       .width = dim,
                                       .out = o + (size_t)i * rows * dim};
        st = w->ops->convert(w->be, &args, NULL);
        memcpy(lse + (size_t)i * rows, out + lse_off(r, n_q), rows * sizeof(float));
    }
    return st;
}
