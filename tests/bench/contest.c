/*
 * contest.c: several ways to move the same bytes, in turn, so that what else the machine does hits
 * all of them; see bench.h.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "base/clock.h"
#include "bench.h"

#define SETTLE_STEP_NS 50000000
#define SETTLE_STEPS   200u
#define SETTLED_S      0.002 /* of CPU within a step: nothing but timers goes on */

typedef struct result {
    bench_series gbps, ratio, ours;
    double cpu_s, bytes;
} result;

void bench_table_head(void)
{
    printf("| case | who | GB/s | min-max | a second | of the floor | ours to it | CPU ns/KiB |\n"
           "|---|---|---|---|---|---|---|---|\n");
}

/* Until the process has hardly used the CPU for a while. */
static void settle(int pid)
{
    const struct timespec step = {.tv_nsec = SETTLE_STEP_NS};
    uint32_t quiet = 0;
    for (uint32_t i = 0; i < SETTLE_STEPS && quiet < 3; i++) {
        double before_s = bench_cpu_of_s(pid);
        (void)nanosleep(&step, NULL);
        quiet = bench_cpu_of_s(pid) - before_s < SETTLED_S ? quiet + 1 : 0;
    }
}

/* One turn; the GB/s, negative where it failed. */
static double turn(bench_entrant *entrant, double *cpu_s_p, double *bytes_p)
{
    if (entrant->prepare && entrant->prepare(entrant->ctx, &entrant->pid) != 0) {
        return -1;
    }
    double cpu_s = bench_cpu_s() + bench_cpu_of_s(entrant->pid);
    uint64_t start_ns = kvc_now_ns();
    if (entrant->once(entrant->ctx, bytes_p) != 0) {
        fprintf(stderr, "bench: %s failed\n", entrant->name);
        return -1;
    }
    double wall_ns = (double)(kvc_now_ns() - start_ns);
    if (entrant->settles) {
        settle(entrant->pid);
    }
    *cpu_s_p = bench_cpu_s() + bench_cpu_of_s(entrant->pid) - cpu_s;
    if (entrant->finish) {
        entrant->finish(entrant->ctx);
    }
    return *bytes_p / wall_ns;
}

static void print_line(const char *title, const bench_entrant *entrant, result *r,
                       uint32_t unit_bytes)
{
    double median = bench_median(&r->gbps), units = median * 1e9 / unit_bytes;
    char rate[32], ours[32] = "";
    snprintf(rate, sizeof rate, units >= 1e4 ? "%.0fk" : "%.1fk", units / 1e3);
    if (r->ours.n > 0) {
        snprintf(ours, sizeof ours, "%.2f", bench_median(&r->ours));
    }
    printf("| %-30s | %-24s | %6.3f | %.3f-%.3f | %7s | %5.2f | %5s | %5.0f |\n", title,
           entrant->name, median, bench_min(&r->gbps), bench_max(&r->gbps), rate,
           bench_median(&r->ratio), ours, r->cpu_s * 1e9 / (r->bytes / 1024));
}

/* Ours to each of the others of one turn. */
static void compare_turn(const bench_entrant *entrants, result *results, const double *gbps,
                         uint32_t n)
{
    for (uint32_t o = 0; o < n; o++) {
        for (uint32_t i = 0; i < n && entrants[o].ours; i++) {
            if (i != o) {
                bench_add(&results[i].ours, gbps[o] / gbps[i]);
            }
        }
    }
}

int bench_contest(const char *title, bench_entrant *entrants, uint32_t n, uint32_t runs,
                  uint32_t unit_bytes)
{
    result *results = calloc(n, sizeof *results);
    double *gbps = calloc(n, sizeof *gbps);
    int failed = results && gbps ? 0 : 1;
    for (uint32_t run = 0; run <= runs && !failed; run++) {
        for (uint32_t i = 0; i < n && !failed; i++) {
            double bytes = 0, cpu_s = 0;
            gbps[i] = turn(&entrants[i], &cpu_s, &bytes);
            failed = gbps[i] <= 0;
            if (run == 0 || failed) {
                continue; /* warm-up */
            }
            bench_add(&results[i].gbps, gbps[i]);
            bench_add(&results[i].ratio, gbps[i] / gbps[0]);
            results[i].cpu_s += cpu_s;
            results[i].bytes += bytes;
        }
        if (run > 0 && !failed) {
            compare_turn(entrants, results, gbps, n);
        }
    }
    for (uint32_t i = 0; i < n && !failed; i++) {
        print_line(title, &entrants[i], &results[i], unit_bytes);
    }
    (void)fflush(stdout);
    free(gbps);
    free(results);
    return failed;
}
