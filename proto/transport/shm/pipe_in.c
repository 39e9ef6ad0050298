/*
 * pipe_in.c: what comes out of a socket, cut into frames.
 *
 * One thread per pipe. Small frames are cut out of one buffer; of a long body, the rest is read to
 * where it belongs. Nothing is believed: lengths are those that kvc_frame_decode let pass.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "shm_internal.h"

#define READS_MAX 64u /* before others get a turn */

void kvti_pipe_open(kvti_pipe *pipe, int fd, bool takes_fds)
{
    *pipe = (kvti_pipe){.fd = fd, .takes_fds = takes_fds};
    pipe->last = &pipe->first;
}

void kvti_pipe_close(kvti_pipe *pipe)
{
    for (uint32_t i = 0; i < pipe->n_fds; i++)
        (void)close(pipe->fds[i]);
    if (pipe->fd >= 0)
        (void)close(pipe->fd);
    free(pipe->body);
    free(pipe->in);
    *pipe = (kvti_pipe){.fd = -1};
    pipe->last = &pipe->first;
}

bool kvti_pipe_take_fds(kvti_pipe *pipe, int *fds, uint32_t n)
{
    if (n > pipe->n_fds)
        return false;
    memcpy(fds, pipe->fds, n * sizeof(*fds));
    pipe->n_fds -= n;
    memmove(pipe->fds, pipe->fds + n, pipe->n_fds * sizeof(*fds));
    return true;
}

/* Keeps the descriptors of a message, closes those for which there is no room. */
static bool keep_fds(kvti_pipe *pipe, struct msghdr *msg)
{
    bool room = (msg->msg_flags & MSG_CTRUNC) == 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c != NULL; c = CMSG_NXTHDR(msg, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof(fd), sizeof(fd));
            if (pipe->n_fds < sizeof(pipe->fds) / sizeof(pipe->fds[0])) {
                pipe->fds[pipe->n_fds++] = fd;
            } else {
                (void)close(fd);
                room = false;
            }
        }
    }
    return room;
}

/* Reads to dst. 0: nothing there now; -1: the end, or an error. Without room for descriptors the
 * kernel drops those that a peer sends. */
static ssize_t receive(kvti_pipe *pipe, void *dst, size_t room, const char **why_p)
{
    union {
        struct cmsghdr align;
        uint8_t bytes[CMSG_SPACE(sizeof(int) * KVT_MAX_FDS)];
    } control;
    struct iovec piece = {dst, room};
    struct msghdr msg = {.msg_iov = &piece, .msg_iovlen = 1};
    if (pipe->takes_fds) {
        msg.msg_control = control.bytes;
        msg.msg_controllen = sizeof(control.bytes);
    }
    ssize_t n;
    do {
        n = recvmsg(pipe->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    } while (n < 0 && errno == EINTR);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return 0;
    *why_p = n == 0 ? "the peer has closed the connection" : "the connection broke";
    if (n <= 0)
        return -1;
    if (pipe->takes_fds && !keep_fds(pipe, &msg)) {
        *why_p = "more descriptors came than may";
        return -1;
    }
    return n;
}

static bool end_frame(kvti_pipe *pipe, const kvti_reader *reader)
{
    uint8_t *body = pipe->body;
    pipe->body = NULL;
    pipe->in_body = false;
    return reader->end(reader->arg, &pipe->frame, body);
}

static bool begin_frame(kvti_pipe *pipe, const kvti_reader *reader, const char **why_p)
{
    bool keep = false;
    kvc_status status = kvc_frame_decode(pipe->in + pipe->in_from, pipe->in_to - pipe->in_from,
                                         &pipe->frame, why_p);
    if (status != KVC_OK)
        return false;
    pipe->in_from += KVC_FRAME_BYTES;
    *why_p = "the peer broke the protocol";
    if (!reader->begin(reader->arg, &pipe->frame, &keep))
        return false;
    pipe->body_bytes = kvc_frame_body_bytes(&pipe->frame);
    pipe->body_got = 0;
    pipe->in_body = true;
    if (!keep)
        return true;
    /* One byte more, so that an empty body is not mistaken for one that was skipped; and room for
     * data that lies in the ring. */
    *why_p = "memory for a message is out";
    size_t data_bytes = pipe->frame.flags & KVC_FRAME_ELSEWHERE ? pipe->frame.data_bytes : 0;
    pipe->body = malloc(pipe->body_bytes + data_bytes + 1);
    return pipe->body != NULL;
}

/* Cuts frames out of what has been read. */
static bool cut_frames(kvti_pipe *pipe, const kvti_reader *reader, const char **why_p)
{
    while (pipe->in_body || pipe->in_to - pipe->in_from >= KVC_FRAME_BYTES) {
        if (!pipe->in_body && !begin_frame(pipe, reader, why_p))
            return false;
        size_t have = pipe->in_to - pipe->in_from, want = pipe->body_bytes - pipe->body_got;
        size_t take = have < want ? have : want;
        if (pipe->body != NULL && take > 0)
            memcpy(pipe->body + pipe->body_got, pipe->in + pipe->in_from, take);
        pipe->in_from += take;
        pipe->body_got += take;
        if (pipe->body_got < pipe->body_bytes)
            break;
        *why_p = "the peer broke the protocol";
        if (!end_frame(pipe, reader))
            return false;
    }
    if (pipe->in_from == pipe->in_to)
        pipe->in_from = pipe->in_to = 0;
    return true;
}

/* The rest of a long body goes where it belongs; all else through the buffer. */
static ssize_t read_some(kvti_pipe *pipe, const char **why_p)
{
    size_t left = pipe->in_body ? pipe->body_bytes - pipe->body_got : 0;
    if (left >= KVTI_SHM_IN_BYTES && pipe->body != NULL) {
        ssize_t n = receive(pipe, pipe->body + pipe->body_got, left, why_p);
        pipe->body_got += n > 0 ? (size_t)n : 0;
        return n;
    }
    if (pipe->in_from > 0) {
        memmove(pipe->in, pipe->in + pipe->in_from, pipe->in_to - pipe->in_from);
        pipe->in_to -= pipe->in_from;
        pipe->in_from = 0;
    }
    ssize_t n = receive(pipe, pipe->in + pipe->in_to, KVTI_SHM_IN_BYTES - pipe->in_to, why_p);
    pipe->in_to += n > 0 ? (size_t)n : 0;
    return n;
}

bool kvti_pipe_read(kvti_pipe *pipe, const kvti_reader *reader, const char **why_p)
{
    if (pipe->in == NULL)
        pipe->in = malloc(KVTI_SHM_IN_BYTES);
    *why_p = "memory is out";
    ssize_t n = pipe->in == NULL ? -1 : 1;
    for (uint32_t i = 0; i < READS_MAX && n > 0; i++) {
        n = read_some(pipe, why_p);
        if (n > 0 && !cut_frames(pipe, reader, why_p))
            n = -1;
    }
    /* Connections that rest have no buffer, so 1,000 of them take nothing. */
    if (pipe->in_from == pipe->in_to) {
        free(pipe->in);
        pipe->in = NULL;
        pipe->in_from = pipe->in_to = 0;
    }
    return n >= 0;
}
