/*
 * histogram.h: how long things took, in fixed buckets, counted without locks.
 *
 * Adding is two relaxed adds on two cache lines that few threads share; any thread, also while
 * another reads. A reader may miss adds that run at the same time; the sum and the buckets may then
 * differ by those. All zero bytes are an empty histogram.
 */
#ifndef KVC_BASE_HISTOGRAM_H
#define KVC_BASE_HISTOGRAM_H

#include <stdatomic.h>
#include <stdint.h>

#define KVC_HISTOGRAM_BOUNDS 14u /* buckets with an upper bound; one more takes the rest */
#define KVC_HISTOGRAM_SHARDS 8u  /* a power of two */

/* An inclusive upper bound. */
typedef struct kvc_histogram_bound {
    uint64_t ns;
    const char *seconds; /* the same, as text */
} kvc_histogram_bound;

/* Rising, from 50 us to 5 s. */
extern const kvc_histogram_bound kvc_histogram_bounds[KVC_HISTOGRAM_BOUNDS];

typedef struct kvc_histogram_shard {
    atomic_uint_fast64_t counts[KVC_HISTOGRAM_BOUNDS + 1];
    atomic_uint_fast64_t sum_ns;
} kvc_histogram_shard;

typedef struct kvc_histogram {
    kvc_histogram_shard shards[KVC_HISTOGRAM_SHARDS];
} kvc_histogram;

/* What was added so far. */
typedef struct kvc_histogram_view {
    uint64_t below[KVC_HISTOGRAM_BOUNDS]; /* durations up to each bound */
    uint64_t count, sum_ns;
} kvc_histogram_view;

void kvc_histogram_add(kvc_histogram *histogram, uint64_t duration_ns);
void kvc_histogram_read(const kvc_histogram *histogram, kvc_histogram_view *view_p);

#endif
