/*
 * evict_policy.h: orders in which values may give way, each as a cache of so many keys.
 *
 * Textbook forms of FIFO, LRU, SIEVE and S3-FIFO, the bound that knows the future (Belady), and
 * cachesvc itself: its index and evict.c, driven as the server drives them.
 */
#ifndef KVASIR_EVICT_POLICY_H
#define KVASIR_EVICT_POLICY_H

#include "evict_trace.h"

typedef struct evict_result {
    uint64_t hits;
    uint64_t n_evictions;
    uint64_t steps;      /* values looked at to find those that gave way */
    uint64_t most_steps; /* for one of them */
} evict_result;

typedef struct evict_policy {
    const char *name;
    /* Runs a trace through a cache of capacity keys. 0, or 1 where memory is out. */
    int (*run)(const evict_trace *trace, uint32_t capacity, evict_result *result_p);
} evict_policy;

enum { EVICT_POLICIES = 6, EVICT_OURS = 5 };
extern const evict_policy evict_policies[EVICT_POLICIES]; /* [0]: Belady; [EVICT_OURS]: cachesvc */

/* evict_ours.c */
int evict_run_ours(const evict_trace *trace, uint32_t capacity, evict_result *result_p);

#endif
