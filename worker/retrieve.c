/*
 * retrieve.c: retrieval of whole chunks (GCA, HSA), with memory of its own for the chosen ones, and
 * attention over them. How they come is retrieve_ways.c's.
 *
 * A retriever belongs to its sequence's thread. Its slab has room for k chunks, so a fetch writes
 * where nobody else's rows lie, chunks that are chosen again stay, and attention reads the slab
 * alone: the same bytes in the same order whatever was resident. Invariants: held[s] is the chunk
 * whose rows slot s has, or will have when the fetch in flight is over; ids ascend and ids[i] lies
 * in slot[i]; a chunk that did not arrive whole is not held.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/clock.h"
#include "base/metrics.h"
#include "convert.h"
#include "retrieve.h"

#define PAGE_BYTES 4096u

/* ---- open and close ---- */

static kvc_status open_slab(kvw_retriever *r)
{
    const kvw_worker *w = r->seq->worker;
    r->slab_bytes = (size_t)w->opts.k * KVW_CHUNK_TOKENS * w->row_bytes;
    r->slab_bytes = (r->slab_bytes + PAGE_BYTES - 1u) / PAGE_BYTES * PAGE_BYTES;
    void *p = mmap(NULL, r->slab_bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    r->slab = p;
    kvc_status st = kvwi_regions_open(w, p, r->slab_bytes, &r->regions);
    return st == KVC_OK ? st
                        : kvwi_fail(st, "a retriever cannot be registered: %s", kvc_last_error());
}

/* One allocation for the lists of k and of k chunks' rows. */
static kvc_status open_lists(kvw_retriever *r)
{
    size_t k = r->seq->worker->opts.k, rows = k * KVW_CHUNK_TOKENS;
    uint32_t *p = calloc(7u * k + 2u * rows + (rows + k + 3u) / 4u, sizeof(*p));
    r->whole_name = calloc(k, sizeof(*r->whole_name));
    if (p == NULL || r->whole_name == NULL) {
        free(p);
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    r->ids = p;
    r->slot = p + k;
    r->held = p + 2u * k;
    r->order_ids = p + 3u * k;
    r->wanted = p + 4u * k;
    r->fresh = p + 5u * k;
    r->whole_slot = p + 6u * k;
    r->miss_pos = p + 7u * k;
    r->miss_slot = r->miss_pos + rows;
    r->miss_status = (int8_t *)(r->miss_slot + rows);
    r->whole_tier = (uint8_t *)(r->miss_status + rows);
    r->scores = calloc(4u * k, sizeof(float));
    if (r->scores == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    r->weights = r->scores + k;
    r->order_scores = r->scores + 2u * k;
    r->order_w = r->scores + 3u * k;
    memset(r->held, 0xff, k * sizeof(*r->held));
    return KVC_OK;
}

/* Cancels what is in flight and waits for its end; chunks that nobody has waited for are not held.
 */
static void stop_fetch(kvw_retriever *r)
{
    for (uint32_t s = 0; s < r->seq->worker->servers.n; s++) {
        kvwi_flight *flight = &r->flights[s];
        kvwi_flight_cancel(flight);
        for (uint32_t i = 0; i < flight->n; i++) {
            r->held[r->miss_slot[flight->first + i] / KVW_CHUNK_TOKENS] = KVWI_NO_CHUNK;
        }
        flight->n = 0;
    }
    r->n_misses = 0;
    r->ready = false;
}

static void free_retriever(kvw_retriever *r)
{
    const kvw_worker *w = r->seq->worker;
    stop_fetch(r);
    if (w->device != NULL) {
        w->device_ops->retriever_close(r);
    }
    (void)kvwi_regions_close(w, &r->regions);
    if (r->slab != NULL) {
        (void)munmap(r->slab, r->slab_bytes);
    }
    kvwi_buf *const bufs[] = {&r->all_scores, &r->topk,   &r->q,       &r->part,
                              &r->out,        &r->near_q, &r->near_out};
    for (size_t i = 0; i < sizeof(bufs) / sizeof(bufs[0]); i++) {
        kvwi_buf_fini(bufs[i]);
    }
    free(r->ids);
    free(r->whole_name);
    free(r->scores);
    free(r);
}

static kvc_status check_open(const kvw_seq *seq, uint32_t layer, uint32_t kv_head)
{
    const kvw_worker *w = seq->worker;
    if (w->selector->fusion == 0) {
        return kvwi_fail(KVC_INVALID, "selector: %s picks tokens, not chunks", w->opts.selector);
    }
    if (layer >= w->opts.n_layers) {
        return kvwi_fail(KVC_INVALID, "layer: there are %u", w->opts.n_layers);
    }
    if (kv_head == KVW_ALL_HEADS) {
        return KVC_OK;
    }
    if (kv_head >= w->opts.n_kv_heads || w->opts.tp_size > 1 ||
        w->opts.landmark_dim % w->opts.n_kv_heads != 0) {
        return kvwi_fail(KVC_INVALID, "kv_head: must exist on the one rank, and landmark_dim be a "
                                      "multiple of n_kv_heads");
    }
    return KVC_OK;
}

kvc_status kvw_retriever_open(kvw_seq *seq, uint32_t layer, uint32_t kv_head,
                              kvw_retriever **retriever_p)
{
    if (seq == NULL || retriever_p == NULL) {
        return kvwi_fail(KVC_INVALID, "seq and retriever_p must not be NULL");
    }
    *retriever_p = NULL;
    kvc_status st = check_open(seq, layer, kv_head);
    if (st != KVC_OK) {
        return st;
    }
    kvw_retriever *r = calloc(1, sizeof(*r) + seq->worker->servers.n * sizeof(kvwi_flight));
    if (r == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    const kvw_opts *o = &seq->worker->opts;
    bool all = kv_head == KVW_ALL_HEADS;
    r->seq = seq;
    r->layer = layer;
    r->first_head = all ? 0 : kv_head;
    r->n_heads = all ? o->n_kv_heads : 1;
    r->dim = (uint32_t)o->landmark_dim / (all ? 1 : o->n_kv_heads);
    r->dim_off = all ? 0 : kv_head * r->dim;
    st = open_lists(r);
    if (st == KVC_OK) {
        st = open_slab(r);
    }
    if (st == KVC_OK && seq->worker->device != NULL) {
        st = seq->worker->device_ops->retriever_open(r);
    }
    if (st != KVC_OK) {
        free_retriever(r);
        return st;
    }
    r->next = seq->retrievers;
    seq->retrievers = r;
    *retriever_p = r;
    return KVC_OK;
}

void kvw_retriever_close(kvw_retriever *retriever)
{
    if (retriever == NULL) {
        return;
    }
    kvw_retriever **at = &retriever->seq->retrievers;
    while (*at != retriever) {
        at = &(*at)->next;
    }
    *at = retriever->next;
    free_retriever(retriever);
}

void kvwi_retrievers_close(kvw_seq *seq)
{
    while (seq->retrievers != NULL) {
        kvw_retriever_close(seq->retrievers);
    }
}

void kvwi_retrievers_forget(kvw_seq *seq, uint32_t n_chunks)
{
    for (kvw_retriever *r = seq->retrievers; r != NULL; r = r->next) {
        for (uint32_t s = 0; s < seq->worker->opts.k; s++) {
            if (r->held[s] != KVWI_NO_CHUNK && r->held[s] >= n_chunks) {
                r->held[s] = KVWI_NO_CHUNK;
            }
        }
        for (uint32_t i = 0; i < r->n; i++) {
            r->ready = r->ready && r->ids[i] < n_chunks;
        }
    }
}

uint64_t kvwi_retrievers_bytes(const kvw_seq *seq)
{
    const kvw_worker *w = seq->worker;
    uint64_t n = 0;
    for (const kvw_retriever *r = seq->retrievers; r != NULL; r = r->next) {
        for (uint32_t s = 0; s < w->opts.k; s++) {
            n += r->held[s] != KVWI_NO_CHUNK ? KVW_CHUNK_TOKENS * w->row_bytes : 0;
        }
    }
    return n;
}

/* ---- bring ---- */

static bool is_chosen(const kvw_retriever *r, uint32_t chunk)
{
    for (uint32_t i = 0; i < r->n; i++) {
        if (r->ids[i] == chunk) {
            return true;
        }
    }
    return false;
}

static uint32_t slot_with(const kvw_retriever *r, uint32_t chunk)
{
    uint32_t s = 0;
    while (s < r->seq->worker->opts.k && r->held[s] != chunk) {
        s++;
    }
    return s;
}

/* The rows of chosen chunk i into slot s: from its block's buffer, or it is noted as wanted. */
static void bring(kvw_retriever *r, uint32_t i, uint32_t s)
{
    kvw_seq *seq = r->seq;
    const kvw_worker *w = seq->worker;
    uint32_t bt = w->opts.block_tokens, first = r->ids[i] * KVW_CHUNK_TOKENS;
    const kvwi_block *block = seq->blocks[first / bt].buf;
    size_t bytes = KVW_CHUNK_TOKENS * w->row_bytes;
    r->held[s] = r->ids[i];
    r->fresh[s] = 1;
    if (block != NULL) {
        memcpy(r->slab + s * bytes, kvwi_block_row(w, block, r->layer, first % bt), bytes);
    } else {
        r->wanted[r->n_wanted++] = i;
    }
}

static void add_misses(kvw_retriever *r, uint32_t i)
{
    uint32_t pick = kvwi_pick_of(r->seq, r->ids[i] * KVW_CHUNK_TOKENS);
    for (uint32_t j = 0; j < KVW_CHUNK_TOKENS; j++) {
        r->miss_pos[r->n_misses] = pick + j;
        r->miss_slot[r->n_misses] = r->slot[i] * KVW_CHUNK_TOKENS + j;
        r->miss_status[r->n_misses++] = KVC_NOT_FOUND;
    }
}

/* The rows of wanted chunks, a run for each server. */
static void list_misses(kvw_retriever *r)
{
    for (uint32_t s = 0; s < r->seq->worker->servers.n; s++) {
        r->flights[s].first = r->n_misses;
        for (uint32_t j = 0; j < r->n_wanted; j++) {
            uint32_t i = r->wanted[j];
            if (kvwi_server_of(r->seq, r->ids[i] * KVW_CHUNK_TOKENS) == s) {
                add_misses(r, i);
            }
        }
        r->flights[s].n = r->n_misses - r->flights[s].first;
    }
}

/* A slot for every chosen chunk; those that are held stay where they are. */
static void place(kvw_retriever *r)
{
    kvw_stats *stats = &r->seq->stats;
    uint32_t k = r->seq->worker->opts.k;
    r->n_misses = 0;
    r->n_wanted = 0;
    for (uint32_t s = 0; s < k; s++) {
        r->held[s] =
            r->held[s] != KVWI_NO_CHUNK && is_chosen(r, r->held[s]) ? r->held[s] : KVWI_NO_CHUNK;
    }
    for (uint32_t i = 0; i < r->n; i++) {
        uint32_t s = slot_with(r, r->ids[i]);
        if (s == k) {
            s = slot_with(r, KVWI_NO_CHUNK); /* there is one: no more are chosen than slots */
            bring(r, i, s);
        } else {
            r->n_stayed++;
        }
        r->slot[i] = s;
    }
    list_misses(r);
    uint64_t rows = (uint64_t)r->n * KVW_CHUNK_TOKENS;
    stats->picks += rows;
    stats->misses += r->n_misses;
    stats->hits += rows - r->n_misses;
}

/* The slots of wanted chunks hold them, or will; those of chunks that stay afar are empty. */
static void hold_wanted(kvw_retriever *r)
{
    for (uint32_t j = 0; j < r->n_wanted; j++) {
        uint32_t i = r->wanted[j], server = kvwi_server_of(r->seq, r->ids[i] * KVW_CHUNK_TOKENS);
        r->held[r->slot[i]] = r->flights[server].near ? KVWI_NO_CHUNK : r->ids[i];
    }
}

/* What was asked of the retrieval before says what will be of this one. */
static void count_uses(kvw_retriever *r)
{
    if (r->n_calls != 0) {
        r->last_calls = r->n_calls;
        r->last_queries = r->n_queries;
    }
    r->n_calls = 0;
    r->n_queries = 0;
}

kvc_status kvw_retrieve(kvw_retriever *r, const float *query, uint64_t n_chunks)
{
    if (r == NULL || query == NULL) {
        return kvwi_fail(KVC_INVALID, "retriever and query must not be NULL");
    }
    const kvw_opts *o = &r->seq->worker->opts;
    uint32_t held = r->seq->layers[r->layer].n_tokens / KVW_CHUNK_TOKENS;
    if (n_chunks > held) {
        return kvwi_fail(KVC_INVALID, "n_chunks: layer %u has %u whole chunks", r->layer, held);
    }
    if (!kvwi_all_finite(query, (size_t)o->landmark_dim, KVK_F32)) {
        return kvwi_fail(KVC_INVALID, "the query is not finite");
    }
    stop_fetch(r);
    kvc_status st = kvwi_retriever_choose(r, query, (uint32_t)n_chunks);
    if (st != KVC_OK) {
        r->n = 0;
        return st;
    }
    count_uses(r);
    place(r);
    kvwi_retriever_decide(r, KVC_WHY_CHEAPEST);
    hold_wanted(r);
    kvwi_retriever_send(r, kvc_deadline_ns(o->fetch_timeout_ns));
    r->ready = true;
    return KVC_OK;
}

kvc_status kvw_retrieved(const kvw_retriever *r, const uint32_t **chunks_p, const float **scores_p,
                         const float **weights_p, uint32_t *n_p)
{
    if (r == NULL || chunks_p == NULL || scores_p == NULL || weights_p == NULL || n_p == NULL) {
        return kvwi_fail(KVC_INVALID, "retriever and outputs must not be NULL");
    }
    *chunks_p = r->ids;
    *scores_p = r->scores;
    *weights_p = r->weights;
    *n_p = r->n;
    return KVC_OK;
}

/* ---- attend ---- */

static bool is_coming(const kvw_retriever *r, uint32_t server)
{
    return r->flights[server].n != 0 && !r->flights[server].near;
}

/* The first failure among the rows asked of a server; their chunks are not held. */
static kvc_status settle(kvw_retriever *r, uint32_t server)
{
    const kvw_worker *w = r->seq->worker;
    kvwi_flight *flight = &r->flights[server];
    kvc_status first = KVC_OK;
    uint32_t lost = 0, n = flight->n, end = flight->first + n;
    flight->n = 0;
    for (uint32_t i = flight->first; i < end; i++) {
        kvc_status st = (kvc_status)r->miss_status[i];
        if (st != KVC_OK) {
            first = lost++ == 0 ? (flight->status != KVC_OK ? flight->status : st) : first;
            r->held[r->miss_slot[i] / KVW_CHUNK_TOKENS] = KVWI_NO_CHUNK;
        }
    }
    kvwi_flight_count(r->seq, server, &flight->info, n - lost, w->row_bytes);
    r->seq->servers[server].rows_missing += lost;
    char text[KVWI_SERVER_TEXT];
    return lost == 0
               ? KVC_OK
               : kvwi_fail(first, "layer %u: %u of %u rows did not arrive: %s%s", r->layer, lost, n,
                           kvc_status_name(first), kvwi_server_text(w, server, text));
}

/* The chosen chunks that do not stay afar are in the slab. */
static kvc_status arrive(kvw_retriever *r)
{
    uint64_t t0 = kvc_now_ns();
    uint32_t n_servers = r->seq->worker->servers.n;
    for (uint32_t s = 0; s < n_servers; s++) {
        if (is_coming(r, s)) {
            kvwi_retriever_land(r, s);
        }
    }
    r->seq->stats.ns_fetch_wait += kvc_now_ns() - t0;
    kvc_status st = KVC_OK;
    for (uint32_t s = 0; s < n_servers; s++) {
        kvc_status settled = is_coming(r, s) ? settle(r, s) : KVC_OK;
        st = st == KVC_OK ? settled : st;
    }
    r->ready = r->ready && st == KVC_OK;
    return st;
}

static kvc_status attend_chunk(kvw_retriever *r, uint32_t i, uint32_t n_q, uint32_t heads, float *o,
                               float *lse)
{
    const kvw_worker *w = r->seq->worker;
    size_t head_bytes = (size_t)w->opts.head_dim * w->elem_bytes;
    const uint8_t *chunk = r->slab + (size_t)r->slot[i] * KVW_CHUNK_TOKENS * w->row_bytes;
    for (uint32_t j = 0; j < KVW_CHUNK_TOKENS; j++) {
        r->rows[j] = chunk + j * w->row_bytes;
    }
    const kvk_attend_args args = {
        .q = r->q.p,
        .n_q = n_q,
        .n_q_heads = heads,
        .n_kv_heads = r->n_heads,
        .head_dim = w->opts.head_dim,
        .rows = r->rows,
        .n_kv = KVW_CHUNK_TOKENS,
        .k_off_bytes = r->first_head * head_bytes,
        .v_off_bytes = w->k_bytes + r->first_head * head_bytes,
        .dtype = w->opts.dtype,
        .scale = w->scale,
        .o = o,
        .lse = lse,
    };
    return w->ops->attend(w->be, &args, NULL);
}

static bool is_afar(const kvw_retriever *r, uint32_t i)
{
    return r->held[r->slot[i]] != r->ids[i];
}

/* What servers attend over, after what is here; fetched after all where they do not. */
static kvc_status attend_afar(kvw_retriever *r, uint32_t n_q, uint32_t heads, float *o, float *lse)
{
    const kvw_opts *opts = &r->seq->worker->opts;
    size_t rows = (size_t)n_q * heads, len = rows * opts->head_dim;
    uint64_t near = kvwi_retriever_near_servers(r);
    kvc_status st = kvwi_retriever_near_land(r, n_q, o, lse);
    if (st == KVC_OK) {
        return st;
    }
    KVC_COUNT(way_fallbacks);
    r->seq->stats.way_fallbacks++;
    kvwi_retriever_decide(r, st == KVC_AGAIN ? KVC_WHY_BUSY : KVC_WHY_BROKEN);
    hold_wanted(r);
    uint64_t rest_ns = opts->fetch_timeout_ns - opts->fetch_timeout_ns / KVWI_NEAR_SHARE;
    kvwi_retriever_send(r, r->near_deadline_ns + rest_ns);
    st = arrive(r);
    for (uint32_t j = 0; st == KVC_OK && j < r->n_wanted; j++) {
        uint32_t i = r->wanted[j], server = kvwi_server_of(r->seq, r->ids[i] * KVW_CHUNK_TOKENS);
        if ((near >> server & 1u) != 0) {
            st = attend_chunk(r, i, n_q, heads, o + i * len, lse + i * rows);
        }
    }
    return st;
}

/* Every chunk's partial, then their weighted sum in r->out. */
static kvc_status attend_chosen(kvw_retriever *r, uint32_t n_q, uint32_t heads)
{
    const kvw_worker *w = r->seq->worker;
    size_t rows = (size_t)n_q * heads, len = rows * w->opts.head_dim;
    float *o = r->part.p, *lse = o + r->n * len;
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < r->n; i++) {
        if (!is_afar(r, i)) {
            st = attend_chunk(r, i, n_q, heads, o + i * len, lse + i * rows);
        }
    }
    if (kvwi_retriever_near_servers(r) != 0) {
        kvc_status landed = attend_afar(r, n_q, heads, o, lse);
        st = st == KVC_OK ? landed : st;
    }
    const kvk_chunk_fuse_args fuse = {.o = o,
                                      .lse = lse,
                                      .weights = r->weights,
                                      .n_chunks = r->n,
                                      .n = (uint32_t)rows,
                                      .dim = w->opts.head_dim,
                                      .out = r->out.p};
    return st == KVC_OK ? w->ops->chunk_fuse(w->be, &fuse, NULL) : st;
}

static kvc_status attend_on_host(kvw_retriever *r, const void *q, uint32_t n_q, void *out)
{
    const kvw_worker *w = r->seq->worker;
    uint32_t heads = w->opts.n_q_heads / w->opts.n_kv_heads * r->n_heads;
    size_t rows = (size_t)n_q * heads, len = rows * w->opts.head_dim;
    if (kvwi_buf_need(&r->q, len * sizeof(float)) != KVC_OK ||
        kvwi_buf_need(&r->out, len * sizeof(float)) != KVC_OK ||
        kvwi_buf_need(&r->part, (size_t)(r->n + 1u) * (len + rows) * sizeof(float)) != KVC_OK) {
        return KVC_NO_MEMORY;
    }
    uint32_t width = heads * w->opts.head_dim;
    const kvk_convert_args convert = {
        .in = {q, width * w->elem_bytes, w->opts.dtype}, .n = n_q, .width = width, .out = r->q.p};
    kvc_status st = w->ops->convert(w->be, &convert, NULL);
    if (st == KVC_OK) {
        st = attend_chosen(r, n_q, heads);
    }
    if (st == KVC_OK) {
        kvk_from_f32(r->out.p, len, w->opts.dtype, out);
    }
    return st;
}

/* The CPU attends and fuses, and the engine's memory is the device's. */
static kvc_status attend_across(kvw_retriever *r, const void *q, uint32_t n_q, void *out)
{
    const kvw_worker *w = r->seq->worker;
    kvwi_buf *buf = &r->seq->host[1];
    size_t len_bytes = kvwi_retriever_q_bytes(r, n_q); /* a result is as long as its query */
    kvc_status st = kvwi_buf_need(buf, len_bytes);
    if (st == KVC_OK) {
        st = attend_on_host(r, q, n_q, buf->p);
    }
    return st == KVC_OK ? w->device_ops->copy(r->seq, out, buf->p, len_bytes) : st;
}

/* q: of the CPU's memory where some chunks are afar, whose partials the CPU fuses with the rest. */
static kvc_status attend(kvw_retriever *r, const void *q, uint32_t n_q, void *out)
{
    const kvw_worker *w = r->seq->worker;
    if (w->device == NULL) {
        return attend_on_host(r, q, n_q, out);
    }
    if (kvwi_retriever_near_servers(r) == 0) {
        return w->device_ops->retriever_attend(r, q, n_q, out);
    }
    return w->opts.device_memory ? attend_across(r, q, n_q, out) : attend_on_host(r, q, n_q, out);
}

/* What is afar has been asked for before this waits for what comes. */
static kvc_status bring_all(kvw_retriever *r, const void *q, uint32_t n_q)
{
    if (kvwi_retriever_near_servers(r) != 0) {
        kvwi_retriever_near_send(r, q, n_q);
    }
    kvc_status st = arrive(r);
    if (st != KVC_OK) {
        stop_fetch(r);
    }
    return st;
}

kvc_status kvw_retriever_attend(kvw_retriever *r, const void *q, uint32_t n_q, void *out)
{
    if (r == NULL || q == NULL || out == NULL || n_q == 0) {
        return kvwi_fail(KVC_INVALID, "retriever, q and out must not be NULL, n_q not 0");
    }
    if (!r->ready) {
        return kvwi_fail(KVC_INVALID, "nothing was retrieved, or it did not arrive");
    }
    r->n_calls++;
    r->n_queries += n_q;
    if (kvwi_retriever_near_servers(r) != 0) {
        q = kvwi_device_to_host(r->seq, q, kvwi_retriever_q_bytes(r, n_q), &r->seq->host[0]);
        if (q == NULL) {
            return KVC_DEVICE;
        }
    }
    kvc_status st = bring_all(r, q, n_q);
    if (st != KVC_OK) {
        return st;
    }
    uint64_t t0 = kvc_now_ns();
    st = attend(r, q, n_q, out);
    if (st != KVC_OK) {
        if (kvwi_retriever_near_servers(r) != 0) { /* their partials may still be on their way */
            stop_fetch(r);
        }
        return kvwi_fail(st, "attention failed: %s", kvc_status_name(st));
    }
    r->seq->stats.ns_attend += kvc_now_ns() - t0;
    return KVC_OK;
}
