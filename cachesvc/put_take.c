/*
 * put_take.c: the values of a PutBlocks from the request's bytes to dram; see put_take.h.
 *
 * A transport thread, or the room thread for what only an emptied segment has room for. Values are
 * claimed, given room, copied and made visible a batch at a time,
 * since each of these takes a lock that everybody wants. Invariant: what a batch does to each of
 * its values is what one by one would have done: a value that stands in it twice is put once, and
 * one may give way to the next.
 */
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/metrics.h"
#include "base/sum.h"
#include "cascade.h"
#include "put_take.h"

#define SUM_STEP_BYTES 32768u
#define BATCH          64u /* values claimed at once, and copied before the lock is wanted again */

/* Where the next value's bytes begin in the payload. */
typedef struct cursor {
    const struct iovec *iov;
    uint32_t n;
    size_t off_bytes;
} cursor;

/* Moves on by len bytes; copies them to dst unless that is NULL. */
static void cursor_read(cursor *at, void *dst, size_t len_bytes)
{
    char *out = dst;
    while (len_bytes) {
        KVC_ASSERT(at->n > 0);
        size_t step = at->iov->iov_len - at->off_bytes;
        if (step > len_bytes)
            step = len_bytes;
        if (out && at->iov->iov_base) { /* an empty piece may lie nowhere */
            memcpy(out, (const char *)at->iov->iov_base + at->off_bytes, step);
            out += step;
        }
        len_bytes -= step;
        at->off_bytes += step;
        if (at->off_bytes == at->iov->iov_len) {
            at->iov++;
            at->n--;
            at->off_bytes = 0;
        }
    }
}

/*
 * Copies n rows and sums up each soon after, while it is in the cache. The sums are what the value
 * is worth from then on: bytes that change in memory later do not get through lmdb unnoticed. sums
 * may be NULL.
 */
static void cursor_rows(cursor *at, char *dst, uint32_t row_bytes, uint32_t n, uint32_t *sums)
{
    uint32_t step = row_bytes < SUM_STEP_BYTES ? SUM_STEP_BYTES / row_bytes : 1;
    for (uint32_t i = 0; i < n; i += step) {
        step = n - i < step ? n - i : step;
        cursor_read(at, dst, (size_t)step * row_bytes);
        if (sums)
            kvc_row_sums(dst, row_bytes, step, sums + i);
        dst += (size_t)step * row_bytes;
    }
}

/* The next len bytes in one piece, or NULL. */
static const void *cursor_peek(const cursor *at, size_t len_bytes)
{
    if (!at->n || at->iov->iov_len - at->off_bytes < len_bytes)
        return NULL;
    return (const char *)at->iov->iov_base + at->off_bytes;
}

/* ---- one value ------------------------------------------------------------------------------- */

/* The statuses that the protocol knows for one value. */
static kvc_status item_status(kvc_status status)
{
    switch (status) {
    case KVC_OK:
    case KVC_AGAIN:
    case KVC_EXISTS:
    case KVC_NOT_FOUND:
    case KVC_NO_SPACE:
    case KVC_INVALID:
        return status;
    case KVC_CANCELLED:
    case KVC_TIMED_OUT:
    case KVC_NO_MEMORY:
        return KVC_AGAIN;
    default:
        return KVC_IO;
    }
}

void kvs_put_settle(kvs_put *put, uint32_t i, kvc_status status)
{
    put->items[i].kind = KVS_ITEM_SETTLED;
    put->status[i] = (int8_t)item_status(status);
    if (status == KVC_EXISTS)
        KVC_COUNT(put_values_exist);
    if (status == KVC_OK) {
        KVC_COUNT(put_values);
        KVC_COUNT_N(put_bytes, put->call->req.u.put_blocks.values[i].len_bytes);
    }
}

/* Copies a piece to its room and fills what is left of that; sums (may be NULL) are of all of it.
 */
static void cursor_piece(kvs_put *put, uint32_t i, cursor *at, void *room, uint32_t *sums)
{
    const kvs_put_item *item = &put->items[i];
    const kvs_part *part = kvs_part_at(put->schema, item->part);
    cursor_read(at, room, put->call->req.u.put_blocks.values[i].len_bytes);
    kvs_opaque_seal(put->schema, item->part, &item->id, room);
    if (sums)
        kvc_row_sums(room, part->row_bytes, part->n_rows, sums);
}

/* Whether what is visible in dram is to be written to lmdb behind the answer. */
static bool want_writes(const kvs_server *server)
{
    return server->writer && server->admission.policy == KVS_ADMIT_ALL;
}

/* Copies a claimed value to its slot in dram. */
static void copy_one(kvs_put *put, uint32_t i, void *addr, cursor *at)
{
    kvs_put_item *item = &put->items[i];
    const kvs_part *part = kvs_part_at(put->schema, item->part);
    item->rows = addr;
    if (put->durable || want_writes(put->server)) /* without memory the writer computes them */
        item->sums = malloc(part->n_rows * sizeof(*item->sums));
    if (put->schema->piece_bytes)
        cursor_piece(put, i, at, addr, item->sums);
    else
        cursor_rows(at, addr, part->row_bytes, part->n_rows, item->sums);
}

/* What has been copied and needs no more becomes visible. */
static void publish(kvs_put *put, uint32_t first, uint32_t n)
{
    kvs_filled filled[BATCH];
    bool dirty = want_writes(put->server);
    for (uint32_t i = 0; i < n; i++) {
        kvs_put_item *item = &put->items[first + i];
        filled[i] = (kvs_filled){.value = item->value,
                                 .n_rows = kvs_part_at(put->schema, item->part)->n_rows,
                                 .slot = item->slot,
                                 .sums = item->sums};
        item->sums = NULL;
    }
    kvs_index_publish_each(put->server->index, filled, n, dirty);
    if (dirty)
        kvs_writer_kick(put->server->writer);
    for (uint32_t i = 0; i < n; i++)
        kvs_put_settle(put, first + i, KVC_OK);
}

/* Copies claimed values, neighbours in the request, to their slots; MEMORY: they are done. */
static void take_dram(kvs_put *put, uint32_t first, uint32_t n, const kvs_slot *slots,
                      void *const *addrs, cursor *at)
{
    kvs_server *server = put->server;
    for (uint32_t i = 0; i < n; i++) {
        put->items[first + i].slot = slots[i];
        put->items[first + i].kind = KVS_ITEM_BOTH;
        copy_one(put, first + i, addrs[i], at);
    }
    server->dram.ops->commit(server->dram.tier, slots, n);
    if (!put->durable)
        publish(put, first, n);
}

/* dram is full of what cannot give way: the request's bytes go straight to lmdb, if there is one.
 */
static void take_through(kvs_put *put, uint32_t i, cursor *at)
{
    kvs_put_item *item = &put->items[i];
    uint32_t len_bytes = kvs_part_at(put->schema, item->part)->value_bytes;
    bool piece = put->schema->piece_bytes;
    item->kind = KVS_ITEM_THROUGH;
    item->rows = piece ? NULL : cursor_peek(at, len_bytes);
    if (!item->rows)
        item->rows = item->copy = malloc(len_bytes);
    if (item->copy && piece)
        cursor_piece(put, i, at, item->copy, NULL);
    else
        cursor_read(at, item->copy, put->call->req.u.put_blocks.values[i].len_bytes);
    if (!item->rows) {
        kvs_index_abandon(put->server->index, item->value);
        kvs_put_settle(put, i, KVC_AGAIN);
    }
}

/* Nothing of dram can be had for a claimed value. */
static void take_nowhere(kvs_put *put, uint32_t i, kvc_status status, cursor *at)
{
    if (put->server->writer) {
        take_through(put, i, at);
        return;
    }
    cursor_read(at, NULL, put->call->req.u.put_blocks.values[i].len_bytes);
    kvs_index_abandon(put->server->index, put->items[i].value);
    kvs_put_settle(put, i, status);
}

/* Claimed values that wait for the room thread; it claims them again. */
static void leave(kvs_put *put, uint32_t first, uint32_t n, cursor *at)
{
    for (uint32_t i = first; i < first + n; i++) {
        kvs_index_abandon(put->server->index, put->items[i].value);
        cursor_read(at, NULL, put->call->req.u.put_blocks.values[i].len_bytes);
    }
}

/* Claimed values of one shape, n <= BATCH, neighbours in the request. Where dram has room for fewer
   at once, those become visible first, so that they may give way to the rest. */
static void take_new(kvs_put *put, uint32_t first, uint32_t n, cursor *at)
{
    kvs_slot slots[BATCH];
    void *addrs[BATCH];
    while (n > 0) {
        uint32_t got = 0;
        kvc_status status = KVC_AGAIN;
        if (put->room != KVS_ROOM_WANTED)
            status = kvs_cascade_reserve(put->server, put->schema, put->items[first].part, n,
                                         &put->room, slots, addrs, &got);
        if (status == KVC_OK) {
            take_dram(put, first, got, slots, addrs, at);
        } else if (put->room == KVS_ROOM_WANTED) {
            leave(put, first, n, at);
            got = n;
        } else {
            take_nowhere(put, first, status, at);
            got = 1;
        }
        first += got;
        n -= got;
    }
}

/*
 * The sum of a value that came whole, in one piece: computed, or compared with what was said of it.
 * INVALID: it is another. NO_MEMORY.
 */
static kvc_status sum_piece(kvs_put *put, uint32_t i, const cursor *at)
{
    const kvc_put_value *value = &put->call->req.u.put_blocks.values[i];
    cursor copy_at = *at;
    void *copy = NULL;
    const void *bytes = value->len_bytes ? cursor_peek(at, value->len_bytes) : "";
    if (!bytes) {
        copy = malloc(value->len_bytes);
        if (!copy)
            return KVC_NO_MEMORY;
        cursor_read(&copy_at, copy, value->len_bytes);
        bytes = copy;
    }
    uint64_t sum = kvc_value_sum(bytes, value->len_bytes);
    free(copy);
    put->items[i].id.sum = sum ? sum : 1;
    return value->whole.sum == 0 || value->whole.sum == put->items[i].id.sum ? KVC_OK : KVC_INVALID;
}

/* Claims a piece. What nobody completed makes way for it, and is gone from every tier first. */
static kvs_claim claim_piece(kvs_put *put, uint32_t i)
{
    const kvc_put_value *value = &put->call->req.u.put_blocks.values[i];
    kvs_put_item *item = &put->items[i];
    bool probe = put->call->req.u.put_blocks.probe;
    uint32_t tag = item->id.sum ? kvs_opaque_tag(put->schema, &item->id) : 0;
    kvs_claim claim = KVS_CLAIM_REST;
    for (uint32_t tries = 0; claim == KVS_CLAIM_REST && tries < 2; tries++) {
        claim = kvs_index_claim_piece(put->server->index, put->schema, item->part, tag,
                                      &value->digest, put->durable, probe,
                                      kvc_now_ns() / 1000000000, &item->value, &item->slot);
        if (claim == KVS_CLAIM_REST)
            kvs_cascade_reap(put->server);
    }
    return claim;
}

/* Where a piece goes and whose it is; false: it is settled. */
static bool begin_piece(kvs_put *put, uint32_t i, cursor *at)
{
    const kvc_put_value *value = &put->call->req.u.put_blocks.values[i];
    kvs_put_item *item = &put->items[i];
    kvc_status status = KVC_OK;
    bool probe = put->call->req.u.put_blocks.probe;
    item->id = (kvs_opaque_id){value->whole.total_bytes, value->whole.sum};
    item->part = kvs_opaque_place(put->schema, item->id.total_bytes, value->part);
    if (!probe && kvs_opaque_pieces(put->schema, item->id.total_bytes) == 1)
        status = sum_piece(put, i, at);
    if (status == KVC_OK)
        return true;
    cursor_read(at, NULL, value->len_bytes);
    kvs_put_settle(put, i, status);
    return false;
}

/* A value that this put does not bring: what the index said of it. */
static void take_old(kvs_put *put, uint32_t i, kvs_claim claim, cursor *at)
{
    kvs_put_item *item = &put->items[i];
    if (!put->call->req.u.put_blocks.probe)
        cursor_read(at, NULL, put->call->req.u.put_blocks.values[i].len_bytes);
    if (claim == KVS_CLAIM_WRITE) {
        item->kind = KVS_ITEM_OLD;
        item->rows = put->server->dram.ops->map(put->server->dram.tier, item->slot);
    } else if (claim == KVS_CLAIM_SYNC) {
        item->kind = KVS_ITEM_SYNC;
        put->wants_sync = true;
    } else {
        kvs_put_settle(put, i,
                       claim == KVS_CLAIM_EXISTS   ? KVC_EXISTS
                       : claim == KVS_CLAIM_ABSENT ? KVC_NOT_FOUND
                                                   : KVC_AGAIN);
    }
}

static void take_piece(kvs_put *put, uint32_t i, cursor *at)
{
    if (!begin_piece(put, i, at))
        return;
    kvs_claim claim = claim_piece(put, i);
    if (claim == KVS_CLAIM_MINE)
        take_new(put, i, 1, at);
    else
        take_old(put, i, claim, at);
}

/* How many of wants [n], the first of which is MINE, can go to dram together. */
static uint32_t run_length(const kvs_put *put, const kvs_want *wants, uint32_t n)
{
    const kvs_part *first = kvs_part_at(put->schema, wants[0].part);
    uint32_t run = 1;
    for (; run < n && wants[run].claim == KVS_CLAIM_MINE; run++) {
        const kvs_part *part = kvs_part_at(put->schema, wants[run].part);
        if (part->row_bytes != first->row_bytes || part->n_rows != first->n_rows)
            break;
    }
    return run;
}

/* Claims wants [n], from item first of the request on; returns how many have their answer. */
static uint32_t claim_rows(kvs_put *put, uint32_t first, kvs_want *wants, uint32_t n)
{
    kvs_put_item *items = &put->items[first];
    n = kvs_index_claim_each(put->server->index, put->schema, wants, n, put->durable,
                             put->call->req.u.put_blocks.probe);
    for (uint32_t i = 0; i < n; i++) {
        items[i].part = wants[i].part;
        items[i].value = wants[i].value;
        items[i].slot = wants[i].slot;
    }
    return n;
}

/* Values of rows from first on, n <= BATCH; returns how many are taken. What was there as all were
   claimed is claimed again if anything gave way since: it may have been that. */
static uint32_t take_rows(kvs_put *put, uint32_t first, uint32_t n, cursor *at)
{
    const kvc_put_value *values = &put->call->req.u.put_blocks.values[first];
    const atomic_uint_least64_t *evictions = &put->server->dram.evictions;
    uint64_t n_evictions = atomic_load(evictions);
    kvs_want wants[BATCH];
    for (uint32_t i = 0; i < n; i++)
        wants[i] = (kvs_want){.digest = &values[i].digest,
                              .part = (uint32_t)kvs_schema_part(put->schema, values[i].part)};
    n = claim_rows(put, first, wants, n);
    for (uint32_t i = 0; i < n;) {
        uint32_t run = 1;
        if (wants[i].claim == KVS_CLAIM_EXISTS && atomic_load(evictions) != n_evictions)
            (void)claim_rows(put, first + i, &wants[i], 1);
        if (wants[i].claim == KVS_CLAIM_MINE) {
            run = run_length(put, &wants[i], n - i);
            take_new(put, first + i, run, at);
        } else {
            take_old(put, first + i, wants[i].claim, at);
        }
        i += run;
    }
    return n;
}

/* How many items from first on, up to BATCH, are NEW or all are not. */
static uint32_t alike(const kvs_put *put, uint32_t first)
{
    bool is_new = put->items[first].kind == KVS_ITEM_NEW;
    uint32_t n = 1;
    while (n < BATCH && first + n < put->n &&
           (put->items[first + n].kind == KVS_ITEM_NEW) == is_new)
        n++;
    return n;
}

void kvs_put_take(kvs_put *put)
{
    const kvc_put_value *values = put->call->req.u.put_blocks.values;
    cursor at = {.iov = put->call->req.data, .n = put->call->req.n_data};
    for (uint32_t i = 0; i < put->n && put->room != KVS_ROOM_WANTED;) {
        uint32_t n = alike(put, i);
        if (put->items[i].kind != KVS_ITEM_NEW) { /* taken before, so the request has its bytes */
            for (uint32_t end = i + n; i < end; i++)
                cursor_read(&at, NULL, values[i].len_bytes);
        } else if (put->schema->piece_bytes) {
            take_piece(put, i++, &at);
        } else {
            i += take_rows(put, i, n, &at);
        }
    }
}
