/*
 * gpu_step_bench.c: decode steps of a worker on a GPU, its rows in a cachesvc of its own on this
 * host over shared memory: time of a step as the engine sees it, by share of resident picks, and
 * the GPU memory held beside what dense attention would hold.
 *
 * Llama-3-8B: 32 query heads, 8 kv heads, 128 dimensions, bf16 (rows of 4,096 bytes); ESA over an
 * index of 128 B/token, k = 2,048, 4,096 slots. Keys, values and queries are random. Resident
 * share: the same query again (100 %), a query that moves a little (about 95 %), a new one each
 * step (none but by chance). us: kvw_forward of one layer, the token's append included, with the
 * host waiting at its end, and tokens: kvw_tokens, both over STEPS tokens; then the same in parts,
 * append, and step: begin to finish, over a quarter of them. Medians; us with its 10th and 90th
 * percentiles; all but tokens divided by the layers.
 *
 * Arguments: --quick (a smoke test), --layers N, --recent N, numbers of tokens. Without arguments:
 * 128K and 1M tokens, one layer, 4,096 and 128 recent. Exits with 77 where there is no GPU.
 * Single-threaded.
 */
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "bench.h"
#include "daemon.h"
#include "kvw/worker.h"
#include "projection.h"

enum { HEADS = 32, KV_HEADS = 8, DIM = 128, DIMS = 126, K = 2048, STEPS = 200, CHUNK = 512 };
enum { ROW = 2 * KV_HEADS * DIM, Q = HEADS * DIM }; /* elements */

typedef struct gpu_bench {
    char folder[200], projection[256], shm[256];
    uint32_t n_tokens, n_layers, n_recent;
    support_daemon daemon;
    kvc_client *client;
    kvw_worker *worker;
    kvw_seq *seq;
    uint16_t *q, *base, *rows, *out; /* rows: K of a chunk, then V */
    uint64_t random;
    float times[3][STEPS]; /* us: tokens, append, step; of all layers */
} gpu_bench;

static void check(kvc_status st, const char *what)
{
    if (st != KVC_OK) {
        (void)fprintf(stderr, "gpu_step_bench: %s: %s (%s; %s)\n", what, kvc_status_name(st),
                      kvw_last_error(), kvc_last_error());
        exit(1);
    }
}

static uint64_t next(gpu_bench *b)
{
    b->random ^= b->random << 13;
    b->random ^= b->random >> 7;
    b->random ^= b->random << 17;
    return b->random;
}

/* bf16 numbers, +-[0.5, 2), four at a time. */
static void fill(gpu_bench *b, uint16_t *out, size_t n)
{
    for (size_t i = 0; i < n; i += 4) {
        uint64_t x = (next(b) & 0x80ff80ff80ff80ffull) | 0x3f003f003f003f00ull;
        memcpy(out + i, &x, sizeof(x));
    }
}

static float of_bf16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof(x));
    return x;
}

static uint16_t bf16_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* The base query moved by a share of a new random one. */
static void move_query(gpu_bench *b, float share)
{
    fill(b, b->q, Q);
    for (uint32_t i = 0; share < 1.0f && i < Q; i++)
        b->q[i] = bf16_of(of_bf16(b->base[i]) + share * of_bf16(b->q[i]));
}

static void write_projection(gpu_bench *b)
{
    size_t n = (size_t)b->n_layers * KV_HEADS * DIM * DIMS;
    kvwi_projection p = {.model = "gpu-bench",
                         .selector = "esa",
                         .n_layers = b->n_layers,
                         .n_kv_heads = KV_HEADS,
                         .head_dim = DIM,
                         .dims = DIMS,
                         .form = KVWI_SHARED,
                         .rope = (int32_t)b->n_recent,
                         .nested = true};
    p.a = p.b = malloc(n * sizeof(float));
    for (size_t i = 0; p.a != NULL && i < n; i++)
        p.a[i] = (float)(int32_t)next(b) * 0x1p-36f;
    (void)snprintf(b->projection, sizeof(b->projection), "%s/projection", b->folder);
    check(p.a == NULL ? KVC_NO_MEMORY : kvwi_projection_write(b->projection, &p), "projection");
    free(p.a);
}

static void start_server(gpu_bench *b)
{
    char dram[32];
    uint64_t bytes = (uint64_t)b->n_tokens * b->n_layers * (ROW * 2u + DIMS + 2u);
    (void)snprintf(b->folder, sizeof(b->folder), "/tmp/kvasir-gpu-bench-XXXXXX");
    if (mkdtemp(b->folder) == NULL)
        check(KVC_IO, "a folder in /tmp");
    (void)snprintf(b->shm, sizeof(b->shm), "shm://%s/shm.sock", b->folder);
    /* half of it may be mapped */
    (void)snprintf(dram, sizeof(dram), "%lluMiB", (unsigned long long)(bytes * 9 / 4 >> 20) + 1024);
    const char *args[] = {"--listen", b->shm, "--dram-bytes", dram, NULL};
    if (!support_daemon_start(&b->daemon, b->folder, args))
        exit(1);
    const kvc_client_opts opts = {
        .size_bytes = sizeof(opts), .uris = b->shm, .connect_timeout_ns = 60000000000ull};
    check(kvc_client_open(&opts, &b->client), "client");
}

static void end(gpu_bench *b)
{
    kvw_seq_destroy(b->seq);
    kvw_close(b->worker);
    kvc_client_close(b->client);
    (void)support_daemon_stop(&b->daemon, SIGTERM);
    bench_remove_tree(b->folder);
    free(b->q);
    free(b->base);
    free(b->out);
    free(b->rows);
}

static void open_worker(gpu_bench *b)
{
    const kvw_opts opts = {.size_bytes = sizeof(opts),
                           .model = "gpu-bench",
                           .n_layers = b->n_layers,
                           .n_q_heads = HEADS,
                           .n_kv_heads = KV_HEADS,
                           .head_dim = DIM,
                           .dtype = KVK_BF16,
                           .rope = {.theta = 500000.0},
                           .client = b->client,
                           .backend = "cuda",
                           .selector = "esa",
                           .projection_path = b->projection,
                           .n_recent = b->n_recent,
                           .k = K,
                           .put_window = 16,
                           .max_tokens = b->n_tokens + 4096u};
    kvc_status st = kvw_open(&opts, &b->worker);
    if (st == KVC_UNSUPPORTED) {
        printf("SKIPPED: %s\n", kvw_last_error());
        end(b);
        exit(77);
    }
    check(st, "kvw_open");
    uint32_t reused = 0;
    check(kvw_seq_create(b->worker, NULL, 0, &b->seq, &reused), "kvw_seq_create");
}

static void append(gpu_bench *b, uint32_t n)
{
    for (uint32_t layer = 0; layer < b->n_layers; layer++) {
        fill(b, b->rows, (size_t)n * ROW);
        check(kvw_append(b->seq, layer, b->rows, b->rows + (size_t)n * ROW / 2, n), "append");
    }
}

/* Nothing attends here: the rows are random anyway. */
static void prefill(gpu_bench *b)
{
    uint32_t tokens[CHUNK];
    for (uint32_t at = 0; at < b->n_tokens; at += CHUNK) {
        for (uint32_t i = 0; i < CHUNK; i++)
            tokens[i] = at + i;
        check(kvw_tokens(b->seq, tokens, CHUNK), "kvw_tokens");
        append(b, CHUNK);
    }
    check(kvw_flush(b->seq, kvc_deadline_ns(120000000000ull)), "kvw_flush");
}

static float us_since(uint64_t *t)
{
    uint64_t now = kvc_now_ns(), before = *t;
    *t = now;
    return (float)(now - before) * 1e-3f;
}

/* One token through every layer: in one call a layer, or in parts. */
static void step(gpu_bench *b, uint32_t i, float share, bool parts)
{
    uint32_t token = i;
    uint64_t t = kvc_now_ns();
    check(kvw_tokens(b->seq, &token, 1), "kvw_tokens");
    b->times[0][i] = us_since(&t);
    b->times[1][i] = b->times[2][i] = 0;
    for (uint32_t layer = 0; layer < b->n_layers; layer++) {
        kvw_step *open = NULL;
        if (share > 0)
            move_query(b, share);
        fill(b, b->rows, ROW);
        const uint16_t *v = b->rows + ROW / 2;
        t = kvc_now_ns();
        if (!parts) {
            check(kvw_forward(b->seq, layer, b->q, b->rows, v, 1, b->out, NULL), "kvw_forward");
            b->times[2][i] += us_since(&t);
            continue;
        }
        check(kvw_append(b->seq, layer, b->rows, v, 1), "append");
        b->times[1][i] += us_since(&t);
        check(kvw_step_begin(b->seq, layer, b->q, 1, &open), "begin");
        check(kvw_step_attend(open, b->q), "attend");
        check(kvw_step_finish(open, b->q, b->out, NULL), "finish");
        b->times[2][i] += us_since(&t);
    }
}

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static float middle(float *x, uint32_t n)
{
    qsort(x, n, sizeof(*x), by_value);
    return x[n / 2];
}

static kvw_stats stats_of(const gpu_bench *b)
{
    kvw_stats stats = {.size_bytes = sizeof(stats)};
    check(kvw_seq_stats(b->seq, &stats), "stats");
    return stats;
}

/* n steps; gives the resident share of their picks. */
static double steps(gpu_bench *b, uint32_t n, float share, bool parts)
{
    kvw_stats before = stats_of(b);
    for (uint32_t i = 0; i < n; i++)
        step(b, i, share, parts);
    kvw_stats after = stats_of(b);
    return (double)(after.hits - before.hits) / (double)(after.picks - before.picks);
}

/* How far the query has to move for some 5 % of the picks to miss. */
static float find_share(gpu_bench *b)
{
    float low = 0, high = 0.5f;
    for (int i = 0; i < 7; i++) {
        float mid = (low + high) / 2;
        (void)steps(b, 3, mid, false);
        if (steps(b, 5, mid, false) > 0.95)
            low = mid;
        else
            high = mid;
    }
    return (low + high) / 2;
}

static void report(gpu_bench *b, uint32_t n, float share)
{
    float layers = (float)b->n_layers;
    (void)steps(b, n / 4, share, true);
    float append_us = middle(b->times[1], n / 4), parts_us = middle(b->times[2], n / 4);
    kvw_stats before = stats_of(b);
    double hits = steps(b, n, share, false);
    kvw_stats after = stats_of(b);
    float forward_us = middle(b->times[2], n);
    printf("%8u %6u %6u %6.1f %9.1f %9.1f %9.1f %9.1f %9.1f %9.1f %6.2f\n", b->n_tokens,
           b->n_layers, b->n_recent, 100 * hits, (double)(forward_us / layers),
           (double)(b->times[2][n / 10] / layers), (double)(b->times[2][n * 9 / 10] / layers),
           (double)(append_us / layers), (double)(parts_us / layers),
           (double)middle(b->times[0], n),
           (double)(after.host_syncs - before.host_syncs) /
               (double)(after.steps_device - before.steps_device));
    (void)fflush(stdout);
}

static void run(uint32_t n_tokens, uint32_t n_layers, uint32_t n_recent, bool quick)
{
    gpu_bench b = {.n_tokens = n_tokens,
                   .n_layers = n_layers,
                   .n_recent = n_recent,
                   .random = 88172645463325252ull};
    uint32_t n = quick ? 10 : STEPS;
    b.q = malloc(Q * 2u);
    b.base = malloc(Q * 2u);
    b.out = malloc(Q * 2u);
    b.rows = malloc((size_t)CHUNK * ROW * 2u);
    fill(&b, b.base, Q);
    memcpy(b.q, b.base, Q * 2u);
    start_server(&b);
    write_projection(&b);
    open_worker(&b);
    uint64_t t = kvc_now_ns();
    prefill(&b);
    float prefill_s = us_since(&t) * 1e-6f;
    step(&b, 0, 0, false);
    printf("# %u tokens, %u layers put in %.1f s; the first decode step took %.1f ms\n", n_tokens,
           n_layers, (double)prefill_s, (double)us_since(&t) * 1e-3);
    report(&b, n, 0);
    report(&b, n, quick ? 0.1f : find_share(&b));
    report(&b, n, 1.0f);
    kvw_stats s = stats_of(&b);
    printf("# GPU memory of the sequence: %.2f GB; dense attention would hold %.2f GB; full or "
           "host steps %llu\n",
           (double)s.bytes_device * 1e-9, (double)n_tokens * n_layers * ROW * 2e-9,
           (unsigned long long)(s.steps - s.steps_device));
    end(&b);
}

int main(int argc, char **argv)
{
    uint32_t n_layers = 1, n_recent = 0, n_runs = 0;
    bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    printf("%8s %6s %6s %6s %9s %9s %9s %9s %9s %9s %6s\n", "tokens", "layers", "recent", "hit%",
           "us", "10th", "90th", "append", "step", "tokens", "syncs");
    if (quick) {
        run(16384, 1, 512, true);
        return 0;
    }
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--layers") == 0 && i + 1 < argc) {
            n_layers = (uint32_t)strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--recent") == 0 && i + 1 < argc) {
            n_recent = (uint32_t)strtoul(argv[++i], NULL, 10);
        } else {
            run((uint32_t)strtoul(argv[i], NULL, 10), n_layers, n_recent ? n_recent : 4096, false);
            n_runs++;
        }
    }
    for (uint32_t n = 1u << 17; n_runs == 0 && n <= 1u << 20; n *= 8) {
        run(n, n_layers, n_recent ? n_recent : 4096, false);
        if (n_recent == 0)
            run(n, n_layers, 128, false);
    }
    return 0;
}
