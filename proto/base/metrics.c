/*
 * metrics.c: counters in shards; a thread always adds to the shard it got first.
 *
 * Any thread, relaxed atomics only. Invariant: the sum of one metric over the shards, modulo 2^64,
 * is its value; a single shard of a gauge may be "negative".
 */
#include "base/metrics.h"

#include <stdatomic.h>

#include "base/assert.h"

#define SHARDS      16 /* a power of two */
#define CACHE_BYTES 64

struct shard {
    _Alignas(CACHE_BYTES) atomic_uint_fast64_t values[KVC_METRIC_COUNT];
};

struct row {
    const char *name, *help;
    kvc_metric_kind kind;
};

static const struct row rows[KVC_METRIC_COUNT] = {
#define X(name, kind, help) {#name, help, kind},
#include "base/metrics.def"
#undef X
};

static struct shard shards[SHARDS];
static atomic_uint next_shard;
static _Thread_local unsigned own_shard; /* index + 1; 0 until the first add */

unsigned kvc_metric_shard(void)
{
    if (own_shard == 0)
        own_shard = atomic_fetch_add_explicit(&next_shard, 1, memory_order_relaxed) % SHARDS + 1;
    return own_shard - 1;
}

static atomic_uint_fast64_t *own_value(kvc_metric metric)
{
    KVC_ASSERT((unsigned)metric < KVC_METRIC_COUNT);
    return &shards[kvc_metric_shard()].values[metric];
}

void kvc_metric_add(kvc_metric metric, uint64_t n)
{
    atomic_fetch_add_explicit(own_value(metric), n, memory_order_relaxed);
}

void kvc_metric_sub(kvc_metric metric, uint64_t n)
{
    atomic_uint_fast64_t *value = own_value(metric);
    KVC_ASSERT(rows[metric].kind == KVC_METRIC_GAUGE);
    atomic_fetch_sub_explicit(value, n, memory_order_relaxed);
}

uint64_t kvc_metric_get(kvc_metric metric)
{
    KVC_ASSERT((unsigned)metric < KVC_METRIC_COUNT);
    uint64_t sum = 0;
    for (unsigned i = 0; i < SHARDS; i++)
        sum += atomic_load_explicit(&shards[i].values[metric], memory_order_relaxed);
    /* The shards are not read at one instant, so a gauge may seem to be below zero. */
    return rows[metric].kind == KVC_METRIC_GAUGE && (int64_t)sum < 0 ? 0 : sum;
}

void kvc_metrics_snapshot(kvc_metric_value *values)
{
    for (unsigned i = 0; i < KVC_METRIC_COUNT; i++)
        values[i] = (kvc_metric_value){
            .name = rows[i].name,
            .help = rows[i].help,
            .kind = rows[i].kind,
            .value = kvc_metric_get((kvc_metric)i),
        };
}

void kvc_metrics_reset(void)
{
    for (unsigned i = 0; i < SHARDS; i++) {
        for (unsigned m = 0; m < KVC_METRIC_COUNT; m++)
            atomic_store_explicit(&shards[i].values[m], 0, memory_order_relaxed);
    }
}
