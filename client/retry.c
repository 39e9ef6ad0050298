/*
 * retry.c: which failures are worth another attempt, and after what pause.
 *
 * Pure functions, any thread. Almost every request of this protocol may be repeated (first put
 * wins, extends carry their position, a handle that nobody knows expires and keeps nothing), so the
 * outcome of a lost attempt need not be known. A kind that says not_twice is repeated only after an
 * answer that says that nothing was done.
 */
#include "internal.h"

kvci_verdict kvci_judge(const kvci_msg *msg, kvc_status status)
{
    const kvci_call *call = msg->call;
    if (status == KVC_OK || call->once)
        return KVCI_FINISH;
    switch (status) {
    case KVC_AGAIN:
        return call->kind->again_ends ? KVCI_FINISH : KVCI_RETRY;
    case KVC_UNAVAILABLE:
    case KVC_CLOSED:
    case KVC_CANCELLED: /* not by the caller: the link went away under it */
        return call->kind->not_twice ? KVCI_FINISH : KVCI_RELINK;
    case KVC_NOT_FOUND:
        /* A restarted server may have forgotten a schema that was registered here. */
        return call->kind->names_schema && !msg->reregistered && call->client->n_schemas > 0
                   ? KVCI_RELINK
                   : KVCI_FINISH;
    case KVC_STALE_HANDLE:
        return msg->n_segs > 0 && msg->reopens < KVCI_MAX_REOPENS ? KVCI_REOPEN : KVCI_FINISH;
    default:
        return KVCI_FINISH;
    }
}

/* xorshift64: the spread matters here, not the quality. */
static uint64_t next_random(uint64_t *seed_p)
{
    uint64_t x = *seed_p;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    *seed_p = x;
    return x;
}

uint64_t kvci_backoff_ns(uint32_t failures, uint64_t first_ns, uint64_t max_ns, uint64_t *seed_p)
{
    uint64_t full_ns = first_ns;
    for (uint32_t i = 1; i < failures && full_ns < max_ns; i++)
        full_ns *= 2;
    if (full_ns > max_ns)
        full_ns = max_ns;
    uint64_t half_ns = full_ns / 2;
    return full_ns - half_ns + (half_ns > 0 ? next_random(seed_p) % half_ns : 0);
}
