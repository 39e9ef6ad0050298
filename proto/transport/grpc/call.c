/*
 * call.c: one request at the server, from its slot to its last byte.
 *
 * A call is armed, arrives on its queue's thread, is admitted and decoded there, and handed to
 * on_call. kvti_call_reply may run on any thread. The call is freed on its queue's thread once both
 * its answer has gone out and gRPC has reported its end, and no batch of stream.c is out.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/log.h"
#include "grpc_internal.h"
#include "wire/wire.h"

#define LOOK_NS ((uint64_t)1000000000) /* between two looks at which connections have ended */

static void uncharge(struct kvti_call *call)
{
    kvti_budget_give(call->queue->listener->budget, call->charged_bytes);
    call->charged_bytes = 0;
}

static void join_queue(struct kvti_call *call)
{
    kvti_queue *queue = call->queue;
    call->give_up_ns = kvc_now_ns() + queue->listener->opts.max_deadline_ns;
    call->older = queue->newest;
    if (call->older != NULL)
        call->older->newer = call;
    else
        queue->oldest = call;
    queue->newest = call;
}

static void leave_queue(struct kvti_call *call)
{
    kvti_queue *queue = call->queue;
    if (call->give_up_ns == 0)
        return;
    call->give_up_ns = 0;
    if (call->older != NULL)
        call->older->newer = call->newer;
    else
        queue->oldest = call->newer;
    if (call->newer != NULL)
        call->newer->older = call->older;
    else
        queue->newest = call->older;
}

/* When there is something to do without an event; 0: never. Calls are in the order of their
 * arrival, so the first to give up is the oldest; look_ns 0: not on this queue. */
static uint64_t next_turn_ns(const kvti_queue *queue, uint64_t look_ns)
{
    uint64_t give_up_ns = queue->oldest == NULL ? 0 : queue->oldest->give_up_ns;
    return give_up_ns == 0 || (look_ns != 0 && look_ns < give_up_ns) ? look_ns : give_up_ns;
}

void kvti_serve_queue(kvti_queue *queue)
{
    kvt_listener *listener = queue->listener;
    uint64_t look_ns = queue == listener->queues ? kvc_deadline_ns(LOOK_NS) : 0;
    while (kvti_run_one(queue->cq, next_turn_ns(queue, look_ns))) {
        if (look_ns != 0 && kvc_expired(look_ns)) {
            kvti_server_sockets_look(&listener->sockets);
            look_ns = kvc_deadline_ns(LOOK_NS);
        }
        while (queue->oldest != NULL && kvc_expired(queue->oldest->give_up_ns)) {
            struct kvti_call *call = queue->oldest;
            leave_queue(call);
            (void)grpc_call_cancel_with_status(call->call, GRPC_STATUS_DEADLINE_EXCEEDED,
                                               "the server's own deadline has passed", NULL);
        }
    }
}

/* The message itself; its header was copied to the arena. */
static void free_message(struct kvti_call *call)
{
    if (call->request != NULL)
        grpc_byte_buffer_destroy(call->request);
    call->request = NULL;
    uncharge(call);
}

void kvti_call_drop_data(kvt_call *base)
{
    base->req.data = NULL;
    base->req.n_data = 0;
    free_message((struct kvti_call *)base);
}

/* Lets go of what the request points at. */
void kvti_free_request(struct kvti_call *call)
{
    free_message(call);
    kvc_arena_reset(&call->base.arena);
}

static void free_call(struct kvti_call *call)
{
    kvti_free_request(call);
    if (call->answer != NULL)
        grpc_byte_buffer_destroy(call->answer);
    grpc_slice_unref(call->details_text);
    grpc_metadata_array_destroy(&call->metadata);
    if (call->slot == KVTI_UNKNOWN)
        grpc_call_details_destroy(&call->details);
    if (call->call != NULL)
        grpc_call_unref(call->call);
    free(call);
}

void kvti_unref_call(struct kvti_call *call)
{
    kvt_listener *listener = call->queue->listener;
    if (atomic_fetch_sub(&call->n_refs, 1) > 1)
        return;
    leave_queue(call);
    free_call(call);
    kvc_mutex_lock(&listener->mutex);
    listener->n_calls--;
    if (listener->n_calls == 0)
        kvc_cond_broadcast(&listener->changed);
    kvc_mutex_unlock(&listener->mutex);
}

static void on_closed(kvti_tag *tag, bool ok)
{
    struct kvti_call *call = KVTI_CONTAINER(tag, struct kvti_call, closed);
    (void)ok;
    if (call->cancelled != 0)
        __atomic_store_n(&call->base.cancelled, 1, __ATOMIC_RELEASE);
    kvti_unref_call(call);
}

static void on_sent(kvti_tag *tag, bool ok)
{
    (void)ok;
    kvti_unref_call(KVTI_CONTAINER(tag, struct kvti_call, sent));
}

static void add_trailer(struct kvti_call *call, uint32_t i, const char *key, uint32_t value)
{
    (void)snprintf(call->trailer_texts[i], sizeof(call->trailer_texts[i]), "%u", value);
    call->trailers[i].key = grpc_slice_from_static_string(key);
    call->trailers[i].value = grpc_slice_from_static_string(call->trailer_texts[i]);
}

/* Sends the answer: call->answer if there is one, and the status. Any thread; the call may be gone
 * when this returns. */
static void send(struct kvti_call *call, kvc_status status, const char *detail,
                 uint32_t retry_after_ms)
{
    char text[KVT_DETAIL_BYTES + 32];
    grpc_op ops[3] = {
        {.op = GRPC_OP_SEND_STATUS_FROM_SERVER},
        {.op = GRPC_OP_SEND_MESSAGE},
        {.op = GRPC_OP_SEND_INITIAL_METADATA},
    };
    size_t n_ops = 1;
    ops[0].data.send_status_from_server.status = kvti_to_grpc(status);
    if (status != KVC_OK) {
        (void)snprintf(text, sizeof(text), "%s: %s", kvc_status_name(status),
                       detail == NULL ? "" : detail);
        call->details_text = grpc_slice_from_copied_string(text);
        ops[0].data.send_status_from_server.status_details = &call->details_text;
        add_trailer(call, 0, KVTI_STATUS_KEY, (uint32_t)-status);
        ops[0].data.send_status_from_server.trailing_metadata_count = 1;
        ops[0].data.send_status_from_server.trailing_metadata = call->trailers;
    }
    if (status == KVC_AGAIN && retry_after_ms > 0) {
        add_trailer(call, 1, KVTI_RETRY_KEY, retry_after_ms);
        ops[0].data.send_status_from_server.trailing_metadata_count = 2;
    }
    if (call->answer != NULL) {
        ops[n_ops].data.send_message.send_message = call->answer;
        n_ops++;
    }
    if (!call->greeted)
        ops[n_ops++] = (grpc_op){.op = GRPC_OP_SEND_INITIAL_METADATA};
    kvti_free_request(call);
    kvti_start(call->call, ops, n_ops, &call->sent);
}

void kvti_release_all(const kvt_slice *slices, uint32_t n_slices)
{
    for (uint32_t i = 0; i < n_slices; i++) {
        if (slices[i].release != NULL)
            slices[i].release(slices[i].arg);
    }
}

static grpc_slice wrap(const kvt_slice *slice)
{
    if (slice->release == NULL)
        return grpc_slice_from_static_buffer(slice->base, slice->len_bytes);
    return grpc_slice_new_with_user_data((void *)(uintptr_t)slice->base, slice->len_bytes,
                                         slice->release, slice->arg);
}

/* Slices that are let go of in the same way. n is written last and read first: gRPC orders the two,
 * but no sanitizer sees into it. */
typedef struct shared_owner {
    void (*release)(void *arg);
    void *arg;
    atomic_uint n;
} shared_owner;

static void release_shared(void *arg)
{
    shared_owner *owner = arg;
    uint32_t n = atomic_load_explicit(&owner->n, memory_order_acquire);
    for (uint32_t i = 0; i < n; i++)
        owner->release(owner->arg);
    free(owner);
}

/* How many slices from the first on have its owner. */
static uint32_t owned_alike(const kvt_slice *slices, uint32_t n)
{
    uint32_t run = 1;
    while (run < n && slices[run].release == slices[0].release && slices[run].arg == slices[0].arg)
        run++;
    return run;
}

/*
 * Hundreds of rows go out as a slice each, and an owner each costs two allocations and what moves
 * between threads with them. So they are parts of one slice, from the first of their bytes to the
 * last: nobody looks at what lies between, and the owner is told once the last part has gone.
 * Returns how many are in list: those that have bytes.
 */
static uint32_t wrap_shared(const kvt_slice *slices, uint32_t n, shared_owner *owner,
                            grpc_slice *list)
{
    uintptr_t low = UINTPTR_MAX, high = 0;
    uint32_t n_listed = 0;
    for (uint32_t i = 0; i < n; i++) {
        uintptr_t start = (uintptr_t)slices[i].base, end = start + slices[i].len_bytes;
        if (slices[i].len_bytes == 0)
            continue;
        low = start < low ? start : low;
        high = end > high ? end : high;
    }
    low = low < high ? low : high;
    owner->release = slices[0].release;
    owner->arg = slices[0].arg;
    atomic_store_explicit(&owner->n, n, memory_order_release);
    grpc_slice all = grpc_slice_new_with_user_data((void *)low, high - low, release_shared, owner);
    for (uint32_t i = 0; i < n; i++) {
        size_t at = (uintptr_t)slices[i].base - low;
        if (slices[i].len_bytes > 0)
            list[n_listed++] = grpc_slice_sub(all, at, at + slices[i].len_bytes);
    }
    grpc_slice_unref(all);
    return n_listed;
}

grpc_byte_buffer *kvti_build_answer(const void *head, size_t head_bytes, const kvt_slice *slices,
                                    uint32_t n_slices)
{
    grpc_slice list[KVT_MAX_SLICES + 1];
    uint32_t n = 0;
    list[n++] = grpc_slice_from_copied_buffer(head, head_bytes);
    for (uint32_t i = 0; i < n_slices;) {
        uint32_t run = owned_alike(slices + i, n_slices - i);
        shared_owner *owner = run > 1 && slices[i].release ? malloc(sizeof(*owner)) : NULL;
        if (owner) {
            n += wrap_shared(slices + i, run, owner, list + n);
        } else if (slices[i].len_bytes > 0) {
            list[n++] = wrap(&slices[i]);
            run = 1;
        } else {
            kvti_release_all(&slices[i], 1);
            run = 1;
        }
        i += run;
    }
    grpc_byte_buffer *answer = grpc_raw_byte_buffer_create(list, n);
    for (uint32_t i = 0; i < n; i++)
        grpc_slice_unref(list[i]);
    return answer;
}

void kvti_call_reply(kvt_call *base, kvc_status status, const char *detail, uint32_t retry_after_ms,
                     const kvc_reply *reply, const kvt_slice *slices, uint32_t n_slices)
{
    struct kvti_call *call = (struct kvti_call *)base;
    KVC_ASSERT(n_slices <= KVT_MAX_SLICES);
    if (status == KVC_OK && !kvt_streams_reply((kvc_method)call->slot)) {
        kvc_reply whole = reply == NULL ? (kvc_reply){0} : *reply;
        const void *head;
        size_t head_bytes;
        whole.method = (kvc_method)call->slot;
        whole.data = NULL;
        whole.data_bytes = 0;
        for (uint32_t i = 0; i < n_slices; i++)
            whole.data_bytes += slices[i].len_bytes;
        kvc_status encoded = kvc_wire_encode_reply(&whole, &base->arena, &head, &head_bytes);
        if (encoded == KVC_OK) {
            call->answer = kvti_build_answer(head, head_bytes, slices, n_slices);
            n_slices = 0;
        } else {
            KVC_LOG_ERROR(GRPC, "the server's answer to %s does not encode: %s",
                          kvc_method_name(whole.method), kvc_status_name(encoded));
            status = KVC_IO;
            detail = "the server's answer is beyond the protocol's limits";
        }
    }
    kvti_release_all(slices, n_slices);
    send(call, status, detail, retry_after_ms);
}

/* Counts the call in and judges whether it may go on. */
static kvc_status admit(struct kvti_call *call, const char **why_p)
{
    kvt_listener *listener = call->queue->listener;
    uint64_t len_bytes = call->request == NULL ? 0 : grpc_byte_buffer_length(call->request);
    kvc_status status = KVC_OK;
    kvc_mutex_lock(&listener->mutex);
    listener->n_calls++;
    if (kvti_is_side_call(call->slot)) {
        status = KVC_AGAIN;
        *why_p = "too many health watchers or reflections";
    } else if (call->slot >= KVC_METHOD_COUNT) {
        /* health and unknown methods are answered at once, whatever the load */
    } else if (listener->draining) {
        status = KVC_CLOSED;
        *why_p = "the server is draining";
    } else if (listener->n_calls > listener->opts.max_calls) {
        status = KVC_AGAIN;
        *why_p = "too many calls in flight";
    } else if (!kvti_budget_take(listener->budget, len_bytes)) {
        status = KVC_AGAIN;
        *why_p = "too many request bytes in flight";
    } else {
        call->charged_bytes = len_bytes;
    }
    kvc_mutex_unlock(&listener->mutex);
    return status;
}

kvc_status kvti_decode_request(struct kvti_call *call, const char **why_p)
{
    uint32_t n_pieces;
    *why_p = "the request is compressed in a way this server does not know";
    if (call->request->data.raw.compression != GRPC_COMPRESS_NONE)
        return KVC_UNSUPPORTED;
    *why_p = "memory for one message is out";
    struct iovec *pieces = kvti_byte_buffer_pieces(call->request, &call->base.arena, &n_pieces);
    if (pieces == NULL)
        return KVC_NO_MEMORY;
    kvc_status status = kvc_wire_decode_request((kvc_method)call->slot, pieces, n_pieces,
                                                &call->base.arena, &call->base.req, why_p);
    if (status != KVC_OK)
        return status;
    *why_p = "the message's data is longer than max_message_bytes";
    return call->base.req.data_bytes > call->queue->listener->opts.max_message_bytes ? KVC_INVALID
                                                                                     : KVC_OK;
}

static void answer_health(struct kvti_call *call)
{
    const char *why = NULL;
    kvc_status status =
        kvti_health_check(call->queue->listener, call->request, &call->answer, &why);
    send(call, status, why, 0);
}

static void serve(struct kvti_call *call)
{
    kvt_listener *listener = call->queue->listener;
    const char *why = NULL;
    kvc_status status = admit(call, &why);
    if (status == KVC_OK && call->slot == KVTI_HEALTH_CHECK) {
        answer_health(call);
        return;
    }
    if (status == KVC_OK && call->slot == KVTI_UNKNOWN) {
        status = KVC_UNSUPPORTED;
        why = "no such method";
    }
    if (status == KVC_OK && call->request == NULL) {
        status = KVC_INVALID;
        why = "the request has no message";
    }
    if (status == KVC_OK)
        status = kvti_decode_request(call, &why);
    if (status != KVC_OK) {
        if (!kvti_is_side_call(call->slot))
            kvti_count_refusal(status);
        send(call, status, why, status == KVC_AGAIN ? KVTI_RETRY_MS : 0);
        return;
    }
    uint64_t deadline_ns = kvti_from_timespec(call->deadline);
    bool own = deadline_ns == 0 || deadline_ns > call->give_up_ns;
    call->base.deadline_ns = own ? call->give_up_ns : deadline_ns;
    listener->opts.on_call(listener->opts.arg, &call->base);
}

/* False once the queues are being shut down, when no batch may begin. */
static bool arrive(kvt_listener *listener)
{
    kvc_mutex_lock(&listener->mutex);
    bool open = !listener->closed;
    if (open)
        listener->n_arriving++;
    kvc_mutex_unlock(&listener->mutex);
    return open;
}

static void arrived(kvt_listener *listener)
{
    kvc_mutex_lock(&listener->mutex);
    listener->n_arriving--;
    if (listener->n_arriving == 0)
        kvc_cond_broadcast(&listener->changed);
    kvc_mutex_unlock(&listener->mutex);
}

/* True: it has taken call and request. */
static bool begin_side_call(struct kvti_call *call)
{
    if (call->slot == KVTI_HEALTH_WATCH)
        return kvti_watch_begin(call->queue, call->call, call->request);
    return kvti_reflect_begin(call->queue, call->call, call->request);
}

static void take_call(struct kvti_call *call)
{
    kvti_arm(call->queue, call->slot);
    if (kvti_is_side_call(call->slot) && begin_side_call(call)) {
        call->call = NULL;
        call->request = NULL;
        free_call(call);
        return;
    }
    /* In a batch of its own, so that a client that goes away is seen before the answer is ready. */
    grpc_op closed = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    closed.data.recv_close_on_server.cancelled = &call->cancelled;
    atomic_store(&call->n_refs, 2);
    join_queue(call);
    kvti_start(call->call, &closed, 1, &call->closed);
    serve(call);
}

static void on_arrived(kvti_tag *tag, bool ok)
{
    struct kvti_call *call = KVTI_CONTAINER(tag, struct kvti_call, arrived);
    kvt_listener *listener = call->queue->listener;
    /* A call whose client went away does not keep the server from shutting down meanwhile. */
    if (!ok || !arrive(listener)) {
        free_call(call);
        return;
    }
    take_call(call);
    arrived(listener);
}

void kvti_arm(kvti_queue *queue, int slot)
{
    grpc_server *server = queue->listener->server;
    struct kvti_call *call = calloc(1, sizeof(*call));
    if (call == NULL) {
        KVC_LOG_ERROR(GRPC, "memory is out: one request slot fewer");
        return;
    }
    call->base.ops = &kvt_grpc_ops;
    call->base.tenant = "default";
    call->queue = queue;
    call->slot = slot;
    call->details_text = grpc_empty_slice();
    call->arrived.fn = on_arrived;
    call->closed.fn = on_closed;
    call->sent.fn = on_sent;
    call->part_sent.fn = kvti_on_part_sent;
    call->got.fn = kvti_on_got;
    kvc_arena_init(&call->base.arena, KVTI_ARENA_BYTES);
    grpc_metadata_array_init(&call->metadata);
    grpc_call_error error;
    if (slot == KVTI_UNKNOWN)
        grpc_call_details_init(&call->details);
    kvti_give(&call->arrived);
    if (slot == KVTI_UNKNOWN) {
        error = grpc_server_request_call(server, &call->call, &call->details, &call->metadata,
                                         queue->cq, queue->cq, &call->arrived);
    } else {
        error = grpc_server_request_registered_call(
            server, queue->listener->methods[slot], &call->call, &call->deadline, &call->metadata,
            &call->request, queue->cq, queue->cq, &call->arrived);
    }
    KVC_ASSERT(error == GRPC_CALL_OK);
}
