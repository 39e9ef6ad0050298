/*
 * retrieve_ways.c: how chosen chunks that are not here are reached, server by server: attended
 * where they are (retrieve_near.c), or brought, as rows or, where a chunk is a block, as whole
 * blocks by name.
 *
 * The sequence's thread. What is brought serves every call until the next retrieval and stays for
 * those that choose it again, so the ways are compared by what a retrieval costs, not a call. Rows
 * of a mapped block need no request, and RDMA writes rows where they belong: these stay rows.
 */
#include <string.h>

#include "base/clock.h"
#include "retrieve.h"

/* The calls that are expected to use the retrieval, of *n_q_p queries each. */
static double calls_of(const kvw_retriever *r, uint32_t *n_q_p)
{
    uint64_t known = r->seq->worker->opts.retrieval_queries;
    uint64_t n = known != 0 ? known : r->last_calls != 0 ? r->last_queries : KVW_CHUNK_TOKENS;
    uint64_t n_q = r->last_calls != 0 ? (r->last_queries + r->last_calls - 1) / r->last_calls : 1;
    n_q = n_q < n ? n_q : n;
    uint64_t calls = (n + n_q - 1) / n_q;
    *n_q_p = (uint32_t)n_q;
    return (double)calls;
}

/* How many retrievals have the use of a chunk that is brought. */
static double stay_of(const kvw_retriever *r)
{
    return 1 + (double)r->n_stayed / (double)(r->n_brought + r->seq->worker->opts.k);
}

static kvc_way choose(const kvw_retriever *r, uint32_t server, kvc_way_why because)
{
    const kvw_worker *w = r->seq->worker;
    const kvwi_flight *flight = &r->flights[server];
    uint32_t n_q = 1, n_chunks = flight->n / KVW_CHUNK_TOKENS;
    double calls = calls_of(r, &n_q);
    kvc_way_ask ask = {
        .n_rows = flight->n,
        .row_bytes = (uint32_t)w->row_bytes,
        .n_q = n_q,
        .q_bytes = kvwi_retriever_q_bytes(r, n_q),
        .o_bytes = n_chunks * kvwi_retriever_part_bytes(r, n_q),
        .reuse = calls * stay_of(r) - 1,
        .because = because,
    };
    if (because != KVC_WHY_CHEAPEST || w->opts.exact || r->n_heads != w->opts.n_kv_heads) {
        ask.refused = 1u << KVC_WAY_NEAR;
    }
    if (because == KVC_WHY_CHEAPEST && w->opts.exact) {
        ask.because = KVC_WHY_EXACT;
    }
    return kvwi_way_choose(w, server, ask);
}

/* Whether the chunks of a flight, which are blocks, shall come as such. Rows that only a device
 * maps are not for the host to read: they come by request. */
static bool is_whole(const kvw_retriever *r, uint32_t server, kvc_way way)
{
    const kvw_worker *w = r->seq->worker;
    kvc_mapped_value value;
    if (w->opts.block_tokens != KVW_CHUNK_TOKENS || (way != KVC_WAY_ROWS && way != KVC_WAY_SHM)) {
        return false;
    }
    uint32_t local = r->miss_pos[r->flights[server].first] / KVW_CHUNK_TOKENS;
    return way == KVC_WAY_ROWS ||
           kvc_context_locate(r->seq->servers[server].context, w->kv_parts[r->layer], local,
                              &value) != KVC_OK ||
           value.rows == NULL;
}

void kvwi_retriever_decide(kvw_retriever *r, kvc_way_why because)
{
    for (uint32_t s = 0; s < r->seq->worker->servers.n; s++) {
        kvwi_flight *flight = &r->flights[s];
        if (flight->n == 0) {
            continue;
        }
        kvc_way way = choose(r, s, because);
        flight->near = way == KVC_WAY_NEAR;
        flight->whole = is_whole(r, s, way);
    }
}

uint64_t kvwi_retriever_near_servers(const kvw_retriever *r)
{
    uint64_t bits = 0;
    for (uint32_t s = 0; s < r->seq->worker->servers.n; s++) {
        bits |= (uint64_t)(r->flights[s].n != 0 && r->flights[s].near) << s;
    }
    return bits;
}

uint32_t kvwi_retriever_chosen(const kvw_retriever *r, uint32_t j)
{
    uint32_t slot = r->miss_slot[(size_t)j * KVW_CHUNK_TOKENS] / KVW_CHUNK_TOKENS, i = 0;
    while (r->slot[i] != slot) {
        i++;
    }
    return i;
}

/* Statuses are of chunks, at the front of those of the flight's rows. */
static void send_whole(kvw_retriever *r, uint32_t server)
{
    const kvw_worker *w = r->seq->worker;
    kvwi_flight *flight = &r->flights[server];
    uint32_t first = flight->first / KVW_CHUNK_TOKENS, n = flight->n / KVW_CHUNK_TOKENS;
    uint32_t value_bytes = (uint32_t)(KVW_CHUNK_TOKENS * w->row_bytes);
    for (uint32_t j = first; j < first + n; j++) {
        uint32_t i = kvwi_retriever_chosen(r, j);
        r->whole_slot[j] = r->slot[i];
        r->whole_name[j] = r->seq->blocks[r->ids[i]].digest;
    }
    const kvc_block_part part = {.part = w->kv_parts[r->layer],
                                 .value_bytes = value_bytes,
                                 .stride_bytes = value_bytes,
                                 .dst_slots = r->whole_slot + first};
    kvc_op_init(&flight->op, NULL, NULL);
    flight->status =
        kvc_fetch_blocks(w->servers.all[server].client, &w->schema, r->whole_name + first, n, &part,
                         1, r->regions.of[server], r->miss_status + flight->first,
                         r->whole_tier + first, r->deadline_ns, &flight->op);
    flight->in_flight = flight->status == KVC_OK;
}

static void send_rows(kvw_retriever *r, uint32_t server)
{
    const kvw_worker *w = r->seq->worker;
    kvwi_flight *flight = &r->flights[server];
    const kvc_pick_group group = {.part = w->kv_parts[r->layer],
                                  .row_bytes = (uint32_t)w->row_bytes,
                                  .n_picks = flight->n,
                                  .picks = r->miss_pos + flight->first,
                                  .dst_slots = r->miss_slot + flight->first};
    kvwi_flight_send(r->seq, server, flight, group, &r->regions, r->miss_status + flight->first,
                     r->deadline_ns);
}

void kvwi_retriever_send(kvw_retriever *r, uint64_t deadline_ns)
{
    r->deadline_ns = deadline_ns;
    for (uint32_t s = 0; s < r->seq->worker->servers.n; s++) {
        kvwi_flight *flight = &r->flights[s];
        flight->status = KVC_OK;
        if (flight->n == 0 || flight->near) {
            continue;
        }
        r->n_brought += flight->n / KVW_CHUNK_TOKENS;
        memset(&flight->info, 0, sizeof(flight->info));
        memset(r->miss_status + flight->first, KVC_NOT_FOUND, flight->n);
        if (flight->whole) {
            send_whole(r, s);
        } else {
            send_rows(r, s);
        }
    }
}

/* What the statuses and tiers of whole chunks say of their rows. */
static void spread(kvw_retriever *r, kvwi_flight *flight)
{
    uint32_t first = flight->first / KVW_CHUNK_TOKENS, n = flight->n / KVW_CHUNK_TOKENS;
    int8_t *status = r->miss_status + flight->first;
    flight->info.requests = 1;
    for (uint32_t j = n; j-- > 0;) { /* the last first: rows are written behind the chunks */
        bool here = status[j] == KVC_OK;
        flight->info.rows_dram += here && r->whole_tier[first + j] == KVC_TIER_DRAM;
        flight->info.rows_lmdb += here && r->whole_tier[first + j] == KVC_TIER_LMDB;
        flight->info.rows_gpu += here && r->whole_tier[first + j] == KVC_TIER_GPU;
        memset(status + (size_t)j * KVW_CHUNK_TOKENS, status[j], KVW_CHUNK_TOKENS);
    }
    flight->info.rows_dram *= KVW_CHUNK_TOKENS;
    flight->info.rows_lmdb *= KVW_CHUNK_TOKENS;
    flight->info.rows_gpu *= KVW_CHUNK_TOKENS;
}

void kvwi_retriever_land(kvw_retriever *r, uint32_t server)
{
    kvwi_flight *flight = &r->flights[server];
    bool sent = flight->in_flight;
    (void)kvwi_flight_land(flight, r->deadline_ns);
    if (flight->whole && sent) {
        spread(r, flight);
    }
}
