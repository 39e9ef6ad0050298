/*
 * residency_trace.h: what the steps of a part picked, made up or recorded from a real model, for
 * residency_bench.
 *
 * A recorded trace is a file of record_picks.py: "kvpicks1", then as u32 (little-endian) its
 * layers, steps and positions; then for each layer, for each step, the number of picks, the first
 * one, and each one's distance from the one before (they ascend). These are LEB128: seven bits a
 * byte, the lowest first, all but a number's last byte with the highest bit set. Single-threaded.
 */
#ifndef TESTS_BENCH_RESIDENCY_TRACE_H
#define TESTS_BENCH_RESIDENCY_TRACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TRACE_NEVER UINT32_MAX

typedef struct picks_trace {
    uint32_t n_steps, n_positions;
    uint32_t k;      /* picks of the step that has most */
    uint32_t *first; /* [n_steps + 1] where a step's picks begin */
    uint32_t *picks; /* [first[n_steps]] */
    uint32_t *next;  /* [first[n_steps]] the step that picks it again, or TRACE_NEVER */
} picks_trace;

/*
 * k picks a step of n_positions: a share `keep` of those of the step before, a share `back` of the
 * others from the twelve steps before that, the rest by a skewed heat. The same every time.
 */
picks_trace trace_make_up(uint32_t n_steps, uint32_t k, uint32_t n_positions, double keep,
                          double back);

/* The layers of a recorded trace, *n_p of them; NULL, with a line on stderr, where it is none. */
picks_trace *trace_read(const char *path, uint32_t *n_p);
void trace_free(picks_trace *trace);

/* calloc that ends the program where there is no memory. */
void *trace_get(size_t n, size_t size);

#endif
