/*
 * gather.c: rows from where they lie to where the answer wants them.
 *
 * Transport and disk threads; one thread at a time, but kvs_gather_read, which runs for different
 * reads at once and touches only its read's rows and status. Invariant: offsets ascend with the
 * picks, and two rows never overlap.
 */
#include <stdlib.h>
#include <string.h>

#include "base/fault.h"
#include "base/metrics.h"
#include "cascade.h"
#include "fetch.h"

#define MIN_SLICE_BYTES 4096u /* below it, copying a row is cheaper than sending a slice */
#define MAX_RANGES      1024u

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

/* The row ranges of a read from pick on; *pick_p: where the next call goes on. */
static uint32_t fill_ranges(const kvs_fetch *fetch, uint32_t *pick_p, kvs_row_range *ranges)
{
    uint32_t n = 0, p = *pick_p, last = KVS_NO_READ;
    while (p != KVS_NO_READ) {
        kvs_row_range *range = n ? &ranges[n - 1] : NULL;
        if (range && p == last + 1 && fetch->pick_row[p] == range->first + range->n) {
            range->n++;
        } else {
            if (n == MAX_RANGES)
                break;
            ranges[n++] = (kvs_row_range){.first = fetch->pick_row[p],
                                          .n = 1,
                                          .dst = fetch->buffer->bytes + fetch->pick_off[p]};
        }
        last = p;
        p = fetch->pick_next[p];
    }
    *pick_p = p;
    return n;
}

void kvs_gather_read(kvs_fetch *fetch, uint32_t read)
{
    kvs_server *server = fetch->server;
    kvs_fetch_read *extra = &fetch->extra[read];
    const kvs_part *part = &extra->schema->parts[extra->part];
    kvs_row_range ranges[MAX_RANGES];
    kvs_value_key key;
    uint32_t pick = extra->first_pick;
    kvc_status status = KVC_FAULT("fetch.read") ? KVC_IO : KVC_OK;
    kvs_index_key(server->index, fetch->reads[read].value, &key);
    while (status == KVC_OK && pick != KVS_NO_READ) {
        uint32_t n = fill_ranges(fetch, &pick, ranges);
        status = server->lmdb.ops->read(server->lmdb.tier, &key, fetch->reads[read].slot,
                                        part->row_bytes, extra->schema->block_tokens, ranges, n);
    }
    if (status == KVC_CORRUPT || status == KVC_NOT_FOUND)
        kvs_cascade_bad(server, fetch->reads[read].value, status);
    if (status != KVC_OK && status != KVC_CORRUPT && status != KVC_NOT_FOUND)
        status = KVC_IO;
    extra->status = status;
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
