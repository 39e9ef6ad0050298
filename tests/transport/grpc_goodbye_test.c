/*
 * grpc_goodbye_test.c: how long a drain over gRPC waits for who has nothing to say.
 *
 * The silent peer here is a socket of the test's thread.
 */
#include "fixture.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"

/* A connection that says hello and then nothing more, seen by the server. */
static int connect_silent(const char *uri)
{
    static const char hello[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0";
    uint8_t settings[9];
    struct sockaddr_in addr = {.sin_family = AF_INET};
    addr.sin_port = htons((in_port_t)strtoul(strrchr(uri, ':') + 1, NULL, 10));
    assert_int_equal(inet_pton(AF_INET, "127.0.0.1", &addr.sin_addr), 1);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&addr, sizeof(addr)), 0);
    assert_int_equal(send(fd, hello, sizeof(hello) - 1, 0), sizeof(hello) - 1);
    assert_int_equal(recv(fd, settings, sizeof(settings), MSG_WAITALL), sizeof(settings));
    return fd;
}

static uint64_t drain_ns(uint64_t deadline_ns)
{
    fixture f;
    fixture_init(&f);
    fixture_listen(&f);
    int fd = connect_silent(f.uri);
    uint64_t began_ns = kvc_now_ns();
    f.ops->drain(f.listener, deadline_ns);
    uint64_t took_ns = kvc_now_ns() - began_ns;
    (void)close(fd);
    fixture_close_server(&f);
    kvc_arena_reset(&f.arena);
    return took_ns;
}

/* A peer that does not close is not waited for beyond the deadline, but for a moment. */
static void a_silent_peer_does_not_hold_a_drain_up(void **state)
{
    (void)state;
    uint64_t least_ns = UINT64_MAX;
    /* A busy machine may take its time as well; it never takes less than was waited for. */
    for (int i = 0; i < 20 && least_ns > SECOND; i++) {
        uint64_t took_ns = drain_ns(kvc_now_ns());
        if (took_ns < least_ns)
            least_ns = took_ns;
    }
    assert_true(least_ns <= SECOND);
    assert_true(drain_ns(0) > SECOND); /* with time left, it is */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_silent_peer_does_not_hold_a_drain_up),
    };
    suite_uri = "grpc://127.0.0.1:0";
    kvc_log_set_level(KVC_LOG_LEVEL_OFF);
    return cmocka_run_group_tests_name("grpc_goodbye", tests, NULL, NULL);
}
