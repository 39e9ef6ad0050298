/*
 * fake_peer.c: see fake_peer.h.
 *
 * Everything through kvtr_verbs_now, as the transport itself does it.
 */
#include "support.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/le.h"
#include "fake_peer.h"

#define PATIENCE_NS (20ull * 1000000000)
#define INTRO_BYTES 24u
#define RING_BYTES  ((size_t)(PEER_RECVS + 1) * PEER_FRAG_BYTES)

const fake_intro fake_good_intro = {.magic = 0x3154564bu,
                                    .version = KVC_FRAME_VERSION,
                                    .credits = PEER_RECVS,
                                    .frag_bytes = PEER_FRAG_BYTES,
                                    .max_message_bytes = KVC_MAX_VALUE_BYTES,
                                    .max_reads = 16,
                                    .depth = 16};

/* ---- the connection -------------------------------------------------------------------------- */

static void post_recv(fake_peer *p, uint32_t slot)
{
    struct ibv_sge sge = {(uintptr_t)(p->ring + (size_t)slot * PEER_FRAG_BYTES), PEER_FRAG_BYTES,
                          p->mr->lkey};
    struct ibv_recv_wr wr = {.wr_id = slot, .sg_list = &sge, .num_sge = 1}, *bad;
    assert_int_equal(kvtr_verbs_now->post_recv(p->id->qp, &wr, &bad), 0);
}

static void make_queue_pair(fake_peer *p)
{
    struct ibv_context *context = p->id->verbs;
    p->pd = kvtr_verbs_now->alloc_pd(context);
    p->comp = kvtr_verbs_now->create_comp_channel(context);
    p->cq = kvtr_verbs_now->create_cq(context, 256, NULL, p->comp);
    struct ibv_qp_init_attr attr = {
        .send_cq = p->cq,
        .recv_cq = p->cq,
        .cap = {.max_send_wr = 64, .max_recv_wr = PEER_RECVS, .max_send_sge = 1, .max_recv_sge = 1},
        .qp_type = IBV_QPT_RC,
    };
    assert_int_equal(kvtr_verbs_now->create_qp(p->id, p->pd, &attr), 0);
    p->ring = calloc(1, RING_BYTES);
    assert_non_null(p->ring);
    p->mr = kvtr_verbs_now->reg_mr(p->pd, p->ring, RING_BYTES, IBV_ACCESS_LOCAL_WRITE);
    assert_non_null(p->mr);
    for (uint32_t slot = 0; slot < PEER_RECVS; slot++)
        post_recv(p, slot);
}

static void connect_with(fake_peer *p, const fake_intro *intro)
{
    uint8_t data[INTRO_BYTES];
    kvc_le_put(data, intro->magic, 4);
    kvc_le_put(data + 4, intro->version, 4);
    kvc_le_put(data + 8, intro->credits, 4);
    kvc_le_put(data + 12, intro->frag_bytes, 4);
    kvc_le_put(data + 16, intro->max_message_bytes, 4);
    kvc_le_put(data + 20, intro->max_reads, 4);
    struct rdma_conn_param param = {.private_data = data,
                                    .private_data_len = sizeof(data),
                                    .responder_resources = intro->depth,
                                    .initiator_depth = intro->depth};
    assert_int_equal(kvtr_verbs_now->connect(p->id, &param), 0);
}

static void take_event(fake_peer *p, const struct rdma_cm_event *event, const fake_intro *intro)
{
    switch (event->event) {
    case RDMA_CM_EVENT_ADDR_RESOLVED:
        assert_int_equal(kvtr_verbs_now->resolve_route(p->id, 1000), 0);
        break;
    case RDMA_CM_EVENT_ROUTE_RESOLVED:
        make_queue_pair(p);
        connect_with(p, intro == NULL ? &fake_good_intro : intro);
        break;
    case RDMA_CM_EVENT_ESTABLISHED:
        p->up = true;
        assert_true(event->param.conn.private_data_len >= INTRO_BYTES);
        p->granted = (uint32_t)kvc_le_get((const uint8_t *)event->param.conn.private_data + 8, 4);
        break;
    default:
        p->down = true;
    }
}

static void take_events(fake_peer *p, const fake_intro *intro)
{
    struct rdma_cm_event *event;
    while (kvtr_verbs_now->get_cm_event(p->channel, &event) == 0) {
        take_event(p, event, intro);
        assert_int_equal(kvtr_verbs_now->ack_cm_event(event), 0);
    }
}

bool peer_connect(fake_peer *p, const char *uri, const fake_intro *intro)
{
    const char *colon = strrchr(uri, ':');
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)strtoul(colon + 1, NULL, 10))};
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    *p = (fake_peer){0};
    p->channel = kvtr_verbs_now->create_event_channel();
    assert_int_equal(kvtr_verbs_now->create_id(p->channel, &p->id, NULL), 0);
    assert_int_equal(kvtr_verbs_now->resolve_addr(p->id, (struct sockaddr *)&address, 1000), 0);
    while (!p->up && !p->down) {
        assert_false(kvc_expired(give_up_ns));
        take_events(p, intro);
        usleep(200);
    }
    return p->up;
}

void peer_close(fake_peer *p)
{
    (void)kvtr_verbs_now->disconnect(p->id);
    kvtr_verbs_now->destroy_qp(p->id);
    (void)kvtr_verbs_now->destroy_cq(p->cq);
    (void)kvtr_verbs_now->destroy_comp_channel(p->comp);
    (void)kvtr_verbs_now->dereg_mr(p->mr);
    (void)kvtr_verbs_now->dealloc_pd(p->pd);
    (void)kvtr_verbs_now->destroy_id(p->id);
    kvtr_verbs_now->destroy_event_channel(p->channel);
    free(p->ring);
}

/* ---- what comes ------------------------------------------------------------------------------ */

static void take_fragment(fake_peer *p, const uint8_t *at, uint32_t len_bytes)
{
    assert_true(len_bytes >= PEER_ENV_BYTES);
    p->granted += (uint32_t)kvc_le_get(at + 4, 2);
    p->owed++;
    if (len_bytes > PEER_ENV_BYTES &&
        kvc_frame_decode(at + PEER_ENV_BYTES, len_bytes - PEER_ENV_BYTES, &p->last, NULL) ==
            KVC_OK) {
        p->n_frames++;
        p->n_ends += p->last.kind == KVC_FRAME_END;
    }
}

void peer_poll(fake_peer *p)
{
    struct ibv_wc wc;
    while (!p->down && kvtr_verbs_now->poll_cq(p->cq, 1, &wc) == 1) {
        if (wc.status != IBV_WC_SUCCESS) {
            p->down = true;
        } else if ((wc.opcode & IBV_WC_RECV) != 0) {
            take_fragment(p, p->ring + wc.wr_id * PEER_FRAG_BYTES, wc.byte_len);
            post_recv(p, (uint32_t)wc.wr_id);
        }
    }
    take_events(p, NULL);
}

bool peer_cut_off(fake_peer *p)
{
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (!p->down && !kvc_expired(give_up_ns)) {
        peer_poll(p);
        usleep(500);
    }
    return p->down;
}

bool peer_wait_granted(fake_peer *p, uint32_t n)
{
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    peer_poll(p);
    while (p->granted < n && !p->down && !kvc_expired(give_up_ns)) {
        usleep(200);
        peer_poll(p);
    }
    return !p->down && p->granted >= n;
}

/* ---- what it says ---------------------------------------------------------------------------- */

/* Any bytes at all, as one SEND. */
static bool send_raw(fake_peer *p, uint32_t len_bytes)
{
    struct ibv_sge sge = {(uintptr_t)(p->ring + (size_t)PEER_RECVS * PEER_FRAG_BYTES), len_bytes,
                          p->mr->lkey};
    struct ibv_send_wr wr = {.sg_list = &sge,
                             .num_sge = 1,
                             .opcode = IBV_WR_SEND,
                             .send_flags = IBV_SEND_SIGNALED},
                       *bad;
    if (p->down || kvtr_verbs_now->post_send(p->id->qp, &wr, &bad) != 0)
        p->down = true;
    p->granted -= p->granted > 0;
    peer_poll(p);
    return !p->down;
}

bool peer_fragment(fake_peer *p, const void *bytes, uint32_t len_bytes, uint32_t given)
{
    uint8_t *at = p->ring + (size_t)PEER_RECVS * PEER_FRAG_BYTES;
    kvc_le_put(at, len_bytes, 4);
    kvc_le_put(at + 4, given, 4);
    if (len_bytes > 0)
        memcpy(at + PEER_ENV_BYTES, bytes, len_bytes);
    p->owed -= p->owed < given ? p->owed : given;
    return send_raw(p, PEER_ENV_BYTES + len_bytes);
}

bool peer_send(fake_peer *p, const kvc_frame *frame, const void *body, size_t n_bytes)
{
    uint8_t piece[PEER_FRAG_BYTES - PEER_ENV_BYTES];
    size_t at = 0, n = KVC_FRAME_BYTES;
    assert_int_equal(kvc_frame_encode(frame, piece), KVC_OK);
    do {
        size_t more = n_bytes - at < sizeof(piece) - n ? n_bytes - at : sizeof(piece) - n;
        if (more > 0)
            memcpy(piece + n, (const uint8_t *)body + at, more);
        at += more;
        if (!peer_wait_granted(p, 1) ||
            !peer_fragment(p, piece, (uint32_t)(n + more), p->stingy ? 0 : p->owed))
            return false;
        n = 0;
    } while (at < n_bytes);
    return true;
}
