/*
 * raw_tcp.c: see raw_tcp.h. The server thread owns its socket and one buffer of 64 MiB that it
 * walks through, so that neither end profits from a cached payload.
 */
#include "raw_tcp.h"

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define SLAB_BYTES (64u << 20)

struct raw_tcp {
    int client, server;
    pthread_t thread;
    char *slab;
};

typedef struct request {
    uint64_t len_bytes, is_put;
} request;

static int move(int fd, char *at, size_t len_bytes, int sending)
{
    while (len_bytes > 0) {
        ssize_t n = sending ? send(fd, at, len_bytes, MSG_NOSIGNAL) : recv(fd, at, len_bytes, 0);
        if (n <= 0) {
            return -1;
        }
        at += n;
        len_bytes -= (size_t)n;
    }
    return 0;
}

static void *serve(void *arg)
{
    raw_tcp *tcp = arg;
    request ask;
    size_t off = 0;
    while (move(tcp->server, (char *)&ask, sizeof ask, 0) == 0) {
        if (off + ask.len_bytes > SLAB_BYTES) {
            off = 0;
        }
        if (ask.is_put) {
            if (move(tcp->server, tcp->slab + off, ask.len_bytes, 0) != 0 ||
                move(tcp->server, (char *)&ask, sizeof ask, 1) != 0) {
                break;
            }
        } else if (move(tcp->server, tcp->slab + off, ask.len_bytes, 1) != 0) {
            break;
        }
        off += ask.len_bytes;
    }
    return NULL;
}

static kvc_status connect_pair(raw_tcp *tcp, const char *control)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof address;
    int one = 1;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    tcp->client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    kvc_status status = KVC_IO;
    /* What the listener has, the connections that it accepts have too. */
    if (control && (setsockopt(listener, IPPROTO_TCP, TCP_CONGESTION, control,
                               (socklen_t)strlen(control)) != 0 ||
                    setsockopt(tcp->client, IPPROTO_TCP, TCP_CONGESTION, control,
                               (socklen_t)strlen(control)) != 0)) {
        perror("raw TCP: TCP_CONGESTION");
    }
    if (listener >= 0 && tcp->client >= 0 &&
        bind(listener, (struct sockaddr *)&address, sizeof address) == 0 &&
        listen(listener, 1) == 0 && getsockname(listener, (struct sockaddr *)&address, &len) == 0 &&
        connect(tcp->client, (struct sockaddr *)&address, sizeof address) == 0) {
        tcp->server = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        status = tcp->server < 0 ? KVC_IO : KVC_OK;
    }
    if (status == KVC_OK) {
        (void)setsockopt(tcp->client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        (void)setsockopt(tcp->server, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    }
    if (listener >= 0) {
        close(listener);
    }
    return status;
}

kvc_status raw_tcp_open(const char *control, raw_tcp **tcp_p)
{
    *tcp_p = NULL;
    raw_tcp *tcp = calloc(1, sizeof *tcp);
    if (!tcp) {
        return KVC_NO_MEMORY;
    }
    tcp->client = tcp->server = -1;
    tcp->slab = malloc(SLAB_BYTES);
    kvc_status status = tcp->slab ? connect_pair(tcp, control) : KVC_NO_MEMORY;
    if (status == KVC_OK) {
        memset(tcp->slab, 7, SLAB_BYTES);
        status = pthread_create(&tcp->thread, NULL, serve, tcp) == 0 ? KVC_OK : KVC_NO_MEMORY;
    }
    if (status != KVC_OK) {
        if (tcp->client >= 0) {
            close(tcp->client);
        }
        if (tcp->server >= 0) {
            close(tcp->server);
        }
        free(tcp->slab);
        free(tcp);
        return status;
    }
    *tcp_p = tcp;
    return KVC_OK;
}

void raw_tcp_close(raw_tcp *tcp)
{
    if (!tcp) {
        return;
    }
    close(tcp->client);
    pthread_join(tcp->thread, NULL);
    close(tcp->server);
    free(tcp->slab);
    free(tcp);
}

kvc_status raw_tcp_get(raw_tcp *tcp, void *dst, size_t len_bytes)
{
    request ask = {.len_bytes = len_bytes};
    if (move(tcp->client, (char *)&ask, sizeof ask, 1) != 0 ||
        move(tcp->client, dst, len_bytes, 0) != 0) {
        return KVC_IO;
    }
    return KVC_OK;
}

kvc_status raw_tcp_put(raw_tcp *tcp, const void *src, size_t len_bytes)
{
    request ask = {.len_bytes = len_bytes, .is_put = 1};
    if (move(tcp->client, (char *)&ask, sizeof ask, 1) != 0 ||
        move(tcp->client, (char *)src, len_bytes, 1) != 0 ||
        move(tcp->client, (char *)&ask, sizeof ask, 0) != 0) {
        return KVC_IO;
    }
    return KVC_OK;
}
