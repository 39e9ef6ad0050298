/*
 * pipe_out.c: frames on their way into a socket.
 *
 * All but kvti_out_create and kvti_out_free with the lock of whose pipe it is. Data is not copied:
 * it is its owner's until the frame has gone or has been taken back. A frame goes whole or not at
 * all, for the next one follows it in the same stream.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/assert.h"
#include "shm_internal.h"

#define PIECES_MAX (KVT_MAX_SLICES + 2u)

static size_t round8(size_t n)
{
    return (n + 7) / 8 * 8;
}

kvti_out *kvti_out_create(const kvc_frame *frame, const kvti_parts *parts)
{
    uint32_t n_data = parts->n_slices > 0 ? parts->n_slices : parts->n_data;
    size_t text_bytes = (size_t)frame->head_bytes + frame->detail_bytes;
    size_t size = sizeof(kvti_out) + n_data * sizeof(struct iovec) +
                  parts->n_slices * sizeof(kvt_slice) + round8(parts->n_fds * sizeof(int)) +
                  text_bytes;
    kvti_out *out = malloc(size);
    if (out == NULL)
        return NULL;
    *out = (kvti_out){.frame = *frame, .owner = parts->owner};
    out->n_data = n_data;
    out->n_slices = parts->n_slices;
    out->n_fds = parts->n_fds;
    out->slices = (kvt_slice *)(out + 1);
    out->data = (struct iovec *)(out->slices + parts->n_slices);
    out->fds = (int *)(out->data + n_data);
    out->text = (uint8_t *)out->fds + round8(parts->n_fds * sizeof(int));
    for (uint32_t i = 0; i < parts->n_slices; i++) {
        out->slices[i] = parts->slices[i];
        out->data[i] =
            (struct iovec){(void *)(uintptr_t)parts->slices[i].base, parts->slices[i].len_bytes};
    }
    if (parts->n_slices == 0 && n_data > 0)
        memcpy(out->data, parts->data, n_data * sizeof(*out->data));
    if (parts->n_fds > 0)
        memcpy(out->fds, parts->fds, parts->n_fds * sizeof(int));
    if (frame->head_bytes > 0)
        memcpy(out->text, parts->head, frame->head_bytes);
    if (frame->detail_bytes > 0)
        memcpy(out->text + frame->head_bytes, parts->detail, frame->detail_bytes);
    return out;
}

static void release_data(kvti_out *out)
{
    for (uint32_t i = 0; i < out->n_slices; i++) {
        if (out->slices[i].release != NULL)
            out->slices[i].release(out->slices[i].arg);
    }
    out->n_slices = 0;
}

void kvti_out_free(kvti_out *list)
{
    while (list != NULL) {
        kvti_out *next = list->next;
        release_data(list);
        for (uint32_t i = 0; i < list->n_fds; i++)
            (void)close(list->fds[i]);
        free(list->copy);
        free(list);
        list = next;
    }
}

void kvti_pipe_queue(kvti_pipe *pipe, kvti_out *out)
{
    out->next = NULL;
    *pipe->last = out;
    pipe->last = &out->next;
    pipe->n_out++;
}

/* Its header, now that it is known whether the ring has room for its data. */
static void begin_out(kvti_pipe *pipe, kvti_out *out)
{
    uint64_t at;
    if (pipe->ring != NULL && out->frame.data_bytes >= KVTI_SHM_RING_FROM &&
        kvti_ring_put(pipe->ring, out->data, out->n_data, out->frame.data_bytes, &at)) {
        out->frame.flags |= KVC_FRAME_ELSEWHERE;
        out->frame.spare[0] = at;
        out->n_data = 0;
    }
    if (out->n_fds > 0) {
        out->frame.flags |= KVTI_SHM_HAS_FDS;
        out->frame.spare[1] = out->n_fds;
    }
    kvc_status status = kvc_frame_encode(&out->frame, out->wire);
    KVC_ASSERT(status == KVC_OK); /* its lengths were checked where it was made */
    out->total_bytes = KVC_FRAME_BYTES + kvc_frame_body_bytes(&out->frame);
    out->begun = true;
}

/* What is left of a frame, as pieces. */
static uint32_t list_pieces(const kvti_out *out, struct iovec pieces[PIECES_MAX])
{
    uint32_t n = 0;
    size_t skip = out->sent_bytes;
    const struct iovec first[2] = {
        {(void *)(uintptr_t)out->wire, KVC_FRAME_BYTES},
        {out->text, (size_t)out->frame.head_bytes + out->frame.detail_bytes},
    };
    for (uint32_t i = 0; i < 2 + out->n_data; i++) {
        struct iovec piece = i < 2 ? first[i] : out->data[i - 2];
        if (piece.iov_len <= skip) {
            skip -= piece.iov_len;
            continue;
        }
        pieces[n++] = (struct iovec){(uint8_t *)piece.iov_base + skip, piece.iov_len - skip};
        skip = 0;
    }
    return n;
}

/* Bytes that the socket took; 0: it is full; -1: it is broken. */
static ssize_t send_out(kvti_pipe *pipe, const kvti_out *out)
{
    struct iovec pieces[PIECES_MAX];
    union {
        struct cmsghdr align;
        uint8_t bytes[CMSG_SPACE(sizeof(int) * KVT_MAX_FDS)];
    } control;
    struct msghdr msg = {.msg_iov = pieces, .msg_iovlen = list_pieces(out, pieces)};
    if (out->n_fds > 0 && out->sent_bytes == 0) {
        size_t fds_bytes = out->n_fds * sizeof(int);
        memset(&control, 0, sizeof(control));
        msg.msg_control = control.bytes;
        msg.msg_controllen = CMSG_SPACE(fds_bytes);
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(fds_bytes);
        memcpy(CMSG_DATA(c), out->fds, fds_bytes);
    }
    ssize_t n;
    do {
        n = sendmsg(pipe->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS))
        return 0;
    return n;
}

void kvti_pipe_flush(kvti_pipe *pipe, kvti_out **over_p)
{
    pipe->blocked = false;
    while (pipe->first != NULL && !pipe->broken && pipe->fd >= 0) {
        kvti_out *out = pipe->first;
        if (!out->begun)
            begin_out(pipe, out);
        ssize_t n = send_out(pipe, out);
        if (n <= 0) {
            pipe->blocked = n == 0;
            pipe->broken = n < 0;
            return;
        }
        out->sent_bytes += (size_t)n;
        if (out->sent_bytes < out->total_bytes)
            continue;
        pipe->first = out->next;
        if (pipe->first == NULL)
            pipe->last = &pipe->first;
        pipe->n_out--;
        out->next = *over_p;
        *over_p = out;
    }
}

/* What is left of the data moves to memory of the frame's own; its slices go with a frame of their
 * own to *over_p. Without memory the stream cannot go on. */
static void copy_rest(kvti_pipe *pipe, kvti_out *out, kvti_out **over_p)
{
    size_t text_end = KVC_FRAME_BYTES + (size_t)out->frame.head_bytes + out->frame.detail_bytes;
    size_t left = 0, skip = out->sent_bytes > text_end ? out->sent_bytes - text_end : 0;
    kvti_parts parts = {.slices = out->slices, .n_slices = out->n_slices};
    kvc_frame none = {.kind = KVC_FRAME_CREDIT};
    kvti_out *lender = kvti_out_create(&none, &parts);
    uint8_t *copy = malloc(out->total_bytes - (skip > 0 ? out->sent_bytes : text_end) + 1);
    if (lender == NULL || copy == NULL) {
        free(lender);
        free(copy);
        pipe->broken = true;
        (void)shutdown(pipe->fd, SHUT_RDWR);
        return;
    }
    for (uint32_t i = 0; i < out->n_data; i++) {
        size_t from = skip < out->data[i].iov_len ? skip : out->data[i].iov_len;
        memcpy(copy + left, (uint8_t *)out->data[i].iov_base + from, out->data[i].iov_len - from);
        left += out->data[i].iov_len - from;
        skip -= from;
    }
    lender->owner = out->owner; /* who is told that the memory is free */
    lender->ends = out->ends;
    lender->begun = true;
    out->owner = NULL;
    out->ends = false;
    out->n_slices = 0;
    out->copy = copy;
    lender->next = *over_p;
    *over_p = lender;
    /* list_pieces counts from the frame's start, so what has gone of the data stays in the count */
    out->total_bytes -= out->sent_bytes > text_end ? out->sent_bytes - text_end : 0;
    out->sent_bytes = out->sent_bytes > text_end ? text_end : out->sent_bytes;
    if (out->n_data > 0) {
        out->data[0] = (struct iovec){copy, left};
        out->n_data = 1;
    }
}

void kvti_pipe_drop(kvti_pipe *pipe, const void *owner, kvti_out **over_p)
{
    kvti_out **at = &pipe->first;
    while (*at != NULL) {
        kvti_out *out = *at;
        if (out->owner != owner) {
            at = &out->next;
        } else if (out->begun && !pipe->broken) {
            copy_rest(pipe, out, over_p);
            at = &out->next;
        } else {
            *at = out->next;
            pipe->n_out--;
            pipe->broken = pipe->broken || out->n_fds > 0;
            out->next = *over_p;
            *over_p = out;
        }
    }
    pipe->last = at;
}

void kvti_pipe_drop_all(kvti_pipe *pipe, kvti_out **over_p)
{
    while (pipe->first != NULL) {
        kvti_out *out = pipe->first;
        pipe->first = out->next;
        out->next = *over_p;
        *over_p = out;
    }
    pipe->last = &pipe->first;
    pipe->n_out = 0;
}
