/*
 * admin.h: the admin port: metrics and probes over HTTP.
 *
 * It opens before the server, so that a probe sees it start, and closes after it. One thread of its
 * own ("kvs-admin") answers, so a scrape costs the data path no more than the locks that a Stats
 * call takes. The port has no authentication and shows all tenants together: it is for the
 * operator's network only. GET and HEAD:
 *   /metrics  Prometheus text; /healthz  200 as long as the process runs;
 *   /readyz   200 where a call that comes now is taken, else 503 and why.
 */
#ifndef KVS_ADMIN_H
#define KVS_ADMIN_H

#include "server.h"

typedef struct kvs_admin kvs_admin;

/*
 * listen: "HOST:PORT", HOST a numeric IPv4 address, an IPv6 address in brackets, or localhost; port
 * 0 lets the system choose. INVALID: why gets a line. UNSUPPORTED (why too): built without
 * libmicrohttpd.
 */
kvc_status kvs_admin_check(const char *listen, char why[KVC_CONFIG_WHY_BYTES]) KVC_MUST_CHECK;
/* Opens the port of a checked address; probes are told that the server is starting. IO, NO_MEMORY:
   logged. */
kvc_status kvs_admin_open(const char *listen, kvs_admin **admin_p) KVC_MUST_CHECK;
/* Shows this server from now on, borrowed until it is NULL again; then probes are told that it
   stops. Blocks while an answer about the old one is made. Any thread. */
void kvs_admin_show(kvs_admin *admin, kvs_server *server);
/* "http://HOST:PORT" with the real port. */
const char *kvs_admin_uri(const kvs_admin *admin);
/* Stops answering; blocks for an answer that is being made. NULL is fine. */
void kvs_admin_close(kvs_admin *admin);

#endif
