/*
 * gather.c: rows from where they lie to where the answer wants them.
 *
 * Transport and disk threads; one thread at a time, but kvs_gather_read, which runs on several at
 * once and touches only the rows and statuses of the reads that it took. Invariant: offsets ascend
 * with the picks, and two rows never overlap.
 */
#include <stdlib.h>
#include <string.h>

#include "base/fault.h"
#include "base/metrics.h"
#include "cascade.h"
#include "fetch.h"
#include "gpu.h"

#define MIN_SLICE_BYTES 4096u /* below it, copying a row is cheaper than sending a slice */

static bool pick_found(const kvs_fetch *fetch, uint32_t pick)
{
    uint32_t read = fetch->pick_read[pick];
    return read != KVS_NO_READ && fetch->extra[read].status == KVC_OK;
}

void kvs_gather_place(kvs_fetch *fetch)
{
    uint32_t off = 0;
    for (uint32_t p = 0; p < fetch->n_picks; p++) {
        fetch->pick_off[p] = off;
        if (pick_found(fetch, p))
            off += kvs_fetch_row_bytes(fetch, fetch->pick_read[p]);
    }
    fetch->data_bytes = off;
}

/* How many picks from p on are neighbouring rows of one value; p must be found. */
static uint32_t run_length(const kvs_fetch *fetch, uint32_t p)
{
    uint32_t n = 1;
    while (p + n < fetch->n_picks && fetch->pick_read[p + n] == fetch->pick_read[p] &&
           fetch->pick_row[p + n] == fetch->pick_row[p] + n)
        n++;
    return n;
}

uint32_t kvs_gather_slices(kvs_fetch *fetch, kvt_slice *slices)
{
    uint32_t n = 0;
    uint64_t max = fetch->data_bytes / MIN_SLICE_BYTES;
    if (max > KVT_MAX_SLICES)
        max = KVT_MAX_SLICES;
    for (uint32_t p = 0; p < fetch->n_picks;) {
        if (!pick_found(fetch, p)) {
            p++;
            continue;
        }
        if (n == max)
            return 0;
        uint32_t row_bytes = kvs_fetch_row_bytes(fetch, fetch->pick_read[p]);
        uint32_t run = run_length(fetch, p);
        slices[n].base =
            fetch->extra[fetch->pick_read[p]].base + (size_t)fetch->pick_row[p] * row_bytes;
        slices[n].len_bytes = (size_t)run * row_bytes;
        n++;
        p += run;
    }
    return n;
}

void kvs_gather_copy(kvs_fetch *fetch)
{
    for (uint32_t p = 0; p < fetch->n_picks;) {
        const kvs_fetch_read *extra =
            fetch->pick_read[p] == KVS_NO_READ ? NULL : &fetch->extra[fetch->pick_read[p]];
        if (!extra || !extra->base) {
            p++;
            continue;
        }
        uint32_t row_bytes = extra->schema->parts[extra->part].row_bytes;
        uint32_t run = run_length(fetch, p);
        memcpy(fetch->buffer->bytes + fetch->pick_off[p],
               extra->base + (size_t)fetch->pick_row[p] * row_bytes, (size_t)run * row_bytes);
        p += run;
    }
}

bool kvs_gather_prepare(kvs_fetch *fetch)
{
    size_t n = 0;
    for (uint32_t i = 0; i < fetch->n_lmdb; i++)
        n += fetch->reads[fetch->lmdb_reads[i]].n_rows;
    kvs_row_range *ranges = malloc((n ? n : 1) * sizeof(*ranges));
    fetch->ranges = ranges;
    for (uint32_t i = 0; ranges && i < fetch->n_lmdb; i++) {
        fetch->extra[fetch->lmdb_reads[i]].ranges = ranges;
        ranges += fetch->reads[fetch->lmdb_reads[i]].n_rows;
    }
    return fetch->ranges != NULL;
}

/* The row ranges of a read, from its picks. */
static uint32_t fill_ranges(const kvs_fetch *fetch, const kvs_fetch_read *extra)
{
    kvs_row_range *ranges = extra->ranges;
    uint32_t n = 0, last = KVS_NO_READ;
    for (uint32_t p = extra->first_pick; p != KVS_NO_READ; p = fetch->pick_next[p]) {
        kvs_row_range *range = n ? &ranges[n - 1] : NULL;
        if (range && p == last + 1 && fetch->pick_row[p] == range->first + range->n)
            range->n++;
        else
            ranges[n++] = (kvs_row_range){.first = fetch->pick_row[p],
                                          .n = 1,
                                          .dst = fetch->buffer->bytes + fetch->pick_off[p]};
        last = p;
    }
    return n;
}

static void read_done(void *arg, const kvs_tier_read *tier_read)
{
    kvs_fetch *fetch = arg;
    uint32_t read = (uint32_t)((kvs_fetch_read *)tier_read->arg - fetch->extra);
    kvc_status status = tier_read->status;
    if (status == KVC_CORRUPT || status == KVC_NOT_FOUND)
        kvs_cascade_bad(fetch->server, fetch->reads[read].value, status);
    else if (status != KVC_OK)
        status = KVC_IO;
    fetch->extra[read].status = status;
}

/* Where a gpu has a copy, it is read at once; false: it has none, or lmdb is to be asked. */
static bool from_gpu(kvs_fetch *fetch, uint32_t read, const kvs_tier_read *tier_read)
{
    kvs_read *r = &fetch->reads[read];
    r->gpu = r->gpu && kvs_gpu_read(fetch->server, r, tier_read->row_bytes, tier_read->n_rows,
                                    tier_read->ranges, tier_read->n_ranges) == KVC_OK;
    if (r->gpu)
        fetch->extra[read].status = KVC_OK;
    return r->gpu;
}

static bool next_read(void *arg, kvs_tier_read *tier_read)
{
    kvs_fetch *fetch = arg;
    for (;;) {
        uint32_t i = atomic_fetch_add(&fetch->next_lmdb, 1);
        if (i >= fetch->n_lmdb || kvs_given_up(fetch->call) != KVC_OK)
            return false;
        uint32_t read = fetch->lmdb_reads[i];
        kvs_fetch_read *extra = &fetch->extra[read];
        if (KVC_FAULT("fetch.read")) {
            extra->status = KVC_IO;
            continue;
        }
        kvs_index_key(fetch->server->index, fetch->reads[read].value, &tier_read->key);
        tier_read->slot = fetch->reads[read].slot;
        tier_read->row_bytes = kvs_fetch_row_bytes(fetch, read);
        tier_read->n_rows = extra->schema->block_tokens;
        tier_read->ranges = extra->ranges;
        tier_read->n_ranges = fill_ranges(fetch, extra);
        tier_read->arg = extra;
        if (!from_gpu(fetch, read, tier_read))
            return true;
    }
}

void kvs_gather_read(kvs_fetch *fetch)
{
    kvs_store *lmdb = &fetch->server->lmdb;
    kvs_tier_reads reads = {.next = next_read, .done = read_done, .arg = fetch};
    lmdb->ops->read_each(lmdb->tier, &reads);
}

void kvs_gather_compact(kvs_fetch *fetch)
{
    uint32_t off = 0;
    for (uint32_t p = 0; p < fetch->n_picks; p++) {
        if (!pick_found(fetch, p))
            continue;
        uint32_t row_bytes = kvs_fetch_row_bytes(fetch, fetch->pick_read[p]);
        if (fetch->pick_off[p] != off)
            memmove(fetch->buffer->bytes + off, fetch->buffer->bytes + fetch->pick_off[p],
                    row_bytes);
        fetch->pick_off[p] = off;
        off += row_bytes;
    }
    fetch->data_bytes = off;
}

bool kvs_gather_missing(kvs_fetch *fetch, const kvc_missing_row **missing_p, uint32_t *n_p)
{
    uint32_t n = 0;
    for (uint32_t p = 0; p < fetch->n_picks; p++)
        n += !pick_found(fetch, p);
    kvc_missing_row *missing = NULL;
    if (n && !(missing = kvc_arena_calloc(&fetch->call->arena, n, sizeof(*missing))))
        return false;
    *n_p = n;
    *missing_p = missing;
    for (uint32_t p = 0; n && p < fetch->n_picks; p++) {
        if (pick_found(fetch, p))
            continue;
        uint32_t read = fetch->pick_read[p];
        missing->index = p;
        missing->status = read == KVS_NO_READ ? KVC_NOT_FOUND : fetch->extra[read].status;
        missing++;
    }
    return true;
}
