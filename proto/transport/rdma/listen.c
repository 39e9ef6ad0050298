/*
 * listen.c: the listening end's life: bound, connections taken, drained, closed.
 *
 * The loop's thread takes connections; the table's slots are called by the server's threads.
 */
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "server.h"

#define BACKLOG      64
#define MAX_LINKS    1024u
#define POOL_BYTES   ((uint64_t)16 << 20) /* beside what requests may hold */
#define HANDSHAKE_NS ((uint64_t)10 * 1000000000)
#define KEEPALIVE_NS ((uint64_t)30 * 1000000000)
#define IDLE_NS      ((uint64_t)1800 * 1000000000)

/* ---- connections ----------------------------------------------------------------------------- */

static bool may_come(kvt_listener *listener)
{
    uint32_t n = 0;
    kvc_mutex_lock(&listener->loop.mutex);
    for (kvtr_link *link = listener->loop.links; link != NULL; link = link->next)
        n++;
    bool may = !listener->draining && n < MAX_LINKS && kvti_peers_take(listener->opts.peers);
    kvc_mutex_unlock(&listener->loop.mutex);
    return may;
}

static bool set_up(kvtr_link *link, const struct rdma_conn_param *theirs)
{
    struct rdma_conn_param param;
    uint8_t intro[KVTI_INTRO_BYTES];
    if (!kvtr_intro_read(link, theirs->private_data, theirs->private_data_len)) {
        KVC_LOG_WARN(RDMA, "a peer that is none of ours wants to connect");
        return false;
    }
    if (kvtr_link_setup(link) != KVC_OK)
        return false;
    if (theirs->initiator_depth < link->max_reads)
        link->max_reads = theirs->initiator_depth;
    kvtr_conn_param(link, intro, &param);
    if (param.responder_resources > theirs->responder_resources)
        param.responder_resources = theirs->responder_resources;
    kvc_mutex_lock(&link->loop->mutex);
    link->state = KVTI_LINK_UP;
    kvc_mutex_unlock(&link->loop->mutex);
    return kvtr_verbs_now->accept(link->id, &param) == 0;
}

static void on_request(kvt_listener *listener, struct rdma_cm_id *id,
                       const struct rdma_conn_param *theirs)
{
    bool may = may_come(listener);
    kvtr_link *link = may ? kvtr_link_create(&listener->loop, id) : NULL;
    id->context = link;
    if (link == NULL) {
        if (may)
            kvti_peers_give(listener->opts.peers, 1);
        (void)kvtr_verbs_now->reject(id, NULL, 0);
        (void)kvtr_verbs_now->destroy_id(id);
        return;
    }
    if (set_up(link, theirs))
        return;
    (void)kvtr_verbs_now->reject(id, NULL, 0);
    kvc_mutex_lock(&listener->loop.mutex);
    kvtr_link_break(link, "the connection could not be set up");
    kvc_mutex_unlock(&listener->loop.mutex);
}

static void on_cm(kvtr_loop *loop, struct rdma_cm_id *id, const struct rdma_cm_event *event)
{
    kvt_listener *listener = (kvt_listener *)loop;
    if (event->event == RDMA_CM_EVENT_CONNECT_REQUEST) {
        if (id->context == NULL)
            on_request(listener, id, &event->param.conn);
        return;
    }
    kvtr_link *link = id == NULL || id == listener->id ? NULL : id->context;
    if (link == NULL) {
        KVC_LOG_WARN(RDMA, "%s: %s", listener->uri, rdma_event_str(event->event));
        return;
    }
    if (event->event != RDMA_CM_EVENT_ESTABLISHED)
        kvtr_link_poll(link); /* what came before the end */
    kvc_mutex_lock(&loop->mutex);
    if (event->event == RDMA_CM_EVENT_ESTABLISHED)
        link->spoken = true;
    else if (event->event != RDMA_CM_EVENT_TIMEWAIT_EXIT)
        kvtr_link_break(link, kvtr_cm_reason(event->event));
    kvc_mutex_unlock(&loop->mutex);
}

static const kvtr_owner owner = {
    .on_begin = kvtr_on_begin,
    .on_frame = kvtr_on_frame,
    .on_read = kvtr_on_read,
    .on_cm = on_cm,
    .on_down = kvtr_on_down,
    .on_turn = kvtr_on_turn,
};

/* ---- life ------------------------------------------------------------------------------------ */

static void set_defaults(kvt_listener *listener)
{
    kvt_listen_opts *opts = &listener->opts;
    if (opts->max_message_bytes == 0)
        opts->max_message_bytes = KVC_MAX_VALUE_BYTES;
    if (opts->max_calls == 0)
        opts->max_calls = KVTI_MAX_CALLS;
    if (opts->max_inflight_bytes == 0)
        opts->max_inflight_bytes = KVTI_MAX_INFLIGHT_BYTES;
    listener->budget = kvti_budget(opts, &listener->own_budget);
    if (opts->max_deadline_ns == 0)
        opts->max_deadline_ns = KVTI_MAX_DEADLINE_NS;
    listener->loop.handshake_ns = opts->handshake_ns == 0 ? HANDSHAKE_NS : opts->handshake_ns;
    listener->loop.keepalive_ns = opts->keepalive_ns == 0 ? KEEPALIVE_NS : opts->keepalive_ns;
    listener->loop.idle_ns = opts->idle_ns == 0 ? IDLE_NS : opts->idle_ns;
    /* Less than a quarter of a buffer is unused. */
    listener->loop.pool_max_bytes = listener->budget->max_bytes / 4 * 5 + POOL_BYTES;
    if (listener->loop.idle_ns < KVTI_KEEP_NS)
        listener->loop.pool_keep_ns = listener->loop.idle_ns;
}

static kvc_status bind_id(kvt_listener *listener, struct sockaddr_storage *addr, const char *uri)
{
    if (kvtr_verbs_now->create_id(listener->loop.cm, &listener->id, NULL) != 0) {
        listener->id = NULL;
        KVC_LOG_ERROR(RDMA, "cannot listen on %s: %s", uri, strerror(errno));
        return KVC_IO;
    }
    if (kvtr_verbs_now->bind_addr(listener->id, (struct sockaddr *)addr) != 0 ||
        kvtr_verbs_now->listen(listener->id, BACKLOG) != 0) {
        KVC_LOG_ERROR(RDMA, "cannot listen on %s: %s%s", uri, strerror(errno),
                      errno == ENODEV || errno == EADDRNOTAVAIL
                          ? "; no RDMA device has that address (kvctl doctor says more)"
                          : "");
        return KVC_IO;
    }
    const char *colon = strrchr(uri, ':');
    (void)snprintf(listener->uri, sizeof(listener->uri), "%.*s:%u", (int)(colon - uri), uri,
                   ntohs(kvtr_verbs_now->get_src_port(listener->id)));
    listener->opts.uri = listener->uri;
    return KVC_OK;
}

kvc_status kvtr_rdma_listen(const kvt_listen_opts *opts, kvt_listener **listener_p)
{
    struct sockaddr_storage addr;
    *listener_p = NULL;
    kvt_init();
    if (opts->size_bytes != sizeof(*opts) || opts->on_call == NULL ||
        opts->max_message_bytes > KVC_MAX_VALUE_BYTES)
        return KVC_INVALID;
    kvc_status status = kvtr_rdma_address(opts->uri, &addr);
    if (status != KVC_OK)
        return status == KVC_INVALID ? status : KVC_IO;
    kvt_listener *listener = calloc(1, sizeof(*listener));
    if (listener == NULL)
        return KVC_NO_MEMORY;
    listener->opts = *opts;
    listener->queue_end = &listener->queue;
    listener->loop.owner = &owner;
    (void)snprintf(listener->uri, sizeof(listener->uri), "%s", opts->uri);
    set_defaults(listener);
    status = kvtr_loop_init(&listener->loop, "kvt-rdma");
    if (status != KVC_OK)
        goto err_listener;
    status = bind_id(listener, &addr, opts->uri);
    if (status != KVC_OK)
        goto err_loop;
    KVC_LOG_INFO(RDMA, "listening on %s", listener->uri);
    *listener_p = listener;
    return KVC_OK;

err_loop:
    if (listener->id != NULL)
        (void)kvtr_verbs_now->destroy_id(listener->id);
    kvtr_loop_fini(&listener->loop);
err_listener:
    free(listener);
    return status == KVC_UNAVAILABLE ? KVC_IO : status;
}

const char *kvtr_rdma_listener_uri(const kvt_listener *listener)
{
    return listener->uri;
}

void kvtr_rdma_set_serving(kvt_listener *listener, bool serving)
{
    kvc_mutex_lock(&listener->loop.mutex);
    listener->serving = serving && !listener->draining;
    kvc_mutex_unlock(&listener->loop.mutex);
}

/* With the mutex held: answers that are on their way get there; then the links go. */
static void close_links(kvt_listener *listener)
{
    kvtr_loop *loop = &listener->loop;
    uint64_t give_up_ns = kvc_deadline_ns(KVTI_FLUSH_NS);
    for (kvtr_link *link = loop->links; link != NULL; link = link->next) {
        link->closing = true;
        if (link->state == KVTI_LINK_UP && link->spoken)
            kvtr_pump(link);
        else
            kvtr_link_break(link, "the server has shut down");
    }
    while (loop->links != NULL && !kvc_expired(give_up_ns))
        (void)kvc_cond_wait_until(&loop->changed, &loop->mutex, give_up_ns);
    for (kvtr_link *link = loop->links; link != NULL; link = link->next)
        kvtr_link_break(link, "the server has shut down");
    while (loop->links != NULL)
        kvc_cond_wait(&loop->changed, &loop->mutex);
}

void kvtr_rdma_drain(kvt_listener *listener, uint64_t deadline_ns)
{
    kvtr_loop *loop = &listener->loop;
    kvc_mutex_lock(&loop->mutex);
    listener->draining = true;
    listener->serving = false;
    while (listener->n_calls > 0 && !kvc_expired(deadline_ns))
        (void)kvc_cond_wait_until(&loop->changed, &loop->mutex, deadline_ns);
    for (kvtr_rcall *call = listener->calls; call != NULL; call = call->next)
        kvtr_end_early(call, KVC_UNAVAILABLE, "the server has shut down");
    close_links(listener);
    kvc_mutex_unlock(&loop->mutex);
}

void kvtr_rdma_listener_close(kvt_listener *listener)
{
    if (listener == NULL)
        return;
    kvtr_rdma_drain(listener, 1);
    kvc_mutex_lock(&listener->loop.mutex);
    while (listener->n_calls > 0 || listener->n_lent > 0)
        kvc_cond_wait(&listener->loop.changed, &listener->loop.mutex);
    kvc_mutex_unlock(&listener->loop.mutex);
    (void)kvtr_verbs_now->destroy_id(listener->id);
    kvtr_loop_fini(&listener->loop);
    free(listener);
}

void kvtr_lent_back(kvt_listener *listener, uint32_t n)
{
    kvc_mutex_lock(&listener->loop.mutex);
    listener->n_lent -= n;
    kvc_cond_broadcast(&listener->loop.changed);
    kvc_mutex_unlock(&listener->loop.mutex);
}
