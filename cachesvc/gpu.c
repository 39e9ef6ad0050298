/*
 * gpu.c: makes and evicts copies in the gpu tier; see gpu.h.
 *
 * Thread kvs-gpu-0, but for what any thread may call. Invariant: that thread alone writes to the
 * tier and evicts from it, so what it has emptied is empty until it writes again; a copy holds one
 * reference of its value from RAISING to kvs_gpu_raised.
 */
#include "gpu.h"

#include <stdio.h>
#include <stdlib.h>

#include "base/log.h"
#include "base/metrics.h"
#include "base/sum.h"
#include "base/text.h"
#include "cascade.h"

#define MAX_TRIES   64u /* at room for one value */
#define MAX_RAISING 64u
#define PAGE_BYTES  4096u

bool kvs_gpu_works(const kvs_server *server)
{
    return server->gpu.ops && atomic_load(&server->gpu_works);
}

/* A tier that has failed is left alone: what it had copies of goes on without them. */
static void look(kvs_server *server)
{
    kvs_tier_usage usage;
    server->gpu.ops->usage(server->gpu.tier, &usage);
    if (!usage.failed || !atomic_exchange(&server->gpu_works, false))
        return;
    kvs_gpu_on(server->index, false);
    KVC_LOG_ERROR(STORE, "the gpu tier failed: %llu values go on from dram and lmdb",
                  (unsigned long long)kvs_gpu_count(server->index));
}

void kvs_gpu_reap(kvs_server *server)
{
    const kvs_value_key no_key = {0};
    kvs_slot slot;
    while (server->gpu.ops && kvs_gpu_orphan(server->index, &slot))
        server->gpu.ops->release(server->gpu.tier, &no_key, slot);
}

/* ---- room ------------------------------------------------------------------------------------ */

static void release(kvs_server *server, const kvs_gpu_victim *victim)
{
    const kvs_value_key no_key = {0};
    if (victim->demote)
        kvs_cascade_demote(server, victim->value, victim->slot);
    server->gpu.ops->release(server->gpu.tier, &no_key, victim->slot);
    atomic_fetch_add(&server->gpu.evictions, 1);
}

static bool empty_segment(kvs_server *server, uint32_t cls)
{
    kvs_gpu_victim victim;
    uint32_t segment, cursor = 0;
    if (!kvs_gpu_find_segment(server->index, cls, &segment))
        return false;
    while (kvs_gpu_evict_from(server->index, segment, &cursor, &victim))
        release(server, &victim);
    return true;
}

/* Its own class first, as in dram (cascade.c). */
static bool make_room(kvs_server *server, uint32_t cls)
{
    kvs_gpu_victim victim;
    kvs_slot slot;
    if (kvs_gpu_orphan(server->index, &slot)) {
        server->gpu.ops->release(server->gpu.tier, &(kvs_value_key){0}, slot);
        return true;
    }
    if (kvs_gpu_starved(server->index, cls) && empty_segment(server, cls))
        return true;
    if (kvs_gpu_evict(server->index, cls, &victim)) {
        release(server, &victim);
        return true;
    }
    return empty_segment(server, cls);
}

/* ---- copies ---------------------------------------------------------------------------------- */

typedef struct waiter {
    kvc_mutex lock; /* rank LEAF; guards done */
    kvc_cond cond;
    bool done;
} waiter;

static void wake(kvs_tier_write *write)
{
    waiter *w = write->arg;
    kvc_mutex_lock(&w->lock);
    w->done = true;
    kvc_cond_signal(&w->cond);
    kvc_mutex_unlock(&w->lock);
}

static kvc_status write_once(kvs_server *server, kvs_tier_write *write)
{
    waiter w = {.done = false};
    kvc_mutex_init(&w.lock, KVC_RANK_LEAF);
    kvc_cond_init(&w.cond);
    write->done = wake;
    write->arg = &w;
    kvc_status status = server->gpu.ops->write(server->gpu.tier, write);
    if (status == KVC_OK) {
        kvc_mutex_lock(&w.lock);
        while (!w.done)
            kvc_cond_wait(&w.cond, &w.lock);
        kvc_mutex_unlock(&w.lock);
        status = write->status;
    }
    kvc_cond_fini(&w.cond);
    kvc_mutex_fini(&w.lock);
    return status;
}

static kvc_status copy(kvs_server *server, const kvs_part *info, uint32_t value, kvs_slot dram,
                       kvs_slot *slot_p)
{
    kvs_tier_write write = {.row_bytes = info->row_bytes, .n_rows = info->n_rows};
    uint32_t *sums = malloc(info->n_rows * sizeof(*sums));
    kvc_status status = sums ? KVC_AGAIN : KVC_NO_MEMORY;
    if (sums) {
        write.rows = server->dram.ops->map(server->dram.tier, dram);
        write.row_sums = sums;
        kvc_row_sums(write.rows, info->row_bytes, info->n_rows, sums);
        kvs_index_key(server->index, value, &write.key);
    }
    for (uint32_t i = 0; status == KVC_AGAIN && i < MAX_TRIES; i++) {
        if (i > 0 && !make_room(server, info->cls))
            break;
        status = write_once(server, &write);
    }
    free(sums);
    *slot_p = write.slot;
    return status;
}

kvc_status kvs_gpu_load(kvs_server *server, const kvs_schema *schema, uint32_t part, uint32_t value,
                        kvs_slot dram)
{
    const kvs_value_key no_key = {0};
    kvs_slot slot;
    kvc_status status = kvs_gpu_works(server)
                            ? copy(server, kvs_part_at(schema, part), value, dram, &slot)
                            : KVC_IO;
    if (kvs_gpu_raised(server->index, value, status == KVC_OK ? &slot : NULL))
        KVC_COUNT(gpu_raised_values);
    else if (status == KVC_OK)
        server->gpu.ops->release(server->gpu.tier, &no_key, slot);
    if (status != KVC_OK && status != KVC_AGAIN)
        look(server);
    return status;
}

typedef struct raising {
    kvs_job job; /* first */
    kvs_server *server;
    const kvs_schema *schema;
    uint32_t part, value;
    kvs_slot dram;
} raising;

static void raise_run(kvs_job *job)
{
    raising *r = (raising *)job;
    (void)kvs_gpu_load(r->server, r->schema, r->part, r->value, r->dram);
    atomic_fetch_sub(&r->server->n_raising, 1);
    free(r);
}

void kvs_gpu_raise(kvs_server *server, const kvs_schema *schema, uint32_t part,
                   const kvs_read *read)
{
    raising *r = NULL;
    if (atomic_fetch_add(&server->n_raising, 1) < MAX_RAISING)
        r = malloc(sizeof(*r));
    if (r) {
        *r = (raising){.job.run = raise_run,
                       .server = server,
                       .schema = schema,
                       .part = part,
                       .value = read->value,
                       .dram = read->slot};
        if (kvs_disk_submit(server->gpu_jobs, &r->job) == KVC_OK)
            return;
        free(r);
    }
    atomic_fetch_sub(&server->n_raising, 1);
    (void)kvs_gpu_raised(server->index, read->value, NULL);
}

kvc_status kvs_gpu_read(kvs_server *server, const kvs_read *read, uint32_t row_bytes,
                        uint32_t n_rows, const kvs_row_range *ranges, uint32_t n_ranges)
{
    kvs_value_key key;
    uint64_t rows = 0;
    if (!kvs_gpu_works(server))
        return KVC_IO;
    kvs_index_key(server->index, read->value, &key);
    kvc_status status = server->gpu.ops->read(server->gpu.tier, &key, read->gpu_slot, row_bytes,
                                              n_rows, ranges, n_ranges);
    if (status == KVC_CORRUPT && kvs_gpu_bad(server->index, read->value)) {
        KVC_LOG_WARN(STORE, "part %u of a block: its copy in the gpu is corrupt", key.part);
        KVC_COUNT(gpu_corrupt_values);
    }
    if (status != KVC_OK) {
        look(server);
        return status;
    }
    for (uint32_t i = 0; i < n_ranges; i++)
        rows += ranges[i].n;
    KVC_COUNT_N(rows_gpu, rows);
    atomic_fetch_add(&server->gpu.rows_read, rows);
    atomic_fetch_add(&server->gpu.bytes_read, rows * row_bytes);
    return KVC_OK;
}

/* ---- open and stop --------------------------------------------------------------------------- */

/* UNSUPPORTED: this build or machine has no such device. */
static kvc_status open_store(kvs_server *server)
{
    const kvs_settings *s = &server->settings;
    const kvs_tier_ops *ops = kvs_tier_find(s->gpu_fault ? "fault:gpu" : "gpu");
    char fault[512];
    (void)snprintf(fault, sizeof(fault), "gpu:%s", s->gpu_fault ? s->gpu_fault : "");
    kvs_tier_opts opts = {
        .size_bytes = sizeof(opts),
        .capacity_bytes = s->gpu_bytes,
        .max_value_bytes = (uint32_t)s->max_value_bytes + PAGE_BYTES, /* pieces' end records */
        .fault = s->gpu_fault ? fault : NULL,
        .device = (uint32_t)s->gpu_device,
    };
    kvc_status status = ops ? ops->open(&opts, &server->gpu.tier) : KVC_UNSUPPORTED;
    if (status == KVC_OK)
        server->gpu.ops = ops;
    return status;
}

kvc_status kvs_gpu_open(kvs_server *server)
{
    char size[KVC_TEXT_BYTES];
    const kvs_settings *s = &server->settings;
    if (!s->gpu_bytes)
        return KVC_OK;
    (void)kvc_bytes_short(s->gpu_bytes, size);
    kvc_status status = open_store(server);
    if (status != KVC_OK) {
        KVC_LOG_WARN(SERVER, "no gpu tier of %s on device %llu: %s", size,
                     (unsigned long long)s->gpu_device,
                     kvs_tier_find("gpu") ? kvc_status_name(status) : "built without CUDA");
        return KVC_OK;
    }
    status = kvs_disk_create("gpu", 1, &server->gpu_jobs);
    if (status != KVC_OK)
        return status;
    atomic_store(&server->gpu_works, true);
    kvs_gpu_on(server->index, true);
    KVC_LOG_INFO(SERVER, "tier gpu open: %s on device %llu", size,
                 (unsigned long long)s->gpu_device);
    return KVC_OK;
}

void kvs_gpu_stop(kvs_server *server)
{
    kvs_disk_destroy(server->gpu_jobs);
    server->gpu_jobs = NULL;
}
