/*
 * names.c: the methods' names and message types.
 *
 * Static tables, any thread. Order is that of kvc_method.
 */
#include "wire_internal.h"

#include "base/assert.h"

struct method_row {
    const char *name;
    const ProtobufCMessageDescriptor *request, *reply;
};

static const struct method_row rows[KVC_METHOD_COUNT] = {
    [KVC_DESCRIBE] = {"Describe", &kvasir__v1__describe_request__descriptor,
                      &kvasir__v1__describe_reply__descriptor},
    [KVC_REGISTER_SCHEMA] = {"RegisterSchema", &kvasir__v1__register_schema_request__descriptor,
                             &kvasir__v1__register_schema_reply__descriptor},
    [KVC_PUT_BLOCKS] = {"PutBlocks", &kvasir__v1__put_blocks_request__descriptor,
                        &kvasir__v1__put_blocks_reply__descriptor},
    [KVC_MATCH_PREFIX] = {"MatchPrefix", &kvasir__v1__match_prefix_request__descriptor,
                          &kvasir__v1__match_prefix_reply__descriptor},
    [KVC_OPEN_CONTEXT] = {"OpenContext", &kvasir__v1__open_context_request__descriptor,
                          &kvasir__v1__open_context_reply__descriptor},
    [KVC_EXTEND_CONTEXT] = {"ExtendContext", &kvasir__v1__extend_context_request__descriptor,
                            &kvasir__v1__extend_context_reply__descriptor},
    [KVC_CLOSE_CONTEXT] = {"CloseContext", &kvasir__v1__close_context_request__descriptor,
                           &kvasir__v1__close_context_reply__descriptor},
    [KVC_FETCH_ROWS] = {"FetchRows", &kvasir__v1__fetch_rows_request__descriptor,
                        &kvasir__v1__fetch_rows_reply__descriptor},
    [KVC_STATS] = {"Stats", &kvasir__v1__stats_request__descriptor,
                   &kvasir__v1__stats_reply__descriptor},
};

static const struct method_row *row_of(kvc_method method)
{
    KVC_ASSERT((int)method >= 0 && method < KVC_METHOD_COUNT);
    return &rows[method];
}

const char *kvc_method_name(kvc_method method)
{
    return (int)method >= 0 && method < KVC_METHOD_COUNT ? rows[method].name : "Unknown";
}

const ProtobufCMessageDescriptor *kvci_request_type(kvc_method method)
{
    return row_of(method)->request;
}

const ProtobufCMessageDescriptor *kvci_reply_type(kvc_method method)
{
    return row_of(method)->reply;
}
