/*
 * attend_gpu.c: which rows of AttendRows a GPU attends over, and what it needs for that.
 *
 * Any thread; kvs-pin-0 pins segments of dram. A GPU takes rows that it reaches: copies in the gpu
 * tier, and dram's segments once they are pinned. Rows count as reached only where all that a call
 * gives to it is worth the wait for it; the rest is the CPU's. Invariants: a value that a GPU reads
 * is referenced until the call has given its lane back; what only the GPU has is in lmdb too, so it
 * can be asked for again.
 */
#include <stdio.h>
#include <stdlib.h>

#include "attend.h"
#include "base/log.h"
#include "base/metrics.h"
#include "base/sum.h"
#include "base/text.h"
#include "gpu.h"
#include "tier/tier_dram.h"

/* ---- open and close -------------------------------------------------------------------------- */

/* Of dram, as much as there is of it and as whole segments can have; 0: none. */
static uint64_t dram_bytes_of(const kvs_settings *s, uint64_t segment_bytes)
{
    uint64_t bytes = s->attend_gpu_bytes < s->dram_bytes ? s->attend_gpu_bytes : s->dram_bytes;
    return bytes / segment_bytes * segment_bytes;
}

static void tell_of_gpu(const kvs_server *server, uint64_t bytes)
{
    char size[KVC_TEXT_BYTES], dram[KVC_TEXT_BYTES + 32] = "";
    if (bytes)
        (void)snprintf(dram, sizeof(dram), "%sup to %s of dram", server->gpu.ops ? " and " : "",
                       kvc_bytes_short(bytes, size));
    KVC_LOG_INFO(SERVER, "attention on GPU %llu: over %s%s",
                 (unsigned long long)server->settings.gpu_device,
                 server->gpu.ops ? "the gpu tier" : "", dram);
}

void kvs_attend_gpu_open(kvs_server *server)
{
    const kvs_settings *s = &server->settings;
    kvs_attender *attender = server->attender;
    const kvs_gpu_attend_ops *ops = kvs_gpu_attend_find();
    uint64_t segment_bytes = kvs_dram_segment_bytes(s->dram_bytes, s->max_value_bytes);
    uint64_t bytes = dram_bytes_of(s, segment_bytes);
    if (!s->attend_gpu_bytes)
        return;
    if (!bytes && !server->gpu.ops) {
        KVC_LOG_WARN(
            SERVER,
            "no attention on a GPU: there is no gpu tier (gpu_bytes), and attend_gpu_bytes "
            "is less than a segment of dram, which has %llu",
            (unsigned long long)segment_bytes);
        return;
    }
    kvc_status status =
        ops ? ops->open((uint32_t)s->gpu_device, s->attend_gpu_bytes, segment_bytes, &attender->gpu)
            : KVC_UNSUPPORTED;
    if (status == KVC_OK && kvs_disk_create("pin", 1, &attender->pins) != KVC_OK)
        KVC_LOG_WARN(SERVER, "no thread to pin dram with: the GPU attends over its tier alone");
    if (status != KVC_OK) {
        KVC_LOG_WARN(SERVER, "no attention on GPU %llu: %s", (unsigned long long)s->gpu_device,
                     ops ? kvc_status_name(status) : "built without CUDA");
        return;
    }
    attender->gpu_ops = ops;
    atomic_store(&attender->gpu_works, true);
    KVC_GAUGE_ADD(attend_gpu, 1);
    tell_of_gpu(server, attender->pins ? bytes : 0);
}

void kvs_attend_gpu_close(kvs_server *server)
{
    kvs_attender *attender = server->attender;
    kvs_disk_destroy(attender->pins);
    if (atomic_exchange(&attender->gpu_works, false))
        KVC_GAUGE_SUB(attend_gpu, 1);
    if (attender->gpu)
        attender->gpu_ops->close(attender->gpu);
}

/* ---- segments of dram ------------------------------------------------------------------------ */

/* Once is enough to know. */
static void gpu_lost(kvs_attender *attender)
{
    if (!atomic_exchange(&attender->gpu_works, false))
        return;
    KVC_GAUGE_SUB(attend_gpu, 1);
    KVC_LOG_ERROR(SERVER, "the GPU failed: the CPU attends until a restart");
}

typedef struct pinning {
    kvs_job job; /* first */
    kvs_server *server;
    uint32_t number, value; /* value: referenced, so that the segment stays */
} pinning;

static void pin_run(kvs_job *job)
{
    pinning *p = (pinning *)job;
    kvs_attender *attender = p->server->attender;
    if (attender->gpu_ops->settle(attender->gpu, p->number, atomic_load(&attender->gpu_works)) ==
        KVC_DEVICE) {
        KVC_COUNT(attend_gpu_failures);
        gpu_lost(attender);
    }
    kvs_index_unref(p->server->index, &p->value, 1);
    free(p);
}

static void pin(kvs_server *server, const kvs_read *read)
{
    kvs_attender *attender = server->attender;
    kvs_dram_segment segment;
    uint64_t off_bytes;
    if (!attender->pins ||
        kvs_dram_locate(server->dram.tier, read->slot, &segment, &off_bytes) != KVC_OK ||
        !attender->gpu_ops->claim(attender->gpu, segment.number, segment.base,
                                  (size_t)segment.len_bytes))
        return;
    pinning *p = malloc(sizeof(*p));
    bool held = p && kvs_index_ref_again(server->index, read->value);
    if (held) {
        *p = (pinning){
            .job.run = pin_run, .server = server, .number = segment.number, .value = read->value};
        if (kvs_disk_submit(attender->pins, &p->job) == KVC_OK)
            return;
        kvs_index_unref(server->index, &read->value, 1);
    }
    free(p);
    (void)!attender->gpu_ops->settle(attender->gpu, segment.number, false);
}

/* ---- which rows ------------------------------------------------------------------------------ */

static kvs_gpu_group shape_of(const kvs_attend_group *group)
{
    /* as attend_rows.c will say it; the device looks at NULL or not */
    static const int32_t position = 0;
    static const double frequency = 0;
    return (kvs_gpu_group){.attend = {.n_q = group->query->n_q,
                                      .n_q_heads = group->query->n_q_heads,
                                      .n_kv_heads = group->kv_heads,
                                      .head_dim = group->dim,
                                      .n_kv = group->n_picks,
                                      .k_off_bytes = group->k_off_bytes,
                                      .v_off_bytes = group->v_off_bytes,
                                      .dtype = group->dtype,
                                      .k_positions = group->ranks ? &position : NULL,
                                      .inv_freq = group->ranks ? &frequency : NULL,
                                      .scale = group->scale,
                                      .softcap = group->softcap},
                           .row_bytes = group->row_bytes};
}

/* A name for what a device may refuse; not 0. */
static uint64_t shape_name(const kvs_attend_group *group)
{
    const struct {
        uint64_t k_off_bytes, v_off_bytes;
        uint32_t n_q_heads, kv_heads, dim, row_bytes, dtype, several, ranks, rest;
    } shape = {group->k_off_bytes,
               group->v_off_bytes,
               group->query->n_q_heads,
               group->kv_heads,
               group->dim,
               group->row_bytes,
               group->dtype,
               group->query->n_q > 1,
               group->ranks != NULL,
               0};
    return kvc_seeded_sum(&shape, sizeof(shape), 0) | 1;
}

static bool is_refused(const kvs_attender *attender, const kvs_attend_group *group)
{
    bool found = false;
    if (atomic_load(&attender->n_refused) == 0)
        return false;
    uint64_t name = shape_name(group);
    for (uint32_t i = 0; !found && i < KVS_ATTEND_REFUSED; i++)
        found = atomic_load(&attender->refused[i]) == name;
    return found;
}

void kvs_attend_gpu_refused(kvs_attender *attender, const kvs_attend_group *group)
{
    if (is_refused(attender, group))
        return;
    uint32_t at = atomic_fetch_add(&attender->n_refused, 1) % KVS_ATTEND_REFUSED;
    atomic_store(&attender->refused[at], shape_name(group));
    KVC_LOG_WARN(SERVER,
                 "the GPU does not attend over groups of %u heads over %u of %u%s: the CPU does",
                 group->query->n_q_heads, group->kv_heads, group->dim,
                 group->query->n_q > 1 ? ", of several queries" : "");
}

static bool in_dram(const kvs_server *server, const kvs_read *read)
{
    /* a tier of tests that wraps another has no segments */
    return read->where == KVS_IN_DRAM && server->dram.ops == kvs_tier_find("dram");
}

static bool in_gpu(const kvs_server *server, const kvs_read *read)
{
    return read->gpu && server->gpu.ops->device_rows && kvs_gpu_works(server);
}

/* Calls visit for every value of the group that is here; gives the sum of what it says. */
static uint64_t each_read(kvs_attend *attend, const kvs_attend_group *group,
                          uint64_t (*visit)(kvs_attend *attend, uint32_t read))
{
    const kvs_fetch *fetch = &attend->fetch;
    uint64_t sum = 0;
    for (uint32_t p = group->first_pick; p < group->first_pick + group->n_picks; p++) {
        uint32_t read = fetch->pick_read[p];
        if (read != KVS_NO_READ && fetch->extra[read].first_pick == p &&
            fetch->extra[read].status == KVC_OK)
            sum += visit(attend, read);
    }
    return sum;
}

static uint64_t bytes_of(const kvs_fetch *fetch, uint32_t read)
{
    return (uint64_t)fetch->reads[read].n_rows * kvs_fetch_row_bytes(fetch, read);
}

/* Bytes that the GPU could have, its segment pinned. */
static uint64_t could(kvs_attend *attend, uint32_t read)
{
    const kvs_fetch *fetch = &attend->fetch;
    bool yes =
        in_gpu(fetch->server, &fetch->reads[read]) || in_dram(fetch->server, &fetch->reads[read]);
    return yes ? bytes_of(fetch, read) : 0;
}

/* Where the GPU has it now; the nearer place first. */
static uint64_t locate(kvs_attend *attend, uint32_t read)
{
    kvs_fetch *fetch = &attend->fetch;
    kvs_server *server = fetch->server;
    kvs_attender *attender = server->attender;
    const kvs_read *r = &fetch->reads[read];
    kvs_fetch_read *extra = &fetch->extra[read];
    if (in_gpu(server, r))
        extra->device = server->gpu.ops->device_rows(server->gpu.tier, r->gpu_slot);
    extra->hbm = extra->device != NULL;
    if (!extra->device && in_dram(server, r)) {
        bool may_claim;
        extra->device =
            attender->gpu_ops->find(attender->gpu, (uint32_t)r->slot.a, extra->base, &may_claim);
        if (may_claim)
            pin(server, r);
    }
    return extra->device ? bytes_of(fetch, read) : 0;
}

/* Nothing is the GPU's. lost: what is nowhere else is not to be had now, else it is read cold. */
static void forget(kvs_attend *attend, bool lost)
{
    kvs_fetch *fetch = &attend->fetch;
    for (uint32_t r = 0; r < fetch->n_reads; r++) {
        kvs_fetch_read *extra = &fetch->extra[r];
        if (extra->device && !extra->base && lost)
            extra->status = KVC_AGAIN;
        extra->device = NULL;
        extra->hbm = false;
    }
}

/* Which groups a lane has room for, in their order; no value is of two groups. */
static void fit(kvs_attend *attend)
{
    kvs_fetch *fetch = &attend->fetch;
    const kvs_attender *attender = fetch->server->attender;
    kvs_gpu_room left = attender->gpu_ops->lane_room, room;
    for (uint32_t g = 0; g < fetch->n_groups; g++) {
        kvs_attend_group *group = &attend->groups[g];
        kvs_gpu_group shape = shape_of(group);
        group->on_gpu = !is_refused(attender, group) &&
                        attender->gpu_ops->room(attender->gpu, &shape, &room) &&
                        room.in_bytes <= left.in_bytes && room.out_bytes <= left.out_bytes;
        if (group->on_gpu) {
            left.in_bytes -= room.in_bytes;
            left.out_bytes -= room.out_bytes;
        }
    }
}

/* The sum over all groups that the GPU may have, queries included. */
static uint64_t worth(kvs_attend *attend, uint64_t (*visit)(kvs_attend *attend, uint32_t read))
{
    uint64_t sum = 0;
    for (uint32_t g = 0; g < attend->fetch.n_groups; g++) {
        const kvs_attend_group *group = &attend->groups[g];
        if (group->on_gpu)
            sum += each_read(attend, group, visit) * group->query->n_q;
    }
    return sum;
}

void kvs_attend_gpu_choose(kvs_attend *attend)
{
    if (!atomic_load(&attend->fetch.server->attender->gpu_works))
        return;
    fit(attend);
    if (worth(attend, could) < KVS_ATTEND_GPU_BYTES)
        return;
    if (worth(attend, locate) < KVS_ATTEND_GPU_BYTES)
        forget(attend, false);
}

kvs_gpu_lane *kvs_attend_gpu_take(kvs_attend *attend)
{
    const kvs_fetch *fetch = &attend->fetch;
    const kvs_attender *attender = fetch->server->attender;
    bool any = false, must = false;
    for (uint32_t r = 0; r < fetch->n_reads && !must; r++) {
        any = any || fetch->extra[r].device;
        must = fetch->extra[r].device && !fetch->extra[r].base;
    }
    kvs_gpu_lane *lane = NULL;
    if (any && atomic_load(&attender->gpu_works))
        lane = attender->gpu_ops->take(attender->gpu, must, fetch->call->deadline_ns);
    if (any && !lane)
        forget(attend, true);
    return lane;
}

void kvs_attend_gpu_failed(kvs_attend *attend, kvc_status why)
{
    kvs_attender *attender = attend->fetch.server->attender;
    KVC_COUNT(attend_gpu_failures);
    forget(attend, true);
    if (why == KVC_DEVICE)
        gpu_lost(attender);
}

void kvs_attend_gpu_count(const kvs_attend *attend)
{
    const kvs_fetch *fetch = &attend->fetch;
    uint64_t rows = 0, hbm_rows = 0, hbm_bytes = 0;
    for (uint32_t r = 0; r < fetch->n_reads; r++) {
        if (!fetch->extra[r].device)
            continue;
        rows += fetch->reads[r].n_rows;
        hbm_rows += fetch->extra[r].hbm ? fetch->reads[r].n_rows : 0;
        hbm_bytes += fetch->extra[r].hbm ? bytes_of(fetch, r) : 0;
    }
    KVC_COUNT_N(rows_attended_gpu, rows);
    KVC_COUNT_N(rows_gpu, hbm_rows);
    atomic_fetch_add(&fetch->server->gpu.rows_read, hbm_rows);
    atomic_fetch_add(&fetch->server->gpu.bytes_read, hbm_bytes);
}
