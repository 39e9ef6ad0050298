/*
 * writer.c: durable writes, write-through and write-behind; see writer.h.
 *
 * Thread kvs-writer; done runs on it or on a thread of the tier. Invariants: n_flying counts the
 * writes that the tier holds; a job is in the list, in the writer's hands, or in the tier, and its
 * done runs once in every case; at most KVS_BEHIND_JOBS dirty values are in the tier at once.
 */
#include "writer.h"

#include <stdlib.h>
#include <string.h>

#include "admission_record.h"
#include "base/assert.h"
#include "base/clock.h"
#include "base/metrics.h"
#include "base/sum.h"
#include "cascade.h"

#define KVS_BEHIND_JOBS 128u
#define MAX_FLYING      1024u /* writes in the tier, fewer than any tier queues */
#define MAX_TRIES       16u   /* of one value in a tier that turns out to be full */
#define MAX_ROOM_TRIES  64u   /* evictions for one value */

typedef struct behind_job {
    kvs_write_job job;
    uint32_t value;
    struct behind_job *next_free;
} behind_job;

struct kvs_writer {
    kvs_server *server;
    kvc_thread thread;
    kvc_mutex lock; /* rank QUEUE; guards all below but behind's contents */
    kvc_cond wake;  /* a job, a kick, a done, or the stop */
    kvs_write_job *head, *tail;
    behind_job *free_behind;
    uint32_t n_flying;
    bool kicked, stopping, flush;
    behind_job behind[KVS_BEHIND_JOBS];
};

static void push_locked(kvs_writer *writer, kvs_write_job *job)
{
    job->next = NULL;
    if (writer->tail)
        writer->tail->next = job;
    else
        writer->head = job;
    writer->tail = job;
}

static void job_finish(kvs_write_job *job, kvc_status status)
{
    free(job->sums);
    job->sums = NULL;
    job->write.status = status;
    job->done(job);
}

static void tier_done(kvs_tier_write *write)
{
    kvs_write_job *job = write->arg;
    kvs_writer *writer = job->writer;
    bool again = write->status == KVC_AGAIN && ++job->tries < MAX_TRIES;
    if (!again)
        job_finish(job, write->status);
    kvc_mutex_lock(&writer->lock);
    if (again)
        push_locked(writer, job);
    writer->n_flying--;
    kvc_cond_signal(&writer->wake);
    kvc_mutex_unlock(&writer->lock);
}

static void behind_done(kvs_write_job *job)
{
    behind_job *behind = (behind_job *)job;
    kvs_writer *writer = job->writer;
    bool ok = job->write.status == KVC_OK;
    kvs_index_wrote(writer->server->index, behind->value, ok, job->write.slot, job->write.durable);
    if (ok)
        KVC_COUNT(written_behind_values);
    else
        atomic_fetch_add(&writer->server->unwritten_values, 1);
    kvc_mutex_lock(&writer->lock);
    behind->next_free = writer->free_behind;
    writer->free_behind = behind;
    kvc_mutex_unlock(&writer->lock);
}

/*
 * Hands one job to the tier. The tier's queue is never full, since fewer than it takes are flying;
 * so AGAIN means that its bytes are used up, and the room comes from values that the tier names.
 */
static kvc_status hand_over(kvs_writer *writer, kvs_write_job *job)
{
    kvs_server *server = writer->server;
    kvs_tier_shape shape = {job->write.row_bytes, job->write.n_rows};
    kvc_status status = KVC_AGAIN;
    if (job->tries > 0)
        kvs_cascade_lmdb_room(server, job->cls, &shape);
    for (uint32_t i = 0; status == KVC_AGAIN && i < MAX_ROOM_TRIES; i++) {
        status = server->lmdb.ops->write(server->lmdb.tier, &job->write);
        if (status == KVC_AGAIN && !kvs_cascade_lmdb_room(server, job->cls, &shape))
            break;
    }
    return status;
}

static void process(kvs_writer *writer, kvs_write_job *job)
{
    kvs_tier_write *write = &job->write;
    if (kvc_expired(job->deadline_ns)) {
        job_finish(job, KVC_TIMED_OUT);
        return;
    }
    if (!job->sums) {
        job->sums = malloc(write->n_rows * sizeof(*job->sums));
        if (!job->sums) {
            job_finish(job, KVC_NO_MEMORY);
            return;
        }
        kvc_row_sums(write->rows, write->row_bytes, write->n_rows, job->sums);
    }
    kvs_admission_save(writer->server, false);
    write->row_sums = job->sums;
    write->done = tier_done;
    write->arg = job;
    kvc_mutex_lock(&writer->lock);
    writer->n_flying++;
    kvc_mutex_unlock(&writer->lock);
    kvc_status status = hand_over(writer, job);
    if (status == KVC_OK)
        return;
    kvc_mutex_lock(&writer->lock);
    writer->n_flying--;
    kvc_mutex_unlock(&writer->lock);
    job_finish(job, status);
}

/* False: the day's budget is spent, and the value stays where it is, free to give way. */
static bool admit(kvs_server *server, uint32_t value, uint64_t len_bytes)
{
    if (kvs_admission_take(&server->admission, len_bytes, kvc_now_ns()))
        return true;
    kvs_index_wrote(server->index, value, false, (kvs_slot){0, 0}, false);
    return false;
}

/* Makes a job of the oldest dirty value that may be written. The value is WRITING, so its dram slot
 * stays. */
static bool behind_fill(kvs_writer *writer, behind_job *behind)
{
    kvs_server *server = writer->server;
    kvs_slot slot;
    uint32_t part, *sums;
    const kvs_schema *schema;
    for (;;) {
        behind->value = kvs_index_next_dirty(server->index, &slot, &sums);
        if (behind->value == KVS_NIL)
            return false;
        schema = kvs_index_schema(server->index, behind->value, &part);
        if (admit(server, behind->value, kvs_part_at(schema, part)->value_bytes))
            break;
        free(sums);
    }
    kvs_write_job *job = &behind->job;
    memset(job, 0, sizeof(*job));
    kvs_index_key(server->index, behind->value, &job->write.key);
    job->write.row_bytes = kvs_part_at(schema, part)->row_bytes;
    job->write.n_rows = kvs_part_at(schema, part)->n_rows;
    job->write.rows = server->dram.ops->map(server->dram.tier, slot);
    job->cls = kvs_part_at(schema, part)->cls;
    job->sums = sums;
    job->done = behind_done;
    job->writer = writer;
    return true;
}

/* The next job, or NULL; *behind_p: a free record to look for a dirty value with. */
static kvs_write_job *next_job(kvs_writer *writer, behind_job **behind_p)
{
    kvs_write_job *job = writer->n_flying < MAX_FLYING ? writer->head : NULL;
    *behind_p = NULL;
    if (job) {
        writer->head = job->next;
        if (!writer->head)
            writer->tail = NULL;
        return job;
    }
    if (writer->kicked && writer->free_behind && writer->n_flying < MAX_FLYING &&
        (!writer->stopping || writer->flush)) {
        *behind_p = writer->free_behind;
        writer->free_behind = (*behind_p)->next_free;
    }
    return NULL;
}

static void writer_main(void *arg)
{
    kvs_writer *writer = arg;
    kvc_mutex_lock(&writer->lock);
    for (;;) {
        behind_job *behind;
        kvs_write_job *job = next_job(writer, &behind);
        if (!job && !behind) {
            if (writer->stopping && !writer->n_flying && !writer->head)
                break;
            kvc_cond_wait(&writer->wake, &writer->lock);
            continue;
        }
        if (behind)
            writer->kicked = false;
        kvc_mutex_unlock(&writer->lock);
        bool filled = behind && behind_fill(writer, behind);
        if (job || filled)
            process(writer, job ? job : &behind->job);
        kvc_mutex_lock(&writer->lock);
        if (filled)
            writer->kicked = true; /* there may be more */
        if (behind && !filled) {
            behind->next_free = writer->free_behind;
            writer->free_behind = behind;
        }
    }
    kvc_mutex_unlock(&writer->lock);
}

kvc_status kvs_writer_create(kvs_server *server, kvs_writer **writer_p)
{
    *writer_p = NULL;
    kvs_writer *writer = calloc(1, sizeof(*writer));
    if (!writer)
        return KVC_NO_MEMORY;
    writer->server = server;
    kvc_mutex_init(&writer->lock, KVC_RANK_QUEUE);
    kvc_cond_init(&writer->wake);
    for (uint32_t i = 0; i < KVS_BEHIND_JOBS; i++) {
        writer->behind[i].next_free = writer->free_behind;
        writer->free_behind = &writer->behind[i];
    }
    kvc_status status = kvc_thread_start(&writer->thread, "kvs-writer", writer_main, writer);
    if (status != KVC_OK) {
        kvc_cond_fini(&writer->wake);
        kvc_mutex_fini(&writer->lock);
        free(writer);
        return status;
    }
    *writer_p = writer;
    return KVC_OK;
}

void kvs_writer_destroy(kvs_writer *writer, bool flush)
{
    if (!writer)
        return;
    kvc_mutex_lock(&writer->lock);
    writer->stopping = true;
    writer->flush = flush;
    kvc_cond_signal(&writer->wake);
    kvc_mutex_unlock(&writer->lock);
    kvc_thread_join(&writer->thread);
    KVC_ASSERT(!writer->head && !writer->n_flying);
    kvc_cond_fini(&writer->wake);
    kvc_mutex_fini(&writer->lock);
    free(writer);
}

void kvs_writer_submit(kvs_writer *writer, kvs_write_job *job)
{
    job->writer = writer;
    job->tries = 0;
    kvs_admission_spend(&writer->server->admission,
                        (uint64_t)job->write.row_bytes * job->write.n_rows, kvc_now_ns());
    kvc_mutex_lock(&writer->lock);
    push_locked(writer, job);
    kvc_cond_signal(&writer->wake);
    kvc_mutex_unlock(&writer->lock);
}

void kvs_writer_kick(kvs_writer *writer)
{
    kvc_mutex_lock(&writer->lock);
    writer->kicked = true;
    kvc_cond_signal(&writer->wake);
    kvc_mutex_unlock(&writer->lock);
}
