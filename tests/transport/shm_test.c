/*
 * shm_test.c: what the shm transport has beyond the conformance suite: the staging ring,
 * descriptors, who the peer is, when it has gone, and sockets that a dead server left.
 *
 * Each case has its own folder for the socket.
 */
#include "fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "base/log.h"
#include "base/metrics.h"
#include "shm_test.h"
#include "transport/shm/shm_internal.h"

static atomic_ullong gone_peer;
static atomic_uint n_gone;

static void on_gone(void *arg, uint64_t peer)
{
    (void)arg;
    atomic_store(&gone_peer, peer);
    atomic_fetch_add(&n_gone, 1);
}

static void open_watched(fixture *f)
{
    atomic_store(&n_gone, 0);
    fixture_init(f);
    f->listen.peer_gone = on_gone;
    f->listen.ring_bytes = 3u << 20;
    fixture_listen(f);
    fixture_connect(f, 1);
}

static void wait_gone(void)
{
    support_wait_for(atomic_load(&n_gone) > 0);
    assert_int_equal(atomic_load(&n_gone), 1);
}

/* Every byte of a body against its place and the number of its job. */
static void check_body(fixture *f, kvt_call *call)
{
    bool right = call->req.data_bytes > 0;
    for (uint32_t i = 0; i < call->req.n_data && right; i++) {
        const uint8_t *at = call->req.data[i].iov_base;
        for (size_t k = 0; k < call->req.data[i].iov_len && right; k++)
            right = at[k] == (uint8_t)(at[0] + k * 7);
    }
    fixture_reply(f, call, right ? KVC_NOT_FOUND : KVC_CORRUPT, "looked at", 0, NULL, NULL, 0);
}

/* More bodies at once than the ring has room for: some go through it, the rest beside it, and it
 * goes round many times. */
static void bodies_go_through_the_ring(void **state)
{
    (void)state;
    enum { N = 24, ROUNDS = 12 };
    fixture f;
    job jobs[N];
    uint8_t *bytes = malloc(N * (1u << 20));
    assert_non_null(bytes);
    open_watched(&f);
    fixture_handle(&f, check_body);
    uint64_t staged = kvc_metric_get(KVC_M_staged_bytes), sent = 0;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        uint32_t before = f.n_done;
        for (uint32_t i = 0; i < N; i++) {
            uint8_t *at = bytes + i * (1u << 20);
            size_t len = (1u << 20) - (i * 31337u + round * 977u) % 900000;
            for (size_t k = 0; k < len; k++)
                at[k] = (uint8_t)(i * 13 + round + k * 7);
            struct iovec *data = kvc_arena_alloc(&f.arena, sizeof(*data));
            *data = (struct iovec){at, len};
            kvc_request req = sample_request(KVC_PUT_BLOCKS, 0, &f.arena);
            req.data = data;
            req.n_data = 1;
            req.data_bytes = len;
            sent += len;
            job_init(&jobs[i], &f, req, PATIENCE_NS);
            job_submit(&jobs[i]);
        }
        wait_done(&f, before + N);
        for (uint32_t i = 0; i < N; i++) {
            assert_status(jobs[i].status, KVC_NOT_FOUND);
            job_fini(&jobs[i]);
        }
    }
    staged = kvc_metric_get(KVC_M_staged_bytes) - staged;
    assert_true(staged > 3u << 20); /* round at least once */
    assert_true(staged <= sent);
    fixture_close(&f);
    free(bytes);
}

/* Takes what comes, which was checked above, and answers with as much. */
static void echo_length(fixture *f, kvt_call *call)
{
    static const uint8_t zeros[1u << 20];
    kvt_slice slice = {.base = zeros, .len_bytes = sizeof(zeros)};
    fixture_reply(f, call, KVC_OK, NULL, 0, NULL, &slice, call->req.method == KVC_FETCH_ROWS);
}

/* What this process has in memory of rings, mapped at both ends. */
static uint64_t ring_rss_kib(void)
{
    char line[512];
    unsigned long long rss = 0, all = 0;
    bool ring = false;
    FILE *maps = fopen("/proc/self/smaps", "re");
    assert_non_null(maps);
    while (fgets(line, sizeof(line), maps) != NULL) {
        if (strchr(line, '-') != NULL && strchr(line, '-') < strchr(line, ' '))
            ring = strstr(line, "kvasir-ring") != NULL;
        else if (ring && sscanf(line, "Rss: %llu kB", &rss) == 1)
            all += rss;
    }
    (void)fclose(maps);
    return all;
}

static void move_both_ways(fixture *f, uint8_t *bytes)
{
    job put, fetch;
    struct iovec data = {bytes, 1u << 20};
    kvc_request req = sample_request(KVC_PUT_BLOCKS, 0, &f->arena);
    req.data = &data;
    req.n_data = 1;
    req.data_bytes = data.iov_len;
    job_init(&put, f, req, PATIENCE_NS);
    assert_ok(job_run(&put));
    job_fini(&put);
    job_init(&fetch, f, sample_request(KVC_FETCH_ROWS, 0, &f->arena), PATIENCE_NS);
    assert_ok(job_run(&fetch));
    job_fini(&fetch);
}

/* Pages of rings stay while they are used now and then, go when they rest, and come again. */
static void rings_that_rest_hold_no_pages(void **state)
{
    (void)state;
    enum { MIB_KIB = 1024, FEW_KIB = 64 };
    const uint64_t rest_ns = kvti_shm_rest_ns;
    fixture f;
    uint8_t *bytes = calloc(1, 1u << 20);
    assert_non_null(bytes);
    kvti_shm_rest_ns = 3600ull * 1000000000;
    open_watched(&f);
    fixture_handle(&f, echo_length);
    move_both_ways(&f, bytes); /* the first body may leave before the rings are known */
    move_both_ways(&f, bytes);
    assert_true(ring_rss_kib() >= 4 * MIB_KIB); /* two rings, mapped at both ends */
    fixture_close(&f);
    kvti_shm_rest_ns = 20 * 1000000;
    open_watched(&f);
    fixture_handle(&f, echo_length);
    move_both_ways(&f, bytes);
    for (int i = 0; i < 3; i++) {
        uint64_t staged = kvc_metric_get(KVC_M_staged_bytes);
        move_both_ways(&f, bytes);
        assert_true(kvc_metric_get(KVC_M_staged_bytes) - staged >= 1u << 20);
        support_wait_for(ring_rss_kib() <= FEW_KIB);
    }
    fixture_close(&f);
    kvti_shm_rest_ns = rest_ns;
    free(bytes);
}

static int made_fds[2];

/* Passes two memfds whose lengths tell them apart. */
static void fds_handler(fixture *f, kvt_call *call)
{
    for (int i = 0; i < 2; i++) {
        made_fds[i] = memfd_create("test", MFD_CLOEXEC);
        assert_int_equal(ftruncate(made_fds[i], 4096 * (i + 1)), 0);
    }
    int fds[2] = {dup(made_fds[0]), dup(made_fds[1])};
    assert_non_null(call->peer);
    assert_int_equal(call->peer->uid, geteuid());
    assert_int_equal(call->peer->pid, getpid());
    call->fds = fds;
    call->n_fds = 2;
    sample_handler(f, call);
}

static int taken_fd, closed_fd;
static uint32_t n_fds_seen;
static void (*next_done)(kvt_xfer *xfer);

static void take_first(kvt_xfer *xfer)
{
    n_fds_seen = xfer->n_fds;
    if (xfer->n_fds == 2) {
        taken_fd = xfer->fds[0];
        closed_fd = xfer->fds[1];
        xfer->fds[0] = -1;
    }
    next_done(xfer);
}

static void descriptors_are_passed(void **state)
{
    (void)state;
    fixture f;
    job j;
    struct stat info;
    open_watched(&f);
    fixture_handle(&f, fds_handler);
    for (int i = 0; i < 2; i++) {
        job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), PATIENCE_NS);
        next_done = j.xfer.done;
        j.xfer.done = take_first;
        assert_ok(job_run(&j));
        job_fini(&j);
        assert_int_equal(n_fds_seen, 2);
        assert_int_equal(fstat(taken_fd, &info), 0);
        assert_int_equal(info.st_size, 4096);
        (void)close(taken_fd);
        for (int k = 0; k < 2; k++)
            (void)close(made_fds[k]);
    }
    fixture_handle(&f, sample_handler);
    job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), PATIENCE_NS);
    next_done = j.xfer.done;
    j.xfer.done = take_first;
    assert_ok(job_run(&j));
    assert_int_equal(n_fds_seen, 0);
    assert_int_equal(fcntl(closed_fd, F_GETFD), -1); /* what done left was closed */
    job_fini(&j);
    fixture_close(&f);
}

static atomic_bool stand_still;

static void stand_still_done(kvt_xfer *xfer)
{
    while (atomic_load(&stand_still))
        usleep(1000);
    next_done(xfer);
}

/* Whichever end drops descriptors, the other one believes that they have come: both start anew. */
static void dropped_descriptors_end_the_connection(void **state)
{
    (void)state;
    fixture f;
    job j, other;
    open_watched(&f);
    fixture_handle(&f, hold_handler);
    job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), 0);
    job_submit(&j);
    wait_held(&f, 1);
    f.ops->cancel(f.conn, &j.xfer);
    support_wait_for(kvt_call_cancelled(f.held[0]));
    assert_int_equal(atomic_load(&n_gone), 0);
    f.n_held = 0;
    fds_handler(&f, f.held[0]); /* nobody waits for it any more */
    wait_gone();
    for (int k = 0; k < 2; k++)
        (void)close(made_fds[k]);
    job_fini(&j);
    fixture_handle(&f, sample_handler);
    do { /* until the client has seen it too, and has a new one */
        job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), PATIENCE_NS);
        (void)job_run(&j);
        job_fini(&j);
    } while (j.status == KVC_UNAVAILABLE);
    assert_status(j.status, KVC_OK);
    const uint32_t n_calls = atomic_load(&f.n_calls), n_done = f.n_done;
    /* The client gives up what has been answered, while its thread does not look. */
    atomic_store(&n_gone, 0);
    atomic_store(&stand_still, true);
    job_init(&other, &f, sample_request(KVC_STATS, 0, &f.arena), 0);
    next_done = other.xfer.done;
    other.xfer.done = stand_still_done;
    job_submit(&other);
    support_wait_for(atomic_load(&f.n_calls) >= n_calls + 1);
    fixture_handle(&f, fds_handler);
    job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), 0);
    job_submit(&j);
    support_wait_for(atomic_load(&f.n_calls) >= n_calls + 2);
    f.ops->cancel(f.conn, &j.xfer);
    assert_int_equal(atomic_load(&n_gone), 0);
    atomic_store(&stand_still, false);
    wait_gone();
    wait_done(&f, n_done + 2);
    assert_status(j.status, KVC_CANCELLED);
    for (int k = 0; k < 2; k++)
        (void)close(made_fds[k]);
    job_fini(&j);
    job_fini(&other);
    fixture_close(&f);
}

/* Once the last call was answered, and not before. */
static void the_server_hears_when_a_peer_has_gone(void **state)
{
    (void)state;
    fixture f;
    job j;
    open_watched(&f);
    fixture_handle(&f, hold_handler);
    job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), 0);
    job_submit(&j);
    wait_held(&f, 1);
    uint64_t id = f.held[0]->peer->id;
    assert_true(id != 0);
    f.ops->conn_close(f.conn);
    support_wait_for(kvt_call_cancelled(f.held[0]));
    assert_int_equal(atomic_load(&n_gone), 0);
    assert_int_equal(answer_held(&f), 1);
    wait_gone();
    assert_true(atomic_load(&gone_peer) == id);
    job_fini(&j);
    fixture_connect(&f, 1);
    fixture_close(&f);
}

/* What a killed server leaves is taken over; what a server listens on, or is no socket, is not. */
static void left_sockets_are_taken_over(void **state)
{
    (void)state;
    fixture f;
    struct stat info;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = suite_uri + strlen("shm://");
    (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    (void)close(fd);
    open_watched(&f);
    job j;
    job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), PATIENCE_NS);
    assert_ok(job_run(&j));
    job_fini(&j);
    kvt_listener *second = NULL;
    assert_status(f.ops->listen(&f.listen, &second), KVC_IO);
    fixture_close(&f);
    assert_int_equal(stat(path, &info), -1);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    (void)fclose(file);
    fixture_init(&f);
    assert_status(f.ops->listen(&f.listen, &second), KVC_IO);
    assert_int_equal(stat(path, &info), 0); /* somebody's file stays */
    assert_int_equal(unlink(path), 0);
    kvc_arena_reset(&f.arena);
}

int main(void)
{
    static char uri[128];
    char dir[] = "/tmp/kvasir-shm-XXXXXX";
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bodies_go_through_the_ring),
        cmocka_unit_test(rings_that_rest_hold_no_pages),
        cmocka_unit_test(descriptors_are_passed),
        cmocka_unit_test(dropped_descriptors_end_the_connection),
        cmocka_unit_test(the_server_hears_when_a_peer_has_gone),
        cmocka_unit_test(left_sockets_are_taken_over),
        cmocka_unit_test(strangers_are_cut_off),
        cmocka_unit_test(random_frames_do_no_harm),
        cmocka_unit_test(bytes_changed_under_way),
        cmocka_unit_test(half_a_body_is_not_waited_for),
        cmocka_unit_test(credit_needs_a_message_that_has_left),
    };
    kvc_log_set_level(getenv("KVASIR_TEST_LOG") != NULL ? KVC_LOG_LEVEL_TRACE : KVC_LOG_LEVEL_OFF);
    if (mkdtemp(dir) == NULL)
        return 1;
    (void)snprintf(uri, sizeof(uri), "shm://%s/socket", dir);
    suite_uri = uri;
    int n_failed = cmocka_run_group_tests_name("shm", tests, NULL, NULL);
    (void)rmdir(dir);
    return n_failed;
}
