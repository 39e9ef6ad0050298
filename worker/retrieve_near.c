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

size_t kvwi_retriever_q_bytes(const kvw_retriever *r, uint32_t n_q)
{
    return o_bytes(r, n_q);
}

/* Of one chunk's result: o in the model's dtype, lse behind it on its own alignment. */
static size_t lse_off(const kvw_retriever *r, uint32_t n_q)
{
    return (o_bytes(r, n_q) + sizeof(float) - 1u) / sizeof(float) * sizeof(float);
}

size_t kvwi_retriever_part_bytes(const kvw_retriever *r, uint32_t n_q)
{
    return lse_off(r, n_q) + (size_t)n_q * heads_of(r) * sizeof(float);
}

static bool is_near(const kvw_retriever *r, uint32_t server)
{
    return r->flights[server].n != 0 && r->flights[server].near;
}

/* Chunk j of the misses, in their order. */
static kvc_attend_group group_of(kvw_retriever *r, uint32_t server, uint32_t j, uint32_t n_q)
{
    const kvw_worker *w = r->seq->worker;
    uint8_t *out = (uint8_t *)r->near_out.p + j * kvwi_retriever_part_bytes(r, n_q);
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
                   r->miss_status + flight->first, &flight->info, r->near_deadline_ns, &flight->op);
    flight->in_flight = flight->status == KVC_OK;
    free(groups);
}

void kvwi_retriever_near_send(kvw_retriever *r, const void *q, uint32_t n_q)
{
    const kvw_worker *w = r->seq->worker;
    size_t n = r->n_misses / KVW_CHUNK_TOKENS;
    kvc_status st = kvwi_buf_need(&r->near_q, o_bytes(r, n_q));
    if (st == KVC_OK) {
        st = kvwi_buf_need(&r->near_out, n * kvwi_retriever_part_bytes(r, n_q));
    }
    r->near_deadline_ns = kvc_deadline_ns(w->opts.fetch_timeout_ns / KVWI_NEAR_SHARE);
    if (st == KVC_OK) {
        memcpy(r->near_q.p, q, o_bytes(r, n_q)); /* the caller's is only borrowed */
    }
    for (uint32_t s = 0; s < w->servers.n; s++) {
        kvwi_flight *flight = &r->flights[s];
        if (!is_near(r, s)) {
            continue;
        }
        flight->status = st;
        memset(r->miss_status + flight->first, KVC_NOT_FOUND, flight->n);
        if (st == KVC_OK) {
            send_to(r, s, n_q);
        }
    }
}

/* The first failure of a request, or of a row in one. */
static kvc_status land(kvw_retriever *r)
{
    kvc_status first = KVC_OK;
    for (uint32_t s = 0; s < r->seq->worker->servers.n; s++) {
        kvwi_flight *flight = &r->flights[s];
        if (!is_near(r, s)) {
            continue;
        }
        kvc_status st = kvwi_flight_land(flight, r->near_deadline_ns);
        for (uint32_t i = 0; st == KVC_OK && i < flight->n; i++) {
            st = (kvc_status)r->miss_status[flight->first + i];
        }
        first = first == KVC_OK ? st : first;
    }
    return first;
}

static void count(kvw_retriever *r, uint32_t n_q)
{
    for (uint32_t s = 0; s < r->seq->worker->servers.n; s++) {
        const kvwi_flight *flight = &r->flights[s];
        if (!is_near(r, s)) {
            continue;
        }
        kvwi_flight_count(r->seq, s, &flight->info, 0, 0);
        r->seq->stats.rows_near += flight->n;
        r->seq->servers[s].rows_near += flight->n;
        r->seq->stats.bytes_near +=
            o_bytes(r, n_q) + flight->n / KVW_CHUNK_TOKENS * kvwi_retriever_part_bytes(r, n_q);
    }
}

/* The partial of chunk j of the misses. */
static kvc_status take(const kvw_retriever *r, uint32_t j, uint32_t n_q, float *o, float *lse)
{
    const kvw_worker *w = r->seq->worker;
    uint32_t rows = n_q * heads_of(r), dim = w->opts.head_dim, i = kvwi_retriever_chosen(r, j);
    const uint8_t *out = (const uint8_t *)r->near_out.p + j * kvwi_retriever_part_bytes(r, n_q);
    const kvk_convert_args args = {.in = {out, dim * w->elem_bytes, w->opts.dtype},
                                   .n = rows,
                                   .width = dim,
                                   .out = o + (size_t)i * rows * dim};
    memcpy(lse + (size_t)i * rows, out + lse_off(r, n_q), rows * sizeof(float));
    return w->ops->convert(w->be, &args, NULL);
}

kvc_status kvwi_retriever_near_land(kvw_retriever *r, uint32_t n_q, float *o, float *lse)
{
    uint64_t t0 = kvc_now_ns();
    kvc_status st = land(r);
    r->seq->stats.ns_fetch_wait += kvc_now_ns() - t0;
    if (st != KVC_OK) {
        return st;
    }
    count(r, n_q);
    for (uint32_t s = 0; s < r->seq->worker->servers.n; s++) {
        uint32_t first = r->flights[s].first / KVW_CHUNK_TOKENS;
        uint32_t n = is_near(r, s) ? r->flights[s].n / KVW_CHUNK_TOKENS : 0;
        for (uint32_t j = first; st == KVC_OK && j < first + n; j++) {
            st = take(r, j, n_q, o, lse);
        }
    }
    return st;
}
