/*
 * fake_verbs.c: see fake_verbs.h; work requests. Memory is in fake_mrs.c, the connection manager in
 * fake_cm.c.
 *
 * One mutex guards everything. A work request is done within post_send, on the poster's thread.
 */
#include "fake_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/assert.h"

#define N_OPCODE 16u

pthread_mutex_t fake_mutex = PTHREAD_MUTEX_INITIALIZER;
fake_live fake_now;
fake_device fake_dev;
fake_faults fake_fault;
const fake_faults fake_no_faults = {.reg_fails_after = UINT32_MAX, .post_fails_after = UINT32_MAX};
static struct ibv_device device_struct;
struct ibv_context fake_context = {.device = &device_struct};

static uint32_t posted[N_OPCODE], signals, hits;
static uint8_t *last_byte; /* that the last work request has written */

/* ---- completion queues ----------------------------------------------------------------------- */

static struct ibv_comp_channel *create_comp_channel(struct ibv_context *context)
{
    fake_comp *comp = calloc(1, sizeof(*comp));
    comp->channel.context = context;
    comp->channel.fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    pthread_mutex_lock(&fake_mutex);
    fake_now.comp_channels++;
    pthread_mutex_unlock(&fake_mutex);
    return &comp->channel;
}

static int destroy_comp_channel(struct ibv_comp_channel *channel)
{
    pthread_mutex_lock(&fake_mutex);
    fake_now.comp_channels--;
    pthread_mutex_unlock(&fake_mutex);
    (void)close(channel->fd);
    free(channel);
    return 0;
}

static struct ibv_cq *create_cq(struct ibv_context *context, int n, void *arg,
                                struct ibv_comp_channel *channel)
{
    fake_cq *cq = calloc(1, sizeof(*cq));
    pthread_mutex_lock(&fake_mutex);
    bool refused = fake_fault.cq_fails;
    fake_now.cqs += !refused;
    pthread_mutex_unlock(&fake_mutex);
    if (refused) {
        free(cq);
        errno = ENOMEM;
        return NULL;
    }
    cq->cq.context = context;
    cq->cq.channel = channel;
    cq->cq.cq_context = arg;
    cq->cq.cqe = n;
    cq->wcs = calloc((size_t)n, sizeof(*cq->wcs));
    return &cq->cq;
}

static int destroy_cq(struct ibv_cq *base)
{
    fake_cq *cq = (fake_cq *)base;
    pthread_mutex_lock(&fake_mutex);
    fake_now.cqs--;
    pthread_mutex_unlock(&fake_mutex);
    free(cq->wcs);
    free(cq);
    return 0;
}

static int get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq_p, void **arg_p)
{
    uint64_t n;
    (void)arg_p;
    *cq_p = NULL;
    return read(channel->fd, &n, sizeof(n)) == sizeof(n) ? 0 : -1;
}

static void ack_cq_events(struct ibv_cq *cq, unsigned n)
{
    (void)cq;
    (void)n;
}

static int req_notify_cq(struct ibv_cq *base)
{
    pthread_mutex_lock(&fake_mutex);
    ((fake_cq *)base)->armed = true;
    pthread_mutex_unlock(&fake_mutex);
    return 0;
}

static void add_wc(fake_cq *cq, const struct ibv_wc *wc)
{
    uint64_t one = 1;
    KVC_ASSERT(cq->n < cq->cq.cqe); /* an overrun is the end of a real one too */
    cq->wcs[(cq->at + cq->n++) % cq->cq.cqe] = *wc;
    if (cq->armed && write(cq->cq.channel->fd, &one, sizeof(one)) == sizeof(one))
        cq->armed = false;
}

static void do_late(fake_cq *cq);

static int poll_cq(struct ibv_cq *base, int n, struct ibv_wc *wc)
{
    fake_cq *cq = (fake_cq *)base;
    int got = 0;
    pthread_mutex_lock(&fake_mutex);
    if (cq->n == 0)
        do_late(cq);
    for (; got < n && cq->n > 0; got++, cq->n--) {
        wc[got] = cq->wcs[cq->at];
        cq->at = (cq->at + 1) % cq->cq.cqe;
        fake_qp *qp = fake_find_qp(wc[got].qp_num);
        if (qp != NULL && (wc[got].opcode & IBV_WC_RECV) == 0)
            qp->sq_used -= wc[got].vendor_err; /* how many requests it stands for */
    }
    pthread_mutex_unlock(&fake_mutex);
    return got;
}

/* ---- work requests --------------------------------------------------------------------------- */

/* With the mutex held: nothing works on it any more; what is posted is flushed. */
void fake_qp_error(fake_qp *qp)
{
    if (qp->error)
        return;
    qp->error = true;
    for (; qp->n_recvs > 0; qp->n_recvs--) {
        struct ibv_wc wc = {.wr_id = qp->recvs[qp->recv_at].wr_id,
                            .status = IBV_WC_WR_FLUSH_ERR,
                            .opcode = IBV_WC_RECV,
                            .qp_num = qp->qp.qp_num};
        qp->recv_at = (qp->recv_at + 1) % FAKE_RECVS;
        add_wc((fake_cq *)qp->qp.recv_cq, &wc);
    }
}

static int post_recv(struct ibv_qp *base, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad_p)
{
    fake_qp *qp = (fake_qp *)base;
    pthread_mutex_lock(&fake_mutex);
    bool room = qp->n_recvs < FAKE_RECVS && wr->num_sge == 1 && wr->next == NULL;
    if (room)
        qp->recvs[(qp->recv_at + qp->n_recvs++) % FAKE_RECVS] =
            (fake_recv){wr->wr_id, wr->sg_list[0]};
    pthread_mutex_unlock(&fake_mutex);
    *bad_p = wr;
    return room ? 0 : ENOMEM;
}

/* Copies between the pieces of wr and one run of bytes. */
static enum ibv_wc_status move(const fake_qp *qp, const struct ibv_send_wr *wr, uint8_t *at,
                               bool into_pieces)
{
    for (int i = 0; i < wr->num_sge; i++) {
        const struct ibv_sge *sge = &wr->sg_list[i];
        uint8_t *piece = (uint8_t *)(uintptr_t)sge->addr;
        if (!(wr->send_flags & IBV_SEND_INLINE))
            piece = fake_reach(qp->qp.pd, sge->lkey, sge->addr, sge->length,
                               into_pieces ? IBV_ACCESS_LOCAL_WRITE : 0, false);
        if (piece == NULL)
            return IBV_WC_LOC_PROT_ERR;
        if (into_pieces)
            memcpy(piece, at, sge->length);
        else
            memcpy(at, piece, sge->length);
        at += sge->length;
        last_byte = (into_pieces ? piece + sge->length : at) - 1;
    }
    return IBV_WC_SUCCESS;
}

static enum ibv_wc_status do_send(fake_qp *qp, const struct ibv_send_wr *wr, uint32_t len_bytes)
{
    fake_qp *peer = qp->peer;
    if (peer->n_recvs == 0)
        return IBV_WC_RNR_RETRY_EXC_ERR;
    fake_recv *recv = &peer->recvs[peer->recv_at];
    uint8_t *to = fake_reach(peer->qp.pd, recv->sge.lkey, recv->sge.addr, len_bytes,
                             IBV_ACCESS_LOCAL_WRITE, false);
    if (recv->sge.length < len_bytes || to == NULL)
        return IBV_WC_REM_INV_REQ_ERR;
    enum ibv_wc_status status = move(qp, wr, to, false);
    if (status != IBV_WC_SUCCESS)
        return status;
    struct ibv_wc wc = {.wr_id = recv->wr_id,
                        .opcode = IBV_WC_RECV,
                        .byte_len = len_bytes,
                        .qp_num = peer->qp.qp_num};
    peer->recv_at = (peer->recv_at + 1) % FAKE_RECVS;
    peer->n_recvs--;
    add_wc((fake_cq *)peer->qp.recv_cq, &wc);
    return IBV_WC_SUCCESS;
}

static enum ibv_wc_status do_wr(fake_qp *qp, const struct ibv_send_wr *wr)
{
    uint32_t len_bytes = 0;
    bool reads = wr->opcode == IBV_WR_RDMA_READ;
    for (int i = 0; i < wr->num_sge; i++)
        len_bytes += wr->sg_list[i].length;
    if (qp->error)
        return IBV_WC_WR_FLUSH_ERR;
    if (qp->peer == NULL || qp->peer->error)
        return IBV_WC_RETRY_EXC_ERR;
    if ((wr->send_flags & IBV_SEND_INLINE) && len_bytes > fake_dev.max_inline_bytes)
        return IBV_WC_LOC_LEN_ERR;
    if (wr->opcode == IBV_WR_SEND)
        return do_send(qp, wr, len_bytes);
    uint8_t *at = fake_reach(qp->peer->qp.pd, wr->wr.rdma.rkey, wr->wr.rdma.remote_addr, len_bytes,
                             reads ? IBV_ACCESS_REMOTE_READ : IBV_ACCESS_REMOTE_WRITE, true);
    return at == NULL ? IBV_WC_REM_ACCESS_ERR : move(qp, wr, at, reads);
}

static bool fits(const fake_qp *qp, const struct ibv_send_wr *wr)
{
    return wr->next == NULL && wr->num_sge >= 1 && (uint32_t)wr->num_sge <= qp->max_sge &&
           qp->sq_used < qp->sq_depth && (wr->opcode != IBV_WR_RDMA_READ || wr->num_sge == 1);
}

/* With the mutex held. */
static void do_and_complete(fake_qp *qp, const struct ibv_send_wr *wr)
{
    bool faulted = fake_fault.wc != IBV_WC_SUCCESS && !qp->error && --fake_fault.wc_after == 0;
    enum ibv_wc_status status = faulted ? fake_fault.wc : do_wr(qp, wr);
    if (status == IBV_WC_SUCCESS && fake_fault.flip_after > 0 && wr->opcode == fake_fault.flip &&
        --fake_fault.flip_after == 0) {
        *last_byte ^= 0x10;
        hits++;
    }
    if (faulted) {
        fake_fault.wc = IBV_WC_SUCCESS;
        hits++;
    }
    if ((wr->send_flags & IBV_SEND_SIGNALED) || status != IBV_WC_SUCCESS) {
        bool reads = wr->opcode == IBV_WR_RDMA_READ;
        struct ibv_wc wc = {.wr_id = wr->wr_id,
                            .status = status,
                            .opcode = reads ? IBV_WC_RDMA_READ : IBV_WC_SEND,
                            .vendor_err = reads ? 1 : qp->unsignalled,
                            .qp_num = qp->qp.qp_num};
        if (!reads)
            qp->unsignalled = 0;
        add_wc((fake_cq *)qp->qp.send_cq, &wc);
    }
    if (status != IBV_WC_SUCCESS) {
        fake_qp_error(qp);
        if (qp->peer != NULL && status != IBV_WC_WR_FLUSH_ERR)
            fake_qp_error(qp->peer);
    }
}

/* With the mutex held: whoever polls when nothing else is there does it. */
static void put_off(fake_qp *qp, const struct ibv_send_wr *wr)
{
    uint64_t one = 1;
    fake_cq *cq = (fake_cq *)qp->qp.send_cq;
    qp->late_sge[qp->n_late] = wr->sg_list[0];
    qp->late[qp->n_late++] = *wr;
    if (cq->armed && write(cq->cq.channel->fd, &one, sizeof(one)) == sizeof(one))
        cq->armed = false;
}

/* With the mutex held: behind those that stall already; pieces are where they were until it is
 * done. */
static void stall(fake_qp *qp, const struct ibv_send_wr *wr)
{
    fake_wr **at = &qp->stalled, *own = calloc(1, sizeof(*own));
    KVC_ASSERT(own != NULL && wr->num_sge <= 32);
    own->wr = *wr;
    memcpy(own->sge, wr->sg_list, (size_t)wr->num_sge * sizeof(*wr->sg_list));
    while (*at != NULL)
        at = &(*at)->next;
    *at = own;
}

static void do_stalled(fake_qp *qp)
{
    while (qp->stalled != NULL) {
        fake_wr *own = qp->stalled;
        qp->stalled = own->next;
        own->wr.sg_list = own->sge;
        do_and_complete(qp, &own->wr);
        free(own);
    }
}

static void do_late(fake_cq *cq)
{
    for (fake_qp *qp = fake_next_qp(NULL); qp != NULL; qp = fake_next_qp(qp)) {
        if ((fake_cq *)qp->qp.send_cq == cq && !fake_fault.writes_stall)
            do_stalled(qp);
        if ((fake_cq *)qp->qp.send_cq != cq || (fake_fault.reads_stall && !qp->error))
            continue;
        for (uint32_t i = 0; i < qp->n_late; i++) {
            qp->late[i].sg_list = &qp->late_sge[i];
            do_and_complete(qp, &qp->late[i]);
        }
        qp->n_late = 0;
    }
}

static int post_send(struct ibv_qp *base, struct ibv_send_wr *wr, struct ibv_send_wr **bad_p)
{
    fake_qp *qp = (fake_qp *)base;
    *bad_p = wr;
    pthread_mutex_lock(&fake_mutex);
    bool ok = fits(qp, wr) && fake_fault.post_fails_after != 0;
    if (ok && fake_fault.post_fails_after != UINT32_MAX)
        fake_fault.post_fails_after--;
    if (!ok) {
        hits += fake_fault.post_fails_after == 0;
        pthread_mutex_unlock(&fake_mutex);
        return ENOMEM;
    }
    posted[wr->opcode]++;
    qp->sq_used++;
    qp->unsignalled += wr->opcode != IBV_WR_RDMA_READ;
    if (wr->send_flags & IBV_SEND_SIGNALED)
        signals++;
    if ((fake_dev.late_reads || fake_fault.reads_stall) && wr->opcode == IBV_WR_RDMA_READ &&
        qp->n_late < FAKE_RECVS)
        put_off(qp, wr);
    else if (wr->opcode != IBV_WR_RDMA_READ &&
             (qp->stalled != NULL || (fake_fault.writes_stall && wr->opcode == IBV_WR_RDMA_WRITE)))
        stall(qp, wr);
    else
        do_and_complete(qp, wr);
    pthread_mutex_unlock(&fake_mutex);
    return 0;
}

/* ---- devices --------------------------------------------------------------------------------- */

static int query_device(struct ibv_context *context, struct ibv_device_attr *attr_p)
{
    (void)context;
    *attr_p = (struct ibv_device_attr){.max_sge = (int)fake_dev.max_sge,
                                       .max_qp_wr = 4096,
                                       .max_qp_rd_atom = (int)fake_dev.max_reads};
    return 0;
}

static struct ibv_pd *alloc_pd(struct ibv_context *context)
{
    struct ibv_pd *pd = calloc(1, sizeof(*pd));
    pthread_mutex_lock(&fake_mutex);
    bool refused = fake_fault.pd_fails;
    fake_now.pds += !refused;
    pthread_mutex_unlock(&fake_mutex);
    if (refused) {
        free(pd);
        errno = ENOMEM;
        return NULL;
    }
    pd->context = context;
    return pd;
}

static int dealloc_pd(struct ibv_pd *pd)
{
    pthread_mutex_lock(&fake_mutex);
    fake_now.pds--;
    KVC_ASSERT(!fake_pd_used(pd));
    pthread_mutex_unlock(&fake_mutex);
    free(pd);
    return 0;
}

static kvtr_verbs table;

void fake_verbs_use(const fake_device *device)
{
    static const fake_device usual = {.max_sge = 32, .max_inline_bytes = 256, .max_reads = 16};
    pthread_mutex_lock(&fake_mutex);
    fake_dev = device == NULL ? usual : *device;
    device_struct.transport_type = fake_dev.iwarp ? IBV_TRANSPORT_IWARP : IBV_TRANSPORT_IB;
    fake_fault = fake_no_faults;
    memset(posted, 0, sizeof(posted));
    signals = 0;
    table = (kvtr_verbs){
        .query_device = query_device,
        .alloc_pd = alloc_pd,
        .dealloc_pd = dealloc_pd,
        .create_comp_channel = create_comp_channel,
        .destroy_comp_channel = destroy_comp_channel,
        .create_cq = create_cq,
        .destroy_cq = destroy_cq,
        .get_cq_event = get_cq_event,
        .ack_cq_events = ack_cq_events,
        .req_notify_cq = req_notify_cq,
        .poll_cq = poll_cq,
        .post_send = post_send,
        .post_recv = post_recv,
    };
    fake_mrs_table(&table);
    fake_cm_table(&table);
    kvtr_verbs_now = &table;
    pthread_mutex_unlock(&fake_mutex);
}

/* With the mutex held: whoever polls them does what has stalled. */
static void rouse(void)
{
    uint64_t one = 1;
    for (fake_qp *qp = fake_next_qp(NULL); qp != NULL; qp = fake_next_qp(qp)) {
        fake_cq *cq = (fake_cq *)qp->qp.send_cq;
        if (qp->stalled != NULL && cq->armed &&
            write(cq->cq.channel->fd, &one, sizeof(one)) == sizeof(one))
            cq->armed = false;
    }
}

void fake_verbs_fault(const fake_faults *faults)
{
    pthread_mutex_lock(&fake_mutex);
    bool lifted = fake_fault.writes_stall && !faults->writes_stall;
    fake_fault = *faults;
    hits = 0;
    if (lifted)
        rouse();
    pthread_mutex_unlock(&fake_mutex);
}

uint32_t fake_verbs_waiting(void)
{
    uint32_t n = 0;
    pthread_mutex_lock(&fake_mutex);
    for (fake_qp *qp = fake_next_qp(NULL); qp != NULL; qp = fake_next_qp(qp)) {
        for (const fake_wr *wr = qp->stalled; wr != NULL; wr = wr->next)
            n++;
    }
    pthread_mutex_unlock(&fake_mutex);
    return n;
}

uint32_t fake_verbs_hits(void)
{
    pthread_mutex_lock(&fake_mutex);
    uint32_t n = hits;
    pthread_mutex_unlock(&fake_mutex);
    return n;
}

fake_live fake_verbs_live(void)
{
    pthread_mutex_lock(&fake_mutex);
    fake_live live = fake_now;
    pthread_mutex_unlock(&fake_mutex);
    return live;
}

bool fake_verbs_all_gone(void)
{
    fake_live live = fake_verbs_live();
    return live.channels == 0 && live.ids == 0 && live.pds == 0 && live.mrs == 0 &&
           live.comp_channels == 0 && live.cqs == 0 && live.qps == 0;
}

uint32_t fake_verbs_posted(enum ibv_wr_opcode opcode)
{
    pthread_mutex_lock(&fake_mutex);
    uint32_t n = posted[opcode];
    pthread_mutex_unlock(&fake_mutex);
    return n;
}

uint32_t fake_verbs_signals(void)
{
    pthread_mutex_lock(&fake_mutex);
    uint32_t n = signals;
    pthread_mutex_unlock(&fake_mutex);
    return n;
}
