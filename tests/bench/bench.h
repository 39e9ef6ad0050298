/*
 * bench.h: what every benchmark shares: repeated timing, median and spread, one table.
 */
#ifndef KVASIR_BENCH_H
#define KVASIR_BENCH_H

#include <stdbool.h>
#include <stdint.h>

#define BENCH_MAX_RUNS 64u

/* Figures of one row of the table, one per run. */
typedef struct bench_series {
    double value[BENCH_MAX_RUNS]; /* e.g. GB/s */
    uint32_t n;
} bench_series;

void bench_add(bench_series *series, double value);
/* Median, smallest and largest; 0 of an empty series. Sorts the series. */
double bench_median(bench_series *series);
double bench_min(bench_series *series);
double bench_max(bench_series *series);

/* "CPU model, N cores, kernel release" for the head of a table; static storage. */
const char *bench_machine(void);
/* CPU seconds that this process has used, its finished children's not. */
double bench_cpu_s(void);
/* CPU seconds that another process has used, from /proc; 0 where unknown. */
double bench_cpu_of_s(int pid);

#endif
