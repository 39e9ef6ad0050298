/*
 * erase.c: Erase.
 *
 * With lmdb it runs on a disk thread and walks the blocks until nothing of them is left: values in
 * a put's, a write's or a reader's hands are met again in the next walk, and between walks the
 * thread is given back. Then lmdb is synced, and
 * only then is it answered. Without lmdb one walk on the transport thread is all, and what is left
 * is answered AGAIN. Invariant: what a walk has met is invisible from then on, however it ends.
 */
#include <stdlib.h>
#include <time.h>

#include "base/clock.h"
#include "base/metrics.h"
#include "cascade.h"
#include "maps.h"
#include "request.h"
#include "writer.h"

#define FIRST_PAUSE_NS 500000u
#define MAX_PAUSE_NS   20000000u
#define NAP_NS         500000u /* the most that a disk thread waits for the next walk in one turn */
#define CHECK_BLOCKS   64u     /* between looks at the clock */

typedef struct erase {
    kvs_job job; /* first */
    kvs_server *server;
    kvt_call *call;
    const kvs_schema *schema;
    kvs_context *context;  /* NULL: the request's digests */
    const uint16_t *parts; /* NULL: all that a block has */
    uint32_t n_parts, n_blocks;
    kvs_erased sum; /* pending: of the last walk */
    uint64_t next_walk_ns, pause_ns;
} erase;

static kvc_status given_up(const erase *e)
{
    if (kvt_call_cancelled(e->call))
        return KVC_CANCELLED;
    return kvc_expired(e->call->deadline_ns) ? KVC_TIMED_OUT : KVC_OK;
}

/* One walk; frees what nobody reads any more. */
static kvc_status walk(erase *e)
{
    kvs_index *index = e->server->index;
    e->sum.pending = 0;
    for (uint32_t i = 0; i < e->n_blocks; i++) {
        kvc_status status = i % CHECK_BLOCKS == 0 ? given_up(e) : KVC_OK;
        if (status != KVC_OK)
            return status;
        if (e->context)
            kvs_index_erase_block(index, kvs_context_block(e->context, i), e->parts, e->n_parts,
                                  &e->sum);
        else
            kvs_index_erase(index, e->schema, &e->call->req.u.erase.digests[i], e->parts,
                            e->n_parts, &e->sum);
    }
    if (e->sum.pending)
        kvs_maps_revoke_erased(e->server->maps);
    kvs_cascade_reap(e->server);
    return KVC_OK;
}

static void finish(erase *e, kvc_status status)
{
    KVC_COUNT_N(erased_values, e->sum.values);
    if (e->context)
        kvs_context_put(e->server->contexts, e->context);
    kvc_reply reply = {.method = KVC_ERASE};
    reply.u.erase.values = e->sum.values;
    reply.u.erase.bytes = e->sum.bytes;
    if (status == KVC_OK)
        kvs_answer(e->call, &reply, NULL, 0);
    else if (status == KVC_NO_MEMORY)
        kvs_fail(e->call, status, "no memory to sync the removal: repeat it");
    else if (status == KVC_IO)
        kvs_fail(e->call, status,
                 "lmdb could not sync the removal: values may be back at a restart");
    else
        kvs_fail(e->call, status,
                 "%llu values were still read or written when it ended; those that were met are "
                 "served no more: repeat it",
                 (unsigned long long)e->sum.pending);
    free(e);
}

/* One walk, or a nap where the next is not due. OK: a walk met nothing; AGAIN: there is more. */
static kvc_status turn(erase *e)
{
    uint64_t now_ns = kvc_now_ns();
    if (now_ns < e->next_walk_ns) {
        uint64_t nap_ns = e->next_walk_ns - now_ns;
        nanosleep(&(struct timespec){.tv_nsec = (long)(nap_ns < NAP_NS ? nap_ns : NAP_NS)}, NULL);
        return given_up(e) == KVC_OK ? KVC_AGAIN : given_up(e);
    }
    kvc_status status = walk(e);
    if (status != KVC_OK || e->sum.pending == 0)
        return status;
    kvs_writer_kick(e->server->writer);
    e->next_walk_ns = kvc_deadline_ns(e->pause_ns);
    if (e->pause_ns < MAX_PAUSE_NS)
        e->pause_ns *= 2;
    return KVC_AGAIN;
}

/* Syncs what the parts' releases touched, whoever made them: also those of an erase that failed. */
static kvc_status sync_parts(const erase *e)
{
    const kvs_store *lmdb = &e->server->lmdb;
    uint32_t n = e->parts ? e->n_parts : e->schema->n_parts;
    kvs_tier_shape *shapes = calloc(n + 1, sizeof(*shapes));
    if (!shapes)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        const kvs_part *part = &e->schema->parts[e->parts ? e->parts[i] : i];
        shapes[i] = (kvs_tier_shape){part->row_bytes, part->n_rows};
    }
    kvc_status status = lmdb->ops->sync_releases(lmdb->tier, shapes, n);
    free(shapes);
    return status;
}

/* Walks until a walk meets nothing. What it waits for may be queued behind it (a promotion has a
   reference until it ran), so it goes to the end of the queue after each turn. */
static void erase_run(kvs_job *job)
{
    erase *e = (erase *)job;
    kvs_server *server = e->server;
    kvc_status status;
    do {
        status = turn(e);
    } while (status == KVC_AGAIN && kvs_disk_submit(server->disk, &e->job) != KVC_OK);
    if (status == KVC_AGAIN)
        return;
    if (status == KVC_OK)
        status = sync_parts(e);
    atomic_fetch_sub(&server->n_slow_jobs, 1);
    finish(e, status);
}

/* Gives up before the first walk. */
static void drop(erase *e)
{
    if (e->context)
        kvs_context_put(e->server->contexts, e->context);
    free(e);
}

/* There is nobody to wait on: the second walk meets what the first freed no more. */
static void erase_here(erase *e)
{
    kvc_status status = walk(e);
    if (status == KVC_OK && e->sum.pending)
        status = walk(e);
    finish(e, status == KVC_OK && e->sum.pending ? KVC_AGAIN : status);
}

static void start(erase *e)
{
    kvs_server *server = e->server;
    if (!server->disk) {
        erase_here(e);
        return;
    }
    e->job.run = erase_run;
    e->pause_ns = FIRST_PAUSE_NS;
    if (!kvs_slow_job_begin(server)) {
        kvs_fail(e->call, KVC_AGAIN, "too many erases and prefetches at once");
        drop(e);
    } else if (kvs_disk_submit(server->disk, &e->job) != KVC_OK) {
        atomic_fetch_sub(&server->n_slow_jobs, 1);
        kvs_fail(e->call, KVC_AGAIN, "the disk threads have too much to do");
        drop(e);
    }
}

/* The parts to erase, all where none is named; false after kvs_fail. */
static bool choose_parts(erase *e)
{
    kvt_call *call = e->call;
    uint32_t n = call->req.u.erase.n_parts;
    if (e->schema->piece_bytes)
        return kvs_no_parts(call, n);
    if (n) {
        e->parts = kvs_named_parts(call, e->schema, call->req.u.erase.parts, n);
        e->n_parts = n;
        return e->parts != NULL;
    }
    return true;
}

/* What is named: a context's blocks, or digests of a schema; false after kvs_fail. */
static bool choose_blocks(erase *e, const kvc_digest *tenant)
{
    kvt_call *call = e->call;
    uint32_t n = call->req.u.erase.n_digests;
    if (call->req.u.erase.context) {
        e->context = kvs_want_context(e->server, call, tenant, call->req.u.erase.context);
        e->schema = e->context ? e->context->schema : NULL;
        e->n_blocks = e->context ? atomic_load(&e->context->n_blocks) : 0;
    } else if (n > e->server->limits.max_digests) {
        kvs_fail(call, KVC_INVALID, "%u digests; max_digests is %u", n,
                 e->server->limits.max_digests);
    } else {
        e->schema = kvs_want_schema(e->server, call, tenant, &call->req.u.erase.schema);
        e->n_blocks = n;
    }
    return e->schema != NULL;
}

void kvs_on_erase(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    erase *e = calloc(1, sizeof(*e));
    if (!e) {
        kvs_fail(call, KVC_NO_MEMORY, "no memory");
        return;
    }
    e->server = server;
    e->call = call;
    if (choose_blocks(e, tenant) && choose_parts(e)) {
        start(e);
        return;
    }
    drop(e);
}
