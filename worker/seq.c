/*
 * seq.c: a sequence's life: create, passes, truncate, flush, destroy, statistics.
 *
 * Owned by one thread at a time. A pass goes: kvw_tokens, then every layer's append and step; the
 * next kvw_tokens (or flush, or destroy) accepts it.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/log.h"
#include "internal.h"

/* The least that a kvw_seq_opts may be. */
#define FIRST_SIZE_BYTES offsetof(kvw_seq_opts, adapter)

static void layer_fini(kvwi_layer *l)
{
    for (uint32_t i = 0; i < KVWI_MAX_LEVELS; i++) {
        kvwi_pages_fini(&l->level[i]);
    }
    kvwi_residency_fini(&l->residency);
    free(l->picks.pos);
    free(l->picks.query);
}

static kvc_status layer_init(kvw_seq *seq, uint32_t layer)
{
    const kvw_worker *w = seq->worker;
    kvwi_layer *l = &seq->layers[layer];
    uint32_t slots = w->opts.client != NULL ? w->opts.residency_slots : 0;
    size_t slab = (size_t)slots * w->row_bytes;
    for (uint32_t i = 0; i < w->n_levels; i++) {
        kvwi_pages_init(&l->level[i], w->level[i].row_bytes);
    }
    l->picks.pos = malloc(w->opts.k * sizeof(uint32_t));
    l->picks.query = malloc((size_t)w->opts.n_q_heads * w->opts.head_dim * sizeof(float));
    if (l->picks.pos == NULL || l->picks.query == NULL) {
        return KVC_NO_MEMORY;
    }
    return kvwi_residency_init(
        &l->residency, slots, slots == 0 ? NULL : seq->residency_rows + layer * slab, w->row_bytes);
}

/* One slab for all layers, registered once. */
static kvc_status open_slab(kvw_seq *seq)
{
    const kvw_worker *w = seq->worker;
    if (w->opts.client == NULL) {
        return KVC_OK;
    }
    seq->residency_bytes = (size_t)w->opts.n_layers * w->opts.residency_slots * w->row_bytes;
    void *p = mmap(NULL, seq->residency_bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        return kvwi_fail(KVC_NO_MEMORY, "residency_slots: out of memory");
    }
    seq->residency_rows = p;
    kvc_status st = kvwi_regions_open(w, p, seq->residency_bytes, &seq->residency_regions);
    return st == KVC_OK ? st
                        : kvwi_fail(st, "the residency cannot be registered: %s", kvc_last_error());
}

static kvc_status open_layers(kvw_seq *seq)
{
    uint32_t n = seq->worker->opts.n_layers;
    seq->layers = calloc(n, sizeof(*seq->layers));
    kvc_status st = seq->layers == NULL ? KVC_NO_MEMORY : KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < n; i++) {
        st = layer_init(seq, i);
    }
    return st == KVC_OK ? st : kvwi_fail(st, "out of memory");
}

static kvc_status reserve_tokens(kvw_seq *seq, uint32_t n)
{
    if (n <= seq->cap_tokens) {
        return KVC_OK;
    }
    uint32_t cap = n + n / 2u + 1024u;
    uint32_t *tokens = realloc(seq->tokens, cap * sizeof(*tokens));
    if (tokens == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    seq->tokens = tokens;
    seq->cap_tokens = cap;
    return KVC_OK;
}

/* Copies the caller's options, which may be shorter, into *opts_p. */
static kvc_status take_opts(const kvw_seq_opts *opts, kvw_seq_opts *opts_p)
{
    if (!kvwi_size_fits(opts->size_bytes, FIRST_SIZE_BYTES, sizeof(*opts))) {
        return kvwi_fail(KVC_INVALID, "size_bytes is not that of this library's kvw_seq_opts");
    }
    memcpy(opts_p, opts, opts->size_bytes);
    if ((opts->tokens == NULL && opts->n_tokens != 0) || opts->n_tokens > KVWI_MAX_TOKENS) {
        return kvwi_fail(KVC_INVALID, "tokens must not be NULL, n_tokens at most 2^30");
    }
    return KVC_OK;
}

/* All that this rank can do alone. */
static kvc_status prepare(kvw_worker *worker, const kvw_seq_opts *opts, kvw_seq **seq_p)
{
    kvw_seq *seq = calloc(1, sizeof(*seq));
    *seq_p = seq;
    if (seq == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    seq->worker = worker;
    seq->select.worker = worker;
    seq->servers = calloc(worker->servers.n + 1u, sizeof(*seq->servers));
    if (seq->servers == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    kvc_status st = kvwi_names_label(seq, opts->adapter, opts->salt);
    if (st == KVC_OK) {
        st = open_slab(seq);
    }
    if (st == KVC_OK) {
        st = open_layers(seq);
    }
    if (st == KVC_OK && worker->device != NULL) {
        st = worker->device_ops->seq_open(seq, opts->n_tokens, opts->stream);
    }
    return st == KVC_OK ? reserve_tokens(seq, opts->n_tokens) : st;
}

/* A rank that has failed comes along: the others wait for it in each step of the group. */
static kvc_status start(kvw_worker *worker, const kvw_seq_opts *opts, kvw_seq **seq_p)
{
    kvw_seq_opts own = {0};
    kvc_status st = take_opts(opts, &own);
    if (st == KVC_OK) {
        st = prepare(worker, &own, seq_p);
    }
    st = kvwi_group_check(worker, st);
    if (st != KVC_OK || worker->opts.client == NULL) {
        return st;
    }
    return kvwi_group_agree(worker, kvwi_reuse(*seq_p, own.tokens, own.n_tokens));
}

kvc_status kvw_seq_open(kvw_worker *worker, const kvw_seq_opts *opts, kvw_seq **seq_p,
                        uint32_t *n_reused_p)
{
    kvw_seq *seq = NULL;
    if (worker == NULL || opts == NULL || seq_p == NULL || n_reused_p == NULL) {
        return kvwi_fail(KVC_INVALID, "worker, opts, seq_p and n_reused_p must not be NULL");
    }
    *seq_p = NULL;
    *n_reused_p = 0;
    kvc_status st = start(worker, opts, &seq);
    if (st != KVC_OK) {
        kvw_seq_destroy(seq);
        return st;
    }
    KVC_ASSERT(seq != NULL); /* no group is well without this rank */
    *seq_p = seq;
    *n_reused_p = seq->n_reused;
    return KVC_OK;
}

kvc_status kvw_seq_create(kvw_worker *worker, const uint32_t *tokens, uint32_t n_tokens,
                          kvw_seq **seq_p, uint32_t *n_reused_p)
{
    const kvw_seq_opts opts = {.size_bytes = sizeof(opts), .tokens = tokens, .n_tokens = n_tokens};
    return kvw_seq_open(worker, &opts, seq_p, n_reused_p);
}

static void close_store(kvw_seq *seq)
{
    kvw_worker *w = seq->worker;
    kvwi_contexts_close(seq);
    (void)kvwi_regions_close(w, &seq->residency_regions);
    if (seq->residency_rows != NULL) {
        (void)munmap(seq->residency_rows, seq->residency_bytes);
    }
}

/* A store that is full is waited for, one that fails is not. */
static void end_puts(kvw_seq *seq, uint64_t deadline_ns)
{
    kvwi_put_close(seq); /* first: the submit may have to wait for the window */
    kvc_status st = kvwi_blocks_submit(seq, (uint32_t)kvw_seq_tokens(seq), deadline_ns);
    kvwi_put_abandon(seq, deadline_ns);
    if (st != KVC_OK || kvwi_put_look(seq).n_acked < seq->n_submitted) {
        KVC_LOG_WARN(WORKER, "a sequence ends before its blocks are in the store");
    }
}

void kvw_seq_destroy(kvw_seq *seq)
{
    if (seq == NULL) {
        return;
    }
    kvw_worker *w = seq->worker;
    kvwi_steps_free(seq);
    kvwi_retrievers_close(seq);
    if (kvwi_contexts_open(seq)) {
        end_puts(seq, kvc_deadline_ns(w->opts.put_timeout_ns));
    }
    if (seq->device != NULL) { /* before the buffers that it writes go to others */
        w->device_ops->seq_close(seq);
    }
    for (uint32_t i = 0; i < seq->n_blocks; i++) {
        if (seq->blocks[i].buf != NULL) {
            kvwi_pool_give(w, seq->blocks[i].buf);
        }
    }
    for (uint32_t i = 0; seq->layers != NULL && i < w->opts.n_layers; i++) {
        layer_fini(&seq->layers[i]);
    }
    for (uint32_t i = 0; i < KVW_SCRATCH_SLOTS; i++) {
        kvwi_buf_fini(&seq->select.buf[i]);
    }
    close_store(seq);
    kvwi_buf_fini(&seq->append_buf);
    kvwi_buf_fini(&seq->host[0]);
    kvwi_buf_fini(&seq->host[1]);
    free(seq->layers);
    free(seq->tokens);
    free(seq->passes);
    free(seq->blocks);
    free(seq->servers);
    free(seq);
}

/* OK where no step is open and every layer has the whole pass. */
static kvc_status check_settled(const kvw_seq *seq)
{
    for (uint32_t i = 0; i < seq->worker->opts.n_layers; i++) {
        const kvwi_layer *l = &seq->layers[i];
        if (l->step != NULL) {
            return kvwi_fail(KVC_INVALID, "layer %u: a step is open", i);
        }
        if (l->n_tokens != seq->pass.first + seq->pass.n) {
            return kvwi_fail(KVC_INVALID, "layer %u: the last pass was not appended", i);
        }
    }
    return KVC_OK;
}

static kvc_status push_pass(kvw_seq *seq, kvwi_pass pass)
{
    if (seq->n_passes == seq->cap_passes) {
        uint32_t cap = seq->cap_passes * 2u + 64u;
        kvwi_pass *passes = realloc(seq->passes, cap * sizeof(*passes));
        if (passes == NULL) {
            return kvwi_fail(KVC_NO_MEMORY, "out of memory");
        }
        seq->passes = passes;
        seq->cap_passes = cap;
    }
    seq->passes[seq->n_passes++] = pass;
    return KVC_OK;
}

kvc_status kvw_tokens(kvw_seq *seq, const uint32_t *tokens, uint32_t n_tokens)
{
    if (seq == NULL || tokens == NULL || n_tokens == 0) {
        return kvwi_fail(KVC_INVALID, "seq and tokens must not be NULL, n_tokens not 0");
    }
    uint32_t held = seq->pass.first + seq->pass.n;
    if (n_tokens > seq->worker->opts.chunk_tokens || n_tokens > KVWI_MAX_TOKENS - held) {
        return kvwi_fail(KVC_INVALID, "a pass has at most chunk_tokens tokens, a sequence 2^30");
    }
    if (seq->worker->selector->fusion != 0 && n_tokens % KVW_CHUNK_TOKENS != 0) {
        return kvwi_fail(KVC_INVALID, "n_tokens: a pass is of whole chunks of 64 tokens");
    }
    kvc_status st = check_settled(seq);
    if (st == KVC_OK) {
        st = kvwi_blocks_submit(seq, held, kvc_deadline_ns(seq->worker->opts.put_timeout_ns));
    }
    if (st == KVC_OK) {
        st = reserve_tokens(seq, held + n_tokens);
    }
    if (st == KVC_OK) {
        kvwi_blocks_release(seq);
        st = kvwi_device_takes_pass(seq->worker, n_tokens)
                 ? seq->worker->device_ops->pass(seq, held + n_tokens, n_tokens)
                 : KVC_OK;
    }
    if (st == KVC_OK) {
        st = push_pass(seq, (kvwi_pass){held, n_tokens});
    }
    if (st != KVC_OK) {
        return st;
    }
    memcpy(seq->tokens + held, tokens, n_tokens * sizeof(*tokens));
    seq->pass = (kvwi_pass){held, n_tokens};
    seq->n_named = held + n_tokens;
    return KVC_OK;
}

kvc_status kvw_truncate(kvw_seq *seq, uint64_t n_tokens)
{
    if (seq == NULL || n_tokens < seq->pass.first || n_tokens > seq->pass.first + seq->pass.n) {
        return kvwi_fail(KVC_INVALID, "n_tokens: only tokens of the last pass can be taken back");
    }
    if (n_tokens < (uint64_t)seq->n_submitted * seq->worker->opts.block_tokens) {
        return kvwi_fail(KVC_INVALID, "n_tokens: kvw_flush has accepted the pass");
    }
    if (seq->worker->selector->fusion != 0 && n_tokens % KVW_CHUNK_TOKENS != 0) {
        return kvwi_fail(KVC_INVALID, "n_tokens: chunks of 64 tokens go as a whole");
    }
    kvc_status st = check_settled(seq);
    if (st != KVC_OK || seq->pass.n == 0) {
        return st;
    }
    uint32_t n = (uint32_t)n_tokens, kept = n - seq->pass.first;
    st = seq->device != NULL ? seq->worker->device_ops->truncate(seq, n) : KVC_OK;
    if (st != KVC_OK) {
        return st;
    }
    kvwi_retrievers_forget(seq, n / KVW_CHUNK_TOKENS);
    if (kept != 0 && kept != seq->pass.n && !seq->worker->opts.reuse_any) {
        kvwi_names_taint(seq); /* what is kept saw the queries of what is not */
    }
    for (uint32_t i = 0; i < seq->worker->opts.n_layers; i++) {
        kvwi_layer *l = &seq->layers[i];
        l->n_tokens = n;
        l->picks.cached = false;
        for (uint32_t j = 0; j < seq->worker->n_levels; j++) {
            l->level[j].n_rows =
                kvwi_min_u32(l->level[j].n_rows, n); /* fewer: the device has them */
        }
    }
    seq->n_named = n;
    seq->pass.n = kept;
    seq->passes[seq->n_passes - 1u].n = kept;
    seq->n_passes -= kept == 0 ? 1u : 0u;
    return KVC_OK;
}

uint64_t kvw_seq_tokens(const kvw_seq *seq)
{
    uint64_t n = UINT64_MAX;
    for (uint32_t i = 0; i < seq->worker->opts.n_layers; i++) {
        n = seq->layers[i].n_tokens < n ? seq->layers[i].n_tokens : n;
    }
    return n;
}

kvc_status kvw_flush(kvw_seq *seq, uint64_t deadline_ns)
{
    if (seq == NULL) {
        return kvwi_fail(KVC_INVALID, "seq must not be NULL");
    }
    if (seq->worker->opts.client == NULL) {
        return KVC_OK;
    }
    if (deadline_ns == 0) {
        deadline_ns = kvc_deadline_ns(seq->worker->opts.put_timeout_ns);
    }
    kvc_status st = kvwi_blocks_submit(seq, (uint32_t)kvw_seq_tokens(seq), deadline_ns);
    return st != KVC_OK ? st : kvwi_put_flush(seq, deadline_ns);
}

kvc_status kvw_last_picks(const kvw_seq *seq, uint32_t layer, const uint32_t **picks_p,
                          uint32_t *n_p)
{
    if (seq == NULL || picks_p == NULL || n_p == NULL || layer >= seq->worker->opts.n_layers) {
        return kvwi_fail(KVC_INVALID, "seq, picks_p and n_p must not be NULL, layer must exist");
    }
    if (seq->layers[layer].picks.on_device) {
        kvc_status st = seq->worker->device_ops->picks(seq, layer);
        if (st != KVC_OK) {
            return st;
        }
    }
    *picks_p = seq->layers[layer].picks.pos;
    *n_p = seq->layers[layer].picks.n;
    return KVC_OK;
}

kvc_status kvw_seq_stats(const kvw_seq *seq, kvw_stats *stats_p)
{
    if (seq == NULL || stats_p == NULL ||
        !kvwi_size_fits(stats_p->size_bytes, sizeof(size_t), sizeof(*stats_p))) {
        return kvwi_fail(KVC_INVALID, "stats_p: size_bytes is not that of this library's struct");
    }
    const kvw_worker *w = seq->worker;
    kvw_stats s = seq->stats;
    s.size_bytes = stats_p->size_bytes;
    s.tokens = kvw_seq_tokens(seq);
    s.tokens_reused = seq->n_reused;
    for (uint32_t i = 0; i < w->opts.n_layers; i++) {
        for (uint32_t j = 0; j < w->n_levels; j++) {
            const kvwi_pages *level = &seq->layers[i].level[j];
            s.bytes_index += (uint64_t)level->n_rows * level->row_bytes;
        }
        s.bytes_residency += (uint64_t)seq->layers[i].residency.n_used * w->row_bytes;
    }
    s.bytes_residency += kvwi_retrievers_bytes(seq);
    for (uint32_t i = 0; i < seq->n_blocks; i++) {
        s.bytes_window += seq->blocks[i].buf != NULL ? w->block_bytes : 0;
    }
    s.bytes_device = seq->device != NULL ? w->device_ops->bytes(seq) : 0;
    if (w->putter != NULL) {
        kvwi_put_state put = kvwi_put_look(seq);
        s.blocks_put = put.blocks_put;
        s.blocks_existed = put.blocks_existed;
        s.bytes_put = put.bytes_put;
        s.put_retries = put.retries;
        s.requests += put.requests;
    }
    memcpy(stats_p, &s, s.size_bytes);
    return KVC_OK;
}

kvc_status kvw_seq_server_stats(const kvw_seq *seq, uint32_t server, kvw_server_stats *stats_p)
{
    if (seq == NULL || stats_p == NULL || server >= seq->worker->servers.n ||
        !kvwi_size_fits(stats_p->size_bytes, sizeof(size_t), sizeof(*stats_p))) {
        return kvwi_fail(KVC_INVALID,
                         "stats_p: size_bytes is not that of this library's struct, or "
                         "there is no such server");
    }
    const kvwi_seq_server *own = &seq->servers[server];
    const kvw_server_stats s = {
        .size_bytes = stats_p->size_bytes,
        .name = seq->worker->servers.all[server].name,
        .blocks = own->n_blocks,
        .rows = own->rows,
        .bytes = own->bytes,
        .requests = own->requests,
        .rows_near = own->rows_near,
        .rows_missing = own->rows_missing,
        .lost = kvwi_server_is_lost(seq->worker, server) ? 1 : 0,
    };
    memcpy(stats_p, &s, s.size_bytes);
    return KVC_OK;
}
