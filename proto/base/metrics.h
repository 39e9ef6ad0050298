/*
 * metrics.h: process-wide counters and gauges, one row each in metrics.def.
 *
 * Counting is one relaxed add on a cache line that few threads share; nothing is allocated or
 * locked. Any thread. A snapshot sums the shards and may miss adds that run at the same time.
 */
#ifndef KVC_BASE_METRICS_H
#define KVC_BASE_METRICS_H

#include <stdint.h>

typedef enum kvc_metric_kind { KVC_METRIC_COUNTER = 1, KVC_METRIC_GAUGE = 2 } kvc_metric_kind;

typedef enum kvc_metric {
#define X(name, kind, help) KVC_M_##name,
#include "base/metrics.def"
#undef X
    KVC_METRIC_COUNT
} kvc_metric;

typedef struct kvc_metric_value {
    const char *name; /* static */
    const char *help; /* static */
    kvc_metric_kind kind;
    uint64_t value; /* a gauge that went below zero reads 0 */
} kvc_metric_value;

void kvc_metric_add(kvc_metric metric, uint64_t n);
/* Gauges only (asserted). */
void kvc_metric_sub(kvc_metric metric, uint64_t n);
uint64_t kvc_metric_get(kvc_metric metric);
/* values [KVC_METRIC_COUNT], in table order. */
void kvc_metrics_snapshot(kvc_metric_value *values);
/* Which shard the calling thread adds to, for others that count in shards: small and stable. */
unsigned kvc_metric_shard(void);
/* Back to zero, for tests that count. */
void kvc_metrics_reset(void);

#define KVC_COUNT(name)        kvc_metric_add(KVC_M_##name, 1)
#define KVC_COUNT_N(name, n)   kvc_metric_add(KVC_M_##name, (uint64_t)(n))
#define KVC_GAUGE_ADD(name, n) kvc_metric_add(KVC_M_##name, (uint64_t)(n))
#define KVC_GAUGE_SUB(name, n) kvc_metric_sub(KVC_M_##name, (uint64_t)(n))

#endif
