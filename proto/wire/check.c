/*
 * check.c: a message's bytes against its type, before protobuf-c sees them.
 *
 * Pure, any thread. protobuf-c allocates per field and per unknown field, and cuts strings at NUL;
 * this pass bounds the first and refuses the second. Recursion is as deep as the types nest (3).
 */
#include <string.h>

#include "wire_internal.h"

/* More than any valid message has: 65,536 missing rows of two fields, or 4,096 parts of 26. */
#define FIELDS_MAX  (4u * KVC_MAX_PICKS)
/* Repeated messages inside one message, whatever their type. */
#define ITEMS_MAX   KVC_MAX_PICKS
/* Fields that this version does not know, over the whole message. */
#define UNKNOWN_MAX 1024u

struct bytes {
    const uint8_t *at, *end;
};

struct budget {
    uint32_t fields, items, unknown;
    const char *why;
};

static bool take_varint(struct bytes *in, uint32_t max_bytes, uint64_t *value_p)
{
    uint64_t value = 0;
    for (uint32_t i = 0; i < max_bytes && in->at < in->end; i++) {
        uint8_t byte = *in->at++;
        value |= (uint64_t)(byte & 0x7f) << (7 * i);
        if ((byte & 0x80) == 0) {
            *value_p = value;
            return true;
        }
    }
    return false;
}

/* Takes one value of this wire type; *value_p spans it, without its length prefix. */
static bool take_value(struct bytes *in, uint32_t wire_type, struct bytes *value_p)
{
    uint64_t len_bytes = wire_type == PROTOBUF_C_WIRE_TYPE_64BIT ? 8 : 4;
    uint64_t ignored;
    value_p->at = in->at;
    if (wire_type == PROTOBUF_C_WIRE_TYPE_VARINT) {
        bool whole = take_varint(in, 10, &ignored);
        value_p->end = in->at;
        return whole;
    }
    if (wire_type == PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED) {
        if (!take_varint(in, 5, &len_bytes))
            return false;
        value_p->at = in->at;
    } else if (wire_type != PROTOBUF_C_WIRE_TYPE_64BIT && wire_type != PROTOBUF_C_WIRE_TYPE_32BIT) {
        return false;
    }
    if (len_bytes > (uint64_t)(in->end - in->at))
        return false;
    in->at += len_bytes;
    value_p->end = in->at;
    return true;
}

static uint32_t wire_type_of(ProtobufCType type)
{
    switch (type) {
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_BYTES:
    case PROTOBUF_C_TYPE_MESSAGE:
        return PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED;
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_SFIXED64:
    case PROTOBUF_C_TYPE_DOUBLE:
        return PROTOBUF_C_WIRE_TYPE_64BIT;
    case PROTOBUF_C_TYPE_FIXED32:
    case PROTOBUF_C_TYPE_SFIXED32:
    case PROTOBUF_C_TYPE_FLOAT:
        return PROTOBUF_C_WIRE_TYPE_32BIT;
    default:
        return PROTOBUF_C_WIRE_TYPE_VARINT;
    }
}

/* A repeated number may also come packed, and a packed one in single pieces. */
static bool wire_type_fits(const ProtobufCFieldDescriptor *field, uint32_t wire_type)
{
    return wire_type == wire_type_of(field->type) ||
           (wire_type == PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED &&
            field->label == PROTOBUF_C_LABEL_REPEATED);
}

static bool spend(uint32_t *spent, uint32_t max)
{
    return ++*spent <= max;
}

static kvc_status check_level(const ProtobufCMessageDescriptor *type, struct bytes in,
                              struct budget *budget);

static kvc_status check_value(const ProtobufCFieldDescriptor *field, struct bytes value,
                              struct budget *budget)
{
    if (field->type == PROTOBUF_C_TYPE_STRING) {
        budget->why = "a string has a NUL byte in it";
        bool has_nul =
            value.at < value.end && memchr(value.at, 0, (size_t)(value.end - value.at)) != NULL;
        return has_nul ? KVC_INVALID : KVC_OK;
    }
    if (field->type != PROTOBUF_C_TYPE_MESSAGE)
        return KVC_OK;
    budget->why = "a message has too many items";
    if (!spend(&budget->items, ITEMS_MAX))
        return KVC_INVALID;
    return check_level(field->descriptor, value, budget);
}

static kvc_status check_level(const ProtobufCMessageDescriptor *type, struct bytes in,
                              struct budget *budget)
{
    while (in.at < in.end) {
        uint64_t tag;
        struct bytes value;
        budget->why = "a nested message does not parse";
        if (!take_varint(&in, 5, &tag) || tag > UINT32_MAX || tag >> 3 == 0 ||
            !take_value(&in, (uint32_t)tag & 7, &value))
            return KVC_PROTOCOL;
        budget->why = "a message has too many fields";
        if (!spend(&budget->fields, FIELDS_MAX))
            return KVC_INVALID;
        const ProtobufCFieldDescriptor *field =
            protobuf_c_message_descriptor_get_field(type, (unsigned)(tag >> 3));
        budget->why = "a message has too many unknown fields";
        if (field == NULL && !spend(&budget->unknown, UNKNOWN_MAX))
            return KVC_INVALID;
        if (field == NULL)
            continue;
        budget->why = "a field has the wrong wire type";
        if (!wire_type_fits(field, (uint32_t)tag & 7))
            return KVC_PROTOCOL;
        kvc_status status = check_value(field, value, budget);
        if (status != KVC_OK)
            return status;
    }
    return KVC_OK;
}

kvc_status kvci_check_message(const ProtobufCMessageDescriptor *type, const uint8_t *bytes,
                              size_t len_bytes, const char **why_p)
{
    struct budget budget = {0};
    struct bytes in = {bytes, bytes + len_bytes};
    kvc_status status = check_level(type, in, &budget);
    *why_p = budget.why;
    return status;
}
