/*
 * send.c: what leaves a link: frames in fragments, behind the chain of WRITEs that they tell of,
 * and READs.
 *
 * With the loop's mutex held, on any thread. Invariants: a fragment is posted only against a credit
 * of the peer, the last of which is kept for giving credits back; no more work requests are under
 * way than the send queue holds; the frame that tells of a chain follows it on the same queue pair,
 * and its completion alone is signalled.
 */
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/le.h"
#include "base/metrics.h"
#include "rdma_internal.h"

/* Puts the sum in its place in the frame that was encoded. */
static void sign(const kvc_frame *frame, uint8_t *at, const void *head, const char *detail)
{
    KVC_ASSERT(frame->head_bytes == 0 || frame->detail_bytes == 0);
    uint64_t sum = kvtr_frame_sum(frame, frame->head_bytes > 0 ? head : detail, frame->spare[2]);
    kvc_le_put(at + KVC_FRAME_BYTES - 8, sum, 8);
}

kvtr_out *kvtr_out_create(const kvc_frame *frame, const void *head, const char *detail,
                          const struct iovec *data, uint32_t n_data)
{
    size_t len_bytes = KVC_FRAME_BYTES + kvc_frame_body_bytes(frame);
    size_t tail_bytes = 0;
    if (n_data == 0 && (frame->flags & KVC_FRAME_ELSEWHERE) == 0)
        tail_bytes = frame->data_bytes;
    len_bytes -= tail_bytes;
    kvtr_out *out = calloc(1, sizeof(*out));
    uint8_t *at = malloc(len_bytes);
    if (out == NULL || at == NULL || kvc_frame_encode(frame, at) != KVC_OK) {
        free(out);
        free(at);
        return NULL;
    }
    out->bytes = at;
    if ((frame->flags & KVTI_SUMMED) != 0)
        sign(frame, at, head, detail);
    out->len_bytes = len_bytes;
    out->tail_bytes = tail_bytes;
    at += KVC_FRAME_BYTES;
    if (frame->head_bytes > 0)
        memcpy(at, head, frame->head_bytes);
    at += frame->head_bytes;
    if (frame->detail_bytes > 0)
        memcpy(at, detail, frame->detail_bytes);
    at += frame->detail_bytes;
    for (uint32_t i = 0; i < n_data; i++) {
        if (data[i].iov_len > 0)
            memcpy(at, data[i].iov_base, data[i].iov_len);
        at += data[i].iov_len;
    }
    KVC_ASSERT(at == out->bytes + out->len_bytes);
    return out;
}

bool kvtr_post(kvtr_link *link, struct ibv_send_wr *wr)
{
    struct ibv_send_wr *bad;
    if (kvtr_verbs_now->post_send(link->id->qp, wr, &bad) == 0)
        return true;
    kvtr_link_break(link, "the RDMA connection takes no more work");
    return false;
}

/* Copies the next n_bytes of out. */
static void copy_out(kvtr_out *out, uint8_t *at, size_t n_bytes)
{
    if (out->sent_bytes < out->len_bytes) {
        size_t n = out->len_bytes - out->sent_bytes;
        n = n < n_bytes ? n : n_bytes;
        memcpy(at, out->bytes + out->sent_bytes, n);
        at += n;
        n_bytes -= n;
    }
    while (n_bytes > 0) {
        const kvt_slice *slice = &out->slices[out->slice_at];
        size_t n = slice->len_bytes - out->slice_off_bytes;
        if (n == 0) {
            out->slice_at++;
            out->slice_off_bytes = 0;
            continue;
        }
        n = n < n_bytes ? n : n_bytes;
        memcpy(at, (const uint8_t *)slice->base + out->slice_off_bytes, n);
        out->slice_off_bytes += n;
        at += n;
        n_bytes -= n;
    }
}

static size_t left_bytes(const kvtr_out *out)
{
    return out->len_bytes + out->tail_bytes - out->sent_bytes;
}

/* The client does not take its answers. */
static bool is_full(const kvtr_link *link)
{
    return !link->loop->is_client &&
           (link->n_outs > KVTI_OUT_MAX || link->out_bytes > KVTI_OUT_MAX_BYTES);
}

/* How many fragments the peer is told that it may send: as many as there are receives again. One
 * that does not take its answers gets one at a time, to give credits with, and for each of them an
 * answer leaves. */
static uint32_t grant(const kvtr_link *link)
{
    if (!is_full(link))
        return link->owed;
    return link->granted == 0 && link->owed > 0 ? 1 : 0;
}

/* One fragment with the next bytes of out, or (out NULL) with credits alone. */
static bool post_fragment(kvtr_link *link, kvtr_out *out)
{
    uint8_t *at = link->ring + (size_t)(link->n_recv + link->send_at) * KVTI_FRAG_BYTES;
    size_t n_bytes = out == NULL ? 0 : left_bytes(out);
    uint32_t given = grant(link);
    if (n_bytes > link->peer_frag_bytes - KVTI_ENV_BYTES)
        n_bytes = link->peer_frag_bytes - KVTI_ENV_BYTES;
    kvc_le_put(at, n_bytes, 4);
    kvc_le_put(at + 4, given, 4);
    if (n_bytes > 0)
        copy_out(out, at + KVTI_ENV_BYTES, n_bytes);
    struct ibv_sge sge = {(uintptr_t)at, (uint32_t)n_bytes + KVTI_ENV_BYTES, link->ring_mr->lkey};
    struct ibv_send_wr wr = {
        .wr_id = link->send_at,
        .sg_list = &sge,
        .num_sge = 1,
        .opcode = IBV_WR_SEND,
        .send_flags =
            IBV_SEND_SIGNALED | (sge.length <= link->max_inline_bytes ? IBV_SEND_INLINE : 0),
    };
    if (!kvtr_post(link, &wr))
        return false;
    kvtr_posted *posted = &link->posted[link->send_at];
    *posted = (kvtr_posted){.busy = true, .n_wrs = 1 + link->sq_unsignalled};
    link->sq_unsignalled = 0;
    link->sq_used++;
    KVC_COUNT(rdma_work_requests);
    KVC_COUNT(rdma_signals);
    KVC_COUNT_N(rdma_sent_bytes, sge.length);
    link->send_at = (link->send_at + 1) % link->n_send;
    link->n_sends++;
    link->credits--;
    link->granted += given;
    link->owed -= given;
    link->said_ns = kvc_now_ns();
    if (out == NULL)
        return true;
    out->sent_bytes += n_bytes;
    if (left_bytes(out) == 0)
        posted->out = out;
    return true;
}

static bool room_for_fragment(const kvtr_link *link, uint32_t credits)
{
    return link->credits >= credits && !link->posted[link->send_at].busy &&
           link->sq_used < link->sq_depth;
}

/* ---- READs ----------------------------------------------------------------------------------- */

static bool post_read(kvtr_link *link, kvtr_read *read)
{
    struct ibv_sge sge = {(uintptr_t)read->buf->bytes, read->len_bytes, read->buf->mr->lkey};
    uint32_t slot = 0;
    while (link->reading[slot] != NULL) /* max_reads are as many at most */
        slot++;
    struct ibv_send_wr wr = {
        .wr_id = KVTI_READ_WR | slot,
        .sg_list = &sge,
        .num_sge = 1,
        .opcode = IBV_WR_RDMA_READ,
        .send_flags = IBV_SEND_SIGNALED,
        .wr.rdma = {.remote_addr = read->remote_addr, .rkey = read->remote_key},
    };
    if (!kvtr_post(link, &wr))
        return false;
    link->reading[slot] = read;
    link->n_reads++;
    link->sq_used++;
    KVC_COUNT(rdma_work_requests);
    KVC_COUNT(rdma_signals);
    KVC_COUNT_N(rdma_read_bytes, read->len_bytes);
    return true;
}

void kvtr_start_read(kvtr_link *link, kvtr_read *read)
{
    read->next = NULL;
    *link->read_end = read;
    link->read_end = &read->next;
    kvtr_pump(link);
}

/* ---- the pump -------------------------------------------------------------------------------- */

static bool pump_reads(kvtr_link *link)
{
    while (link->read != NULL && link->n_reads < link->max_reads &&
           link->sq_used < link->sq_depth) {
        kvtr_read *read = link->read;
        link->read = read->next;
        if (link->read == NULL)
            link->read_end = &link->read;
        if (!post_read(link, read)) {
            read->next = link->read; /* it is told of with the others when the link goes */
            if (link->read == NULL)
                link->read_end = &read->next;
            link->read = read;
            return false;
        }
    }
    return true;
}

static bool pump_outs(kvtr_link *link)
{
    while (link->out != NULL) {
        kvtr_out *out = link->out;
        if (!kvtr_post_chain(link, out))
            return !link->broken;
        while (left_bytes(out) > 0) {
            if (!room_for_fragment(link, is_full(link) ? 1 : 2)) {
                if (link->credits < 2)
                    KVC_COUNT(rdma_credit_waits);
                return true;
            }
            kvtr_out *next = out->next; /* out is its completion's once the last is posted */
            size_t len_bytes = out->len_bytes;
            bool last = left_bytes(out) <= link->peer_frag_bytes - KVTI_ENV_BYTES;
            if (!post_fragment(link, out))
                return false;
            if (last) {
                link->out = next;
                link->n_outs--;
                link->out_bytes -= len_bytes;
                if (next == NULL)
                    link->out_end = &link->out;
                break;
            }
        }
    }
    return true;
}

void kvtr_pump(kvtr_link *link)
{
    if (link->state != KVTI_LINK_UP || link->broken)
        return;
    if (!pump_reads(link) || !pump_outs(link))
        return;
    bool owes = link->owed >= link->n_recv / 2 && grant(link) > 0;
    if ((link->nudge || owes) && room_for_fragment(link, 1)) {
        link->nudge = false;
        (void)post_fragment(link, NULL);
    }
    if (link->closing && link->out == NULL && link->n_sends == 0 && link->n_reads == 0)
        kvtr_link_break(link, "the server has shut down");
}

void kvtr_send(kvtr_link *link, kvtr_out *out)
{
    if (link->state == KVTI_LINK_DOWN) { /* what it had has been put aside already */
        out->next = link->loop->junk.outs;
        link->loop->junk.outs = out;
        kvtr_loop_wake(link->loop);
        return;
    }
    out->next = NULL;
    *link->out_end = out;
    link->out_end = &out->next;
    link->n_outs++;
    link->out_bytes += out->len_bytes;
    link->used_ns = kvc_now_ns();
    kvtr_pump(link);
}

void kvtr_send_plain(kvtr_link *link, kvc_frame_kind kind, uint64_t call)
{
    kvc_frame frame = {.kind = kind, .call = call};
    kvtr_out *out = kvtr_out_create(&frame, NULL, NULL, NULL, 0);
    if (out == NULL)
        kvtr_link_break(link, "out of memory");
    else
        kvtr_send(link, out);
}
