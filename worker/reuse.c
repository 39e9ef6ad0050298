/*
 * reuse.c: a sequence starts over what the store already has of its tokens.
 *
 * Runs inside kvw_seq_create, on its thread, and blocks. Only blocks named by their tokens (and the
 * sequence's label) alone match (see names.c), and the prefix is cut to whole chunks, so the engine
 * goes on exactly where a cold run would have begun a chunk. Each server is asked for its own
 * blocks alone, all servers together. Brought back: the blocks that hold sinks and recent, whole;
 * index rows, from their own parts where stored, else rebuilt from the keys of fetched rows. What
 * cannot be brought back is as good as not matched: the sequence starts cold.
 */
#include <string.h>
#include <sys/mman.h>

#include "base/clock.h"
#include "base/log.h"
#include "internal.h"
#include "prefix.h"

/* Staging for fetched rows, half of it in flight while the other half is used. */
#define STAGING_BYTES (16u << 20)

/* ---- match ---- */

/* Names of the first n_blocks blocks, as a cold prefill computes them. */
static kvc_status name_blocks(kvw_seq *seq, const uint32_t *tokens, uint32_t n_blocks)
{
    if (n_blocks > seq->cap_blocks) {
        kvwi_seq_block *blocks = realloc(seq->blocks, n_blocks * sizeof(*blocks));
        if (blocks == NULL) {
            return kvwi_fail(KVC_NO_MEMORY, "out of memory");
        }
        seq->blocks = blocks;
        seq->cap_blocks = n_blocks;
    }
    for (uint32_t b = 0; b < n_blocks; b++) {
        seq->blocks[b] = (kvwi_seq_block){0};
        kvc_status st = kvwi_names_cold(seq, tokens, b);
        if (st != KVC_OK) {
            return kvwi_fail(st, "a block digest could not be computed");
        }
        kvwi_place(seq, b);
        kvwi_place_keep(seq, b);
    }
    seq->n_blocks = n_blocks;
    return KVC_OK;
}

/* Tokens that can be reused of n_blocks matched ones. */
static uint32_t cut(const kvw_worker *w, uint32_t n_blocks, uint32_t n_tokens)
{
    uint32_t unit = kvwi_max_u32(w->opts.chunk_tokens, w->opts.block_tokens);
    uint32_t n = n_blocks * w->opts.block_tokens;
    n = n_tokens == 0 ? 0 : kvwi_min_u32(n, n_tokens - 1u);
    return n / unit * unit;
}

static kvc_status match_prefix(kvw_seq *seq, const uint32_t *tokens, uint32_t n_tokens,
                               uint32_t *n_reused_p, uint32_t *n_indexed_p)
{
    const kvw_worker *w = seq->worker;
    uint32_t bt = w->opts.block_tokens, n_blocks = cut(w, n_tokens / bt, n_tokens) / bt, hits = 0;
    *n_reused_p = 0;
    *n_indexed_p = 0;
    kvc_status st = name_blocks(seq, tokens, n_blocks);
    if (st != KVC_OK || n_blocks == 0) {
        return st;
    }
    kvwi_prefix p;
    st = kvwi_prefix_open(&p, seq, n_blocks);
    if (st != KVC_OK) {
        return st;
    }
    /* every rank's parts, so that all ranks reuse the same prefix */
    st = kvwi_prefix_match(&p, n_blocks, w->group_parts, w->opts.tp_size * w->opts.n_layers, &hits);
    if (st == KVC_OK) {
        *n_reused_p = cut(w, hits, n_tokens);
        hits = 0;
    }
    if (st == KVC_OK && w->index_row_bytes != 0 && *n_reused_p != 0) {
        st = kvwi_prefix_match(&p, *n_reused_p / bt, w->index_parts, w->opts.n_layers, &hits);
    }
    *n_indexed_p = hits * bt;
    kvwi_prefix_close(&p);
    return st;
}

/* ---- bringing rows back ---- */

/* Rows [first, first + n) of one part, fetched from each server that has some of them. */
typedef struct batch {
    uint32_t layer, part, first, n;
    kvwi_flight *flights;          /* [servers] */
    kvwi_buf picks, slots, status; /* [n], by server; slots: rows less first */
    size_t off_bytes;              /* of its half of the staging */
    bool in_flight;
} batch;

/* What a pass over rows of all layers does with them; rows are dense, row_bytes apart. */
typedef kvc_status use_rows(kvw_seq *seq, const batch *b, const uint8_t *rows);

typedef struct puller {
    kvw_seq *seq;
    uint8_t *staging;
    kvwi_regions regions;
    batch half[2];
} puller;

static kvc_status puller_open(puller *p, kvw_seq *seq)
{
    *p = (puller){.seq = seq};
    void *mem =
        mmap(NULL, STAGING_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mem == MAP_FAILED) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    p->staging = mem;
    p->half[1].off_bytes = STAGING_BYTES / 2u;
    for (int i = 0; i < 2; i++) {
        p->half[i].flights = calloc(seq->worker->servers.n, sizeof(kvwi_flight));
        if (p->half[i].flights == NULL) {
            return kvwi_fail(KVC_NO_MEMORY, "out of memory");
        }
    }
    kvc_status st = kvwi_regions_open(seq->worker, mem, STAGING_BYTES, &p->regions);
    return st == KVC_OK ? st : kvwi_fail(st, "staging: %s", kvc_last_error());
}

static void puller_close(puller *p)
{
    const kvw_worker *w = p->seq->worker;
    for (int i = 0; i < 2; i++) {
        batch *b = &p->half[i];
        for (uint32_t s = 0; b->flights != NULL && s < w->servers.n; s++) {
            kvwi_flight_cancel(&b->flights[s]);
        }
        free(b->flights);
        kvwi_buf_fini(&b->picks);
        kvwi_buf_fini(&b->slots);
        kvwi_buf_fini(&b->status);
    }
    (void)kvwi_regions_close(w, &p->regions);
    if (p->staging != NULL) {
        (void)munmap(p->staging, STAGING_BYTES);
    }
}

/* Which rows each server has: a run of picks and slots for each of them. */
static void share_out(const kvw_seq *seq, batch *b)
{
    uint32_t *picks = b->picks.p, *slots = b->slots.p, n = 0;
    for (uint32_t s = 0; s < seq->worker->servers.n; s++) {
        b->flights[s].first = n;
        for (uint32_t i = 0; i < b->n; i++) {
            if (kvwi_server_of(seq, b->first + i) == s) {
                picks[n] = kvwi_pick_of(seq, b->first + i);
                slots[n++] = i;
            }
        }
        b->flights[s].n = n - b->flights[s].first;
    }
}

static kvc_status submit(puller *p, batch *b, uint32_t row_bytes)
{
    const kvw_worker *w = p->seq->worker;
    kvwi_buf *const bufs[] = {&b->picks, &b->slots, &b->status};
    const size_t elem[] = {sizeof(uint32_t), sizeof(uint32_t), sizeof(int8_t)};
    kvc_status st = KVC_OK;
    for (size_t i = 0; st == KVC_OK && i < 3; i++) {
        st = kvwi_buf_need(bufs[i], b->n * elem[i]);
    }
    if (st != KVC_OK) {
        return kvwi_fail(st, "out of memory");
    }
    share_out(p->seq, b);
    memset(b->status.p, KVC_NOT_FOUND, b->n);
    b->in_flight = true;
    for (uint32_t s = 0; s < w->servers.n; s++) {
        kvwi_flight *flight = &b->flights[s];
        const uint32_t *slots = (uint32_t *)b->slots.p + flight->first;
        const kvc_pick_group group = {.part = b->part,
                                      .row_bytes = row_bytes,
                                      .n_picks = flight->n,
                                      .picks = (uint32_t *)b->picks.p + flight->first,
                                      .dst_slots = w->servers.n == 1 ? NULL : slots,
                                      .dst_off_bytes = b->off_bytes};
        flight->status = KVC_OK;
        if (flight->n != 0) {
            kvwi_flight_send(p->seq, s, flight, group, &p->regions,
                             (int8_t *)b->status.p + flight->first, 0);
        }
    }
    return KVC_OK;
}

/* NOT_FOUND where a row has gone since the match. */
static kvc_status collect_server(puller *p, batch *b, uint32_t server, uint32_t row_bytes)
{
    const kvw_worker *w = p->seq->worker;
    kvwi_flight *flight = &b->flights[server];
    const int8_t *status = (int8_t *)b->status.p + flight->first;
    const uint32_t *slots = (uint32_t *)b->slots.p + flight->first;
    char text[KVWI_SERVER_TEXT];
    kvc_status st = kvwi_flight_land(flight, 0);
    if (st != KVC_OK) {
        return kvwi_fail(st, "fetch: %s%s", kvc_status_name(st), kvwi_server_text(w, server, text));
    }
    for (uint32_t i = 0; i < flight->n; i++) {
        if (status[i] != KVC_OK) {
            return kvwi_fail(KVC_NOT_FOUND, "row %u of part %u: %s%s", b->first + slots[i], b->part,
                             kvc_status_name((kvc_status)status[i]),
                             kvwi_server_text(w, server, text));
        }
    }
    if (flight->n != 0) {
        kvwi_flight_count(p->seq, server, &flight->info, flight->n, row_bytes);
    }
    return KVC_OK;
}

/* All flights land, whatever one of them comes to. */
static kvc_status collect(puller *p, batch *b, uint32_t row_bytes, use_rows *use)
{
    kvc_status first = KVC_OK;
    for (uint32_t s = 0; s < p->seq->worker->servers.n; s++) {
        kvc_status st = collect_server(p, b, s, row_bytes);
        first = first == KVC_OK ? st : first;
    }
    b->in_flight = false;
    return first == KVC_OK ? use(p->seq, b, p->staging + b->off_bytes) : first;
}

/* Rows [first, end) of every layer's part, in pieces, one in flight while another is used. */
static kvc_status pull(puller *p, const uint32_t *parts, uint32_t row_bytes, uint32_t first,
                       uint32_t end, use_rows *use)
{
    uint32_t n_layers = p->seq->worker->opts.n_layers, layer = 0, at = first, turn = 0;
    uint32_t piece = STAGING_BYTES / 2u / row_bytes;
    kvc_status st = KVC_OK;
    if (first >= end) {
        return KVC_OK;
    }
    while (st == KVC_OK && (layer < n_layers || p->half[0].in_flight || p->half[1].in_flight)) {
        batch *b = &p->half[turn];
        if (b->in_flight) {
            st = collect(p, b, row_bytes, use);
        }
        if (st == KVC_OK && layer < n_layers) {
            b->layer = layer;
            b->part = parts[layer];
            b->first = at;
            b->n = kvwi_min_u32(piece, end - at);
            at += b->n;
            st = submit(p, b, row_bytes);
        }
        if (at == end && layer < n_layers) {
            at = first;
            layer++;
        }
        turn ^= 1u;
    }
    return st;
}

/* ---- what is done with the rows ---- */

static kvc_status use_window(kvw_seq *seq, const batch *b, const uint8_t *rows)
{
    const kvw_worker *w = seq->worker;
    uint32_t bt = w->opts.block_tokens;
    for (uint32_t i = 0; i < b->n; i++) {
        uint32_t pos = b->first + i;
        memcpy(kvwi_block_row(w, seq->blocks[pos / bt].buf, b->layer, pos % bt),
               rows + i * w->row_bytes, w->row_bytes);
    }
    return KVC_OK;
}

static kvc_status use_index(kvw_seq *seq, const batch *b, const uint8_t *rows)
{
    const kvw_worker *w = seq->worker;
    for (uint32_t i = 0; i < w->n_levels; i++) {
        kvwi_pages *pages = &seq->layers[b->layer].level[i];
        kvc_status st = kvwi_pages_reserve(pages, b->first + b->n);
        if (st != KVC_OK) {
            return kvwi_fail(st, "out of memory");
        }
        kvwi_pages_write(pages, b->first, b->n, rows, w->index_row_bytes);
        pages->n_rows = b->first + b->n;
        rows += w->level[i].row_bytes;
    }
    return KVC_OK;
}

static kvc_status use_rebuild(kvw_seq *seq, const batch *b, const uint8_t *rows)
{
    seq->stats.index_rows_rebuilt += b->n;
    return kvwi_index_append(seq, b->layer, b->first, rows, seq->worker->row_bytes, b->n);
}

/* Blocks of [first, end) get buffers and their rows. */
static kvc_status bring_window(puller *p, uint32_t first, uint32_t end)
{
    uint32_t bt = p->seq->worker->opts.block_tokens;
    kvc_status st = KVC_OK;
    first = first / bt * bt;
    for (uint32_t b = first / bt; st == KVC_OK && b * bt < end; b++) {
        st = kvwi_blocks_fill(p->seq, b);
    }
    return st != KVC_OK ? st
                        : pull(p, p->seq->worker->kv_parts, (uint32_t)p->seq->worker->row_bytes,
                               first, end, use_window);
}

static kvc_status bring_back(puller *p, uint32_t n, uint32_t n_indexed)
{
    kvw_seq *seq = p->seq;
    const kvw_worker *w = seq->worker;
    uint32_t bt = w->opts.block_tokens;
    uint32_t sink_end = kvwi_min_u32((w->opts.n_sink + bt - 1u) / bt * bt, n);
    uint32_t recent = n > w->opts.n_recent ? n - w->opts.n_recent : 0;
    kvc_status st = bring_window(p, 0, sink_end);
    if (st == KVC_OK) {
        st = bring_window(p, kvwi_max_u32(recent / bt * bt, sink_end), n);
    }
    if (st == KVC_OK && n_indexed != 0) {
        st = pull(p, w->index_parts, (uint32_t)w->index_row_bytes, 0, n_indexed, use_index);
    }
    if (st == KVC_OK) {
        st = pull(p, w->kv_parts, (uint32_t)w->row_bytes, n_indexed, n, use_rebuild);
    }
    return st;
}

/* ---- all of it ---- */

static void adopt(kvw_seq *seq, const uint32_t *tokens, uint32_t n)
{
    const kvw_worker *w = seq->worker;
    if (n != 0) {
        memcpy(seq->tokens, tokens, (size_t)n * sizeof(*tokens));
    }
    seq->n_named = n;
    seq->n_reused = n;
    seq->pass = (kvwi_pass){n, 0};
    seq->n_blocks = n / w->opts.block_tokens;
    seq->n_submitted = seq->n_blocks;
    seq->put.n_acked = seq->n_blocks; /* nobody else knows the sequence yet */
    for (uint32_t i = 0; i < w->opts.n_layers; i++) {
        seq->layers[i].n_tokens = n;
    }
}

/* Back to a cold start: no contexts, no buffers, no index rows. */
static void forget(kvw_seq *seq)
{
    kvwi_contexts_close(seq);
    kvwi_place_cut(seq, 0);
    for (uint32_t b = 0; b < seq->n_blocks; b++) {
        if (seq->blocks[b].buf != NULL) {
            kvwi_pool_give(seq->worker, seq->blocks[b].buf);
            seq->blocks[b].buf = NULL;
        }
    }
    seq->n_blocks = 0;
    for (uint32_t i = 0; i < seq->worker->opts.n_layers; i++) {
        for (uint32_t j = 0; j < seq->worker->n_levels; j++) {
            seq->layers[i].level[j].n_rows = 0;
        }
    }
}

static kvc_status bring_all(kvw_seq *seq, uint32_t n, uint32_t n_indexed)
{
    puller p;
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < seq->worker->opts.n_layers; i++) {
        st = kvwi_residency_extend(&seq->layers[i].residency, n);
    }
    if (st != KVC_OK) {
        return kvwi_fail(st, "out of memory");
    }
    st = puller_open(&p, seq);
    if (st == KVC_OK) {
        st = bring_back(&p, n, n_indexed);
    }
    puller_close(&p);
    return st;
}

/*
 * What the whole group has. A shared index is not rebuilt by a group: its keys would be summed over
 * the ranks row by row, while each of them may lose rows of its own. Landmarks cannot be, which are
 * not made of keys, nor can what was made of keys that are coded now.
 */
static kvc_status agree_prefix(const kvw_worker *w, kvc_status st, uint32_t *n, uint32_t *n_indexed)
{
    st = kvwi_group_least(w, st, n, n_indexed);
    bool shared = w->opts.all_reduce != NULL && w->selector->form == KVWI_SHARED;
    bool lost = w->selector->fusion != 0 || kvk_is_coded(w->row_dtype);
    if ((shared || lost) && w->index_row_bytes != 0) {
        *n = cut(w, *n_indexed / w->opts.block_tokens, *n_indexed + 1u);
    }
    *n_indexed = kvwi_min_u32(*n_indexed, *n);
    return st;
}

/* NOT_FOUND where a rank could not bring back what was agreed. */
static kvc_status agree_brought(const kvw_worker *w, kvc_status st, uint32_t n)
{
    uint32_t brought = n, none = 0;
    st = kvwi_group_least(w, st, &brought, &none);
    return st == KVC_OK && brought < n ? kvwi_fail(KVC_NOT_FOUND, "another rank lacks rows") : st;
}

kvc_status kvwi_reuse(kvw_seq *seq, const uint32_t *tokens, uint32_t n_tokens)
{
    const kvw_worker *w = seq->worker;
    uint32_t n = 0, n_indexed = 0, bt = w->opts.block_tokens;
    kvc_status st = match_prefix(seq, tokens, n_tokens, &n, &n_indexed);
    st = agree_prefix(w, st, &n, &n_indexed);
    if (st == KVC_OK) {
        seq->n_blocks = n / bt;
        kvwi_place_cut(seq, n / bt);
        st = kvwi_contexts_begin(seq, n / bt);
    }
    if (n != 0) {
        st = st == KVC_OK ? bring_all(seq, n, n_indexed) : st;
        st = agree_brought(w, st, n);
    }
    if (st == KVC_NOT_FOUND && n != 0) {
        KVC_LOG_INFO(WORKER, "reuse: cold start, since %s", kvw_last_error());
        forget(seq);
        n = 0;
        st = kvwi_contexts_begin(seq, 0);
    }
    if (st == KVC_OK) {
        adopt(seq, tokens, n);
    }
    return st;
}
