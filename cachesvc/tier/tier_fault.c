/*
 * tier_fault.c: wraps any tier and makes it fail or slow down by rule, for tests.
 *
 * opts.fault is "inner[:op=how,...]", for example "lmdb:write=every:3,read=after:10:CORRUPT" or
 * "dram:reserve=delay_us:50". op: open, release, reserve, commit, write, done, read, sync, recover,
 * meta_put. how: every:N (each N-th call), first:N, after:N (all but the first N), each with
 * :STATUS after it if the op's usual one will not do; or delay_us:N. release and commit can only be
 * delayed. An op takes one failing rule and one delay. "done" lets a write reach the inner tier,
 * takes the value out again and reports the failure. Counts are per tier and op, so a run repeats.
 *
 * Thread: any; rules are fixed after open, counters are atomic.
 */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/assert.h"
#include "base/log.h"
#include "tier_registry.h"

#define MAX_SPEC_BYTES 512u

typedef enum fault_op {
    OP_OPEN,
    OP_RELEASE,
    OP_RESERVE,
    OP_COMMIT,
    OP_WRITE,
    OP_DONE,
    OP_READ,
    OP_SYNC,
    OP_RECOVER,
    OP_META_PUT,
    N_OPS,
} fault_op;

static const struct {
    const char *name;
    kvc_status usual; /* OK: cannot fail */
} ops_known[N_OPS] = {
    [OP_OPEN] = {"open", KVC_IO},          [OP_RELEASE] = {"release", KVC_OK},
    [OP_RESERVE] = {"reserve", KVC_AGAIN}, [OP_COMMIT] = {"commit", KVC_OK},
    [OP_WRITE] = {"write", KVC_AGAIN},     [OP_DONE] = {"done", KVC_IO},
    [OP_READ] = {"read", KVC_IO},          [OP_SYNC] = {"sync", KVC_IO},
    [OP_RECOVER] = {"recover", KVC_IO},    [OP_META_PUT] = {"meta_put", KVC_IO},
};

typedef enum fault_mode { MODE_NEVER, MODE_EVERY, MODE_FIRST, MODE_AFTER } fault_mode;

typedef struct fault_rule {
    fault_mode mode;
    uint64_t n, delay_us;
    kvc_status status;
    atomic_ullong calls;
} fault_rule;

struct kvs_tier {
    const kvs_tier_ops *ops;
    kvs_tier *inner;
    fault_rule rules[N_OPS];
};

/* A write whose completion is to fail. */
typedef struct fault_write {
    kvs_tier_write write; /* what the inner tier sees */
    kvs_tier_write *outer;
    kvs_tier *tier;
    kvc_status status;
} fault_write;

/* --- rules --- */

static kvc_status parse_status(const char *text, kvc_status *status_p)
{
    for (int i = 1; i < KVC_STATUS_COUNT; i++) {
        if (strcmp(text, kvc_status_name((kvc_status)-i)) == 0) {
            *status_p = (kvc_status)-i;
            return KVC_OK;
        }
    }
    return KVC_INVALID;
}

static int find_op(const char *name)
{
    for (int i = 0; i < N_OPS; i++) {
        if (strcmp(name, ops_known[i].name) == 0)
            return i;
    }
    return -1;
}

/* "op=how:N[:STATUS]"; cuts text up. */
static kvc_status parse_rule(kvs_tier *tier, char *text)
{
    char *save = NULL, *end = NULL;
    const char *name = strtok_r(text, "=", &save);
    const char *how = strtok_r(NULL, ":", &save);
    const char *number = strtok_r(NULL, ":", &save);
    const char *status = strtok_r(NULL, ":", &save);
    int op = name != NULL ? find_op(name) : -1;

    if (op < 0 || how == NULL || number == NULL)
        return KVC_INVALID;
    fault_rule *rule = &tier->rules[op];
    uint64_t n = strtoull(number, &end, 10);
    if (*end != '\0')
        return KVC_INVALID;
    if (strcmp(how, "delay_us") == 0) {
        rule->delay_us = n;
        return KVC_OK;
    }
    rule->n = n;
    rule->mode = strcmp(how, "every") == 0   ? MODE_EVERY
                 : strcmp(how, "first") == 0 ? MODE_FIRST
                 : strcmp(how, "after") == 0 ? MODE_AFTER
                                             : MODE_NEVER;
    rule->status = ops_known[op].usual;
    if (rule->mode == MODE_NEVER || rule->status == KVC_OK || (rule->mode == MODE_EVERY && n == 0))
        return KVC_INVALID;
    return status != NULL ? parse_status(status, &rule->status) : KVC_OK;
}

/* Sleeps if the rule says so, then says whether this call fails and how. */
static kvc_status inject(kvs_tier *tier, fault_op op)
{
    fault_rule *rule = &tier->rules[op];
    uint64_t call = atomic_fetch_add(&rule->calls, 1) + 1;
    bool hit = (rule->mode == MODE_EVERY && call % rule->n == 0) ||
               (rule->mode == MODE_FIRST && call <= rule->n) ||
               (rule->mode == MODE_AFTER && call > rule->n);

    if (rule->delay_us > 0) {
        struct timespec t = {(time_t)(rule->delay_us / 1000000),
                             (long)(rule->delay_us % 1000000) * 1000};
        nanosleep(&t, NULL);
    }
    return hit ? rule->status : KVC_OK;
}

/* --- the table --- */

static kvc_status parse_spec(kvs_tier *tier, char *spec)
{
    char *save = NULL;
    char *rules = strchr(spec, ':');

    if (rules != NULL)
        *rules++ = '\0';
    tier->ops = kvs_tier_find(spec); /* never a fault tier: those have a ':' in their name */
    if (tier->ops == NULL)
        return KVC_INVALID;
    if (rules == NULL)
        return KVC_OK;
    for (char *rule = strtok_r(rules, ",", &save); rule != NULL;
         rule = strtok_r(NULL, ",", &save)) {
        if (parse_rule(tier, rule) != KVC_OK)
            return KVC_INVALID;
    }
    return KVC_OK;
}

static kvc_status fault_open(const kvs_tier_opts *opts, kvs_tier **tier_p)
{
    char spec[MAX_SPEC_BYTES];
    kvs_tier_opts inner_opts = *opts;

    *tier_p = NULL;
    if (opts->fault == NULL || strlen(opts->fault) >= sizeof(spec)) {
        KVC_LOG_ERROR(TIER, "fault: opts.fault must be inner[:op=how:n,...]");
        return KVC_INVALID;
    }
    kvs_tier *tier = calloc(1, sizeof(*tier));
    if (tier == NULL)
        return KVC_NO_MEMORY;
    snprintf(spec, sizeof(spec), "%s", opts->fault);
    kvc_status status = parse_spec(tier, spec);
    if (status != KVC_OK) {
        KVC_LOG_ERROR(TIER, "fault: cannot make sense of \"%s\"", opts->fault);
        goto err_free;
    }
    inner_opts.fault = NULL;
    status = inject(tier, OP_OPEN);
    if (status == KVC_OK)
        status = tier->ops->open(&inner_opts, &tier->inner);
    if (status != KVC_OK)
        goto err_free;
    *tier_p = tier;
    return KVC_OK;

err_free:
    free(tier);
    return status;
}

static void fault_close(kvs_tier *tier)
{
    if (tier == NULL)
        return;
    tier->ops->close(tier->inner);
    free(tier);
}

static void fault_usage(kvs_tier *tier, kvs_tier_usage *usage_p)
{
    tier->ops->usage(tier->inner, usage_p);
}

static void fault_release(kvs_tier *tier, const kvs_value_key *key, kvs_slot slot)
{
    (void)inject(tier, OP_RELEASE);
    tier->ops->release(tier->inner, key, slot);
}

static kvc_status fault_reserve(kvs_tier *tier, const kvs_value_key *key, uint32_t row_bytes,
                                uint32_t n_rows, uint32_t n, kvs_slot *slots, void **addrs)
{
    kvc_status status = inject(tier, OP_RESERVE);

    memset(slots, 0, n * sizeof(*slots));
    memset(addrs, 0, n * sizeof(*addrs));
    if (status != KVC_OK)
        return status;
    return tier->ops->reserve(tier->inner, key, row_bytes, n_rows, n, slots, addrs);
}

static void fault_commit(kvs_tier *tier, const kvs_slot *slots, uint32_t n)
{
    (void)inject(tier, OP_COMMIT);
    tier->ops->commit(tier->inner, slots, n);
}

static const void *fault_map(kvs_tier *tier, kvs_slot slot)
{
    return tier->ops->map(tier->inner, slot);
}

static uint32_t fault_segments(kvs_tier *tier, uint32_t *used, uint32_t max)
{
    return tier->ops->segments(tier->inner, used, max);
}

static uint32_t fault_close_segment(kvs_tier *tier, uint64_t a, uint32_t generation, bool yes)
{
    return tier->ops->close_segment(tier->inner, a, generation, yes);
}

static void failing_done(kvs_tier_write *write)
{
    fault_write *fault = write->arg;
    kvs_tier_write *outer = fault->outer;

    outer->status = write->status;
    if (write->status == KVC_OK) {
        fault->tier->ops->release(fault->tier->inner, &write->key, write->slot);
        outer->status = fault->status;
    }
    outer->slot = (kvs_slot){0, 0};
    free(fault);
    outer->done(outer);
}

static kvc_status fault_write_op(kvs_tier *tier, kvs_tier_write *write)
{
    kvc_status status = inject(tier, OP_WRITE);

    if (status != KVC_OK)
        return status;
    kvc_status late = inject(tier, OP_DONE);
    if (late == KVC_OK)
        return tier->ops->write(tier->inner, write);
    fault_write *fault = calloc(1, sizeof(*fault));
    if (fault == NULL)
        return KVC_AGAIN;
    *fault = (fault_write){.write = *write, .outer = write, .tier = tier, .status = late};
    fault->write.done = failing_done;
    fault->write.arg = fault;
    status = tier->ops->write(tier->inner, &fault->write);
    if (status != KVC_OK)
        free(fault);
    return status;
}

static kvc_status fault_read(kvs_tier *tier, const kvs_value_key *key, kvs_slot slot,
                             uint32_t row_bytes, uint32_t n_rows, const kvs_row_range *ranges,
                             uint32_t n_ranges)
{
    kvc_status status = inject(tier, OP_READ);

    if (status != KVC_OK)
        return status;
    return tier->ops->read(tier->inner, key, slot, row_bytes, n_rows, ranges, n_ranges);
}

static void fault_read_each(kvs_tier *tier, const kvs_tier_reads *reads)
{
    kvs_tier_read read;

    while (reads->next(reads->arg, &read)) {
        read.status = fault_read(tier, &read.key, read.slot, read.row_bytes, read.n_rows,
                                 read.ranges, read.n_ranges);
        reads->done(reads->arg, &read);
    }
}

static kvc_status fault_sync(kvs_tier *tier, const kvs_slot *slots, uint32_t n, int8_t *status_p)
{
    kvc_status status = inject(tier, OP_SYNC);

    if (status == KVC_OK)
        return tier->ops->sync(tier->inner, slots, n, status_p);
    for (uint32_t i = 0; status_p != NULL && i < n; i++)
        status_p[i] = (int8_t)status;
    return status;
}

static kvc_status fault_sync_releases(kvs_tier *tier, const kvs_tier_shape *shapes, uint32_t n)
{
    kvc_status status = inject(tier, OP_SYNC);

    return status == KVC_OK ? tier->ops->sync_releases(tier->inner, shapes, n) : status;
}

static bool fault_donor(kvs_tier *tier, const kvs_tier_shape *shape, uint32_t rank,
                        uint32_t *pages_p, uint64_t *bytes_p)
{
    return tier->ops->donor(tier->inner, shape, rank, pages_p, bytes_p);
}

static kvc_status fault_locate(kvs_tier *tier, kvs_slot slot, kvs_tier_place *place_p)
{
    return tier->ops->locate(tier->inner, slot, place_p);
}

static uint32_t fault_count_mapping(kvs_tier *tier, uint32_t segment, bool more,
                                    uint64_t *len_bytes_p)
{
    return tier->ops->count_mapping(tier->inner, segment, more, len_bytes_p);
}

static const void *fault_device_rows(kvs_tier *tier, kvs_slot slot)
{
    return tier->ops->device_rows(tier->inner, slot);
}

static kvc_status fault_recover(kvs_tier *tier, kvs_tier_found *found, void *arg)
{
    kvc_status status = inject(tier, OP_RECOVER);

    return status == KVC_OK ? tier->ops->recover(tier->inner, found, arg) : status;
}

static kvc_status fault_meta_put(kvs_tier *tier, const char *name, const void *data,
                                 size_t len_bytes)
{
    kvc_status status = inject(tier, OP_META_PUT);

    return status == KVC_OK ? tier->ops->meta_put(tier->inner, name, data, len_bytes) : status;
}

static kvc_status fault_meta_get(kvs_tier *tier, const char *name, void **data_p,
                                 size_t *len_bytes_p)
{
    return tier->ops->meta_get(tier->inner, name, data_p, len_bytes_p);
}

static kvc_status fault_meta_each(kvs_tier *tier, const char *prefix,
                                  bool (*each)(void *arg, const char *name, const void *data,
                                               size_t len_bytes),
                                  void *arg)
{
    return tier->ops->meta_each(tier->inner, prefix, each, arg);
}

void kvsi_fault_ops(const char *name, const kvs_tier_ops *inner, kvs_tier_ops *ops_p)
{
    bool addressable = inner->caps & KVS_TIER_ADDRESSABLE;
    bool blocking = inner->caps & KVS_TIER_BLOCKING;
    bool persistent = inner->caps & KVS_TIER_PERSISTENT;

    *ops_p = (kvs_tier_ops){
        .name = name,
        .caps = inner->caps,
        .open = fault_open,
        .close = fault_close,
        .usage = fault_usage,
        .release = fault_release,
        .reserve = addressable ? fault_reserve : NULL,
        .commit = addressable ? fault_commit : NULL,
        .map = addressable ? fault_map : NULL,
        .segments = addressable ? fault_segments : NULL,
        .close_segment = addressable ? fault_close_segment : NULL,
        .write = blocking ? fault_write_op : NULL,
        .read = blocking ? fault_read : NULL,
        .read_each = blocking ? fault_read_each : NULL,
        .sync = blocking ? fault_sync : NULL,
        .sync_releases = blocking ? fault_sync_releases : NULL,
        .donor = inner->donor != NULL ? fault_donor : NULL,
        .locate = inner->locate != NULL ? fault_locate : NULL,
        .count_mapping = inner->count_mapping != NULL ? fault_count_mapping : NULL,
        .device_rows = inner->device_rows != NULL ? fault_device_rows : NULL,
        .recover = persistent ? fault_recover : NULL,
        .meta_put = persistent ? fault_meta_put : NULL,
        .meta_get = persistent ? fault_meta_get : NULL,
        .meta_each = persistent ? fault_meta_each : NULL,
    };
}
