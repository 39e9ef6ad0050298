/*
 * admin_test.c: what the admin port says while a server starts, serves, drains, fails and falls,
 * and what it refuses. A plain socket is the client here; tests/e2e has a real one.
 */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "admin.h"
#include "admin_http.h"
#include "base/clock.h"
#include "harness.h"

#define REPLY_BYTES 262144u

typedef struct fixture {
    h_server h;
    kvs_admin *admin;
    uint16_t port;
    char reply[REPLY_BYTES];
} fixture;

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof(*f));
    assert_non_null(f);
    h_server_init(&f->h);
    assert_int_equal(kvs_admin_open("127.0.0.1:0", &f->admin), KVC_OK);
    const char *uri = kvs_admin_uri(f->admin);
    assert_int_equal(strncmp(uri, "http://127.0.0.1:", 17), 0);
    f->port = (uint16_t)strtoul(uri + 17, NULL, 10);
    assert_int_not_equal(f->port, 0);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    kvs_admin_show(f->admin, NULL);
    kvs_admin_close(f->admin);
    h_server_fini(&f->h);
    free(f);
    return 0;
}

static int dial(const fixture *f)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(f->port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof(to)), 0);
    return fd;
}

/* Sends the text and reads to the end; the bytes read. A reset counts as an end. */
static size_t talk(fixture *f, const char *text, size_t len_bytes)
{
    size_t got = 0;
    int fd = dial(f);
    (void)send(fd, text, len_bytes, MSG_NOSIGNAL);
    for (;;) {
        struct pollfd wait = {.fd = fd, .events = POLLIN};
        assert_int_equal(poll(&wait, 1, 20000), 1);
        ssize_t n = recv(fd, f->reply + got, REPLY_BYTES - 1 - got, 0);
        if (n <= 0)
            break;
        got += (size_t)n;
    }
    close(fd);
    f->reply[got] = '\0';
    return got;
}

/* The status of a GET; f->reply has all of the answer. */
static unsigned get(fixture *f, const char *path)
{
    char text[256];
    unsigned code = 0;
    snprintf(text, sizeof(text), "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", path);
    assert_true(talk(f, text, strlen(text)) > 0);
    assert_int_equal(sscanf(f->reply, "HTTP/1.1 %u", &code), 1);
    return code;
}

static bool says(const fixture *f, const char *text)
{
    return strstr(f->reply, text) != NULL;
}

static void failed_usage(kvs_tier *tier, kvs_tier_usage *usage_p)
{
    (void)tier;
    *usage_p = (kvs_tier_usage){.failed = true};
}

static void test_life(void **state)
{
    fixture *f = *state;
    assert_int_equal(get(f, "/readyz"), 503);
    assert_true(says(f, "\r\n\r\nstarting\n"));
    assert_int_equal(get(f, "/healthz"), 200);
    assert_int_equal(get(f, "/metrics"), 200);
    assert_true(says(f, "\nkvasir_ready 0\n") && !says(f, "kvasir_tier_used_bytes"));
    h_server_start(&f->h);
    kvs_admin_show(f->admin, f->h.server);
    assert_int_equal(get(f, "/readyz"), 200);
    assert_true(says(f, "\r\n\r\nready\n"));
    assert_int_equal(get(f, "/metrics"), 200);
    assert_true(says(f, "\nkvasir_ready 1\n"));
    assert_true(says(f, "\nkvasir_tier_failed{tier=\"dram\"} 0\n"));
    kvs_server_drain(f->h.server, 0);
    assert_int_equal(get(f, "/readyz"), 503);
    assert_true(says(f, "\r\n\r\ndraining\n"));
    assert_int_equal(get(f, "/healthz"), 200);
    kvs_admin_show(f->admin, NULL);
    assert_int_equal(get(f, "/readyz"), 503);
    assert_true(says(f, "\r\n\r\nstopping\n"));
}

static void test_failed_tiers(void **state)
{
    fixture *f = *state;
    h_server_start(&f->h);
    kvs_server *server = f->h.server;
    const kvs_tier_ops *good = server->dram.ops;
    kvs_tier_ops bad = *good;
    bad.usage = failed_usage;
    kvs_admin_show(f->admin, server);
    assert_int_equal(get(f, "/readyz"), 200);
    assert_null(server->lmdb.ops);
    server->dram.ops = &bad;
    assert_int_equal(get(f, "/readyz"), 503);
    assert_true(says(f, "\r\n\r\nevery tier has failed\n"));
    assert_int_equal(get(f, "/metrics"), 200);
    assert_true(says(f, "\nkvasir_tier_failed{tier=\"dram\"} 1\n"));
    server->lmdb.ops = good; /* one that works is enough */
    server->lmdb.tier = server->dram.tier;
    assert_int_equal(get(f, "/readyz"), 200);
    server->lmdb.ops = NULL;
    server->lmdb.tier = NULL;
    server->dram.ops = good;
}

/* Calls are counted under their method, within the buckets. */
static void test_latency(void **state)
{
    fixture *f = *state;
    h_server_start(&f->h);
    kvs_admin_show(f->admin, f->h.server);
    h_schema schema;
    h_schema_init(&schema, "latency", 1, 256, false);
    h_peer *peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
    assert_int_equal(h_register(peer, &schema), KVC_OK);
    assert_int_equal(h_put1(peer, &schema, 1, 0, KVC_PROMISE_MEMORY), KVC_OK);
    assert_int_equal(h_put1(peer, &schema, 2, 0, KVC_PROMISE_MEMORY), KVC_OK);
    h_disconnect(peer);
    assert_int_equal(get(f, "/metrics"), 200);
    assert_true(says(f, "\nkvasir_request_duration_seconds_count{method=\"PutBlocks\"} 2\n"));
    assert_true(says(f, "_bucket{method=\"PutBlocks\",le=\"+Inf\"} 2\n"));
    assert_true(says(f, "_count{method=\"RegisterSchema\"} 1\n"));
    assert_true(says(f, "_count{method=\"FetchRows\"} 0\n"));
    assert_false(says(f, "_sum{method=\"PutBlocks\"} 0.000000000\n"));
}

static void test_refusals(void **state)
{
    fixture *f = *state;
    static const char post[] = "POST /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                               "Content-Length: 4\r\n\r\nabcd";
    static const char body[] = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                               "Content-Length: 4\r\n\r\nabcd";
    static const char garbage[] = "\x16\x03\x01\x02 not http at all\r\n\r\n";
    assert_int_equal(get(f, "/"), 404);
    assert_int_equal(get(f, "/metrics/"), 404);
    assert_int_equal(get(f, "/readyz?x=1"), 503);
    talk(f, post, sizeof(post) - 1);
    assert_true(says(f, "HTTP/1.1 405 ") && says(f, "GET, HEAD"));
    talk(f, body, sizeof(body) - 1);
    assert_false(says(f, "200 OK"));
    talk(f, garbage, sizeof(garbage) - 1);
    assert_false(says(f, "200 OK"));
    size_t len_bytes = 64 * 1024;
    char *huge = malloc(len_bytes);
    assert_non_null(huge);
    memset(huge, 'a', len_bytes);
    memcpy(huge, "GET /", 5);
    talk(f, huge, len_bytes);
    assert_false(says(f, "200 OK"));
    free(huge);
    assert_int_equal(get(f, "/healthz"), 200);
}

/* Silent connections take every place; they are closed in time, so a probe is answered again. */
static void test_silent_connections(void **state)
{
    fixture *f = *state;
    int fds[64];
    for (int i = 0; i < 64; i++)
        fds[i] = dial(f);
    assert_int_equal(get(f, "/healthz"), 200);
    for (int i = 0; i < 64; i++)
        close(fds[i]);
    assert_int_equal(get(f, "/healthz"), 200);
}

static uint32_t count_files(void)
{
    uint32_t n = 0;
    DIR *dir = opendir("/proc/self/fd");
    assert_non_null(dir);
    while (readdir(dir) != NULL)
        n++;
    (void)closedir(dir);
    return n;
}

/* However many connect, the port takes descriptors for a few of them: those of its share. */
static void test_idle_connections_take_few_files(void **state)
{
    fixture *f = *state;
    enum { IDLE = 400 };
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(f->port)};
    int fds[IDLE];
    uint32_t own = count_files(), taken = 0;
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (uint32_t i = 0; i < IDLE; i++) {
        fds[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        assert_true(fds[i] >= 0);
        (void)connect(fds[i], (struct sockaddr *)&to, sizeof(to)); /* some wait in the queue */
    }
    own += IDLE;
    for (uint64_t until = kvc_deadline_ns(60000000000ull); taken < KVSI_HTTP_CONNECTIONS;) {
        uint32_t now = count_files() - own;
        taken = now > taken ? now : taken;
        assert_true(taken <= KVSI_HTTP_CONNECTIONS);
        assert_true(kvc_now_ns() < until);
    }
    for (uint32_t i = 0; i < IDLE; i++)
        close(fds[i]);
    assert_int_equal(get(f, "/healthz"), 200);
}

static void test_port_in_use(void **state)
{
    fixture *f = *state;
    kvs_admin *second;
    char listen[32];
    snprintf(listen, sizeof(listen), "127.0.0.1:%u", f->port);
    assert_int_equal(kvs_admin_open(listen, &second), KVC_IO);
    assert_null(second);
}

#define CASE(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(test_life),
        CASE(test_failed_tiers),
        CASE(test_latency),
        CASE(test_refusals),
        CASE(test_silent_connections),
        CASE(test_idle_connections_take_few_files),
        CASE(test_port_in_use),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
