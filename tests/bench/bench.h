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

/* One of those that move the same bytes in turn. */
typedef struct bench_entrant {
    const char *name;
    /* Moves bytes once; 0 on success, else it has said what failed. */
    int (*once)(void *ctx, double *bytes_p);
    void *ctx;
    int pid;      /* whose CPU counts beside ours; 0: nobody's */
    bool settles; /* work goes on after once: its CPU counts, its time does not */
    bool ours;    /* the one that the last column compares the others with */
    /* Before each turn, not timed; may change pid. NULL: nothing to do. */
    int (*prepare)(void *ctx, int *pid_p);
    void (*finish)(void *ctx); /* after each turn, likewise */
} bench_entrant;

/* The head of the table that bench_contest adds lines to. */
void bench_table_head(void);
/*
 * Runs every entrant once to warm up and then runs times, in turn, and prints a line for each. The
 * first is the floor: ratios are taken within a turn and their median is printed, to the floor and
 * of ours to each. unit_bytes: what the column "a second" counts. 0 on success.
 */
int bench_contest(const char *title, bench_entrant *entrants, uint32_t n, uint32_t runs,
                  uint32_t unit_bytes);

/* "CPU model, N cores, kernel release" for the head of a table; static storage. */
const char *bench_machine(void);
/* CPU seconds that this process has used, its finished children's not. */
double bench_cpu_s(void);
/* CPU seconds that another process has used; 0 where unknown. */
double bench_cpu_of_s(int pid);

void bench_remove_tree(const char *path); /* says so where it cannot */
uint64_t bench_random(uint64_t *state);   /* splitmix64 */

_Noreturn void bench_die(const char *what); /* with errno's text */

#endif
