/*
 * exposition.c: the metrics as text; see exposition.h.
 *
 * Any thread. Invariants: every family has its HELP and TYPE lines right before its samples and
 * stands once; the buckets of a histogram rise, and the last one is its count.
 */
#include "exposition.h"

#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/metrics.h"
#include "base/text.h"

#define NS_PER_S 1000000000ull

typedef unsigned long long ull;

static void put_head(kvc_strbuf *out, const char *name, const char *type, const char *help)
{
    kvc_strbuf_putf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void put_number(kvc_strbuf *out, const char *name, const char *type, const char *help,
                       uint64_t value)
{
    put_head(out, name, type, help);
    kvc_strbuf_putf(out, "%s %llu\n", name, (ull)value);
}

static void put_seconds(kvc_strbuf *out, const char *name, const char *type, const char *help,
                        uint64_t ns)
{
    put_head(out, name, type, help);
    kvc_strbuf_putf(out, "%s %llu.%09llu\n", name, (ull)(ns / NS_PER_S), (ull)(ns % NS_PER_S));
}

static void put_counters(kvc_strbuf *out)
{
    kvc_metric_value values[KVC_METRIC_COUNT];
    char name[96];
    kvc_metrics_snapshot(values);
    for (uint32_t i = 0; i < KVC_METRIC_COUNT; i++) {
        bool counter = values[i].kind == KVC_METRIC_COUNTER;
        snprintf(name, sizeof(name), "kvasir_%s%s", values[i].name, counter ? "_total" : "");
        put_number(out, name, counter ? "counter" : "gauge", values[i].help, values[i].value);
    }
}

static void put_latency(kvc_strbuf *out, const kvc_histogram *latency)
{
    static const char name[] = "kvasir_request_duration_seconds";
    put_head(out, name, "histogram",
             "from the start of a request's handler to its answer; streams: to their end");
    for (uint32_t m = 0; m < KVC_METHOD_COUNT; m++) {
        const char *method = kvc_method_name((kvc_method)m);
        kvc_histogram_view view;
        kvc_histogram_read(&latency[m], &view);
        for (uint32_t i = 0; i < KVC_HISTOGRAM_BOUNDS; i++)
            kvc_strbuf_putf(out, "%s_bucket{method=\"%s\",le=\"%s\"} %llu\n", name, method,
                            kvc_histogram_bounds[i].seconds, (ull)view.below[i]);
        kvc_strbuf_putf(out, "%s_bucket{method=\"%s\",le=\"+Inf\"} %llu\n", name, method,
                        (ull)view.count);
        kvc_strbuf_putf(out, "%s_sum{method=\"%s\"} %llu.%09llu\n", name, method,
                        (ull)(view.sum_ns / NS_PER_S), (ull)(view.sum_ns % NS_PER_S));
        kvc_strbuf_putf(out, "%s_count{method=\"%s\"} %llu\n", name, method, (ull)view.count);
    }
}

/* What the server knows about one tier, in the order of the families below. */
enum { CAPACITY, USED, VALUES, FAILED, ROWS_READ, READ, WRITTEN, EVICTIONS, N_TIER_FAMILIES };

static const struct {
    const char *name, *type, *help;
} tier_families[N_TIER_FAMILIES] = {
    [CAPACITY] = {"kvasir_tier_capacity_bytes", "gauge", "the most that a tier may take"},
    [USED] = {"kvasir_tier_used_bytes", "gauge", "what a tier takes of it"},
    [VALUES] = {"kvasir_tier_values", "gauge", "values in a tier"},
    [FAILED] = {"kvasir_tier_failed", "gauge",
                "1: some of a tier's medium failed, and is not used until a restart"},
    [ROWS_READ] = {"kvasir_tier_rows_read_total", "counter", "rows read from a tier"},
    [READ] = {"kvasir_tier_read_bytes_total", "counter", "bytes read from a tier"},
    [WRITTEN] = {"kvasir_tier_written_bytes_total", "counter", "bytes written to a tier"},
    [EVICTIONS] = {"kvasir_tier_evictions_total", "counter", "values that gave way in a tier"},
};

static void tier_values(kvs_store *store, uint64_t values[N_TIER_FAMILIES])
{
    kvs_tier_usage usage;
    store->ops->usage(store->tier, &usage);
    values[CAPACITY] = usage.capacity_bytes;
    values[USED] = usage.used_bytes;
    values[VALUES] = usage.values;
    values[FAILED] = usage.failed;
    values[ROWS_READ] = atomic_load(&store->rows_read);
    values[READ] = atomic_load(&store->bytes_read);
    values[WRITTEN] = usage.bytes_written;
    values[EVICTIONS] = atomic_load(&store->evictions);
}

static void put_tiers(kvc_strbuf *out, kvs_server *server)
{
    enum { N = 3 };
    kvs_store *const stores[N] = {&server->dram, &server->lmdb, &server->gpu};
    uint64_t values[N][N_TIER_FAMILIES] = {{0}};
    for (uint32_t t = 0; t < N; t++)
        if (stores[t]->ops)
            tier_values(stores[t], values[t]);
    for (uint32_t f = 0; f < N_TIER_FAMILIES; f++) {
        put_head(out, tier_families[f].name, tier_families[f].type, tier_families[f].help);
        for (uint32_t t = 0; t < N; t++)
            if (stores[t]->ops)
                kvc_strbuf_putf(out, "%s{tier=\"%s\"} %llu\n", tier_families[f].name,
                                stores[t]->ops->name, (ull)values[t][f]);
    }
}

static uint64_t timeval_ns(struct timeval t)
{
    return (uint64_t)t.tv_sec * NS_PER_S + (uint64_t)t.tv_usec * 1000;
}

/* The names are those that Prometheus gives to every process. */
static void put_process(kvc_strbuf *out)
{
    struct rusage usage;
    ull pages = 0;
    if (getrusage(RUSAGE_SELF, &usage) == 0)
        put_seconds(out, "process_cpu_seconds_total", "counter", "user and system time",
                    timeval_ns(usage.ru_utime) + timeval_ns(usage.ru_stime));
    FILE *file = fopen("/proc/self/statm", "re");
    if (file && fscanf(file, "%*u %llu", &pages) == 1)
        put_number(out, "process_resident_memory_bytes", "gauge", "resident memory",
                   pages * (uint64_t)sysconf(_SC_PAGESIZE));
    if (file)
        (void)fclose(file);
}

char *kvs_exposition(kvs_server *server)
{
    kvc_strbuf out = {0};
    const char *why;
    put_head(&out, "kvasir_build_info", "gauge", "1, with the version");
    kvc_strbuf_putf(&out, "kvasir_build_info{version=\"%s\"} 1\n", KVS_VERSION);
    put_number(&out, "kvasir_ready", "gauge", "1: calls that come are taken",
               server && kvs_server_ready(server, &why));
    if (server) {
        put_seconds(&out, "kvasir_uptime_seconds", "gauge", "since the server began to start",
                    kvc_now_ns() - server->start_ns);
        put_number(&out, "kvasir_schemas", "gauge", "schemas registered",
                   kvs_schemas_count(server->schemas));
        put_tiers(&out, server);
        put_latency(&out, server->latency);
    }
    put_counters(&out);
    put_process(&out);
    return kvc_strbuf_take(&out);
}
