/*
 * admin_http.c: HTTP by libmicrohttpd, the only file that sees its header; see admin_http.h.
 *
 * Thread kvs-admin polls the library's epoll set and an eventfd, and runs everything else here;
 * open and close belong to the main thread. Invariant: the library is touched by one thread at a
 * time: open before the thread starts, then the thread, close after it is joined.
 */
#include "admin_http.h"

#include <errno.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/log.h"
#include "base/thread.h"

#define BACKLOG 16

struct kvsi_http {
    struct MHD_Daemon *daemon;
    kvsi_http_handler *handler;
    void *arg;
    int epoll_fd, wake_fd; /* epoll_fd is the library's */
    kvc_thread thread;
};

bool kvsi_http_built(void)
{
    return true;
}

static enum MHD_Result queue(struct MHD_Connection *connection, kvsi_http_answer *answer)
{
    static char none[] = "out of memory\n";
    bool has = answer->body != NULL;
    struct MHD_Response *response = MHD_create_response_from_buffer(
        strlen(has ? answer->body : none), has ? answer->body : none,
        has ? MHD_RESPMEM_MUST_FREE : MHD_RESPMEM_PERSISTENT);
    if (!response) {
        free(answer->body);
        return MHD_NO; /* the connection is closed */
    }
    (void)MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE,
                                  has ? answer->type : "text/plain; charset=utf-8");
    if (answer->code == MHD_HTTP_METHOD_NOT_ALLOWED)
        (void)MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, "GET, HEAD");
    enum MHD_Result result = MHD_queue_response(
        connection, has ? answer->code : MHD_HTTP_INTERNAL_SERVER_ERROR, response);
    MHD_destroy_response(response);
    return result;
}

/* The library calls it once for the headers, then for each piece of a body, then at the end. */
static enum MHD_Result on_request(void *arg, struct MHD_Connection *connection, const char *url,
                                  const char *method, const char *version, const char *data,
                                  size_t *data_bytes, void **seen_p)
{
    static char seen;
    const kvsi_http *http = arg;
    kvsi_http_answer answer = {.type = "text/plain; charset=utf-8"};
    (void)version;
    (void)data;
    if (strcmp(method, MHD_HTTP_METHOD_GET) != 0 && strcmp(method, MHD_HTTP_METHOD_HEAD) != 0) {
        answer.code = MHD_HTTP_METHOD_NOT_ALLOWED;
        answer.body = strdup("only GET and HEAD\n");
        return queue(connection, &answer);
    }
    if (!*seen_p) {
        *seen_p = &seen;
        return MHD_YES;
    }
    if (*data_bytes > 0)
        return MHD_NO; /* nobody needs a body here: the connection is closed */
    http->handler(http->arg, url, &answer);
    return queue(connection, &answer);
}

static void log_line(void *arg, const char *fmt, va_list args)
{
    char line[256];
    (void)arg;
    vsnprintf(line, sizeof(line), fmt, args);
    line[strcspn(line, "\n")] = '\0';
    KVC_LOG_DEBUG(ADMIN, "%s", line);
}

static void http_main(void *arg)
{
    kvsi_http *http = arg;
    for (;;) {
        struct pollfd fds[2] = {{.fd = http->epoll_fd, .events = POLLIN},
                                {.fd = http->wake_fd, .events = POLLIN}};
        /* Never for ever: once its places were all taken, the library listens again at its next
           turn only, and nothing that comes would wake it to that. */
        MHD_UNSIGNED_LONG_LONG wait_ms;
        int timeout_ms = 1000;
        if (MHD_get_timeout(http->daemon, &wait_ms) == MHD_YES && wait_ms < 1000)
            timeout_ms = (int)wait_ms;
        int n = poll(fds, 2, timeout_ms);
        if (n > 0 && fds[1].revents)
            return;
        (void)MHD_run(http->daemon);
    }
}

static kvc_status bind_socket(const struct sockaddr *address, socklen_t len_bytes, int *fd_p)
{
    int on = 1;
    int fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return KVC_IO;
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) != 0 ||
        bind(fd, address, len_bytes) != 0 || listen(fd, BACKLOG) != 0) {
        int error = errno;
        close(fd);
        errno = error;
        return KVC_IO;
    }
    *fd_p = fd;
    return KVC_OK;
}

static unsigned port_of(int fd)
{
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } bound = {.v6 = {0}};
    socklen_t len_bytes = sizeof(bound);
    if (getsockname(fd, &bound.any, &len_bytes) != 0)
        return 0;
    return ntohs(bound.any.sa_family == AF_INET6 ? bound.v6.sin6_port : bound.v4.sin_port);
}

/* Takes fd, on failure too. */
static kvc_status start_daemon(kvsi_http *http, int fd)
{
    http->daemon = MHD_start_daemon(MHD_USE_EPOLL | MHD_USE_ERROR_LOG, 0, NULL, NULL, on_request,
                                    http, MHD_OPTION_EXTERNAL_LOGGER, log_line, NULL,
                                    MHD_OPTION_LISTEN_SOCKET, fd, MHD_OPTION_CONNECTION_LIMIT,
                                    KVSI_HTTP_CONNECTIONS, MHD_OPTION_CONNECTION_TIMEOUT,
                                    KVSI_HTTP_IDLE_S, MHD_OPTION_CONNECTION_MEMORY_LIMIT,
                                    (size_t)KVSI_HTTP_BYTES, MHD_OPTION_END);
    if (!http->daemon) {
        close(fd);
        KVC_LOG_ERROR(ADMIN, "libmicrohttpd does not start");
        return KVC_NO_MEMORY;
    }
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(http->daemon, MHD_DAEMON_INFO_EPOLL_FD);
    http->epoll_fd = info ? info->epoll_fd : -1;
    http->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (http->epoll_fd < 0 || http->wake_fd < 0)
        return KVC_IO;
    return kvc_thread_start(&http->thread, "kvs-admin", http_main, http);
}

kvc_status kvsi_http_open(const struct sockaddr *address, socklen_t len_bytes,
                          kvsi_http_handler *handler, void *arg, unsigned *port_p,
                          kvsi_http **http_p)
{
    int fd;
    *http_p = NULL;
    kvsi_http *http = calloc(1, sizeof(*http));
    if (!http)
        return KVC_NO_MEMORY;
    http->handler = handler;
    http->arg = arg;
    http->wake_fd = -1;
    kvc_status status = bind_socket(address, len_bytes, &fd);
    if (status != KVC_OK)
        KVC_LOG_ERROR(ADMIN, "cannot bind the admin port: %s", strerror(errno));
    if (status == KVC_OK) {
        *port_p = port_of(fd);
        status = start_daemon(http, fd);
    }
    if (status != KVC_OK) {
        kvsi_http_close(http);
        return status;
    }
    *http_p = http;
    return KVC_OK;
}

void kvsi_http_close(kvsi_http *http)
{
    if (!http)
        return;
    if (http->thread.started) {
        uint64_t one = 1;
        ssize_t n = write(http->wake_fd, &one, sizeof(one)); /* an eventfd at 0 takes it */
        (void)n;
        kvc_thread_join(&http->thread);
    }
    if (http->daemon)
        MHD_stop_daemon(http->daemon);
    if (http->wake_fd >= 0)
        close(http->wake_fd);
    free(http);
}
