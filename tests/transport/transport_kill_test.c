/*
 * transport_kill_test.c: kill -9 of either end at every state that a request can be in, on every
 * transport whose ends can be two processes: each transfer ends once, with right bytes or an error,
 * the end that is left holds nothing for the other, and goes on with the next.
 *
 * The end that is killed is this program again: "--serve URI STATE FD" or "--ask URI STATE FD",
 * which writes to FD how far it is, and ends with this one. A kill that hit no request is done
 * again. RDMA needs a device: KVASIR_RDMA_ADDRESS. KVASIR_KILL_ROUNDS=N repeats all of it (1).
 * Usage: transport_kill_test [scheme]
 */
#include "fixture.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "base/log.h"
#include "daemon.h"

#define SIDE_BY_SIDE 6u
#define BIG          KVC_MAX_VALUE_BYTES
#define NAP_US       4000u
#define CHILDREN     4u

/* What a child writes: it listens, and its address and a new line follow, or has connected; it has
 * asked; all of that has ended. A server writes the state of each request that comes, as a digit.
 */
#define UP    'u'
#define ASKED 'a'
#define ENDED 'e'

typedef enum state {
    IDLE = 0, /* connected, and nothing is asked */
    BODY,     /* a request's payload is on its way */
    HELD,     /* the server has a request, and has not answered */
    ANSWER,   /* an answer's payload is on its way */
    MESSAGE,  /* one message of a reply that streams has come */
    PUSHED,   /* one message of a request that streams was taken, the next is waited for */
    N_STATES,
} state;

static const kvc_method methods[N_STATES] = {
    KVC_DESCRIBE,   KVC_PUT_BLOCKS,        KVC_STATS,
    KVC_FETCH_ROWS, KVC_FETCH_ROWS_STREAM, KVC_PUT_BLOCKS_STREAM};
static char program[4096];
static uint8_t *pattern; /* [BIG] */
static int report_fd = -1;
static atomic_uint n_seen[N_STATES]; /* requests that came, by their state */
static support_random random_now;
static pid_t living[CHILDREN]; /* children; 0: none */

static void make_pattern(void)
{
    pattern = malloc(BIG);
    for (size_t i = 0; pattern != NULL && i < BIG; i++)
        pattern[i] = (uint8_t)(i * 131 + (i >> 8));
}

static _Noreturn void wait_for_the_end(void)
{
    for (;;)
        (void)pause();
}

static void report_text(const char *text)
{
    size_t len = strlen(text);
    if (report_fd >= 0 && write(report_fd, text, len) != (ssize_t)len)
        _exit(3);
}

static void report(char what)
{
    report_text((char[]){what, '\0'});
}

/* ---- the server's end -------------------------------------------------------------------------
 */

static void on_sent(kvt_call *call, bool ok)
{
    fixture *f = call->user;
    if (ok)
        hold_handler(f, call); /* it has more to say, and never does */
    else
        fixture_reply(f, call, KVC_CANCELLED, "the client has gone", 0, NULL, NULL, 0);
}

static void on_got(kvt_call *call, kvc_status status, const char *why)
{
    fixture_reply(call->user, call, status == KVC_OK ? KVC_INVALID : status, why, 0, NULL, NULL, 0);
}

static bool is_pattern(const struct iovec *data, uint32_t n_data, uint64_t data_bytes)
{
    size_t at = 0;
    for (uint32_t i = 0; i < n_data; at += data[i++].iov_len) {
        if (at + data[i].iov_len > BIG ||
            memcmp(data[i].iov_base, pattern + at, data[i].iov_len) != 0)
            return false;
    }
    return at == data_bytes;
}

static void state_handler(fixture *f, kvt_call *call)
{
    state s = IDLE;
    while (methods[s] != call->req.method)
        s++;
    call->user = f;
    kvc_reply reply = sample_reply(call->req.method, 0, &call->arena);
    kvt_slice slice;
    if (s == BODY) {
        bool right = is_pattern(call->req.data, call->req.n_data, call->req.data_bytes);
        fixture_reply(f, call, right ? KVC_OK : KVC_CORRUPT, NULL, 0, NULL, NULL, 0);
    } else if (s == HELD) {
        hold_handler(f, call);
    } else if (s == ANSWER) {
        slice = counted_slice(f, pattern, BIG);
        fixture_reply(f, call, KVC_OK, NULL, 0, NULL, &slice, 1);
    } else if (s == MESSAGE) {
        call->sent = on_sent;
        if (kvt_call_send(call, &reply, NULL, 0) != KVC_OK)
            _exit(5);
    } else if (s == PUSHED) {
        call->got = on_got;
        kvt_call_recv(call);
    } else {
        fixture_reply(f, call, KVC_OK, NULL, 0, &reply, NULL, 0);
    }
    atomic_fetch_add(&n_seen[s], 1);
    report((char)('0' + (int)s));
}

/* Until it is killed. A server that was killed may have left its address taken for a moment. */
static int serve(const char *uri)
{
    static fixture f;
    char up[sizeof(f.uri) + 3];
    suite_uri = uri;
    fixture_init(&f);
    f.handler = state_handler;
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    kvc_status status = KVC_IO;
    while (status == KVC_IO && !kvc_expired(give_up_ns)) {
        status = f.ops->listen(&f.listen, &f.listener);
        if (status == KVC_IO)
            usleep(50000);
    }
    if (status != KVC_OK)
        return 4;
    f.ops->set_serving(f.listener, true);
    (void)snprintf(up, sizeof(up), "%c%s\n", UP, f.ops->listener_uri(f.listener));
    report_text(up);
    wait_for_the_end();
}

/* ---- the client's end -------------------------------------------------------------------------
 */

typedef struct asked {
    job j; /* first */
    void (*next)(kvt_xfer *xfer);
    struct iovec data;
    bool wrong;
} asked;

static void check_done(kvt_xfer *xfer)
{
    asked *a = (asked *)xfer;
    a->wrong = xfer->status == KVC_CORRUPT ||
               (xfer->status == KVC_OK && xfer->req->method == KVC_FETCH_ROWS &&
                !is_pattern(xfer->reply.data, xfer->reply.n_data, BIG));
    a->next(xfer);
}

/* The stream stays open. */
static void push_no_more(job *j, bool ok)
{
    (void)j;
    (void)ok;
}

static void ask(asked *a, fixture *f, state s)
{
    kvc_request req = sample_request(methods[s], 0, &f->arena);
    if (s == BODY) {
        a->data = (struct iovec){pattern, BIG};
        req.data = &a->data;
        req.n_data = 1;
        req.data_bytes = BIG;
    }
    job_init(&a->j, f, req, PATIENCE_NS);
    a->j.on_pushed = s == PUSHED ? push_no_more : NULL;
    a->next = a->j.xfer.done;
    a->j.xfer.done = check_done;
    a->wrong = false;
    job_submit(&a->j);
}

static uint32_t side_by_side(state s)
{
    return s == BODY || s == ANSWER ? SIDE_BY_SIDE : 1;
}

/* Asks until it is killed. */
static int ask_on(const char *uri, state s)
{
    static fixture f;
    static asked all[SIDE_BY_SIDE];
    suite_uri = uri;
    fixture_init(&f);
    (void)snprintf(f.uri, sizeof(f.uri), "%s", uri);
    fixture_connect(&f, 1);
    ask(&all[0], &f, IDLE);
    wait_done(&f, 1);
    if (all[0].j.status != KVC_OK)
        return 4;
    report(UP);
    for (uint32_t n = f.n_done;; n += side_by_side(s)) {
        for (uint32_t i = 0; s != IDLE && i < side_by_side(s); i++)
            ask(&all[i], &f, s);
        if (s != IDLE)
            report(ASKED);
        if (s != BODY && s != ANSWER)
            wait_for_the_end();
        wait_done(&f, n + side_by_side(s));
        report(ENDED);
        for (uint32_t i = 0; i < side_by_side(s); i++)
            job_fini(&all[i].j);
    }
}

/* ---- processes --------------------------------------------------------------------------------
 */

typedef struct child {
    pid_t pid;
    int fd; /* what it reports */
} child;

static void count_child(pid_t before, pid_t now)
{
    uint32_t i = 0;
    while (i < CHILDREN && living[i] != before)
        i++;
    assert_true(i < CHILDREN);
    living[i] = now;
}

/* Not by fork(), which what runs here already would have to be told of. */
static child spawn(const char *role, const char *uri, state s)
{
    int fds[2];
    char which[16], fd[16];
    child c = {0};
    assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
    assert_int_equal(fcntl(fds[1], F_SETFD, 0), 0);
    (void)snprintf(which, sizeof(which), "%d", (int)s);
    (void)snprintf(fd, sizeof(fd), "%d", fds[1]);
    char *argv[] = {program, (char *)role, (char *)uri, which, fd, NULL};
    c.fd = fds[0];
    assert_int_equal(posix_spawn(&c.pid, program, NULL, NULL, argv, environ), 0);
    (void)close(fds[1]);
    count_child(0, c.pid);
    return c;
}

/* The next that it writes; 0: it has ended. */
static char read_report(const child *c)
{
    char got = 0;
    struct pollfd ready = {.fd = c->fd, .events = POLLIN};
    if (poll(&ready, 1, (int)(PATIENCE_NS / 1000000)) != 1)
        fail_msg("a child writes nothing more");
    return read(c->fd, &got, 1) == 1 ? got : 0;
}

/* Until it has written that. */
static void wait_report(const child *c, char what)
{
    char got;
    while ((got = read_report(c)) != what) {
        if (got == 0)
            fail_msg("a child ended by itself, before '%c'", what);
    }
}

/* The address of a server that is up; [uri_bytes]. */
static void wait_address(const child *server, char *uri, size_t uri_bytes)
{
    size_t n = 0;
    wait_report(server, UP);
    while (n < uri_bytes && (uri[n] = read_report(server)) != '\n')
        assert_true(uri[n++] != 0);
    assert_true(n < uri_bytes);
    uri[n] = '\0';
}

static child start_server(fixture *f)
{
    child server = spawn("--serve", f->uri, IDLE);
    wait_address(&server, f->uri, sizeof(f->uri));
    return server;
}

/* Whether it had asked for something that had not ended when it was killed. */
static bool kill_child(child *c)
{
    int status;
    char last = 0, got;
    assert_int_equal(kill(c->pid, SIGKILL), 0);
    assert_int_equal(waitpid(c->pid, &status, 0), c->pid);
    count_child(c->pid, 0);
    assert_true(WIFSIGNALED(status)); /* else it ended before, by its own fault */
    while ((got = read_report(c)) != 0)
        last = got;
    (void)close(c->fd);
    c->pid = 0;
    return last == ASKED;
}

/* What a case that failed has left. */
static int kill_the_rest(void **state_p)
{
    (void)state_p;
    for (uint32_t i = 0; i < CHILDREN; i++) {
        if (living[i] != 0) {
            (void)kill(living[i], SIGKILL);
            (void)waitpid(living[i], NULL, 0);
        }
        living[i] = 0;
    }
    return 0;
}

/* ---- cases ------------------------------------------------------------------------------------
 */

static void assert_ended(asked *a)
{
    assert_int_equal(atomic_load(&a->j.n_done), 1);
    assert_false(a->wrong);
    assert_true(a->j.status == KVC_OK || a->j.status == KVC_UNAVAILABLE ||
                a->j.status == KVC_CANCELLED || a->j.status == KVC_CLOSED);
    job_fini(&a->j);
}

/* Until the server that took the dead one's place has answered with all of its bytes. */
static void assert_goes_on(fixture *f)
{
    kvc_status status = KVC_UNAVAILABLE;
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (status != KVC_OK && !kvc_expired(give_up_ns)) {
        asked a;
        uint32_t n_done = f->n_done;
        ask(&a, f, ANSWER);
        wait_done(f, n_done + 1);
        status = a.j.status;
        assert_ended(&a);
        if (status != KVC_OK)
            usleep(10000);
    }
    assert_ok(status);
}

/* How many requests had not been answered. */
static uint32_t kill_server_at(fixture *f, child *server, state s)
{
    asked all[SIDE_BY_SIDE];
    uint32_t n = s == IDLE ? 0 : side_by_side(s), n_done = f->n_done, n_hit = 0;
    for (uint32_t i = 0; i < n; i++)
        ask(&all[i], f, s);
    if (s == BODY)
        usleep((useconds_t)support_below(&random_now, NAP_US));
    else if (s != IDLE)
        wait_report(server, (char)('0' + (int)s));
    if (s == MESSAGE)
        support_wait_for(atomic_load(&all[0].j.n_messages) == 1);
    (void)kill_child(server);
    wait_done(f, n_done + n);
    for (uint32_t i = 0; i < n; i++) {
        n_hit += all[i].j.status != KVC_OK;
        assert_ended(&all[i]);
    }
    return n_hit;
}

static void servers_are_killed(void **state_p)
{
    (void)state_p;
    fixture f;
    fixture_init(&f);
    (void)snprintf(f.uri, sizeof(f.uri), "%s", suite_uri);
    child server = start_server(&f);
    fixture_connect(&f, 1);
    assert_goes_on(&f);
    for (int s = 0; s < (int)N_STATES; s++) {
        uint32_t n_hit = 0;
        uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
        do {
            n_hit = kill_server_at(&f, &server, (state)s);
            server = start_server(&f);
            assert_goes_on(&f);
        } while (s != IDLE && n_hit == 0 && !kvc_expired(give_up_ns));
        assert_true(s == IDLE || n_hit > 0);
    }
    fixture_close(&f);
    (void)kill_child(&server);
}

/* Whoever waits for the dead client is told, and nothing is counted or kept for him. */
static void assert_let_go(fixture *f, const kvt_budget *budget)
{
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    for (;;) {
        kvc_mutex_lock(&f->mutex);
        bool told = f->n_held == 0 || kvt_call_cancelled(f->held[0]);
        kvc_mutex_unlock(&f->mutex);
        if (told || kvc_expired(give_up_ns))
            break;
        usleep(1000);
    }
    if (f->n_held > 0)
        assert_true(kvt_call_cancelled(f->held[0]));
    (void)answer_held(f);
    support_wait_for(atomic_load(&budget->used_bytes) == 0);
    support_wait_for(atomic_load(&f->n_released) == atomic_load(&n_seen[ANSWER]));
}

/* A process that has this one's descriptors, as one does that is about to execute another program:
 * connections that end meanwhile have ended all the same. The call itself rather than fork(), after
 * which handlers of libraries would run that have threads here. */
static pid_t fork_idle(void)
{
    pid_t pid = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
    if (pid == 0) {
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        wait_for_the_end();
    }
    assert_true(pid > 0);
    count_child(0, pid);
    return pid;
}

/* Whether the client was waiting for an answer. */
static bool kill_client_at(fixture *f, const kvt_budget *budget, state s)
{
    uint32_t n_before = atomic_load(&n_seen[s]);
    child client = spawn("--ask", f->uri, s);
    wait_report(&client, UP);
    support_wait_for(s == BODY || atomic_load(&n_seen[s]) > n_before);
    if (s == MESSAGE)
        wait_held(f, 1);
    if (s == BODY || s == ANSWER)
        usleep((useconds_t)support_below(&random_now, NAP_US));
    pid_t idle = fork_idle();
    bool hit = kill_child(&client);
    assert_let_go(f, budget);
    asked a;
    uint32_t n_done = f->n_done;
    fixture_connect(f, 1);
    ask(&a, f, BODY);
    wait_done(f, n_done + 1);
    assert_ok(a.j.status);
    assert_ended(&a);
    f->ops->conn_close(f->conn);
    assert_int_equal(kill(idle, SIGKILL), 0);
    assert_int_equal(waitpid(idle, NULL, 0), idle);
    count_child(idle, 0);
    return hit;
}

static void clients_are_killed(void **state_p)
{
    (void)state_p;
    fixture f;
    kvt_budget budget = {.max_bytes = 64u << 20};
    kvt_peers peers = {.max = 16};
    fixture_init(&f);
    for (int s = 0; s < (int)N_STATES; s++)
        atomic_store(&n_seen[s], 0);
    f.handler = state_handler;
    f.listen.inflight = &budget;
    f.listen.peers = &peers;
    fixture_listen(&f);
    for (int s = 0; s < (int)N_STATES; s++) {
        bool hit;
        uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
        do {
            hit = kill_client_at(&f, &budget, (state)s);
        } while (s != IDLE && !hit && !kvc_expired(give_up_ns));
        assert_int_equal(hit, s != IDLE);
    }
    support_wait_for(atomic_load(&peers.n) == 0);
    fixture_connect(&f, 1);
    assert_goes_on(&f);
    fixture_close(&f);
}

static int run_scheme(const char *scheme)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(servers_are_killed, kill_the_rest),
        cmocka_unit_test_teardown(clients_are_killed, kill_the_rest),
    };
    static char uri[300];
    char dir[] = "/tmp/kvasir-kill-XXXXXX";
    const char *address = getenv("KVASIR_RDMA_ADDRESS");
    int n_failed = 0;
    if (strcmp(scheme, "inproc") == 0 || (strcmp(scheme, "rdma") == 0 && address == NULL))
        return 0;
    if (mkdtemp(dir) == NULL)
        return 1;
    if (strcmp(scheme, "rdma") == 0)
        (void)snprintf(uri, sizeof(uri), "rdma://%s:0", address);
    else if (strcmp(scheme, "grpc") == 0)
        support_daemon_address(uri, sizeof(uri));
    else
        (void)snprintf(uri, sizeof(uri), "%s://%s/socket", scheme, dir);
    suite_uri = uri;
    const char *rounds = getenv("KVASIR_KILL_ROUNDS");
    for (uint64_t i = 0; i < (rounds == NULL ? 1 : strtoull(rounds, NULL, 0)); i++)
        n_failed += cmocka_run_group_tests_name(scheme, tests, NULL, NULL);
    if (strchr(uri, '/') != NULL && strstr(uri, dir) != NULL)
        (void)unlink(strstr(uri, dir)); /* what the last of the killed has left */
    (void)rmdir(dir);
    return n_failed;
}

int main(int argc, char **argv)
{
    int n_failed = 0;
    const kvt_ops *ops;
    kvc_log_set_level(getenv("KVASIR_TEST_LOG") != NULL ? KVC_LOG_LEVEL_TRACE : KVC_LOG_LEVEL_OFF);
    make_pattern();
    if (pattern == NULL)
        return 1;
    if (argc == 5) {
        report_fd = (int)strtol(argv[4], NULL, 10);
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        return strcmp(argv[1], "--serve") == 0 ? serve(argv[2])
                                               : ask_on(argv[2], (state)strtol(argv[3], NULL, 10));
    }
    ssize_t len = readlink("/proc/self/exe", program, sizeof(program) - 1);
    random_now = support_seed((uint64_t)kvc_now_ns());
    for (uint32_t i = 0; len > 0 && (ops = kvt_at(i)) != NULL; i++) {
        for (const char *const *scheme = ops->schemes; *scheme != NULL; scheme++) {
            if (argc < 2 || strcmp(argv[1], *scheme) == 0)
                n_failed += run_scheme(*scheme);
        }
    }
    free(pattern);
    return n_failed > 0 || len <= 0;
}
