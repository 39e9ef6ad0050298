/*
 * servers.c: see servers.h.
 *
 * Placing runs on the sequence's thread, or, for a prefix, inside kvw_seq_open. With one server
 * nothing is hashed and nothing looked up.
 */
#include "servers.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/metrics.h"
#include "base/place.h"
#include "internal.h"

/* A server that did not answer is left alone for so long, and twice as long each time after. */
#define LOST_FIRST_NS 1000000000ull
#define LOST_DOUBLED  6u

/* ---- the list ---- */

static kvc_status check_lists(const kvw_opts *o)
{
    if (o->n_clients == 0) {
        return o->clients == NULL && o->server_names == NULL
                   ? KVC_OK
                   : kvwi_fail(KVC_INVALID, "n_clients: clients and server_names have that many");
    }
    if (o->client != NULL || o->clients == NULL) {
        return kvwi_fail(KVC_INVALID, "clients: client or clients, one of them");
    }
    if (o->n_clients > KVW_MAX_SERVERS) {
        return kvwi_fail(KVC_INVALID, "n_clients: must be at most %u", KVW_MAX_SERVERS);
    }
    for (uint64_t i = 0; i < o->n_clients; i++) {
        if (o->clients[i] == NULL || (o->server_names != NULL && o->server_names[i] == NULL)) {
            return kvwi_fail(KVC_INVALID, "clients, server_names: none may be NULL");
        }
    }
    return KVC_OK;
}

static kvc_status name_server(kvwi_servers *s, uint32_t i, const char *name)
{
    char number[16];
    (void)snprintf(number, sizeof(number), "%u", i);
    name = name == NULL ? number : name;
    kvc_status st = kvc_place_key(name, &s->keys[i]);
    if (st != KVC_OK) {
        return kvwi_fail(st, "server_names: must be 1 to %u bytes each", KVC_MAX_NAME_BYTES);
    }
    for (uint32_t j = 0; j < i; j++) {
        if (s->keys[j] == s->keys[i]) {
            return kvwi_fail(KVC_INVALID, "server_names: \"%s\" is there twice", name);
        }
    }
    s->all[i].name = strdup(name);
    return s->all[i].name != NULL ? KVC_OK : kvwi_fail(KVC_NO_MEMORY, "out of memory");
}

/* worker->opts borrows the caller's lists until they have been taken. */
static kvc_status take_lists(kvw_worker *w, kvc_client *const *clients, const char *const *names)
{
    kvwi_servers *s = &w->servers;
    s->all = calloc(s->n, sizeof(*s->all));
    s->keys = calloc(s->n, sizeof(*s->keys));
    if (s->all == NULL || s->keys == NULL) {
        (void)kvwi_fail(KVC_NO_MEMORY, "out of memory");
        return KVC_NO_MEMORY;
    }
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < s->n; i++) {
        s->all[i].client = clients[i];
        st = name_server(s, i, names == NULL ? NULL : names[i]);
    }
    return st;
}

kvc_status kvwi_servers_open(kvw_worker *worker)
{
    kvw_opts *o = &worker->opts;
    kvc_client *const *clients = o->clients;
    const char *const *names = o->server_names;
    kvc_status st = check_lists(o);
    o->clients = NULL;
    o->server_names = NULL;
    if (st != KVC_OK || (o->client == NULL && o->n_clients == 0)) {
        return st;
    }
    worker->servers.n = o->n_clients == 0 ? 1 : (uint32_t)o->n_clients;
    st = take_lists(worker, o->n_clients == 0 ? &o->client : clients, names);
    if (st == KVC_OK) {
        o->client = worker->servers.all[0].client;
    }
    return st;
}

void kvwi_servers_close(kvw_worker *worker)
{
    kvwi_servers *s = &worker->servers;
    for (uint32_t i = 0; s->all != NULL && i < s->n; i++) {
        free(s->all[i].name);
    }
    free(s->all);
    free(s->keys);
    *s = (kvwi_servers){0};
}

uint32_t kvwi_servers_max_value(const kvw_worker *worker)
{
    uint32_t least = KVC_MAX_VALUE_BYTES;
    for (uint32_t i = 0; i < worker->servers.n; i++) {
        uint32_t max = kvc_client_limits(worker->servers.all[i].client)->max_value_bytes;
        least = i == 0 ? max : kvwi_min_u32(least, max);
    }
    return least;
}

const char *kvwi_server_text(const kvw_worker *worker, uint32_t server, char *buf)
{
    buf[0] = '\0';
    if (worker->servers.n > 1) {
        (void)snprintf(buf, KVWI_SERVER_TEXT, " (server %s)", worker->servers.all[server].name);
    }
    return buf;
}

/* ---- memory ---- */

kvc_status kvwi_regions_open(const kvw_worker *worker, void *base, size_t len_bytes,
                             kvwi_regions *regions)
{
    const kvc_region_desc desc = {
        .size_bytes = sizeof(desc), .base = base, .len_bytes = len_bytes, .kind = KVC_MEMORY_HOST};
    kvc_status st = KVC_OK;
    memset(regions, 0, sizeof(*regions));
    for (uint32_t i = 0; st == KVC_OK && i < worker->servers.n; i++) {
        st = kvc_region_register(worker->servers.all[i].client, &desc, &regions->of[i]);
    }
    if (st != KVC_OK) {
        (void)kvwi_regions_close(worker, regions);
    }
    return st;
}

kvc_status kvwi_regions_close(const kvw_worker *worker, kvwi_regions *regions)
{
    kvc_status first = KVC_OK;
    for (uint32_t i = 0; i < worker->servers.n; i++) {
        if (regions->of[i] == NULL) {
            continue;
        }
        kvc_status st = kvc_region_deregister(worker->servers.all[i].client, regions->of[i]);
        if (st == KVC_OK) {
            regions->of[i] = NULL;
        }
        first = first == KVC_OK ? st : first;
    }
    return first;
}

/* ---- places ---- */

void kvwi_place(kvw_seq *seq, uint32_t block)
{
    const kvwi_servers *s = &seq->worker->servers;
    kvwi_seq_block *b = &seq->blocks[block];
    b->server = s->n == 1 ? 0 : kvc_place_owner(s->keys, s->n, &b->digest);
    b->local = seq->servers[b->server].n_blocks;
}

void kvwi_place_keep(kvw_seq *seq, uint32_t block)
{
    seq->servers[seq->blocks[block].server].n_blocks++;
}

void kvwi_place_cut(kvw_seq *seq, uint32_t n_blocks)
{
    for (uint32_t i = 0; i < seq->worker->servers.n; i++) {
        seq->servers[i].n_blocks = 0;
    }
    for (uint32_t b = 0; b < n_blocks; b++) {
        kvwi_place_keep(seq, b);
    }
}

/* ---- contexts, which reuse.c opens in the order of the servers ---- */

bool kvwi_contexts_open(const kvw_seq *seq)
{
    uint32_t n = seq->worker->servers.n;
    return n != 0 && seq->servers != NULL && seq->servers[n - 1u].context != NULL;
}

void kvwi_contexts_close(kvw_seq *seq)
{
    for (uint32_t i = 0; seq->servers != NULL && i < seq->worker->servers.n; i++) {
        kvc_context_close(seq->servers[i].context);
        seq->servers[i].context = NULL;
    }
}

/* ---- fetches ---- */

void kvwi_flight_send(kvw_seq *seq, uint32_t server, kvwi_flight *flight, kvc_pick_group group,
                      const kvwi_regions *dst, int8_t *status, uint64_t deadline_ns)
{
    group.context = seq->servers[server].context;
    memset(&flight->info, 0, sizeof(flight->info));
    kvc_op_init(&flight->op, NULL, NULL);
    flight->status = kvc_fetch(seq->worker->servers.all[server].client, &group, 1, dst->of[server],
                               status, &flight->info, deadline_ns, &flight->op);
    flight->in_flight = flight->status == KVC_OK;
}

kvc_status kvwi_flight_land(kvwi_flight *flight, uint64_t deadline_ns)
{
    if (flight->in_flight) {
        flight->status = deadline_ns == 0 ? kvc_op_wait(&flight->op, 0)
                                          : kvwi_op_complete(&flight->op, deadline_ns);
        flight->in_flight = false;
    }
    return flight->status;
}

void kvwi_flight_cancel(kvwi_flight *flight)
{
    if (flight->in_flight) {
        kvc_op_cancel(&flight->op);
        flight->status = kvc_op_wait(&flight->op, 0);
        flight->in_flight = false;
    }
}

void kvwi_flight_count(kvw_seq *seq, uint32_t server, const kvc_fetch_info *info, uint32_t n_rows,
                       size_t row_bytes)
{
    kvw_stats *s = &seq->stats;
    kvwi_seq_server *own = &seq->servers[server];
    s->rows_gpu += info->rows_gpu;
    s->rows_dram += info->rows_dram;
    s->rows_lmdb += info->rows_lmdb;
    s->requests += info->requests;
    s->bytes_fetched += (uint64_t)n_rows * row_bytes;
    own->requests += info->requests;
    own->rows += n_rows;
    own->bytes += (uint64_t)n_rows * row_bytes;
}

/* ---- servers that are lost ---- */

bool kvwi_server_is_lost(const kvw_worker *worker, uint32_t server)
{
    uint64_t until =
        atomic_load_explicit(&worker->servers.all[server].lost_until_ns, memory_order_relaxed);
    return until != 0 && kvc_now_ns() < until;
}

static bool means_lost(kvc_status st)
{
    return st == KVC_UNAVAILABLE || st == KVC_CLOSED || st == KVC_TIMED_OUT;
}

static void server_is_back(kvwi_server *s)
{
    if (atomic_load(&s->lost_until_ns) != 0 && atomic_exchange(&s->lost_until_ns, 0) != 0) {
        atomic_store(&s->n_losses, 0);
        KVC_LOG_INFO(WORKER, "server %s answers again", s->name);
    }
}

void kvwi_server_answered(kvw_worker *worker, uint32_t server, kvc_status st, uint64_t asked_ns)
{
    kvwi_server *s = &worker->servers.all[server];
    if (worker->servers.n == 1 || worker->opts.policy != KVW_DROP) {
        return;
    }
    if (!means_lost(st)) {
        server_is_back(s);
        return;
    }
    uint_least64_t until = atomic_load(&s->lost_until_ns);
    unsigned n = atomic_load(&s->n_losses);
    uint64_t wait_ns = LOST_FIRST_NS << (n < LOST_DOUBLED ? n : LOST_DOUBLED);
    /* whoever asked before that time saw the outage that is counted already */
    if (asked_ns < until ||
        !atomic_compare_exchange_strong(&s->lost_until_ns, &until, kvc_now_ns() + wait_ns)) {
        return;
    }
    atomic_fetch_add(&s->n_losses, 1);
    KVC_COUNT(servers_lost);
    KVC_LOG_WARN(WORKER, "server %s is lost (%s): its rows are dropped for %u s", s->name,
                 kvc_status_name(st), (unsigned)(wait_ns / 1000000000ull));
}
