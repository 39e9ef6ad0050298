/*
 * peers.c: see peers.h. One blocking socket; replies are read through a buffer, of which a value
 * that is longer than what it holds bypasses the rest.
 */
#include "peers.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <pwd.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char reno[] = "reno";

enum {
    LISTENER_MAX = 64,
    BUFFER_BYTES = 256 << 10,
    TEXT_BYTES = 64 << 10,
    GET_KEYS = 256,
    CONNECT_TRIES = 300
};

struct peer {
    peer_kind kind;
    pid_t pid;
    int fd;
    size_t at, end; /* of what was read into buffer */
    char buffer[BUFFER_BYTES];
    char text[TEXT_BYTES]; /* requests */
    size_t text_bytes;
};

/* ---- the server ------------------------------------------------------------------------------ */

static int free_port(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int port = 0;
    if (fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address) == 0 &&
        getsockname(fd, (struct sockaddr *)&address, &len) == 0) {
        port = ntohs(address.sin_port);
    }
    if (fd >= 0) {
        close(fd);
    }
    return port;
}

static pid_t start(peer_kind kind, int port, uint32_t mem_mib)
{
    char port_text[16], mem[32];
    const struct passwd *user = getpwuid(geteuid());
    snprintf(port_text, sizeof port_text, "%d", port);
    snprintf(mem, sizeof mem, kind == PEER_REDIS ? "%umb" : "%u", mem_mib);
    const char *redis[] = {"redis-server", "--port",      port_text, "--bind",
                           "127.0.0.1",    "--save",      "",        "--appendonly",
                           "no",           "--maxmemory", mem,       "--maxmemory-policy",
                           "allkeys-lru",  "--loglevel",  "warning", "--logfile",
                           "/dev/null",    NULL};
    const char *memcached[] = {"memcached",
                               "-l",
                               "127.0.0.1",
                               "-p",
                               port_text,
                               "-m",
                               mem,
                               "-I",
                               "8m",
                               "-u",
                               user ? user->pw_name : "nobody",
                               NULL};
    char **argv = (char **)(kind == PEER_REDIS ? redis : memcached);
    pid_t pid;
    if (posix_spawnp(&pid, argv[0], NULL, NULL, argv, environ) != 0) {
        return -1;
    }
    return pid;
}

/*
 * Gives what listens reno, as our own local connections have it: where the system's default is BBR,
 * it would pace a peer to a fraction of its rate. The bench is the servers' parent, so it may.
 */
static bool unpace(pid_t pid)
{
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    bool done = false;
    for (int fd = 3; pidfd >= 0 && fd < LISTENER_MAX; fd++) {
        int copy = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0), listens = 0;
        socklen_t len = sizeof listens;
        if (copy < 0) {
            continue;
        }
        if (getsockopt(copy, SOL_SOCKET, SO_ACCEPTCONN, &listens, &len) == 0 && listens) {
            done |= setsockopt(copy, IPPROTO_TCP, TCP_CONGESTION, reno, sizeof reno - 1) == 0;
        }
        close(copy);
    }
    if (pidfd >= 0) {
        close(pidfd);
    }
    return done;
}

static int try_connect(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, reno, sizeof reno - 1);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        close(fd);
        return -1;
    }
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static const char *name_of(peer_kind kind)
{
    return kind == PEER_REDIS ? "redis-server" : "memcached";
}

peer *peer_open(peer_kind kind, uint32_t mem_mib)
{
    const struct timespec pause = {.tv_nsec = 10000000};
    peer *p = calloc(1, sizeof *p);
    int port = free_port();
    if (!p || port == 0) {
        free(p);
        return NULL;
    }
    p->kind = kind;
    p->fd = -1;
    p->pid = start(kind, port, mem_mib);
    for (int i = 0; p->pid > 0 && p->fd < 0 && i < CONNECT_TRIES; i++) {
        (void)nanosleep(&pause, NULL);
        p->fd = try_connect(port);
    }
    if (p->fd >= 0) { /* it listens; a connection has what the listener had as it came */
        if (!unpace(p->pid)) {
            fprintf(stderr, "bench: %s keeps the system's congestion control\n", name_of(kind));
        }
        close(p->fd);
        p->fd = try_connect(port);
    }
    if (p->fd < 0) {
        fprintf(stderr, "bench: SKIPPED: %s: not installed, or it does not start\n", name_of(kind));
        peer_close(p);
        return NULL;
    }
    return p;
}

void peer_close(peer *p)
{
    if (!p) {
        return;
    }
    if (p->fd >= 0) {
        close(p->fd);
    }
    if (p->pid > 0) {
        (void)kill(p->pid, SIGKILL);
        (void)waitpid(p->pid, NULL, 0);
    }
    free(p);
}

int peer_pid(const peer *p)
{
    return p->pid;
}

/* ---- bytes ----------------------------------------------------------------------------------- */

static int send_all(peer *p, struct iovec *iov, int n)
{
    while (n > 0) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)n};
        ssize_t sent = sendmsg(p->fd, &message, MSG_NOSIGNAL);
        if (sent < 0) {
            return -1;
        }
        while (n > 0 && (size_t)sent >= iov->iov_len) {
            sent -= (ssize_t)iov->iov_len;
            iov++;
            n--;
        }
        if (n > 0) {
            iov->iov_base = (char *)iov->iov_base + sent;
            iov->iov_len -= (size_t)sent;
        }
    }
    return 0;
}

__attribute__((format(printf, 2, 3))) static void add_text(peer *p, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vsnprintf(p->text + p->text_bytes, TEXT_BYTES - p->text_bytes, format, args);
    va_end(args);
    p->text_bytes += n > 0 ? (size_t)n : 0;
}

static int refill(peer *p)
{
    if (p->at < p->end) {
        memmove(p->buffer, p->buffer + p->at, p->end - p->at);
    }
    p->end -= p->at;
    p->at = 0;
    ssize_t n = recv(p->fd, p->buffer + p->end, BUFFER_BYTES - p->end, 0);
    p->end += n > 0 ? (size_t)n : 0;
    return n > 0 ? 0 : -1;
}

/* The next line without its end; NULL: the connection is gone. Valid until the next read. */
static const char *read_line(peer *p)
{
    for (;;) {
        char *line = p->buffer + p->at;
        char *stop = memchr(line, '\n', p->end - p->at);
        if (stop && stop > line) {
            stop[-1] = 0;
            p->at += (size_t)(stop - line) + 1;
            return line;
        }
        if (refill(p) != 0) {
            return NULL;
        }
    }
}

/* len bytes to dst and the line end behind them. */
static int read_value(peer *p, char *dst, size_t len_bytes)
{
    size_t have = p->end - p->at < len_bytes ? p->end - p->at : len_bytes;
    memcpy(dst, p->buffer + p->at, have);
    p->at += have;
    while (have < len_bytes) {
        ssize_t n = recv(p->fd, dst + have, len_bytes - have, 0);
        if (n <= 0) {
            return -1;
        }
        have += (size_t)n;
    }
    return read_line(p) ? 0 : -1;
}

/* ---- requests -------------------------------------------------------------------------------- */

int peer_put(peer *p, uint32_t first, uint32_t n, const void *src, size_t len_bytes)
{
    static const char end[] = "\r\n";
    const char *want = p->kind == PEER_REDIS ? "+OK" : "STORED";
    for (uint32_t i = 0; i < n; i++) {
        p->text_bytes = 0;
        if (p->kind == PEER_REDIS) {
            add_text(p, "*3\r\n$3\r\nSET\r\n$9\r\nk%08x\r\n$%zu\r\n", first + i, len_bytes);
        } else {
            add_text(p, "set k%08x 0 0 %zu\r\n", first + i, len_bytes);
        }
        struct iovec iov[] = {{p->text, p->text_bytes},
                              {(char *)(uintptr_t)src + i * len_bytes, len_bytes},
                              {(char *)(uintptr_t)end, 2}};
        if (send_all(p, iov, 3) != 0) {
            return -1;
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        const char *line = read_line(p);
        if (!line || strcmp(line, want) != 0) {
            return -1;
        }
    }
    return 0;
}

static int ask(peer *p, const uint32_t *keys, uint32_t n)
{
    p->text_bytes = 0;
    if (p->kind == PEER_REDIS) {
        add_text(p, "*%u\r\n$4\r\nMGET\r\n", n + 1);
    } else {
        add_text(p, "get");
    }
    for (uint32_t i = 0; i < n; i++) {
        add_text(p, p->kind == PEER_REDIS ? "$9\r\nk%08x\r\n" : " k%08x", keys[i]);
    }
    if (p->kind == PEER_MEMCACHED) {
        add_text(p, "\r\n");
    }
    struct iovec iov = {p->text, p->text_bytes};
    return send_all(p, &iov, 1);
}

static bool read_head(peer *p, size_t len_bytes)
{
    const char *line = read_line(p);
    size_t got = 0;
    bool head =
        line && sscanf(line, p->kind == PEER_REDIS ? "$%zu" : "VALUE %*s %*u %zu", &got) == 1;
    return head && got == len_bytes;
}

static int answer(peer *p, uint32_t n, char *dst, size_t len_bytes)
{
    if (p->kind == PEER_REDIS && !read_line(p)) {
        return -1;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (!read_head(p, len_bytes) || read_value(p, dst + i * len_bytes, len_bytes) != 0) {
            return -1;
        }
    }
    return p->kind == PEER_REDIS || read_line(p) ? 0 : -1;
}

int peer_get(peer *p, const uint32_t *keys, uint32_t n, void *dst, size_t len_bytes)
{
    /* One request is always ahead, so that the server never waits for us. */
    uint32_t batch = len_bytes >= 65536 ? 4 : GET_KEYS;
    for (uint32_t asked = 0, done = 0; done < n;) {
        while (asked < n && asked < done + 2 * batch) {
            uint32_t step = n - asked < batch ? n - asked : batch;
            if (ask(p, keys + asked, step) != 0) {
                return -1;
            }
            asked += step;
        }
        uint32_t step = n - done < batch ? n - done : batch;
        if (answer(p, step, (char *)dst + (size_t)done * len_bytes, len_bytes) != 0) {
            return -1;
        }
        done += step;
    }
    return 0;
}
