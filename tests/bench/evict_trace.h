/*
 * evict_trace.h: made-up sequences of reads, the same for the same seed everywhere.
 *
 * A key is a value of the store; its first read stands for its put. Keys go from 0 up.
 */
#ifndef KVASIR_EVICT_TRACE_H
#define KVASIR_EVICT_TRACE_H

#include <stdint.h>

typedef struct evict_trace {
    const char *name;
    uint32_t *keys; /* [n] */
    uint32_t n, n_keys;
} evict_trace;

enum { EVICT_TRACES = 6 };

/* Makes the i-th trace of about n reads; gives 0, or 1 where memory is out. */
int evict_trace_make(uint32_t i, uint32_t n, uint64_t seed, evict_trace *trace_p);
void evict_trace_free(evict_trace *trace);

#endif
