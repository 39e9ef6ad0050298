/*
 * reopen.c: contexts whose handles went stale.
 *
 * Fetches that get STALE_HANDLE mark their contexts and wait; kvc-link reopens each once, however
 * many fetches wait for it, past the message queue, which may itself be waiting for kvc-link.
 * Everything here runs under client->lock but for the requests themselves.
 */
#include "base/clock.h"
#include "base/log.h"
#include "internal.h"

#define AGAIN_PAUSE_NS (20ull * 1000000)
#define NS_PER_MS      1000000ull

bool kvci_msg_waits(const kvci_msg *msg)
{
    for (uint32_t i = 0; i < msg->n_segs; i++)
        if (msg->segs[i].context->reopening)
            return true;
    return false;
}

static void enqueue(kvc_context *context)
{
    kvc_client *client = context->client;
    kvci_list_remove(&context->node);
    if (context->closing)
        return;
    kvci_list_push(&client->reopens, &context->node);
    kvc_cond_signal(&client->keeper_cond);
}

void kvci_context_stale(kvc_context *context, uint64_t gen)
{
    if (context->gen != gen || context->reopening)
        return;
    context->reopening = true;
    enqueue(context);
}

static bool names(const kvci_msg *msg, const kvc_context *context)
{
    for (uint32_t i = 0; i < msg->n_segs; i++)
        if (msg->segs[i].context == context)
            return true;
    return false;
}

void kvci_context_settled(kvc_context *context, kvc_status status, const char *detail)
{
    kvc_client *client = context->client;
    kvci_node *head = &client->wait_context;
    /* Ending one message may end others of its call: start over after each. */
    for (kvci_node *node = head->next; node != head;) {
        kvci_msg *msg = (kvci_msg *)node;
        if (!names(msg, context) || (status == KVC_OK && kvci_msg_waits(msg))) {
            node = node->next;
            continue;
        }
        if (status == KVC_OK)
            kvci_msg_requeue(client, msg);
        else
            kvci_msg_finish(client, msg, status, detail);
        node = head->next;
    }
}

typedef struct link_sender {
    kvc_client *client;
    uint32_t retry_after_ms;
} link_sender;

static kvc_status send_link(void *arg, const kvc_request *req, uint64_t deadline_ns,
                            kvci_take_fn *take, void *take_arg)
{
    link_sender *sender = arg;
    /* Only kvc-link, the thread that we are on, replaces the link. */
    return kvci_link_call(sender->client->link, req, deadline_ns, take, take_arg,
                          &sender->retry_after_ms);
}

/* A schema that the server forgot is registered again first. */
static kvc_status reopen(kvc_context *context, link_sender *sender, uint64_t *handle_p)
{
    kvc_client *client = context->client;
    uint64_t deadline_ns = kvc_now_ns() + client->reopen_timeout_ns;
    uint32_t n = atomic_load(&context->n_blocks);
    uint32_t max_digests = kvci_limits(client).max_digests;
    kvc_status status =
        kvci_open_chain(context, n, max_digests, send_link, sender, deadline_ns, handle_p);
    if (status != KVC_NOT_FOUND)
        return status;
    kvci_schemas_restore(client, client->link, deadline_ns);
    return kvci_open_chain(context, n, max_digests, send_link, sender, deadline_ns, handle_p);
}

/* What a reopen came to. The context may be closed by its owner as soon as busy is false. */
static void reopened(kvc_context *context, kvc_status status, uint64_t handle,
                     const link_sender *sender)
{
    kvc_client *client = context->client;
    context->busy = false;
    kvc_cond_broadcast(&client->done_cond);
    if (status == KVC_OK) {
        KVC_LOG_DEBUG(CLIENT, "a context was opened again: %u blocks", context->n_blocks);
        context->handle = handle;
        context->gen++;
        context->suspect = false;
        context->reopening = false;
        kvci_context_settled(context, KVC_OK, NULL);
        return;
    }
    /* A server that took too long for it is asked again for as long as somebody waits. */
    bool late = status == KVC_TIMED_OUT && !kvci_list_empty(&client->wait_context);
    if (status == KVC_UNAVAILABLE || status == KVC_CLOSED || status == KVC_CANCELLED || late) {
        client->link_suspect = true;
        enqueue(context);
        return;
    }
    if (status == KVC_AGAIN && !kvci_list_empty(&client->wait_context)) {
        uint64_t pause_ns = sender->retry_after_ms * NS_PER_MS;
        uint64_t until_ns = kvc_now_ns() + (pause_ns > AGAIN_PAUSE_NS ? pause_ns : AGAIN_PAUSE_NS);
        enqueue(context);
        while (!client->stopping && kvc_now_ns() < until_ns)
            (void)kvc_cond_wait_until(&client->keeper_cond, &client->lock, until_ns);
        return;
    }
    /* The next fetch asks again. */
    context->reopening = false;
    kvci_context_settled(context, status, kvc_last_error());
}

void kvci_reopen_next(kvc_client *client)
{
    kvc_context *context = NULL;
    kvci_node *head = &client->reopens;
    for (kvci_node *node = head->next; node != head && context == NULL; node = node->next)
        if (!((kvc_context *)node)->busy)
            context = (kvc_context *)node;
    if (context == NULL) {
        /* Extends own them all; each signals when it is done. */
        kvc_cond_wait(&client->keeper_cond, &client->lock);
        return;
    }
    kvci_list_remove(&context->node);
    if (!context->reopening)
        return; /* an extend has opened it again */
    context->busy = true;
    uint64_t handle = 0;
    link_sender sender = {.client = client};
    kvc_mutex_unlock(&client->lock);
    kvc_status status = reopen(context, &sender, &handle);
    kvc_mutex_lock(&client->lock);
    reopened(context, status, handle, &sender);
    kvci_pump(client);
}
