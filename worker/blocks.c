/*
 * blocks.c: block buffers, when they are handed to put, and when they may go.
 *
 * Runs on the sequence's thread; the pool has a leaf lock, since all sequences of a worker share
 * it. A buffer's layout is that of the block's values, so they are put from where they lie. A
 * buffer goes back to the pool only when the store has acknowledged the block and neither sinks,
 * recent nor a Selection Cache need it; kvw_tokens calls release when no step is open.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/clock.h"
#include "internal.h"

/* Free buffers that the pool keeps at least, rather than giving them back to the system. */
#define POOL_MIN_FREE 8u

/* Acknowledgements come in runs: what one run sets free the next blocks take, with the memory that
 * has been registered with a device. */
static uint32_t max_free(const kvw_worker *w)
{
    return kvwi_max_u32(POOL_MIN_FREE, w->opts.put_window);
}

void kvwi_pool_init(kvwi_pool *pool)
{
    kvc_mutex_init(&pool->mutex, KVC_RANK_LEAF);
    pool->free = NULL;
    pool->n_free = 0;
}

static void free_block(kvw_worker *w, kvwi_block *block)
{
    if (kvwi_regions_close(w, &block->regions) != KVC_OK) {
        return; /* still in use: leaking it is the lesser evil */
    }
    if (w->device != NULL) {
        w->device_ops->unmap(w->device, block->base);
    }
    (void)munmap(block->base, w->block_bytes);
    free(block);
}

void kvwi_pool_fini(kvw_worker *worker)
{
    kvwi_block *next = NULL;
    for (kvwi_block *b = worker->pool.free; b != NULL; b = next) {
        next = b->next;
        free_block(worker, b);
    }
    worker->pool.free = NULL;
    kvc_mutex_fini(&worker->pool.mutex);
}

static kvc_status new_block(kvw_worker *w, kvwi_block **block_p)
{
    kvwi_block *b = calloc(1, sizeof(*b));
    if (b == NULL) {
        return KVC_NO_MEMORY;
    }
    b->base =
        mmap(NULL, w->block_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b->base == MAP_FAILED) {
        free(b);
        return KVC_NO_MEMORY;
    }
    kvc_status st =
        w->device == NULL ? KVC_OK : w->device_ops->map(w->device, b->base, w->block_bytes);
    if (st != KVC_OK) {
        (void)munmap(b->base, w->block_bytes);
        free(b);
        return st;
    }
    st = kvwi_regions_open(w, b->base, w->block_bytes, &b->regions);
    if (st != KVC_OK) {
        free_block(w, b);
        return kvwi_fail(st, "a block buffer cannot be registered: %s", kvc_last_error());
    }
    *block_p = b;
    return KVC_OK;
}

kvc_status kvwi_pool_take(kvw_worker *worker, kvwi_block **block_p)
{
    kvwi_pool *pool = &worker->pool;
    kvc_mutex_lock(&pool->mutex);
    kvwi_block *b = pool->free;
    if (b != NULL) {
        pool->free = b->next;
        pool->n_free--;
    }
    kvc_mutex_unlock(&pool->mutex);
    if (b == NULL) {
        return new_block(worker, block_p);
    }
    b->next = NULL;
    *block_p = b;
    return KVC_OK;
}

void kvwi_pool_give(kvw_worker *worker, kvwi_block *block)
{
    kvwi_pool *pool = &worker->pool;
    kvc_mutex_lock(&pool->mutex);
    bool keep = pool->n_free < max_free(worker);
    if (keep) {
        block->next = pool->free;
        pool->free = block;
        pool->n_free++;
    }
    kvc_mutex_unlock(&pool->mutex);
    if (!keep) {
        free_block(worker, block);
    }
}

/* Slots for blocks 0 .. n - 1. */
static kvc_status reserve_slots(kvw_seq *seq, uint32_t n)
{
    if (n > seq->cap_blocks) {
        uint32_t cap = n + n / 2u + 16u;
        kvwi_seq_block *blocks = realloc(seq->blocks, cap * sizeof(*blocks));
        if (blocks == NULL) {
            return KVC_NO_MEMORY;
        }
        seq->blocks = blocks;
        seq->cap_blocks = cap;
    }
    while (seq->n_blocks < n) {
        seq->blocks[seq->n_blocks++] = (kvwi_seq_block){0};
    }
    return KVC_OK;
}

kvc_status kvwi_blocks_fill(kvw_seq *seq, uint32_t block)
{
    kvc_status st = reserve_slots(seq, block + 1u);
    if (st == KVC_OK && seq->blocks[block].buf == NULL) {
        st = kvwi_pool_take(seq->worker, &seq->blocks[block].buf);
    }
    return st;
}

kvc_status kvwi_blocks_reserve(kvw_seq *seq, uint32_t n_tokens)
{
    uint32_t bt = seq->worker->opts.block_tokens;
    kvc_status st = KVC_OK;
    for (uint32_t b = seq->pass.first / bt; st == KVC_OK && b * bt < n_tokens; b++) {
        st = kvwi_blocks_fill(seq, b);
    }
    return st;
}

/* The first token that may be wanted as recent by any layer from now on. */
static uint32_t keep_from(const kvw_seq *seq)
{
    const kvw_opts *o = &seq->worker->opts;
    uint32_t n = seq->pass.first + seq->pass.n;
    uint32_t keep = n > o->n_recent ? n - o->n_recent : 0;
    for (uint32_t i = 0; i < o->n_layers; i++) {
        const kvwi_picks *picks = &seq->layers[i].picks;
        keep = picks->cached ? kvwi_min_u32(keep, picks->near_begin) : keep;
    }
    return keep;
}

void kvwi_blocks_release(kvw_seq *seq)
{
    kvw_worker *w = seq->worker;
    if (w->opts.client == NULL) {
        return;
    }
    uint32_t bt = w->opts.block_tokens, keep = keep_from(seq);
    uint32_t acked = kvwi_put_look(seq).n_acked;
    while (seq->released_to < acked && (seq->released_to + 1u) * bt <= keep) {
        kvwi_seq_block *b = &seq->blocks[seq->released_to++];
        bool sink = (seq->released_to - 1u) * bt < w->opts.n_sink;
        if (!sink && b->buf != NULL) {
            kvwi_pool_give(w, b->buf);
            b->buf = NULL;
        }
    }
}

/* The block's index rows, copied from the pages into its buffer: each row holds all levels. */
static void stage_index(kvw_seq *seq, uint32_t block)
{
    const kvw_worker *w = seq->worker;
    uint32_t bt = w->opts.block_tokens;
    for (uint32_t layer = 0; layer < w->opts.n_layers && w->index_row_bytes != 0; layer++) {
        uint8_t *rows = kvwi_block_index(w, seq->blocks[block].buf, layer);
        for (uint32_t i = 0; i < w->n_levels; i++) {
            kvwi_pages_read(&seq->layers[layer].level[i], block * bt, bt, rows, w->index_row_bytes);
            rows += w->level[i].row_bytes;
        }
    }
}

kvc_status kvwi_blocks_submit(kvw_seq *seq, uint32_t n_tokens, uint64_t deadline_ns)
{
    kvw_worker *w = seq->worker;
    uint32_t bt = w->opts.block_tokens;
    if (w->opts.client == NULL) {
        return KVC_OK;
    }
    if (w->device != NULL && (seq->n_submitted + 1u) * bt <= n_tokens) {
        kvc_status st = w->device_ops->settle(seq);
        if (st != KVC_OK) {
            return st;
        }
    }
    while ((seq->n_submitted + 1u) * bt <= n_tokens) {
        uint32_t block = seq->n_submitted;
        kvc_status st = kvwi_names_block(seq, block);
        if (st != KVC_OK) {
            return kvwi_fail(st, "block %u: its digest could not be computed", block);
        }
        kvwi_place(seq, block);
        stage_index(seq, block);
        uint64_t t0 = kvc_now_ns();
        st = kvwi_put_submit(seq, block, seq->blocks[block].buf, deadline_ns);
        seq->stats.ns_put_wait += kvc_now_ns() - t0;
        if (st != KVC_OK) {
            return st;
        }
        kvwi_place_keep(seq, block);
        seq->n_submitted++;
    }
    return KVC_OK;
}
