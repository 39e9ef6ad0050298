/*
 * needles.c: a million tokens in the store, a few of them needles; finds each by the worker alone.
 *
 * Appends a synthetic context (see needles_data.h) of Llama-3-8B's row size to a worker with an ESA
 * index, which puts every full block into cachesvc; then asks for each needle in every layer: the
 * selector must pick its position, the row must come back from the store bit for bit, and the
 * attention must answer with its values. One thread; exit status 0 only if all were found.
 */
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/digest.h"
#include "kvc/client.h"
#include "kvctl_progress.h"
#include "kvw/worker.h"
#include "needles_data.h"
#include "projection.h"

enum { CHUNK_TOKENS = 512, BLOCK_TOKENS = 256 };

typedef struct demo {
    const char *server, *projection_path;
    uint32_t n_tokens, n_layers, n_needles;
    nd_data data;
    kvc_client *client;
    kvw_worker *worker;
    kvw_seq *seq;
    uint16_t *k, *v;
} demo;

static const char usage[] =
    "Usage: needles --projection FILE [--server URI] [--tokens N] [--layers N] [--needles N]\n"
    "Plants needles in a synthetic context, stores it through a worker, and finds each again.\n"
    "  --projection FILE  where to write the projection artefact\n"
    "  --server URI       cachesvc to use (default grpc://127.0.0.1:7811)\n"
    "  --tokens N         length of the context (default 1048576)\n"
    "  --layers N         layers, one KV part each (default 2)\n"
    "  --needles N        needles, at most 64 (default 16)\n";

static int fail(const char *what, kvc_status status, const char *detail)
{
    fprintf(stderr, "needles: %s: %s: %s\n", what, kvc_status_name(status), detail);
    return 1;
}

static kvc_status write_projection(demo *d)
{
    size_t n = (size_t)ND_KEY_DIM * ND_INDEX_DIMS;
    float *one = malloc(n * sizeof(float));
    float *all = malloc(n * d->n_layers * sizeof(float));
    kvc_status status = KVC_NO_MEMORY;
    if (one && all) {
        nd_projection(&d->data, one);
        for (uint32_t layer = 0; layer < d->n_layers; layer++) {
            memcpy(all + n * layer, one, n * sizeof(float));
        }
        kvwi_projection proj = {.selector = "esa",
                                .model = "synthetic/llama-3-8b-rows",
                                .n_layers = d->n_layers,
                                .n_kv_heads = ND_KV_HEADS,
                                .head_dim = ND_HEAD_DIM,
                                .dims = ND_INDEX_DIMS,
                                .form = KVWI_SHARED,
                                .rope = KVWI_PROJECTION_RAW,
                                .a = all,
                                .b = all};
        status = kvwi_projection_write(d->projection_path, &proj);
    }
    free(one);
    free(all);
    return status;
}

static int open_all(demo *d)
{
    kvc_client_opts client_opts = {.size_bytes = sizeof client_opts, .uris = d->server};
    kvc_status status = kvc_client_open(&client_opts, &d->client);
    if (status != KVC_OK) {
        return fail(d->server, status, kvc_last_error());
    }
    kvw_opts opts = {.size_bytes = sizeof opts,
                     .model = "synthetic/llama-3-8b-rows",
                     .revision = "1",
                     .n_layers = d->n_layers,
                     .n_q_heads = ND_Q_HEADS,
                     .n_kv_heads = ND_KV_HEADS,
                     .head_dim = ND_HEAD_DIM,
                     .dtype = KVK_BF16,
                     .rope = {.type = 0, .theta = ND_ROPE_THETA},
                     .client = d->client,
                     .block_tokens = BLOCK_TOKENS,
                     .promise = KVC_PROMISE_MEMORY,
                     .fetch_timeout_ns = 60000000000u,
                     .selector = "esa",
                     .index = KVW_INDEX_COMPRESSED,
                     .projection_path = d->projection_path,
                     .n_sink = ND_SINK,
                     .n_recent = ND_RECENT,
                     .k = 2048,
                     .eps = 1,
                     .chunk_tokens = CHUNK_TOKENS};
    status = kvw_open(&opts, &d->worker);
    if (status != KVC_OK) {
        return fail("open worker", status, kvw_last_error());
    }
    uint32_t reused = 0;
    status = kvw_seq_create(d->worker, NULL, 0, &d->seq, &reused);
    return status == KVC_OK ? 0 : fail("create sequence", status, kvw_last_error());
}

/* Appends tokens first .. first + n - 1 in every layer, without attention. */
static kvc_status append_chunk(demo *d, uint32_t first, uint32_t n)
{
    uint32_t ids[CHUNK_TOKENS];
    for (uint32_t i = 0; i < n; i++) {
        ids[i] = first + i;
    }
    kvc_status status = kvw_tokens(d->seq, ids, n);
    for (uint32_t layer = 0; layer < d->n_layers && status == KVC_OK; layer++) {
        for (uint32_t i = 0; i < n; i++) {
            nd_row(&d->data, layer, first + i, d->k + (size_t)i * ND_KEY_DIM,
                   d->v + (size_t)i * ND_KEY_DIM);
        }
        status = kvw_append(d->seq, layer, d->k, d->v, n);
    }
    return status;
}

static int fill(demo *d)
{
    kvctl_progress *bar = kvctl_progress_start("storing", d->n_tokens, "tokens");
    for (uint32_t first = 0; first < d->n_tokens; first += CHUNK_TOKENS) {
        uint32_t left = d->n_tokens - first;
        kvc_status status = append_chunk(d, first, left < CHUNK_TOKENS ? left : CHUNK_TOKENS);
        if (status != KVC_OK) {
            kvctl_progress_stop(bar);
            return fail("append", status, kvw_last_error());
        }
        kvctl_progress_set(bar, first);
    }
    kvctl_progress_stop(bar);
    kvc_status status = kvw_flush(d->seq, kvc_deadline_ns(600000000000u));
    return status == KVC_OK ? 0 : fail("flush", status, kvw_last_error());
}

static bool holds(const uint32_t *sorted, uint32_t n, uint32_t position)
{
    for (uint32_t i = 0; i < n; i++) {
        if (sorted[i] == position) {
            return true;
        }
    }
    return false;
}

/* One decoding token that asks for a needle; *found_p counts the layers that answered right. */
static kvc_status ask(demo *d, uint32_t needle, uint32_t *found_p)
{
    static uint16_t q[ND_Q_HEADS * ND_HEAD_DIM], out[ND_Q_HEADS * ND_HEAD_DIM];
    uint32_t token = d->n_tokens + needle;
    uint32_t at = d->data.needle_at[needle];
    nd_query(&d->data, needle, q);
    kvc_status status = kvw_tokens(d->seq, &token, 1);
    for (uint32_t layer = 0; layer < d->n_layers && status == KVC_OK; layer++) {
        nd_row(&d->data, layer, token, d->k, d->v);
        status = kvw_forward(d->seq, layer, q, d->k, d->v, 1, out, NULL);
        const uint32_t *picks = NULL;
        uint32_t n_picks = 0;
        if (status == KVC_OK) {
            status = kvw_last_picks(d->seq, layer, &picks, &n_picks);
        }
        if (status == KVC_OK && holds(picks, n_picks, at) &&
            nd_answer_right(&d->data, layer, needle, out)) {
            *found_p += 1;
        }
    }
    return status;
}

/* Digests of the context's full blocks, by the published rule alone. NULL when memory is out. */
static kvc_digest *block_names(const demo *d, uint32_t n_blocks)
{
    /* One more, so that no blocks at all is not taken for a lack of memory. */
    kvc_digest *names = calloc((size_t)n_blocks + 1, sizeof *names);
    for (uint32_t i = 0; names && i < n_blocks; i++) {
        uint32_t ids[BLOCK_TOKENS];
        for (uint32_t j = 0; j < BLOCK_TOKENS; j++) {
            ids[j] = i * BLOCK_TOKENS + j;
        }
        if (kvc_block_digest(kvw_schema_digest(d->worker), i ? &names[i - 1] : NULL, ids,
                             BLOCK_TOKENS, NULL, 0, &names[i]) != KVC_OK) {
            free(names);
            return NULL;
        }
    }
    return names;
}

/* Asks the store itself for each needle's rows; *equal_p counts those that are bit for bit right.
 */
static kvc_status compare_rows(const demo *d, uint32_t *equal_p)
{
    static uint16_t rows[ND_MAX_NEEDLES][2][ND_KEY_DIM], want[2][ND_KEY_DIM];
    uint32_t n_blocks = d->n_tokens / BLOCK_TOKENS;
    kvc_digest *names = block_names(d, n_blocks);
    kvc_context *context = NULL;
    kvc_region *region = NULL;
    kvc_region_desc desc = {
        .size_bytes = sizeof desc, .base = rows, .len_bytes = sizeof rows, .kind = KVC_MEMORY_HOST};
    kvc_status status = names ? kvc_region_register(d->client, &desc, &region) : KVC_NO_MEMORY;
    if (status == KVC_OK) {
        status = kvc_context_open(d->client, kvw_schema_digest(d->worker), names, n_blocks, 0, 0,
                                  &context);
    }
    for (uint32_t layer = 0; layer < d->n_layers && status == KVC_OK; layer++) {
        kvc_pick_group group = {.context = context,
                                .part = layer,
                                .row_bytes = ND_ROW_BYTES,
                                .n_picks = d->n_needles,
                                .picks = d->data.needle_at};
        kvc_op op;
        kvc_op_init(&op, NULL, NULL);
        memset(rows, 0, sizeof rows);
        status = kvc_fetch(d->client, &group, 1, region, NULL, NULL, 0, &op);
        status = status == KVC_OK ? kvc_op_wait(&op, 0) : status;
        for (uint32_t i = 0; i < d->n_needles && status == KVC_OK; i++) {
            nd_row(&d->data, layer, d->data.needle_at[i], want[0], want[1]);
            *equal_p += memcmp(rows[i], want, sizeof want) == 0;
        }
    }
    kvc_context_close(context);
    if (region && kvc_region_deregister(d->client, region) != KVC_OK && status == KVC_OK) {
        status = KVC_AGAIN;
    }
    free(names);
    return status;
}

static void report(const demo *d, const kvw_stats *before, const kvw_stats *now, double fill_s,
                   double ask_s, uint32_t found, uint32_t equal)
{
    double row_total = (double)d->n_tokens * d->n_layers * ND_ROW_BYTES;
    uint32_t asked = d->n_needles * d->n_layers;
    uint64_t misses = now->misses - before->misses;
    printf("\ncontext     %" PRIu32 " tokens x %" PRIu32 " layers, %.2f GB of keys and values\n",
           d->n_tokens, d->n_layers, row_total / 1e9);
    printf("stored in   %.1f s (%.2f GB/s, %.0f tokens/s)\n", fill_s, row_total / fill_s / 1e9,
           d->n_tokens / fill_s);
    printf("resident    %.1f MB in the worker: index %.1f, fetched rows %.1f, windows %.1f "
           "(%.1f %% of the context)\n",
           (double)(now->bytes_index + now->bytes_residency + now->bytes_window) / 1e6,
           (double)now->bytes_index / 1e6, (double)now->bytes_residency / 1e6,
           (double)now->bytes_window / 1e6,
           100.0 * (double)(now->bytes_index + now->bytes_residency + now->bytes_window) /
               row_total);
    printf("fetched     %.2f MB a token and layer: %" PRIu64 " rows missing of %" PRIu64
           " picked; from dram %" PRIu64 ", from lmdb %" PRIu64 "\n",
           (double)(now->bytes_fetched - before->bytes_fetched) / 1e6 / asked, misses,
           now->picks - before->picks, now->rows_dram - before->rows_dram,
           now->rows_lmdb - before->rows_lmdb);
    printf("a step      %.1f ms a layer: select %.1f, fetch %.1f, attend %.1f\n",
           ask_s * 1e3 / asked, (double)(now->ns_select - before->ns_select) / 1e6 / asked,
           (double)(now->ns_fetch_wait - before->ns_fetch_wait) / 1e6 / asked,
           (double)(now->ns_attend - before->ns_attend) / 1e6 / asked);
    printf("needles     %" PRIu32 " of %" PRIu32 " found (%" PRIu32 " needles in %" PRIu32
           " layers)\n",
           found, asked, d->n_needles, d->n_layers);
    printf("rows        %" PRIu32 " of %" PRIu32 " came back from the store bit for bit\n", equal,
           asked);
}

static int run(demo *d)
{
    kvc_status status = nd_init(&d->data, d->n_layers, d->n_tokens, d->n_needles, 1);
    if (status != KVC_OK) {
        return fail("plant needles", status,
                    "at least 64 tokens a needle are wanted, beside 4,224");
    }
    d->k = malloc((size_t)CHUNK_TOKENS * ND_KEY_DIM * sizeof *d->k);
    d->v = malloc((size_t)CHUNK_TOKENS * ND_KEY_DIM * sizeof *d->v);
    status = d->k && d->v ? write_projection(d) : KVC_NO_MEMORY;
    if (status != KVC_OK) {
        return fail(d->projection_path, status, "cannot write the projection");
    }
    if (open_all(d) != 0) {
        return 1;
    }
    uint64_t start_ns = kvc_now_ns();
    if (fill(d) != 0) {
        return 1;
    }
    double fill_s = (double)(kvc_now_ns() - start_ns) / 1e9;
    kvw_stats before = {.size_bytes = sizeof before}, now = {.size_bytes = sizeof now};
    uint32_t found = 0;
    status = kvw_seq_stats(d->seq, &before);
    start_ns = kvc_now_ns();
    for (uint32_t i = 0; i < d->n_needles && status == KVC_OK; i++) {
        status = ask(d, i, &found);
    }
    double ask_s = (double)(kvc_now_ns() - start_ns) / 1e9;
    if (status == KVC_OK) {
        status = kvw_seq_stats(d->seq, &now);
    }
    if (status != KVC_OK) {
        return fail("ask", status, kvw_last_error());
    }
    uint32_t equal = 0, asked = d->n_needles * d->n_layers;
    status = compare_rows(d, &equal);
    if (status != KVC_OK) {
        return fail("compare rows", status, kvc_last_error());
    }
    report(d, &before, &now, fill_s, ask_s, found, equal);
    return found == asked && equal == asked ? 0 : 1;
}

static int parse(int argc, char **argv, demo *d)
{
    static const struct option options[] = {{"projection", required_argument, NULL, 'p'},
                                            {"server", required_argument, NULL, 's'},
                                            {"tokens", required_argument, NULL, 't'},
                                            {"layers", required_argument, NULL, 'l'},
                                            {"needles", required_argument, NULL, 'n'},
                                            {"help", no_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    int c;
    while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        uint32_t *number = c == 't'   ? &d->n_tokens
                           : c == 'l' ? &d->n_layers
                           : c == 'n' ? &d->n_needles
                                      : NULL;
        if (number) {
            char *end = NULL;
            unsigned long value = strtoul(optarg, &end, 10);
            if (*end || value == 0 || value > 1u << 24) {
                fprintf(stderr, "needles: '%s' is not a number from 1 to 16777216\n", optarg);
                return 2;
            }
            *number = (uint32_t)value;
        } else if (c == 'p') {
            d->projection_path = optarg;
        } else if (c == 's') {
            d->server = optarg;
        } else {
            fputs(usage, c == 'h' ? stdout : stderr);
            return c == 'h' ? 0 : 2;
        }
    }
    if (!d->projection_path) {
        fputs(usage, stderr);
        return 2;
    }
    return -1;
}

int main(int argc, char **argv)
{
    demo d = {
        .server = "grpc://127.0.0.1:7811", .n_tokens = 1u << 20, .n_layers = 2, .n_needles = 16};
    int result = parse(argc, argv, &d);
    if (result >= 0) {
        return result;
    }
    result = run(&d);
    kvw_seq_destroy(d.seq);
    kvw_close(d.worker);
    kvc_client_close(d.client);
    nd_fini(&d.data);
    free(d.k);
    free(d.v);
    return result;
}
