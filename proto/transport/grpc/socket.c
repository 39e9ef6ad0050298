/*
 * socket.c: what gRPC does not set on its sockets.
 *
 * The system asks peers of a listener whether they live (SO_KEEPALIVE), not gRPC: of connections
 * that never answer its pings, gRPC 1.51 frees some while their timers still run, and aborts.
 *
 * Nothing is lost or queued between two ends of one machine, so there is nothing to control: a
 * system whose default is BBR paces such a connection by timers and more than doubles the CPU time
 * of each byte. Reno, which every Linux has and lets everybody choose, only counts. Connections
 * that leave the machine keep the system's default.
 *
 * gRPC hands its sockets out to a grpc_socket_mutator, which its public headers name but do not
 * define; the layout here is the one that it has had since 1.34. Any thread; the only state is a
 * listener's connections (peers.c).
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/socket.h>

#include <grpc/support/alloc.h>
#include <grpc/support/sync.h>

#include "grpc_internal.h"

#define KEEPALIVE_OUT_S 10

enum fd_usage { USE_CLIENT_CONNECTION, USE_SERVER_LISTENER, USE_SERVER_CONNECTION };

typedef struct socket_info {
    int fd;
    int usage; /* enum fd_usage */
} socket_info;

typedef struct mutator_vtable {
    bool (*mutate_fd)(int fd, grpc_socket_mutator *mutator);
    int (*compare)(grpc_socket_mutator *a, grpc_socket_mutator *b);
    void (*destroy)(grpc_socket_mutator *mutator);
    bool (*mutate_fd_2)(const socket_info *info, grpc_socket_mutator *mutator);
} mutator_vtable;

struct grpc_socket_mutator {
    const mutator_vtable *vtable;
    gpr_refcount refcount;
    atomic_int keepalive_s; /* ours: a listener's; 0: a client's. Written once; atomic since only
                               gRPC, which no sanitizer sees into, hands it to its threads */
    kvti_sockets sockets;   /* a listener's; to be used after keepalive_s was read */
};

/* A mapped IPv4 address as IPv4. */
static struct in6_addr plain_address(const struct sockaddr_storage *address)
{
    struct in6_addr plain = IN6ADDR_ANY_INIT;
    if (address->ss_family == AF_INET6) {
        struct sockaddr_in6 in6;
        memcpy(&in6, address, sizeof(in6));
        plain = in6.sin6_addr;
    } else if (address->ss_family == AF_INET) {
        struct sockaddr_in in;
        memcpy(&in, address, sizeof(in));
        plain.s6_addr[10] = plain.s6_addr[11] = 0xFF;
        memcpy(&plain.s6_addr[12], &in.sin_addr, sizeof(in.sin_addr));
    }
    return plain;
}

static bool is_loopback(const struct in6_addr *address)
{
    return IN6_IS_ADDR_LOOPBACK(address) ||
           (IN6_IS_ADDR_V4MAPPED(address) && address->s6_addr[12] == 127);
}

/* Both ends have one address, or loopback addresses. */
static bool stays_here(int fd)
{
    struct sockaddr_storage own = {0}, peer = {0};
    socklen_t own_bytes = sizeof(own), peer_bytes = sizeof(peer);
    if (getsockname(fd, (struct sockaddr *)&own, &own_bytes) != 0 ||
        getpeername(fd, (struct sockaddr *)&peer, &peer_bytes) != 0 ||
        (own.ss_family != AF_INET && own.ss_family != AF_INET6))
        return false;
    struct in6_addr a = plain_address(&own), b = plain_address(&peer);
    return is_loopback(&b) || IN6_ARE_ADDR_EQUAL(&a, &b);
}

static void set(int fd, int level, int option, int value)
{
    (void)setsockopt(fd, level, option, &value, sizeof(value));
}

/* Asked after keepalive_s of silence, and given up where nothing is heard for KEEPALIVE_OUT_S, also
 * where that is of bytes on their way. On sockets that are not TCP's it does nothing. */
static void keep_alive(int fd, int keepalive_s)
{
    set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    set(fd, IPPROTO_TCP, TCP_KEEPIDLE, keepalive_s);
    set(fd, IPPROTO_TCP, TCP_KEEPINTVL, KEEPALIVE_OUT_S / 5);
    set(fd, IPPROTO_TCP, TCP_KEEPCNT, 5);
    set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, (keepalive_s + KEEPALIVE_OUT_S) * 1000);
}

/* Always true: a socket that keeps the default works too. */
static bool tune(const socket_info *info, grpc_socket_mutator *mutator)
{
    static const char reno[] = "reno";
    if (info->usage == USE_SERVER_CONNECTION) {
        keep_alive(info->fd, atomic_load(&mutator->keepalive_s));
        kvti_sockets_come(&mutator->sockets, info->fd);
    }
    if (info->usage == USE_CLIENT_CONNECTION ||
        (info->usage == USE_SERVER_CONNECTION && stays_here(info->fd)))
        (void)setsockopt(info->fd, IPPROTO_TCP, TCP_CONGESTION, reno, sizeof(reno) - 1);
    return true;
}

static bool tune_nothing(int fd, grpc_socket_mutator *mutator)
{
    (void)fd;
    (void)mutator;
    return true;
}

static int same(grpc_socket_mutator *a, grpc_socket_mutator *b)
{
    return (a > b) - (a < b);
}

static void last_unref(grpc_socket_mutator *mutator)
{
    if (atomic_load(&mutator->keepalive_s) > 0)
        kvti_sockets_fini(&mutator->sockets);
    gpr_free(mutator);
}

static void *arg_copy(void *arg)
{
    gpr_ref(&((grpc_socket_mutator *)arg)->refcount);
    return arg;
}

static void arg_destroy(void *arg)
{
    grpc_socket_mutator *mutator = arg;
    if (gpr_unref(&mutator->refcount))
        last_unref(mutator);
}

static int arg_compare(void *a, void *b)
{
    return same(a, b);
}

static grpc_arg make_arg(int keepalive_s, kvt_peers *peers)
{
    static const mutator_vtable vtable = {tune_nothing, same, last_unref, tune};
    static const grpc_arg_pointer_vtable arg_vtable = {arg_copy, arg_destroy, arg_compare};
    grpc_socket_mutator *mutator = gpr_malloc(sizeof(*mutator));
    mutator->vtable = &vtable;
    gpr_ref_init(&mutator->refcount, 1);
    if (keepalive_s > 0)
        kvti_sockets_init(&mutator->sockets, peers);
    atomic_store(&mutator->keepalive_s, keepalive_s);
    grpc_arg arg = {.type = GRPC_ARG_POINTER, .key = (char *)(uintptr_t)GRPC_ARG_SOCKET_MUTATOR};
    arg.value.pointer.p = mutator;
    arg.value.pointer.vtable = &arg_vtable;
    return arg;
}

grpc_arg kvti_sockets_arg(void)
{
    return make_arg(0, NULL);
}

grpc_arg kvti_server_sockets_arg(int keepalive_s, kvt_peers *peers)
{
    return make_arg(keepalive_s, peers);
}

void kvti_server_sockets_look(const grpc_arg *arg)
{
    kvti_sockets_look(&((grpc_socket_mutator *)arg->value.pointer.p)->sockets);
}

void kvti_sockets_arg_end(grpc_arg *arg)
{
    grpc_socket_mutator *mutator = arg->value.pointer.p;
    if (atomic_load(&mutator->keepalive_s) > 0)
        kvti_sockets_over(&mutator->sockets);
    arg_destroy(mutator);
}

bool kvti_target_is_local(const char *target)
{
    char host[KVTI_TARGET_BYTES];
    const char *start = target + (target[0] == '[');
    size_t len = strcspn(start, target[0] == '[' ? "]" : ":");
    if (len >= sizeof(host))
        return false;
    memcpy(host, start, len);
    host[len] = '\0';
    struct in6_addr in6;
    struct in_addr in;
    if (inet_pton(AF_INET6, host, &in6) == 1)
        return is_loopback(&in6);
    if (inet_pton(AF_INET, host, &in) == 1)
        return ntohl(in.s_addr) >> 24 == IN_LOOPBACKNET;
    return strcmp(host, "localhost") == 0;
}
