/*
 * loop.c: the thread of a listener or a connection: events of the device, and what others queued.
 *
 * One thread ("kvt-rdma" or "kvc-rdma") per loop waits for its event channels and for wake_fd.
 * Links are destroyed here only, after the events of a turn, so that none of them names a freed
 * one.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "rdma_internal.h"

#define EVENTS_AT_ONCE 32

void kvtr_loop_wake(kvtr_loop *loop)
{
    uint64_t one = 1;
    if (loop->awake)
        return;
    loop->awake = true;
    if (write(loop->wake_fd, &one, sizeof(one)) < 0)
        KVC_LOG_ERROR(RDMA, "cannot wake a thread: %s", strerror(errno));
}

kvtr_junk kvtr_junk_take(kvtr_loop *loop)
{
    kvtr_junk junk = loop->junk;
    loop->junk = (kvtr_junk){0};
    /* Buffers go back under the mutex; slices, which are others', without it. */
    for (kvtr_out *out = junk.outs; out != NULL; out = out->next) {
        kvtr_buf_put(out->buf);
        out->buf = NULL;
        if (out->counted == NULL)
            continue;
        --*out->counted;
        out->counted = NULL;
        kvc_cond_broadcast(&loop->changed);
    }
    return junk;
}

void kvtr_junk_free(kvtr_junk *junk)
{
    while (junk->outs != NULL) {
        kvtr_out *out = junk->outs;
        junk->outs = out->next;
        kvtr_out_free(out);
    }
}

static void read_wake(kvtr_loop *loop)
{
    uint64_t n;
    kvc_mutex_lock(&loop->mutex);
    loop->awake = false;
    while (read(loop->wake_fd, &n, sizeof(n)) > 0)
        continue;
    kvc_mutex_unlock(&loop->mutex);
}

/* Events are copied and acknowledged before they are looked at: an id with events that are not
 * cannot be destroyed. */
static void read_cm(kvtr_loop *loop)
{
    struct rdma_cm_event *event;
    uint8_t data[256];
    while (kvtr_verbs_now->get_cm_event(loop->cm, &event) == 0) {
        struct rdma_cm_event copy = *event;
        size_t len_bytes = event->param.conn.private_data_len;
        if (event->param.conn.private_data == NULL)
            len_bytes = 0;
        if (len_bytes > sizeof(data))
            len_bytes = sizeof(data);
        if (len_bytes > 0)
            memcpy(data, event->param.conn.private_data, len_bytes);
        copy.param.conn.private_data = data;
        copy.param.conn.private_data_len = (uint8_t)(len_bytes > 255 ? 255 : len_bytes);
        (void)kvtr_verbs_now->ack_cm_event(event);
        loop->owner->on_cm(loop, copy.id, &copy);
    }
}

static bool has_calls(const kvtr_link *link)
{
    uint32_t b = 0;
    while (b < KVTI_CALL_BUCKETS && link->calls[b] == NULL)
        b++;
    return b < KVTI_CALL_BUCKETS;
}

static bool too_old(const kvtr_loop *loop, const kvtr_link *link, uint64_t now_ns)
{
    if (link->state == KVTI_LINK_CONNECTING || !link->spoken)
        return loop->handshake_ns != 0 && now_ns > link->born_ns + loop->handshake_ns;
    return loop->idle_ns != 0 && now_ns > link->used_ns + loop->idle_ns && !has_calls(link);
}

/* A peer whose host has died says nothing: only something sent to it finds out. */
static void keep_alive(kvtr_link *link, uint64_t now_ns)
{
    uint64_t quiet_ns = link->loop->keepalive_ns;
    uint64_t last_ns = link->heard_ns > link->said_ns ? link->heard_ns : link->said_ns;
    if (quiet_ns == 0 || link->state != KVTI_LINK_UP || !link->spoken ||
        now_ns < last_ns + quiet_ns)
        return;
    link->nudge = true; /* the pump sends a fragment without bytes */
    kvtr_pump(link);
}

static kvtr_link *next_broken(kvtr_loop *loop, uint64_t now_ns)
{
    kvc_mutex_lock(&loop->mutex);
    kvtr_link *link = loop->links;
    for (; link != NULL && !link->broken && !loop->stopping; link = link->next) {
        if (too_old(loop, link, now_ns))
            kvtr_link_break(link, "the connection was idle");
        else
            keep_alive(link, now_ns);
        if (link->broken)
            break;
    }
    kvc_mutex_unlock(&loop->mutex);
    return link;
}

static void take_turn(kvtr_loop *loop, uint64_t *next_ns_p)
{
    kvtr_link *link;
    *next_ns_p = loop->owner->on_turn(loop);
    while ((link = next_broken(loop, kvc_now_ns())) != NULL)
        kvtr_link_destroy(link);
    kvc_mutex_lock(&loop->mutex);
    kvtr_junk junk = kvtr_junk_take(loop);
    kvc_mutex_unlock(&loop->mutex);
    kvtr_junk_free(&junk);
    kvtr_pool_trim(loop);
    kvtr_domains_sweep(loop);
}

static int timeout_ms(uint64_t next_ns)
{
    uint64_t now_ns = kvc_now_ns(), most_ns = now_ns + KVTI_TICK_NS;
    if (next_ns == 0 || next_ns > most_ns)
        next_ns = most_ns;
    return next_ns <= now_ns ? 0 : (int)((next_ns - now_ns + 999999) / 1000000);
}

static bool is_stopping(kvtr_loop *loop)
{
    kvc_mutex_lock(&loop->mutex);
    bool stopping = loop->stopping;
    kvc_mutex_unlock(&loop->mutex);
    return stopping;
}

static void run_loop(void *arg)
{
    kvtr_loop *loop = arg;
    struct epoll_event events[EVENTS_AT_ONCE];
    uint64_t next_ns = 0;
    while (!is_stopping(loop)) {
        int n = epoll_wait(loop->epoll_fd, events, EVENTS_AT_ONCE, timeout_ms(next_ns));
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr == &loop->wake_fd)
                read_wake(loop);
            else if (events[i].data.ptr == &loop->cm)
                read_cm(loop);
            else
                kvtr_link_poll(events[i].data.ptr);
        }
        take_turn(loop, &next_ns);
    }
    kvtr_ranges_stop(loop);
    take_turn(loop, &next_ns); /* stopping: every link goes */
    (void)loop->owner->on_turn(loop);
}

static bool watch(kvtr_loop *loop, int fd, void *what)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = what};
    int flags = fcntl(fd, F_GETFL);
    return flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0 &&
           epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0;
}

kvc_status kvtr_loop_init(kvtr_loop *loop, const char *thread_name)
{
    kvc_status status = KVC_DEVICE;
    kvc_mutex_init(&loop->mutex, KVC_RANK_TRANSPORT);
    kvc_cond_init(&loop->changed);
    kvc_cond_init(&loop->range_wanted);
    loop->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    loop->cm = kvtr_verbs_now->create_event_channel();
    if (loop->cm == NULL) {
        KVC_LOG_ERROR(RDMA,
                      "no RDMA connection manager: %s; is the module rdma_ucm loaded, and is "
                      "/dev/infiniband in this container?",
                      strerror(errno));
        status = KVC_UNAVAILABLE;
        goto err_fds;
    }
    if (loop->wake_fd < 0 || loop->epoll_fd < 0 || !watch(loop, loop->wake_fd, &loop->wake_fd) ||
        !watch(loop, loop->cm->fd, &loop->cm))
        goto err_fds;
    if (loop->pool_keep_ns == 0)
        loop->pool_keep_ns = KVTI_KEEP_NS;
    status = kvtr_ranges_start(loop, loop->is_client ? "kvc-rdma-reg" : "kvt-rdma-reg");
    if (status == KVC_OK)
        status = kvc_thread_start(&loop->thread, thread_name, run_loop, loop);
    if (status == KVC_OK)
        return KVC_OK;
err_fds:
    kvtr_loop_fini(loop);
    return status;
}

void kvtr_loop_fini(kvtr_loop *loop)
{
    kvc_mutex_lock(&loop->mutex);
    loop->stopping = true;
    if (loop->wake_fd >= 0)
        kvtr_loop_wake(loop);
    kvc_cond_signal(&loop->range_wanted);
    kvc_mutex_unlock(&loop->mutex);
    kvc_thread_join(&loop->thread);
    kvtr_ranges_stop(loop); /* where the thread did not start */
    if (loop->cm != NULL)
        kvtr_verbs_now->destroy_event_channel(loop->cm);
    if (loop->epoll_fd >= 0)
        (void)close(loop->epoll_fd);
    if (loop->wake_fd >= 0)
        (void)close(loop->wake_fd);
    kvc_cond_fini(&loop->range_wanted);
    kvc_cond_fini(&loop->changed);
    kvc_mutex_fini(&loop->mutex);
}
