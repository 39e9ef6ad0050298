/*
 * raw_tcp.h: the floor beside the service: a plain TCP request and response loop on 127.0.0.1.
 */
#ifndef KVASIR_RAW_TCP_H
#define KVASIR_RAW_TCP_H

#include <stddef.h>
#include <stdint.h>

#include "kvc/status.h"

typedef struct raw_tcp raw_tcp;

/* Starts an echo-like server thread and one connection. control: its congestion control; NULL: the
 * system's default. */
kvc_status raw_tcp_open(const char *control, raw_tcp **tcp_p) KVC_MUST_CHECK;
void raw_tcp_close(raw_tcp *tcp);
/* One exchange: the server sends (get) or takes (put) len bytes; 16 bytes travel the other way. */
kvc_status raw_tcp_get(raw_tcp *tcp, void *dst, size_t len_bytes) KVC_MUST_CHECK;
kvc_status raw_tcp_put(raw_tcp *tcp, const void *src, size_t len_bytes) KVC_MUST_CHECK;

#endif
