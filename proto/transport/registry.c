/*
 * registry.c: the list of transports built in, process-wide set-up, and what they count alike.
 *
 * Static, any thread. A new transport is one line here.
 */
#include <malloc.h>
#include <pthread.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/metrics.h"
#include "transport_internal.h"

#define MALLOC_KEEP_BYTES (64 << 20)
#define MALLOC_MMAP_BYTES (32 << 20) /* the most that glibc takes */
#define REFUSAL_LOG_NS    ((uint64_t)10 * 1000000000)

static const kvt_ops *const transports[] = {
    &kvt_inproc_ops,
    &kvt_shm_ops,
#ifdef KVASIR_GRPC
    &kvt_grpc_ops,
#endif
#ifdef KVASIR_RDMA
    &kvt_rdma_ops,
#endif
};

#define N_TRANSPORTS (sizeof(transports) / sizeof(transports[0]))

static bool scheme_fits(const char *uri, const char *scheme)
{
    size_t len = strlen(scheme);
    return strncmp(uri, scheme, len) == 0 && strncmp(uri + len, "://", 3) == 0;
}

const kvt_ops *kvt_find(const char *uri)
{
    for (size_t i = 0; i < N_TRANSPORTS; i++) {
        for (const char *const *scheme = transports[i]->schemes; *scheme != NULL; scheme++) {
            if (scheme_fits(uri, *scheme))
                return transports[i];
        }
    }
    return NULL;
}

const kvt_ops *kvt_at(uint32_t i)
{
    return i < N_TRANSPORTS ? transports[i] : NULL;
}

void kvti_count_refusal(kvc_status status)
{
    KVC_COUNT(requests);
    if (status == KVC_AGAIN)
        KVC_COUNT(requests_refused);
    else
        KVC_COUNT(requests_failed);
    if (status == KVC_TIMED_OUT)
        KVC_COUNT(requests_timed_out);
}

kvt_budget *kvti_budget(const kvt_listen_opts *opts, kvt_budget *own)
{
    own->max_bytes = opts->max_inflight_bytes;
    atomic_init(&own->used_bytes, 0);
    return opts->inflight != NULL ? opts->inflight : own;
}

bool kvti_budget_take(kvt_budget *budget, uint64_t len_bytes)
{
    uint_least64_t used = atomic_load(&budget->used_bytes);
    do {
        if (used > 0 && (used >= budget->max_bytes || len_bytes > budget->max_bytes - used))
            return false;
    } while (!atomic_compare_exchange_weak(&budget->used_bytes, &used, used + len_bytes));
    return true;
}

void kvti_budget_give(kvt_budget *budget, uint64_t len_bytes)
{
    atomic_fetch_sub(&budget->used_bytes, len_bytes);
}

/* Not a line for each: whoever is refused comes again. */
static void log_refusal(uint32_t max)
{
    static atomic_uint_least64_t next_ns;
    uint64_t now_ns = kvc_now_ns();
    uint_least64_t due_ns = atomic_load(&next_ns);
    if (now_ns >= due_ns &&
        atomic_compare_exchange_strong(&next_ns, &due_ns, now_ns + REFUSAL_LOG_NS))
        KVC_LOG_WARN(TRANSPORT, "connections are refused: there are %u, as many as may be", max);
}

bool kvti_peers_take(kvt_peers *peers)
{
    unsigned n = peers == NULL ? 0 : atomic_load(&peers->n);
    do {
        if (peers != NULL && n >= peers->max) {
            KVC_COUNT(connections_refused);
            log_refusal(peers->max);
            return false;
        }
    } while (peers != NULL && !atomic_compare_exchange_weak(&peers->n, &n, n + 1));
    KVC_GAUGE_ADD(connections, 1);
    return true;
}

void kvti_peers_give(kvt_peers *peers, uint32_t n)
{
    if (peers != NULL)
        atomic_fetch_sub(&peers->n, n);
    KVC_GAUGE_SUB(connections, n);
}

/* Messages of megabytes come and go: without these, glibc hands their pages back to the kernel
 * after each and faults them in again, which halves the bandwidth. Once one of them is set, glibc
 * no longer raises the size from which it maps each block afresh (128 KiB), so that is set too:
 * LMDB allocates the pages of every value before it writes them. */
static void init_once(void)
{
    (void)mallopt(M_TRIM_THRESHOLD, MALLOC_KEEP_BYTES);
    (void)mallopt(M_TOP_PAD, MALLOC_KEEP_BYTES);
    (void)mallopt(M_MMAP_THRESHOLD, MALLOC_MMAP_BYTES);
#ifdef KVASIR_GRPC
    kvti_grpc_prepare();
#endif
}

void kvt_init(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    (void)pthread_once(&once, init_once);
}
