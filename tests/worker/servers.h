/*
 * servers.h: several servers in this process, over inproc, and rigs spread over them, for the tests
 * of a worker over more than one.
 */
#ifndef TESTS_WORKER_SERVERS_H
#define TESTS_WORKER_SERVERS_H

#include "harness.h"

#include "bench.h"

enum { SERVERS = 8 };

typedef struct servers {
    h_server h[SERVERS];
    kvc_client *clients[SERVERS];
    uint32_t n;
} servers;

/* Starts n of them and connects to each. */
void servers_start(servers *s, uint32_t n);
void servers_stop(servers *s);
/* opts of a worker over the first n. n 0: over none. */
void servers_use(servers *s, rig *r, uint32_t n);

kvw_server_stats server_stats_of(const kvw_seq *seq, uint32_t server);

#endif
