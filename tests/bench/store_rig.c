/*
 * store_rig.c: see store_rig.h.
 */
#include "store_rig.h"

#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/digest.h"

#define MIB         (1u << 20)
#define TIMEOUT_NS  120000000000ull
#define MAX_OPTIONS 20

typedef struct shape {
    uint32_t schema, part, row_bytes, rows, per_block; /* values for each 1 MiB block */
} shape;

static const shape shapes[RIG_SHAPES] = {
    [RIG_1M] = {0, 0, 4096, 256, 1},
    [RIG_192K] = {0, 1, 768, 256, 1},
    [RIG_64K] = {1, 0, 1024, 64, 4},
    [RIG_4K] = {1, 1, 64, 64, 16},
};

static int complain(const char *what, kvc_status status)
{
    fprintf(stderr, "store_bench: %s: %s: %s\n", what, kvc_status_name(status), kvc_last_error());
    return 1;
}

uint32_t rig_values(const store_rig *rig, rig_shape s)
{
    return rig->blocks * shapes[s].per_block;
}

uint32_t rig_value_bytes(rig_shape s)
{
    return shapes[s].row_bytes * shapes[s].rows;
}

uint32_t rig_row_bytes(rig_shape s)
{
    return shapes[s].row_bytes;
}

/* ---- life ------------------------------------------------------------------------------------ */

int rig_init(store_rig *rig)
{
    const char *base = getenv("TMPDIR");
    size_t bytes = (size_t)rig->blocks * MIB;
    int failed = 0;
    for (int s = 0; s < RIG_SHAPES; s++) {
        rig->digests[s] = calloc(rig_values(rig, (rig_shape)s), sizeof(kvc_digest));
        failed |= !rig->digests[s];
    }
    rig->memory = malloc(bytes);
    rig->out = calloc(rig->blocks, MIB);
    rig->picks = calloc((size_t)rig->blocks * 16 * 64, sizeof *rig->picks);
    snprintf(rig->folder, sizeof rig->folder, "%s/kvasir-bench-XXXXXX", base ? base : ".");
    if (failed || !rig->memory || !rig->out || !rig->picks || !mkdtemp(rig->folder)) {
        return complain("memory or a folder for the data", KVC_NO_MEMORY);
    }
    for (size_t i = 0; i < bytes; i += 8) {
        memcpy(rig->memory + i, &i, 8);
    }
    memset(rig->out, 1, bytes);
    return 0;
}

static int remove_file(const char *path, const struct stat *stat, int type, struct FTW *walk)
{
    (void)stat;
    (void)type;
    (void)walk;
    return remove(path);
}

void rig_fini(store_rig *rig)
{
    if (rig->folder[0]) {
        (void)nftw(rig->folder, remove_file, 16, FTW_DEPTH | FTW_PHYS);
    }
    for (int s = 0; s < RIG_SHAPES; s++) {
        free(rig->digests[s]);
    }
    free(rig->memory);
    free(rig->out);
    free(rig->picks);
}

static int register_schemas(store_rig *rig)
{
    for (uint32_t i = 0; i < 2; i++) {
        kvc_part parts[2];
        uint32_t n = 0;
        for (int s = 0; s < RIG_SHAPES; s++) {
            if (shapes[s].schema == i) {
                parts[n++] = (kvc_part){.part = shapes[s].part,
                                        .kind = KVC_PART_STATE,
                                        .dtype = KVC_DTYPE_RAW,
                                        .row_bytes = shapes[s].row_bytes};
            }
        }
        kvc_schema schema = {.model = "bench",
                             .revision = "",
                             .recipe = "bench",
                             .tp_size = 1,
                             .block_tokens = i == 0 ? 256 : 64,
                             .n_parts = n,
                             .parts = parts};
        kvc_status status = kvc_schema_register(rig->client, &schema, 0, &rig->schemas[i]);
        if (status != KVC_OK) {
            return complain("register a schema", status);
        }
    }
    return 0;
}

static int connect_client(store_rig *rig)
{
    kvc_client_opts opts = {
        .size_bytes = sizeof opts, .uris = rig->daemon.uri, .n_channels = rig->channels};
    kvc_region_desc desc = {.size_bytes = sizeof desc,
                            .base = rig->memory,
                            .len_bytes = (size_t)rig->blocks * MIB,
                            .kind = KVC_MEMORY_HOST};
    kvc_status status = kvc_client_open(&opts, &rig->client);
    if (status == KVC_OK) {
        status = kvc_region_register(rig->client, &desc, &rig->region);
    }
    desc.base = rig->out;
    if (status == KVC_OK) {
        status = kvc_region_register(rig->client, &desc, &rig->out_region);
    }
    return status == KVC_OK ? register_schemas(rig) : complain("connect", status);
}

int rig_start(store_rig *rig, const char *dram_bytes, const char *lmdb_bytes)
{
    char values[300], threads[16];
    const char *args[MAX_OPTIONS] = {"--dram-bytes",        dram_bytes, "--log-level",       "warn",
                                     "--transport-threads", threads,    "--promote-percent", "0"};
    uint32_t n = 8;
    snprintf(values, sizeof values, "%s/values", rig->folder);
    snprintf(threads, sizeof threads, "%u", rig->threads);
    if (rig->listen) {
        args[n++] = "--listen";
        args[n++] = rig->listen;
    }
    if (lmdb_bytes) {
        args[n++] = "--lmdb-path";
        args[n++] = values;
        args[n++] = "--lmdb-bytes";
        args[n++] = lmdb_bytes;
    }
    if (!support_daemon_start(&rig->daemon, rig->folder, args)) {
        return complain("cachesvc", KVC_UNAVAILABLE);
    }
    return connect_client(rig);
}

void rig_stop(store_rig *rig)
{
    kvc_context_close(rig->context);
    rig->context = NULL;
    if (rig->client && kvc_region_deregister(rig->client, rig->region) == KVC_OK &&
        kvc_region_deregister(rig->client, rig->out_region) == KVC_OK) {
        kvc_client_close(rig->client);
    }
    rig->client = NULL;
    (void)support_daemon_stop(&rig->daemon, SIGTERM);
}

static int drop_file(const char *path, const struct stat *stat, int type, struct FTW *walk)
{
    (void)stat;
    (void)walk;
    int fd = type == FTW_F ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0) {
        (void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        close(fd);
    }
    return 0;
}

/* Pages that a process maps stay in the cache, so the server is started again. */
int rig_restart(store_rig *rig, bool cold)
{
    rig_stop(rig);
    sync();
    if (cold) {
        (void)nftw(rig->folder, drop_file, 16, FTW_PHYS);
    }
    return rig_start(rig, "64MiB", "8GiB") || rig_open_context(rig, rig->context_shape);
}

/* ---- moving ---------------------------------------------------------------------------------- */

void rig_name(store_rig *rig, rig_shape s)
{
    for (uint32_t i = 0; i < rig_values(rig, s); i++) {
        uint32_t name[2] = {rig->seed, i};
        if (kvc_sha256(name, sizeof name, &rig->digests[s][i]) != KVC_OK) {
            abort();
        }
    }
    rig->seed++;
}

int rig_put(store_rig *rig, rig_shape s, kvc_promise promise, double *bytes_p)
{
    uint32_t n = rig_values(rig, s), len_bytes = rig_value_bytes(s);
    kvc_value *values = calloc(n, sizeof *values);
    int8_t *status = calloc(n, 1);
    int failed = values && status ? 0 : 1;
    for (uint32_t i = 0; i < n && !failed; i++) {
        values[i] = (kvc_value){.digest = rig->digests[s][i],
                                .part = shapes[s].part,
                                .len_bytes = len_bytes,
                                .src_off_bytes = (size_t)i * len_bytes};
    }
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    if (!failed) {
        kvc_status got = kvc_put(rig->client, &rig->schemas[shapes[s].schema], promise, values, n,
                                 rig->region, status, kvc_deadline_ns(TIMEOUT_NS), &op);
        got = got == KVC_OK ? kvc_op_wait(&op, 0) : got;
        failed = got == KVC_OK ? 0 : complain("put", got);
    }
    for (uint32_t i = 0; i < n && !failed; i++) {
        failed = status[i] == KVC_OK ? 0 : complain("put of a value", (kvc_status)status[i]);
    }
    *bytes_p = (double)n * len_bytes;
    free(values);
    free(status);
    return failed;
}

int rig_open_context(store_rig *rig, rig_shape s)
{
    kvc_context_close(rig->context);
    rig->context = NULL;
    rig->context_shape = s;
    kvc_status status = kvc_context_open(rig->client, &rig->schemas[shapes[s].schema],
                                         rig->digests[s], rig_values(rig, s), 0, 0, &rig->context);
    return status == KVC_OK ? 0 : complain("open a context", status);
}

/* Fetches rig->picks to rig->out; every row must come from the tier that is expected. */
static int fetch(store_rig *rig, uint32_t n, double *bytes_p)
{
    const shape *s = &shapes[rig->context_shape];
    kvc_pick_group group = {.context = rig->context,
                            .part = s->part,
                            .row_bytes = s->row_bytes,
                            .n_picks = n,
                            .picks = rig->picks};
    kvc_fetch_info info;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    kvc_status status = kvc_fetch(rig->client, &group, 1, rig->out_region, NULL, &info,
                                  kvc_deadline_ns(TIMEOUT_NS), &op);
    status = status == KVC_OK ? kvc_op_wait(&op, 0) : status;
    if (status != KVC_OK) {
        return complain("fetch", status);
    }
    rig->n_picks = n;
    rig->row_bytes = s->row_bytes;
    *bytes_p = (double)n * s->row_bytes;
    if ((rig->from_lmdb ? info.rows_lmdb : info.rows_dram) != n) {
        fprintf(stderr, "store_bench: of %u rows %u came from dram, %u from lmdb, %u are missing\n",
                n, info.rows_dram, info.rows_lmdb, info.rows_missing);
        return 1;
    }
    return 0;
}

int rig_get(store_rig *rig, double *bytes_p)
{
    uint32_t n = rig_values(rig, rig->context_shape) * shapes[rig->context_shape].rows;
    for (uint32_t i = 0; i < n; i++) {
        rig->picks[i] = i;
    }
    return fetch(rig, n, bytes_p);
}

void rig_pick(store_rig *rig, rig_shape s)
{
    uint32_t n_tokens = rig_values(rig, s) * shapes[s].rows;
    uint32_t stride = n_tokens / RIG_N_ROWS;
    for (uint32_t i = 0; i < RIG_N_ROWS; i++) {
        rig->random = rig->random * 6364136223846793005u + 1442695040888963407u;
        rig->picks[i] = i * stride + (uint32_t)(rig->random >> 33) % stride;
    }
}

int rig_rows(store_rig *rig, double *bytes_p)
{
    rig_pick(rig, rig->context_shape);
    return fetch(rig, RIG_N_ROWS, bytes_p);
}

int rig_check(const store_rig *rig)
{
    for (uint32_t i = 0; i < rig->n_picks; i++) {
        if (memcmp(rig->out + (size_t)i * rig->row_bytes,
                   rig->memory + (size_t)rig->picks[i] * rig->row_bytes, rig->row_bytes) != 0) {
            fprintf(stderr, "store_bench: row %u is not what was put\n", rig->picks[i]);
            return 1;
        }
    }
    return 0;
}
