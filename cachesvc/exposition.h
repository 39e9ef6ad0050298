/*
 * exposition.h: the server's metrics as Prometheus reads them, text format 0.0.4.
 *
 * Names: kvasir_<name>, counters kvasir_<name>_total, with the name of metrics.def; seconds and
 * bytes, never multiples. They are for the operator: nothing here is told apart by tenant.
 */
#ifndef KVS_EXPOSITION_H
#define KVS_EXPOSITION_H

#include "server.h"

#define KVS_EXPOSITION_TYPE "text/plain; version=0.0.4; charset=utf-8"

/* Gives malloc'd text; NULL: no memory. server may be NULL: what it would say is left out. Takes
   the locks of the tiers for an instant; any thread. */
char *kvs_exposition(kvs_server *server);

#endif
