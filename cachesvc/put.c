/*
 * put.c: PutBlocks.
 *
 * Starts on a transport thread, which checks everything, claims each value and copies it to dram.
 * A MEMORY value is visible and done then. What must reach lmdb first (DURABLE, or no room in dram)
 * goes to the writer, and the last write answers. Two puts of one value at the same time: the
 * second gets AGAIN for it, and EXISTS once the first is visible. Invariant: a value that fails was
 * never visible and leaves nothing behind.
 */
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/metrics.h"
#include "base/sum.h"
#include "cascade.h"
#include "put_check.h"
#include "request.h"
#include "writer.h"

#define SUM_STEP_BYTES 32768u

typedef enum put_state {
    PUT_CHECK,
    PUT_TAKE,
    PUT_WRITE, /* jobs are with the writer; the last one goes on */
    PUT_SYNC,  /* a disk thread syncs lmdb for values that were there already */
    PUT_REPLY,
    PUT_DONE,
} put_state;

typedef enum item_kind {
    ITEM_SETTLED, /* status is final */
    ITEM_BOTH,    /* in dram, not visible: visible once lmdb has it */
    ITEM_THROUGH, /* no room in dram: from the request's bytes to lmdb */
    ITEM_OLD,     /* somebody's value, in dram only: EXISTS once it is durable */
    ITEM_SYNC,    /* somebody's value, in lmdb, perhaps not synced */
} item_kind;

typedef struct put_item {
    uint32_t value, part; /* part: place */
    item_kind kind;
    kvs_slot slot;      /* in dram; of ITEM_SYNC: in lmdb */
    const void *rows;   /* dense: dram, the request's bytes, or copy */
    void *copy;         /* of bytes that came in pieces; NULL otherwise */
    uint32_t *sums;     /* of the rows in dram as they came; NULL: none, or with the job */
    kvs_write_job *job; /* NULL: nothing to write */
    kvs_opaque_id id;   /* of the opaque value that this is a piece of */
    struct kvs_put *put;
} put_item;

typedef struct kvs_put {
    kvs_job job; /* first: a disk job is a put */
    kvs_server *server;
    kvt_call *call;
    put_state state;
    const kvs_schema *schema;
    uint32_t n;
    bool durable, wants_sync;
    int8_t *status;        /* [n] */
    atomic_uint n_pending; /* jobs out, and one for the thread that submits them */
    uint32_t n_jobs;
    put_item items[];
} kvs_put;

/* Where the next value's bytes begin in the payload. */
typedef struct cursor {
    const struct iovec *iov;
    uint32_t n;
    size_t off_bytes;
} cursor;

static void process(kvs_put *put);

/* Moves on by len bytes; copies them to dst unless that is NULL. */
static void cursor_read(cursor *at, void *dst, size_t len_bytes)
{
    char *out = dst;
    while (len_bytes) {
        KVC_ASSERT(at->n > 0);
        size_t step = at->iov->iov_len - at->off_bytes;
        if (step > len_bytes)
            step = len_bytes;
        if (out) {
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

static void settle(kvs_put *put, uint32_t i, kvc_status status)
{
    put->items[i].kind = ITEM_SETTLED;
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
    const put_item *item = &put->items[i];
    const kvs_part *part = kvs_part_at(put->schema, item->part);
    cursor_read(at, room, put->call->req.u.put_blocks.values[i].len_bytes);
    kvs_opaque_seal(put->schema, item->part, &item->id, room);
    if (sums)
        kvc_row_sums(room, part->row_bytes, part->n_rows, sums);
}

/* Copies a claimed value into its dram slot; MEMORY: it is done. */
static void take_dram(kvs_put *put, uint32_t i, void *addr, cursor *at)
{
    kvs_server *server = put->server;
    put_item *item = &put->items[i];
    const kvs_part *part = kvs_part_at(put->schema, item->part);
    uint32_t n_rows = part->n_rows;
    bool dirty = server->writer && server->admission.policy == KVS_ADMIT_ALL;
    if (put->durable || dirty) /* without memory for them the writer computes them */
        item->sums = malloc(n_rows * sizeof(*item->sums));
    if (put->schema->piece_bytes)
        cursor_piece(put, i, at, addr, item->sums);
    else
        cursor_rows(at, addr, part->row_bytes, n_rows, item->sums);
    server->dram.ops->commit(server->dram.tier, item->slot);
    if (put->durable) {
        item->kind = ITEM_BOTH;
        item->rows = addr;
        return;
    }
    if (dirty) {
        kvs_index_publish_dirty(server->index, item->value, item->slot, item->sums, n_rows);
        item->sums = NULL;
        kvs_writer_kick(server->writer);
    } else {
        kvs_index_publish_dram(server->index, item->value, item->slot, false);
    }
    settle(put, i, KVC_OK);
}

/* dram is full of what cannot give way: the request's bytes go straight to lmdb, if there is one.
 */
static void take_through(kvs_put *put, uint32_t i, cursor *at)
{
    put_item *item = &put->items[i];
    uint32_t len_bytes = kvs_part_at(put->schema, item->part)->value_bytes;
    bool piece = put->schema->piece_bytes;
    item->kind = ITEM_THROUGH;
    item->rows = piece ? NULL : cursor_peek(at, len_bytes);
    if (!item->rows)
        item->rows = item->copy = malloc(len_bytes);
    if (item->copy && piece)
        cursor_piece(put, i, at, item->copy, NULL);
    else
        cursor_read(at, item->copy, put->call->req.u.put_blocks.values[i].len_bytes);
    if (!item->rows) {
        kvs_index_abandon(put->server->index, item->value);
        settle(put, i, KVC_AGAIN);
    }
}

static void take_new(kvs_put *put, uint32_t i, cursor *at)
{
    kvs_server *server = put->server;
    put_item *item = &put->items[i];
    void *addr;
    kvc_status status =
        kvs_cascade_reserve(server, put->schema, item->part,
                            &put->call->req.u.put_blocks.values[i].digest, &item->slot, &addr);
    if (status == KVC_OK) {
        take_dram(put, i, addr, at);
    } else if (server->writer) {
        take_through(put, i, at);
    } else {
        cursor_read(at, NULL, put->call->req.u.put_blocks.values[i].len_bytes);
        kvs_index_abandon(server->index, item->value);
        settle(put, i, status);
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
    put_item *item = &put->items[i];
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
    put_item *item = &put->items[i];
    kvc_status status = KVC_OK;
    bool probe = put->call->req.u.put_blocks.probe;
    item->id = (kvs_opaque_id){value->whole.total_bytes, value->whole.sum};
    item->part = kvs_opaque_place(put->schema, item->id.total_bytes, value->part);
    if (!probe && kvs_opaque_pieces(put->schema, item->id.total_bytes) == 1)
        status = sum_piece(put, i, at);
    if (status == KVC_OK)
        return true;
    cursor_read(at, NULL, value->len_bytes);
    settle(put, i, status);
    return false;
}

static void take(kvs_put *put, uint32_t i, cursor *at)
{
    const kvc_put_value *value = &put->call->req.u.put_blocks.values[i];
    put_item *item = &put->items[i];
    bool probe = put->call->req.u.put_blocks.probe;
    kvs_server *server = put->server;
    item->put = put;
    bool piece = put->schema->piece_bytes;
    kvs_claim claim;
    if (piece) {
        if (!begin_piece(put, i, at))
            return;
        claim = claim_piece(put, i);
    } else {
        item->part = (uint32_t)kvs_schema_part(put->schema, value->part);
        claim = (probe ? kvs_index_claim_old
                       : kvs_index_claim)(server->index, put->schema, item->part, &value->digest,
                                          put->durable, &item->value, &item->slot);
    }
    if (claim == KVS_CLAIM_MINE) {
        take_new(put, i, at);
        return;
    }
    if (!probe)
        cursor_read(at, NULL, value->len_bytes);
    if (claim == KVS_CLAIM_WRITE) {
        item->kind = ITEM_OLD;
        item->rows = server->dram.ops->map(server->dram.tier, item->slot);
    } else if (claim == KVS_CLAIM_SYNC) {
        item->kind = ITEM_SYNC;
        put->wants_sync = true;
    } else {
        settle(put, i,
               claim == KVS_CLAIM_EXISTS   ? KVC_EXISTS
               : claim == KVS_CLAIM_ABSENT ? KVC_NOT_FOUND
                                           : KVC_AGAIN);
    }
}

/* ---- writes ---------------------------------------------------------------------------------- */

/* The write of an item ended, one way or the other. */
static void written(kvs_put *put, uint32_t i, kvc_status status, kvs_slot lmdb)
{
    kvs_server *server = put->server;
    put_item *item = &put->items[i];
    free(item->copy);
    free(item->sums);
    item->copy = NULL;
    item->sums = NULL;
    if (item->kind == ITEM_OLD) {
        kvs_index_wrote(server->index, item->value, status == KVC_OK, lmdb, true);
        settle(put, i, status == KVC_OK ? KVC_EXISTS : status);
        return;
    }
    bool in_dram = item->kind == ITEM_BOTH;
    if (status == KVC_OK) {
        kvs_index_publish_lmdb(server->index, item->value, lmdb, put->durable,
                               in_dram ? &item->slot : NULL);
    } else {
        kvs_value_key key;
        kvs_index_key(server->index, item->value, &key);
        if (in_dram)
            server->dram.ops->release(server->dram.tier, &key, item->slot);
        kvs_index_abandon(server->index, item->value);
    }
    settle(put, i, status);
}

static void release_one(kvs_put *put)
{
    if (atomic_fetch_sub(&put->n_pending, 1) == 1) {
        put->state = put->wants_sync ? PUT_SYNC : PUT_REPLY;
        process(put);
    }
}

static void job_done(kvs_write_job *job)
{
    put_item *item = job->arg;
    kvs_put *put = item->put;
    written(put, (uint32_t)(item - put->items), job->write.status, job->write.slot);
    free(job);
    release_one(put);
}

static bool needs_write(const put_item *item)
{
    return item->kind == ITEM_BOTH || item->kind == ITEM_THROUGH || item->kind == ITEM_OLD;
}

/* Makes the jobs first, so that running out of memory is seen before any is out. */
static void make_jobs(kvs_put *put)
{
    for (uint32_t i = 0; i < put->n; i++) {
        put_item *item = &put->items[i];
        if (!needs_write(item))
            continue;
        kvs_write_job *job = calloc(1, sizeof(*job));
        if (!job) {
            written(put, i, KVC_AGAIN, (kvs_slot){0, 0});
            continue;
        }
        kvs_index_key(put->server->index, item->value, &job->write.key);
        job->write.row_bytes = kvs_part_at(put->schema, item->part)->row_bytes;
        job->write.n_rows = kvs_part_at(put->schema, item->part)->n_rows;
        job->write.rows = item->rows;
        job->write.durable = put->durable;
        job->sums = item->sums;
        item->sums = NULL;
        job->cls = kvs_part_at(put->schema, item->part)->cls;
        job->deadline_ns = put->call->deadline_ns;
        job->done = job_done;
        job->arg = item;
        item->job = job;
        put->n_jobs++;
    }
}

static void submit_jobs(kvs_put *put)
{
    atomic_store(&put->n_pending, put->n_jobs + 1);
    for (uint32_t i = 0; i < put->n; i++)
        if (put->items[i].job)
            kvs_writer_submit(put->server->writer, put->items[i].job);
    release_one(put);
}

/* ---- sync ------------------------------------------------------------------------------------ */

/* The slots of the items that wait, in their order; returns how many. */
static uint32_t sync_slots(const kvs_put *put, kvs_slot *slots)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < put->n; i++)
        if (put->items[i].kind == ITEM_SYNC)
            slots[n++] = put->items[i].slot;
    return n;
}

/* results: of the items that wait, in their order; NULL: status for all of them. */
static void sync_finish(kvs_put *put, const int8_t *results, kvc_status status)
{
    for (uint32_t i = 0; i < put->n; i++) {
        if (put->items[i].kind != ITEM_SYNC)
            continue;
        if (results)
            status = (kvc_status)*results++;
        kvs_index_synced(put->server->index, put->items[i].value, status == KVC_OK);
        settle(put, i, status == KVC_OK ? KVC_EXISTS : status);
    }
    put->state = PUT_REPLY;
    process(put);
}

static void sync_run(kvs_job *job)
{
    kvs_put *put = (kvs_put *)job;
    kvs_store *lmdb = &put->server->lmdb;
    kvc_status gone = kvs_given_up(put->call);
    if (gone != KVC_OK) {
        sync_finish(put, NULL, gone);
        return;
    }
    kvs_slot *slots = malloc(put->n * sizeof(*slots));
    int8_t *results = malloc(put->n);
    if (slots && results)
        (void)lmdb->ops->sync(lmdb->tier, slots, sync_slots(put, slots), results);
    sync_finish(put, slots ? results : NULL, KVC_AGAIN);
    free(results);
    free(slots);
}

/* ---- the request ----------------------------------------------------------------------------- */

/* Nobody needs the request's bytes while its values wait for their commit, unless one goes to lmdb
   straight from them. */
static void drop_bytes(kvs_put *put)
{
    for (uint32_t i = 0; i < put->n; i++)
        if (put->items[i].kind == ITEM_THROUGH && !put->items[i].copy)
            return;
    kvt_call_drop_data(put->call);
}

static void take_all(kvs_put *put)
{
    cursor at = {.iov = put->call->req.data, .n = put->call->req.n_data};
    for (uint32_t i = 0; i < put->n; i++)
        take(put, i, &at);
    make_jobs(put);
    if (put->n_jobs || put->wants_sync)
        drop_bytes(put);
    if (put->n_jobs)
        put->state = PUT_WRITE;
    else
        put->state = put->wants_sync ? PUT_SYNC : PUT_REPLY;
}

static void answer(kvs_put *put)
{
    kvc_reply reply = {.method = KVC_PUT_BLOCKS};
    reply.u.put_blocks.n_values = put->n;
    reply.u.put_blocks.status = put->status;
    kvs_answer(put->call, &reply, NULL, 0);
}

/* One step per state; returns where another thread goes on. put may be gone afterwards. */
static void process(kvs_put *put)
{
    for (;;) {
        switch (put->state) {
        case PUT_CHECK:
            put->state = kvs_put_check_values(put->call, put->schema) ? PUT_TAKE : PUT_DONE;
            break;
        case PUT_TAKE:
            take_all(put);
            break;
        case PUT_WRITE:
            submit_jobs(put);
            return;
        case PUT_SYNC:
            put->job.run = sync_run;
            kvc_status status = kvs_disk_submit(put->server->disk, &put->job);
            if (status != KVC_OK)
                sync_finish(put, NULL, KVC_AGAIN);
            return;
        case PUT_REPLY:
            answer(put);
            put->state = PUT_DONE;
            break;
        case PUT_DONE:
            free(put);
            return;
        }
    }
}

void kvs_on_put_blocks(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    const kvs_schema *schema = kvs_put_check_call(server, call, tenant);
    if (!schema)
        return;
    uint32_t n = call->req.u.put_blocks.n_values;
    kvs_put *put = calloc(1, sizeof(*put) + n * sizeof(put_item));
    int8_t *status = kvc_arena_calloc(&call->arena, n ? n : 1, sizeof(*status));
    if (!put || !status) {
        free(put);
        kvs_fail(call, KVC_NO_MEMORY, "no memory for %u values", n);
        return;
    }
    put->server = server;
    put->call = call;
    put->schema = schema;
    put->n = n;
    put->status = status;
    put->durable = call->req.u.put_blocks.promise == KVC_PROMISE_DURABLE;
    process(put);
}
