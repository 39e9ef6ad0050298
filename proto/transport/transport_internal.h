/*
 * transport_internal.h: what the transports of this folder share with the registry.
 *
 * Each transport gives one table; registry.c lists them. Nobody outside proto/transport includes
 * this.
 */
#ifndef KVTI_TRANSPORT_INTERNAL_H
#define KVTI_TRANSPORT_INTERNAL_H

#include "transport/transport.h"

/* Memory that decoding one message may take; a full header needs about a third of it. */
#define KVTI_ARENA_BYTES        ((size_t)64 << 20)
/* The hint that goes with an AGAIN of the transport itself. */
#define KVTI_RETRY_MS           5u
/* Transfers in flight on one connection; beyond: AGAIN. */
#define KVTI_MAX_XFERS          16384u
/* What listen takes for options that are 0. */
#define KVTI_MAX_CALLS          1024u
#define KVTI_MAX_INFLIGHT_BYTES ((uint64_t)64 << 20)
#define KVTI_MAX_DEADLINE_NS    (600ull * 1000000000)

extern const kvt_ops kvt_inproc_ops;
extern const kvt_ops kvt_grpc_ops;
extern const kvt_ops kvt_shm_ops;
extern const kvt_ops kvt_rdma_ops;

/* The budget that a listener charges: opts->inflight, or own, made for it alone. */
kvt_budget *kvti_budget(const kvt_listen_opts *opts, kvt_budget *own);
/* Whether len_bytes fit, and then they are charged. What is alone always fits. Any thread. */
bool kvti_budget_take(kvt_budget *budget, uint64_t len_bytes) KVC_MUST_CHECK;
void kvti_budget_give(kvt_budget *budget, uint64_t len_bytes);

/* Counts a connection that comes; false: it is to be refused, and that is counted and, now and
 * then, logged. peers may be NULL. Any thread. */
bool kvti_peers_take(kvt_peers *peers) KVC_MUST_CHECK;
/* n of them have ended. */
void kvti_peers_give(kvt_peers *peers, uint32_t n);

/* Counts a call of ours that is answered without the server having seen it, in the metrics that the
   server keeps of the calls that it sees. */
void kvti_count_refusal(kvc_status status);

/* Switches that gRPC's libraries need before first use. Once, from kvt_init. */
void kvti_grpc_prepare(void);

#endif
