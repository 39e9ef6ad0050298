/*
 * admin_no_http.c: admin_http.h in a build without libmicrohttpd: there is none.
 *
 * Main thread; no state.
 */
#include "admin_http.h"

#include <stddef.h>

bool kvsi_http_built(void)
{
    return false;
}

kvc_status kvsi_http_open(const struct sockaddr *address, socklen_t len_bytes,
                          kvsi_http_handler *handler, void *arg, unsigned *port_p,
                          kvsi_http **http_p)
{
    (void)address;
    (void)len_bytes;
    (void)handler;
    (void)arg;
    *port_p = 0;
    *http_p = NULL;
    return KVC_UNSUPPORTED;
}

void kvsi_http_close(kvsi_http *http)
{
    (void)http;
}
