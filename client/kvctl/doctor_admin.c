/*
 * doctor_admin.c: does the server's admin port answer, is the server ready, has a tier failed?
 *
 * A plain HTTP/1.0 GET over a socket, since that is all it takes; every wait ends with the
 * command's timeout, and an answer is cut at a limit.
 */
#include <errno.h>
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "doctor.h"

#define ANSWER_BYTES  ((size_t)1 << 20)
#define DEFAULT_ADMIN "127.0.0.1:7812"

/* Waits for events of fd; false: the deadline came first. */
static bool wait_for(int fd, short events, uint64_t deadline_ns)
{
    uint64_t now_ns = kvc_now_ns();
    struct pollfd wait = {.fd = fd, .events = events};
    return now_ns < deadline_ns && poll(&wait, 1, (int)((deadline_ns - now_ns) / 1000000 + 1)) > 0;
}

/* Connects to "HOST:PORT" or "[HOST]:PORT"; -1, and errno says why. */
static int dial(const char *address, uint64_t deadline_ns)
{
    struct addrinfo wanted = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV};
    struct addrinfo *found = NULL;
    char host[256];
    const char *colon = strrchr(address, ':');
    size_t skip = address[0] == '[', len_bytes = colon ? (size_t)(colon - address) : 0;
    if (len_bytes <= 2 * skip || len_bytes >= sizeof(host)) {
        errno = EINVAL;
        return -1;
    }
    memcpy(host, address + skip, len_bytes - 2 * skip);
    host[len_bytes - 2 * skip] = '\0';
    if (getaddrinfo(host, colon + 1, &wanted, &found) != 0) {
        errno = EADDRNOTAVAIL;
        return -1;
    }
    int error = 0;
    socklen_t error_bytes = sizeof(error);
    int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0 && connect(fd, found->ai_addr, found->ai_addrlen) != 0) {
        error = errno;
        if (error == EINPROGRESS && !wait_for(fd, POLLOUT, deadline_ns))
            error = ETIMEDOUT;
        else if (error == EINPROGRESS)
            (void)getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &error_bytes);
    }
    freeaddrinfo(found);
    if (fd >= 0 && error != 0) {
        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

/* GETs a path into answer [ANSWER_BYTES]; the HTTP status and, in *body_p, where its text starts.
   0: no such answer, and errno says why. */
static unsigned http_get(const char *address, const char *path, uint64_t deadline_ns, char *answer,
                         const char **body_p)
{
    char request[320];
    size_t got = 0;
    unsigned code = 0;
    int n =
        snprintf(request, sizeof(request), "GET %s HTTP/1.0\r\nHost: %s\r\n\r\n", path, address);
    int fd = dial(address, deadline_ns);
    if (fd < 0)
        return 0;
    errno = EPROTO;
    if (n < (int)sizeof(request) && send(fd, request, (size_t)n, MSG_NOSIGNAL) == n) {
        ssize_t part = 1;
        while (part > 0 && got < ANSWER_BYTES - 1 && wait_for(fd, POLLIN, deadline_ns)) {
            part = recv(fd, answer + got, ANSWER_BYTES - 1 - got, 0);
            got += part > 0 ? (size_t)part : 0;
        }
    }
    close(fd);
    answer[got] = '\0';
    const char *body = strstr(answer, "\r\n\r\n");
    if (!body || strncmp(answer, "HTTP/1.", 7) != 0 || answer[8] != ' ')
        return 0;
    code = (unsigned)strtoul(answer + 9, NULL, 10);
    *body_p = body + 4;
    return code;
}

/* Reports each tier that says it failed. */
static void check_metrics(doctor *d, const char *text)
{
    static const char name[] = "\nkvasir_tier_failed{tier=\"";
    const char *at = text;
    bool failed = false;
    while ((at = strstr(at, name)) != NULL) {
        char tier[32] = "";
        unsigned value = 0;
        at += sizeof(name) - 1;
        if (sscanf(at, "%31[^\"]\"} %u", tier, &value) == 2 && value != 0) {
            doctor_report(d, DOCTOR_FAIL, "admin", "some of the %s tier's medium failed", tier);
            doctor_fix(d, "look into the server's log and at the disk; what belongs there is "
                          "refused until a restart");
            failed = true;
        }
    }
    if (!failed)
        doctor_report(d, DOCTOR_OK, "admin", "metrics are there, and no tier has failed");
}

void doctor_check_admin(doctor *d)
{
    const char *address = d->admin ? d->admin : DEFAULT_ADMIN, *body;
    uint64_t deadline_ns = kvctl_deadline_ns(d->globals);
    char *answer = d->admin || d->local ? calloc(1, ANSWER_BYTES) : NULL;
    if (answer == NULL)
        return;
    unsigned code = http_get(address, "/readyz", deadline_ns, answer, &body);
    if (code == 0 && d->admin == NULL) {
        doctor_report(d, DOCTOR_INFO, "admin", "no admin port at %s", address);
        doctor_fix(d, "set admin_listen for metrics and probes, or name it with --admin");
    } else if (code == 0) {
        doctor_report(d, DOCTOR_FAIL, "admin", "%s does not answer: %s", address, strerror(errno));
        doctor_fix(d, "is it the server's admin_listen?");
    } else if (code != 200) {
        doctor_report(d, DOCTOR_FAIL, "admin", "%s says %u, not ready: %.*s", address, code,
                      (int)strcspn(body, "\r\n"), body);
        doctor_fix(d, "no call is taken meanwhile; the server's log says what it does");
    } else {
        doctor_report(d, DOCTOR_OK, "admin", "%s says that the server is ready", address);
    }
    if (code != 0 && http_get(address, "/metrics", deadline_ns, answer, &body) == 200)
        check_metrics(d, body);
    free(answer);
}
