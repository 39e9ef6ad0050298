/*
 * limits.h: the limits that clients are told.
 *
 * The starting thread, before the first request.
 */
#ifndef KVS_LIMITS_H
#define KVS_LIMITS_H

#include "server.h"

/* Those that follow from the settings alone; the others are 0. */
void kvs_limits_fill(const kvs_settings *settings, kvc_limits *limits_p);
/* The others, once the server's parts stand. */
void kvs_limits_finish(kvs_server *server);
/* Whether a full piece of an opaque value and its page fit into a segment of dram, of which there
   are 16 or more. */
bool kvs_limits_pieces_fit(const kvs_settings *settings);

#endif
