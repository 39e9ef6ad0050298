/*
 * fake_cm.c: the connection manager of fake_verbs.h.
 *
 * Ports are those of listening ids; an address's host is not looked at. Events are queued at once.
 */
#include "fake_internal.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/assert.h"

typedef struct fake_channel fake_channel;
typedef struct fake_id fake_id;
typedef struct fake_event fake_event;

struct fake_event {
    struct rdma_cm_event event; /* first */
    fake_event *next;
    uint8_t data[64];
};

struct fake_channel {
    struct rdma_event_channel channel; /* first */
    fake_event *first, **last;
};

struct fake_id {
    struct rdma_cm_id id; /* first */
    fake_id *next;
    fake_id *peer;
    uint16_t port; /* network order */
    bool listening, connected, ended;
    bool orphan; /* of a listening id that is gone, before anybody heard of it */
    int n_unacked;
};

static fake_id *ids;
static fake_qp *qps;
static uint32_t next_qp_num = 1;
static uint16_t next_port = 20000;

fake_qp *fake_find_qp(uint32_t qp_num)
{
    fake_qp *qp = qps;
    while (qp != NULL && qp->qp.qp_num != qp_num)
        qp = qp->next;
    return qp;
}

fake_qp *fake_next_qp(fake_qp *qp)
{
    return qp == NULL ? qps : qp->next;
}

/* ---- events ---------------------------------------------------------------------------------- */

static fake_event *queue_event(fake_id *id, enum rdma_cm_event_type type, const void *data,
                               size_t len_bytes)
{
    uint64_t one = 1;
    fake_channel *channel = (fake_channel *)id->id.channel;
    fake_event *event = calloc(1, sizeof(*event));
    KVC_ASSERT(event != NULL && len_bytes <= sizeof(event->data));
    event->event.id = &id->id;
    event->event.event = type;
    if (len_bytes > 0)
        memcpy(event->data, data, len_bytes);
    event->event.param.conn.private_data = len_bytes > 0 ? event->data : NULL;
    event->event.param.conn.private_data_len = (uint8_t)len_bytes;
    event->event.param.conn.responder_resources = (uint8_t)fake_dev.max_reads;
    event->event.param.conn.initiator_depth = (uint8_t)fake_dev.max_reads;
    *channel->last = event;
    channel->last = &event->next;
    KVC_ASSERT(write(channel->channel.fd, &one, sizeof(one)) == sizeof(one));
    return event;
}

static struct rdma_event_channel *create_event_channel(void)
{
    fake_channel *channel = calloc(1, sizeof(*channel));
    channel->channel.fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    channel->last = &channel->first;
    pthread_mutex_lock(&fake_mutex);
    fake_now.channels++;
    pthread_mutex_unlock(&fake_mutex);
    return &channel->channel;
}

static void destroy_event_channel(struct rdma_event_channel *base)
{
    fake_channel *channel = (fake_channel *)base;
    pthread_mutex_lock(&fake_mutex);
    fake_now.channels--;
    KVC_ASSERT(channel->first == NULL);
    pthread_mutex_unlock(&fake_mutex);
    (void)close(channel->channel.fd);
    free(channel);
}

static int get_cm_event(struct rdma_event_channel *base, struct rdma_cm_event **event_p)
{
    fake_channel *channel = (fake_channel *)base;
    uint64_t n;
    pthread_mutex_lock(&fake_mutex);
    fake_event *event = channel->first;
    if (event != NULL) {
        channel->first = event->next;
        if (channel->first == NULL)
            channel->last = &channel->first;
        ((fake_id *)event->event.id)->n_unacked++;
    } else {
        while (read(channel->channel.fd, &n, sizeof(n)) > 0)
            continue;
    }
    pthread_mutex_unlock(&fake_mutex);
    *event_p = event == NULL ? NULL : &event->event;
    errno = EAGAIN;
    return event == NULL ? -1 : 0;
}

static int ack_cm_event(struct rdma_cm_event *event)
{
    pthread_mutex_lock(&fake_mutex);
    ((fake_id *)event->id)->n_unacked--;
    pthread_mutex_unlock(&fake_mutex);
    free(event);
    return 0;
}

/* ---- ids ------------------------------------------------------------------------------------- */

static fake_id *new_id(struct rdma_event_channel *channel, void *context)
{
    fake_id *id = calloc(1, sizeof(*id));
    KVC_ASSERT(id != NULL);
    id->id.channel = channel;
    id->id.context = context;
    id->id.port_num = 1;
    id->next = ids;
    ids = id;
    fake_now.ids++;
    return id;
}

static int create_id(struct rdma_event_channel *channel, struct rdma_cm_id **id_p, void *context)
{
    pthread_mutex_lock(&fake_mutex);
    *id_p = &new_id(channel, context)->id;
    pthread_mutex_unlock(&fake_mutex);
    return 0;
}

/* With the mutex held: both ends hear that it is over. */
static void part(fake_id *id)
{
    fake_id *peer = id->peer;
    if (id->id.qp != NULL)
        fake_qp_error((fake_qp *)id->id.qp);
    if (peer == NULL)
        return;
    id->peer = peer->peer = NULL;
    if (peer->id.qp != NULL)
        fake_qp_error((fake_qp *)peer->id.qp);
    if (!peer->ended)
        (void)queue_event(
            peer, peer->connected ? RDMA_CM_EVENT_DISCONNECTED : RDMA_CM_EVENT_REJECTED, NULL, 0);
    peer->ended = true;
}

/* With the mutex held. */
static void free_id(fake_id *id)
{
    fake_id **at = &ids;
    while (*at != id)
        at = &(*at)->next;
    *at = id->next;
    fake_now.ids--;
    free(id);
}

/* With the mutex held: connections that nobody will hear of go with the id that listened. */
static void drop_brought(fake_channel *channel)
{
    for (fake_event *event = channel->first; event != NULL; event = event->next) {
        if (event->event.event != RDMA_CM_EVENT_CONNECT_REQUEST)
            continue;
        fake_id *id = (fake_id *)event->event.id;
        part(id);
        id->orphan = true;
    }
}

static int destroy_id(struct rdma_cm_id *base)
{
    fake_id *id = (fake_id *)base;
    fake_channel *channel = (fake_channel *)base->channel;
    pthread_mutex_lock(&fake_mutex);
    KVC_ASSERT(id->n_unacked == 0 && base->qp == NULL); /* a real one would wait for ever */
    part(id);
    if (id->listening)
        drop_brought(channel);
    for (fake_event **at = &channel->first; *at != NULL;) {
        fake_event *event = *at;
        if (event->event.id != base && !((fake_id *)event->event.id)->orphan) {
            at = &event->next;
            continue;
        }
        *at = event->next;
        free(event);
    }
    channel->last = &channel->first;
    while (*channel->last != NULL)
        channel->last = &(*channel->last)->next;
    free_id(id);
    for (fake_id *next, *other = ids; other != NULL; other = next) {
        next = other->next;
        if (other->orphan)
            free_id(other);
    }
    pthread_mutex_unlock(&fake_mutex);
    return 0;
}

static fake_id *listening_at(uint16_t port)
{
    fake_id *id = ids;
    while (id != NULL && !(id->listening && id->port == port))
        id = id->next;
    return id;
}

static uint16_t port_of(const struct sockaddr *addr)
{
    return ((const struct sockaddr_in *)(const void *)addr)->sin_port;
}

static int bind_addr(struct rdma_cm_id *base, struct sockaddr *addr)
{
    fake_id *id = (fake_id *)base;
    pthread_mutex_lock(&fake_mutex);
    id->port = port_of(addr) == 0 ? htons(next_port++) : port_of(addr);
    bool taken = listening_at(id->port) != NULL;
    pthread_mutex_unlock(&fake_mutex);
    errno = EADDRINUSE;
    return taken ? -1 : 0;
}

static int listen_id(struct rdma_cm_id *base, int backlog)
{
    (void)backlog;
    pthread_mutex_lock(&fake_mutex);
    ((fake_id *)base)->listening = true;
    pthread_mutex_unlock(&fake_mutex);
    return 0;
}

static uint16_t get_src_port(struct rdma_cm_id *base)
{
    return ((fake_id *)base)->port;
}

static int resolve_addr(struct rdma_cm_id *base, struct sockaddr *dst, int timeout_ms)
{
    fake_id *id = (fake_id *)base;
    (void)timeout_ms;
    pthread_mutex_lock(&fake_mutex);
    id->port = port_of(dst);
    base->verbs = &fake_context;
    (void)queue_event(id, RDMA_CM_EVENT_ADDR_RESOLVED, NULL, 0);
    pthread_mutex_unlock(&fake_mutex);
    return 0;
}

static int resolve_route(struct rdma_cm_id *base, int timeout_ms)
{
    (void)timeout_ms;
    pthread_mutex_lock(&fake_mutex);
    (void)queue_event((fake_id *)base, RDMA_CM_EVENT_ROUTE_RESOLVED, NULL, 0);
    pthread_mutex_unlock(&fake_mutex);
    return 0;
}

static int connect_id(struct rdma_cm_id *base, struct rdma_conn_param *param)
{
    fake_id *id = (fake_id *)base;
    pthread_mutex_lock(&fake_mutex);
    fake_id *listener = listening_at(id->port);
    if (listener == NULL) {
        id->ended = true;
        (void)queue_event(id, RDMA_CM_EVENT_REJECTED, NULL, 0);
    } else {
        fake_id *other = new_id(listener->id.channel, listener->id.context);
        other->id.verbs = &fake_context;
        other->peer = id;
        id->peer = other;
        fake_event *event = queue_event(other, RDMA_CM_EVENT_CONNECT_REQUEST, param->private_data,
                                        param->private_data_len);
        event->event.param.conn.initiator_depth = param->responder_resources;
        event->event.param.conn.responder_resources = param->initiator_depth;
    }
    pthread_mutex_unlock(&fake_mutex);
    return 0;
}

static int accept_id(struct rdma_cm_id *base, struct rdma_conn_param *param)
{
    fake_id *id = (fake_id *)base;
    pthread_mutex_lock(&fake_mutex);
    fake_id *peer = id->peer;
    bool ok = peer != NULL && peer->id.qp != NULL && base->qp != NULL;
    if (ok) {
        ((fake_qp *)base->qp)->peer = (fake_qp *)peer->id.qp;
        ((fake_qp *)peer->id.qp)->peer = (fake_qp *)base->qp;
        id->connected = peer->connected = true;
        (void)queue_event(id, RDMA_CM_EVENT_ESTABLISHED, NULL, 0);
        uint8_t says = param->private_data_len;
        if (fake_fault.accept_says != 0 && says > fake_fault.accept_says)
            says = fake_fault.accept_says;
        (void)queue_event(peer, RDMA_CM_EVENT_ESTABLISHED, param->private_data, says);
    }
    pthread_mutex_unlock(&fake_mutex);
    errno = EINVAL;
    return ok ? 0 : -1;
}

static int reject(struct rdma_cm_id *base, const void *data, uint8_t len_bytes)
{
    (void)data;
    (void)len_bytes;
    pthread_mutex_lock(&fake_mutex);
    part((fake_id *)base);
    pthread_mutex_unlock(&fake_mutex);
    return 0;
}

static int disconnect(struct rdma_cm_id *base)
{
    return reject(base, NULL, 0);
}

/* ---- queue pairs ----------------------------------------------------------------------------- */

static int create_qp(struct rdma_cm_id *base, struct ibv_pd *pd, struct ibv_qp_init_attr *attr)
{
    pthread_mutex_lock(&fake_mutex);
    bool ok = !fake_fault.qp_fails && attr->cap.max_inline_data <= fake_dev.max_inline_bytes &&
              attr->cap.max_send_sge <= fake_dev.max_sge;
    if (ok) {
        fake_qp *qp = calloc(1, sizeof(*qp));
        KVC_ASSERT(qp != NULL);
        qp->qp.pd = pd;
        qp->qp.send_cq = attr->send_cq;
        qp->qp.recv_cq = attr->recv_cq;
        qp->qp.qp_num = next_qp_num++;
        qp->max_sge = attr->cap.max_send_sge;
        qp->sq_depth = attr->cap.max_send_wr;
        qp->next = qps;
        qps = qp;
        base->qp = &qp->qp;
        fake_now.qps++;
    }
    pthread_mutex_unlock(&fake_mutex);
    errno = EINVAL;
    return ok ? 0 : -1;
}

static void destroy_qp(struct rdma_cm_id *base)
{
    pthread_mutex_lock(&fake_mutex);
    fake_qp *qp = (fake_qp *)base->qp;
    if (qp->peer != NULL)
        qp->peer->peer = NULL;
    fake_qp **at = &qps;
    while (*at != qp)
        at = &(*at)->next;
    *at = qp->next;
    base->qp = NULL;
    fake_now.qps--;
    while (qp->stalled != NULL) { /* they are never done */
        fake_wr *wr = qp->stalled;
        qp->stalled = wr->next;
        free(wr);
    }
    pthread_mutex_unlock(&fake_mutex);
    free(qp);
}

uint32_t fake_verbs_event(enum rdma_cm_event_type type)
{
    uint32_t n = 0;
    pthread_mutex_lock(&fake_mutex);
    for (fake_id *id = ids; id != NULL; id = id->next) {
        if (id->listening)
            continue;
        (void)queue_event(id, type, NULL, 0);
        n++;
    }
    pthread_mutex_unlock(&fake_mutex);
    return n;
}

void fake_cm_table(kvtr_verbs *table)
{
    table->create_event_channel = create_event_channel;
    table->destroy_event_channel = destroy_event_channel;
    table->get_cm_event = get_cm_event;
    table->ack_cm_event = ack_cm_event;
    table->create_id = create_id;
    table->destroy_id = destroy_id;
    table->bind_addr = bind_addr;
    table->listen = listen_id;
    table->get_src_port = get_src_port;
    table->resolve_addr = resolve_addr;
    table->resolve_route = resolve_route;
    table->connect = connect_id;
    table->accept = accept_id;
    table->reject = reject;
    table->disconnect = disconnect;
    table->create_qp = create_qp;
    table->destroy_qp = destroy_qp;
}
