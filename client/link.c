/*
 * link.c: finding a server and staying connected to one.
 *
 * kvc-link owns the current link: it alone publishes and retires links, so what it reads of
 * client->link needs no lock. A link is retired by unpublishing it, waiting until no thread is
 * inside submit, and closing it, which ends what was in flight on it. It also reopens contexts, one
 * after the other, since that has to wait for a link anyway.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/metrics.h"
#include "internal.h"

#define RELINK_FIRST_NS (20ull * 1000000)
#define RELINK_MAX_NS   (500ull * 1000000)

typedef struct sync_call {
    kvt_xfer xfer;
    kvci_take_fn *take;
    void *take_arg;
    kvc_status status;
    kvc_mutex lock; /* KVC_RANK_LEAF; guards done */
    kvc_cond cond;
    bool done;
} sync_call;

static void sync_done(kvt_xfer *xfer)
{
    sync_call *call = xfer->arg;
    call->status = xfer->status;
    if (xfer->status == KVC_OK && call->take != NULL)
        call->status = call->take(call->take_arg, &xfer->reply);
    kvc_mutex_lock(&call->lock);
    call->done = true;
    kvc_cond_signal(&call->cond);
    kvc_mutex_unlock(&call->lock);
}

kvc_status kvci_link_call(kvci_link *link, const kvc_request *req, uint64_t deadline_ns,
                          kvci_take_fn *take, void *take_arg, uint32_t *retry_after_ms_p)
{
    sync_call call = {.take = take, .take_arg = take_arg};
    call.xfer = (kvt_xfer){
        .req = req,
        .deadline_ns = deadline_ns,
        .done = sync_done,
        .arg = &call,
    };
    kvc_arena_init(&call.xfer.arena, KVCI_REPLY_ARENA_BYTES);
    kvc_mutex_init(&call.lock, KVC_RANK_LEAF);
    kvc_cond_init(&call.cond);
    kvc_status status = link->ops->submit(link->conn, &call.xfer);
    if (status == KVC_OK) {
        kvc_mutex_lock(&call.lock);
        while (!call.done)
            kvc_cond_wait(&call.cond, &call.lock);
        kvc_mutex_unlock(&call.lock);
        status = call.status;
    }
    if (status != KVC_OK)
        (void)kvci_fail(status, "%s: %s: %s", kvc_method_name(req->method), kvc_status_name(status),
                        call.xfer.detail);
    if (retry_after_ms_p != NULL)
        *retry_after_ms_p = call.xfer.retry_after_ms;
    kvc_arena_reset(&call.xfer.arena);
    kvc_cond_fini(&call.cond);
    kvc_mutex_fini(&call.lock);
    return status;
}

static uint32_t clamp_u32(uint32_t value, uint32_t max)
{
    return value == 0 || value > max ? max : value;
}

/* A server may advertise less than our own limits, never more; 0 stands for ours. */
static kvc_status take_describe(void *arg, const kvc_reply *reply)
{
    kvci_link *link = arg;
    const kvc_limits *in = &reply->u.describe.limits;
    link->boot_id = reply->u.describe.boot_id;
    kvc_limits *out = &link->limits;
    *out = *in;
    out->max_value_bytes = clamp_u32(in->max_value_bytes, KVC_MAX_VALUE_BYTES);
    out->max_message_bytes = clamp_u32(in->max_message_bytes, KVC_MAX_VALUE_BYTES);
    out->max_batch_values = clamp_u32(in->max_batch_values, KVC_MAX_BATCH_VALUES);
    out->max_digests = clamp_u32(in->max_digests, KVC_MAX_DIGESTS);
    out->max_context_blocks = clamp_u32(in->max_context_blocks, KVC_MAX_CONTEXT_BLOCKS);
    out->max_picks = clamp_u32(in->max_picks, KVC_MAX_PICKS);
    out->max_groups = clamp_u32(in->max_groups, KVC_MAX_GROUPS);
    if (out->max_attend_queries > KVC_MAX_ATTEND_QUERIES)
        out->max_attend_queries = KVC_MAX_ATTEND_QUERIES;
    return KVC_OK;
}

static kvc_status describe(kvci_link *link, uint64_t deadline_ns)
{
    kvc_request req = {.method = KVC_DESCRIBE};
    return kvci_link_call(link, &req, deadline_ns, take_describe, link, NULL);
}

void kvci_link_close(kvci_link *link)
{
    if (link == NULL)
        return;
    link->ops->conn_close(link->conn);
    free(link);
}

static kvc_status link_open(kvc_client *client, uint32_t which, uint64_t deadline_ns,
                            kvci_link **link_p)
{
    const char *uri = client->uris[which];
    *link_p = NULL;
    kvci_link *link = calloc(1, sizeof(*link));
    if (link == NULL)
        return kvci_fail(KVC_NO_MEMORY, "client: no memory");
    link->uri = uri;
    link->ops = kvt_find(uri);
    int8_t own = client->uri_sums[which];
    link->sums = strncmp(uri, "rdma://", 7) == 0 && (own != 0 ? own > 0 : client->sums);
    kvt_connect_opts opts = {
        .size_bytes = sizeof(opts),
        .uri = uri,
        .n_channels = client->n_channels,
        .max_message_bytes = KVC_MAX_VALUE_BYTES,
        .sums = link->sums,
        .region_bytes = client->region_bytes,
    };
    kvc_status status = link->ops->connect(&opts, &link->conn);
    if (status != KVC_OK) {
        (void)kvci_fail(status, "connect to %s: %s", uri, kvc_status_name(status));
        goto err_free;
    }
    status = describe(link, deadline_ns);
    if (status != KVC_OK)
        goto err_close;
    *link_p = link;
    return KVC_OK;
err_close:
    link->ops->conn_close(link->conn);
err_free:
    free(link);
    return status;
}

/* Takes the link away from everybody and closes it. */
static void retire(kvc_client *client)
{
    kvc_mutex_lock(&client->lock);
    kvci_link *link = client->link;
    client->link = NULL;
    client->link_over = false;
    while (link != NULL && link->submitting > 0)
        kvc_cond_wait(&client->keeper_cond, &client->lock);
    kvc_mutex_unlock(&client->lock);
    kvci_link_close(link);
}

void kvci_link_end(kvc_client *client, const char *why)
{
    kvc_mutex_lock(&client->lock);
    if (client->link != NULL && !client->link_over && !client->closing) {
        KVC_LOG_WARN(CLIENT, "the connection to %s is made anew: %s", client->link->uri, why);
        client->link_suspect = client->link_over = true;
        kvc_cond_signal(&client->keeper_cond);
    }
    kvc_mutex_unlock(&client->lock);
}

/* A new boot knows neither contexts (they answer STALE_HANDLE) nor, maybe, our schemas. */
static void greet(kvc_client *client, kvci_link *link, uint64_t deadline_ns)
{
    if (client->boot_id != 0 && link->boot_id != client->boot_id)
        kvci_schemas_restore(client, link, deadline_ns);
}

static void publish(kvc_client *client, kvci_link *link)
{
    kvc_mutex_lock(&client->lock);
    client->link = link;
    client->maps_refused = false;
    client->limits = link->limits;
    client->boot_id = link->boot_id;
    kvc_mutex_unlock(&client->lock);
}

kvc_status kvci_relink(kvc_client *client, uint64_t deadline_ns)
{
    kvc_mutex_lock(&client->lock);
    kvci_link *link = client->link;
    bool over = client->link_over;
    kvc_mutex_unlock(&client->lock);
    if (link != NULL && over) {
        retire(client);
    } else if (link != NULL) {
        kvci_link looked = {.ops = link->ops, .conn = link->conn};
        if (describe(&looked, deadline_ns) == KVC_OK) {
            greet(client, &looked, deadline_ns);
            link->boot_id = looked.boot_id;
            link->limits = looked.limits;
            publish(client, link);
            return KVC_OK;
        }
        retire(client);
    }
    kvc_status status = KVC_UNAVAILABLE;
    for (uint32_t i = 0; i < client->n_uris; i++) {
        uint64_t now_ns = kvc_now_ns();
        if (now_ns >= deadline_ns)
            return kvci_fail(KVC_TIMED_OUT, "connect: the deadline passed");
        /* Each address gets its share of the time that is left. */
        uint64_t share_ns = now_ns + (deadline_ns - now_ns) / (client->n_uris - i);
        link = NULL;
        status = link_open(client, i, share_ns, &link);
        if (status == KVC_OK && link != NULL) {
            greet(client, link, share_ns);
            if (client->boot_id != 0)
                KVC_COUNT(client_reconnects);
            publish(client, link);
            KVC_LOG_INFO(CLIENT, "connected to %s", client->uris[i]);
            return KVC_OK;
        }
    }
    return status;
}

/* Under the lock: looks for a server once, or pauses after failures. */
static void restore_link(kvc_client *client, uint32_t *failures_p)
{
    kvc_mutex_unlock(&client->lock);
    kvc_status status = kvci_relink(client, kvc_now_ns() + KVCI_PROBE_TIMEOUT_NS);
    kvc_mutex_lock(&client->lock);
    if (status == KVC_OK) {
        *failures_p = 0;
        client->link_suspect = false;
        kvci_link_restored(client);
        kvci_pump(client);
        return;
    }
    if (++*failures_p == 1)
        KVC_LOG_WARN(CLIENT, "no server answers: %s", kvc_last_error());
    uint64_t until_ns =
        kvc_now_ns() + kvci_backoff_ns(*failures_p, RELINK_FIRST_NS, RELINK_MAX_NS, &client->seed);
    while (!client->stopping && kvc_now_ns() < until_ns)
        (void)kvc_cond_wait_until(&client->keeper_cond, &client->lock, until_ns);
}

void kvci_keeper_main(void *arg)
{
    kvc_client *client = arg;
    uint32_t failures = 0;
    kvc_mutex_lock(&client->lock);
    while (!client->stopping) {
        if (client->link == NULL || client->link_suspect || client->link_over)
            restore_link(client, &failures);
        else if (!kvci_list_empty(&client->reopens))
            kvci_reopen_next(client);
        else
            kvc_cond_wait(&client->keeper_cond, &client->lock);
    }
    kvc_mutex_unlock(&client->lock);
}
