/*
 * cuda_tables.c: where the rows of every block are, as the device sees them: a block's buffer as
 * long as there is one, then the server's memory, host's or GPU's, where the context is mapped,
 * else nowhere (such rows come by a fetch).
 *
 * Runs on the sequence's thread. Other layers' steps may be under way: what they enqueued before
 * reads the table as it was, and they keep the stamp that it had. Addresses in a server's memory
 * belong to one map (its stamp); when the context has grown or the server has taken the map back,
 * all of them are asked for again. Invariant: shadow and the device's table are equal when a step
 * begins.
 */
#include <string.h>

#include "state.h"

/* How often all addresses are asked for while the context keeps being mapped anew. */
#define TRIES 8

static const void *locate(kvw_seq *seq, uint32_t layer, uint32_t block)
{
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    kvc_mapped_value value;
    kvc_context *context = kvwi_cuda_context(seq);
    if (context == NULL || d->no_maps ||
        kvc_context_locate(context, w->kv_parts[layer], block, &value) != KVC_OK ||
        value.row_bytes != w->row_bytes) {
        return NULL;
    }
    d->mixed = d->mixed || (d->stamp != 0 && d->stamp != value.stamp);
    d->stamp = value.stamp;
    if (value.device_rows != NULL) {
        return kvwi_segments_on_device(d->device->number, value.device_rows) ? value.device_rows
                                                                             : NULL;
    }
    return kvwi_segments_find(d->device->number, value.rows);
}

static const void *address(kvw_seq *seq, uint32_t layer, uint32_t block)
{
    const kvwi_block *buf = seq->blocks[block].buf;
    return buf != NULL ? kvwi_block_row(seq->worker, buf, layer, 0) : locate(seq, layer, block);
}

static kvc_status refresh_layer(kvw_seq *seq, uint32_t layer, uint32_t first, uint32_t end)
{
    kvwi_device_seq *d = seq->device;
    kvwi_device_layer *l = &d->layers[layer];
    uint32_t from = end, to = first;
    for (uint32_t b = first; b < end; b++) {
        const void *now = address(seq, layer, b);
        if (now == l->shadow[b]) {
            continue;
        }
        l->shadow[b] = now;
        from = kvwi_min_u32(from, b);
        to = b + 1u;
    }
    l->n_blank = 0;
    for (uint32_t b = 0; b < end; b++) {
        l->n_blank += l->shadow[b] == NULL;
    }
    return from >= to ? KVC_OK
                      : kvk_cuda_copy(d->device->cuda, (void *)(l->blocks + from),
                                      (const void *)(l->shadow + from),
                                      (to - from) * sizeof(*l->shadow), d->stream);
}

static kvc_status refresh(kvw_seq *seq, uint32_t first)
{
    kvc_status st = kvwi_cuda_ahead_read(seq);
    seq->device->mixed = false;
    for (uint32_t i = 0; st == KVC_OK && i < seq->worker->opts.n_layers; i++) {
        st = refresh_layer(seq, i, first, seq->n_blocks);
    }
    return st;
}

/* All addresses, of one map. maps: they may be in one. */
static kvc_status refresh_all(kvw_seq *seq, bool maps)
{
    kvwi_device_seq *d = seq->device;
    kvc_status st = KVC_OK;
    for (int i = 0; i <= TRIES; i++) {
        d->stamp = 0;
        d->no_maps = !maps || i == TRIES;
        st = refresh(seq, 0);
        if (st != KVC_OK || !d->mixed) {
            break;
        }
    }
    d->no_maps = false;
    return st;
}

kvc_status kvwi_cuda_tables(kvw_seq *seq, bool maps)
{
    kvwi_device_seq *d = seq->device;
    uint64_t stamp = d->stamp;
    kvc_status st = KVC_OK;
    if (stamp != 0 && (!maps || !kvc_context_is_mapped(kvwi_cuda_context(seq), stamp))) {
        st = refresh_all(seq, maps);
    } else if (seq->released_to != d->n_released || seq->n_blocks != d->n_tabled) {
        st = refresh(seq, d->n_released);
        if (st == KVC_OK &&
            (d->mixed || d->stamp != stamp)) { /* it has what the last one had not */
            st = refresh_all(seq, maps);
        }
    }
    d->n_released = seq->released_to;
    d->n_tabled = seq->n_blocks;
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "the table of blocks");
}

bool kvwi_cuda_tables_take(kvw_seq *seq, kvwi_device_layer *l)
{
    kvwi_cuda_tables_let_go(l);
    l->stamp = seq->device->stamp;
    if (l->stamp != 0) {
        l->hold = kvc_context_hold_map(kvwi_cuda_context(seq), l->stamp);
    }
    return l->stamp == 0 || l->hold != NULL;
}

void kvwi_cuda_tables_let_go(kvwi_device_layer *l)
{
    kvc_map_let_go(l->hold);
    l->hold = NULL;
}

bool kvwi_cuda_tables_hold(const kvw_seq *seq, uint64_t stamp)
{
    return stamp == 0 || kvc_context_is_mapped(kvwi_cuda_context(seq), stamp);
}
