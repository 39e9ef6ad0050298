/*
 * shm_raw_test.c: peers that speak the frames badly, or change what they have handed over.
 *
 * The client here is a plain socket. After each attack the server serves a good client.
 */
#include "fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "shm_test.h"
#include "wire/frame.h"
#include "wire/wire.h"

/* Connects with a socket whose reads give up after a minute. */
static int raw_connect(const char *uri)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {.tv_sec = SUPPORT_PATIENCE_S};
    (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", uri + strlen("shm://"));
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)), 0);
    assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience)), 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    return fd;
}

static void raw_send(int fd, const void *bytes, size_t n_bytes)
{
    size_t at = 0;
    while (at < n_bytes) {
        ssize_t n = send(fd, (const uint8_t *)bytes + at, n_bytes - at, MSG_NOSIGNAL);
        if (n <= 0)
            return; /* it has been cut off */
        at += (size_t)n;
    }
}

static void raw_frame(int fd, const kvc_frame *frame, const void *body)
{
    uint8_t head[KVC_FRAME_BYTES];
    assert_ok(kvc_frame_encode(frame, head));
    raw_send(fd, head, sizeof(head));
    raw_send(fd, body, kvc_frame_body_bytes(frame));
}

static void raw_hello(int fd)
{
    uint8_t bytes[KVC_HELLO_BYTES];
    kvc_hello hello = {.version = KVC_FRAME_VERSION};
    kvc_frame frame = {.kind = KVC_FRAME_HELLO, .head_bytes = sizeof(bytes)};
    kvc_hello_encode(&hello, bytes);
    raw_frame(fd, &frame, bytes);
}

/* Reads until the server has closed the socket; fails where it does not. */
static void assert_cut_off(int fd)
{
    uint8_t bytes[4096];
    ssize_t n;
    while ((n = recv(fd, bytes, sizeof(bytes), 0)) > 0)
        continue;
    assert_true(n == 0 || (errno != EAGAIN && errno != EWOULDBLOCK));
    (void)close(fd);
}

static void assert_serves(fixture *f)
{
    job j;
    job_init(&j, f, sample_request(KVC_STATS, 0, &f->arena), PATIENCE_NS);
    assert_ok(job_run(&j));
    job_fini(&j);
}

void strangers_are_cut_off(void **state)
{
    (void)state;
    static const char garbage[] =
        "GET / HTTP/1.1\r\nHost: somewhere.invalid\r\nAccept: everything\r\n"
        "User-Agent: something else altogether\r\n\r\n";
    static const kvc_frame bad[] = {
        {.kind = KVC_FRAME_HELLO, .head_bytes = KVC_HELLO_BYTES}, /* a second one */
        {.kind = KVC_FRAME_REQUEST, .method = KVC_STATS, .call = 0},
        {.kind = KVC_FRAME_END, .call = 1},
        {.kind = KVC_FRAME_OWN_FIRST},
        {.kind = KVC_FRAME_REQUEST, .method = KVC_STATS, .call = 1, .flags = 0x0100},
        {.kind = KVC_FRAME_REQUEST,
         .method = KVC_PUT_BLOCKS,
         .call = 1,
         .data_bytes = 1 << 20,
         .flags = KVC_FRAME_ELSEWHERE,
         .spare = {UINT64_MAX - 5}},
        {.kind = KVC_FRAME_REQUEST,
         .method = KVC_PUT_BLOCKS,
         .call = 1,
         .data_bytes = 1 << 20,
         .flags = KVC_FRAME_ELSEWHERE,
         .spare = {(8u << 20) - 4096}},
        {.kind = KVC_FRAME_REQUEST,
         .method = KVC_PUT_BLOCKS,
         .call = 1,
         .data_bytes = 0,
         .flags = KVC_FRAME_ELSEWHERE},
    };
    fixture f;
    uint8_t body[KVC_HELLO_BYTES] = {KVC_FRAME_VERSION};
    fixture_open(&f, 1);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        int fd = raw_connect(f.uri);
        raw_hello(fd);
        raw_frame(fd, &bad[i], body);
        assert_cut_off(fd);
    }
    int fd = raw_connect(f.uri);
    raw_send(fd, garbage, sizeof(garbage));
    assert_cut_off(fd);
    fd = raw_connect(f.uri); /* a request before the hello */
    kvc_frame early = {.kind = KVC_FRAME_REQUEST, .method = KVC_STATS, .call = 1};
    raw_frame(fd, &early, NULL);
    assert_cut_off(fd);
    fd = raw_connect(f.uri); /* two calls of one number, the first still held */
    fixture_handle(&f, hold_handler);
    raw_hello(fd);
    raw_frame(fd, &early, NULL);
    wait_held(&f, 1);
    raw_frame(fd, &early, NULL);
    assert_cut_off(fd);
    assert_int_equal(answer_held(&f), 1);
    fixture_handle(&f, sample_handler);
    assert_serves(&f);
    fixture_close(&f);
    fixture_init(&f);
    f.listen.handshake_ns = 300 * MS;
    fixture_listen(&f);
    fixture_connect(&f, 1);
    assert_cut_off(raw_connect(f.uri)); /* says nothing at all */
    fixture_close(&f);
}

static uint64_t next_random(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return *seed >> 33;
}

/* Good frames in no good order, with every id, flag, kind and length that a frame may have. */
void random_frames_do_no_harm(void **state)
{
    (void)state;
    enum { CONNECTIONS = 150, FRAMES = 40 };
    static uint8_t body[4096];
    fixture f;
    uint64_t seed = 7;
    fixture_init(&f);
    f.listen.max_inflight_bytes = 1u << 20;
    fixture_listen(&f);
    fixture_connect(&f, 1);
    for (uint32_t c = 0; c < CONNECTIONS; c++) {
        int fd = raw_connect(f.uri);
        raw_hello(fd);
        for (uint32_t i = 0; i < FRAMES; i++) {
            kvc_frame frame = {
                .kind = (kvc_frame_kind)(KVC_FRAME_REQUEST + next_random(&seed) % 5),
                .call = 1 + next_random(&seed) % 6,
                .method = (kvc_method)(next_random(&seed) % KVC_METHOD_COUNT),
            };
            bool carries = frame.kind <= KVC_FRAME_MESSAGE;
            frame.head_bytes = carries ? (uint32_t)(next_random(&seed) % 300) : 0;
            frame.data_bytes = carries && next_random(&seed) % 2 ? 1000 : 0;
            if (frame.kind == KVC_FRAME_MESSAGE && next_random(&seed) % 3 == 0)
                frame = (kvc_frame){.kind = KVC_FRAME_MESSAGE,
                                    .flags = KVC_FRAME_LAST,
                                    .method = frame.method,
                                    .call = frame.call};
            for (uint32_t k = 0; k < 300; k++)
                body[k] = (uint8_t)(next_random(&seed) % 16 ? 0 : next_random(&seed));
            raw_frame(fd, &frame, body);
        }
        (void)close(fd); /* also in the middle of what is under way */
    }
    assert_serves(&f);
    fixture_close(&f);
}

/* The ring that the server's hello brought, mapped. */
static uint8_t *raw_ring(int fd, uint64_t *len_p, int *ring_fd_p)
{
    uint8_t bytes[KVC_FRAME_BYTES + KVC_HELLO_BYTES];
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec piece = {bytes, sizeof(bytes)};
    struct msghdr msg = {.msg_iov = &piece,
                         .msg_iovlen = 1,
                         .msg_control = control,
                         .msg_controllen = sizeof(control)};
    kvc_hello hello;
    assert_int_equal(recvmsg(fd, &msg, MSG_WAITALL), sizeof(bytes));
    assert_ok(kvc_hello_decode(bytes + KVC_FRAME_BYTES, KVC_HELLO_BYTES, &hello));
    assert_non_null(CMSG_FIRSTHDR(&msg));
    memcpy(ring_fd_p, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(int));
    *len_p = hello.spare[0];
    uint8_t *base = mmap(NULL, 4096 + *len_p, PROT_READ | PROT_WRITE, MAP_SHARED, *ring_fd_p, 0);
    assert_true(base != MAP_FAILED);
    return base;
}

static uint8_t seen[2][65536];

/* Looks at the data twice, with a pause in which the client scribbles over it. */
static void look_twice(fixture *f, kvt_call *call)
{
    uint32_t n = (uint32_t)call->req.data_bytes;
    assert_int_equal(n, sizeof(seen[0]));
    assert_int_equal(call->req.n_data, 1);
    memcpy(seen[0], call->req.data[0].iov_base, n);
    hold_handler(f, call);
}

/* What the server was given does not change with the ring, and the ring cannot be cut short under
 * it. */
void bytes_changed_under_way(void **state)
{
    (void)state;
    fixture f;
    int ring_fd;
    uint64_t len_bytes;
    const void *head;
    size_t head_bytes;
    fixture_open(&f, 1);
    fixture_handle(&f, look_twice);
    int fd = raw_connect(f.uri);
    raw_hello(fd);
    uint8_t *ring = raw_ring(fd, &len_bytes, &ring_fd);
    assert_int_equal(ftruncate(ring_fd, 4096), -1);
    assert_int_equal(ftruncate(ring_fd, (off_t)(2 * len_bytes)), -1);
    assert_int_equal(fcntl(ring_fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
    memset(ring + 4096, 0x5a, sizeof(seen[0]));
    struct iovec data = {ring + 4096, sizeof(seen[0])};
    kvc_request req = sample_request(KVC_PUT_BLOCKS, 0, &f.arena);
    req.data = &data;
    req.n_data = 1;
    req.data_bytes = sizeof(seen[0]);
    assert_ok(kvc_wire_encode_request(&req, &f.arena, &head, &head_bytes));
    kvc_frame frame = {.kind = KVC_FRAME_REQUEST,
                       .method = KVC_PUT_BLOCKS,
                       .call = 1,
                       .flags = KVC_FRAME_ELSEWHERE,
                       .head_bytes = (uint32_t)head_bytes,
                       .data_bytes = sizeof(seen[0])};
    raw_frame(fd, &frame, head);
    wait_held(&f, 1);
    memset(ring, 0xff, 4096 + sizeof(seen[0])); /* the bytes, and what the server wrote beside */
    memcpy(seen[1], f.held[0]->req.data[0].iov_base, sizeof(seen[1]));
    assert_memory_equal(seen[0], seen[1], sizeof(seen[0]));
    assert_int_equal(seen[0][0], 0x5a);
    assert_int_equal(answer_held(&f), 1);
    (void)munmap(ring, 4096 + len_bytes);
    (void)close(ring_fd);
    (void)close(fd);
    fixture_handle(&f, sample_handler);
    assert_serves(&f);
    fixture_close(&f);
}

static bool holds_one(fixture *f)
{
    kvc_mutex_lock(&f->mutex);
    bool holds = f->n_held == 1;
    kvc_mutex_unlock(&f->mutex);
    return holds;
}

/* A socket on which the server has taken and holds the call that frame begins. On a busy machine it
   may be cut off before it has even said hello: then another one. */
static int raw_held_call(fixture *f, const kvc_frame *frame, const void *head)
{
    for (int i = 0; i < 20; i++) {
        struct pollfd hup = {.fd = raw_connect(f->uri), .events = POLLRDHUP};
        raw_hello(hup.fd);
        raw_frame(hup.fd, frame, head);
        while (!holds_one(f) && poll(&hup, 1, 1) == 0)
            continue;
        if (holds_one(f))
            return hup.fd;
        (void)close(hup.fd);
    }
    fail_msg("the server cuts everybody off");
    return -1;
}

/* A body that stops half way is waited for as long as its call may take, and no longer: it counts
 * against what all connections together may send. */
void half_a_body_is_not_waited_for(void **state)
{
    (void)state;
    static const uint8_t half[1 << 19];
    fixture f;
    job j;
    const void *head;
    size_t head_bytes;
    uint8_t bytes[KVC_FRAME_BYTES];
    fixture_init(&f);
    f.listen.max_inflight_bytes = 1u << 20;
    f.listen.handshake_ns = SECOND;
    fixture_listen(&f);
    fixture_connect(&f, 1);
    int fd = raw_connect(f.uri);
    raw_hello(fd);
    kvc_frame frame = {.kind = KVC_FRAME_REQUEST,
                       .method = KVC_PUT_BLOCKS,
                       .call = 1,
                       .data_bytes = 1 << 20,
                       .deadline_ns = 100 * MS};
    assert_ok(kvc_frame_encode(&frame, bytes));
    raw_send(fd, bytes, sizeof(bytes));
    raw_send(fd, half, sizeof(half));
    assert_cut_off(fd);
    /* The same of a further message, once its call is over and while it is not. */
    fixture_handle(&f, hold_handler);
    for (uint32_t i = 0; i < 2; i++) {
        kvc_request req = sample_request(KVC_PUT_BLOCKS_STREAM, 0, &f.arena);
        assert_ok(kvc_wire_encode_request(&req, &f.arena, &head, &head_bytes));
        frame = (kvc_frame){.kind = KVC_FRAME_REQUEST,
                            .method = KVC_PUT_BLOCKS_STREAM,
                            .call = 1,
                            .head_bytes = (uint32_t)head_bytes,
                            .deadline_ns = i == 0 ? 1 : SECOND};
        fd = raw_held_call(&f, &frame, head);
        frame = (kvc_frame){.kind = KVC_FRAME_MESSAGE,
                            .method = KVC_PUT_BLOCKS_STREAM,
                            .call = 1,
                            .data_bytes = 1000000};
        assert_ok(kvc_frame_encode(&frame, bytes));
        raw_send(fd, bytes, sizeof(bytes));
        raw_send(fd, half, 1000);
        assert_cut_off(fd);
        assert_int_equal(answer_held(&f), 1);
    }
    fixture_handle(&f, sample_handler);
    job_init(&j, &f, sample_request(KVC_PUT_BLOCKS, 3000, &f.arena), PATIENCE_NS);
    assert_ok(job_run(&j));
    job_fini(&j);
    fixture_close(&f);
}

/* More than the socket takes. */
static void long_message_handler(fixture *f, kvt_call *call)
{
    static const uint8_t bytes[1 << 20];
    kvc_reply reply = {.method = call->req.method};
    kvt_slice slice = counted_slice(f, bytes, sizeof(bytes));
    fixture_reply(f, call, KVC_OK, NULL, 0, &reply, &slice, 1);
}

/* A client that asks for the next message of a stream without reading the one before. */
void credit_needs_a_message_that_has_left(void **state)
{
    (void)state;
    fixture f;
    const void *head;
    size_t head_bytes;
    fixture_init(&f);
    f.listen.ring_bytes = 4096; /* so that messages go through the socket */
    fixture_listen(&f);
    fixture_connect(&f, 1);
    fixture_handle(&f, long_message_handler);
    int fd = raw_connect(f.uri);
    kvc_request req = sample_request(KVC_FETCH_ROWS_STREAM, 0, &f.arena);
    assert_ok(kvc_wire_encode_request(&req, &f.arena, &head, &head_bytes));
    kvc_frame frame = {.kind = KVC_FRAME_REQUEST,
                       .method = KVC_FETCH_ROWS_STREAM,
                       .call = 1,
                       .head_bytes = (uint32_t)head_bytes};
    kvc_frame credit = {.kind = KVC_FRAME_CREDIT, .call = 1};
    raw_hello(fd);
    raw_frame(fd, &frame, head);
    raw_frame(fd, &credit, NULL);
    struct pollfd hup = {.fd = fd}; /* to read would let the message leave */
    assert_int_equal(poll(&hup, 1, SUPPORT_PATIENCE_S * 1000), 1);
    assert_true((hup.revents & POLLHUP) != 0);
    assert_cut_off(fd);
    fixture_handle(&f, sample_handler);
    assert_serves(&f);
    fixture_close(&f);
}
