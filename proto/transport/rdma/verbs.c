/*
 * verbs.c: the table that calls the real libraries.
 *
 * Several of their functions are macros or inline, so each gets a function of its own here. Static,
 * any thread.
 */
#include "verbs.h"

#include <errno.h>

static int create_id(struct rdma_event_channel *channel, struct rdma_cm_id **id_p, void *context)
{
    return rdma_create_id(channel, id_p, context, RDMA_PS_TCP);
}

static uint16_t get_src_port(struct rdma_cm_id *id)
{
    return rdma_get_src_port(id);
}

static int resolve_addr(struct rdma_cm_id *id, struct sockaddr *dst, int timeout_ms)
{
    return rdma_resolve_addr(id, NULL, dst, timeout_ms);
}

static int reject(struct rdma_cm_id *id, const void *data, uint8_t len_bytes)
{
    return rdma_reject(id, data, len_bytes);
}

static int query_device(struct ibv_context *context, struct ibv_device_attr *attr_p)
{
    return ibv_query_device(context, attr_p);
}

static struct ibv_mr *reg_mr(struct ibv_pd *pd, void *addr, size_t len_bytes, int access)
{
    return ibv_reg_mr(pd, addr, len_bytes, access);
}

static struct ibv_mr *reg_dmabuf_mr(struct ibv_pd *pd, uint64_t off_bytes, size_t len_bytes,
                                    uint64_t iova, int fd, int access)
{
#ifdef KVASIR_DMABUF_MR
    return ibv_reg_dmabuf_mr(pd, off_bytes, len_bytes, iova, fd, access);
#else
    (void)pd, (void)off_bytes, (void)len_bytes, (void)iova, (void)fd, (void)access;
    errno = EOPNOTSUPP;
    return NULL;
#endif
}

static struct ibv_cq *create_cq(struct ibv_context *context, int n, void *arg,
                                struct ibv_comp_channel *channel)
{
    return ibv_create_cq(context, n, arg, channel, 0);
}

static int req_notify_cq(struct ibv_cq *cq)
{
    return ibv_req_notify_cq(cq, 0);
}

static int poll_cq(struct ibv_cq *cq, int n, struct ibv_wc *wc)
{
    return ibv_poll_cq(cq, n, wc);
}

static int post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad_p)
{
    return ibv_post_send(qp, wr, bad_p);
}

static int post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad_p)
{
    return ibv_post_recv(qp, wr, bad_p);
}

const kvtr_verbs kvtr_verbs_real = {
    .create_event_channel = rdma_create_event_channel,
    .destroy_event_channel = rdma_destroy_event_channel,
    .get_cm_event = rdma_get_cm_event,
    .ack_cm_event = rdma_ack_cm_event,
    .create_id = create_id,
    .destroy_id = rdma_destroy_id,
    .bind_addr = rdma_bind_addr,
    .listen = rdma_listen,
    .get_src_port = get_src_port,
    .resolve_addr = resolve_addr,
    .resolve_route = rdma_resolve_route,
    .connect = rdma_connect,
    .accept = rdma_accept,
    .reject = reject,
    .disconnect = rdma_disconnect,
    .create_qp = rdma_create_qp,
    .destroy_qp = rdma_destroy_qp,
    .query_device = query_device,
    .alloc_pd = ibv_alloc_pd,
    .dealloc_pd = ibv_dealloc_pd,
    .reg_mr = reg_mr,
    .reg_dmabuf_mr = reg_dmabuf_mr,
    .dereg_mr = ibv_dereg_mr,
    .create_comp_channel = ibv_create_comp_channel,
    .destroy_comp_channel = ibv_destroy_comp_channel,
    .create_cq = create_cq,
    .destroy_cq = ibv_destroy_cq,
    .get_cq_event = ibv_get_cq_event,
    .ack_cq_events = ibv_ack_cq_events,
    .req_notify_cq = req_notify_cq,
    .poll_cq = poll_cq,
    .post_send = post_send,
    .post_recv = post_recv,
};

const kvtr_verbs *kvtr_verbs_now = &kvtr_verbs_real;
