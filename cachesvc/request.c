/*
 * request.c: from a call to its handler, and back to the peer.
 *
 * Any transport thread; answers come from any thread. Invariant: a call is answered exactly once.
 */
#include "request.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/metrics.h"
#include "tenants.h"

static kvs_handler *const handlers[KVC_METHOD_COUNT] = {
#define KVC_METHOD(upper, lower, name, flags) kvs_on_##lower,
#include "wire/methods.def"
#undef KVC_METHOD
};

/* The digest of the tenant's name; each thread remembers the last one. */
static kvc_status tenant_digest(const char *name, kvc_digest *digest_p)
{
    static _Thread_local char last_name[KVC_MAX_NAME_BYTES + 1];
    static _Thread_local kvc_digest last;
    size_t len_bytes = strlen(name);
    if (len_bytes == 0 || len_bytes > KVC_MAX_NAME_BYTES)
        return KVC_DENIED;
    if (strcmp(name, last_name) != 0) {
        kvc_status status = kvc_sha256(name, len_bytes, &last);
        if (status != KVC_OK) {
            last_name[0] = '\0';
            return status;
        }
        memcpy(last_name, name, len_bytes + 1);
    }
    *digest_p = last;
    return KVC_OK;
}

void kvs_on_call(void *arg, kvt_call *call)
{
    kvc_digest tenant;
    call->user = arg;
    call->held = NULL;
    call->began_ns = kvc_now_ns();
    atomic_fetch_add(&((kvs_server *)arg)->n_calls, 1);
    KVC_GAUGE_ADD(requests_in_flight, 1);
    if (call->peer)
        call->tenant =
            kvs_tenants_find(((kvs_server *)arg)->tenants, call->peer->uid, call->peer->gid);
    kvc_status status = tenant_digest(call->tenant, &tenant);
    if (status != KVC_OK) {
        kvs_fail(call, status, "the tenant's name must have 1 to %u bytes", KVC_MAX_NAME_BYTES);
    } else if (call->req.method >= KVC_METHOD_COUNT) {
        kvs_fail(call, KVC_UNSUPPORTED, "unknown method");
    } else if ((status = kvs_given_up(call)) != KVC_OK) {
        kvs_fail(call, status, "nobody waited any more when the request was looked at");
    } else {
        handlers[call->req.method](arg, call, &tenant);
    }
}

/* What ends with the call, whatever it is answered: its counts, and the schema that kvs_want_schema
   held for it. */
static void settle(kvs_server *server, kvt_call *call)
{
    KVC_COUNT(requests);
    KVC_GAUGE_SUB(requests_in_flight, 1);
    if (call->req.method < KVC_METHOD_COUNT)
        kvc_histogram_add(&server->latency[call->req.method], kvc_now_ns() - call->began_ns);
    kvs_schemas_put(server->schemas, call->held);
    call->held = NULL;
}

void kvs_answer(kvt_call *call, const kvc_reply *reply, const kvt_slice *slices, uint32_t n_slices)
{
    kvs_server *server = call->user;
    settle(server, call);
    kvt_call_reply(call, KVC_OK, NULL, 0, reply, slices, n_slices);
    atomic_fetch_sub(&server->n_calls, 1);
}

void kvs_fail(kvt_call *call, kvc_status status, const char *fmt, ...)
{
    kvs_server *server = call->user;
    char detail[KVT_DETAIL_BYTES];
    va_list args;
    va_start(args, fmt);
    vsnprintf(detail, sizeof(detail), fmt, args);
    va_end(args);
    if (status == KVC_AGAIN)
        KVC_COUNT(requests_refused);
    else
        KVC_COUNT(requests_failed);
    if (status == KVC_TIMED_OUT)
        KVC_COUNT(requests_timed_out);
    KVC_LOG_DEBUG(SERVER, "%s: %s: %s", kvc_method_name(call->req.method), kvc_status_name(status),
                  detail);
    settle(server, call);
    kvt_call_reply(call, status, detail, status == KVC_AGAIN ? KVS_RETRY_MS : 0, NULL, NULL, 0);
    atomic_fetch_sub(&server->n_calls, 1);
}

kvc_status kvs_given_up(const kvt_call *call)
{
    if (kvt_call_cancelled(call))
        return KVC_CANCELLED;
    return kvc_expired(call->deadline_ns) ? KVC_TIMED_OUT : KVC_OK;
}

const kvs_schema *kvs_want_schema(kvs_server *server, kvt_call *call, const kvc_digest *tenant,
                                  const kvc_digest *digest)
{
    const kvs_schema *schema = kvs_schemas_find(server->schemas, tenant, digest);
    if (!schema) {
        char hex[KVC_DIGEST_HEX_BYTES];
        kvc_digest_hex(digest, hex);
        kvs_fail(call, KVC_NOT_FOUND, "schema %.16s is not registered here", hex);
        return NULL;
    }
    KVC_ASSERT(!call->held);
    call->held = schema;
    return schema;
}

const kvs_schema *kvs_want_rows(kvs_server *server, kvt_call *call, const kvc_digest *tenant,
                                const kvc_digest *digest)
{
    const kvs_schema *schema = kvs_want_schema(server, call, tenant, digest);
    if (!schema || !schema->piece_bytes)
        return schema;
    kvs_fail(call, KVC_INVALID,
             "the schema is opaque: its values have no rows, and no contexts can be made of them");
    return NULL;
}

bool kvs_slow_job_begin(kvs_server *server)
{
    uint32_t most = server->disk ? (kvs_disk_threads(server->disk) + 1) / 2 : 1;
    if (atomic_fetch_add(&server->n_slow_jobs, 1) < most)
        return true;
    atomic_fetch_sub(&server->n_slow_jobs, 1);
    return false;
}
