/*
 * request.h: what the handlers of the protocol's methods share.
 *
 * A handler runs on a transport thread and must not block; it answers the call now, or keeps it and
 * answers later. Every answer goes through kvs_answer or kvs_fail, exactly once.
 */
#ifndef KVS_REQUEST_H
#define KVS_REQUEST_H

#include "server.h"

#define KVS_RETRY_MS 5u /* the hint that goes with AGAIN */

typedef void kvs_handler(kvs_server *server, kvt_call *call, const kvc_digest *tenant);

/* kvs_on_describe and so on: one for each row of methods.def. */
#define KVC_METHOD(upper, lower, name, flags) kvs_handler kvs_on_##lower;
#include "wire/methods.def"
#undef KVC_METHOD

/* As kvt_listen_opts.on_call wants it; arg: the server. */
void kvs_on_call(void *arg, kvt_call *call);

/* Takes the call. reply, slices: as kvt_call_reply. */
void kvs_answer(kvt_call *call, const kvc_reply *reply, const kvt_slice *slices, uint32_t n_slices);
/* Takes the call; fmt tells the peer what was wrong. */
void kvs_fail(kvt_call *call, kvc_status status, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* OK, or why nobody waits for the answer any more: CANCELLED, TIMED_OUT. To be asked wherever a
   call has waited in a queue. */
kvc_status kvs_given_up(const kvt_call *call);

/* The tenant's schema by digest, or NULL after kvs_fail. It is held until the call is answered;
   once a call. */
const kvs_schema *kvs_want_schema(kvs_server *server, kvt_call *call, const kvc_digest *tenant,
                                  const kvc_digest *digest);
/* References the context of a handle, for kvs_context_put; NULL after kvs_fail. */
kvs_context *kvs_want_context(kvs_server *server, kvt_call *call, const kvc_digest *tenant,
                              uint64_t handle);
/* The places of parts ids [n] of a schema, in the call's arena. NULL after kvs_fail. */
uint16_t *kvs_named_parts(kvt_call *call, const kvs_schema *schema, const uint32_t *ids,
                          uint32_t n);
/* Where none are named: all but compressed keys, unless the schema has nothing else. NULL after
   kvs_fail. */
uint16_t *kvs_default_parts(kvt_call *call, const kvs_schema *schema, uint32_t *n_p);
/* False after kvs_fail: parts were named where the schema is opaque. */
bool kvs_no_parts(kvt_call *call, uint32_t n_parts);
/* The tenant's schema by digest, which must have rows; as kvs_want_schema. */
const kvs_schema *kvs_want_rows(kvs_server *server, kvt_call *call, const kvc_digest *tenant,
                                const kvc_digest *digest);
/* A TTL of a request in nanoseconds. */
static inline uint64_t kvs_ttl_ns(uint64_t ttl_ms)
{
    return ttl_ms > UINT64_MAX / 1000000 ? UINT64_MAX : ttl_ms * 1000000;
}
/* Counts one more erase or prefetch in n_slow_jobs; false, and none, where half of the disk
   threads have such work already. */
bool kvs_slow_job_begin(kvs_server *server);

#endif
