/*
 * health.c: grpc.health.v1 for the names "" and "kvasir.v1.KvCache".
 *
 * A Check is answered from call.c. A Watch lives here: its flags are guarded by the listener's
 * mutex; batches start with no lock held. A watch is freed once gRPC has reported its end and no
 * message of it is being sent.
 */
#include <stdlib.h>
#include <string.h>

#include <grpc/byte_buffer_reader.h>

#include "grpc_internal.h"
#include "health.pb-c.h"

#define REQUEST_BYTES_MAX 4096u

struct kvti_watch {
    kvti_watch *next, *pending; /* the listener's list; publish's list */
    kvti_queue *queue;
    grpc_call *call;
    kvti_tag closed, sent;
    grpc_byte_buffer *message;
    bool known, greeted, sending, ended;
    int told; /* what was sent last; -1 before the first */
    int cancelled;
};

static bool service_is_known(const char *service)
{
    return service[0] == '\0' || strcmp(service, "kvasir.v1.KvCache") == 0;
}

/* Reads the service's name. False: not a HealthCheckRequest. */
static bool read_request(grpc_byte_buffer *request, bool *known_p)
{
    grpc_byte_buffer_reader reader;
    if (request == NULL || grpc_byte_buffer_length(request) > REQUEST_BYTES_MAX ||
        !grpc_byte_buffer_reader_init(&reader, request))
        return false;
    grpc_slice bytes = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    Grpc__Health__V1__HealthCheckRequest *msg = grpc__health__v1__health_check_request__unpack(
        NULL, GRPC_SLICE_LENGTH(bytes), GRPC_SLICE_START_PTR(bytes));
    grpc_slice_unref(bytes);
    if (msg == NULL)
        return false;
    *known_p = service_is_known(msg->service);
    grpc__health__v1__health_check_request__free_unpacked(msg, NULL);
    return true;
}

static grpc_byte_buffer *build_message(int serving_status)
{
    uint8_t bytes[16];
    Grpc__Health__V1__HealthCheckResponse msg = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    msg.status = (Grpc__Health__V1__HealthCheckResponse__ServingStatus)serving_status;
    size_t len_bytes = grpc__health__v1__health_check_response__pack(&msg, bytes);
    grpc_slice slice = grpc_slice_from_copied_buffer((const char *)bytes, len_bytes);
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return message;
}

static int serving_status(bool serving)
{
    return serving ? GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
                   : GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING;
}

kvc_status kvti_health_check(kvt_listener *listener, grpc_byte_buffer *request,
                             grpc_byte_buffer **bb_p, const char **why_p)
{
    bool known;
    *why_p = "not a HealthCheckRequest";
    if (!read_request(request, &known))
        return KVC_INVALID;
    *why_p = "no such service";
    if (!known)
        return KVC_NOT_FOUND;
    kvc_mutex_lock(&listener->mutex);
    bool serving = listener->serving;
    kvc_mutex_unlock(&listener->mutex);
    *bb_p = build_message(serving_status(serving));
    return KVC_OK;
}

/* With the mutex held: true if a message has to go out now; then it counts as being sent. */
static bool take_turn(kvti_watch *watch)
{
    int want = watch->known
                   ? serving_status(watch->queue->listener->serving)
                   : (int)GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN;
    if (watch->sending || watch->ended || watch->told == want)
        return false;
    watch->sending = true;
    watch->told = want;
    return true;
}

/* With the turn taken. */
static void send_message(kvti_watch *watch)
{
    grpc_op ops[2] = {{.op = GRPC_OP_SEND_MESSAGE}, {.op = GRPC_OP_SEND_INITIAL_METADATA}};
    watch->message = build_message(watch->told);
    ops[0].data.send_message.send_message = watch->message;
    size_t n_ops = watch->greeted ? 1 : 2;
    watch->greeted = true;
    kvti_start(watch->call, ops, n_ops, &watch->sent);
}

static void free_watch(kvti_watch *watch)
{
    grpc_call_unref(watch->call);
    free(watch);
}

static void on_sent(kvti_tag *tag, bool ok)
{
    kvti_watch *watch = KVTI_CONTAINER(tag, kvti_watch, sent);
    kvt_listener *listener = watch->queue->listener;
    (void)ok;
    grpc_byte_buffer_destroy(watch->message);
    watch->message = NULL;
    kvc_mutex_lock(&listener->mutex);
    watch->sending = false;
    bool ended = watch->ended;
    bool more = take_turn(watch);
    kvc_mutex_unlock(&listener->mutex);
    if (ended)
        free_watch(watch);
    else if (more)
        send_message(watch);
}

static void on_closed(kvti_tag *tag, bool ok)
{
    kvti_watch *watch = KVTI_CONTAINER(tag, kvti_watch, closed);
    kvt_listener *listener = watch->queue->listener;
    (void)ok;
    kvc_mutex_lock(&listener->mutex);
    kvti_watch **at = &listener->watches;
    while (*at != watch)
        at = &(*at)->next;
    *at = watch->next;
    listener->n_watches--;
    watch->ended = true;
    bool sending = watch->sending;
    kvc_mutex_unlock(&listener->mutex);
    if (!sending)
        free_watch(watch);
}

bool kvti_watch_begin(kvti_queue *queue, grpc_call *call, grpc_byte_buffer *request)
{
    kvt_listener *listener = queue->listener;
    kvti_watch *watch = calloc(1, sizeof(*watch));
    if (watch == NULL)
        return false;
    watch->queue = queue;
    watch->call = call;
    watch->told = -1;
    watch->closed.fn = on_closed;
    watch->sent.fn = on_sent;
    if (!read_request(request, &watch->known))
        watch->known = false;
    kvc_mutex_lock(&listener->mutex);
    bool room = listener->n_watches < KVTI_MAX_WATCHES;
    if (room) {
        watch->next = listener->watches;
        listener->watches = watch;
        listener->n_watches++;
        (void)take_turn(watch);
    }
    kvc_mutex_unlock(&listener->mutex);
    if (!room) {
        free(watch);
        return false;
    }
    if (request != NULL)
        grpc_byte_buffer_destroy(request);
    grpc_op closed = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    closed.data.recv_close_on_server.cancelled = &watch->cancelled;
    kvti_start(call, &closed, 1, &watch->closed);
    send_message(watch);
    return true;
}

void kvti_watch_publish(kvt_listener *listener)
{
    kvti_watch *pending = NULL;
    kvc_mutex_lock(&listener->mutex);
    for (kvti_watch *watch = listener->watches; watch != NULL; watch = watch->next) {
        if (take_turn(watch)) {
            watch->pending = pending;
            pending = watch;
        }
    }
    kvc_mutex_unlock(&listener->mutex);
    while (pending != NULL) {
        kvti_watch *watch = pending;
        pending = watch->pending;
        send_message(watch);
    }
}
