/*
 * peers.h: redis and memcached, real servers on loopback, spoken to by their own protocols over one
 * plain socket. Requests are pipelined, since that is how their fast clients move bulk.
 */
#ifndef KVASIR_BENCH_PEERS_H
#define KVASIR_BENCH_PEERS_H

#include <stddef.h>
#include <stdint.h>

typedef enum peer_kind { PEER_REDIS, PEER_MEMCACHED } peer_kind;
typedef struct peer peer;

/* Starts a server of mem_mib. NULL: it is not installed or does not start; stderr says which. */
peer *peer_open(peer_kind kind, uint32_t mem_mib);
void peer_close(peer *p); /* NULL is fine */
int peer_pid(const peer *p);

/* n values of len_bytes, keys first .. first + n - 1, dense at src. 0 on success. */
int peer_put(peer *p, uint32_t first, uint32_t n, const void *src, size_t len_bytes);
/* The values of these keys, dense to dst, by multi-get of up to 256 keys. -1 where one is missing
   or has another length. */
int peer_get(peer *p, const uint32_t *keys, uint32_t n, void *dst, size_t len_bytes);

#endif
