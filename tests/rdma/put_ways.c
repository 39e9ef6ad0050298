/*
 * put_ways.c: a payload brought to a server by its READ, and by a grant and the client's WRITE.
 *
 *   put_ways ADDRESS    of an RDMA device; both ends are in this process, driven by one thread
 *
 * By READ: request, READ, answer. By WRITE: request, grant, WRITE and its notice, answer. Prints
 * paired medians of the time of one put and of several at once, for the choice that
 * proto/transport/rdma/README.md states.
 */
#include <pthread.h>
#include <rdma/rdma_cma.h>
#include <rdma/rdma_verbs.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

#define MAX_BYTES (1u << 20)
#define MSG_BYTES 64u
#define ROUNDS    31u
#define AT_ONCE   8u /* payloads under way, where there are many */
#define PORT      "7896"

typedef struct end {
    struct rdma_cm_id *id;
    struct ibv_mr *mr;
    uint8_t *bytes; /* [MAX_BYTES + 2 * MSG_BYTES] payload, message out, message in */
} end;

static end ends[2]; /* client, server */

static void need(bool ok, const char *what)
{
    if (ok)
        return;
    perror(what);
    exit(1);
}

static void post_recv(end *e)
{
    need(rdma_post_recv(e->id, NULL, e->bytes + MAX_BYTES + MSG_BYTES, MSG_BYTES, e->mr) == 0,
         "post_recv");
}

static void attach(end *e)
{
    need(posix_memalign((void **)&e->bytes, 4096, MAX_BYTES + 2 * MSG_BYTES) == 0, "memory");
    memset(e->bytes, 1, MAX_BYTES + 2 * MSG_BYTES);
    e->mr = ibv_reg_mr(e->id->pd, e->bytes, MAX_BYTES + 2 * MSG_BYTES,
                       IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE);
    need(e->mr != NULL, "reg_mr");
    post_recv(e);
}

static struct ibv_qp_init_attr queue_pair(void)
{
    return (struct ibv_qp_init_attr){
        .cap = {.max_send_wr = 2 * AT_ONCE, .max_recv_wr = 8, .max_send_sge = 1, .max_recv_sge = 1},
        .sq_sig_all = 0,
    };
}

static struct rdma_conn_param param = {.responder_resources = AT_ONCE, .initiator_depth = AT_ONCE};

static void *accept_one(void *arg)
{
    struct rdma_cm_id *listener = arg;
    need(rdma_get_request(listener, &ends[1].id) == 0, "get_request");
    attach(&ends[1]);
    need(rdma_accept(ends[1].id, &param) == 0, "accept");
    return NULL;
}

static void connect_ends(const char *address)
{
    struct rdma_addrinfo hints = {.ai_flags = RAI_PASSIVE, .ai_port_space = RDMA_PS_TCP}, *info;
    struct ibv_qp_init_attr attr = queue_pair();
    struct rdma_cm_id *listener;
    pthread_t thread;
    need(rdma_getaddrinfo(address, PORT, &hints, &info) == 0, "address");
    need(rdma_create_ep(&listener, info, NULL, &attr) == 0, "listening end");
    rdma_freeaddrinfo(info);
    need(rdma_listen(listener, 1) == 0, "listen");
    need(pthread_create(&thread, NULL, accept_one, listener) == 0, "thread");
    hints.ai_flags = 0;
    attr = queue_pair();
    need(rdma_getaddrinfo(address, PORT, &hints, &info) == 0, "address");
    need(rdma_create_ep(&ends[0].id, info, NULL, &attr) == 0, "connecting end");
    rdma_freeaddrinfo(info);
    attach(&ends[0]);
    need(rdma_connect(ends[0].id, &param) == 0, "connect");
    (void)pthread_join(thread, NULL);
    rdma_destroy_ep(listener);
}

/* Until the next completion of a queue, which must be a good one. */
static void await(struct ibv_cq *cq, const char *what)
{
    struct ibv_wc wc;
    int n;
    while ((n = ibv_poll_cq(cq, 1, &wc)) == 0)
        (void)sched_yield(); /* software devices work on the same cores */
    if (n < 0 || wc.status != IBV_WC_SUCCESS) {
        (void)fprintf(stderr, "%s: %s\n", what, n < 0 ? "poll" : ibv_wc_status_str(wc.status));
        exit(1);
    }
}

/* A message from one end to the other, which takes it. */
static void tell(end *from, end *to)
{
    need(rdma_post_send(from->id, NULL, from->bytes + MAX_BYTES, MSG_BYTES, from->mr,
                        IBV_SEND_SIGNALED) == 0,
         "post_send");
    await(to->id->recv_cq, "a message");
    post_recv(to);
    await(from->id->send_cq, "a SEND");
}

static uint64_t by_read(uint32_t len_bytes, uint32_t n)
{
    uint64_t began_ns = kvc_now_ns();
    tell(&ends[0], &ends[1]);
    for (uint32_t i = 0; i < n; i++)
        need(rdma_post_read(ends[1].id, NULL, ends[1].bytes, len_bytes, ends[1].mr,
                            IBV_SEND_SIGNALED, (uintptr_t)ends[0].bytes, ends[0].mr->rkey) == 0,
             "post_read");
    for (uint32_t i = 0; i < n; i++)
        await(ends[1].id->send_cq, "a READ");
    tell(&ends[1], &ends[0]);
    return kvc_now_ns() - began_ns;
}

static uint64_t by_write(uint32_t len_bytes, uint32_t n)
{
    uint64_t began_ns = kvc_now_ns();
    tell(&ends[0], &ends[1]);
    tell(&ends[1], &ends[0]); /* the grant */
    for (uint32_t i = 0; i < n; i++)
        need(rdma_post_write(ends[0].id, NULL, ends[0].bytes, len_bytes, ends[0].mr, 0,
                             (uintptr_t)ends[1].bytes, ends[1].mr->rkey) == 0,
             "post_write");
    tell(&ends[0], &ends[1]); /* it is there */
    tell(&ends[1], &ends[0]);
    return kvc_now_ns() - began_ns;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double values[ROUNDS])
{
    qsort(values, ROUNDS, sizeof(values[0]), compare);
    return values[ROUNDS / 2];
}

static void compare_ways(uint32_t len_bytes, uint32_t n)
{
    double read_us[ROUNDS], write_us[ROUNDS], ratio[ROUNDS];
    for (uint32_t i = 0; i < ROUNDS; i++) {
        read_us[i] = (double)by_read(len_bytes, n) / 1e3;
        write_us[i] = (double)by_write(len_bytes, n) / 1e3;
        ratio[i] = write_us[i] / read_us[i];
    }
    printf("%u x %u bytes: by READ %.0f us, by grant and WRITE %.0f us, WRITE to READ %.2f "
           "(medians of %u pairs)\n",
           n, len_bytes, median(read_us), median(write_us), median(ratio), ROUNDS);
}

int main(int argc, char **argv)
{
    static const uint32_t sizes[] = {16u << 10, 128u << 10, MAX_BYTES};
    if (argc != 2) {
        (void)fprintf(stderr, "usage: put_ways ADDRESS\n");
        return 2;
    }
    (void)setvbuf(stdout, NULL, _IOLBF, 0);
    connect_ends(argv[1]);
    for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++)
        compare_ways(sizes[s], 1);
    for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]) - 1; s++)
        compare_ways(sizes[s], AT_ONCE);
    rdma_destroy_ep(ends[0].id);
    rdma_destroy_ep(ends[1].id);
    return 0;
}
