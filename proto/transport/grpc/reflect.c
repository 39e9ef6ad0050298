/*
 * reflect.c: grpc.reflection.v1 and v1alpha, so that stock tools explore a running server.
 *
 * A stream of requests, each answered before the next is read. Everything about one runs on its
 * queue's thread, so it needs no lock; only their number is the listener's, under its mutex. A
 * reflection is freed once gRPC has reported its end and its other batch has come back.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <grpc/byte_buffer_reader.h>

#include "descriptors.h"
#include "grpc_internal.h"
#include "reflection.pb-c.h"

#define REQUEST_BYTES_MAX 4096u
#define SERVICES_MAX      16u
#define NAME_BYTES        256u

/* protoc-c's names are too long for a line. */
#define ASKS(what) GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_##what
#define ANSWERS(what)                                                                              \
    GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_##what##_RESPONSE

typedef Grpc__Reflection__V1__ServerReflectionRequest request_msg;
typedef Grpc__Reflection__V1__ServerReflectionResponse response_msg;

struct kvti_reflection {
    kvti_queue *queue;
    grpc_call *call;
    kvti_tag closed, moved;
    grpc_byte_buffer *request, *answer;
    grpc_slice details;
    bool greeted, ending;
    uint32_t n_refs;
    int cancelled;
};
typedef struct kvti_reflection kvti_reflection;

/* ---- one answer ------------------------------------------------------------------------------ */

static void set_not_found(response_msg *response, Grpc__Reflection__V1__ErrorResponse *error)
{
    static char why[] = "no such file, symbol or extension";
    error->error_code = GRPC_STATUS_NOT_FOUND;
    error->error_message = why;
    response->message_response_case = ANSWERS(ERROR);
    response->error_response = error;
}

typedef struct service_list {
    char names[SERVICES_MAX][NAME_BYTES];
    Grpc__Reflection__V1__ServiceResponse items[SERVICES_MAX], *list[SERVICES_MAX];
    size_t n;
} service_list;

static void add_service(void *arg, const char *name)
{
    service_list *services = arg;
    if (services->n == SERVICES_MAX)
        return;
    size_t i = services->n++;
    (void)snprintf(services->names[i], NAME_BYTES, "%s", name);
    services->items[i] =
        (Grpc__Reflection__V1__ServiceResponse)GRPC__REFLECTION__V1__SERVICE_RESPONSE__INIT;
    services->items[i].name = services->names[i];
    services->list[i] = &services->items[i];
}

static grpc_byte_buffer *pack(const response_msg *response)
{
    grpc_slice slice = grpc_slice_malloc(
        grpc__reflection__v1__server_reflection_response__get_packed_size(response));
    (void)grpc__reflection__v1__server_reflection_response__pack(response,
                                                                 GRPC_SLICE_START_PTR(slice));
    grpc_byte_buffer *bb = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return bb;
}

/* The whole answer to one request. */
static grpc_byte_buffer *answer_to(request_msg *request)
{
    response_msg response = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;
    Grpc__Reflection__V1__FileDescriptorResponse files =
        GRPC__REFLECTION__V1__FILE_DESCRIPTOR_RESPONSE__INIT;
    Grpc__Reflection__V1__ListServiceResponse list =
        GRPC__REFLECTION__V1__LIST_SERVICE_RESPONSE__INIT;
    Grpc__Reflection__V1__ExtensionNumberResponse numbers =
        GRPC__REFLECTION__V1__EXTENSION_NUMBER_RESPONSE__INIT;
    Grpc__Reflection__V1__ErrorResponse error = GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;
    service_list services = {.n = 0};
    kvti_span file = {0};
    bool found = false;
    response.valid_host = request->host;
    response.original_request = request;
    switch (request->message_request_case) {
    case ASKS(LIST_SERVICES):
        kvti_descriptor_services(add_service, &services);
        list.n_service = services.n;
        list.service = services.list;
        response.message_response_case = ANSWERS(LIST_SERVICES);
        response.list_services_response = &list;
        return pack(&response);
    case ASKS(FILE_BY_FILENAME):
        found = kvti_descriptor_by_name(request->file_by_filename, &file);
        break;
    case ASKS(FILE_CONTAINING_SYMBOL):
        found = kvti_descriptor_by_symbol(request->file_containing_symbol, &file);
        break;
    case ASKS(ALL_EXTENSION_NUMBERS_OF_TYPE):
        if (!kvti_descriptor_has_type(request->all_extension_numbers_of_type))
            break;
        numbers.base_type_name = request->all_extension_numbers_of_type;
        response.message_response_case = ANSWERS(ALL_EXTENSION_NUMBERS);
        response.all_extension_numbers_response = &numbers;
        return pack(&response);
    default:
        break; /* extensions, of which there are none, and empty requests */
    }
    ProtobufCBinaryData bytes = {file.len_bytes, (uint8_t *)(uintptr_t)file.bytes};
    if (found) {
        files.n_file_descriptor_proto = 1;
        files.file_descriptor_proto = &bytes;
        response.message_response_case = ANSWERS(FILE_DESCRIPTOR);
        response.file_descriptor_response = &files;
    } else {
        set_not_found(&response, &error);
    }
    return pack(&response);
}

/* NULL: not a request. */
static request_msg *read_request(grpc_byte_buffer *bb)
{
    grpc_byte_buffer_reader reader;
    if (grpc_byte_buffer_length(bb) > REQUEST_BYTES_MAX ||
        !grpc_byte_buffer_reader_init(&reader, bb))
        return NULL;
    grpc_slice bytes = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    request_msg *request = grpc__reflection__v1__server_reflection_request__unpack(
        NULL, GRPC_SLICE_LENGTH(bytes), GRPC_SLICE_START_PTR(bytes));
    grpc_slice_unref(bytes);
    return request;
}

/* ---- the stream ------------------------------------------------------------------------------ */

static void unref(kvti_reflection *r)
{
    kvt_listener *listener = r->queue->listener;
    if (--r->n_refs > 0)
        return;
    if (r->request != NULL)
        grpc_byte_buffer_destroy(r->request);
    grpc_slice_unref(r->details);
    grpc_call_unref(r->call);
    free(r);
    kvc_mutex_lock(&listener->mutex);
    listener->n_reflections--;
    kvc_cond_broadcast(&listener->changed);
    kvc_mutex_unlock(&listener->mutex);
}

static void on_closed(kvti_tag *tag, bool ok)
{
    (void)ok;
    unref(KVTI_CONTAINER(tag, kvti_reflection, closed));
}

static void finish(kvti_reflection *r, grpc_status_code code, const char *details)
{
    grpc_op ops[2] = {{.op = GRPC_OP_SEND_STATUS_FROM_SERVER},
                      {.op = GRPC_OP_SEND_INITIAL_METADATA}};
    r->ending = true;
    r->details = grpc_slice_from_static_string(details);
    ops[0].data.send_status_from_server.status = code;
    ops[0].data.send_status_from_server.status_details = &r->details;
    kvti_start(r->call, ops, r->greeted ? 1 : 2, &r->moved);
}

static void send_answer(kvti_reflection *r)
{
    grpc_op ops[2] = {{.op = GRPC_OP_SEND_MESSAGE}, {.op = GRPC_OP_SEND_INITIAL_METADATA}};
    ops[0].data.send_message.send_message = r->answer;
    size_t n_ops = r->greeted ? 1 : 2;
    r->greeted = true;
    kvti_start(r->call, ops, n_ops, &r->moved);
}

static void ask(kvti_reflection *r)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
    op.data.recv_message.recv_message = &r->request;
    kvti_start(r->call, &op, 1, &r->moved);
}

/* With the request of this turn; none: the client has said all, or has gone. */
static void take_turn(kvti_reflection *r)
{
    if (r->request == NULL) {
        finish(r, GRPC_STATUS_OK, "");
        return;
    }
    request_msg *request = read_request(r->request);
    grpc_byte_buffer_destroy(r->request);
    r->request = NULL;
    if (request == NULL) {
        finish(r, GRPC_STATUS_INVALID_ARGUMENT, "PROTOCOL: not a ServerReflectionRequest");
        return;
    }
    r->answer = answer_to(request);
    grpc__reflection__v1__server_reflection_request__free_unpacked(request, NULL);
    send_answer(r);
}

static void on_moved(kvti_tag *tag, bool ok)
{
    kvti_reflection *r = KVTI_CONTAINER(tag, kvti_reflection, moved);
    if (r->ending) {
        unref(r);
    } else if (r->answer != NULL) {
        grpc_byte_buffer_destroy(r->answer);
        r->answer = NULL;
        if (ok)
            ask(r);
        else
            finish(r, GRPC_STATUS_CANCELLED, "");
    } else {
        take_turn(r);
    }
}

bool kvti_reflect_begin(kvti_queue *queue, grpc_call *call, grpc_byte_buffer *request)
{
    kvt_listener *listener = queue->listener;
    kvti_reflection *r = calloc(1, sizeof(*r));
    if (r == NULL)
        return false;
    kvc_mutex_lock(&listener->mutex);
    bool room = !listener->draining && listener->n_reflections < KVTI_MAX_REFLECTIONS;
    if (room)
        listener->n_reflections++;
    kvc_mutex_unlock(&listener->mutex);
    if (!room) {
        free(r);
        return false;
    }
    r->queue = queue;
    r->call = call;
    r->request = request;
    r->details = grpc_empty_slice();
    r->closed.fn = on_closed;
    r->moved.fn = on_moved;
    r->n_refs = 2;
    grpc_op closed = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    closed.data.recv_close_on_server.cancelled = &r->cancelled;
    kvti_start(call, &closed, 1, &r->closed);
    take_turn(r);
    return true;
}
