/*
 * near_bench.c: attention beside the data at Llama-3-8B's shape, 2,048 rows of 4 KiB.
 *
 * One core attending over random rows beside the same core reading such rows, in memory that is
 * asked for as the dram tier asks for its own (huge pages, where the system gives them;
 * --small-pages: 4 KiB); bytes on the wire both ways beside those of fetching the rows, and from
 * how many misses on they are fewer; and the time of a layer's misses by both ways over a server in
 * this process. Everything single-threaded but the server and the client's transport.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "base/arena.h"
#include "base/clock.h"
#include "base/log.h"
#include "bench.h"
#include "kvc/client.h"
#include "kvk/compute.h"
#include "server.h"
#include "wire/wire.h"

enum { Q_HEADS = 32, KV_HEADS = 8, DIM = 128, ROW = 2 * KV_HEADS * DIM * 2, TOKENS = 256 };

static uint32_t n_rows = 2048, n_blocks = 1024, n_runs = 31;
static uint64_t seed = 1;

static void *get(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (p == NULL)
        bench_die("memory");
    return p;
}

static void must(kvc_status status, const char *what)
{
    if (status == KVC_OK)
        return;
    fprintf(stderr, "%s: %s: %s\n", what, kvc_status_name(status), kvc_last_error());
    exit(1);
}

static void fill(uint16_t *at, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float x = (float)(bench_random(&seed) % 2048) / 1024.0f - 1.0f;
        kvk_from_f32(&x, 1, KVK_BF16, at + i);
    }
}

/* Distinct enough and ascending, as a selector picks them. */
static void choose(uint32_t *picks, uint32_t n, uint32_t n_tokens)
{
    for (uint32_t i = 0; i < n; i++)
        picks[i] = (uint32_t)(((uint64_t)i * n_tokens + bench_random(&seed) % n_tokens) / n);
}

/* ---- one core -------------------------------------------------------------------------------- */

/* Not inlined, so that the sum is not left out. */
__attribute__((noinline)) static uint64_t read_rows(const void *const *rows, uint32_t n)
{
    uint64_t sum[8] = {0};
    for (uint32_t i = 0; i < n; i++) {
        const uint64_t *at = rows[i];
        for (uint32_t j = 0; j < ROW / 8; j += 8)
            for (uint32_t k = 0; k < 8; k++)
                sum[k] += at[j + k];
    }
    return sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
}

static double gbs(uint64_t ns)
{
    return (double)n_rows * ROW / (double)ns;
}

/* CPU time: what else the machine does is not this core's. */
static uint64_t core_ns(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void bench_core(const uint16_t *store, bool rope)
{
    bench_series read = {0}, attend = {0}, share = {0};
    kvk_backend *be;
    const kvk_backend_opts opts = {.size_bytes = sizeof(opts), .n_threads = 1};
    const void **rows = get(n_rows * sizeof(*rows));
    uint32_t *picks = get(n_rows * sizeof(*picks));
    int32_t *positions = get(n_rows * sizeof(*positions));
    double freq[DIM / 2];
    float *q = get(Q_HEADS * DIM * sizeof(float)), *o = get(Q_HEADS * DIM * sizeof(float));
    float lse[Q_HEADS];
    volatile uint64_t sink = 0;
    must(kvk_backend_open("cpu", &opts, &be), "backend");
    must(kvk_rope_inv_freq(&(kvk_rope_params){.theta = 500000}, DIM, freq), "rope");
    for (uint32_t i = 0; i < Q_HEADS * DIM; i++)
        q[i] = (float)(bench_random(&seed) % 2048) / 1024.0f - 1.0f;
    const kvk_attend_args args = {.q = q,
                                  .n_q = 1,
                                  .n_q_heads = Q_HEADS,
                                  .n_kv_heads = KV_HEADS,
                                  .head_dim = DIM,
                                  .rows = rows,
                                  .n_kv = n_rows,
                                  .v_off_bytes = ROW / 2,
                                  .dtype = KVK_BF16,
                                  .k_positions = rope ? positions : NULL,
                                  .inv_freq = rope ? freq : NULL,
                                  .scale = 1 / sqrtf(DIM),
                                  .o = o,
                                  .lse = lse};
    for (uint32_t run = 0; run < n_runs + 1; run++) {
        uint64_t took[2];
        for (int what = 0; what < 2; what++) {
            /* rows of their own each time: neither finds them in a cache */
            choose(picks, n_rows, n_blocks * TOKENS);
            for (uint32_t i = 0; i < n_rows; i++) {
                rows[i] = store + (size_t)picks[i] * (ROW / 2);
                positions[i] = (int32_t)i;
            }
            uint64_t start = core_ns();
            if (what == 0)
                sink += read_rows(rows, n_rows);
            else
                must(kvk_backend_ops(be)->attend(be, &args, NULL), "attend");
            took[what] = core_ns() - start;
        }
        if (run == 0)
            continue;
        bench_add(&read, gbs(took[0]));
        bench_add(&attend, gbs(took[1]));
        bench_add(&share, (double)took[0] / (double)took[1]);
    }
    printf(
        "one core (%s)%s: reads %.1f GB/s, attends %.1f GB/s = %.2f M rows/s; median share %.2f\n",
        kvk_backend_isa(be), rope ? ", keys rotated" : "", bench_median(&read),
        bench_median(&attend), bench_median(&attend) * 1e3 / ROW, bench_median(&share));
    (void)sink; /* read, or the rows need not have been */
    kvk_backend_close(be);
    free(rows);
    free(picks);
    free(positions);
    free(q);
    free(o);
}

/* ---- bytes ----------------------------------------------------------------------------------- */

static size_t request_bytes(const kvc_request *req)
{
    kvc_arena arena;
    const void *head;
    size_t head_bytes;
    kvc_arena_init(&arena, 64u << 20);
    must(kvc_wire_encode_request(req, &arena, &head, &head_bytes), "encode");
    kvc_arena_reset(&arena);
    return head_bytes + req->data_bytes;
}

static size_t reply_bytes(const kvc_reply *reply)
{
    kvc_arena arena;
    const void *head;
    size_t head_bytes;
    kvc_arena_init(&arena, 64u << 20);
    must(kvc_wire_encode_reply(reply, &arena, &head, &head_bytes), "encode");
    kvc_arena_reset(&arena);
    return head_bytes + reply->data_bytes;
}

/* Both ways of n misses fetched, in messages of 1 MiB. */
static size_t rows_bytes(const uint32_t *picks, uint32_t n)
{
    size_t bytes = 0;
    for (uint32_t at = 0; at < n; at += (1u << 20) / ROW) {
        uint32_t m = n - at < (1u << 20) / ROW ? n - at : (1u << 20) / ROW;
        const kvc_row_group group = {1ull << 60, 7, m, picks + at};
        kvc_request req = {.method = KVC_FETCH_ROWS};
        kvc_reply reply = {.method = KVC_FETCH_ROWS, .data_bytes = (uint64_t)m * ROW};
        req.u.fetch_rows.n_groups = 1;
        req.u.fetch_rows.groups = &group;
        reply.u.fetch_rows.rows_dram = m;
        bytes += request_bytes(&req) + reply_bytes(&reply);
    }
    return bytes;
}

static size_t near_bytes(const uint32_t *picks, const uint32_t *ranks, uint32_t n)
{
    static const uint32_t position = 4096;
    const kvc_row_group group = {1ull << 60, 7, n, picks};
    const kvc_attend_query query = {1,     Q_HEADS, KVC_DTYPE_BF16, KVC_DTYPE_BF16,
                                    false, ranks,   &position};
    kvc_request req = {.method = KVC_ATTEND_ROWS, .data_bytes = Q_HEADS * DIM * 2};
    kvc_reply reply = {.method = KVC_ATTEND_ROWS, .data_bytes = Q_HEADS * (DIM * 2 + 4)};
    req.u.fetch_rows.n_groups = 1;
    req.u.fetch_rows.groups = &group;
    req.u.fetch_rows.queries = &query;
    reply.u.fetch_rows.rows_dram = n;
    return request_bytes(&req) + reply_bytes(&reply);
}

static void bench_bytes(void)
{
    uint32_t *picks = get(2048 * sizeof(*picks)), *ranks = get(2048 * sizeof(*ranks)), from = 1;
    choose(picks, 2048, 1u << 20);
    for (uint32_t i = 0; i < 2048; i++)
        ranks[i] = 128 + i;
    size_t rows = rows_bytes(picks, 2048), near = near_bytes(picks, NULL, 2048);
    size_t ranked = near_bytes(picks, ranks, 2048);
    while (near_bytes(picks, NULL, from) >= rows_bytes(picks, from))
        from++;
    printf(
        "bytes of 2,048 misses, both ways: rows %zu, near %zu (1/%.0f), with ranks %zu (1/%.0f); "
        "fewer from %u misses on\n",
        rows, near, (double)rows / (double)near, ranked, (double)rows / (double)ranked, from);
    free(picks);
    free(ranks);
}

/* ---- both ways over a server ------------------------------------------------------------------
 */

typedef struct end {
    kvs_settings settings;
    kvc_config *config;
    kvs_server *server;
    kvc_client *client;
    kvc_context *context;
    kvc_region *region;
    uint8_t *out;
} end;

static void open_end(end *e, uint16_t *store)
{
    kvc_part part = {.part = 7,
                     .kind = KVC_PART_KV,
                     .dtype = KVC_DTYPE_BF16,
                     .kv_head_count = KV_HEADS,
                     .row_bytes = ROW,
                     .k_len_bytes = ROW / 2,
                     .v_off_bytes = ROW / 2,
                     .v_len_bytes = ROW / 2,
                     .q_dim = DIM,
                     .v_dim = DIM,
                     .rope = {.type = KVC_ROPE_PLAIN, .theta = 500000}};
    const kvc_schema schema = {.model = "bench",
                               .revision = "",
                               .recipe = "full",
                               .tp_size = 1,
                               .block_tokens = TOKENS,
                               .n_parts = 1,
                               .parts = &part};
    kvc_digest digest, *blocks = get(n_blocks * sizeof(*blocks));
    kvc_value *values = get(n_blocks * sizeof(*values));
    int8_t *status = get(n_blocks);
    kvc_region *region;
    kvc_op op;
    must(kvs_settings_defaults(&e->settings, &e->config), "settings");
    e->settings.listen = NEAR_BENCH_URI;
    e->settings.dram_bytes = ((uint64_t)n_blocks + 128) << 20;
    must(kvs_server_open(&e->settings, &e->server), "server");
    must(kvs_server_listen(e->server), "listen");
    const kvc_client_opts opts = {.size_bytes = sizeof(opts), .uris = kvs_server_uri(e->server, 0)};
    must(kvc_client_open(&opts, &e->client), "client");
    must(kvc_schema_register(e->client, &schema, 0, &digest), "schema");
    for (uint32_t i = 0; i < n_blocks; i++) {
        memset(&blocks[i], 0, sizeof(blocks[i]));
        memcpy(blocks[i].bytes, &i, sizeof(i));
        values[i] = (kvc_value){blocks[i], 7, TOKENS * ROW, (size_t)i * TOKENS * ROW};
    }
    const kvc_region_desc in = {sizeof(in), store, (size_t)n_blocks * TOKENS * ROW, KVC_MEMORY_HOST,
                                0};
    must(kvc_region_register(e->client, &in, &region), "region");
    kvc_op_init(&op, NULL, NULL);
    must(kvc_put(e->client, &digest, KVC_PROMISE_MEMORY, values, n_blocks, region, status,
                 kvc_deadline_ns(120000000000ull), &op),
         "put");
    must(kvc_op_wait(&op, 0), "put");
    must(kvc_region_deregister(e->client, region), "region");
    must(kvc_context_open(e->client, &digest, blocks, n_blocks, 0, 0, &e->context), "context");
    e->out = get((size_t)n_rows * ROW);
    const kvc_region_desc out = {sizeof(out), e->out, (size_t)n_rows * ROW, KVC_MEMORY_HOST, 0};
    must(kvc_region_register(e->client, &out, &e->region), "region");
    free(blocks);
    free(values);
    free(status);
}

static void close_end(end *e)
{
    (void)kvc_region_deregister(e->client, e->region);
    kvc_context_close(e->context);
    kvc_client_close(e->client);
    kvs_server_drain(e->server, kvc_deadline_ns(1000000000ull));
    kvs_server_close(e->server, false);
    kvc_config_free(e->config);
    free(e->out);
}

static uint64_t by_rows(end *e, const uint32_t *picks, uint32_t n)
{
    const kvc_pick_group group = {
        .context = e->context, .part = 7, .row_bytes = ROW, .n_picks = n, .picks = picks};
    kvc_fetch_info info;
    kvc_op op;
    uint64_t start = kvc_now_ns();
    kvc_op_init(&op, NULL, NULL);
    must(kvc_fetch(e->client, &group, 1, e->region, NULL, &info, 0, &op), "fetch");
    must(kvc_op_wait(&op, 0), "fetch");
    if (info.rows_dram != n)
        bench_die("not every row was there");
    return kvc_now_ns() - start;
}

static uint64_t by_near(end *e, const uint32_t *picks, uint32_t n)
{
    static uint16_t q[Q_HEADS * DIM], o[Q_HEADS * DIM];
    float lse[Q_HEADS];
    const kvc_attend_group group = {.context = e->context,
                                    .part = 7,
                                    .n_picks = n,
                                    .picks = picks,
                                    .row_bytes = ROW,
                                    .n_q = 1,
                                    .n_q_heads = Q_HEADS,
                                    .dim = DIM,
                                    .q_dtype = KVC_DTYPE_BF16,
                                    .o_dtype = KVC_DTYPE_BF16,
                                    .q = q,
                                    .o = o,
                                    .lse = lse};
    kvc_fetch_info info;
    kvc_op op;
    uint64_t start = kvc_now_ns();
    kvc_op_init(&op, NULL, NULL);
    must(kvc_attend(e->client, &group, 1, NULL, &info, 0, &op), "attend");
    must(kvc_op_wait(&op, 0), "attend");
    if (info.rows_dram != n)
        bench_die("not every row was there");
    return kvc_now_ns() - start;
}

static void bench_ways(uint16_t *store)
{
    static const uint32_t sizes[] = {1, 16, 64, 256, 1024, 2048};
    end e = {0};
    uint32_t *picks = get(n_rows * sizeof(*picks));
    open_end(&e, store);
    printf("%-8s %12s %12s %8s   (%s, dram; the time of rows is without attending to them)\n",
           "misses", "rows us", "near us", "ratio", kvs_server_uri(e.server, 0));
    for (uint32_t s = 0; s < 6 && sizes[s] <= n_rows; s++) {
        bench_series rows = {0}, near = {0};
        for (uint32_t run = 0; run < n_runs + 1; run++) {
            choose(picks, sizes[s], n_blocks * TOKENS);
            uint64_t took_rows = by_rows(&e, picks, sizes[s]);
            choose(picks, sizes[s], n_blocks * TOKENS);
            uint64_t took_near = by_near(&e, picks, sizes[s]);
            if (run == 0)
                continue;
            bench_add(&rows, (double)took_rows / 1e3);
            bench_add(&near, (double)took_near / 1e3);
        }
        printf("%-8u %12.0f %12.0f %8.2f\n", sizes[s], bench_median(&rows), bench_median(&near),
               bench_median(&rows) / bench_median(&near));
    }
    close_end(&e);
    free(picks);
}

/* Where the values lie, on the pages that they would have in a server. */
static uint16_t *get_store(bool huge_pages)
{
    size_t bytes = (size_t)n_blocks * TOKENS * ROW;
    uint16_t *store = aligned_alloc((size_t)2 << 20, bytes);
    if (store == NULL)
        bench_die("memory");
    (void)madvise(store, bytes, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    fill(store, (size_t)TOKENS * ROW / 2);
    for (uint32_t i = 1; i < n_blocks; i++) /* the same numbers in memory of their own */
        memcpy(store + (size_t)i * TOKENS * (ROW / 2), store, (size_t)TOKENS * ROW);
    return store;
}

int main(int argc, char **argv)
{
    bool huge_pages = true;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--small-pages") == 0) {
            huge_pages = false;
        } else if (strcmp(argv[i], "--quick") == 0) {
            n_blocks = 16;
            n_rows = 512;
            n_runs = 3;
        } else {
            fprintf(stderr, "usage: near_bench [--quick] [--small-pages]\n");
            return 2;
        }
    }
    kvc_log_set_level(KVC_LOG_LEVEL_ERROR);
    printf("%s; %u rows of %d bytes out of %u MiB, %d/%d heads of %d, bf16, medians of %u\n",
           bench_machine(), n_rows, ROW, n_blocks, Q_HEADS, KV_HEADS, DIM, n_runs);
    uint16_t *store = get_store(huge_pages);
    bench_core(store, false);
    bench_core(store, true);
    bench_bytes();
    bench_ways(store);
    free(store);
    return 0;
}
