/*
 * admin.c: what the admin port answers, and where it listens; see admin.h.
 *
 * Thread kvs-admin answers; the main thread opens, shows and closes. Invariant: the server that is
 * shown is used with the lock held only, so nobody looks at one that is being closed.
 */
#include "admin.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "admin_http.h"
#include "base/log.h"
#include "base/text.h"
#include "exposition.h"

#define HOST_BYTES 64u

struct kvs_admin {
    kvc_mutex lock;     /* rank ADMIN; guards the two below */
    kvs_server *server; /* borrowed; NULL before the server stands and once it falls */
    bool shown;         /* there was one */
    kvsi_http *http;
    char uri[HOST_BYTES + 32];
};

typedef struct address {
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } u;
    socklen_t len_bytes;
    char host[HOST_BYTES]; /* as in a URI */
} address;

/* False: not HOST:PORT. */
static bool parse_host(const char *text, size_t len_bytes, uint16_t port, address *out)
{
    char host[HOST_BYTES];
    bool v6 = len_bytes > 2 && text[0] == '[' && text[len_bytes - 1] == ']';
    if (len_bytes == 0 || len_bytes >= HOST_BYTES)
        return false;
    memset(out, 0, sizeof(*out));
    memcpy(out->host, text, len_bytes);
    if (v6) {
        memcpy(host, text + 1, len_bytes - 2);
        host[len_bytes - 2] = '\0';
        out->u.v6.sin6_family = AF_INET6;
        out->u.v6.sin6_port = htons(port);
        out->len_bytes = sizeof(out->u.v6);
        return inet_pton(AF_INET6, host, &out->u.v6.sin6_addr) == 1;
    }
    out->u.v4.sin_family = AF_INET;
    out->u.v4.sin_port = htons(port);
    out->len_bytes = sizeof(out->u.v4);
    const char *name = strcmp(out->host, "localhost") == 0 ? "127.0.0.1" : out->host;
    return inet_pton(AF_INET, name, &out->u.v4.sin_addr) == 1;
}

static bool parse(const char *text, address *out)
{
    uint64_t port;
    const char *colon = strrchr(text, ':');
    return colon && kvc_uint_parse(colon + 1, &port) == KVC_OK && port <= UINT16_MAX &&
           parse_host(text, (size_t)(colon - text), (uint16_t)port, out);
}

static bool is_loopback(const address *at)
{
    return at->u.any.sa_family == AF_INET6
               ? IN6_IS_ADDR_LOOPBACK(&at->u.v6.sin6_addr)
               : (ntohl(at->u.v4.sin_addr.s_addr) & 0xff000000u) == 0x7f000000u;
}

kvc_status kvs_admin_check(const char *listen, char why[KVC_CONFIG_WHY_BYTES])
{
    address at;
    if (!parse(listen, &at)) {
        snprintf(why, KVC_CONFIG_WHY_BYTES,
                 "admin_listen is '%s': wanted HOST:PORT with a numeric address, such as "
                 "127.0.0.1:7812 or [::1]:7812",
                 listen);
        return KVC_INVALID;
    }
    if (!kvsi_http_built()) {
        snprintf(why, KVC_CONFIG_WHY_BYTES,
                 "admin_listen is '%s': this build has no admin port (libmicrohttpd)", listen);
        return KVC_UNSUPPORTED;
    }
    return KVC_OK;
}

static void answer_ready(kvs_admin *admin, kvsi_http_answer *answer_p)
{
    const char *why = admin->shown ? "stopping" : "starting";
    bool ready = admin->server && kvs_server_ready(admin->server, &why);
    char line[64];
    snprintf(line, sizeof(line), "%s\n", why);
    answer_p->code = ready ? 200 : 503;
    answer_p->body = strdup(line);
}

static void answer(void *arg, const char *path, kvsi_http_answer *answer_p)
{
    kvs_admin *admin = arg;
    answer_p->code = 200;
    if (strcmp(path, "/healthz") == 0) {
        answer_p->body = strdup("alive\n");
        return;
    }
    kvc_mutex_lock(&admin->lock);
    if (strcmp(path, "/metrics") == 0) {
        answer_p->type = KVS_EXPOSITION_TYPE;
        answer_p->body = kvs_exposition(admin->server);
    } else if (strcmp(path, "/readyz") == 0) {
        answer_ready(admin, answer_p);
    } else {
        answer_p->code = 404;
        answer_p->body = strdup("there are /metrics, /healthz and /readyz\n");
    }
    kvc_mutex_unlock(&admin->lock);
}

kvc_status kvs_admin_open(const char *listen, kvs_admin **admin_p)
{
    address at;
    unsigned port = 0;
    *admin_p = NULL;
    if (!parse(listen, &at))
        return KVC_INVALID;
    kvs_admin *admin = calloc(1, sizeof(*admin));
    if (!admin)
        return KVC_NO_MEMORY;
    kvc_mutex_init(&admin->lock, KVC_RANK_ADMIN);
    kvc_status status = kvsi_http_open(&at.u.any, at.len_bytes, answer, admin, &port, &admin->http);
    if (status != KVC_OK) {
        KVC_LOG_ERROR(ADMIN, "no admin port at %s: %s", listen, kvc_status_name(status));
        kvs_admin_close(admin);
        return status;
    }
    snprintf(admin->uri, sizeof(admin->uri), "http://%s:%u", at.host, port);
    KVC_LOG_INFO(ADMIN, "metrics and probes at %s", admin->uri);
    if (!is_loopback(&at))
        KVC_LOG_WARN(ADMIN, "%s can be reached from other machines, and asks nobody who they are",
                     admin->uri);
    *admin_p = admin;
    return KVC_OK;
}

void kvs_admin_show(kvs_admin *admin, kvs_server *server)
{
    if (!admin)
        return;
    kvc_mutex_lock(&admin->lock);
    admin->server = server;
    admin->shown = true;
    kvc_mutex_unlock(&admin->lock);
}

const char *kvs_admin_uri(const kvs_admin *admin)
{
    return admin->uri;
}

void kvs_admin_close(kvs_admin *admin)
{
    if (!admin)
        return;
    kvsi_http_close(admin->http);
    kvc_mutex_fini(&admin->lock);
    free(admin);
}
