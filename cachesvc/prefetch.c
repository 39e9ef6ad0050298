/*
 * prefetch.c: Prefetch.
 *
 * Runs on one disk thread at a time, or on the gpu's, and gives it back after every few loads, so
 * that others come in between. It only uses room that loses nothing: free, or of values that lmdb
 * has too; once a part found none, its other values stay where they are. Invariant: the context is
 * referenced until the answer, so its block ids stay valid.
 */
#include <stdlib.h>

#include "base/clock.h"
#include "base/metrics.h"
#include "cascade.h"
#include "gpu.h"
#include "request.h"

#define TURN_LOADS 8u    /* values loaded before the thread is given back */
#define TURN_LOOKS 1024u /* values looked at */
#define DRAM_PART  2u    /* of dram: the most that one call loads there */

typedef struct prefetch {
    kvs_job job; /* first */
    kvs_server *server;
    kvs_disk *pool; /* whose thread it runs on: the disk's, or the gpu's; NULL: the caller's */
    bool to_gpu;
    uint64_t max_bytes; /* of what it loads */
    kvt_call *call;
    kvs_context *context;     /* NULL: blocks by name */
    const kvs_schema *schema; /* kept by the context or the call */
    uint32_t *named;          /* [end] ids of blocks by name, which this keeps; else NULL */
    uint16_t *parts;          /* opaque: [KVC_MAX_PIECES] those of the block, filled as it comes */
    bool *full;               /* [the schema's n_parts] no room was found for one of this room */
    uint32_t n_parts, block, end, part;
    uint64_t there, moved, missing, left, moved_bytes;
} prefetch;

/* What it keeps from going away meanwhile. */
static void let_go(prefetch *p)
{
    if (p->context)
        kvs_context_put(p->server->contexts, p->context);
    if (p->named)
        kvs_index_drop_blocks(p->server->index, p->named, p->end);
}

/* Places in the schema's table, where those of pieces stand for their rooms. */
static bool *full_of(prefetch *p)
{
    uint32_t place = p->parts[p->part];
    return &p->full[p->schema->piece_bytes ? place % KVS_OPAQUE_CODES : place];
}

static void finish(prefetch *p, kvc_status status, const char *why)
{
    kvc_reply reply = {.method = KVC_PREFETCH};
    reply.u.prefetch.there = p->there;
    reply.u.prefetch.moved = p->moved;
    reply.u.prefetch.missing = p->missing;
    reply.u.prefetch.left = p->left;
    reply.u.prefetch.moved_bytes = p->moved_bytes;
    KVC_COUNT_N(prefetched_values, p->moved);
    let_go(p);
    if (p->pool)
        atomic_fetch_sub(&p->server->n_slow_jobs, 1);
    if (status == KVC_OK)
        kvs_answer(p->call, &reply, NULL, 0);
    else
        kvs_fail(p->call, status, "%s; %llu values were loaded", why, (unsigned long long)p->moved);
    free(p);
}

/* Copies a value to the gpu, by way of dram where only lmdb has it. EXISTS: somebody else does. */
static kvc_status to_gpu(prefetch *p, const kvs_read *read)
{
    kvs_server *server = p->server;
    uint32_t part = p->parts[p->part];
    kvs_slot dram;
    kvc_status status = KVC_OK;
    if (read->promote)
        status = kvs_cascade_load(server, p->schema, part, read->value, read->slot);
    if (status != KVC_OK)
        return status;
    if (!kvs_gpu_want(server->index, read->value, &dram))
        return KVC_EXISTS;
    return kvs_gpu_load(server, p->schema, part, read->value, dram);
}

/* Loads a value that is wanted, or counts it as left. */
static void load(prefetch *p, const kvs_part *info, const kvs_read *read)
{
    kvc_status status = p->to_gpu ? to_gpu(p, read)
                                  : kvs_cascade_load(p->server, p->schema, p->parts[p->part],
                                                     read->value, read->slot);
    if (status == KVC_OK) {
        p->moved++;
        p->moved_bytes += info->value_bytes;
    } else if (status == KVC_CORRUPT || status == KVC_NOT_FOUND) {
        p->missing++;
    } else {
        p->left++;
        *full_of(p) = *full_of(p) || status != KVC_EXISTS;
    }
}

/* Looks at one value; true: it was loaded, or an attempt was made. */
static bool visit(prefetch *p)
{
    kvs_server *server = p->server;
    const kvs_schema *schema = p->schema;
    const kvs_part *info = kvs_part_at(schema, p->parts[p->part]);
    bool may = !*full_of(p) && p->moved_bytes + info->value_bytes <= p->max_bytes;
    kvs_read read = {
        .block = p->context ? kvs_context_block(p->context, p->block) : p->named[p->block],
        .n_rows = 1,
    };
    kvs_index_ref(server->index, schema, p->parts[p->part], may ? 1 : 0,
                  atomic_load(&server->window), &read, 1);
    /* lmdb's with a copy in the gpu may still be worth loading to dram: not by this call. */
    if (p->to_gpu && read.gpu && read.promote) {
        kvs_index_loaded(server->index, read.value, NULL);
        read.promote = false;
    }
    bool there = p->to_gpu ? read.gpu : read.where == KVS_IN_DRAM;
    bool wanted = read.promote || (p->to_gpu && may && !there && read.where == KVS_IN_DRAM);
    p->missing += read.where == KVS_NOWHERE;
    p->there += there;
    p->left += read.where != KVS_NOWHERE && !there && !wanted;
    if (wanted)
        load(p, info, &read);
    if (read.where == KVS_IN_DRAM || read.where == KVS_IN_LMDB)
        kvs_index_unref(server->index, &read.value, 1);
    return wanted;
}

/* The pieces that an opaque value has now. None: it is missing. */
static void begin_value(prefetch *p)
{
    p->n_parts = kvs_index_pieces(p->server->index, p->schema,
                                  &p->call->req.u.prefetch.digests[p->block], p->parts);
    p->missing += p->n_parts == 0;
}

/* Works on for one turn. OK: all is done; AGAIN: there is more. */
static kvc_status turn(prefetch *p)
{
    uint32_t loads = 0, looks = 0;
    while (p->block < p->end) {
        if (loads == TURN_LOADS || looks == TURN_LOOKS)
            return KVC_AGAIN;
        if (p->part == 0 && p->schema->piece_bytes)
            begin_value(p);
        if (p->part == p->n_parts) {
            p->part = 0;
            p->block++;
            continue;
        }
        if (kvt_call_cancelled(p->call))
            return KVC_CANCELLED;
        if (kvc_expired(p->call->deadline_ns))
            return KVC_TIMED_OUT;
        loads += visit(p);
        looks++;
        p->part++;
    }
    return KVC_OK;
}

static void prefetch_run(kvs_job *job)
{
    prefetch *p = (prefetch *)job;
    kvc_status status;
    do {
        status = turn(p);
    } while (status == KVC_AGAIN && kvs_disk_submit(p->pool, &p->job) != KVC_OK);
    if (status != KVC_AGAIN)
        finish(p, status, "nobody waited any more");
}

/* Without a slower tier there is nothing to load, only to count. */
static void start(prefetch *p)
{
    kvs_server *server = p->server;
    kvc_status status = KVC_AGAIN;
    p->job.run = prefetch_run;
    if (!p->pool) {
        while (status == KVC_AGAIN)
            status = turn(p);
        finish(p, status, "nobody waited any more");
        return;
    }
    if (kvs_slow_job_begin(server)) {
        if (kvs_disk_submit(p->pool, &p->job) == KVC_OK)
            return;
        finish(p, status, "the threads for it have too much to do");
        return;
    }
    let_go(p);
    kvs_fail(p->call, status, "too many erases and prefetches at once");
    free(p);
}

/* The blocks of a context, or of a schema by name; false after kvs_fail. */
static bool choose_blocks(prefetch *p, const kvc_digest *tenant, uint32_t *have_p)
{
    kvt_call *call = p->call;
    kvs_server *server = p->server;
    uint32_t n = call->req.u.prefetch.n_digests;
    if (n == 0) {
        p->context = kvs_want_context(server, call, tenant, call->req.u.prefetch.context);
        p->schema = p->context ? p->context->schema : NULL;
        *have_p = p->context ? atomic_load(&p->context->n_blocks) : 0;
        return p->context != NULL;
    }
    *have_p = n;
    if (call->req.u.prefetch.context || n > server->limits.max_digests) {
        kvs_fail(call, KVC_INVALID, "either a context, or at most %u digests",
                 server->limits.max_digests);
        return false;
    }
    p->schema = kvs_want_schema(server, call, tenant, &call->req.u.prefetch.schema);
    return p->schema != NULL;
}

/* The range; false after kvs_fail. */
static bool choose_range(prefetch *p, uint32_t have)
{
    kvt_call *call = p->call;
    p->block = call->req.u.prefetch.first_block;
    p->to_gpu = call->req.u.prefetch.tier == KVC_TIER_GPU;
    if (call->req.u.prefetch.tier != KVC_TIER_DRAM && !(p->to_gpu && kvs_gpu_works(p->server))) {
        kvs_fail(call, KVC_UNSUPPORTED, "this server has no GPU: it prefetches to DRAM only");
        return false;
    }
    p->pool = p->to_gpu ? p->server->gpu_jobs : p->server->disk;
    p->max_bytes =
        p->to_gpu ? p->server->settings.gpu_bytes : p->server->settings.dram_bytes / DRAM_PART;
    if (p->block > have || call->req.u.prefetch.n_blocks > have - p->block) {
        kvs_fail(call, KVC_INVALID, "blocks %u and %u more; there are %u", p->block,
                 call->req.u.prefetch.n_blocks, have);
        return false;
    }
    p->end = call->req.u.prefetch.n_blocks ? p->block + call->req.u.prefetch.n_blocks : have;
    return true;
}

/* The parts, or room for the places of pieces; false after kvs_fail. */
static bool choose_parts(prefetch *p)
{
    kvt_call *call = p->call;
    uint32_t n = call->req.u.prefetch.n_parts;
    p->n_parts = n;
    if (p->schema->piece_bytes) {
        if (!kvs_no_parts(call, n))
            return false;
        p->parts = kvc_arena_calloc(&call->arena, KVC_MAX_PIECES, sizeof(*p->parts));
        if (!p->parts)
            kvs_fail(call, KVC_NO_MEMORY, "no memory for a list of pieces");
    } else {
        p->parts = n ? kvs_named_parts(call, p->schema, call->req.u.prefetch.parts, n)
                     : kvs_default_parts(call, p->schema, &p->n_parts);
    }
    if (!p->parts)
        return false;
    p->full = kvc_arena_calloc(&call->arena, p->schema->n_parts, sizeof(*p->full));
    if (!p->full)
        kvs_fail(call, KVC_NO_MEMORY, "no memory for the list of parts");
    return p->full != NULL;
}

/* Keeps the records of the blocks that the call names until the answer; false after kvs_fail. */
static bool keep_named(prefetch *p)
{
    kvt_call *call = p->call;
    if (p->context || p->end == 0)
        return true;
    uint32_t *named = kvc_arena_alloc(&call->arena, p->end * sizeof(*named));
    if (named && kvs_index_hold_blocks(p->server->index, p->schema, call->req.u.prefetch.digests,
                                       p->end, named) == KVC_OK) {
        p->named = named;
        return true;
    }
    kvs_fail(call, KVC_NO_MEMORY, "no memory for %u blocks", p->end);
    return false;
}

void kvs_on_prefetch(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    prefetch *p = calloc(1, sizeof(*p));
    uint32_t have;
    if (!p) {
        kvs_fail(call, KVC_NO_MEMORY, "no memory");
        return;
    }
    p->server = server;
    p->call = call;
    if (choose_blocks(p, tenant, &have) && choose_range(p, have) && choose_parts(p) &&
        keep_named(p)) {
        start(p);
        return;
    }
    let_go(p);
    free(p);
}
