/*
 * fetch.c: FetchRows.
 *
 * Starts on a transport thread. When every row is in dram (or missing) it is answered there: long
 * runs as slices of the dram tier, scattered rows gathered into one buffer. Rows that are only in
 * lmdb move the request to the disk threads, which share its reads; the last of them answers.
 * Invariant: each value read is referenced from the plan until its rows were copied, or until the
 * transport has released the slices that point at it.
 */
#include "fetch.h"

#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/metrics.h"

#define LENT_PART        4u /* of dram: the most that slices may point at */
#define READS_PER_WORKER 4u /* one disk thread for each so many values */

void kvs_fetch_fini(kvs_fetch *fetch)
{
    free(fetch->reads);
    free(fetch->extra);
    free(fetch->pick_read);
    free(fetch->pick_row);
    free(fetch->ranges);
    free(fetch->contexts);
}

static void fetch_free(kvs_fetch *fetch)
{
    kvs_fetch_fini(fetch);
    free(fetch);
}

void kvs_fetch_unref(kvs_fetch *fetch)
{
    uint32_t n = 0, values[256];
    for (uint32_t r = 0; r < fetch->n_reads; r++) {
        const kvs_read *read = &fetch->reads[r];
        if (read->where != KVS_IN_DRAM && read->where != KVS_IN_LMDB)
            continue;
        values[n++] = read->value;
        if (n == 256) {
            kvs_index_unref(fetch->server->index, values, n);
            n = 0;
        }
    }
    kvs_index_unref(fetch->server->index, values, n);
}

/* Fails the call and lets go of everything. */
static void give_up(kvs_fetch *fetch, kvc_status status, const char *why)
{
    if (fetch->buffer)
        kvs_buffer_release(fetch->buffer);
    kvs_fetch_unref(fetch);
    kvs_fail(fetch->call, status, "%s", why);
    fetch->state = KVS_FETCH_DONE;
}

void kvs_fetch_count(kvs_fetch *fetch)
{
    kvs_server *server = fetch->server;
    uint64_t bytes[2] = {0};
    for (uint32_t r = 0; r < fetch->n_reads; r++) {
        const kvs_read *read = &fetch->reads[r];
        bool dram = read->where == KVS_IN_DRAM && !fetch->extra[r].hbm;
        if (fetch->extra[r].status != KVC_OK)
            continue;
        *(dram        ? &fetch->rows_dram
          : read->gpu ? &fetch->rows_gpu
                      : &fetch->rows_lmdb) += read->n_rows;
        if (dram || !read->gpu) /* the gpu's are counted as they are read */
            bytes[dram] += (uint64_t)read->n_rows * kvs_fetch_row_bytes(fetch, r);
    }
    fetch->rows_missing = fetch->n_picks - fetch->rows_gpu - fetch->rows_dram - fetch->rows_lmdb;
    atomic_fetch_add(&server->dram.rows_read, fetch->rows_dram);
    atomic_fetch_add(&server->dram.bytes_read, bytes[true]);
    atomic_fetch_add(&server->lmdb.rows_read, fetch->rows_lmdb);
    atomic_fetch_add(&server->lmdb.bytes_read, bytes[false]);
    KVC_COUNT_N(rows_missing, fetch->rows_missing);
}

static bool fill_reply(kvs_fetch *fetch, kvc_reply *reply_p)
{
    memset(reply_p, 0, sizeof(*reply_p));
    reply_p->method = KVC_FETCH_ROWS;
    kvs_fetch_count(fetch);
    KVC_COUNT_N(rows_dram, fetch->rows_dram);
    KVC_COUNT_N(rows_lmdb, fetch->rows_lmdb);
    KVC_COUNT_N(row_bytes_sent, fetch->data_bytes);
    reply_p->u.fetch_rows.rows_gpu = fetch->rows_gpu;
    reply_p->u.fetch_rows.rows_dram = fetch->rows_dram;
    reply_p->u.fetch_rows.rows_lmdb = fetch->rows_lmdb;
    return kvs_gather_missing(fetch, &reply_p->u.fetch_rows.missing,
                              &reply_p->u.fetch_rows.n_missing);
}

/* ---- answers --------------------------------------------------------------------------------- */

static void slice_released(void *arg)
{
    kvs_fetch *fetch = arg;
    if (atomic_fetch_sub(&fetch->n_slices_out, 1) == 1) {
        atomic_fetch_sub(&fetch->server->lent_bytes, fetch->lent_bytes);
        kvs_fetch_unref(fetch);
        fetch_free(fetch);
    }
}

/* Answers with slices of the dram tier; fetch lives until the last of them is released. */
static void answer_slices(kvs_fetch *fetch, kvt_slice *slices, uint32_t n)
{
    kvc_reply reply;
    kvt_call *call = fetch->call;
    if (!fill_reply(fetch, &reply)) {
        atomic_fetch_sub(&fetch->server->lent_bytes, fetch->lent_bytes);
        give_up(fetch, KVC_NO_MEMORY, "no memory for the list of missing rows");
        fetch_free(fetch);
        return;
    }
    atomic_store(&fetch->n_slices_out, n);
    for (uint32_t i = 0; i < n; i++) {
        slices[i].release = slice_released;
        slices[i].arg = fetch;
    }
    kvs_answer(call, &reply, slices, n);
}

static void answer_buffer(kvs_fetch *fetch)
{
    kvc_reply reply;
    if (!fill_reply(fetch, &reply)) {
        give_up(fetch, KVC_NO_MEMORY, "no memory for the list of missing rows");
        return;
    }
    kvs_fetch_unref(fetch);
    kvt_slice slice = {.base = fetch->buffer ? fetch->buffer->bytes : NULL,
                       .len_bytes = fetch->data_bytes,
                       .release = kvs_buffer_release,
                       .arg = fetch->buffer};
    if (fetch->buffer && fetch->data_bytes == 0) {
        kvs_buffer_release(fetch->buffer);
        fetch->buffer = NULL;
    }
    kvs_answer(fetch->call, &reply, &slice, fetch->buffer ? 1 : 0);
    fetch->state = KVS_FETCH_DONE;
}

/* ---- rows in lmdb ---------------------------------------------------------------------------- */

static void worker_leaves(kvs_fetch *fetch)
{
    if (atomic_fetch_sub(&fetch->n_working, 1) == 1)
        fetch->resume(fetch);
}

static void worker_run(kvs_job *job)
{
    kvs_fetch *fetch = ((kvs_fetch_worker *)job)->fetch;
    kvs_gather_read(fetch);
    worker_leaves(fetch);
}

kvc_status kvs_fetch_read_cold(kvs_fetch *fetch)
{
    /* As many disk threads as there is work for. */
    uint32_t want = (fetch->n_lmdb + READS_PER_WORKER - 1) / READS_PER_WORKER;
    uint32_t max = kvs_disk_threads(fetch->server->disk);
    max = max < KVS_FETCH_WORKERS ? max : KVS_FETCH_WORKERS;
    want = want < max ? want : max;
    if (!kvs_gather_prepare(fetch))
        return KVC_AGAIN;
    atomic_store(&fetch->n_working, want);
    for (uint32_t i = 0; i < want; i++) {
        fetch->workers[i].job.run = worker_run;
        fetch->workers[i].fetch = fetch;
        if (kvs_disk_submit(fetch->server->disk, &fetch->workers[i].job) == KVC_OK)
            continue;
        if (i == 0)
            return KVC_AGAIN;
        /* Those that run share the work; the missing ones are counted out. */
        if (atomic_fetch_sub(&fetch->n_working, want - i) == want - i)
            fetch->resume(fetch);
        return KVC_OK;
    }
    return KVC_OK;
}

/* ---- the request ----------------------------------------------------------------------------- */

/*
 * Counts the values that slices would keep from giving way, since a peer that reads slowly keeps
 * them for long. False: a part of dram that large is lent already, so the rows are to be copied.
 */
static bool lend(kvs_fetch *fetch)
{
    kvs_server *server = fetch->server;
    uint64_t bytes = 0, most = server->settings.dram_bytes / LENT_PART;
    for (uint32_t r = 0; r < fetch->n_reads; r++)
        if (fetch->reads[r].where == KVS_IN_DRAM)
            bytes += fetch->extra[r].schema->parts[fetch->extra[r].part].value_bytes;
    if (atomic_fetch_add(&server->lent_bytes, bytes) + bytes > most) {
        atomic_fetch_sub(&server->lent_bytes, bytes);
        return false;
    }
    fetch->lent_bytes = bytes;
    return true;
}

/* Everything is in dram or missing. Returns true where the answer is out and fetch with it. */
static bool answer_from_dram(kvs_fetch *fetch)
{
    kvt_slice slices[KVT_MAX_SLICES];
    uint32_t n = kvs_gather_slices(fetch, slices);
    if (n == 0 || !lend(fetch))
        return false;
    answer_slices(fetch, slices, n);
    return true;
}

static void get_buffer(kvs_fetch *fetch)
{
    if (fetch->data_bytes) {
        kvs_buffers *pool = &fetch->server->buffers;
        uint32_t bytes = (uint32_t)fetch->data_bytes;
        kvc_status status = fetch->call->within
                                ? kvs_buffer_get_for_stream(pool, bytes, &fetch->buffer)
                                : kvs_buffer_get(pool, bytes, &fetch->buffer);
        if (status != KVC_OK) {
            give_up(fetch, KVC_AGAIN, "every reply buffer is in use");
            return;
        }
    }
    fetch->state = fetch->n_lmdb ? KVS_FETCH_READ : KVS_FETCH_COPY;
}

static void copy(kvs_fetch *fetch)
{
    kvc_status status = fetch->n_lmdb ? kvs_given_up(fetch->call) : KVC_OK;
    if (status != KVC_OK) {
        give_up(fetch, status, "nobody waited any more while rows were read from lmdb");
        return;
    }
    if (fetch->buffer)
        kvs_gather_copy(fetch);
    if (fetch->n_lmdb)
        kvs_gather_compact(fetch);
    fetch->state = KVS_FETCH_REPLY;
}

/* One step per state; returns where another thread goes on. fetch may be gone afterwards. */
static void process(kvs_fetch *fetch)
{
    for (;;) {
        switch (fetch->state) {
        case KVS_FETCH_PLAN:
            fetch->state = kvs_fetch_plan(fetch) == KVC_OK ? KVS_FETCH_PLACE : KVS_FETCH_DONE;
            break;
        case KVS_FETCH_PLACE:
            kvs_gather_place(fetch);
            if (!fetch->n_lmdb && answer_from_dram(fetch))
                return;
            get_buffer(fetch);
            break;
        case KVS_FETCH_READ:
            if (kvs_fetch_read_cold(fetch) == KVC_OK)
                return;
            give_up(fetch, KVC_AGAIN, "the disk threads have too much to do");
            break;
        case KVS_FETCH_COPY:
            copy(fetch);
            break;
        case KVS_FETCH_REPLY:
            answer_buffer(fetch);
            break;
        case KVS_FETCH_DONE:
            fetch_free(fetch);
            return;
        }
    }
}

static void resume(kvs_fetch *fetch)
{
    fetch->state = KVS_FETCH_COPY;
    process(fetch);
}

void kvs_on_fetch_rows(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    kvs_fetch *fetch = calloc(1, sizeof(*fetch));
    if (!fetch) {
        kvs_fail(call, KVC_NO_MEMORY, "no memory");
        return;
    }
    fetch->server = server;
    fetch->call = call;
    fetch->tenant = tenant;
    fetch->resume = resume;
    process(fetch);
}
