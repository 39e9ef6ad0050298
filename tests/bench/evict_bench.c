/*
 * evict_bench.c: the hit ratio of each eviction policy on each trace, beside Belady's bound.
 *
 * Deterministic: the same seed gives the same table on every machine. Ends with 1 where a number
 * cannot be: a policy above the bound, or cachesvc further from the best one than it may be.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "evict_policy.h"

enum { READS = 600000, QUICK_READS = 60000, SIZES = 3 };

static const double shares[SIZES] = {0.01, 0.05, 0.2}; /* of all keys of the trace */

typedef struct totals {
    double share[EVICT_POLICIES]; /* of Belady's hits, summed over the lines */
    evict_result walks[EVICT_POLICIES];
    uint32_t n;
} totals;

static int line(const evict_trace *trace, double share, totals *all)
{
    evict_result results[EVICT_POLICIES];
    uint32_t capacity = (uint32_t)(share * trace->n_keys);
    int failed = 0;
    printf("| %-8s | %6u |", trace->name, capacity);
    for (int i = 0; i < EVICT_POLICIES; i++) {
        if (evict_policies[i].run(trace, capacity, &results[i])) {
            fprintf(stderr, "evict_bench: %s does not run\n", evict_policies[i].name);
            return 1;
        }
        printf(" %8.2f |", 100.0 * (double)results[i].hits / trace->n);
        failed |= results[i].hits > results[0].hits;
        all->share[i] += results[0].hits ? (double)results[i].hits / (double)results[0].hits : 1;
        all->walks[i].steps += results[i].steps;
        all->walks[i].n_evictions += results[i].n_evictions;
        if (results[i].most_steps > all->walks[i].most_steps)
            all->walks[i].most_steps = results[i].most_steps;
    }
    puts("");
    all->n++;
    if (failed)
        fputs("evict_bench: a policy is above the bound\n", stderr);
    return failed;
}

static void head(const char *first, const char *second)
{
    printf("| %-8s | %6s |", first, second);
    for (int i = 0; i < EVICT_POLICIES; i++)
        printf(" %8s |", evict_policies[i].name);
    printf("\n|---|---|");
    for (int i = 0; i < EVICT_POLICIES; i++)
        printf("---|");
    puts("");
}

static void print_walks(const totals *all)
{
    printf("\nvalues looked at for one that gives way (mean, most):\n");
    for (int i = 1; i < EVICT_POLICIES; i++)
        if (all->walks[i].steps)
            printf("  %-8s %6.2f %6llu\n", evict_policies[i].name,
                   (double)all->walks[i].steps / (double)all->walks[i].n_evictions,
                   (unsigned long long)all->walks[i].most_steps);
}

/* Over all lines, no textbook policy may be better than cachesvc by more than a point. */
static int judge(const totals *all)
{
    int failed = 0;
    for (int i = 1; i < EVICT_POLICIES; i++)
        if (all->share[i] > all->share[EVICT_OURS] + 0.01 * all->n) {
            fprintf(stderr, "evict_bench: %s is better than cachesvc\n", evict_policies[i].name);
            failed = 1;
        }
    return failed;
}

static int run(uint32_t n, uint64_t seed)
{
    totals all = {0};
    int failed = 0;
    printf("%u reads a trace, seed %llu; hit ratio in %%\n\n", n, (unsigned long long)seed);
    head("trace", "values");
    for (uint32_t i = 0; i < EVICT_TRACES && !failed; i++) {
        evict_trace trace;
        failed = evict_trace_make(i, n, seed, &trace);
        for (int s = 0; s < SIZES && !failed; s++)
            failed = line(&trace, shares[s], &all);
        evict_trace_free(&trace);
    }
    if (failed)
        return 1;
    printf("| %-8s | %6s |", "of bound", "");
    for (int i = 0; i < EVICT_POLICIES; i++)
        printf(" %8.2f |", 100 * all.share[i] / all.n);
    puts("");
    print_walks(&all);
    return judge(&all);
}

static const char usage[] = "Usage: evict_bench [--quick] [--reads N] [--seed N]\n"
                            "Prints the hit ratios of eviction policies on made-up traces.\n";

int main(int argc, char **argv)
{
    unsigned long n = READS, seed = 1;
    for (int i = 1; i < argc; i++) {
        char *end = NULL;
        if (strcmp(argv[i], "--help") == 0) {
            fputs(usage, stdout);
            return 0;
        }
        if (strcmp(argv[i], "--quick") == 0) {
            n = QUICK_READS;
            continue;
        }
        bool reads = strcmp(argv[i], "--reads") == 0, seeds = strcmp(argv[i], "--seed") == 0;
        unsigned long value = i + 1 < argc ? strtoul(argv[i + 1], &end, 10) : 0;
        if ((!reads && !seeds) || !end || *end || !value || value > 100000000) {
            fputs(usage, stderr);
            return 2;
        }
        *(reads ? &n : &seed) = value;
        i++;
    }
    return run((uint32_t)n, seed);
}
