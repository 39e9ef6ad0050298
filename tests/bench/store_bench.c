/*
 * store_bench.c: what the service moves through the client library, beside the floors of this
 * machine and its peers.
 *
 * Each case is a contest: a raw TCP loop (messages of 1 MiB; with the system's congestion control
 * and with reno, which is what our own local connections choose and what redis and memcached are
 * given here), the gRPC transport alone, cachesvc, redis and memcached move the same bytes in turn.
 * One table: median, spread, ratio to raw TCP (or to what the case says), CPU of both ends. A turn
 * of rows is a few fetches, one after the other, as the layers of a step are. "dram" runs without
 * lmdb in a dram tier of two rounds' size, so that memory is reused as in a full store;
 * "write-behind" counts the CPU of writing to lmdb too, though not its time.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench.h"
#include "peers.h"
#include "raw_grpc.h"
#include "raw_lmdb.h"
#include "raw_tcp.h"
#include "store_rig.h"

#define MIB 1048576u

enum {
    RUNS = 9,
    BLOCKS = 128,
    QUICK_BLOCKS = 16,
    WARM_PUTS = 3,
    MAX_ENTRANTS = 7,
    FETCHES = 8,
    WARM_MESSAGES = 8
};

typedef struct bench {
    bool quick;
    const char *only; /* cases whose name holds it; NULL: all */
    uint32_t runs;
    store_rig rig;
    raw_tcp *tcp, *reno; /* reno: without the pacing that the system may do by default */
    raw_grpc *grpc;      /* NULL but in its turns */
    peer *peers[2];
    /* of the contest under way */
    rig_shape shape;
    double bytes;     /* of one turn, or of one fetch of it */
    uint32_t fetches; /* of one turn; 1 where values are moved */
    bool is_put, checked;
    uint32_t slices; /* of the bare gRPC's answers */
} bench;

typedef struct peer_turn {
    bench *b;
    peer *p;
} peer_turn;

/* ---- entrants -------------------------------------------------------------------------------- */

static int move_raw(bench *b, raw_tcp *tcp, double *bytes_p)
{
    uint32_t each = (uint32_t)((b->bytes + MIB - 1) / MIB), n = b->fetches * each;
    kvc_status status = KVC_OK;
    for (uint32_t i = 0; i < n && status == KVC_OK; i++) {
        size_t at = (size_t)(i % each) * MIB;
        status = b->is_put ? raw_tcp_put(tcp, b->rig.memory + at, MIB)
                           : raw_tcp_get(tcp, b->rig.out + at, MIB);
    }
    *bytes_p = (double)n * MIB;
    return status == KVC_OK ? 0 : 1;
}

static int tcp_once(void *ctx, double *bytes_p)
{
    bench *b = ctx;
    return move_raw(b, b->tcp, bytes_p);
}

static int reno_once(void *ctx, double *bytes_p)
{
    bench *b = ctx;
    return move_raw(b, b->reno, bytes_p);
}

/* Only for its turns: gRPC's threads of one process take each other's events, so a second set of
 * them, though idle, costs the client of cachesvc a fifth more CPU. */
static int grpc_open(void *ctx, int *pid_p)
{
    bench *b = ctx;
    (void)pid_p;
    uint8_t *memory = b->is_put ? b->rig.memory : b->rig.out;
    if (raw_grpc_open(b->rig.channels, b->rig.threads, &b->grpc) != KVC_OK) {
        return 1;
    }
    /* Windows grow with use. */
    return raw_grpc_move(b->grpc, b->is_put, b->slices, memory, WARM_MESSAGES) == KVC_OK ? 0 : 1;
}

static void grpc_close(void *ctx)
{
    bench *b = ctx;
    raw_grpc_close(b->grpc);
    b->grpc = NULL;
}

static int grpc_once(void *ctx, double *bytes_p)
{
    bench *b = ctx;
    uint32_t n = (uint32_t)((b->bytes + MIB - 1) / MIB);
    *bytes_p = (double)b->fetches * n * MIB;
    uint8_t *memory = b->is_put ? b->rig.memory : b->rig.out;
    kvc_status status = KVC_OK;
    for (uint32_t i = 0; i < b->fetches && status == KVC_OK; i++) {
        status = raw_grpc_move(b->grpc, b->is_put, b->slices, memory, n);
    }
    return status == KVC_OK ? 0 : 1;
}

static int name_values(void *ctx, int *pid_p)
{
    bench *b = ctx;
    (void)pid_p;
    rig_name(&b->rig, b->shape);
    return 0;
}

static int put_memory(void *ctx, double *bytes_p)
{
    bench *b = ctx;
    return rig_put(&b->rig, b->shape, KVC_PROMISE_MEMORY, bytes_p);
}

static int put_durable(void *ctx, double *bytes_p)
{
    bench *b = ctx;
    return rig_put(&b->rig, b->shape, KVC_PROMISE_DURABLE, bytes_p);
}

static int lmdb_once(void *ctx, double *bytes_p)
{
    bench *b = ctx;
    *bytes_p = (double)b->rig.blocks * MIB;
    return raw_lmdb_put(b->rig.folder, b->rig.memory, b->rig.blocks);
}

static int check_once(bench *b)
{
    if (b->checked) {
        return 0;
    }
    b->checked = true;
    return rig_check(&b->rig);
}

static int get_once(void *ctx, double *bytes_p)
{
    bench *b = ctx;
    return rig_get(&b->rig, bytes_p) || check_once(b);
}

static int rows_once(void *ctx, double *bytes_p)
{
    bench *b = ctx;
    int failed = 0;
    for (uint32_t i = 0; i < b->fetches && !failed; i++) {
        failed = rig_rows(&b->rig, bytes_p) || check_once(b);
    }
    *bytes_p *= b->fetches;
    return failed;
}

static int peer_put_once(void *ctx, double *bytes_p)
{
    peer_turn *t = ctx;
    uint32_t n = rig_values(&t->b->rig, t->b->shape);
    *bytes_p = (double)n * rig_value_bytes(t->b->shape);
    return peer_put(t->p, 0, n, t->b->rig.memory, rig_value_bytes(t->b->shape));
}

static int peer_get_once(void *ctx, double *bytes_p)
{
    peer_turn *t = ctx;
    store_rig *rig = &t->b->rig;
    uint32_t n = rig_values(rig, t->b->shape);
    for (uint32_t i = 0; i < n; i++) {
        rig->picks[i] = i;
    }
    *bytes_p = (double)n * rig_value_bytes(t->b->shape);
    return peer_get(t->p, rig->picks, n, rig->out, rig_value_bytes(t->b->shape));
}

/* One key for each row, since only so can they send single rows. */
static int peer_rows_once(void *ctx, double *bytes_p)
{
    peer_turn *t = ctx;
    store_rig *rig = &t->b->rig;
    uint32_t row_bytes = rig_row_bytes(t->b->shape);
    int failed = 0;
    for (uint32_t i = 0; i < t->b->fetches && !failed; i++) {
        rig_pick(rig, t->b->shape);
        failed = peer_get(t->p, rig->picks, RIG_N_ROWS, rig->out, row_bytes);
    }
    *bytes_p = (double)t->b->fetches * RIG_N_ROWS * row_bytes;
    return failed;
}

/* ---- contests -------------------------------------------------------------------------------- */

static bool wanted(const bench *b, const char *title)
{
    return !b->only || strstr(title, b->only);
}

/* Raw TCP, gRPC and cachesvc, then the peers that are there. slices: of the bare gRPC's answers. */
static int contest(bench *b, const char *title, bool is_put,
                   int (*ours)(void *ctx, double *bytes_p),
                   int (*peers)(void *ctx, double *bytes_p), uint32_t unit_bytes, uint32_t slices)
{
    static const char *const names[] = {"redis", "memcached"};
    peer_turn turns[2];
    bench_entrant entrants[MAX_ENTRANTS] = {
        {.name = "raw TCP, 1 MiB messages", .once = tcp_once, .ctx = b},
        {.name = "raw TCP, reno", .once = reno_once, .ctx = b},
        {.name = slices > 1 ? "gRPC alone, 4 KiB slices" : "gRPC alone, 1 MiB",
         .once = grpc_once,
         .prepare = grpc_open,
         .finish = grpc_close,
         .ctx = b},
        {.name = "cachesvc",
         .once = ours,
         .ctx = b,
         .prepare = is_put ? name_values : NULL,
         .pid = b->rig.daemon.pid,
         .ours = true},
    };
    uint32_t n = 4;
    for (uint32_t i = 0; i < 2 && peers; i++) {
        turns[i] = (peer_turn){b, b->peers[i]};
        if (b->peers[i]) {
            entrants[n++] = (bench_entrant){
                .name = names[i], .once = peers, .ctx = &turns[i], .pid = peer_pid(b->peers[i])};
        }
    }
    b->is_put = is_put;
    b->slices = slices;
    b->checked = false;
    return bench_contest(title, entrants, n, b->runs, unit_bytes);
}

/* Puts and gets of one shape from dram. */
static int values_of(bench *b, rig_shape shape, const char *put_title, const char *get_title)
{
    double bytes;
    int failed = 0;
    b->shape = shape;
    b->bytes = (double)rig_values(&b->rig, shape) * rig_value_bytes(shape);
    b->fetches = 1;
    if (!wanted(b, put_title) && !wanted(b, get_title)) {
        return 0;
    }
    for (int i = 0; i < WARM_PUTS && !failed; i++) {
        rig_name(&b->rig, shape);
        failed = put_memory(b, &bytes);
    }
    if (!failed && wanted(b, put_title)) {
        failed = contest(b, put_title, true, put_memory, peer_put_once, rig_value_bytes(shape), 1);
    }
    if (!failed && wanted(b, get_title)) {
        peer_turn turns[2] = {{b, b->peers[0]}, {b, b->peers[1]}};
        for (int i = 0; i < 2 && !failed; i++) {
            failed = turns[i].p && peer_put_once(&turns[i], &bytes) != 0;
        }
        failed = failed || rig_open_context(&b->rig, shape) ||
                 contest(b, get_title, false, get_once, peer_get_once, rig_value_bytes(shape), 1);
    }
    return failed;
}

/* Rows of one shape from dram, or from lmdb. The peers get one key for each row that may be asked
 * for. */
static int rows_of(bench *b, rig_shape shape, const char *title, bool peers)
{
    double bytes;
    int failed = 0;
    uint32_t row_bytes = rig_row_bytes(shape);
    b->shape = shape;
    b->bytes = (double)RIG_N_ROWS * row_bytes;
    b->fetches = FETCHES;
    if (!wanted(b, title)) {
        return 0;
    }
    if (!b->rig.from_lmdb) {
        rig_name(&b->rig, shape);
        failed = put_memory(b, &bytes) || rig_open_context(&b->rig, shape);
    }
    uint32_t n_rows = rig_values(&b->rig, shape) * rig_value_bytes(shape) / row_bytes;
    for (uint32_t i = 0; i < 2 && !failed && peers; i++) {
        for (uint32_t at = 0; b->peers[i] && at < n_rows && !failed; at += RIG_N_ROWS) {
            failed = peer_put(b->peers[i], at, RIG_N_ROWS, b->rig.memory + (size_t)at * row_bytes,
                              row_bytes);
        }
    }
    /* Rows this long leave dram as slices; others are gathered. */
    uint32_t slices = row_bytes == 4096 ? MIB / row_bytes : 1;
    return failed ||
           contest(b, title, false, rows_once, peers ? peer_rows_once : NULL, row_bytes, slices);
}

/* A server for one shape: a class of values that comes late gets few of a full tier's segments. The
 * puts that warm up fill it, so that what is timed finds memory that is in use. */
static int start_dram(bench *b, rig_shape shape)
{
    char dram[32];
    uint64_t round_bytes = (uint64_t)rig_values(&b->rig, shape) * rig_value_bytes(shape);
    snprintf(dram, sizeof dram, "%lluKiB", (unsigned long long)(round_bytes / 1024 * 5 / 2));
    return rig_start(&b->rig, dram, NULL);
}

static int run_dram(bench *b)
{
    static const struct {
        rig_shape shape;
        const char *put, *get, *rows; /* names of the cases; NULL: there is none */
    } cases[] = {
        {RIG_1M, "put 1 MiB, dram", "get 1 MiB, dram", "2,048 rows of 4 KiB, dram"},
        {RIG_64K, "put 64 KiB, dram", "get 64 KiB, dram", NULL},
        {RIG_4K, "put 4 KiB, dram", "get 4 KiB, dram", NULL},
        {RIG_192K, NULL, NULL, "2,048 rows of 768 B, dram"},
    };
    int failed = 0;
    for (uint32_t i = 0; i < sizeof cases / sizeof cases[0] && !failed; i++) {
        failed = start_dram(b, cases[i].shape);
        if (!failed && cases[i].put) {
            failed = values_of(b, cases[i].shape, cases[i].put, cases[i].get);
        }
        if (!failed && cases[i].rows) {
            failed = rows_of(b, cases[i].shape, cases[i].rows, true);
        }
        rig_stop(&b->rig);
    }
    return failed;
}

/* Puts that reach lmdb: behind the answer, or before it beside what the bare library does. */
static int run_puts(bench *b)
{
    bench_entrant behind[] = {
        {.name = "raw TCP, 1 MiB messages", .once = tcp_once, .ctx = b},
        {.name = "cachesvc",
         .once = put_memory,
         .ctx = b,
         .prepare = name_values,
         .pid = b->rig.daemon.pid,
         .settles = true,
         .ours = true},
    };
    bench_entrant durable[] = {
        {.name = "bare lmdb, full sync", .once = lmdb_once, .ctx = b},
        {.name = "cachesvc",
         .once = put_durable,
         .ctx = b,
         .prepare = name_values,
         .pid = b->rig.daemon.pid,
         .settles = true,
         .ours = true},
    };
    b->shape = RIG_1M;
    b->is_put = true;
    b->bytes = (double)b->rig.blocks * MIB;
    b->fetches = 1;
    int failed = 0;
    if (wanted(b, "put 1 MiB, write-behind")) {
        failed = bench_contest("put 1 MiB, write-behind", behind, 2, b->runs, MIB);
    }
    if (!failed && wanted(b, "put 1 MiB, DURABLE")) {
        failed = bench_contest("put 1 MiB, DURABLE", durable, 2, b->runs, MIB);
    }
    return failed;
}

static int go_cold(void *ctx, int *pid_p)
{
    bench *b = ctx;
    int failed = rig_restart(&b->rig, true);
    *pid_p = b->rig.daemon.pid;
    return failed;
}

/* A restarted server has everything in lmdb and nothing in dram. */
static int run_rows_lmdb(bench *b)
{
    double bytes;
    bench_entrant cold[] = {
        {.name = "raw TCP, 1 MiB messages", .once = tcp_once, .ctx = b},
        {.name = "cachesvc", .once = rows_once, .ctx = b, .prepare = go_cold, .ours = true},
    };
    b->rig.from_lmdb = true;
    b->rig.context_shape = RIG_1M;
    int failed = rig_restart(&b->rig, false) || rig_get(&b->rig, &bytes) ||
                 rows_of(b, RIG_1M, "2,048 rows of 4 KiB, lmdb warm", true);
    b->bytes = (double)RIG_N_ROWS * rig_row_bytes(RIG_1M);
    b->fetches = 1; /* the next one would not be cold */
    if (!failed && wanted(b, "2,048 rows of 4 KiB, lmdb cold")) {
        failed = bench_contest("2,048 rows of 4 KiB, lmdb cold", cold, 2, b->runs,
                               rig_row_bytes(RIG_1M));
    }
    return failed;
}

static int run_lmdb(bench *b)
{
    double bytes;
    if (!wanted(b, "put 1 MiB, write-behind") && !wanted(b, "put 1 MiB, DURABLE") &&
        !wanted(b, "2,048 rows of 4 KiB, lmdb warm") &&
        !wanted(b, "2,048 rows of 4 KiB, lmdb cold")) {
        return 0;
    }
    int failed = rig_start(&b->rig, "4GiB", "8GiB") || run_puts(b);
    rig_name(&b->rig, RIG_1M);
    failed = failed || rig_put(&b->rig, RIG_1M, KVC_PROMISE_DURABLE, &bytes) || run_rows_lmdb(b);
    rig_stop(&b->rig);
    return failed;
}

/* ---- main ------------------------------------------------------------------------------------ */

static const char usage[] =
    "Usage: store_bench [--quick] [--channels N] [--cqs N] [--values N] [--runs N] [--only TEXT]\n"
    "                   [--listen URI]\n"
    "Times puts and reads through a real cachesvc beside a raw TCP loop, the gRPC transport "
    "alone,\n"
    "the bare LMDB library, redis and memcached (where installed); prints one table.\n"
    "  --quick       a smoke test of a few seconds\n"
    "  --channels N  connections of the client (default 2)\n"
    "  --cqs N       completion queues of the server (default: its own choice)\n"
    "  --values N    values of 1 MiB for each turn, at least 8 (default 128)\n"
    "  --runs N      turns that count (default 9, at most 64)\n"
    "  --only TEXT   cases whose name holds TEXT, for example 'put 1 MiB'\n"
    "  --listen URI  by another way: shm:///PATH, grpc+unix:///PATH, rdma://HOST:PORT of a device\n"
    "KVASIR_CACHESVC names another cachesvc, TMPDIR where the data goes.\n";

static bool number(const char *text, uint32_t low, uint32_t high, uint32_t *value_p)
{
    char *end;
    unsigned long value = text ? strtoul(text, &end, 10) : 0;
    if (!text || *text == 0 || *end != 0 || value < low || value > high) {
        return false;
    }
    *value_p = (uint32_t)value;
    return true;
}

static bool parse(bench *b, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        bool ok = true;
        if (strcmp(argv[i], "--quick") == 0) {
            b->quick = true;
            b->runs = 1;
            b->rig.blocks = QUICK_BLOCKS;
            continue;
        }
        if (strcmp(argv[i], "--channels") == 0) {
            ok = number(value, 1, 64, &b->rig.channels);
        } else if (strcmp(argv[i], "--cqs") == 0) {
            ok = number(value, 1, 64, &b->rig.threads);
        } else if (strcmp(argv[i], "--values") == 0) {
            ok = number(value, 8, 8192, &b->rig.blocks);
        } else if (strcmp(argv[i], "--runs") == 0) {
            ok = number(value, 1, BENCH_MAX_RUNS, &b->runs);
        } else if (strcmp(argv[i], "--listen") == 0) {
            ok = value != NULL && strstr(value, "://") != NULL;
            b->rig.listen = value;
        } else if (strcmp(argv[i], "--only") == 0) {
            ok = value != NULL;
            b->only = value;
        } else {
            ok = false;
        }
        if (!ok) {
            return false;
        }
        i++;
    }
    return true;
}

static int run(bench *b)
{
    if (rig_init(&b->rig) != 0 || raw_tcp_open(NULL, &b->tcp) != KVC_OK ||
        raw_tcp_open("reno", &b->reno) != KVC_OK) {
        fputs("store_bench: cannot set up\n", stderr);
        return 1;
    }
    b->peers[0] = peer_open(PEER_REDIS, 4 * b->rig.blocks + 256);
    b->peers[1] = peer_open(PEER_MEMCACHED, 4 * b->rig.blocks + 256);
    printf("%s; %u MiB a turn, %u turns, %u channels\n\n", bench_machine(), b->rig.blocks, b->runs,
           b->rig.channels);
    bench_table_head();
    return run_dram(b) || run_lmdb(b);
}

int main(int argc, char **argv)
{
    bench *b = calloc(1, sizeof *b);
    if (!b) {
        return 1;
    }
    b->runs = RUNS;
    b->rig.blocks = BLOCKS;
    b->rig.channels = 2;
    b->rig.seed = 1;
    bool help = argc == 2 && strcmp(argv[1], "--help") == 0;
    if (help || !parse(b, argc, argv)) {
        fputs(usage, help ? stdout : stderr);
        free(b);
        return help ? 0 : 2;
    }
    int failed = run(b);
    peer_close(b->peers[0]);
    peer_close(b->peers[1]);
    raw_grpc_close(b->grpc);
    raw_tcp_close(b->tcp);
    raw_tcp_close(b->reno);
    rig_fini(&b->rig);
    free(b);
    return failed;
}
