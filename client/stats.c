/*
 * stats.c: what the server says of itself: Describe and Stats in one; and what this process counts.
 *
 * Two blocking messages; the replies are copied on a transport thread into an arena that lives
 * behind the public struct and goes with it.
 */
#include <stdlib.h>
#include <string.h>

#include "base/metrics.h"
#include "internal.h"

#define STATS_ARENA_BYTES ((size_t)32 << 20)

typedef struct holder {
    kvc_server_stats stats; /* first: the public face */
    kvc_limits limits;
    kvc_arena arena;
} holder;

static const char *copy_text(kvc_arena *arena, const char *text)
{
    return kvc_arena_strndup(arena, text != NULL ? text : "", text != NULL ? strlen(text) : 0);
}

static kvc_status take_describe(void *arg, const kvc_reply *reply)
{
    holder *h = arg;
    uint32_t n = reply->u.describe.n_schemas;
    h->stats.version = copy_text(&h->arena, reply->u.describe.version);
    h->stats.boot_id = reply->u.describe.boot_id;
    h->limits = reply->u.describe.limits;
    h->stats.limits = &h->limits;
    kvc_digest *schemas = kvc_arena_calloc(&h->arena, n, sizeof(*schemas));
    if (schemas == NULL || h->stats.version == NULL)
        return KVC_NO_MEMORY;
    if (n > 0)
        memcpy(schemas, reply->u.describe.schemas, n * sizeof(*schemas));
    if (n > 0 && reply->u.describe.opaque != NULL) {
        uint8_t *opaque = kvc_arena_calloc(&h->arena, n, sizeof(*opaque));
        if (opaque == NULL)
            return KVC_NO_MEMORY;
        memcpy(opaque, reply->u.describe.opaque, n);
        h->stats.opaque = opaque;
    }
    h->stats.n_schemas = n;
    h->stats.schemas = schemas;
    return KVC_OK;
}

static kvc_status take_stats(void *arg, const kvc_reply *reply)
{
    holder *h = arg;
    uint32_t n_tiers = reply->u.stats.n_tiers, n_counters = reply->u.stats.n_counters;
    kvc_tier_stats *tiers = kvc_arena_calloc(&h->arena, n_tiers, sizeof(*tiers));
    kvc_named_count *counters = kvc_arena_calloc(&h->arena, n_counters, sizeof(*counters));
    if (tiers == NULL || counters == NULL)
        return KVC_NO_MEMORY;
    bool whole = true;
    for (uint32_t i = 0; i < n_tiers; i++) {
        tiers[i] = reply->u.stats.tiers[i];
        tiers[i].name = copy_text(&h->arena, tiers[i].name);
        whole = whole && tiers[i].name != NULL;
    }
    for (uint32_t i = 0; i < n_counters; i++) {
        counters[i].value = reply->u.stats.counters[i].value;
        counters[i].name = copy_text(&h->arena, reply->u.stats.counters[i].name);
        whole = whole && counters[i].name != NULL;
    }
    h->stats.uptime_ms = reply->u.stats.uptime_ms;
    h->stats.n_tiers = n_tiers;
    h->stats.n_counters = n_counters;
    h->stats.tiers = tiers;
    h->stats.counters = counters;
    return whole ? KVC_OK : KVC_NO_MEMORY;
}

kvc_status kvc_stats(kvc_client *client, uint64_t deadline_ns, kvc_server_stats **stats_p)
{
    *stats_p = NULL;
    holder *h = calloc(1, sizeof(*h));
    if (h == NULL)
        return kvci_fail(KVC_NO_MEMORY, "stats: no memory");
    h->stats.size_bytes = sizeof(h->stats);
    kvc_arena_init(&h->arena, STATS_ARENA_BYTES);
    kvc_request req = {.method = KVC_DESCRIBE};
    kvci_rpc_opts opts = {.deadline_ns = deadline_ns, .take = take_describe, .take_arg = h};
    kvc_status status = kvci_rpc(client, &req, &opts);
    if (status == KVC_OK) {
        req.method = KVC_STATS;
        opts.take = take_stats;
        status = kvci_rpc(client, &req, &opts);
    }
    if (status != KVC_OK) {
        kvc_stats_free(&h->stats);
        return status;
    }
    *stats_p = &h->stats;
    return KVC_OK;
}

uint32_t kvc_process_counts(kvc_named_count *counts, uint32_t n)
{
    kvc_metric_value values[KVC_METRIC_COUNT];
    kvc_metrics_snapshot(values);
    for (uint32_t i = 0; i < n && i < KVC_METRIC_COUNT; i++)
        counts[i] = (kvc_named_count){values[i].name, values[i].value};
    return KVC_METRIC_COUNT;
}

void kvc_stats_free(kvc_server_stats *stats)
{
    if (stats == NULL)
        return;
    holder *h = (holder *)stats;
    kvc_arena_reset(&h->arena);
    free(h);
}
