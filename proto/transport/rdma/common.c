/*
 * common.c: addresses, texts, and the table.
 *
 * Static, any thread.
 */
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rdma_internal.h"

#define SCHEME     "rdma://"
#define HOST_BYTES 256

/* host:port or [v6]:port into its halves. */
static bool split(const char *uri, char host[HOST_BYTES], const char **port_p)
{
    if (uri == NULL || strncmp(uri, SCHEME, sizeof(SCHEME) - 1) != 0 ||
        strlen(uri) >= KVTI_URI_BYTES)
        return false;
    const char *begin = uri + sizeof(SCHEME) - 1;
    const char *colon = strrchr(begin, ':');
    if (colon == NULL || colon == begin)
        return false;
    size_t len = (size_t)(colon - begin);
    if (*begin == '[' && begin[len - 1] == ']') {
        begin++;
        len -= 2;
    } else if (memchr(begin, ':', len) != NULL) {
        return false;
    }
    if (len == 0 || len >= HOST_BYTES)
        return false;
    memcpy(host, begin, len);
    host[len] = '\0';
    *port_p = colon + 1;
    return true;
}

kvc_status kvtr_rdma_address(const char *uri, struct sockaddr_storage *addr_p)
{
    char host[HOST_BYTES], *end;
    const char *port;
    struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM}, *found;
    if (!split(uri, host, &port) || *port < '0' || *port > '9')
        return KVC_INVALID;
    unsigned long number = strtoul(port, &end, 10);
    if (*end != '\0' || number > 65535)
        return KVC_INVALID;
    if (getaddrinfo(host, port, &hints, &found) != 0)
        return KVC_UNAVAILABLE;
    memset(addr_p, 0, sizeof(*addr_p));
    memcpy(addr_p, found->ai_addr, found->ai_addrlen);
    freeaddrinfo(found);
    return KVC_OK;
}

const char *kvtr_cm_reason(enum rdma_cm_event_type type)
{
    switch (type) {
    case RDMA_CM_EVENT_ADDR_ERROR:
        return "no RDMA device has a route to that address";
    case RDMA_CM_EVENT_ROUTE_ERROR:
        return "no RDMA route to that address";
    case RDMA_CM_EVENT_UNREACHABLE:
        return "the server cannot be reached over RDMA";
    case RDMA_CM_EVENT_REJECTED:
    case RDMA_CM_EVENT_CONNECT_ERROR:
        return "nobody takes RDMA connections there";
    case RDMA_CM_EVENT_DEVICE_REMOVAL:
        return "the RDMA device was removed";
    case RDMA_CM_EVENT_ADDR_CHANGE:
        return "the address moved to another device";
    default:
        return "the RDMA connection was closed";
    }
}

static const char *const schemes[] = {"rdma", NULL};

const kvt_ops kvt_rdma_ops = {
    .name = "rdma",
    .schemes = schemes,
    .listen = kvtr_rdma_listen,
    .listener_uri = kvtr_rdma_listener_uri,
    .set_serving = kvtr_rdma_set_serving,
    .drain = kvtr_rdma_drain,
    .listener_close = kvtr_rdma_listener_close,
    .reply = kvtr_rdma_reply,
    .send = kvtr_rdma_send,
    .recv = kvtr_rdma_recv,
    .unrecv = kvtr_rdma_unrecv,
    .drop_data = kvtr_rdma_drop_data,
    .connect = kvtr_rdma_connect,
    .submit = kvtr_rdma_submit,
    .push = kvtr_rdma_push,
    .cancel = kvtr_rdma_cancel,
    .conn_close = kvtr_rdma_conn_close,
};
