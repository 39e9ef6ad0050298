/*
 * link.c: one RC connection: made, polled, taken down.
 *
 * The loop's thread. Capabilities are asked for: what the device and the queue pair say is what
 * send.c goes by. Nothing of a link is freed before its queue pair is gone, for until then the
 * device may touch the memory.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include "base/clock.h"
#include "base/le.h"
#include "base/log.h"
#include "base/metrics.h"
#include "rdma_internal.h"

#define INTRO_MAGIC         0x3154564bu /* "KVT1" */
#define INTRO_MIN_BYTES     24u         /* older ends say no more */
/* Of a server: it takes KVTI_PLACED for FetchRows; for what streams, too. */
#define INTRO_PLACES        1u
#define INTRO_STREAM_PLACES 2u
#define MIN_FRAG            1024u
#define MIN_CREDITS         4u
#define POLL_AT_ONCE        16
#define ASK_SGE_FEWER       6u /* for devices that promise more than a queue pair gets */

kvtr_link *kvtr_link_create(kvtr_loop *loop, struct rdma_cm_id *id)
{
    kvtr_link *link = calloc(1, sizeof(*link));
    if (link == NULL)
        return NULL;
    link->loop = loop;
    link->id = id;
    link->out_end = &link->out;
    link->read_end = &link->read;
    link->born_ns = link->heard_ns = link->said_ns = link->used_ns = kvc_now_ns();
    uint32_t n_links = 0;
    kvc_mutex_lock(&loop->mutex);
    for (const kvtr_link *other = loop->links; other != NULL; other = other->next)
        n_links++;
    link->n_recv = link->granted = n_links < KVTI_WIDE_LINKS ? KVTI_N_RECV : KVTI_N_RECV_FEW;
    link->n_send = n_links < KVTI_WIDE_LINKS ? KVTI_N_SEND : KVTI_N_SEND_FEW;
    link->next = loop->links;
    loop->links = link;
    kvc_mutex_unlock(&loop->mutex);
    return link;
}

static bool post_recv(kvtr_link *link, uint32_t slot)
{
    struct ibv_sge sge = {(uintptr_t)(link->ring + (size_t)slot * KVTI_FRAG_BYTES), KVTI_FRAG_BYTES,
                          link->ring_mr->lkey};
    struct ibv_recv_wr wr = {.wr_id = slot, .sg_list = &sge, .num_sge = 1}, *bad;
    return kvtr_verbs_now->post_recv(link->id->qp, &wr, &bad) == 0;
}

/* A queue pair with what the device grants; asks for less where it refuses. */
static bool create_qp(kvtr_link *link, const struct ibv_device_attr *attr)
{
    uint32_t sge = attr->max_sge < 1 ? 1 : (uint32_t)attr->max_sge;
    struct ibv_qp_init_attr init = {
        .qp_context = link,
        .send_cq = link->cq,
        .recv_cq = link->cq,
        .cap = {.max_send_wr = KVTI_SQ_DEPTH - 1,
                .max_recv_wr = link->n_recv,
                .max_send_sge = sge < KVTI_MAX_SGE ? sge : KVTI_MAX_SGE,
                .max_recv_sge = 1,
                .max_inline_data = KVTI_INLINE_BYTES},
        .qp_type = IBV_QPT_RC,
    };
    if (attr->max_qp_wr > 0 && (uint32_t)attr->max_qp_wr < init.cap.max_send_wr)
        init.cap.max_send_wr = (uint32_t)attr->max_qp_wr;
    struct ibv_qp_cap wanted = init.cap;
    for (uint32_t inline_bytes = KVTI_INLINE_BYTES;; inline_bytes /= 2) {
        init.cap = wanted;
        init.cap.max_inline_data = inline_bytes;
        if (kvtr_verbs_now->create_qp(link->id, link->domain->pd, &init) == 0)
            break;
        if (inline_bytes == 0 && wanted.max_send_sge <= ASK_SGE_FEWER)
            return false;
        if (inline_bytes == 0) {
            wanted.max_send_sge -= ASK_SGE_FEWER;
            inline_bytes = KVTI_INLINE_BYTES;
        }
    }
    link->has_qp = true;
    KVC_GAUGE_ADD(rdma_connections, 1);
    link->max_sge =
        init.cap.max_send_sge < wanted.max_send_sge ? init.cap.max_send_sge : wanted.max_send_sge;
    link->max_inline_bytes = init.cap.max_inline_data;
    link->sq_depth = wanted.max_send_wr;
    return link->max_sge > 0;
}

static bool watch_channel(kvtr_link *link)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = link};
    int fd = link->channel->fd;
    int flags = fcntl(fd, F_GETFL);
    return flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0 &&
           epoll_ctl(link->loop->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0;
}

/* False: memory is out. ring_mr NULL: it cannot be registered. */
static bool make_ring(kvtr_link *link)
{
    size_t len_bytes = (size_t)(link->n_recv + link->n_send) * KVTI_FRAG_BYTES;
    if (posix_memalign((void **)&link->ring, 4096, len_bytes) != 0)
        return false;
    memset(link->ring, 0, len_bytes);
    link->ring_mr = kvtr_register(link->domain->pd, link->ring, len_bytes, IBV_ACCESS_LOCAL_WRITE);
    return true;
}

kvc_status kvtr_link_setup(kvtr_link *link)
{
    struct ibv_device_attr attr;
    const char *what = "ask what the device can do";
    kvc_status status = kvtr_domain_get(link->loop, link->id->verbs, &link->domain);
    if (status != KVC_OK)
        return status;
    if (kvtr_verbs_now->query_device(link->id->verbs, &attr) != 0)
        goto err_device;
    what = "make a completion queue";
    link->channel = kvtr_verbs_now->create_comp_channel(link->id->verbs);
    if (link->channel == NULL || !watch_channel(link))
        goto err_device;
    link->cq = kvtr_verbs_now->create_cq(link->id->verbs, KVTI_SQ_DEPTH + KVTI_N_RECV, link,
                                         link->channel);
    if (link->cq == NULL || kvtr_verbs_now->req_notify_cq(link->cq) != 0)
        goto err_device;
    what = "make a queue pair";
    if (!create_qp(link, &attr))
        goto err_device;
    what = "register the fragments' memory";
    if (!make_ring(link))
        return KVC_NO_MEMORY;
    if (link->ring_mr == NULL)
        goto err_device;
    what = "post the receives";
    for (uint32_t slot = 0; slot < link->n_recv; slot++) {
        if (!post_recv(link, slot))
            goto err_device;
    }
    link->max_reads = attr.max_qp_rd_atom < 0 ? 0 : (uint32_t)attr.max_qp_rd_atom;
    if (link->max_reads > KVTI_MAX_READS)
        link->max_reads = KVTI_MAX_READS;
    return KVC_OK;

err_device: /* kvtr_link_destroy takes the rest away */
    KVC_LOG_WARN(RDMA, "cannot %s: %s", what, strerror(errno));
    return KVC_DEVICE;
}

/* ---- the handshake --------------------------------------------------------------------------- */

void kvtr_intro_write(const kvtr_link *link, uint8_t out_p[KVTI_INTRO_BYTES])
{
    kvc_le_put(out_p, INTRO_MAGIC, 4);
    kvc_le_put(out_p + 4, KVC_FRAME_VERSION, 4);
    kvc_le_put(out_p + 8, link->n_recv, 4);
    kvc_le_put(out_p + 12, KVTI_FRAG_BYTES, 4);
    kvc_le_put(out_p + 16, KVC_MAX_VALUE_BYTES, 4);
    kvc_le_put(out_p + 20, link->max_reads, 4);
    kvc_le_put(out_p + 24, INTRO_PLACES | INTRO_STREAM_PLACES, 4);
}

bool kvtr_intro_read(kvtr_link *link, const void *data, size_t len_bytes)
{
    const uint8_t *in = data;
    if (data == NULL || len_bytes < INTRO_MIN_BYTES || (uint32_t)kvc_le_get(in, 4) != INTRO_MAGIC ||
        (uint32_t)kvc_le_get(in + 4, 4) != KVC_FRAME_VERSION ||
        (uint32_t)kvc_le_get(in + 8, 4) < MIN_CREDITS ||
        (uint32_t)kvc_le_get(in + 8, 4) > KVTI_MAX_CREDITS ||
        (uint32_t)kvc_le_get(in + 12, 4) < MIN_FRAG)
        return false;
    link->credits = (uint32_t)kvc_le_get(in + 8, 4);
    link->peer_frag_bytes = (uint32_t)kvc_le_get(in + 12, 4);
    if (link->peer_frag_bytes > KVTI_FRAG_BYTES)
        link->peer_frag_bytes = KVTI_FRAG_BYTES;
    link->peer_max_message_bytes = (uint32_t)kvc_le_get(in + 16, 4);
    link->peer_reads = (uint32_t)kvc_le_get(in + 20, 4) > 0;
    uint64_t more = len_bytes >= KVTI_INTRO_BYTES ? kvc_le_get(in + 24, 4) : 0;
    link->peer_places = (more & INTRO_PLACES) != 0;
    link->peer_stream_places = (more & INTRO_STREAM_PLACES) != 0;
    return true;
}

void kvtr_conn_param(kvtr_link *link, uint8_t *intro, struct rdma_conn_param *param_p)
{
    kvtr_intro_write(link, intro);
    *param_p = (struct rdma_conn_param){
        .private_data = intro,
        .private_data_len = KVTI_INTRO_BYTES,
        .responder_resources = (uint8_t)link->max_reads,
        .initiator_depth = (uint8_t)link->max_reads,
        .retry_count = 7,
        .rnr_retry_count = 7,
    };
}

/* ---- completions ----------------------------------------------------------------------------- */

void kvtr_link_break(kvtr_link *link, const char *why)
{
    if (link->broken)
        return;
    __atomic_store_n(&link->broken, true, __ATOMIC_RELEASE);
    link->why = why;
    kvtr_loop_wake(link->loop);
}

/* With the mutex held. The id says which work request it is: READs and SENDs may complete in
 * another order than that in which they were posted (siw's do). */
static kvtr_read *complete_one(kvtr_link *link, uint64_t wr_id)
{
    uint32_t slot = (uint32_t)wr_id & ~KVTI_READ_WR;
    if ((wr_id & KVTI_READ_WR) != 0) {
        kvtr_read *read = slot < KVTI_MAX_READS ? link->reading[slot] : NULL;
        if (read != NULL) {
            link->reading[slot] = NULL;
            link->n_reads--;
            link->sq_used--;
        }
        return read;
    }
    kvtr_posted *posted = slot < KVTI_N_SEND ? &link->posted[slot] : NULL;
    if (posted == NULL || !posted->busy)
        return NULL;
    posted->busy = false;
    link->sq_used -= posted->n_wrs;
    link->n_sends--;
    if (posted->out != NULL) {
        posted->out->next = link->loop->junk.outs;
        link->loop->junk.outs = posted->out;
        posted->out = NULL;
    }
    return NULL;
}

static void on_sent(kvtr_link *link, uint64_t wr_id)
{
    kvc_mutex_lock(&link->loop->mutex);
    kvtr_read *read = complete_one(link, wr_id);
    kvtr_pump(link);
    kvtr_junk junk = kvtr_junk_take(link->loop);
    kvc_mutex_unlock(&link->loop->mutex);
    kvtr_junk_free(&junk);
    if (read != NULL)
        link->loop->owner->on_read(link, read);
}

static bool on_received(kvtr_link *link, uint32_t slot, uint32_t len_bytes)
{
    if (slot >= link->n_recv || len_bytes > KVTI_FRAG_BYTES)
        return false;
    if (!kvtr_take_fragment(link, link->ring + (size_t)slot * KVTI_FRAG_BYTES, len_bytes))
        return false;
    kvc_mutex_lock(&link->loop->mutex);
    bool ok = !link->broken && post_recv(link, slot);
    if (ok) {
        link->owed++;
        kvtr_pump(link);
    }
    kvc_mutex_unlock(&link->loop->mutex);
    return ok;
}

static void on_completion(kvtr_link *link, const struct ibv_wc *wc)
{
    bool ok = wc->status == IBV_WC_SUCCESS;
    if (!ok && !kvtr_is_broken(link) && wc->status != IBV_WC_WR_FLUSH_ERR) {
        KVC_COUNT(rdma_completions_failed);
        KVC_LOG_WARN(RDMA, "a work request failed: %s", ibv_wc_status_str(wc->status));
    }
    if (ok && (wc->opcode & IBV_WC_RECV) != 0)
        ok = on_received(link, (uint32_t)wc->wr_id, wc->byte_len);
    else if (ok)
        on_sent(link, wc->wr_id);
    if (ok)
        return;
    kvc_mutex_lock(&link->loop->mutex);
    kvtr_link_break(link, wc->status == IBV_WC_SUCCESS ? "the peer broke the protocol"
                                                       : "the RDMA connection failed");
    kvc_mutex_unlock(&link->loop->mutex);
}

void kvtr_link_poll(kvtr_link *link)
{
    struct ibv_wc wc[POLL_AT_ONCE];
    struct ibv_cq *cq;
    void *arg;
    int n;
    if (link->cq == NULL)
        return;
    while (kvtr_verbs_now->get_cq_event(link->channel, &cq, &arg) == 0)
        kvtr_verbs_now->ack_cq_events(cq, 1);
    if (kvtr_verbs_now->req_notify_cq(link->cq) != 0)
        return;
    while (!kvtr_is_broken(link) && (n = kvtr_verbs_now->poll_cq(link->cq, POLL_AT_ONCE, wc)) > 0) {
        for (int i = 0; i < n && !kvtr_is_broken(link); i++)
            on_completion(link, &wc[i]);
    }
}

/* ---- the end --------------------------------------------------------------------------------- */

/* With the mutex held, and no queue pair any more: everything queued or posted is put aside. */
static kvtr_read *strip(kvtr_link *link)
{
    kvtr_read *reads = link->read;
    for (uint32_t i = 0; i < KVTI_N_SEND; i++) {
        kvtr_out *out = link->posted[i].out;
        if (out == NULL)
            continue;
        out->next = link->loop->junk.outs;
        link->loop->junk.outs = out;
    }
    for (uint32_t i = 0; i < KVTI_MAX_READS; i++) {
        if (link->reading[i] == NULL)
            continue;
        link->reading[i]->next = reads;
        reads = link->reading[i];
    }
    while (link->out != NULL) {
        kvtr_out *out = link->out;
        link->out = out->next;
        out->next = link->loop->junk.outs;
        link->loop->junk.outs = out;
    }
    link->out_end = &link->out;
    link->n_outs = 0;
    link->out_bytes = 0;
    link->read = NULL;
    link->read_end = &link->read;
    return reads;
}

static void unlist(kvtr_link *link)
{
    kvtr_link **at = &link->loop->links;
    while (*at != link)
        at = &(*at)->next;
    *at = link->next;
}

void kvtr_link_destroy(kvtr_link *link)
{
    kvtr_loop *loop = link->loop;
    kvc_mutex_lock(&loop->mutex);
    link->state = KVTI_LINK_DOWN;
    __atomic_store_n(&link->broken, true, __ATOMIC_RELEASE);
    unlist(link);
    kvc_cond_broadcast(&loop->changed);
    kvc_mutex_unlock(&loop->mutex);
    if (link->has_qp) {
        (void)kvtr_verbs_now->disconnect(link->id);
        kvtr_verbs_now->destroy_qp(link->id);
        KVC_GAUGE_SUB(rdma_connections, 1);
    }
    kvc_mutex_lock(&loop->mutex);
    kvtr_read *reads = strip(link);
    kvtr_junk junk = kvtr_junk_take(loop);
    kvc_mutex_unlock(&loop->mutex);
    kvtr_junk_free(&junk);
    loop->owner->on_down(link, reads);
    if (link->cq != NULL)
        (void)kvtr_verbs_now->destroy_cq(link->cq);
    if (link->channel != NULL) {
        /* By hand: closed alone, it would stay in the set while a forked process has it too. */
        (void)epoll_ctl(loop->epoll_fd, EPOLL_CTL_DEL, link->channel->fd, NULL);
        (void)kvtr_verbs_now->destroy_comp_channel(link->channel);
    }
    kvtr_deregister(link->ring_mr);
    kvtr_domain_put(link->domain);
    (void)kvtr_verbs_now->destroy_id(link->id);
    free(link->ring);
    free(link->begun.body);
    free(link);
}
