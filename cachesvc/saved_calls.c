/*
 * saved_calls.c: PutContext, GetContext, ListContexts, DeleteContext and GetSchema.
 *
 * What may touch lmdb runs on a disk thread, and no more of it at once than slow jobs may; without
 * lmdb everything runs where it arrives. Invariant: the schema of a put is held by its call.
 */
#include <stdlib.h>

#include "request.h"
#include "saved.h"

typedef struct saved_job {
    kvs_job job; /* first */
    kvs_server *server;
    kvt_call *call;
    kvc_digest tenant;
    const kvs_schema *schema; /* of a put */
    kvs_buffer *buffer;       /* of a get */
    void (*run)(struct saved_job *job);
} saved_job;

/* Makes room for the next slow job; before the answer, which may bring it. */
static void leave(const saved_job *j)
{
    if (j->server->disk)
        atomic_fetch_sub(&j->server->n_slow_jobs, 1);
}

static void job_run(kvs_job *job)
{
    saved_job *j = (saved_job *)job;
    kvc_status status = kvs_given_up(j->call);
    if (status == KVC_OK) {
        j->run(j);
    } else {
        if (j->buffer)
            kvs_buffer_release(j->buffer);
        leave(j);
        kvs_fail(j->call, status, "nobody waited any more when the disk was free");
    }
    free(j);
}

/* Hands a call to run, on a disk thread where there is one; or fails it. */
static void start(saved_job from)
{
    kvs_server *server = from.server;
    kvt_call *call = from.call;
    saved_job *j = malloc(sizeof(*j));
    kvc_status status = j ? KVC_OK : KVC_NO_MEMORY;
    if (j) {
        *j = from;
        j->job.run = job_run;
    }
    if (j && !server->disk) {
        job_run(&j->job);
        return;
    }
    if (j && !kvs_slow_job_begin(server)) {
        status = KVC_AGAIN;
    } else if (j) {
        status = kvs_disk_submit(server->disk, &j->job);
        if (status == KVC_OK)
            return;
        atomic_fetch_sub(&server->n_slow_jobs, 1);
    }
    free(j);
    if (from.buffer)
        kvs_buffer_release(from.buffer);
    kvs_fail(call, status, "%s",
             status == KVC_AGAIN ? "the disk threads have too much to do" : "memory is out");
}

static void put_run(saved_job *j)
{
    const kvc_request *req = &j->call->req;
    char why[KVS_SAVED_WHY_BYTES];
    kvs_saved_piece piece = {
        .schema = j->schema,
        .context = &req->u.put_context.context,
        .upload = req->u.put_context.upload,
        .offset = req->u.put_context.offset,
        .if_generation = req->u.put_context.if_generation,
        .replace = req->u.put_context.replace,
        .data = req->data,
        .n_data = req->n_data,
        .len_bytes = req->data_bytes,
    };
    kvc_reply reply = {.method = KVC_PUT_CONTEXT};
    kvc_status status = kvs_saved_put(j->server->saved, &piece, &reply.u.put_context.received,
                                      &reply.u.put_context.generation, why);
    leave(j);
    if (status != KVC_OK) {
        kvs_fail(j->call, status, "%s", why);
        return;
    }
    if (reply.u.put_context.generation != 0)
        reply.u.put_context.promise =
            j->server->lmdb.ops ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY;
    kvs_answer(j->call, &reply, NULL, 0);
}

void kvs_on_put_context(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    const kvc_saved_context *context = &call->req.u.put_context.context;
    if (context->promise == KVC_PROMISE_DURABLE && !server->lmdb.ops) {
        kvs_fail(call, KVC_UNSUPPORTED,
                 "DURABLE needs the lmdb tier, which this server lacks: MEMORY is kept until it "
                 "stops");
        return;
    }
    if (call->req.data_bytes > server->limits.max_message_bytes) {
        kvs_fail(call, KVC_INVALID, "%llu payload bytes; max_message_bytes is %u",
                 (unsigned long long)call->req.data_bytes, server->limits.max_message_bytes);
        return;
    }
    const kvs_schema *schema = kvs_want_rows(server, call, tenant, &context->schema);
    if (schema)
        start((saved_job){
            .server = server, .call = call, .tenant = *tenant, .schema = schema, .run = put_run});
}

/* The bytes of one message, from offset on; fails the call or answers it. */
static void get_run(saved_job *j)
{
    kvs_saved *saved = j->server->saved;
    kvt_call *call = j->call;
    kvc_reply reply = {.method = KVC_GET_CONTEXT};
    char why[KVS_SAVED_WHY_BYTES];
    kvs_saved_got got;
    uint64_t offset = call->req.u.get_context.offset;
    kvc_status status = kvs_saved_get(saved, &j->tenant, call->req.u.get_context.name,
                                      call->req.u.get_context.generation, &call->arena, &got, why);
    if (status != KVC_OK) {
        kvs_buffer_release(j->buffer);
        leave(j);
        kvs_fail(call, status, "%s", why);
        return;
    }
    uint64_t body_bytes = got.context.body_bytes, len_bytes = j->server->limits.max_message_bytes;
    if (offset < body_bytes && len_bytes > body_bytes - offset)
        len_bytes = body_bytes - offset;
    if (offset >= body_bytes)
        status = KVC_INVALID;
    else
        status = kvs_saved_read(saved, &got, offset, (size_t)len_bytes, j->buffer->bytes);
    kvs_saved_put_back(saved, &got);
    leave(j);
    if (status != KVC_OK) {
        kvs_buffer_release(j->buffer);
        if (status == KVC_INVALID)
            kvs_fail(call, status, "offset %llu; the body has %llu bytes",
                     (unsigned long long)offset, (unsigned long long)body_bytes);
        else
            kvs_fail(call, status == KVC_NOT_FOUND ? KVC_CORRUPT : status,
                     "a piece of the saved context cannot be read");
        return;
    }
    reply.u.get_context.context = got.context;
    reply.data_bytes = len_bytes;
    kvt_slice slice = {.base = j->buffer->bytes,
                       .len_bytes = (size_t)len_bytes,
                       .release = kvs_buffer_release,
                       .arg = j->buffer};
    kvs_answer(call, &reply, &slice, 1);
}

void kvs_on_get_context(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    kvs_buffer *buffer;
    kvc_status status = kvs_buffer_get(&server->buffers, server->limits.max_message_bytes, &buffer);
    if (status != KVC_OK)
        kvs_fail(call, status, "the reply buffers are all in use");
    else
        start((saved_job){
            .server = server, .call = call, .tenant = *tenant, .buffer = buffer, .run = get_run});
}

void kvs_on_list_contexts(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    kvc_reply reply = {.method = KVC_LIST_CONTEXTS};
    kvc_saved_context *list = NULL;
    uint32_t max = call->req.u.list_contexts.max;
    if (max == 0 || max > KVC_MAX_SAVED_PAGE)
        max = KVC_MAX_SAVED_PAGE;
    kvc_status status =
        kvs_saved_list(server->saved, tenant, call->req.u.list_contexts.after, max, &call->arena,
                       &list, &reply.u.list_contexts.n_contexts, &reply.u.list_contexts.more);
    reply.u.list_contexts.contexts = list;
    if (status == KVC_OK)
        kvs_answer(call, &reply, NULL, 0);
    else
        kvs_fail(call, status, "no memory for the list");
}

static void delete_run(saved_job *j)
{
    kvc_reply reply = {.method = KVC_DELETE_CONTEXT};
    char why[KVS_SAVED_WHY_BYTES];
    kvc_status status =
        kvs_saved_delete(j->server->saved, &j->tenant, j->call->req.u.delete_context.name,
                         j->call->req.u.delete_context.if_generation, why);
    leave(j);
    if (status == KVC_OK)
        kvs_answer(j->call, &reply, NULL, 0);
    else
        kvs_fail(j->call, status, "%s", why);
}

void kvs_on_delete_context(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    start((saved_job){.server = server, .call = call, .tenant = *tenant, .run = delete_run});
}

void kvs_on_get_schema(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    const kvs_schema *schema =
        kvs_want_schema(server, call, tenant, &call->req.u.get_schema.schema);
    kvc_reply reply = {.method = KVC_GET_SCHEMA};
    if (!schema)
        return;
    reply.u.get_schema.schema = schema->schema;
    kvs_schemas_hold(server->schemas, schema); /* kvs_answer lets go before the reply is packed */
    kvs_answer(call, &reply, NULL, 0);
    kvs_schemas_put(server->schemas, schema);
}
