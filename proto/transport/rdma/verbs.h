/*
 * verbs.h: the calls of libibverbs and librdmacm that this transport makes, as a table.
 *
 * The real table calls the libraries. Tests put another one in its place before the first listener
 * or connection, so that every completion status and every order of events can be had without a
 * device. Arguments and results are those of the libraries.
 */
#ifndef KVTI_RDMA_VERBS_H
#define KVTI_RDMA_VERBS_H

#include <infiniband/verbs.h>
#include <rdma/rdma_cma.h>

typedef struct kvtr_verbs {
    /* librdmacm */
    struct rdma_event_channel *(*create_event_channel)(void);
    void (*destroy_event_channel)(struct rdma_event_channel *channel);
    int (*get_cm_event)(struct rdma_event_channel *channel, struct rdma_cm_event **event_p);
    int (*ack_cm_event)(struct rdma_cm_event *event);
    int (*create_id)(struct rdma_event_channel *channel, struct rdma_cm_id **id_p, void *context);
    int (*destroy_id)(struct rdma_cm_id *id);
    int (*bind_addr)(struct rdma_cm_id *id, struct sockaddr *addr);
    int (*listen)(struct rdma_cm_id *id, int backlog);
    uint16_t (*get_src_port)(struct rdma_cm_id *id); /* network order */
    int (*resolve_addr)(struct rdma_cm_id *id, struct sockaddr *dst, int timeout_ms);
    int (*resolve_route)(struct rdma_cm_id *id, int timeout_ms);
    int (*connect)(struct rdma_cm_id *id, struct rdma_conn_param *param);
    int (*accept)(struct rdma_cm_id *id, struct rdma_conn_param *param);
    int (*reject)(struct rdma_cm_id *id, const void *data, uint8_t len_bytes);
    int (*disconnect)(struct rdma_cm_id *id);
    int (*create_qp)(struct rdma_cm_id *id, struct ibv_pd *pd, struct ibv_qp_init_attr *attr);
    void (*destroy_qp)(struct rdma_cm_id *id);
    /* libibverbs */
    int (*query_device)(struct ibv_context *context, struct ibv_device_attr *attr_p);
    struct ibv_pd *(*alloc_pd)(struct ibv_context *context);
    int (*dealloc_pd)(struct ibv_pd *pd);
    struct ibv_mr *(*reg_mr)(struct ibv_pd *pd, void *addr, size_t len_bytes, int access);
    /* NULL with EOPNOTSUPP where the library has no such call. */
    struct ibv_mr *(*reg_dmabuf_mr)(struct ibv_pd *pd, uint64_t off_bytes, size_t len_bytes,
                                    uint64_t iova, int fd, int access);
    int (*dereg_mr)(struct ibv_mr *mr);
    struct ibv_comp_channel *(*create_comp_channel)(struct ibv_context *context);
    int (*destroy_comp_channel)(struct ibv_comp_channel *channel);
    struct ibv_cq *(*create_cq)(struct ibv_context *context, int n, void *arg,
                                struct ibv_comp_channel *channel);
    int (*destroy_cq)(struct ibv_cq *cq);
    int (*get_cq_event)(struct ibv_comp_channel *channel, struct ibv_cq **cq_p, void **arg_p);
    void (*ack_cq_events)(struct ibv_cq *cq, unsigned n);
    int (*req_notify_cq)(struct ibv_cq *cq);
    int (*poll_cq)(struct ibv_cq *cq, int n, struct ibv_wc *wc);
    int (*post_send)(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad_p);
    int (*post_recv)(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad_p);
} kvtr_verbs;

/* The table in use; never NULL. */
extern const kvtr_verbs *kvtr_verbs_now;
/* That of the libraries. */
extern const kvtr_verbs kvtr_verbs_real;

#endif
