/*
 * doctor_server.c: is the server there, quick and sane, and do its caps fit this machine?
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/text.h"
#include "doctor.h"

#define N_PINGS      9
#define SLOW_PING_NS 5000000ull
#define MIN_PICKS    2048u /* one step of the default selectors */
/* What a process needs beside its dram tier: code, indexes, buffers of requests. */
#define SPARE_BYTES  ((uint64_t)1 << 30)

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Median time of a small request; 0 where one failed. */
static uint64_t ping_ns(const kvctl_globals *globals, kvc_client *client)
{
    uint64_t took_ns[N_PINGS];
    for (int i = 0; i < N_PINGS; i++) {
        kvc_op op;
        uint32_t hits = 0;
        kvc_digest none = {{0}};
        uint64_t start_ns = kvc_now_ns();
        kvc_op_init(&op, NULL, NULL);
        /* NOT_FOUND is a good answer too: no schema is known by this digest. */
        kvc_status status =
            kvc_match(client, &none, &none, 1, NULL, 0, &hits, kvctl_deadline_ns(globals), &op);
        if (status == KVC_OK)
            status = kvc_op_wait(&op, 0);
        if (status != KVC_OK && status != KVC_NOT_FOUND)
            return 0;
        took_ns[i] = kvc_now_ns() - start_ns;
    }
    qsort(took_ns, N_PINGS, sizeof(took_ns[0]), by_value);
    return took_ns[N_PINGS / 2];
}

static bool is_local(const char *uri)
{
    return strncmp(uri, "grpc+unix:", 10) == 0 || strncmp(uri, "shm:", 4) == 0 ||
           strstr(uri, "://127.") != NULL || strstr(uri, "://localhost") != NULL ||
           strstr(uri, "://[::1]") != NULL;
}

static void check_limits(doctor *d)
{
    const kvc_limits *limits = d->stats->limits;
    if (strcmp(d->stats->version, KVCTL_VERSION) != 0) {
        doctor_report(d, DOCTOR_WARN, "server", "it is version %s, kvctl is %s", d->stats->version,
                      KVCTL_VERSION);
        doctor_fix(d, "use the same version on both ends");
    } else {
        doctor_report(d, DOCTOR_OK, "server", "version %s, as kvctl", d->stats->version);
    }
    if (limits->max_message_bytes < limits->max_value_bytes) {
        doctor_report(d, DOCTOR_FAIL, "server", "a message (%u bytes) cannot hold a value (%u)",
                      limits->max_message_bytes, limits->max_value_bytes);
        doctor_fix(d, "lower max_value_bytes in the server's settings");
    } else if (limits->max_picks < MIN_PICKS) {
        doctor_report(d, DOCTOR_WARN, "server", "a fetch may hold %u picks; a step wants %u",
                      limits->max_picks, MIN_PICKS);
        doctor_fix(d, "it works, with more requests per step");
    } else {
        doctor_report(d, DOCTOR_OK, "server", "limits: values of %u bytes, %u picks in a fetch",
                      limits->max_value_bytes, limits->max_picks);
    }
}

/* Schemas, and whether what opaque ones are for is taken. */
static void check_schemas(doctor *d)
{
    uint32_t n_opaque = 0;
    for (uint32_t i = 0; d->stats->opaque != NULL && i < d->stats->n_schemas; i++)
        n_opaque += d->stats->opaque[i] != 0;
    if (n_opaque > 0 && d->stats->limits->max_pieces == 0) {
        doctor_report(d, DOCTOR_WARN, "server",
                      "%u of its %u schemas are opaque, and it takes no "
                      "opaque values",
                      n_opaque, d->stats->n_schemas);
        doctor_fix(d, "raise dram_bytes above 16 times max_value_bytes");
        return;
    }
    doctor_report(d, DOCTOR_OK, "server", "%u of %u schemas are registered, %u of them opaque",
                  d->stats->n_schemas, d->stats->limits->max_schemas, n_opaque);
}

static void report_ping(doctor *d, uint64_t took_ns)
{
    char text[KVC_TEXT_BYTES];
    if (took_ns == 0) {
        doctor_report(d, DOCTOR_FAIL, "server", "it does not answer requests: %s",
                      kvc_last_error());
        doctor_fix(d, "look into its log");
    } else if (took_ns > SLOW_PING_NS) {
        doctor_report(d, DOCTOR_WARN, "server", "a small request takes %s",
                      kvc_duration_short(took_ns, text));
        doctor_fix(d, "each part of each step waits for one: put the server nearer, or find what "
                      "keeps it busy");
    } else {
        doctor_report(d, DOCTOR_OK, "server", "%s answers in %s", d->globals->server,
                      kvc_duration_short(took_ns, text));
    }
}

/* Whether what crosses RDMA is verified, where a server is reached by it. */
static void check_sums(doctor *d, kvc_client *client)
{
    if (kvc_client_sums(client)) {
        doctor_report(d, DOCTOR_OK, "server", "what crosses rdma is summed and verified");
    } else if (strstr(d->globals->server, "rdma://") != NULL) {
        doctor_report(d, DOCTOR_INFO, "server",
                      "what crosses rdma is verified by the fabric's CRCs alone");
        doctor_fix(d, "--sums, or ?sums=1 behind the address, has both ends verify it, for a look "
                      "at every byte; nothing encrypts it");
    }
}

void doctor_check_server(doctor *d)
{
    kvc_client *client = NULL;
    kvc_client_opts opts = {
        .size_bytes = sizeof(opts),
        .uris = d->globals->server,
        .connect_timeout_ns = d->globals->timeout_ns,
        .default_timeout_ns = d->globals->timeout_ns,
        .sums = d->globals->sums,
    };
    if (kvc_client_open(&opts, &client) != KVC_OK) {
        doctor_report(d, DOCTOR_FAIL, "server", "%s cannot be reached: %s", d->globals->server,
                      kvc_last_error());
        doctor_fix(d, "start cachesvc, or name the right address with --server (cachesvc prints "
                      "where it listens)");
        return;
    }
    d->local = is_local(d->globals->server);
    report_ping(d, ping_ns(d->globals, client));
    check_sums(d, client);
    if (kvc_stats(client, kvctl_deadline_ns(d->globals), &d->stats) == KVC_OK) {
        check_limits(d);
        check_schemas(d);
    } else {
        doctor_report(d, DOCTOR_FAIL, "server", "it does not say what it is: %s", kvc_last_error());
        doctor_fix(d, "look into its log");
    }
    kvc_client_close(client);
}

static const kvc_tier_stats *tier_named(const doctor *d, const char *name)
{
    for (uint32_t i = 0; d->stats != NULL && i < d->stats->n_tiers; i++)
        if (strcmp(d->stats->tiers[i].name, name) == 0)
            return &d->stats->tiers[i];
    return NULL;
}

/* The machine's memory, or what a container's control group leaves of it. */
static uint64_t memory_limit_bytes(void)
{
    char line[KVC_TEXT_BYTES];
    uint64_t bytes = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t group_bytes = 0;
    doctor_line("/sys/fs/cgroup/memory.max", line, sizeof(line));
    if (kvc_uint_parse(line, &group_bytes) == KVC_OK && group_bytes < bytes)
        return group_bytes;
    return bytes;
}

static void check_dram(doctor *d, const kvc_tier_stats *tier)
{
    char cap[KVC_TEXT_BYTES], have[KVC_TEXT_BYTES];
    uint64_t memory_bytes = memory_limit_bytes();
    (void)kvc_bytes_short(tier->capacity_bytes, cap);
    (void)kvc_bytes_short(memory_bytes, have);
    if (tier->capacity_bytes + SPARE_BYTES > memory_bytes) {
        doctor_report(d, DOCTOR_FAIL, "caps", "dram may grow to %s, the machine has %s", cap, have);
        doctor_fix(d, "lower dram_bytes: the kernel would end the server when memory runs out");
    } else if (tier->capacity_bytes > memory_bytes / 10 * 8) {
        doctor_report(d, DOCTOR_WARN, "caps", "dram may grow to %s of the machine's %s", cap, have);
        doctor_fix(d, "leave a fifth to the page cache, which serves warm rows of lmdb");
    } else {
        doctor_report(d, DOCTOR_OK, "caps", "dram may grow to %s of the machine's %s", cap, have);
    }
}

/* Copies, so nothing is wrong with one that is full, or not there. What failed, the admin port
 * says. */
static void check_gpu_tier(doctor *d, const kvc_tier_stats *tier)
{
    char cap[KVC_TEXT_BYTES], used[KVC_TEXT_BYTES];
    if (tier == NULL) {
        doctor_report(d, DOCTOR_INFO, "caps", "the server has no gpu tier");
        doctor_fix(d, "where it has a GPU with memory to spare, gpu_bytes keeps copies there; if "
                      "that is set, its log says why there is none");
        return;
    }
    (void)kvc_bytes_short(tier->capacity_bytes, cap);
    (void)kvc_bytes_short(tier->used_bytes, used);
    doctor_report(d, DOCTOR_OK, "caps", "gpu may grow to %s: copies of %llu values take %s", cap,
                  (unsigned long long)tier->values, used);
}

static uint64_t counter_named(const doctor *d, const char *name)
{
    for (uint32_t i = 0; i < d->stats->n_counters; i++)
        if (strcmp(d->stats->counters[i].name, name) == 0)
            return d->stats->counters[i].value;
    return 0;
}

/* Where AttendRows is computed. */
static void check_attend(doctor *d)
{
    char pinned[KVC_TEXT_BYTES];
    uint64_t failures = counter_named(d, "attend_gpu_failures");
    (void)kvc_bytes_short(counter_named(d, "attend_gpu_pinned_bytes"), pinned);
    if (d->stats->limits->max_attend_queries == 0)
        return;
    if (counter_named(d, "attend_gpu") != 0) {
        doctor_report(d, DOCTOR_OK, "server",
                      "large attends run on its GPU, which reads %s of dram in place", pinned);
    } else if (failures != 0) {
        doctor_report(d, DOCTOR_WARN, "server", "its GPU failed: attends run on its CPU");
        doctor_fix(d, "see its log; a restart tries the GPU again");
    } else {
        doctor_report(d, DOCTOR_INFO, "server", "attends run on its CPU");
        doctor_fix(d, "where it has a GPU, attend_gpu_bytes lets large ones run there; if that is "
                      "set, its log says why they do not");
    }
}

void doctor_check_tiers(doctor *d)
{
    if (d->stats == NULL)
        return;
    const kvc_tier_stats *dram = tier_named(d, "dram"), *lmdb = tier_named(d, "lmdb");
    if (!d->local)
        doctor_report(d, DOCTOR_INFO, "caps", "the server is on another machine: run doctor there");
    else if (dram != NULL)
        check_dram(d, dram);
    if (lmdb == NULL) {
        doctor_report(d, DOCTOR_WARN, "caps", "the server has no lmdb tier");
        doctor_fix(d, "set lmdb_path and lmdb_bytes, or what dram evicts is lost and nothing is "
                      "durable");
    } else if (lmdb->used_bytes > lmdb->capacity_bytes / 20 * 19) {
        doctor_report(d, DOCTOR_WARN, "caps", "lmdb is %llu %% full",
                      (unsigned long long)(lmdb->used_bytes * 100 / lmdb->capacity_bytes));
        doctor_fix(d, "raise lmdb_bytes, or expect evictions");
    }
    check_gpu_tier(d, tier_named(d, "gpu"));
    check_attend(d);
}
