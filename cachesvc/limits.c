/*
 * limits.c: what Describe tells clients of the server's limits.
 *
 * The starting thread, before the first request. Invariant: what is told is what is in force, with
 * the settings' defaults worked out.
 */
#include "limits.h"

#include "attend.h"
#include "saved.h"

#define PAGE_BYTES 4096u

bool kvs_limits_pieces_fit(const kvs_settings *settings)
{
    return settings->dram_bytes / 16 / PAGE_BYTES > settings->max_value_bytes / PAGE_BYTES + 1;
}

void kvs_limits_fill(const kvs_settings *s, kvc_limits *limits_p)
{
    *limits_p = (kvc_limits){
        .max_value_bytes = (uint32_t)s->max_value_bytes,
        .max_message_bytes = KVC_MAX_VALUE_BYTES,
        .max_batch_values = KVC_MAX_BATCH_VALUES,
        .max_digests = KVC_MAX_DIGESTS,
        .max_context_blocks = KVC_MAX_CONTEXT_BLOCKS,
        .max_picks = KVC_MAX_PICKS,
        .max_groups = KVC_MAX_GROUPS,
        .max_contexts = (uint32_t)s->max_contexts,
        .max_ttl_ms = 240ull * 3600 * 1000,
        .max_attend_queries = s->attend_queue ? KVC_MAX_ATTEND_QUERIES : 0,
        .max_pieces = kvs_limits_pieces_fit(s) ? KVC_MAX_PIECES : 0,
        .max_open_blocks = s->max_open_blocks,
        .max_holds = (uint32_t)s->max_contexts,
        .max_schemas = KVS_MAX_SCHEMAS,
        .max_hold_bytes = s->max_hold_bytes ? s->max_hold_bytes : s->dram_bytes / 2,
        .max_map_pin_bytes = s->max_map_pin_bytes ? s->max_map_pin_bytes : s->dram_bytes / 2,
        .max_mapped_bytes = s->max_mapped_bytes ? s->max_mapped_bytes : s->dram_bytes / 4 * 3,
        .max_inflight_bytes = s->max_inflight_bytes,
        .max_put_window_bytes = KVC_PUT_WINDOW_BYTES,
        .max_put_window_values = KVC_PUT_WINDOW_VALUES,
        .max_saved = (uint32_t)s->max_saved,
        .max_calls = (uint32_t)s->max_calls,
    };
}

void kvs_limits_finish(kvs_server *server)
{
    kvc_limits *limits = &server->limits;
    limits->max_attend_calls = server->attender ? server->attender->max_calls : 0;
    limits->max_saved_tenant_bytes = kvs_saved_tenant_cap(server);
    limits->max_connections = server->peers.max;
}
