/*
 * ways_rig.c: see ways_rig.h.
 */
#include "ways_rig.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/digest.h"
#include "bench.h"

#define MAX_GROUPS 32u /* chunks of a request */
#define TIMEOUT_NS 120000000000ull

static int failed(const char *what)
{
    (void)fprintf(stderr, "ways_bench: %s: %s\n", what, kvc_last_error());
    return 1;
}

/* An emulated machine takes its time. */
static kvc_client_opts options(const char *uri)
{
    return (kvc_client_opts){.size_bytes = sizeof(kvc_client_opts),
                             .uris = uri,
                             .connect_timeout_ns = TIMEOUT_NS,
                             .default_timeout_ns = TIMEOUT_NS};
}

/* ---- the server ------------------------------------------------------------------------------
 */

int ways_start(ways_rig *rig, ways_tier tier)
{
    char listen[1100], path[300];
    const char *args[] = {"--listen",
                          listen,
                          "--dram-bytes",
                          rig->dram_bytes,
                          "--promote-percent",
                          "0",
                          NULL,
                          NULL,
                          NULL,
                          NULL,
                          NULL};
    (void)snprintf(path, sizeof(path), "%s/values", rig->folder);
#ifdef KVASIR_GRPC
    (void)snprintf(listen, sizeof(listen), "grpc://127.0.0.1:0,%s,%s", rig->unix_uri, rig->shm_uri);
#else
    (void)snprintf(listen, sizeof(listen), "%s", rig->shm_uri);
#endif
    if (rig->has_rdma) {
        size_t len = strlen(listen);
        (void)snprintf(listen + len, sizeof(listen) - len, ",%s", rig->rdma_uri);
    }
    if (tier == WAYS_GPU_DRAM || tier == WAYS_GPU_TIER) {
        args[6] = "--attend-gpu-bytes";
        args[7] = tier == WAYS_GPU_DRAM ? rig->dram_bytes : "1";
        args[8] = "--gpu-bytes";
        args[9] = tier == WAYS_GPU_DRAM ? "0" : rig->dram_bytes;
    }
    if (tier == WAYS_LMDB) {
        args[6] = "--lmdb-path";
        args[7] = path;
        args[8] = "--lmdb-bytes";
        args[9] = "2GiB";
    }
    rig->tier = tier;
    return support_daemon_start(&rig->daemon, rig->folder, args) ? 0 : 1;
}

void ways_stop(ways_rig *rig)
{
    (void)support_daemon_stop(&rig->daemon, SIGTERM);
}

/* ---- what is put ----------------------------------------------------------------------------- */

static size_t value_bytes(const ways_shape *shape)
{
    return (size_t)shape->block_tokens * shape->row_bytes;
}

/* Numbers of bf16 between -1 and 1: attention over others would take other time. */
static void fill(ways_rig *rig, size_t n)
{
    uint16_t numbers[2048], *at = (uint16_t *)(void *)rig->values;
    for (uint32_t i = 0; i < 2048; i++) {
        float x = (float)i / 1024.0F - 1.0F;
        uint32_t bits = 0;
        memcpy(&bits, &x, sizeof(bits));
        numbers[i] = (uint16_t)(bits >> 16);
    }
    for (size_t i = 0; i < n; i += 4) {
        uint64_t r = bench_random(&rig->random);
        for (size_t j = 0; j < 4; j++)
            at[i + j] = numbers[r >> 11 * j & 2047];
    }
}

static int register_schema(ways_rig *rig, kvc_client *client)
{
    const ways_shape *shape = rig->shape;
    kvc_part part = {.part = WAYS_PART,
                     .kind = KVC_PART_KV,
                     .dtype = KVC_DTYPE_BF16,
                     .kv_head_count = shape->n_kv_heads,
                     .row_bytes = shape->row_bytes,
                     .k_len_bytes = shape->row_bytes / 2,
                     .v_off_bytes = shape->row_bytes / 2,
                     .v_len_bytes = shape->row_bytes / 2,
                     .q_dim = shape->dim,
                     .v_dim = shape->dim,
                     .rope = {.type = KVC_ROPE_PLAIN, .theta = 5e5}};
    const kvc_schema schema = {.model = "ways_bench",
                               .revision = shape->name,
                               .recipe = "full",
                               .tp_size = 1,
                               .block_tokens = shape->block_tokens,
                               .n_parts = 1,
                               .parts = &part};
    return kvc_schema_register(client, &schema, 0, &rig->schema) == KVC_OK ? 0 : failed("schema");
}

static int put_values(ways_rig *rig, kvc_client *client, kvc_region *src)
{
    uint32_t n = rig->shape->n_blocks;
    kvc_value *values = calloc(n, sizeof(*values));
    int8_t *status = calloc(n, 1);
    int bad = values == NULL || status == NULL;
    for (uint32_t i = 0; i < n && !bad; i++) {
        const uint32_t name[2] = {rig->n_fills, i}; /* other bytes have other names */
        bad = kvc_sha256(name, sizeof(name), &rig->digests[i]) != KVC_OK;
        values[i] = (kvc_value){.digest = rig->digests[i],
                                .part = WAYS_PART,
                                .len_bytes = (uint32_t)value_bytes(rig->shape),
                                .src_off_bytes = i * value_bytes(rig->shape)};
    }
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    bad = bad ||
          kvc_put(client, &rig->schema,
                  rig->tier == WAYS_LMDB ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY, values, n, src,
                  status, 0, &op) != KVC_OK ||
          kvc_op_wait(&op, 0) != KVC_OK;
    for (uint32_t i = 0; i < n && !bad; i++)
        bad = status[i] != KVC_OK && status[i] != KVC_EXISTS;
    free(values);
    free(status);
    return bad ? failed("put") : 0;
}

/* Copies in the gpu tier. */
static int raise_values(ways_rig *rig, kvc_client *client)
{
    kvc_prefetch_info info = {0};
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    bool bad = kvc_prefetch_blocks(client, &rig->schema, rig->digests, rig->shape->n_blocks, NULL,
                                   0, KVC_TIER_GPU, &info, 0, &op) != KVC_OK ||
               kvc_op_wait(&op, 0) != KVC_OK || info.left != 0;
    return bad ? failed("copies in the gpu tier") : 0;
}

int ways_fill(ways_rig *rig, const ways_shape *shape)
{
    size_t bytes = shape->n_blocks * value_bytes(shape);
    kvc_client_opts opts = options(rig->shm_uri);
    kvc_region_desc desc = {.size_bytes = sizeof(desc), .len_bytes = bytes};
    kvc_client *client = NULL;
    kvc_region *src = NULL;
    desc.kind = KVC_MEMORY_HOST;
    rig->shape = shape;
    rig->n_fills++;
    rig->values = malloc(bytes);
    rig->out = calloc(shape->n_rows, shape->row_bytes);
    rig->digests = calloc(shape->n_blocks, sizeof(*rig->digests));
    desc.base = rig->values;
    if (rig->values == NULL || rig->out == NULL || rig->digests == NULL)
        return failed("memory");
    fill(rig, bytes / 2);
    int bad = kvc_client_open(&opts, &client) != KVC_OK ||
              kvc_region_register(client, &desc, &src) != KVC_OK;
    bad = bad ? failed("a client to put by") : register_schema(rig, client);
    bad = bad || put_values(rig, client, src);
    bad = bad || (rig->tier == WAYS_GPU_TIER && raise_values(rig, client));
    if (client != NULL)
        (void)kvc_region_deregister(client, src);
    kvc_client_close(client);
    if (!bad && rig->tier == WAYS_LMDB) {
        ways_stop(rig);
        bad = ways_start(rig, WAYS_LMDB);
    }
    return bad;
}

void ways_empty(ways_rig *rig)
{
    free(rig->values);
    free(rig->out);
    free(rig->digests);
    rig->values = NULL;
    rig->out = NULL;
    rig->digests = NULL;
}

/* ---- ways ------------------------------------------------------------------------------------ */

int ways_open(ways_way *way, ways_rig *rig)
{
    const ways_shape *shape = rig->shape;
    kvc_client_opts opts = options(way->uri);
    kvc_map_opts map = {.size_bytes = sizeof(map), .all = way->mapped, .populate = true};
    kvc_region_desc desc = {.size_bytes = sizeof(desc),
                            .base = rig->out,
                            .len_bytes = (size_t)shape->n_rows * shape->row_bytes,
                            .kind = KVC_MEMORY_HOST};
    way->rig = rig;
    if (way->uri == NULL)
        return 0;
    if (kvc_client_open(&opts, &way->client) != KVC_OK ||
        kvc_region_register(way->client, &desc, &way->region) != KVC_OK ||
        kvc_client_map_contexts(way->client, &map) != KVC_OK ||
        kvc_context_open(way->client, &rig->schema, rig->digests, shape->n_blocks, 0, 0,
                         &way->context) != KVC_OK)
        return failed(way->name);
    return ways_check(way);
}

void ways_close(ways_way *way)
{
    kvc_context_close(way->context);
    if (way->client != NULL)
        (void)kvc_region_deregister(way->client, way->region);
    kvc_client_close(way->client);
    way->context = NULL;
    way->client = NULL;
    way->region = NULL;
}

/* ---- requests -------------------------------------------------------------------------------- */

void ways_pick(ways_rig *rig, uint32_t picks[WAYS_MAX_ROWS], uint32_t n)
{
    uint32_t unit = rig->shape->chunks ? WAYS_CHUNK_TOKENS : 1, done = 0;
    uint32_t n_units = rig->shape->n_blocks * rig->shape->block_tokens / unit;
    for (uint32_t i = 0; i < n_units && done < n; i++) {
        if (bench_random(&rig->random) % (n_units - i) >= (n - done) / unit)
            continue;
        for (uint32_t j = 0; j < unit; j++)
            picks[done++] = i * unit + j;
    }
}

void ways_choose(ways_rig *rig)
{
    for (uint32_t i = 0; i < rig->repeats; i++)
        ways_pick(rig, rig->picks[i], rig->shape->n_rows);
}

static void copy(const ways_rig *rig, const uint32_t *picks, uint32_t n)
{
    size_t row = rig->shape->row_bytes;
    for (uint32_t i = 0; i < n; i++)
        memcpy(rig->out + i * row, rig->values + picks[i] * row, row);
}

static kvc_status ask_rows(ways_way *way, const uint32_t *picks, uint32_t n, kvc_fetch_info *info)
{
    const kvc_pick_group group = {.context = way->context,
                                  .part = WAYS_PART,
                                  .row_bytes = way->rig->shape->row_bytes,
                                  .n_picks = n,
                                  .picks = picks};
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    kvc_status st = kvc_fetch(way->client, &group, 1, way->region, NULL, info, 0, &op);
    return st == KVC_OK ? kvc_op_wait(&op, 0) : st;
}

/* Chunks as the blocks that they are. */
static kvc_status ask_blocks(ways_way *way, const uint32_t *picks, uint32_t n, kvc_fetch_info *info)
{
    const ways_rig *rig = way->rig;
    uint32_t n_blocks = n / WAYS_CHUNK_TOKENS, bytes = (uint32_t)value_bytes(rig->shape);
    kvc_digest names[MAX_GROUPS];
    int8_t status[MAX_GROUPS];
    uint8_t tiers[MAX_GROUPS];
    const kvc_block_part part = {.part = WAYS_PART, .value_bytes = bytes, .stride_bytes = bytes};
    kvc_op op;
    for (uint32_t i = 0; i < n_blocks; i++)
        names[i] = rig->digests[picks[(size_t)i * WAYS_CHUNK_TOKENS] / WAYS_CHUNK_TOKENS];
    kvc_op_init(&op, NULL, NULL);
    kvc_status st = kvc_fetch_blocks(way->client, &rig->schema, names, n_blocks, &part, 1,
                                     way->region, status, tiers, 0, &op);
    st = st == KVC_OK ? kvc_op_wait(&op, 0) : st;
    *info = (kvc_fetch_info){.requests = 1};
    for (uint32_t i = 0; i < n_blocks && st == KVC_OK; i++) {
        info->rows_dram += tiers[i] == KVC_TIER_DRAM ? WAYS_CHUNK_TOKENS : 0;
        info->rows_lmdb += tiers[i] == KVC_TIER_LMDB ? WAYS_CHUNK_TOKENS : 0;
    }
    return st;
}

static kvc_status ask_near(ways_way *way, const uint32_t *picks, uint32_t n, kvc_fetch_info *info)
{
    static uint16_t q[32 * 128], o[MAX_GROUPS][32 * 128];
    static float lse[MAX_GROUPS][32];
    const ways_shape *shape = way->rig->shape;
    kvc_attend_group groups[MAX_GROUPS];
    uint32_t n_groups = shape->chunks ? n / WAYS_CHUNK_TOKENS : 1;
    for (uint32_t g = 0; g < n_groups; g++)
        groups[g] = (kvc_attend_group){.context = way->context,
                                       .part = WAYS_PART,
                                       .n_picks = n / n_groups,
                                       .picks = picks + (size_t)g * (n / n_groups),
                                       .row_bytes = shape->row_bytes,
                                       .n_q = 1,
                                       .n_q_heads = shape->n_q_heads,
                                       .dim = shape->dim,
                                       .q_dtype = KVC_DTYPE_BF16,
                                       .o_dtype = KVC_DTYPE_BF16,
                                       .q = g == 0 ? q : NULL,
                                       .o = o[g],
                                       .lse = lse[g]};
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    kvc_status st = kvc_attend(way->client, groups, n_groups, NULL, info, 0, &op);
    st = st == KVC_OK ? kvc_op_wait(&op, 0) : st;
    float want = logf((float)groups[0].n_picks); /* of zeros: each row counts alike */
    for (uint32_t g = 0; g < n_groups && st == KVC_OK; g++)
        st = fabsf(lse[g][0] - want) < 1e-3F ? KVC_OK : KVC_CORRUPT;
    return st;
}

int ways_ask(ways_way *way, const uint32_t *picks, uint32_t n)
{
    kvc_fetch_info info = {0};
    if (way->kind == WAYS_COPY) {
        copy(way->rig, picks, n);
        return 0;
    }
    kvc_status st = way->kind == WAYS_ROWS     ? ask_rows(way, picks, n, &info)
                    : way->kind == WAYS_BLOCKS ? ask_blocks(way, picks, n, &info)
                                               : ask_near(way, picks, n, &info);
    if (st != KVC_OK)
        return failed(way->name);
    way->n_requests = info.requests;
    uint32_t from_tier = way->rig->tier == WAYS_LMDB ? info.rows_lmdb
                         : way->rig->tier == WAYS_GPU_TIER
                             ? info.rows_gpu + info.rows_dram /* a small request */
                             : info.rows_dram;
    if (from_tier != n || way->mapped != !info.requests) {
        (void)fprintf(
            stderr,
            "ways_bench: %s: %u rows came from gpu, %u from dram, %u from lmdb, by %u requests\n",
            way->name, info.rows_gpu, info.rows_dram, info.rows_lmdb, info.requests);
        return 1;
    }
    return 0;
}

int ways_check(ways_way *way)
{
    ways_rig *rig = way->rig;
    size_t row = rig->shape->row_bytes;
    ways_pick(rig, rig->picks[0], rig->shape->n_rows);
    memset(rig->out, 0, rig->shape->n_rows * row);
    if (ways_ask(way, rig->picks[0], rig->shape->n_rows) != 0)
        return 1;
    for (uint32_t i = 0; i < rig->shape->n_rows && way->kind != WAYS_NEAR; i++) {
        if (memcmp(rig->out + i * row, rig->values + rig->picks[0][i] * row, row) != 0) {
            (void)fprintf(stderr, "ways_bench: %s: a row is not what was put\n", way->name);
            return 1;
        }
    }
    return 0;
}
