/*
 * put_check.c: what a PutBlocks must look like before anything of it is taken; see put_check.h.
 *
 * Transport threads; no state. Whatever breaks a rule fails the call with a text that names it.
 */
#include "put_check.h"

const kvs_schema *kvs_put_check_call(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    const kvc_request *req = &call->req;
    uint32_t n = req->u.put_blocks.n_values;
    if (req->u.put_blocks.promise != KVC_PROMISE_MEMORY &&
        req->u.put_blocks.promise != KVC_PROMISE_DURABLE)
        kvs_fail(call, KVC_INVALID, "promise must be MEMORY or DURABLE");
    else if (req->u.put_blocks.promise == KVC_PROMISE_DURABLE && !server->lmdb.ops)
        kvs_fail(call, KVC_UNSUPPORTED, "DURABLE needs the lmdb tier, which this server lacks");
    else if (n > server->limits.max_batch_values)
        kvs_fail(call, KVC_INVALID, "%u values; max_batch_values is %u", n,
                 server->limits.max_batch_values);
    else if (req->data_bytes > server->limits.max_message_bytes)
        kvs_fail(call, KVC_INVALID, "%llu payload bytes; max_message_bytes is %u",
                 (unsigned long long)req->data_bytes, server->limits.max_message_bytes);
    else
        return kvs_want_schema(server, call, tenant, &req->u.put_blocks.schema);
    return NULL;
}

/* What is wrong with a piece's header; NULL: nothing. */
static const char *piece_fault(const kvs_schema *schema, const kvc_put_value *value)
{
    uint32_t n = kvs_opaque_pieces(schema, value->whole.total_bytes);
    if (n == 0)
        return "total_bytes makes more pieces than a value can have";
    if (value->part >= n)
        return "part is not the number of a piece of so long a value";
    if (value->len_bytes != kvs_opaque_piece_bytes(schema, value->whole.total_bytes, value->part))
        return "len_bytes is not that of this piece: all but the last have max_value_bytes";
    if (value->whole.sum == 0 && n > 1)
        return "a value of several pieces needs its sum in each";
    return NULL;
}

static bool check_piece(kvt_call *call, const kvs_schema *schema, uint32_t i)
{
    const kvc_put_value *value = &call->req.u.put_blocks.values[i];
    const char *why = piece_fault(schema, value);
    if (why)
        kvs_fail(call, KVC_INVALID,
                 "value %u: %s (part %u, len_bytes %u, total_bytes %llu; max_value_bytes is %u)", i,
                 why, value->part, value->len_bytes, (unsigned long long)value->whole.total_bytes,
                 schema->piece_bytes);
    return !why;
}

static bool check_rows(kvt_call *call, const kvs_schema *schema, uint32_t i)
{
    const kvc_put_value *value = &call->req.u.put_blocks.values[i];
    int place = kvs_schema_part(schema, value->part);
    if (place < 0) {
        kvs_fail(call, KVC_INVALID, "value %u: part %u is not in the schema", i, value->part);
        return false;
    }
    const kvs_part *part = &schema->parts[place];
    if (value->len_bytes == part->value_bytes)
        return true;
    kvs_fail(call, KVC_INVALID, "value %u: part %u has %u tokens of %u bytes = %u bytes, not %u", i,
             value->part, schema->block_tokens, part->row_bytes, part->value_bytes,
             value->len_bytes);
    return false;
}

bool kvs_put_check_values(kvt_call *call, const kvs_schema *schema)
{
    const kvc_put_value *values = call->req.u.put_blocks.values;
    bool probe = call->req.u.put_blocks.probe;
    uint64_t total_bytes = 0;
    for (uint32_t i = 0; i < call->req.u.put_blocks.n_values; i++) {
        if (!(schema->piece_bytes ? check_piece : check_rows)(call, schema, i))
            return false;
        total_bytes += probe ? 0 : values[i].len_bytes;
    }
    if (total_bytes == call->req.data_bytes)
        return true;
    kvs_fail(call, KVC_INVALID, "the values add up to %llu bytes, the payload has %llu",
             (unsigned long long)total_bytes, (unsigned long long)call->req.data_bytes);
    return false;
}
