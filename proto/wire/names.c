/*
 * names.c: the methods' names, flags and message types, from methods.def.
 *
 * Static tables, any thread. Order is that of kvc_method.
 */
#include "wire_internal.h"

#include "base/assert.h"

struct method_row {
    const char *name;
    uint32_t flags;
    const ProtobufCMessageDescriptor *request, *reply;
};

static const struct method_row rows[KVC_METHOD_COUNT] = {
#define KVC_METHOD(upper, lower, name, flags)                                                      \
    {name, flags, &kvasir__v1__##lower##_request__descriptor,                                      \
     &kvasir__v1__##lower##_reply__descriptor},
#include "wire/methods.def"
#undef KVC_METHOD
};

static bool known(kvc_method method)
{
    return (int)method >= 0 && method < KVC_METHOD_COUNT;
}

static const struct method_row *row_of(kvc_method method)
{
    KVC_ASSERT(known(method));
    return &rows[method];
}

const char *kvc_method_name(kvc_method method)
{
    return known(method) ? rows[method].name : "Unknown";
}

uint32_t kvc_method_flags(kvc_method method)
{
    return known(method) ? rows[method].flags : 0;
}

const ProtobufCMessageDescriptor *kvci_request_type(kvc_method method)
{
    return row_of(method)->request;
}

const ProtobufCMessageDescriptor *kvci_reply_type(kvc_method method)
{
    return row_of(method)->reply;
}
