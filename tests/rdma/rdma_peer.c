/*
 * rdma_peer.c: a server and a client of random transfers, each a process of its own.
 *
 *   rdma_peer serve URI [FILE]          until SIGTERM; FILE gets the URI once it listens
 *   rdma_peer fetch URI N SEED          N transfers; exit status 1: a wrong byte or a wrong length
 *   rdma_peer count URI                 what 2,048 rows cost in work requests, signals and bytes
 *
 * Every byte of a payload follows from its transfer's number, so both ends can tell a wrong one.
 * The client goes on when the server dies and comes back: a transfer may fail, but not lie. The
 * server's rows lie in one memfd mapping that is lent, as the dram tier's do.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/lent.h"
#include "base/log.h"
#include "base/metrics.h"
#include "base/thread.h"
#include "transport/transport.h"

#define ROWS       4096u
#define ROW_BYTES  4096u
#define MAX_BYTES  (1u << 20)
#define IN_FLIGHT  8u
#define SECOND     1000000000ull
#define GIVE_UP_NS (1000 * SECOND) /* tests/rdma/run ends it earlier */

static uint8_t *rows; /* [ROWS][ROW_BYTES] */
static atomic_uint n_wrong;

static uint8_t row_byte(uint32_t row, uint32_t at)
{
    uint32_t x = row * 2654435761u + at * 40503u;
    return (uint8_t)(x >> 13 ^ x >> 21);
}

/* ---- the server ------------------------------------------------------------------------------ */

static void map_rows(void)
{
    size_t len_bytes = (size_t)ROWS * ROW_BYTES;
    int fd = memfd_create("rows", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)len_bytes) != 0)
        abort();
    rows = mmap(NULL, len_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (rows == MAP_FAILED || kvc_lent_add(rows, len_bytes) != KVC_OK)
        abort();
    for (uint32_t r = 0; r < ROWS; r++) {
        for (uint32_t i = 0; i < ROW_BYTES; i++)
            rows[(size_t)r * ROW_BYTES + i] = row_byte(r, i);
    }
}

/* The picks of the first group, one slice each. */
static void on_fetch(kvt_call *call)
{
    kvt_slice slices[KVT_MAX_SLICES];
    uint32_t n = 0;
    const kvc_row_group *group = call->req.u.fetch_rows.groups;
    for (; call->req.u.fetch_rows.n_groups > 0 && n < group->n_picks && n < 256; n++)
        slices[n] = (kvt_slice){.base = rows + (size_t)(group->picks[n] % ROWS) * ROW_BYTES,
                                .len_bytes = ROW_BYTES};
    kvt_call_reply(call, KVC_OK, NULL, 0, NULL, slices, n);
}

/* The payload of a put is that of row part, shifted. */
static void on_put(kvt_call *call)
{
    uint32_t row = call->req.u.put_blocks.values[0].part, at = 0;
    bool right = true;
    for (uint32_t i = 0; i < call->req.n_data; i++) {
        const uint8_t *bytes = call->req.data[i].iov_base;
        for (size_t k = 0; k < call->req.data[i].iov_len && right; k++)
            right = bytes[k] == row_byte(row, at++);
    }
    if (!right)
        atomic_fetch_add(&n_wrong, 1);
    kvt_call_reply(call, right ? KVC_OK : KVC_CORRUPT, "a wrong byte", 0, NULL, NULL, 0);
}

static void on_call(void *arg, kvt_call *call)
{
    (void)arg;
    if (call->req.method == KVC_FETCH_ROWS)
        on_fetch(call);
    else if (call->req.method == KVC_PUT_BLOCKS && call->req.u.put_blocks.n_values > 0)
        on_put(call);
    else
        kvt_call_reply(call, KVC_UNSUPPORTED, NULL, 0, NULL, NULL, 0);
}

/* What the listener holds besides one registration for the rows must be gone when it is closed. */
static int check_gone(void)
{
    uint64_t left = kvc_metric_get(KVC_M_rdma_registrations);
    uint64_t links = kvc_metric_get(KVC_M_rdma_connections);
    printf("registrations left: %llu, connections left: %llu, wrong puts: %u\n",
           (unsigned long long)left, (unsigned long long)links, atomic_load(&n_wrong));
    return left > 0 || links > 0 || atomic_load(&n_wrong) > 0;
}

static int serve(const char *uri, const char *file)
{
    sigset_t set;
    int which;
    kvt_listener *listener;
    const kvt_ops *ops = kvt_find(uri);
    kvt_listen_opts opts = {.size_bytes = sizeof(opts), .uri = uri, .on_call = on_call};
    (void)sigemptyset(&set);
    (void)sigaddset(&set, SIGTERM);
    (void)pthread_sigmask(SIG_BLOCK, &set, NULL);
    map_rows();
    /* A server that was killed may leave its port taken for a moment. */
    kvc_status status = KVC_IO;
    uint64_t give_up_ns = kvc_deadline_ns(30 * SECOND);
    while (status == KVC_IO && !kvc_expired(give_up_ns)) {
        status = ops->listen(&opts, &listener);
        if (status == KVC_IO)
            usleep(200000);
    }
    if (status != KVC_OK)
        return 2;
    FILE *stream = file == NULL ? NULL : fopen(file, "we");
    if (stream != NULL && (fputs(ops->listener_uri(listener), stream) < 0 || fclose(stream) != 0))
        return 2;
    (void)sigwait(&set, &which);
    ops->drain(listener, kvc_deadline_ns(5 * SECOND));
    ops->listener_close(listener);
    kvc_lent_remove(rows);
    return check_gone();
}

/* ---- the client ------------------------------------------------------------------------------ */

typedef struct transfer {
    kvt_xfer xfer; /* first */
    kvc_request req;
    kvc_row_group group;
    kvc_put_value value;
    uint32_t picks[256];
    struct iovec data;
    uint8_t *bytes; /* of a put */
    atomic_bool over;
} transfer;

static atomic_uint n_ok, n_failed;
static uint64_t random_state;

static uint32_t below(uint32_t n)
{
    uint64_t z = (random_state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (uint32_t)((z ^ (z >> 31)) % n);
}

static bool right_rows(const transfer *t)
{
    uint32_t row = 0, at = 0;
    const kvc_reply *reply = &t->xfer.reply;
    if (reply->data_bytes != (uint64_t)t->group.n_picks * ROW_BYTES)
        return false;
    for (uint32_t i = 0; i < reply->n_data; i++) {
        const uint8_t *bytes = reply->data[i].iov_base;
        for (size_t k = 0; k < reply->data[i].iov_len; k++) {
            if (bytes[k] != row_byte(t->picks[row] % ROWS, at))
                return false;
            if (++at == ROW_BYTES) {
                at = 0;
                row++;
            }
        }
    }
    return row == t->group.n_picks;
}

static void on_done(kvt_xfer *xfer)
{
    transfer *t = (transfer *)xfer;
    bool fetch = t->req.method == KVC_FETCH_ROWS;
    if (xfer->status == KVC_CORRUPT || (xfer->status == KVC_OK && fetch && !right_rows(t)))
        atomic_fetch_add(&n_wrong, 1);
    atomic_fetch_add(xfer->status == KVC_OK ? &n_ok : &n_failed, 1);
    if (xfer->status != KVC_OK && getenv("KVASIR_TEST_LOG") != NULL)
        fprintf(stderr, "%s: %s\n", kvc_status_name(xfer->status), xfer->detail);
    atomic_store(&t->over, true);
}

static void make_fetch(transfer *t, uint32_t n_picks)
{
    t->group = (kvc_row_group){.context = 1, .n_picks = n_picks, .picks = t->picks};
    for (uint32_t i = 0; i < n_picks; i++)
        t->picks[i] = below(ROWS);
    t->req = (kvc_request){.method = KVC_FETCH_ROWS};
    t->req.u.fetch_rows.n_groups = 1;
    t->req.u.fetch_rows.groups = &t->group;
}

static void make_put(transfer *t)
{
    uint32_t row = below(60000), len_bytes = 1 + below(below(4) == 0 ? MAX_BYTES : 20000);
    t->value = (kvc_put_value){.part = row, .len_bytes = len_bytes};
    for (uint32_t i = 0; i < len_bytes; i++)
        t->bytes[i] = row_byte(row, i);
    t->data = (struct iovec){t->bytes, len_bytes};
    t->req = (kvc_request){.method = KVC_PUT_BLOCKS};
    t->req.u.put_blocks.promise = KVC_PROMISE_MEMORY;
    t->req.u.put_blocks.n_values = 1;
    t->req.u.put_blocks.values = &t->value;
    t->req.data = &t->data;
    t->req.n_data = 1;
    t->req.data_bytes = len_bytes;
}

static kvc_status start(const kvt_ops *ops, kvt_conn *conn, transfer *t, uint32_t channel)
{
    t->xfer.req = &t->req;
    t->xfer.done = on_done;
    t->xfer.channel = channel;
    t->xfer.deadline_ns = kvc_deadline_ns(20 * SECOND);
    atomic_store(&t->over, false);
    return ops->submit(conn, &t->xfer);
}

static void wait_over(transfer *t)
{
    while (!atomic_load(&t->over))
        usleep(500);
    kvc_arena_reset(&t->xfer.arena);
}

static kvt_conn *connect_to(const char *uri, uint32_t n_channels)
{
    kvt_conn *conn = NULL;
    kvt_connect_opts opts = {.size_bytes = sizeof(opts), .uri = uri, .n_channels = n_channels};
    return kvt_find(uri)->connect(&opts, &conn) == KVC_OK ? conn : NULL;
}

static int fetch(const char *uri, uint32_t n, uint64_t seed)
{
    static transfer transfers[IN_FLIGHT];
    const kvt_ops *ops = kvt_find(uri);
    kvt_conn *conn = connect_to(uri, 2);
    uint64_t give_up_ns = kvc_deadline_ns(GIVE_UP_NS);
    random_state = seed;
    if (conn == NULL)
        return 2;
    for (uint32_t i = 0; i < IN_FLIGHT; i++) {
        transfers[i].bytes = malloc(MAX_BYTES);
        atomic_store(&transfers[i].over, true);
    }
    /* Those that failed are made up for: a server may be away for a while. */
    for (uint32_t i = 0; atomic_load(&n_ok) < n && !kvc_expired(give_up_ns); i++) {
        transfer *t = &transfers[i % IN_FLIGHT];
        wait_over(t);
        if (below(3) == 0)
            make_put(t);
        else
            make_fetch(t, 1 + below(256));
        if (start(ops, conn, t, i) != KVC_OK)
            return 2;
        if (atomic_load(&n_failed) > 0)
            usleep(2000);
    }
    for (uint32_t i = 0; i < IN_FLIGHT; i++) {
        wait_over(&transfers[i]);
        free(transfers[i].bytes);
    }
    ops->conn_close(conn);
    printf("%u transfers well, %u failed, %u wrong\n", atomic_load(&n_ok), atomic_load(&n_failed),
           atomic_load(&n_wrong));
    return check_gone() || atomic_load(&n_ok) < n;
}

/* ---- what it costs --------------------------------------------------------------------------- */

static int count(const char *uri)
{
    static transfer t;
    const kvt_ops *ops = kvt_find(uri);
    kvt_listener *listener;
    kvt_listen_opts opts = {.size_bytes = sizeof(opts), .uri = uri, .on_call = on_call};
    map_rows();
    if (ops->listen(&opts, &listener) != KVC_OK)
        return 2;
    kvt_conn *conn = connect_to(ops->listener_uri(listener), 1);
    for (int round = 0; round < 2; round++) { /* the first one connects and registers */
        uint64_t start_ns = kvc_now_ns();
        kvc_metrics_reset();
        for (int i = 0; i < 8; i++) {
            make_fetch(&t, 256);
            if (start(ops, conn, &t, 0) != KVC_OK)
                return 2;
            wait_over(&t);
        }
        double ms = (double)(kvc_now_ns() - start_ns) / 1e6;
        if (round == 1)
            printf("2048 rows of 4 KiB in 8 requests: %llu work requests, %llu signals, %llu bytes "
                   "written, %llu bytes sent, %.1f ms\n",
                   (unsigned long long)kvc_metric_get(KVC_M_rdma_work_requests),
                   (unsigned long long)kvc_metric_get(KVC_M_rdma_signals),
                   (unsigned long long)kvc_metric_get(KVC_M_rdma_written_bytes),
                   (unsigned long long)kvc_metric_get(KVC_M_rdma_sent_bytes), ms);
    }
    ops->conn_close(conn);
    ops->drain(listener, 1);
    ops->listener_close(listener);
    return atomic_load(&n_wrong) > 0 || atomic_load(&n_ok) != 16;
}

int main(int argc, char **argv)
{
    kvc_log_set_level(getenv("KVASIR_TEST_LOG") != NULL ? KVC_LOG_LEVEL_TRACE : KVC_LOG_LEVEL_OFF);
    if (argc >= 3 && kvt_find(argv[2]) == NULL)
        return 2;
    if (argc >= 3 && strcmp(argv[1], "serve") == 0)
        return serve(argv[2], argc > 3 ? argv[3] : NULL);
    if (argc == 5 && strcmp(argv[1], "fetch") == 0)
        return fetch(argv[2], (uint32_t)strtoul(argv[3], NULL, 10), strtoull(argv[4], NULL, 10));
    if (argc == 3 && strcmp(argv[1], "count") == 0)
        return count(argv[2]);
    fprintf(stderr, "usage: rdma_peer serve URI [FILE] | fetch URI N SEED | count URI\n");
    return 2;
}
