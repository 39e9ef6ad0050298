/*
 * grpc_server_test.c: the gRPC server end as foreign clients see it: raw calls, health, unknown
 * methods, bodies that do not parse, and bytes that protoc can read.
 *
 * The client here is gRPC's own C API on one completion queue, driven by the test's thread.
 */
#include "fixture.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>

#include "base/log.h"
#include "transport/grpc/grpc_internal.h"

#define CALL_TAG ((void *)1)

typedef struct raw {
    grpc_completion_queue *cq;
    grpc_channel *channel;
    grpc_metadata_array initial, trailing;
    grpc_status_code code;
    grpc_slice details;
    grpc_byte_buffer *reply;
} raw;

static void raw_open(raw *r, const char *uri)
{
    memset(r, 0, sizeof(*r));
    grpc_init();
    r->cq = grpc_completion_queue_create_for_next(NULL);
    grpc_channel_credentials *plain = grpc_insecure_credentials_create();
    r->channel = grpc_channel_create(uri + strlen("grpc://"), plain, NULL);
    grpc_channel_credentials_release(plain);
    r->details = grpc_empty_slice();
}

static void raw_forget(raw *r)
{
    grpc_metadata_array_destroy(&r->initial);
    grpc_metadata_array_destroy(&r->trailing);
    grpc_slice_unref(r->details);
    r->details = grpc_empty_slice();
    if (r->reply != NULL)
        grpc_byte_buffer_destroy(r->reply);
    r->reply = NULL;
}

static void raw_close(raw *r)
{
    raw_forget(r);
    grpc_channel_destroy(r->channel);
    grpc_completion_queue_shutdown(r->cq);
    while (grpc_completion_queue_next(r->cq, gpr_inf_future(GPR_CLOCK_REALTIME), NULL).type !=
           GRPC_QUEUE_SHUTDOWN)
        ;
    grpc_completion_queue_destroy(r->cq);
    grpc_shutdown();
}

static gpr_timespec in_ten_seconds(void)
{
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_seconds(10, GPR_TIMESPAN));
}

static bool raw_wait(raw *r)
{
    grpc_event event = grpc_completion_queue_next(r->cq, in_ten_seconds(), NULL);
    assert_int_equal(event.type, GRPC_OP_COMPLETE);
    return event.success != 0;
}

static grpc_call *raw_start(raw *r, const char *path, const void *bytes, size_t len)
{
    grpc_slice method = grpc_slice_from_copied_string(path);
    grpc_call *call = grpc_channel_create_call(r->channel, NULL, GRPC_PROPAGATE_DEFAULTS, r->cq,
                                               method, NULL, in_ten_seconds(), NULL);
    grpc_slice body = grpc_slice_from_copied_buffer(bytes, len);
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(&body, 1);
    grpc_op ops[4] = {{.op = GRPC_OP_SEND_INITIAL_METADATA},
                      {.op = GRPC_OP_SEND_MESSAGE},
                      {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
                      {.op = GRPC_OP_RECV_INITIAL_METADATA}};
    ops[1].data.send_message.send_message = message;
    ops[3].data.recv_initial_metadata.recv_initial_metadata = &r->initial;
    grpc_metadata_array_init(&r->initial);
    grpc_metadata_array_init(&r->trailing);
    assert_int_equal(grpc_call_start_batch(call, ops, 4, CALL_TAG, NULL), GRPC_CALL_OK);
    (void)raw_wait(r);
    grpc_byte_buffer_destroy(message);
    grpc_slice_unref(body);
    grpc_slice_unref(method);
    return call;
}

static bool raw_receive(raw *r, grpc_call *call)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
    op.data.recv_message.recv_message = &r->reply;
    assert_int_equal(grpc_call_start_batch(call, &op, 1, CALL_TAG, NULL), GRPC_CALL_OK);
    return raw_wait(r) && r->reply != NULL;
}

static void raw_end(raw *r, grpc_call *call)
{
    grpc_op op = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT};
    op.data.recv_status_on_client.trailing_metadata = &r->trailing;
    op.data.recv_status_on_client.status = &r->code;
    op.data.recv_status_on_client.status_details = &r->details;
    assert_int_equal(grpc_call_start_batch(call, &op, 1, CALL_TAG, NULL), GRPC_CALL_OK);
    (void)raw_wait(r);
    grpc_call_unref(call);
}

static void raw_call(raw *r, const char *path, const void *bytes, size_t len)
{
    raw_forget(r);
    grpc_call *call = raw_start(r, path, bytes, len);
    (void)raw_receive(r, call);
    raw_end(r, call);
}

static bool has_trailer(const raw *r, const char *key, const char *value)
{
    for (size_t i = 0; i < r->trailing.count; i++) {
        if (grpc_slice_str_cmp(r->trailing.metadata[i].key, key) == 0 &&
            grpc_slice_str_cmp(r->trailing.metadata[i].value, value) == 0)
            return true;
    }
    return false;
}

/* The reply's bytes, malloc'd. */
static uint8_t *reply_bytes(raw *r, size_t *len_p)
{
    grpc_byte_buffer_reader reader;
    assert_non_null(r->reply);
    assert_true(grpc_byte_buffer_reader_init(&reader, r->reply));
    grpc_slice all = grpc_byte_buffer_reader_readall(&reader);
    *len_p = GRPC_SLICE_LENGTH(all);
    uint8_t *bytes = malloc(*len_p + 1);
    assert_non_null(bytes);
    memcpy(bytes, GRPC_SLICE_START_PTR(all), *len_p);
    grpc_slice_unref(all);
    grpc_byte_buffer_reader_destroy(&reader);
    grpc_byte_buffer_destroy(r->reply);
    r->reply = NULL;
    return bytes;
}

/* The serving status in the reply. */
static int health_of(raw *r)
{
    size_t len;
    uint8_t *bytes = reply_bytes(r, &len);
    int status = len == 0 ? 0 : bytes[1];
    assert_true(len == 0 || (len == 2 && bytes[0] == 8));
    free(bytes);
    return status;
}

static void health_check(void **state)
{
    (void)state;
    static const char path[] = "/grpc.health.v1.Health/Check";
    static const char ours[] = "\x0a\x11kvasir.v1.KvCache";
    fixture f;
    raw r;
    fixture_open(&f, 1);
    raw_open(&r, f.uri);
    raw_call(&r, path, "", 0);
    assert_int_equal(r.code, GRPC_STATUS_OK);
    assert_int_equal(health_of(&r), 1);
    raw_call(&r, path, ours, sizeof(ours) - 1);
    assert_int_equal(health_of(&r), 1);
    f.ops->set_serving(f.listener, false);
    raw_call(&r, path, ours, sizeof(ours) - 1);
    assert_int_equal(health_of(&r), 2);
    raw_call(&r, path, "\x0a\x05other", 7);
    assert_int_equal(r.code, GRPC_STATUS_NOT_FOUND);
    raw_call(&r, path, "\x0a\x7fother", 7);
    assert_int_equal(r.code, GRPC_STATUS_INVALID_ARGUMENT);
    raw_close(&r);
    fixture_close(&f);
}

static void health_watch(void **state)
{
    (void)state;
    static const char path[] = "/grpc.health.v1.Health/Watch";
    fixture f;
    raw r;
    fixture_open(&f, 1);
    raw_open(&r, f.uri);
    grpc_call *call = raw_start(&r, path, "", 0);
    assert_true(raw_receive(&r, call));
    assert_int_equal(health_of(&r), 1);
    f.ops->set_serving(f.listener, false);
    assert_true(raw_receive(&r, call));
    assert_int_equal(health_of(&r), 2);
    f.ops->set_serving(f.listener, true);
    assert_true(raw_receive(&r, call));
    assert_int_equal(health_of(&r), 1);
    raw other;
    raw_open(&other, f.uri);
    grpc_call *unknown = raw_start(&other, path, "\x0a\x05other", 7);
    assert_true(raw_receive(&other, unknown));
    assert_int_equal(health_of(&other), 3);
    (void)grpc_call_cancel(unknown, NULL);
    raw_end(&other, unknown);
    assert_int_equal(other.code, GRPC_STATUS_CANCELLED);
    f.ops->drain(f.listener, kvc_deadline_ns(5 * SECOND));
    assert_true(raw_receive(&r, call));
    assert_int_equal(health_of(&r), 2); /* the drain is announced before the stream ends */
    assert_false(raw_receive(&r, call));
    raw_end(&r, call);
    assert_int_equal(r.code, GRPC_STATUS_UNAVAILABLE);
    raw_close(&other);
    raw_close(&r);
    fixture_close(&f);
}

static void drain_main(void *arg)
{
    fixture *f = arg;
    f->ops->drain(f->listener, kvc_deadline_ns(60 * SECOND));
}

/* While a call is in flight, new ones are refused; with its answer, its connection is sent to who
   listens there from then on. */
static void drain_sends_clients_away(void **state)
{
    (void)state;
    fixture f, successor;
    job held, j;
    kvc_thread thread;
    fixture_open(&f, 1);
    fixture_handle(&f, hold_handler);
    job_init(&held, &f, sample_request(KVC_STATS, 0, &f.arena), 0);
    job_submit(&held);
    wait_held(&f, 1);
    fixture_handle(&f, sample_handler);
    assert_ok(kvc_thread_start(&thread, "drain", drain_main, &f));
    kvc_status status = KVC_OK;
    while (status == KVC_OK) { /* until the drain has begun */
        job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), PATIENCE_NS);
        status = job_run(&j);
        job_fini(&j);
    }
    assert_status(status, KVC_CLOSED);
    assert_int_equal(atomic_load(&held.n_done), 0);
    uint32_t n_before = f.n_done, n_calls = atomic_load(&f.n_calls);
    assert_int_equal(answer_held(&f), 1);
    wait_done(&f, n_before + 1);
    assert_status(held.status, KVC_NOT_FOUND); /* its answer still came through */
    kvc_thread_join(&thread);
    job_fini(&held);
    fixture_init(&successor);
    successor.listen.uri = f.uri;
    fixture_listen(&successor);
    for (int i = 0; i < 5000 && status != KVC_OK; i++) {
        job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), PATIENCE_NS);
        status = job_run(&j);
        job_fini(&j);
        assert_true(status == KVC_OK || status == KVC_CLOSED || status == KVC_UNAVAILABLE);
        usleep(status == KVC_OK ? 0 : 10000);
    }
    assert_ok(status);
    assert_true(atomic_load(&successor.n_calls) > 0);
    assert_int_equal(atomic_load(&f.n_calls), n_calls);
    fixture_close_server(&successor);
    kvc_arena_reset(&successor.arena);
    fixture_close(&f);
}

static void foreign_calls(void **state)
{
    (void)state;
    fixture f;
    raw r;
    fixture_open(&f, 1);
    raw_open(&r, f.uri);
    raw_call(&r, "/kvasir.v1.KvCache/NoSuchMethod", "", 0);
    assert_int_equal(r.code, GRPC_STATUS_UNIMPLEMENTED);
    assert_true(has_trailer(&r, "kvc-status", "7"));
    raw_call(&r, "/kvasir.v1.KvCache/PutBlocks", "\x0b\x0c", 2);
    assert_int_equal(r.code, GRPC_STATUS_INVALID_ARGUMENT);
    assert_true(has_trailer(&r, "kvc-status", "12"));
    assert_int_equal(grpc_slice_str_cmp(r.details, "PROTOCOL: groups are not supported"), 0);
    raw_call(&r, "/kvasir.v1.KvCache/OpenContext", "\x0a\x01x", 3);
    assert_int_equal(r.code, GRPC_STATUS_INVALID_ARGUMENT);
    assert_true(has_trailer(&r, "kvc-status", "6"));
    assert_int_equal(grpc_slice_str_cmp(r.details, "INVALID: the schema digest must have 32 bytes"),
                     0);
    raw_call(&r, "/kvasir.v1.KvCache/Stats", "", 0);
    assert_int_equal(r.code, GRPC_STATUS_OK);
    assert_int_equal(atomic_load(&f.n_calls), 1); /* the bad ones never reached the server */
    raw_close(&r);
    fixture_close(&f);
}

static void huge_message(void **state)
{
    (void)state;
    size_t len = 8u << 20;
    uint8_t *bytes = calloc(1, len);
    fixture f;
    raw r;
    assert_non_null(bytes);
    fixture_open(&f, 1);
    raw_open(&r, f.uri);
    raw_call(&r, "/kvasir.v1.KvCache/PutBlocks", bytes, len);
    assert_int_equal(r.code, GRPC_STATUS_RESOURCE_EXHAUSTED);
    assert_int_equal(atomic_load(&f.n_calls), 0);
    raw_close(&r);
    fixture_close(&f);
    free(bytes);
}

static const char payload[] = "row one row two row three";

static void rows_handler(fixture *f, kvt_call *call)
{
    kvc_reply reply = sample_reply(KVC_FETCH_ROWS, 0, &call->arena);
    kvt_slice slices[2] = {counted_slice(f, payload, 8),
                           counted_slice(f, payload + 8, sizeof(payload) - 1 - 8)};
    fixture_reply(f, call, KVC_OK, NULL, 0, &reply, slices, 2);
}

/* What protoc makes of the bytes, as text. */
static void decode_with_protoc(const uint8_t *bytes, size_t len, char *text, size_t size)
{
    char path[] = "/tmp/kvasir-reply-XXXXXX", command[512];
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, bytes, len), (ssize_t)len);
    (void)close(fd);
    (void)snprintf(command, sizeof(command),
                   "%s --proto_path=%s --decode=kvasir.v1.FetchRowsReply kvasir.proto < %s 2>&1",
                   KVASIR_PROTOC, KVASIR_PROTO_DIR, path);
    FILE *pipe = popen(command, "r"); /* NOLINT: fixed command */
    assert_non_null(pipe);
    size_t n = fread(text, 1, size - 1, pipe);
    text[n] = '\0';
    assert_int_equal(pclose(pipe), 0);
    (void)unlink(path);
}

static void any_protobuf_reads_it(void **state)
{
    (void)state;
    static const char *const wanted[] = {"status: ITEM_CORRUPT",
                                         "index: 17",
                                         "index: 65535",
                                         "rows_gpu: 1",
                                         "rows_dram: 22",
                                         "rows_lmdb: 333",
                                         "data: \"row one row two row three\""};
    fixture f;
    raw r;
    size_t len;
    char text[4096];
    fixture_open(&f, 1);
    fixture_handle(&f, rows_handler);
    raw_open(&r, f.uri);
    raw_call(&r, "/kvasir.v1.KvCache/FetchRows", "", 0);
    assert_int_equal(r.code, GRPC_STATUS_OK);
    uint8_t *bytes = reply_bytes(&r, &len);
    decode_with_protoc(bytes, len, text, sizeof(text));
    for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        if (strstr(text, wanted[i]) == NULL)
            fail_msg("no %s in:\n%s", wanted[i], text);
    }
    free(bytes);
    raw_close(&r);
    fixture_close(&f);
    assert_int_equal(atomic_load(&f.n_released), 2);
}

/* Deadlines that peers name, up to the farthest that the header grpc-timeout can say. */
static void far_deadlines(void **state)
{
    (void)state;
    static const struct {
        int64_t sec;
        uint64_t want_ns;
    } cases[] = {
        {-5, 1},
        {7, 7000000123ull},
        {18446744072, 18446744072000000123ull},
        {18446744073, UINT64_MAX},
        {20000000000, UINT64_MAX},
        {359999996400, UINT64_MAX},
        {INT64_MAX - 1, UINT64_MAX},
        {INT64_MAX, 0},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        gpr_timespec at = {
            .tv_sec = cases[i].sec, .tv_nsec = 123, .clock_type = GPR_CLOCK_MONOTONIC};
        assert_true(kvti_from_timespec(at) == cases[i].want_ns);
    }
}

/* A peer that greets like an HTTP/2 server, grants all the window there is, and never reads. */
static int stalled_listener(char uri[64])
{
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof(addr);
    int small = 4096, fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_true(fd >= 0);
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
    assert_int_equal(bind(fd, (struct sockaddr *)&addr, sizeof(addr)), 0);
    assert_int_equal(listen(fd, 8), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&addr, &len), 0);
    (void)snprintf(uri, 64, "grpc://127.0.0.1:%u", ntohs(addr.sin_port));
    return fd;
}

static int greet(int listener)
{
    static const uint8_t hello[] = {
        0, 0, 6, 4, 0, 0, 0, 0, 0, 0,    4, 0x7f, 0xff, 0xff, 0xff, /* SETTINGS: window 2 GiB */
        0, 0, 4, 8, 0, 0, 0, 0, 0, 0x7f, 0, 0,    0,                /* WINDOW_UPDATE, connection */
    };
    int fd = accept(listener, NULL, NULL);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, hello, sizeof(hello)), sizeof(hello));
    return fd;
}

/* Bytes queued for it keep their transfers past the deadline, but not past close. */
static void stalled_peer(void **state)
{
    (void)state;
    enum { N = 16 };
    char uri[64];
    fixture f;
    job jobs[N];
    int listener = stalled_listener(uri);
    fixture_init(&f);
    (void)snprintf(f.uri, sizeof(f.uri), "%s", uri);
    fixture_connect(&f, 1);
    for (uint32_t i = 0; i < N; i++) {
        job_init(&jobs[i], &f, sample_request(KVC_PUT_BLOCKS, KVC_MAX_VALUE_BYTES, &f.arena),
                 1500 * MS);
        job_submit(&jobs[i]);
    }
    int peer = greet(listener);
    uint32_t n_early = 0;
    uint64_t give_up_ns = kvc_deadline_ns(20 * SECOND);
    while (n_early == 0 && !kvc_expired(give_up_ns)) {
        (void)usleep(500000);
        for (uint32_t i = 0; i < N; i++)
            n_early += atomic_load(&jobs[i].n_done);
    }
    print_message("%u of %u were let go at their deadline\n", n_early, N);
    assert_true(n_early > 0); /* those that no socket holds */
    bool early[N];
    for (uint32_t i = 0; i < N; i++) {
        early[i] = atomic_load(&jobs[i].n_done) > 0;
        if (early[i])
            assert_status(jobs[i].status, KVC_TIMED_OUT);
    }
    uint64_t start_ns = kvc_now_ns();
    f.ops->conn_close(f.conn);
    f.conn = NULL;
    assert_true(kvc_now_ns() - start_ns < 12 * SECOND); /* and not keepalive's 15 */
    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(atomic_load(&jobs[i].n_done), 1);
        if (!early[i] && jobs[i].status != KVC_CANCELLED) /* by the close, if it was first */
            assert_status(jobs[i].status, KVC_TIMED_OUT);
        job_fini(&jobs[i]);
    }
    (void)close(peer);
    (void)close(listener);
    kvc_arena_reset(&f.arena);
}

/* The congestion control of a new socket of this system. */
static void default_control(char name_p[16])
{
    socklen_t len = 16;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    memset(name_p, 0, 16);
    assert_int_equal(getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name_p, &len), 0);
    (void)close(fd);
}

/* Connections of this process to or from port, and how many of them are not paced. */
static int option(int fd, int level, int name)
{
    int value = -1;
    socklen_t len = sizeof(value);
    return getsockopt(fd, level, name, &value, &len) == 0 ? value : -1;
}

/* asked: the server's, whose peer the system asks after keepalive_s of silence. */
static uint32_t count_connections(in_port_t port, int keepalive_s, uint32_t *n_reno_p,
                                  uint32_t *n_asked_p)
{
    uint32_t n = 0;
    for (int fd = 0; fd < 1024; fd++) {
        struct sockaddr_in own = {0}, peer = {0};
        socklen_t own_bytes = sizeof(own), peer_bytes = sizeof(peer), len = 16;
        char name[16] = {0};
        if (getsockname(fd, (struct sockaddr *)&own, &own_bytes) != 0 ||
            getpeername(fd, (struct sockaddr *)&peer, &peer_bytes) != 0 ||
            getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &len) != 0)
            continue;
        /* The port lies at the same place in addresses of both families. */
        if (own.sin_port != port && peer.sin_port != port)
            continue;
        n++;
        *n_reno_p += strcmp(name, "reno") == 0;
        *n_asked_p += own.sin_port == port && option(fd, SOL_SOCKET, SO_KEEPALIVE) == 1 &&
                      option(fd, IPPROTO_TCP, TCP_KEEPIDLE) == keepalive_s &&
                      option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT) > keepalive_s * 1000;
    }
    return n;
}

/* A channel's two connections; gives how many use reno, and how many ask their peers. */
static void open_and_count(int keepalive_s, uint32_t *n_reno_p, uint32_t *n_asked_p)
{
    fixture f;
    job j;
    fixture_init(&f);
    f.listen.keepalive_ns = (uint64_t)keepalive_s * SECOND;
    fixture_listen(&f);
    fixture_connect(&f, 2);
    for (uint32_t channel = 0; channel < 2; channel++) {
        job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), 20 * SECOND);
        j.xfer.channel = channel;
        assert_status(job_run(&j), KVC_OK);
        job_fini(&j);
    }
    in_port_t port = htons((uint16_t)strtoul(strrchr(f.uri, ':') + 1, NULL, 10));
    *n_reno_p = *n_asked_p = 0;
    assert_int_equal(count_connections(port, keepalive_s, n_reno_p, n_asked_p), 4);
    fixture_close(&f);
}

/* The system finds out whether a silent peer lives, as often as the listener was told. */
static void silent_peers_are_asked(void **state)
{
    (void)state;
    uint32_t n_reno, n_asked;
    for (int keepalive_s = 7; keepalive_s < 80; keepalive_s *= 10) {
        open_and_count(keepalive_s, &n_reno, &n_asked);
        assert_int_equal(n_asked, 2);
    }
}

/* Within one machine nothing is to be paced, whatever the system's default is for others. */
static void local_connections(void **state)
{
    (void)state;
    char control[16];
    uint32_t n_reno, n_asked;
    default_control(control);
    if (strcmp(control, "reno") == 0) {
        print_message("the system's default is reno already: nothing to see\n");
        skip();
    }
    open_and_count(30, &n_reno, &n_asked);
    assert_int_equal(n_reno, 4);
    static const char *const here[] = {"127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1",
                                       "[::ffff:127.0.0.1]:1"};
    static const char *const away[] = {"10.0.0.1:1", "128.0.0.1:1", "[::2]:1", "localhost.net:1",
                                       "unix:/tmp/127.0.0.1"};
    for (size_t i = 0; i < sizeof(here) / sizeof(here[0]); i++)
        assert_true(kvti_target_is_local(here[i]));
    for (size_t i = 0; i < sizeof(away) / sizeof(away[0]); i++)
        assert_false(kvti_target_is_local(away[i]));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(health_check),
        cmocka_unit_test(health_watch),
        cmocka_unit_test(drain_sends_clients_away),
        cmocka_unit_test(foreign_calls),
        cmocka_unit_test(huge_message),
        cmocka_unit_test(any_protobuf_reads_it),
        cmocka_unit_test(stalled_peer),
        cmocka_unit_test(far_deadlines),
        cmocka_unit_test(silent_peers_are_asked),
        cmocka_unit_test(local_connections),
    };
    suite_uri = "grpc://127.0.0.1:0";
    kvc_log_set_level(KVC_LOG_LEVEL_OFF);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
