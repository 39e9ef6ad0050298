/*
 * listen.c: the listening end's life: the socket, the loops and their threads, drain and close.
 *
 * Threads "kvt-shm-N", one per loop; the first also accepts. A loop's peers are its thread's; other
 * threads put them in its ready list and wake it.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "shm_server.h"

#define NS_PER_MS    1000000ull
#define EVENTS       64
#define BACKLOG      512
#define HANDSHAKE_NS (10000 * NS_PER_MS)

/* ---- loops ------------------------------------------------------------------------------------
 */

static void wake(kvti_loop *loop)
{
    uint64_t one = 1;
    ssize_t n = write(loop->wake_fd, &one, sizeof(one)); /* full: it is awake already */
    (void)n;
}

void kvti_peer_wake(kvti_peer *peer)
{
    kvti_loop *loop = peer->loop;
    kvc_mutex_lock(&loop->lock);
    bool first = !peer->ready;
    if (first) {
        peer->ready = true;
        peer->next_ready = NULL;
        *loop->ready_end = peer;
        loop->ready_end = &peer->next_ready;
        loop->n_ready++;
        atomic_fetch_add(&peer->refs, 1);
    }
    kvc_mutex_unlock(&loop->lock);
    if (first)
        wake(loop);
}

static void leave_loop(kvti_loop *loop, kvti_peer *peer)
{
    if (peer->prev != NULL)
        peer->prev->next = peer->next;
    else
        loop->peers = peer->next;
    if (peer->next != NULL)
        peer->next->prev = peer->prev;
    peer->joined = false;
    kvti_peer_unref(peer);
}

static void join_loop(kvti_loop *loop, kvti_peer *peer)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = peer};
    peer->joined = true;
    peer->polls = EPOLLIN;
    peer->next = loop->peers;
    if (peer->next != NULL)
        peer->next->prev = peer;
    loop->peers = peer;
    atomic_fetch_add(&peer->refs, 1);
    if (epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, peer->pipe.fd, &event) != 0)
        kvti_peer_gone(peer, "it cannot be waited for");
    loop->next_late_ns = 1; /* it has to greet in time */
}

/* After anything that may have changed it: what the loop waits for, and whether it is over. */
static void settle(kvti_loop *loop, kvti_peer *peer)
{
    if (!peer->joined)
        return;
    if (peer->closed) {
        leave_loop(loop, peer);
        return;
    }
    kvc_mutex_lock(&peer->lock);
    bool blocked = peer->pipe.blocked;
    uint32_t n_out = peer->pipe.n_out;
    kvc_mutex_unlock(&peer->lock);
    uint32_t want = (blocked ? (uint32_t)EPOLLOUT : 0) |
                    (blocked && n_out > KVTI_SHM_OUT_MAX ? 0 : (uint32_t)EPOLLIN);
    if (want == peer->polls)
        return;
    struct epoll_event event = {.events = want, .data.ptr = peer};
    (void)epoll_ctl(loop->epoll_fd, EPOLL_CTL_MOD, peer->pipe.fd, &event);
    peer->polls = want;
}

/* Another thread has had something to do with it, or it is new. */
static void run_peer(kvti_loop *loop, kvti_peer *peer, bool kill)
{
    if (!peer->joined && !peer->closed && peer->polls == 0)
        join_loop(loop, peer);
    kvti_peer_work(peer);
    if (kill)
        kvti_peer_gone(peer, "the server has shut down");
    settle(loop, peer);
}

/* Those that are ready now; who becomes ready meanwhile has its turn after the sockets. */
static void run_ready(kvti_loop *loop)
{
    kvc_mutex_lock(&loop->lock);
    uint32_t n = loop->n_ready;
    bool kill = loop->kill;
    kvc_mutex_unlock(&loop->lock);
    for (; n > 0; n--) {
        kvc_mutex_lock(&loop->lock);
        kvti_peer *peer = loop->ready;
        loop->ready = peer->next_ready;
        if (loop->ready == NULL)
            loop->ready_end = &loop->ready;
        loop->n_ready--;
        peer->ready = false;
        kvc_mutex_unlock(&loop->lock);
        run_peer(loop, peer, kill);
        kvti_peer_unref(peer);
    }
}

static void run_kill(kvti_loop *loop)
{
    kvti_peer *next;
    for (kvti_peer *peer = loop->peers; peer != NULL; peer = next) {
        next = peer->next;
        kvti_peer_gone(peer, "the server has shut down");
        settle(loop, peer);
    }
}

static void run_late(kvti_loop *loop)
{
    uint64_t now_ns = kvc_now_ns(), first_ns = 0;
    kvti_peer *next;
    if (loop->next_late_ns == 0 || now_ns < loop->next_late_ns)
        return;
    for (kvti_peer *peer = loop->peers; peer != NULL; peer = next) {
        next = peer->next;
        uint64_t late_ns = kvti_peer_late(peer, now_ns);
        if (late_ns != 0 && (first_ns == 0 || late_ns < first_ns))
            first_ns = late_ns;
        settle(loop, peer);
    }
    loop->next_late_ns = first_ns;
}

/* Looks at the rings of replies when it is time; again later while one holds pages, or may soon. */
static void run_rest(kvti_loop *loop)
{
    uint64_t now_ns = kvc_now_ns();
    bool again = false;
    if (loop->next_rest_ns == 0 || now_ns < loop->next_rest_ns)
        return;
    for (kvti_peer *peer = loop->peers; peer != NULL; peer = peer->next) {
        kvc_mutex_lock(&peer->lock);
        kvti_ring_rest(&peer->reply_ring);
        again = again || peer->calls.n > 0 || kvti_ring_holds_pages(&peer->reply_ring);
        kvc_mutex_unlock(&peer->lock);
    }
    loop->next_rest_ns = again ? now_ns + kvti_shm_rest_ns : 0;
}

/* ---- accepting --------------------------------------------------------------------------------
 */

static _Atomic uint64_t last_peer; /* of this process: several listeners may serve one server */

static void accept_one(kvt_listener *listener, int fd)
{
    kvti_loop *loop = &listener->loops[listener->next_loop++ % listener->n_loops];
    kvc_mutex_lock(&listener->lock);
    bool room = (listener->opts.peers != NULL || listener->n_peers < KVTI_SHM_MAX_PEERS) &&
                kvti_peers_take(listener->opts.peers);
    listener->n_peers += room;
    kvc_mutex_unlock(&listener->lock);
    kvti_peer *peer = room ? kvti_peer_create(loop, fd) : NULL;
    if (peer != NULL) {
        peer->base.id = atomic_fetch_add(&last_peer, 1) + 1;
        kvti_peer_wake(peer);
        kvti_peer_unref(peer); /* the loop's is taken when it joins */
        return;
    }
    if (room)
        KVC_LOG_WARN(SHM, "a connection was refused: memory is out");
    (void)close(fd);
    kvc_mutex_lock(&listener->lock);
    listener->n_peers -= room;
    kvc_mutex_unlock(&listener->lock);
    if (room)
        kvti_peers_give(listener->opts.peers, 1);
}

static void run_accept(kvt_listener *listener)
{
    for (int i = 0; i < EVENTS; i++) {
        kvc_mutex_lock(&listener->lock); /* a drain closes the socket */
        int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        int error = errno;
        kvc_mutex_unlock(&listener->lock);
        if (fd >= 0) {
            accept_one(listener, fd);
        } else if (error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM) {
            KVC_LOG_WARN(SHM, "cannot accept a connection: %s", strerror(error));
            (void)usleep(10000); /* it stays readable: do not spin */
            return;
        } else {
            return;
        }
    }
}

/* ---- the threads ------------------------------------------------------------------------------
 */

static int wait_ms(const kvti_loop *loop)
{
    uint64_t now_ns = kvc_now_ns(), next_ns = loop->next_late_ns;
    if (next_ns == 0 || (loop->next_rest_ns != 0 && loop->next_rest_ns < next_ns))
        next_ns = loop->next_rest_ns;
    if (next_ns == 0)
        return -1;
    if (next_ns <= now_ns)
        return 0;
    uint64_t left_ms = (next_ns - now_ns + NS_PER_MS - 1) / NS_PER_MS;
    return left_ms > 60000 ? 60000 : (int)left_ms;
}

static void run_event(kvti_loop *loop, const struct epoll_event *event)
{
    uint64_t n;
    if (event->data.ptr == loop) {
        while (read(loop->wake_fd, &n, sizeof(n)) > 0)
            continue;
    } else if (event->data.ptr == loop->listener) {
        run_accept(loop->listener);
    } else {
        kvti_peer *peer = event->data.ptr;
        if (event->events & ~(uint32_t)EPOLLOUT)
            kvti_peer_readable(peer);
        kvti_peer_work(peer);
        settle(loop, peer);
    }
}

static void run_loop(void *arg)
{
    kvti_loop *loop = arg;
    struct epoll_event events[EVENTS];
    bool stopping = false, kill = false;
    while (!stopping) {
        int n = epoll_wait(loop->epoll_fd, events, EVENTS, wait_ms(loop));
        for (int i = 0; i < n; i++)
            run_event(loop, &events[i]);
        run_ready(loop);
        if (kill)
            run_kill(loop);
        run_late(loop);
        run_rest(loop);
        kvc_mutex_lock(&loop->lock);
        if (loop->kill && !kill)
            wake(loop); /* once more, now that it is known */
        loop->killed = kill;
        kill = loop->kill;
        stopping = loop->stopping;
        kvc_cond_broadcast(&loop->changed);
        kvc_mutex_unlock(&loop->lock);
    }
}

static kvc_status start_loop(kvt_listener *listener, uint32_t i)
{
    char name[16];
    kvti_loop *loop = &listener->loops[i];
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = loop};
    loop->listener = listener;
    loop->ready_end = &loop->ready;
    kvc_mutex_init(&loop->lock, KVC_RANK_QUEUE);
    kvc_cond_init(&loop->changed);
    listener->n_loops = i + 1;
    loop->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (loop->wake_fd < 0 || loop->epoll_fd < 0 ||
        epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, loop->wake_fd, &event) != 0)
        return KVC_NO_MEMORY;
    event.data.ptr = listener;
    if (i == 0 && epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, listener->fd, &event) != 0)
        return KVC_NO_MEMORY;
    (void)snprintf(name, sizeof(name), "kvt-shm-%u", (uint8_t)i);
    return kvc_thread_start(&loop->thread, name, run_loop, loop);
}

static void tell_loops(kvt_listener *listener, bool stop)
{
    for (uint32_t i = 0; i < listener->n_loops; i++) {
        kvti_loop *loop = &listener->loops[i];
        kvc_mutex_lock(&loop->lock);
        loop->kill = true;
        loop->stopping = stop;
        kvc_mutex_unlock(&loop->lock);
        wake(loop);
    }
}

/* Until no call has a client any more. */
static void wait_killed(kvt_listener *listener)
{
    for (uint32_t i = 0; i < listener->n_loops; i++) {
        kvti_loop *loop = &listener->loops[i];
        kvc_mutex_lock(&loop->lock);
        while (!loop->killed)
            kvc_cond_wait(&loop->changed, &loop->lock);
        kvc_mutex_unlock(&loop->lock);
    }
}

static void stop_loops(kvt_listener *listener)
{
    tell_loops(listener, true);
    for (uint32_t i = 0; i < listener->n_loops; i++) {
        kvti_loop *loop = &listener->loops[i];
        kvc_thread_join(&loop->thread);
        if (loop->wake_fd >= 0)
            (void)close(loop->wake_fd);
        if (loop->epoll_fd >= 0)
            (void)close(loop->epoll_fd);
        kvc_cond_fini(&loop->changed);
        kvc_mutex_fini(&loop->lock);
    }
}

/* ---- the socket -------------------------------------------------------------------------------
 */

/* Whether a server answers there; a socket that one left behind when it was killed does not. */
static bool somebody_listens(const struct sockaddr_un *address)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    bool refused = fd >= 0 &&
                   connect(fd, (const struct sockaddr *)address, sizeof(*address)) != 0 &&
                   errno == ECONNREFUSED;
    if (fd >= 0)
        (void)close(fd);
    return !refused;
}

static bool bind_socket(int fd, const struct sockaddr_un *address)
{
    struct stat info;
    if (bind(fd, (const struct sockaddr *)address, sizeof(*address)) == 0)
        return true;
    if (errno != EADDRINUSE || stat(address->sun_path, &info) != 0 || !S_ISSOCK(info.st_mode) ||
        somebody_listens(address)) {
        errno = EADDRINUSE;
        return false;
    }
    return unlink(address->sun_path) == 0 &&
           bind(fd, (const struct sockaddr *)address, sizeof(*address)) == 0;
}

static kvc_status open_socket(kvt_listener *listener)
{
    struct stat info;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return KVC_IO;
    if (!bind_socket(fd, &listener->address) || listen(fd, BACKLOG) != 0 ||
        stat(listener->address.sun_path, &info) != 0) {
        KVC_LOG_ERROR(SHM, "cannot listen on %s: %s", listener->uri, strerror(errno));
        (void)close(fd);
        return KVC_IO;
    }
    listener->fd = fd;
    listener->inode = info.st_ino;
    return KVC_OK;
}

/* Unless another server has put its own there meanwhile. */
static void remove_socket(kvt_listener *listener)
{
    struct stat info;
    kvc_mutex_lock(&listener->lock);
    int fd = listener->fd;
    listener->fd = -1;
    kvc_mutex_unlock(&listener->lock);
    if (fd < 0)
        return;
    if (stat(listener->address.sun_path, &info) == 0 && info.st_ino == listener->inode)
        (void)unlink(listener->address.sun_path);
    (void)shutdown(fd, SHUT_RDWR);
    (void)close(fd);
}

/* ---- the table's slots ------------------------------------------------------------------------
 */

static void default_opts(kvt_listen_opts *opts)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    if (opts->max_message_bytes == 0)
        opts->max_message_bytes = KVC_MAX_VALUE_BYTES;
    if (opts->max_calls == 0)
        opts->max_calls = KVTI_MAX_CALLS;
    if (opts->max_inflight_bytes == 0)
        opts->max_inflight_bytes = KVTI_MAX_INFLIGHT_BYTES;
    if (opts->max_deadline_ns == 0)
        opts->max_deadline_ns = KVTI_MAX_DEADLINE_NS;
    if (opts->handshake_ns == 0)
        opts->handshake_ns = HANDSHAKE_NS;
    if (opts->ring_bytes == 0)
        opts->ring_bytes = KVTI_SHM_RING_BYTES;
    if (opts->n_threads == 0)
        opts->n_threads = cores > 4 ? 4 : cores < 1 ? 1 : (uint32_t)cores;
    if (opts->n_threads > KVTI_SHM_LOOPS_MAX)
        opts->n_threads = KVTI_SHM_LOOPS_MAX;
}

static void free_listener(kvt_listener *listener)
{
    kvc_cond_fini(&listener->changed);
    kvc_mutex_fini(&listener->lock);
    free(listener);
}

kvc_status kvti_shm_listen(const kvt_listen_opts *opts, kvt_listener **listener_p)
{
    struct sockaddr_un address;
    *listener_p = NULL;
    kvt_init();
    if (opts->size_bytes != sizeof(*opts) || opts->on_call == NULL ||
        opts->max_message_bytes > KVC_MAX_VALUE_BYTES || opts->ring_bytes > KVTI_SHM_RING_MAX ||
        kvti_shm_address(opts->uri, &address) != KVC_OK)
        return KVC_INVALID;
    kvt_listener *listener = calloc(1, sizeof(*listener));
    if (listener == NULL)
        return KVC_NO_MEMORY;
    listener->opts = *opts;
    listener->address = address;
    listener->fd = -1;
    (void)snprintf(listener->uri, sizeof(listener->uri), "shm://%s", address.sun_path);
    listener->opts.uri = listener->uri;
    default_opts(&listener->opts);
    listener->budget = kvti_budget(&listener->opts, &listener->own_budget);
    kvc_mutex_init(&listener->lock, KVC_RANK_QUEUE);
    kvc_cond_init(&listener->changed);
    kvc_status status = open_socket(listener);
    if (status != KVC_OK)
        goto err_socket;
    for (uint32_t i = 0; status == KVC_OK && i < listener->opts.n_threads; i++)
        status = start_loop(listener, i);
    if (status != KVC_OK)
        goto err_loops;
    *listener_p = listener;
    return KVC_OK;

err_loops:
    stop_loops(listener);
    remove_socket(listener);
err_socket:
    free_listener(listener);
    return status;
}

const char *kvti_shm_listener_uri(const kvt_listener *listener)
{
    return listener->uri;
}

void kvti_shm_set_serving(kvt_listener *listener, bool serving)
{
    kvc_mutex_lock(&listener->lock);
    listener->serving = serving && !listener->draining;
    kvc_mutex_unlock(&listener->lock);
}

void kvti_shm_drain(kvt_listener *listener, uint64_t deadline_ns)
{
    kvc_mutex_lock(&listener->lock);
    listener->draining = true;
    listener->serving = false;
    while (listener->n_calls > 0 && !kvc_expired(deadline_ns))
        (void)kvc_cond_wait_until(&listener->changed, &listener->lock, deadline_ns);
    kvc_mutex_unlock(&listener->lock);
    remove_socket(listener);
    tell_loops(listener, false);
    wait_killed(listener);
}

void kvti_shm_listener_close(kvt_listener *listener)
{
    if (listener == NULL)
        return;
    kvti_shm_drain(listener, 1);
    kvc_mutex_lock(&listener->lock);
    while (listener->n_calls > 0 || listener->n_peers > 0)
        kvc_cond_wait(&listener->changed, &listener->lock);
    kvc_mutex_unlock(&listener->lock);
    stop_loops(listener);
    free_listener(listener);
}
