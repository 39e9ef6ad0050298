/*
 * gpu_step_bench.c: decode steps of a worker on a GPU, its rows in a cachesvc of its own on this
 * host over shared memory: time of a step as the engine sees it, by share of resident picks, and
 * the GPU memory held beside what dense attention would hold.
 *
 * Llama-3-8B: 32 query heads, 8 kv heads, 128 dimensions, bf16 (rows of 4,096 bytes); ESA over an
 * index of 128 B/token, or TokenSelect over one of 272, k = 2,048, 4,096 slots. Queries are random,
 * keys and values are taken anywhere from a pool of random numbers, which is quicker. Resident
 * share: the same query again (100 %), a query that moves a little (about 95 %), a new one each
 * step (none but by chance). us: kvw_forward of one layer, the token's append included, with the
 * host waiting at its end, and tokens: kvw_tokens, both over 200 tokens; then the same in parts,
 * append, and step: begin to finish, over a quarter of them. Medians; us with its 10th and 90th
 * percentiles; all but tokens divided by the layers.
 *
 * With a batch, us is kvw_batch_forward of a token of each sequence, of which the first was put and
 * the others found its prefix; there are no parts then.
 *
 * --far WAY: nothing is mapped, so what is not resident comes by request (shm), or is attended over
 * by the server's CPU (near) or its GPU (near-gpu), which leaves nothing resident; only new queries
 * are timed then.
 *
 * Arguments: --quick (a smoke test), --selector esa or tokenselect, --theta X (of its
 * Selection Cache), --rerank N (TokenSelect over 16 dims a head of which N * k are ranked again by
 * 48: 544 B/token), --layers N, --recent N, --batch N, --steps N, --rows bf16, i8
 * or e4m3, --far shm, near or near-gpu, numbers of tokens. Without arguments: 128K and 1M tokens,
 * one layer, 4,096 and 128 recent. Exits with 77 where there is no GPU. Single-threaded.
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

enum { HEADS = 32, KV_HEADS = 8, DIM = 128, K = 2048, CHUNK = 512 };
enum { ESA_DIMS = 126, VOTE_DIMS = 32 };    /* of an index row, of one head */
enum { COARSE_DIMS = 16, FINER_DIMS = 48 }; /* of two levels */
enum { STEPS_MAX = 1000, BATCH_MAX = 64 };
enum { ROW = 2 * KV_HEADS * DIM, Q = HEADS * DIM }; /* elements */
enum { POOL_MAX = 1 << 27 };                        /* likewise; a row may begin at every eighth */

typedef struct gpu_shape {
    uint32_t n_tokens, n_layers, n_recent, n_seqs, n_steps;
    kvk_dtype rows;  /* 0: bf16 */
    const char *far; /* NULL: rows are mapped */
    bool votes;      /* TokenSelect */
    uint32_t factor; /* of re-ranking; 0: an index of one level */
    double theta;
    bool quick;
} gpu_shape;

typedef struct gpu_bench {
    char folder[200], projection[256], shm[256];
    uint32_t n_tokens, n_layers, n_recent, n_seqs, row_bytes;
    kvk_dtype row_dtype;
    const char *far;
    bool votes;
    uint32_t factor;
    double theta;
    support_daemon daemon;
    kvc_client *client;
    kvw_worker *worker;
    kvw_seq *seq, *seqs[BATCH_MAX];  /* seq is the first */
    kvw_batch *batch;                /* NULL: one sequence */
    uint16_t *q, *base, *rows, *out; /* of all sequences; rows: K of them, then V */
    uint16_t *pool;                  /* [n_pool] keys and values of prefill */
    uint64_t n_pool, random;
    float put_s[4];            /* of prefill: tokens, append, flush, all */
    float times[3][STEPS_MAX]; /* us: tokens, append, step; of all layers */
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
    fill(b, b->q, (size_t)b->n_seqs * Q);
    for (uint32_t i = 0; share < 1.0f && i < b->n_seqs * Q; i++)
        b->q[i] = bf16_of(of_bf16(b->base[i]) + share * of_bf16(b->q[i]));
}

static const char *selector_of(const gpu_bench *b)
{
    return b->votes ? "tokenselect" : "esa";
}

static uint32_t index_bytes(const gpu_bench *b)
{
    uint32_t votes = b->factor ? COARSE_DIMS + FINER_DIMS + 4u : VOTE_DIMS + 2u;
    return b->votes ? KV_HEADS * votes : ESA_DIMS + 2u;
}

static void write_projection(gpu_bench *b)
{
    uint32_t dims = b->factor ? FINER_DIMS : b->votes ? VOTE_DIMS : ESA_DIMS;
    size_t n = (size_t)b->n_layers * KV_HEADS * DIM * dims;
    kvwi_projection p = {.model = "gpu-bench",
                         .n_layers = b->n_layers,
                         .n_kv_heads = KV_HEADS,
                         .head_dim = DIM,
                         .dims = dims,
                         .form = b->votes ? KVWI_PER_HEAD : KVWI_SHARED,
                         .rope = (int32_t)b->n_recent,
                         .nested = true};
    (void)snprintf(p.selector, sizeof(p.selector), "%s", selector_of(b));
    p.a = p.b = malloc(n * sizeof(float));
    for (size_t i = 0; p.a != NULL && i < n; i++)
        p.a[i] = (float)(int32_t)next(b) * (b->votes ? 0x1p-34f : 0x1p-36f);
    (void)snprintf(b->projection, sizeof(b->projection), "%s/projection", b->folder);
    check(p.a == NULL ? KVC_NO_MEMORY : kvwi_projection_write(b->projection, &p), "projection");
    free(p.a);
}

static void start_server(gpu_bench *b)
{
    char dram[32];
    uint64_t value = (uint64_t)b->n_tokens * b->n_layers * (b->row_bytes + index_bytes(b));
    uint64_t bytes = value * b->n_seqs; /* there once, and pinned for each sequence that maps it */
    (void)snprintf(b->folder, sizeof(b->folder), "/tmp/kvasir-gpu-bench-XXXXXX");
    if (mkdtemp(b->folder) == NULL)
        check(KVC_IO, "a folder in /tmp");
    (void)snprintf(b->shm, sizeof(b->shm), "shm://%s/shm.sock", b->folder);
    /* half of it may be mapped */
    (void)snprintf(dram, sizeof(dram), "%lluMiB", (unsigned long long)(bytes * 9 / 4 >> 20) + 1024);
    bool by_gpu = b->far != NULL && strcmp(b->far, "near-gpu") == 0;
    const char *args[] = {"--listen",
                          b->shm,
                          "--dram-bytes",
                          dram,
                          "--attend-gpu-bytes",
                          by_gpu ? dram : "0",
                          "--max-map-pin-bytes",
                          b->far != NULL ? "1" : "0",
                          NULL};
    if (!support_daemon_start(&b->daemon, b->folder, args))
        exit(1);
    const kvc_client_opts opts = {
        .size_bytes = sizeof(opts), .uris = b->shm, .connect_timeout_ns = 60000000000ull};
    check(kvc_client_open(&opts, &b->client), "client");
}

static void end(gpu_bench *b)
{
    kvw_batch_close(b->batch);
    for (uint32_t i = 0; i < b->n_seqs; i++)
        kvw_seq_destroy(b->seqs[i]);
    kvw_close(b->worker);
    kvc_client_close(b->client);
    (void)support_daemon_stop(&b->daemon, SIGTERM);
    bench_remove_tree(b->folder);
    free(b->q);
    free(b->base);
    free(b->out);
    free(b->rows);
    free(b->pool);
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
                           .selector = selector_of(b),
                           .index = b->factor ? KVW_INDEX_RERANKED : KVW_INDEX_COMPRESSED,
                           .index_dims = b->factor ? COARSE_DIMS : 0,
                           .rerank_factor = b->factor,
                           .reselect_cos = b->theta,
                           .projection_path = b->projection,
                           .way = b->far == NULL               ? NULL
                                  : strcmp(b->far, "shm") == 0 ? "shm"
                                                               : "near",
                           .n_recent = b->n_recent,
                           .k = K,
                           .put_window = 16,
                           .max_tokens = b->n_tokens + 4096u,
                           .row_dtype = (uint64_t)b->row_dtype};
    kvc_status st = kvw_open(&opts, &b->worker);
    if (st == KVC_UNSUPPORTED) {
        printf("SKIPPED: %s\n", kvw_last_error());
        end(b);
        exit(77);
    }
    check(st, "kvw_open");
    uint32_t reused = 0;
    check(kvw_seq_create(b->worker, NULL, 0, &b->seq, &reused), "kvw_seq_create");
    b->seqs[0] = b->seq;
}

static float us_since(uint64_t *t)
{
    uint64_t now = kvc_now_ns(), before = *t;
    *t = now;
    return (float)(now - before) * 1e-3f;
}

static const uint16_t *of_pool(gpu_bench *b)
{
    return b->pool + next(b) % (b->n_pool - (uint64_t)CHUNK * ROW / 2u) / 8u * 8u;
}

/* Nothing attends here: the rows are random anyway. */
static void prefill(gpu_bench *b, kvw_seq *seq, uint32_t from)
{
    uint32_t tokens[CHUNK];
    uint64_t t = kvc_now_ns(), first = t;
    for (uint32_t at = from; at < b->n_tokens; at += CHUNK) {
        for (uint32_t i = 0; i < CHUNK; i++)
            tokens[i] = at + i;
        check(kvw_tokens(seq, tokens, CHUNK), "kvw_tokens");
        b->put_s[0] += us_since(&t) * 1e-6f;
        for (uint32_t layer = 0; layer < b->n_layers; layer++)
            check(kvw_append(seq, layer, of_pool(b), of_pool(b), CHUNK), "append");
        b->put_s[1] += us_since(&t) * 1e-6f;
    }
    check(kvw_flush(seq, kvc_deadline_ns(120000000000ull)), "kvw_flush");
    b->put_s[2] += us_since(&t) * 1e-6f;
    b->put_s[3] += us_since(&first) * 1e-6f;
}

/* The other sequences find what the first one put. */
static void open_others(gpu_bench *b)
{
    uint32_t reused = 0, *tokens = malloc(b->n_tokens * sizeof(*tokens));
    for (uint32_t i = 0; tokens != NULL && i < b->n_tokens; i++)
        tokens[i] = i;
    for (uint32_t i = 1; i < b->n_seqs; i++) {
        check(tokens == NULL ? KVC_NO_MEMORY
                             : kvw_seq_create(b->worker, tokens, b->n_tokens, &b->seqs[i], &reused),
              "kvw_seq_create");
        prefill(b, b->seqs[i], reused);
    }
    free(tokens);
    if (b->n_seqs > 1)
        check(kvw_batch_open(b->worker, b->n_seqs, NULL, &b->batch), "kvw_batch_open");
}

static void step_parts(gpu_bench *b, uint32_t layer, uint32_t i, const uint16_t *v)
{
    kvw_step *open = NULL;
    uint64_t t = kvc_now_ns();
    check(kvw_append(b->seq, layer, b->rows, v, 1), "append");
    b->times[1][i] += us_since(&t);
    check(kvw_step_begin(b->seq, layer, b->q, 1, &open), "begin");
    check(kvw_step_attend(open, b->q), "attend");
    check(kvw_step_finish(open, b->q, b->out, NULL), "finish");
    b->times[2][i] += us_since(&t);
}

/* One token of each sequence through every layer: in one call a layer, or in parts. */
static void step(gpu_bench *b, uint32_t i, float share, bool parts)
{
    uint32_t token = i;
    uint64_t t = kvc_now_ns();
    for (uint32_t s = 0; s < b->n_seqs; s++)
        check(kvw_tokens(b->seqs[s], &token, 1), "kvw_tokens");
    b->times[0][i] = us_since(&t);
    b->times[1][i] = b->times[2][i] = 0;
    for (uint32_t layer = 0; layer < b->n_layers; layer++) {
        if (share > 0)
            move_query(b, share);
        fill(b, b->rows, (size_t)b->n_seqs * ROW);
        const uint16_t *v = b->rows + (size_t)b->n_seqs * ROW / 2;
        if (parts && b->batch == NULL) {
            step_parts(b, layer, i, v);
            continue;
        }
        t = kvc_now_ns();
        check(b->batch != NULL ? kvw_batch_forward(b->batch, b->seqs, b->n_seqs, layer, b->q,
                                                   b->rows, v, b->out, NULL)
                               : kvw_forward(b->seq, layer, b->q, b->rows, v, 1, b->out, NULL),
              "a step");
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
    printf("%8u %6u %6u %6u %6.1f %9.1f %9.1f %9.1f %9.1f %9.1f %9.1f %6.2f\n", b->n_tokens,
           b->n_seqs, b->n_layers, b->n_recent, 100 * hits, (double)(forward_us / layers),
           (double)(b->times[2][n / 10] / layers), (double)(b->times[2][n * 9 / 10] / layers),
           (double)(append_us / layers), (double)(parts_us / layers),
           (double)middle(b->times[0], n),
           (double)(after.host_syncs - before.host_syncs) /
               (double)(after.steps_device - before.steps_device));
    double per_step = 1e-3 / (double)(after.steps_device - before.steps_device);
    printf("# of us, means: append %.1f, begin %.1f, finish %.1f; %.0f %% of the steps selected\n",
           per_step * (double)(after.ns_append - before.ns_append),
           per_step * (double)(after.ns_select - before.ns_select),
           per_step * (double)(after.ns_attend - before.ns_attend),
           100 * (double)(after.reselects - before.reselects) /
               (double)(after.steps - before.steps));
    (void)fflush(stdout);
}

static void run(const gpu_shape *shape)
{
    gpu_bench b = {.n_tokens = shape->n_tokens,
                   .n_layers = shape->n_layers,
                   .n_recent = shape->n_recent,
                   .n_seqs = shape->n_seqs,
                   .row_dtype = shape->rows,
                   .far = shape->far,
                   .votes = shape->votes,
                   .factor = shape->factor,
                   .theta = shape->theta,
                   .row_bytes = shape->rows == 0 ? ROW * 2u : 2u * KV_HEADS * (DIM + 2u),
                   .random = 88172645463325252ull};
    size_t q_bytes = (size_t)b.n_seqs * Q * 2u;
    b.q = malloc(q_bytes);
    b.base = malloc(q_bytes);
    b.out = malloc(q_bytes);
    b.rows = malloc((size_t)BATCH_MAX * ROW * 2u);
    b.n_pool = (uint64_t)b.n_tokens * ROW < POOL_MAX ? (uint64_t)b.n_tokens * ROW : POOL_MAX;
    b.pool = malloc(b.n_pool * 2u);
    fill(&b, b.pool, b.n_pool);
    fill(&b, b.base, (size_t)b.n_seqs * Q);
    memcpy(b.q, b.base, q_bytes);
    start_server(&b);
    write_projection(&b);
    open_worker(&b);
    prefill(&b, b.seq, 0);
    printf("# %u tokens, %u layers put in %.1f s: kvw_tokens %.1f, kvw_append %.1f, kvw_flush "
           "%.1f\n",
           b.n_tokens, b.n_layers, (double)b.put_s[3], (double)b.put_s[0], (double)b.put_s[1],
           (double)b.put_s[2]);
    uint64_t t = kvc_now_ns();
    open_others(&b);
    float others_s = us_since(&t) * 1e-6f;
    step(&b, 0, 0, false);
    printf("# the other sequences opened in %.1f s; the first decode step took %.1f ms\n",
           (double)others_s, (double)us_since(&t) * 1e-3);
    (void)fflush(stdout);
    if (b.far == NULL) {
        report(&b, shape->n_steps, 0);
        report(&b, shape->n_steps, shape->quick ? 0.1f : find_share(&b));
    }
    report(&b, shape->n_steps, 1.0f);
    kvw_stats s = stats_of(&b);
    if (b.far != NULL)
        printf("# %s: %llu of %llu misses were attended over there, %llu steps fell back\n", b.far,
               (unsigned long long)s.rows_near, (unsigned long long)s.misses,
               (unsigned long long)s.way_fallbacks);
    printf("# GPU memory of a sequence: %.2f GB; dense attention would hold %.2f GB; full or "
           "host steps %llu\n",
           (double)s.bytes_device * 1e-9, (double)b.n_tokens * b.n_layers * ROW * 2e-9,
           (unsigned long long)(s.steps - s.steps_device));
    end(&b);
}

/* With both windows where none is asked for. */
static void run_windows(gpu_shape shape)
{
    bool both = shape.n_recent == 0;
    shape.n_recent = both ? 4096 : shape.n_recent;
    run(&shape);
    shape.n_recent = 128;
    if (both)
        run(&shape);
}

static uint32_t clamp(const char *text, uint32_t least, uint32_t most)
{
    unsigned long x = strtoul(text, NULL, 10);
    return x < least ? least : x > most ? most : (uint32_t)x;
}

int main(int argc, char **argv)
{
    gpu_shape shape = {.n_layers = 1, .n_seqs = 1, .n_steps = 200};
    uint32_t n_runs = 0;
    printf("%8s %6s %6s %6s %6s %9s %9s %9s %9s %9s %9s %6s\n", "tokens", "seqs", "layers",
           "recent", "hit%", "us", "10th", "90th", "append", "step", "tokens", "syncs");
    if (argc > 1 && strcmp(argv[1], "--quick") == 0) {
        shape = (gpu_shape){.n_tokens = 16384,
                            .n_layers = 1,
                            .n_recent = 512,
                            .n_seqs = 1,
                            .n_steps = 10,
                            .quick = true};
        run(&shape);
        shape.votes = true;
        shape.n_seqs = 3;
        run(&shape);
        shape.factor = 2;
        run(&shape);
        return 0;
    }
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--layers") == 0 && i + 1 < argc) {
            shape.n_layers = clamp(argv[++i], 1, 1000);
        } else if (strcmp(argv[i], "--recent") == 0 && i + 1 < argc) {
            shape.n_recent = clamp(argv[++i], 1, 1u << 20);
        } else if (strcmp(argv[i], "--batch") == 0 && i + 1 < argc) {
            shape.n_seqs = clamp(argv[++i], 1, BATCH_MAX);
        } else if (strcmp(argv[i], "--steps") == 0 && i + 1 < argc) {
            shape.n_steps = clamp(argv[++i], 8, STEPS_MAX);
        } else if (strcmp(argv[i], "--far") == 0 && i + 1 < argc) {
            shape.far = argv[++i];
        } else if (strcmp(argv[i], "--selector") == 0 && i + 1 < argc) {
            shape.votes = strcmp(argv[++i], "tokenselect") == 0;
        } else if (strcmp(argv[i], "--rerank") == 0 && i + 1 < argc) {
            shape.votes = true;
            shape.factor = clamp(argv[++i], 1, 8);
        } else if (strcmp(argv[i], "--theta") == 0 && i + 1 < argc) {
            shape.theta = strtod(argv[++i], NULL);
        } else if (strcmp(argv[i], "--rows") == 0 && i + 1 < argc) {
            i++;
            shape.rows = strcmp(argv[i], "i8") == 0     ? KVK_I8_SCALED
                         : strcmp(argv[i], "e4m3") == 0 ? KVK_E4M3_SCALED
                                                        : (kvk_dtype)0;
        } else {
            shape.n_tokens = clamp(argv[i], CHUNK, 1u << 24) / CHUNK * CHUNK;
            run_windows(shape);
            n_runs++;
        }
    }
    for (uint32_t n = 1u << 17; n_runs == 0 && n <= 1u << 20; n *= 8) {
        shape.n_tokens = n;
        run_windows(shape);
    }
    return 0;
}
