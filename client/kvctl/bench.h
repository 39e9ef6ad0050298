/*
 * bench.h: what kvctl bench moves, and how long it took.
 *
 * The blocks are made up, of a schema of their own, and erased at the end; other values of the
 * server may have to give way meanwhile.
 */
#ifndef KVCTL_BENCH_H
#define KVCTL_BENCH_H

#include "kvctl.h"

#define BENCH_MAX_RUNS 64u
#define BENCH_ROWS     2048u /* that one step of the default selectors picks */

typedef enum bench_case { BENCH_PUT = 0, BENCH_GET, BENCH_ROWS_CASE, BENCH_CASES } bench_case;

typedef struct bench_result {
    double bytes_per_s[BENCH_MAX_RUNS]; /* rising, once measured */
    uint32_t n_runs;
    uint64_t bytes, cpu_ns;        /* of all runs; the CPU is kvctl's own */
    uint64_t rows_dram, rows_lmdb; /* where they came from */
} bench_result;

/* What to move. */
typedef struct bench_plan {
    uint64_t value_bytes, row_bytes, n_values, n_runs;
    bool durable, keep;
} bench_plan;

typedef struct bench bench;

/* Registers the schema and fills memory; says what went wrong. NULL: failed. */
bench *bench_open(const kvctl_globals *globals, kvc_client *client, const bench_plan *plan);
/* Warms up once, then runs plan->n_runs times. False: said why. */
bool bench_measure(bench *b, bench_case which, bench_result *result_p);
/* Erases what was put, unless it is to be kept, and frees. False: it could not, and said why. */
bool bench_close(bench *b);

#endif
