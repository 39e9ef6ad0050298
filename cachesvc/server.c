/*
 * server.c: starts and stops the parts of one server in a fixed order; see server.h.
 *
 * The starting thread opens, drains and closes; thread kvs-ticker calls kvs_server_tick. Invariant:
 * everything a request needs stands before the first listener does, and falls after the last.
 */
#include "server.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "admission_record.h"
#include "attend.h"
#include "base/clock.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/metrics.h"
#include "base/text.h"
#include "cascade.h"
#include "files.h"
#include "gpu.h"
#include "heap.h"
#include "limits.h"
#include "maps.h"
#include "recover.h"
#include "request.h"
#include "saved.h"
#include "schema_record.h"
#include "tenants.h"
#include "tier/tier_dram.h"
#include "writer.h"

#define PAGE_BYTES 4096u
#define TICK_NS    250000000ull
#define WINDOW_NS  60000000000ull /* of promotion by use */
#define REPORT_NS  10000000000ull
#define REST_TICKS 8u
/* Sizes of values that one tenant holds: each may leave a segment partly filled. */
#define KEPT_SIZES 3u

/* ---- tiers ----------------------------------------------------------------------------------- */

static kvc_status open_store(kvs_server *server, const char *name, uint64_t capacity_bytes,
                             const char *path, const char *fault, kvs_store *store)
{
    char size[KVC_TEXT_BYTES], wrapped[32], spec[512];
    snprintf(wrapped, sizeof(wrapped), "%s%s", fault ? "fault:" : "", name);
    snprintf(spec, sizeof(spec), "%s:%s", name, fault ? fault : "");
    const kvs_tier_ops *ops = kvs_tier_find(wrapped);
    if (!ops) {
        KVC_LOG_ERROR(SERVER, "this build has no %s tier", name);
        return KVC_UNSUPPORTED;
    }
    kvs_tier_opts opts = {
        .size_bytes = sizeof(opts),
        .capacity_bytes = capacity_bytes,
        .path = path,
        /* lmdb takes pieces of opaque values too, with their end record */
        .max_value_bytes = (uint32_t)server->settings.max_value_bytes + (path ? PAGE_BYTES : 0),
        .group_commit_ns = server->settings.group_commit_ns,
        .group_commit_bytes = server->settings.group_commit_bytes,
        .row_sums_bytes = server->settings.row_sums_bytes,
        .reader_ns = server->settings.lmdb_reader_ns,
        .checker = server->settings.lmdb_checker,
        .fault = fault ? spec : NULL,
    };
    kvc_status status = ops->open(&opts, &store->tier);
    if (status != KVC_OK) {
        KVC_LOG_ERROR(SERVER, "the %s tier does not open: %s", name, kvc_status_name(status));
        return status;
    }
    store->ops = ops;
    KVC_LOG_INFO(SERVER, "tier %s open: %s%s%s", name, kvc_bytes_short(capacity_bytes, size),
                 path ? " at " : "", path ? path : "");
    return KVC_OK;
}

static kvc_status open_lmdb(kvs_server *server)
{
    if (!server->settings.lmdb_path[0] || !server->settings.lmdb_bytes) {
        KVC_LOG_INFO(SERVER, "no lmdb tier: DURABLE puts are refused, nothing survives a restart");
        return KVC_OK;
    }
    kvc_status status =
        open_store(server, "lmdb", server->settings.lmdb_bytes, server->settings.lmdb_path,
                   server->settings.lmdb_fault, &server->lmdb);
    if (status == KVC_OK)
        status = kvs_recover(server);
    if (status == KVC_OK)
        kvs_admission_load(server);
    if (status == KVC_OK)
        status = kvs_disk_create("disk", (uint32_t)server->settings.disk_threads, &server->disk);
    if (status == KVC_OK)
        status = kvs_writer_create(server, &server->writer);
    if (status == KVC_OK)
        kvs_index_write_used(server->index,
                             kvs_admission_on_use(&server->admission, server->start_ns));
    return status;
}

/* ---- ticker ---------------------------------------------------------------------------------- */

static void report(kvs_server *server)
{
    char size[KVC_TEXT_BYTES];
    uint64_t lost = atomic_exchange(&server->lost_values, 0);
    uint64_t bytes = atomic_exchange(&server->lost_bytes, 0);
    uint64_t unwritten = atomic_exchange(&server->unwritten_values, 0);
    if (lost)
        KVC_LOG_INFO(STORE, "evicted %llu values (%s) from the last tier that held them",
                     (unsigned long long)lost, kvc_bytes_short(bytes, size));
    if (unwritten)
        KVC_LOG_WARN(STORE, "write-behind failed for %llu values: they stay in dram only",
                     (unsigned long long)unwritten);
}

/* Drops the schemas that no value, context or request has needed for long. */
static void collect_schemas(kvs_server *server, uint64_t now_ns)
{
    uint64_t grace_ns = server->settings.schema_grace_ns;
    const kvs_schema *schema;
    if (!grace_ns || now_ns < grace_ns || server->schemas_lost)
        return;
    kvc_mutex_lock(&server->record_lock);
    while ((schema = kvs_schemas_retire(server->schemas, now_ns - grace_ns, kvs_index_uses_schema,
                                        server->index)) != NULL) {
        char hex[KVC_DIGEST_HEX_BYTES], age[KVC_TEXT_BYTES];
        kvc_status status = KVC_OK;
        kvc_digest_hex(&schema->digest, hex);
        if (server->lmdb.ops)
            status = kvs_schema_record_drop(&server->lmdb, schema);
        if (status != KVC_OK) {
            KVC_LOG_WARN(SERVER, "schema %.16s is not used any more, but its record stays: %s", hex,
                         kvc_status_name(status));
            kvs_schemas_keep(server->schemas, schema);
            continue;
        }
        KVC_LOG_INFO(SERVER, "schema %.16s dropped: model %s, nobody used it for %s", hex,
                     schema->schema->model, kvc_duration_short(grace_ns, age));
        KVC_COUNT(schemas_collected);
        kvs_schemas_remove(server->schemas, schema);
    }
    kvc_mutex_unlock(&server->record_lock);
}

/* Memory that nobody needed lately goes back to the system. */
static void rest(kvs_server *server)
{
    if (atomic_fetch_add(&server->n_ticks, 1) % REST_TICKS == REST_TICKS - 1)
        kvs_buffers_rest(&server->buffers);
    kvs_heap_tick(kvs_buffers_held(&server->buffers));
}

void kvs_server_tick(kvs_server *server)
{
    uint64_t now_ns = kvc_now_ns();
    uint32_t n = kvs_contexts_sweep(server->contexts, now_ns);
    if (n) {
        KVC_COUNT_N(contexts_expired, n);
        KVC_LOG_DEBUG(SERVER, "%u contexts expired", n);
    }
    n = kvs_holds_sweep(server->holds, now_ns);
    if (n) {
        KVC_COUNT_N(holds_expired, n);
        KVC_LOG_DEBUG(SERVER, "%u holds expired", n);
    }
    kvs_saved_sweep(server->saved, now_ns);
    kvs_ttls_sweep(server->ttls, now_ns);
    kvs_map_reap(server->maps);
    kvs_cascade_reap(server);
    collect_schemas(server, now_ns);
    if (server->writer && server->admission.policy == KVS_ADMIT_SECOND_USE) {
        kvs_index_write_used(server->index, kvs_admission_on_use(&server->admission, now_ns));
        kvs_writer_kick(server->writer);
    }
    atomic_store(&server->window, (uint32_t)(now_ns / WINDOW_NS));
    rest(server);
}

static void ticker_main(void *arg)
{
    kvs_server *server = arg;
    uint64_t report_ns = kvc_deadline_ns(REPORT_NS);
    kvc_mutex_lock(&server->ticker_lock);
    while (!server->stopping) {
        (void)kvc_cond_wait_until(&server->ticker_cond, &server->ticker_lock,
                                  kvc_deadline_ns(TICK_NS));
        kvc_mutex_unlock(&server->ticker_lock);
        kvs_server_tick(server);
        if (kvc_expired(report_ns)) {
            report(server);
            report_ns = kvc_deadline_ns(REPORT_NS);
        }
        kvc_mutex_lock(&server->ticker_lock);
    }
    kvc_mutex_unlock(&server->ticker_lock);
    report(server);
}

static void stop_ticker(kvs_server *server)
{
    kvc_mutex_lock(&server->ticker_lock);
    server->stopping = true;
    kvc_cond_signal(&server->ticker_cond);
    kvc_mutex_unlock(&server->ticker_lock);
    kvc_thread_join(&server->ticker);
}

/* ---- start and stop -------------------------------------------------------------------------- */

/* What holds may keep of dram's segments: a tenant those that max_hold_bytes fill, and the last of
   a few sizes; all together nine tenths. */
static void cap_kept(kvs_server *server)
{
    const kvs_settings *s = &server->settings;
    kvs_index *index = server->index;
    index->segment_bytes = kvs_dram_segment_bytes(s->dram_bytes, s->max_value_bytes);
    uint64_t n = s->dram_bytes / index->segment_bytes;
    index->max_kept =
        (index->max_held + index->segment_bytes - 1) / index->segment_bytes + KEPT_SIZES;
    index->max_kept_total = n < 10 ? n - (n > 1) : n / 10 * 9 + n % 10 * 9 / 10;
}

static kvc_status create_tables(kvs_server *server)
{
    server->schemas = kvs_schemas_create();
    if (server->schemas)
        server->schemas->piece_bytes = server->limits.max_value_bytes;
    server->index = server->schemas ? kvs_index_create(server->schemas->by_id) : NULL;
    if (!server->index)
        return KVC_NO_MEMORY;
    kvs_contexts_opts opts = {
        .index = server->index,
        .schemas = server->schemas,
        .boot_id = server->boot_id,
        .max_per_tenant = server->limits.max_contexts,
        .max_context_blocks = server->limits.max_context_blocks,
        .max_blocks = server->settings.max_open_blocks,
        .default_ttl_ns = server->settings.context_ttl_ns,
        .max_ttl_ns = server->limits.max_ttl_ms * 1000000,
    };
    server->contexts = kvs_contexts_create(&opts);
    kvs_holds_opts hold_opts = {
        .index = server->index,
        .schemas = server->schemas,
        .boot_id = server->boot_id,
        .max_per_tenant = server->limits.max_holds,
        .max_blocks = server->settings.max_open_blocks,
        .default_ttl_ns = server->settings.context_ttl_ns,
        .max_ttl_ns = server->limits.max_ttl_ms * 1000000,
    };
    server->holds = kvs_holds_create(&hold_opts);
    server->ttls = kvs_ttls_create(server->index, server->schemas, server->settings.max_open_blocks,
                                   server->limits.max_ttl_ms * 1000000);
    const kvs_settings *s = &server->settings;
    server->index->max_held = server->limits.max_hold_bytes;
    server->index->max_held_total = s->dram_bytes / 10 * 9;
    cap_kept(server);
    server->saved = kvs_saved_create(server);
    server->maps = kvs_maps_create(server);
    server->tenants = kvs_tenants_create(server->settings.shm_tenants);
    return server->maps && server->tenants && server->contexts && server->holds && server->ttls &&
                   server->saved
               ? KVC_OK
               : KVC_NO_MEMORY;
}

kvc_status kvs_server_open(const kvs_settings *settings, kvs_server **server_p)
{
    *server_p = NULL;
    kvs_server *server = calloc(1, sizeof(*server));
    if (!server)
        return KVC_NO_MEMORY;
    server->settings = *settings;
    server->start_ns = kvc_now_ns();
    if (getrandom(&server->boot_id, sizeof(server->boot_id), GRND_NONBLOCK) !=
        sizeof(server->boot_id))
        server->boot_id = kvc_wall_ns();
    kvs_limits_fill(settings, &server->limits);
    server->inflight.max_bytes = settings->max_inflight_bytes;
    server->peers.max = kvs_files_connections(settings);
    kvs_buffers_init(&server->buffers, server->limits.max_message_bytes + PAGE_BYTES,
                     settings->max_inflight_bytes);
    kvs_admission_init(&server->admission, (kvs_admission_policy)settings->lmdb_admission,
                       settings->lmdb_write_budget_bytes, server->start_ns);
    kvc_mutex_init(&server->ticker_lock, KVC_RANK_LEAF);
    kvc_mutex_init(&server->record_lock, KVC_RANK_RECORD);
    kvc_cond_init(&server->ticker_cond);
    kvc_status status = create_tables(server);
    if (status == KVC_OK)
        status = open_store(server, "dram", settings->dram_bytes, NULL, settings->dram_fault,
                            &server->dram);
    if (status == KVC_OK)
        status = open_lmdb(server);
    if (status == KVC_OK)
        status = kvs_disk_create("room", 1, &server->room_jobs);
    if (status == KVC_OK)
        status = kvs_gpu_open(server);
    if (status == KVC_OK)
        status = kvs_attend_open(server);
    if (status == KVC_OK)
        kvs_limits_finish(server);
    if (status == KVC_OK)
        status = kvc_thread_start(&server->ticker, "kvs-ticker", ticker_main, server);
    if (status != KVC_OK) {
        kvs_server_close(server, false);
        return status;
    }
    *server_p = server;
    return KVC_OK;
}

static kvc_status listen_one(kvs_server *server, const char *uri)
{
    const kvt_ops *ops = kvt_find(uri);
    if (!ops) {
        KVC_LOG_ERROR(SERVER, "no transport of this build serves %s", uri);
        return KVC_UNSUPPORTED;
    }
    if (server->n_listeners == KVS_MAX_LISTENERS) {
        KVC_LOG_ERROR(SERVER, "more than %u addresses to listen on", KVS_MAX_LISTENERS);
        return KVC_INVALID;
    }
    kvt_listen_opts opts = {
        .size_bytes = sizeof(opts),
        .uri = uri,
        .on_call = kvs_on_call,
        .arg = server,
        .max_message_bytes = server->limits.max_message_bytes,
        .max_calls = (uint32_t)server->settings.max_calls,
        .max_inflight_bytes = server->settings.max_inflight_bytes,
        .inflight = &server->inflight,
        .peers = &server->peers,
        .n_threads = (uint32_t)server->settings.transport_threads,
        .handshake_ns = server->settings.handshake_ns,
        .keepalive_ns = server->settings.keepalive_ns,
        .idle_ns = server->settings.idle_ns,
        .ring_bytes = server->settings.shm_ring_bytes,
        .peer_gone = kvs_maps_peer_gone,
    };
    kvt_listener *listener;
    kvc_status status = ops->listen(&opts, &listener);
    if (status != KVC_OK) {
        KVC_LOG_ERROR(SERVER, "cannot listen on %s: %s", uri, kvc_status_name(status));
        return status;
    }
    server->listeners[server->n_listeners].ops = ops;
    server->listeners[server->n_listeners++].listener = listener;
    KVC_LOG_INFO(SERVER, "listening on %s", ops->listener_uri(listener));
    return KVC_OK;
}

kvc_status kvs_server_listen(kvs_server *server)
{
    kvc_status status = KVC_INVALID;
    char *list = strdup(server->settings.listen), *rest = NULL;
    if (!list)
        return KVC_NO_MEMORY;
    for (char *uri = strtok_r(list, ", ", &rest); uri; uri = strtok_r(NULL, ", ", &rest)) {
        status = listen_one(server, uri);
        if (status != KVC_OK)
            break;
    }
    free(list);
    for (uint32_t i = 0; status == KVC_OK && i < server->n_listeners; i++)
        server->listeners[i].ops->set_serving(server->listeners[i].listener, true);
    if (status == KVC_OK)
        atomic_store(&server->phase, KVS_SERVING);
    return status;
}

const char *kvs_server_uri(const kvs_server *server, uint32_t i)
{
    return i < server->n_listeners
               ? server->listeners[i].ops->listener_uri(server->listeners[i].listener)
               : NULL;
}

static bool store_failed(const kvs_store *store)
{
    kvs_tier_usage usage = {0};
    if (store->ops)
        store->ops->usage(store->tier, &usage);
    return !store->ops || usage.failed;
}

bool kvs_server_ready(kvs_server *server, const char **why_p)
{
    kvs_phase phase = (kvs_phase)atomic_load(&server->phase);
    bool failed = store_failed(&server->dram) && store_failed(&server->lmdb);
    *why_p = phase == KVS_STARTING   ? "starting"
             : phase == KVS_DRAINING ? "draining"
             : failed                ? "every tier has failed"
                                     : "ready";
    return phase == KVS_SERVING && !failed;
}

void kvs_server_drain(kvs_server *server, uint64_t deadline_ns)
{
    atomic_store(&server->phase, KVS_DRAINING);
    for (uint32_t i = 0; i < server->n_listeners; i++)
        server->listeners[i].ops->set_serving(server->listeners[i].listener, false);
    for (uint32_t i = 0; i < server->n_listeners; i++)
        server->listeners[i].ops->drain(server->listeners[i].listener, deadline_ns);
    /* Cancelled calls are answered too, once the medium lets go of them. */
    struct timespec nap = {.tv_nsec = 1000000};
    while (atomic_load(&server->n_calls))
        nanosleep(&nap, NULL);
}

void kvs_server_close(kvs_server *server, bool flush)
{
    if (!server)
        return;
    for (uint32_t i = 0; i < server->n_listeners; i++)
        server->listeners[i].ops->listener_close(server->listeners[i].listener);
    stop_ticker(server);
    if (flush && server->writer && kvs_index_dirty_count(server->index))
        KVC_LOG_INFO(SERVER, "writing %llu values to lmdb",
                     (unsigned long long)kvs_index_dirty_count(server->index));
    kvs_attend_close(server);
    kvs_disk_destroy(server->room_jobs); /* its puts may go on to the disk threads and the writer */
    kvs_disk_destroy(server->disk);
    kvs_gpu_stop(server);
    kvs_writer_destroy(server->writer, flush);
    kvs_contexts_destroy(server->contexts);
    kvs_holds_destroy(server->holds);
    kvs_saved_destroy(server->saved);
    kvs_maps_destroy(server->maps);
    kvs_tenants_destroy(server->tenants);
    kvs_ttls_destroy(server->ttls);
    if (server->index)
        kvs_cascade_reap(server);
    kvs_admission_save(server, true);
    if (server->gpu.ops)
        server->gpu.ops->close(server->gpu.tier);
    if (server->lmdb.ops)
        server->lmdb.ops->close(server->lmdb.tier);
    if (server->dram.ops)
        server->dram.ops->close(server->dram.tier);
    kvs_index_destroy(server->index);
    kvs_schemas_destroy(server->schemas);
    kvs_admission_fini(&server->admission);
    kvs_buffers_fini(&server->buffers);
    kvc_cond_fini(&server->ticker_cond);
    kvc_mutex_fini(&server->record_lock);
    kvc_mutex_fini(&server->ticker_lock);
    free(server);
}
