/*
 * context.c: contexts as the caller sees them.
 *
 * The client keeps the digest list, since a handle is worth nothing after the server's restart.
 * Whoever holds busy (an extend on a caller's thread, a reopen on kvc-link) owns the list; handle,
 * gen and the flags are guarded by client->lock. gen changes with each new handle.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "map.h"

#define CHAIN_ATTEMPTS 3

static kvc_status take_handle(void *arg, const kvc_reply *reply)
{
    *(uint64_t *)arg = reply->u.open_context.context;
    return KVC_OK;
}

/* One attempt: open with as many digests as a message holds, extend with the rest. */
static kvc_status open_once(const kvc_context *context, uint32_t n, uint32_t max_digests,
                            kvci_send_fn *send, void *send_arg, uint64_t deadline_ns,
                            uint64_t *handle_p)
{
    uint32_t done = n < max_digests ? n : max_digests;
    kvc_request req = {.method = KVC_OPEN_CONTEXT};
    req.u.open_context.schema = context->schema;
    req.u.open_context.n_digests = done;
    req.u.open_context.digests = context->blocks;
    req.u.open_context.ttl_ms = context->ttl_ms;
    kvc_status status = send(send_arg, &req, deadline_ns, take_handle, handle_p);
    while (status == KVC_OK && done < n) {
        uint32_t step = n - done < max_digests ? n - done : max_digests;
        req = (kvc_request){.method = KVC_EXTEND_CONTEXT};
        req.u.extend_context.context = *handle_p;
        req.u.extend_context.n_blocks_before = done;
        req.u.extend_context.n_digests = step;
        req.u.extend_context.digests = context->blocks + done;
        status = send(send_arg, &req, deadline_ns, NULL, NULL);
        done += step;
    }
    return status;
}

kvc_status kvci_open_chain(const kvc_context *context, uint32_t n, uint32_t max_digests,
                           kvci_send_fn *send, void *send_arg, uint64_t deadline_ns,
                           uint64_t *handle_p)
{
    kvc_status status = KVC_STALE_HANDLE;
    /* STALE_HANDLE between open and extend: the server restarted in between. */
    for (int i = 0; i < CHAIN_ATTEMPTS && status == KVC_STALE_HANDLE; i++)
        status = open_once(context, n, max_digests, send, send_arg, deadline_ns, handle_p);
    return status;
}

kvc_status kvci_send_rpc(void *arg, const kvc_request *req, uint64_t deadline_ns,
                         kvci_take_fn *take, void *take_arg)
{
    kvci_rpc_opts opts = {
        .deadline_ns = deadline_ns,
        .take = take,
        .take_arg = take_arg,
    };
    return kvci_rpc(arg, req, &opts);
}

/* A close that nobody waits for. */
typedef struct handle_closing {
    kvc_op op;
    kvc_client *client;
} handle_closing;

static void note_close(kvc_client *client, kvc_status status)
{
    kvc_mutex_lock(&client->lock);
    client->closes_hang = status == KVC_TIMED_OUT;
    kvc_mutex_unlock(&client->lock);
}

static void closed_later(kvc_op *op, void *arg)
{
    handle_closing *c = arg;
    note_close(c->client, op->status);
    free(c);
}

static kvc_status close_take(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    (void)msg;
    (void)reply;
    (void)why_p;
    return KVC_OK;
}

static void close_later(kvc_client *client, const kvc_request *req)
{
    static const kvci_kind kind = {.name = "CloseContext", .take = close_take};
    handle_closing *c = calloc(1, sizeof(*c));
    kvci_call *call =
        c == NULL ? NULL : kvci_call_new(client, &kind, 1, 0, kvc_now_ns() + KVCI_CLOSE_TIMEOUT_NS);
    if (call == NULL) {
        free(c);
        return;
    }
    c->client = client;
    call->once = true;
    call->msgs[0].req = *req;
    call->msgs[0].n_items = 1;
    kvc_op_init(&c->op, closed_later, c);
    if (kvci_call_start(call, &c->op) != KVC_OK)
        free(c);
}

/* Its TTL would do so later anyway. */
void kvci_handle_close(kvc_client *client, uint64_t handle)
{
    kvc_mutex_lock(&client->lock);
    bool connected = client->link != NULL && !client->link_suspect && !client->closing;
    bool hangs = client->closes_hang;
    kvc_mutex_unlock(&client->lock);
    if (!connected)
        return;
    kvc_request req = {.method = KVC_CLOSE_CONTEXT, .u.close_context.context = handle};
    kvci_rpc_opts opts = {.deadline_ns = kvc_now_ns() + KVCI_CLOSE_TIMEOUT_NS, .once = true};
    if (hangs)
        close_later(client, &req);
    else
        note_close(client, kvci_rpc(client, &req, &opts));
}

void kvci_context_free(kvc_context *context)
{
    free(context->blocks);
    free(context);
}

/* Room for n blocks; the caller holds busy or is alone. */
static kvc_status reserve(kvc_context *context, uint32_t n)
{
    if (n <= context->capacity)
        return KVC_OK;
    uint32_t capacity = context->capacity < 64 ? 64 : context->capacity;
    while (capacity < n)
        capacity *= 2;
    kvc_digest *blocks = realloc(context->blocks, capacity * sizeof(*blocks));
    if (blocks == NULL)
        return kvci_fail(KVC_NO_MEMORY, "context: no memory");
    context->blocks = blocks;
    context->capacity = capacity;
    return KVC_OK;
}

uint64_t kvci_deadline(const kvc_client *client, uint64_t deadline_ns)
{
    return deadline_ns != 0 ? deadline_ns : kvc_deadline_ns(client->default_timeout_ns);
}

kvc_context *kvci_context_new(kvc_client *client, const kvc_digest *schema,
                              const kvc_digest *blocks, uint32_t n, uint64_t ttl_ms)
{
    kvc_context *context = calloc(1, sizeof(*context));
    if (context == NULL || reserve(context, n) != KVC_OK) {
        free(context);
        (void)kvci_fail(KVC_NO_MEMORY, "context: no memory");
        return NULL;
    }
    context->client = client;
    context->schema = *schema;
    context->ttl_ms = ttl_ms;
    if (n > 0)
        memcpy(context->blocks, blocks, n * sizeof(*blocks));
    atomic_store(&context->n_blocks, n);
    return context;
}

kvc_status kvc_context_open(kvc_client *client, const kvc_digest *schema, const kvc_digest *blocks,
                            uint32_t n, uint64_t ttl_ms, uint64_t deadline_ns,
                            kvc_context **context_p)
{
    *context_p = NULL;
    kvc_limits limits = kvci_limits(client);
    if (n > limits.max_context_blocks)
        return kvci_fail(KVC_INVALID, "context: %u blocks, at most %u", n,
                         limits.max_context_blocks);
    kvc_context *context = kvci_context_new(client, schema, blocks, n, ttl_ms);
    if (context == NULL)
        return KVC_NO_MEMORY;
    kvc_status status = kvci_open_chain(context, n, limits.max_digests, kvci_send_rpc, client,
                                        kvci_deadline(client, deadline_ns), &context->handle);
    if (status != KVC_OK) {
        kvci_context_free(context);
        return status;
    }
    kvci_map_follow(context, deadline_ns);
    *context_p = context;
    return KVC_OK;
}

/* Extends the handle in messages of max_digests. *resent_p: an attempt may have been carried out
 * that we know nothing of. */
static kvc_status extend_handle(const kvc_context *context, uint64_t handle, uint32_t n_old,
                                uint32_t n_new, uint64_t deadline_ns, bool *resent_p)
{
    uint32_t max_digests = kvci_limits(context->client).max_digests;
    kvc_status status = KVC_OK;
    for (uint32_t done = n_old; status == KVC_OK && done < n_new;) {
        uint32_t step = n_new - done < max_digests ? n_new - done : max_digests;
        bool resent = false;
        kvc_request req = {.method = KVC_EXTEND_CONTEXT};
        req.u.extend_context.context = handle;
        req.u.extend_context.n_blocks_before = done;
        req.u.extend_context.n_digests = step;
        req.u.extend_context.digests = context->blocks + done;
        kvci_rpc_opts opts = {.deadline_ns = deadline_ns, .resent_p = &resent};
        status = kvci_rpc(context->client, &req, &opts);
        *resent_p = *resent_p || resent || done > n_old;
        done += step;
    }
    return status;
}

kvc_status kvci_context_take(kvc_context *context, uint64_t deadline_ns)
{
    kvc_client *client = context->client;
    kvc_status status = KVC_OK;
    kvc_mutex_lock(&client->lock);
    while (context->busy && status == KVC_OK)
        status = kvc_cond_wait_until(&client->done_cond, &client->lock, deadline_ns);
    if (!context->busy) {
        context->busy = true;
        status = KVC_OK;
    }
    kvc_mutex_unlock(&client->lock);
    if (status != KVC_OK)
        return kvci_fail(status, "context: another change of it or a reopen took too long");
    return KVC_OK;
}

bool kvci_context_is_stale(kvc_context *context)
{
    kvc_mutex_lock(&context->client->lock);
    bool stale = context->suspect || context->reopening;
    kvc_mutex_unlock(&context->client->lock);
    return stale;
}

void kvci_context_give(kvc_context *context, kvc_status status, bool ambiguous, uint64_t handle,
                       uint32_t n_blocks)
{
    kvc_client *client = context->client;
    kvc_mutex_lock(&client->lock);
    if (status == KVC_OK)
        atomic_store(&context->n_blocks, n_blocks);
    if (status == KVC_OK && handle != context->handle) {
        context->handle = handle;
        context->gen++;
        context->reopening = false;
        kvci_context_settled(context, KVC_OK, NULL);
    }
    if (status == KVC_OK)
        context->suspect = false;
    else if (ambiguous)
        context->suspect = true;
    context->busy = false;
    kvc_cond_broadcast(&client->done_cond);
    kvc_cond_signal(&client->keeper_cond);
    kvci_pump(client);
    kvc_mutex_unlock(&client->lock);
}

static kvc_status extend_busy(kvc_context *context, uint32_t n_old, uint32_t n_new,
                              uint64_t deadline_ns, bool *ambiguous_p, uint64_t *handle_p)
{
    kvc_client *client = context->client;
    uint64_t old_handle = *handle_p;
    kvc_status status = KVC_STALE_HANDLE;
    if (!kvci_context_is_stale(context))
        status = extend_handle(context, old_handle, n_old, n_new, deadline_ns, ambiguous_p);
    /* Longer there than here, by an attempt of ours whose answer was lost: start over. */
    bool differs = status == KVC_INVALID && *ambiguous_p;
    if (status != KVC_STALE_HANDLE && !differs) {
        *ambiguous_p = *ambiguous_p || (status != KVC_INVALID && status != KVC_NO_SPACE);
        return status;
    }
    status = kvci_open_chain(context, n_new, kvci_limits(client).max_digests, kvci_send_rpc, client,
                             deadline_ns, handle_p);
    /* The old handle is what it was, also if it is stale: no worse than before. */
    *ambiguous_p = true;
    return status;
}

kvc_status kvc_context_extend(kvc_context *context, const kvc_digest *blocks, uint32_t n,
                              uint64_t deadline_ns)
{
    kvc_client *client = context->client;
    uint32_t max_blocks = kvci_limits(client).max_context_blocks;
    deadline_ns = kvci_deadline(client, deadline_ns);
    if (n == 0)
        return KVC_OK;
    kvc_status status = kvci_context_take(context, deadline_ns);
    if (status != KVC_OK)
        return status;
    uint32_t n_old = atomic_load(&context->n_blocks);
    bool ambiguous = false;
    uint64_t old_handle = context->handle, handle = old_handle;
    if (n > max_blocks || n_old > max_blocks - n)
        status = kvci_fail(KVC_INVALID, "context extend: more than %u blocks", max_blocks);
    if (status == KVC_OK)
        status = reserve(context, n_old + n);
    if (status == KVC_OK) {
        memcpy(context->blocks + n_old, blocks, n * sizeof(*blocks));
        status = extend_busy(context, n_old, n_old + n, deadline_ns, &ambiguous, &handle);
    }
    kvci_context_give(context, status, ambiguous, handle, n_old + n);
    if (status == KVC_OK && handle != old_handle)
        kvci_handle_close(client, old_handle);
    if (status == KVC_OK)
        kvci_map_follow(context, deadline_ns);
    return status;
}

void kvc_context_close(kvc_context *context)
{
    if (context == NULL)
        return;
    kvc_client *client = context->client;
    kvci_map_drop(context);
    kvc_mutex_lock(&client->lock);
    context->closing = true;
    while (context->busy)
        kvc_cond_wait(&client->done_cond, &client->lock);
    /* After the wait: until then it may have been queued again. */
    kvci_list_remove(&context->node);
    uint64_t handle = context->handle;
    bool stale = context->reopening;
    kvc_mutex_unlock(&client->lock);
    if (!stale)
        kvci_handle_close(client, handle);
    kvci_context_free(context);
}

uint32_t kvc_context_blocks(const kvc_context *context)
{
    return atomic_load(&context->n_blocks);
}
