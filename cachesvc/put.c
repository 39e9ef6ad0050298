/*
 * put.c: PutBlocks.
 *
 * Starts on a transport thread, which checks everything, claims each value and copies it to dram
 * (put_take.c); what finds no room there before a segment is emptied goes to the room thread for
 * that, whose turn it is once, and transports answer others meanwhile. A MEMORY value is visible
 * and done then. What must reach lmdb first (DURABLE, or no room in dram) goes to the writer, and
 * the last write answers. Two puts of one value at the same time: the second gets AGAIN for it, and
 * EXISTS once the first is visible. Invariant: a value that fails was never visible and leaves
 * nothing behind.
 */
#include <stdlib.h>

#include "put_check.h"
#include "put_take.h"

static void process(kvs_put *put);

/* ---- writes ---------------------------------------------------------------------------------- */

/* The write of an item ended, one way or the other. */
static void written(kvs_put *put, uint32_t i, kvc_status status, kvs_slot lmdb)
{
    kvs_server *server = put->server;
    kvs_put_item *item = &put->items[i];
    free(item->copy);
    free(item->sums);
    item->copy = NULL;
    item->sums = NULL;
    if (item->kind == KVS_ITEM_OLD) {
        kvs_index_wrote(server->index, item->value, status == KVC_OK, lmdb, true);
        kvs_put_settle(put, i, status == KVC_OK ? KVC_EXISTS : status);
        return;
    }
    bool in_dram = item->kind == KVS_ITEM_BOTH;
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
    kvs_put_settle(put, i, status);
}

static void release_one(kvs_put *put)
{
    if (atomic_fetch_sub(&put->n_pending, 1) == 1) {
        put->state = put->wants_sync ? KVS_PUT_SYNC : KVS_PUT_REPLY;
        process(put);
    }
}

static void job_done(kvs_write_job *job)
{
    kvs_put_item *item = job->arg;
    kvs_put *put = item->put;
    written(put, (uint32_t)(item - put->items), job->write.status, job->write.slot);
    free(job);
    release_one(put);
}

static bool needs_write(const kvs_put_item *item)
{
    return item->kind == KVS_ITEM_BOTH || item->kind == KVS_ITEM_THROUGH ||
           item->kind == KVS_ITEM_OLD;
}

/* Makes the jobs first, so that running out of memory is seen before any is out. */
static void make_jobs(kvs_put *put)
{
    for (uint32_t i = 0; i < put->n; i++) {
        kvs_put_item *item = &put->items[i];
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
        if (put->items[i].kind == KVS_ITEM_SYNC)
            slots[n++] = put->items[i].slot;
    return n;
}

/* results: of the items that wait, in their order; NULL: status for all of them. */
static void sync_finish(kvs_put *put, const int8_t *results, kvc_status status)
{
    for (uint32_t i = 0; i < put->n; i++) {
        if (put->items[i].kind != KVS_ITEM_SYNC)
            continue;
        if (results)
            status = (kvc_status)*results++;
        kvs_index_synced(put->server->index, put->items[i].value, status == KVC_OK);
        kvs_put_settle(put, i, status == KVC_OK ? KVC_EXISTS : status);
    }
    put->state = KVS_PUT_REPLY;
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
        if (put->items[i].kind == KVS_ITEM_THROUGH && !put->items[i].copy)
            return;
    kvt_call_drop_data(put->call);
}

static void take_all(kvs_put *put)
{
    kvs_put_take(put);
    if (put->room == KVS_ROOM_WANTED) {
        put->state = KVS_PUT_ROOM;
        return;
    }
    make_jobs(put);
    if (put->n_jobs || put->wants_sync)
        drop_bytes(put);
    if (put->n_jobs)
        put->state = KVS_PUT_WRITE;
    else
        put->state = put->wants_sync ? KVS_PUT_SYNC : KVS_PUT_REPLY;
}

static void room_run(kvs_job *job)
{
    kvs_put *put = (kvs_put *)job;
    kvc_status gone = kvs_given_up(put->call);
    for (uint32_t i = 0; gone != KVC_OK && i < put->n; i++)
        if (put->items[i].kind == KVS_ITEM_NEW)
            kvs_put_settle(put, i, gone);
    put->room = KVS_ROOM_EMPTY;
    put->state = KVS_PUT_TAKE;
    process(put);
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
        case KVS_PUT_CHECK:
            put->state = kvs_put_check_values(put->call, put->schema) ? KVS_PUT_TAKE : KVS_PUT_DONE;
            break;
        case KVS_PUT_TAKE:
            take_all(put);
            break;
        case KVS_PUT_ROOM:
            put->job.run = room_run;
            if (kvs_disk_submit(put->server->room_jobs, &put->job) == KVC_OK)
                return;
            put->room = KVS_ROOM_OWN;
            put->state = KVS_PUT_TAKE;
            break;
        case KVS_PUT_WRITE:
            submit_jobs(put);
            return;
        case KVS_PUT_SYNC:
            put->job.run = sync_run;
            if (kvs_disk_submit(put->server->disk, &put->job) != KVC_OK)
                sync_finish(put, NULL, KVC_AGAIN);
            return;
        case KVS_PUT_REPLY:
            answer(put);
            put->state = KVS_PUT_DONE;
            break;
        case KVS_PUT_DONE:
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
    kvs_put *put = calloc(1, sizeof(*put) + n * sizeof(kvs_put_item));
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
    for (uint32_t i = 0; i < n; i++)
        put->items[i].put = put;
    process(put);
}
