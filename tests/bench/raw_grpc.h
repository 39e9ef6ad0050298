/*
 * raw_grpc.h: the gRPC transport alone, with no store and no client library: messages of 1 MiB over
 * loopback, several in flight, each copied once where it arrives. Both ends in this process.
 */
#ifndef KVASIR_BENCH_RAW_GRPC_H
#define KVASIR_BENCH_RAW_GRPC_H

#include <stdint.h>

#include "kvc/status.h"

#define RAW_GRPC_BYTES (1u << 20)

typedef struct raw_grpc raw_grpc;

/* threads: at the server, 0 for its default. Fails with what the transport says. */
kvc_status raw_grpc_open(uint32_t channels, uint32_t threads, raw_grpc **grpc_p) KVC_MUST_CHECK;
void raw_grpc_close(raw_grpc *grpc); /* NULL is fine */
/* n messages from (put) or to (get) memory, which has n MiB. What is got lies in that many slices
 * (1 to 256, a power of 2) all over the server's memory. Blocks. */
kvc_status raw_grpc_move(raw_grpc *grpc, int is_put, uint32_t slices, uint8_t *memory,
                         uint32_t n) KVC_MUST_CHECK;

#endif
