/*
 * histogram.c: durations in fixed buckets; see histogram.h.
 *
 * Any thread, relaxed atomics only. Invariant: each duration is in exactly one bucket of one shard,
 * that of the thread's metrics.
 */
#include "base/histogram.h"

#include "base/metrics.h"

const kvc_histogram_bound kvc_histogram_bounds[KVC_HISTOGRAM_BOUNDS] = {
    {50000, "0.00005"},  {100000, "0.0001"},  {250000, "0.00025"}, {500000, "0.0005"},
    {1000000, "0.001"},  {2500000, "0.0025"}, {5000000, "0.005"},  {10000000, "0.01"},
    {25000000, "0.025"}, {50000000, "0.05"},  {100000000, "0.1"},  {250000000, "0.25"},
    {1000000000, "1.0"}, {5000000000, "5.0"},
};

void kvc_histogram_add(kvc_histogram *histogram, uint64_t duration_ns)
{
    kvc_histogram_shard *shard =
        &histogram->shards[kvc_metric_shard() & (KVC_HISTOGRAM_SHARDS - 1)];
    uint32_t bucket = 0;
    while (bucket < KVC_HISTOGRAM_BOUNDS && duration_ns > kvc_histogram_bounds[bucket].ns)
        bucket++;
    atomic_fetch_add_explicit(&shard->counts[bucket], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&shard->sum_ns, duration_ns, memory_order_relaxed);
}

void kvc_histogram_read(const kvc_histogram *histogram, kvc_histogram_view *view_p)
{
    *view_p = (kvc_histogram_view){0};
    for (uint32_t bucket = 0; bucket <= KVC_HISTOGRAM_BOUNDS; bucket++) {
        for (uint32_t i = 0; i < KVC_HISTOGRAM_SHARDS; i++)
            view_p->count +=
                atomic_load_explicit(&histogram->shards[i].counts[bucket], memory_order_relaxed);
        if (bucket < KVC_HISTOGRAM_BOUNDS)
            view_p->below[bucket] = view_p->count;
    }
    for (uint32_t i = 0; i < KVC_HISTOGRAM_SHARDS; i++)
        view_p->sum_ns += atomic_load_explicit(&histogram->shards[i].sum_ns, memory_order_relaxed);
}
