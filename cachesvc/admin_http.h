/*
 * admin_http.h: a small HTTP server: one thread, GET and HEAD only, everything limited.
 *
 * What is answered is the caller's; how, and libmicrohttpd itself, stay in admin_http.c.
 */
#ifndef KVS_ADMIN_HTTP_H
#define KVS_ADMIN_HTTP_H

#include <stdbool.h>
#include <sys/socket.h>

#include "kvc/status.h"

#define KVSI_HTTP_CONNECTIONS 32u           /* beyond it, they wait to be accepted */
#define KVSI_HTTP_IDLE_S      5u            /* a silent connection is closed */
#define KVSI_HTTP_BYTES       (16u * 1024u) /* of a request's line and headers */

typedef struct kvsi_http kvsi_http;

typedef struct kvsi_http_answer {
    unsigned code;
    const char *type; /* static */
    char *body;       /* malloc'd text; taken. NULL: no memory, and 500 is answered */
} kvsi_http_answer;

/* Fills *answer_p for a path (without its query). Runs on the thread kvs-admin. */
typedef void kvsi_http_handler(void *arg, const char *path, kvsi_http_answer *answer_p);

/* False: nothing can be opened. */
bool kvsi_http_built(void);
/* Binds and starts the thread. port_p: the bound port. IO, NO_MEMORY: logged; UNSUPPORTED: not
 * built. */
kvc_status kvsi_http_open(const struct sockaddr *address, socklen_t len_bytes,
                          kvsi_http_handler *handler, void *arg, unsigned *port_p,
                          kvsi_http **http_p) KVC_MUST_CHECK;
/* Joins the thread and closes every connection. NULL is fine. */
void kvsi_http_close(kvsi_http *http);

#endif
