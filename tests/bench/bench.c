/*
 * bench.c: timing helpers of the benchmarks. See bench.h.
 */
#include "bench.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

void bench_add(bench_series *series, double value)
{
    if (series->n < BENCH_MAX_RUNS) {
        series->value[series->n++] = value;
    }
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void sort(bench_series *series)
{
    qsort(series->value, series->n, sizeof series->value[0], compare);
}

double bench_median(bench_series *series)
{
    if (series->n == 0) {
        return 0;
    }
    sort(series);
    uint32_t half = series->n / 2;
    return series->n % 2 ? series->value[half]
                         : (series->value[half - 1] + series->value[half]) / 2;
}

double bench_min(bench_series *series)
{
    sort(series);
    return series->n == 0 ? 0 : series->value[0];
}

double bench_max(bench_series *series)
{
    sort(series);
    return series->n == 0 ? 0 : series->value[series->n - 1];
}

const char *bench_machine(void)
{
    static char text[256];
    char line[256], model[128] = "unknown CPU";
    FILE *stream = fopen("/proc/cpuinfo", "re");
    while (stream && fgets(line, sizeof line, stream)) {
        char *colon = strchr(line, ':');
        if (colon && strncmp(line, "model name", 10) == 0) {
            snprintf(model, sizeof model, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
            break;
        }
    }
    if (stream) {
        (void)fclose(stream);
    }
    struct utsname name;
    if (uname(&name) != 0) {
        name.release[0] = 0;
    }
    snprintf(text, sizeof text, "%s, %ld cores, Linux %s", model, sysconf(_SC_NPROCESSORS_ONLN),
             name.release);
    return text;
}

double bench_cpu_s(void)
{
    struct rusage usage;
    if (getrusage(RUSAGE_SELF, &usage) != 0) {
        return 0;
    }
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

double bench_cpu_of_s(int pid)
{
    clockid_t clock;
    struct timespec used;
    if (pid <= 0 || clock_getcpuclockid(pid, &clock) != 0 || clock_gettime(clock, &used) != 0) {
        return 0;
    }
    return (double)used.tv_sec + (double)used.tv_nsec / 1e9;
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *ftw)
{
    (void)st;
    (void)kind;
    (void)ftw;
    return remove(path);
}

void bench_remove_tree(const char *path)
{
    if (access(path, F_OK) == 0 && nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS) != 0)
        fprintf(stderr, "could not remove %s\n", path);
}

uint64_t bench_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9E3779B97F4A7C15));

    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

void bench_die(const char *what)
{
    perror(what);
    exit(1);
}
