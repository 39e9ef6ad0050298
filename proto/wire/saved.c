/*
 * saved.c: contexts saved by name, and the schema that goes with them.
 *
 * Pure, any thread; see wire_internal.h for what the functions of a method promise. Names are
 * checked here, since a bad one is bad on any server; lengths of bodies need the schema.
 */
#include <string.h>

#include "wire_internal.h"

static const char bad_name[] = "a name has 1 to 255 characters of ASCII from '!' to '~'";

static bool name_is_good(const char *name)
{
    size_t n = strnlen(name, KVC_MAX_NAME_BYTES + 1);
    for (size_t i = 0; i < n; i++)
        if (name[i] < '!' || name[i] > '~')
            return false;
    return n > 0 && n <= KVC_MAX_NAME_BYTES;
}

static kvc_status put_saved(const kvc_saved_context *saved, Kvasir__V1__SavedContext *msg_p)
{
    if (!name_is_good(kvci_put_text(saved->name)) || saved->n_tail_parts > KVC_MAX_PARTS)
        return KVC_INVALID;
    *msg_p = (Kvasir__V1__SavedContext)KVASIR__V1__SAVED_CONTEXT__INIT;
    msg_p->name = kvci_put_text(saved->name);
    msg_p->schema = kvci_put_digest(&saved->schema);
    msg_p->n_blocks = saved->n_blocks;
    msg_p->n_ids = saved->n_ids;
    msg_p->n_tail = saved->n_tail;
    msg_p->n_tail_parts = saved->n_tail_parts;
    msg_p->tail_parts = (uint32_t *)(uintptr_t)saved->tail_parts;
    msg_p->promise = (Kvasir__V1__Promise)saved->promise;
    msg_p->generation = saved->generation;
    msg_p->body_bytes = saved->body_bytes;
    msg_p->saved_unix_ms = saved->saved_unix_ms;
    msg_p->piece_bytes = saved->piece_bytes;
    msg_p->upload = saved->upload;
    return KVC_OK;
}

static kvc_status get_saved(kvci_job *job, const Kvasir__V1__SavedContext *msg,
                            kvc_saved_context *saved)
{
    if (msg == NULL)
        return kvci_refuse(job, "the context is missing");
    if (!name_is_good(msg->name))
        return kvci_refuse(job, bad_name);
    if (kvci_get_digest(&msg->schema, &saved->schema) != KVC_OK)
        return kvci_refuse(job, kvci_bad_schema);
    if (msg->n_blocks > KVC_MAX_CONTEXT_BLOCKS)
        return kvci_refuse(job, "more blocks than max_context_blocks");
    if (msg->n_tail >= KVC_BLOCK_TOKENS_MAX)
        return kvci_refuse(job, "a tail is shorter than a block");
    if (msg->n_tail_parts > KVC_MAX_PARTS)
        return kvci_refuse(job, "more parts than a schema can have");
    if ((int)msg->promise != KVC_PROMISE_MEMORY && (int)msg->promise != KVC_PROMISE_DURABLE)
        return kvci_refuse(job, "promise must be MEMORY or DURABLE");
    saved->name = msg->name;
    saved->n_blocks = msg->n_blocks;
    saved->n_ids = msg->n_ids;
    saved->n_tail = msg->n_tail;
    saved->n_tail_parts = (uint32_t)msg->n_tail_parts;
    saved->tail_parts = msg->tail_parts;
    saved->promise = (kvc_promise)msg->promise;
    saved->generation = msg->generation;
    saved->body_bytes = msg->body_bytes;
    saved->saved_unix_ms = msg->saved_unix_ms;
    saved->piece_bytes = msg->piece_bytes;
    saved->upload = msg->upload;
    return KVC_OK;
}

kvc_status kvci_put_put_context_request(const kvc_request *req, const kvci_out *out)
{
    Kvasir__V1__PutContextRequest msg = KVASIR__V1__PUT_CONTEXT_REQUEST__INIT;
    Kvasir__V1__SavedContext saved;
    kvc_status status = put_saved(&req->u.put_context.context, &saved);
    bool data_fits = req->data_bytes == 0 || req->data != NULL;
    if (!data_fits || !kvci_data_fits(req->data, req->n_data, req->data_bytes))
        return KVC_INVALID;
    if (status != KVC_OK)
        return status;
    msg.context = &saved;
    msg.upload = req->u.put_context.upload;
    msg.offset = req->u.put_context.offset;
    msg.replace = req->u.put_context.replace;
    msg.if_generation = req->u.put_context.if_generation;
    return kvci_put(out, &msg.base, req->data_bytes);
}

kvc_status kvci_get_put_context_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__PutContextRequest *msg = (const Kvasir__V1__PutContextRequest *)job->msg;
    if (msg->upload == 0)
        return kvci_refuse(job, "upload must not be 0");
    if (msg->replace && msg->if_generation != 0)
        return kvci_refuse(job, "either replace or if_generation");
    req->u.put_context.upload = msg->upload;
    req->u.put_context.offset = msg->offset;
    req->u.put_context.replace = msg->replace != 0;
    req->u.put_context.if_generation = msg->if_generation;
    return get_saved(job, msg->context, &req->u.put_context.context);
}

kvc_status kvci_put_put_context_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__PutContextReply msg = KVASIR__V1__PUT_CONTEXT_REPLY__INIT;
    msg.received = reply->u.put_context.received;
    msg.generation = reply->u.put_context.generation;
    msg.promise = (Kvasir__V1__Promise)reply->u.put_context.promise;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_put_context_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__PutContextReply *msg = (const Kvasir__V1__PutContextReply *)job->msg;
    if ((int)msg->promise < 0 || (int)msg->promise > KVC_PROMISE_DURABLE)
        return kvci_refuse(job, "promise is none of the protocol's");
    reply->u.put_context.received = msg->received;
    reply->u.put_context.generation = msg->generation;
    reply->u.put_context.promise = (kvc_promise)msg->promise;
    return KVC_OK;
}

kvc_status kvci_put_get_context_request(const kvc_request *req, const kvci_out *out)
{
    Kvasir__V1__GetContextRequest msg = KVASIR__V1__GET_CONTEXT_REQUEST__INIT;
    msg.name = kvci_put_text(req->u.get_context.name);
    msg.generation = req->u.get_context.generation;
    msg.offset = req->u.get_context.offset;
    return name_is_good(msg.name) ? kvci_put(out, &msg.base, 0) : KVC_INVALID;
}

kvc_status kvci_get_get_context_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__GetContextRequest *msg = (const Kvasir__V1__GetContextRequest *)job->msg;
    if (!name_is_good(msg->name))
        return kvci_refuse(job, bad_name);
    req->u.get_context.name = msg->name;
    req->u.get_context.generation = msg->generation;
    req->u.get_context.offset = msg->offset;
    return KVC_OK;
}

kvc_status kvci_put_get_context_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__GetContextReply msg = KVASIR__V1__GET_CONTEXT_REPLY__INIT;
    Kvasir__V1__SavedContext saved;
    kvc_status status = put_saved(&reply->u.get_context.context, &saved);
    if (!kvci_data_fits(reply->data, reply->n_data, reply->data_bytes))
        return KVC_INVALID;
    if (status != KVC_OK)
        return status;
    msg.context = &saved;
    return kvci_put(out, &msg.base, reply->data_bytes);
}

kvc_status kvci_get_get_context_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__GetContextReply *msg = (const Kvasir__V1__GetContextReply *)job->msg;
    return get_saved(job, msg->context, &reply->u.get_context.context);
}

kvc_status kvci_put_list_contexts_request(const kvc_request *req, const kvci_out *out)
{
    Kvasir__V1__ListContextsRequest msg = KVASIR__V1__LIST_CONTEXTS_REQUEST__INIT;
    msg.after = kvci_put_text(req->u.list_contexts.after);
    msg.max = req->u.list_contexts.max;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_list_contexts_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__ListContextsRequest *msg = (const Kvasir__V1__ListContextsRequest *)job->msg;
    if (!kvci_fits(msg->after, KVC_MAX_NAME_BYTES))
        return kvci_refuse(job, "after must have at most 255 bytes");
    req->u.list_contexts.after = msg->after;
    req->u.list_contexts.max = msg->max;
    return KVC_OK;
}

kvc_status kvci_put_list_contexts_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__ListContextsReply msg = KVASIR__V1__LIST_CONTEXTS_REPLY__INIT;
    uint32_t n = reply->u.list_contexts.n_contexts;
    if (n > KVC_MAX_SAVED_PAGE)
        return KVC_INVALID;
    Kvasir__V1__SavedContext *saved = kvc_arena_alloc(out->arena, n * sizeof(*saved));
    msg.contexts = kvc_arena_alloc(out->arena, n * sizeof(*msg.contexts));
    if (saved == NULL || msg.contexts == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        kvc_status status = put_saved(&reply->u.list_contexts.contexts[i], &saved[i]);
        if (status != KVC_OK)
            return status;
        msg.contexts[i] = &saved[i];
    }
    msg.n_contexts = n;
    msg.more = reply->u.list_contexts.more;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_list_contexts_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__ListContextsReply *msg = (const Kvasir__V1__ListContextsReply *)job->msg;
    if (msg->n_contexts > KVC_MAX_SAVED_PAGE)
        return kvci_refuse(job, "more than 256 saved contexts");
    kvc_saved_context *list = kvc_arena_calloc(job->arena, msg->n_contexts, sizeof(*list));
    if (list == NULL)
        return kvci_no_memory(job);
    for (size_t i = 0; i < msg->n_contexts; i++) {
        kvc_status status = get_saved(job, msg->contexts[i], &list[i]);
        if (status != KVC_OK)
            return status;
    }
    reply->u.list_contexts.n_contexts = (uint32_t)msg->n_contexts;
    reply->u.list_contexts.contexts = list;
    reply->u.list_contexts.more = msg->more != 0;
    return KVC_OK;
}

kvc_status kvci_put_delete_context_request(const kvc_request *req, const kvci_out *out)
{
    Kvasir__V1__DeleteContextRequest msg = KVASIR__V1__DELETE_CONTEXT_REQUEST__INIT;
    msg.name = kvci_put_text(req->u.delete_context.name);
    msg.if_generation = req->u.delete_context.if_generation;
    return name_is_good(msg.name) ? kvci_put(out, &msg.base, 0) : KVC_INVALID;
}

kvc_status kvci_get_delete_context_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__DeleteContextRequest *msg =
        (const Kvasir__V1__DeleteContextRequest *)job->msg;
    if (!name_is_good(msg->name))
        return kvci_refuse(job, bad_name);
    req->u.delete_context.name = msg->name;
    req->u.delete_context.if_generation = msg->if_generation;
    return KVC_OK;
}

kvc_status kvci_put_delete_context_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__DeleteContextReply msg = KVASIR__V1__DELETE_CONTEXT_REPLY__INIT;
    (void)reply;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_delete_context_reply(kvci_job *job, kvc_reply *reply)
{
    (void)job;
    (void)reply;
    return KVC_OK;
}

kvc_status kvci_put_get_schema_request(const kvc_request *req, const kvci_out *out)
{
    Kvasir__V1__GetSchemaRequest msg = KVASIR__V1__GET_SCHEMA_REQUEST__INIT;
    msg.schema = kvci_put_digest(&req->u.get_schema.schema);
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_get_schema_request(kvci_job *job, kvc_request *req)
{
    const Kvasir__V1__GetSchemaRequest *msg = (const Kvasir__V1__GetSchemaRequest *)job->msg;
    if (kvci_get_digest(&msg->schema, &req->u.get_schema.schema) != KVC_OK)
        return kvci_refuse(job, kvci_bad_schema);
    return KVC_OK;
}

kvc_status kvci_put_get_schema_reply(const kvc_reply *reply, const kvci_out *out)
{
    Kvasir__V1__GetSchemaReply msg = KVASIR__V1__GET_SCHEMA_REPLY__INIT;
    Kvasir__V1__Schema schema;
    kvc_status status = kvci_put_schema(reply->u.get_schema.schema, out->arena, &schema);
    if (status != KVC_OK)
        return status;
    msg.schema = &schema;
    return kvci_put(out, &msg.base, 0);
}

kvc_status kvci_get_get_schema_reply(kvci_job *job, kvc_reply *reply)
{
    const Kvasir__V1__GetSchemaReply *msg = (const Kvasir__V1__GetSchemaReply *)job->msg;
    return kvci_get_schema(job, msg->schema, &reply->u.get_schema.schema);
}
