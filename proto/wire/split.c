/*
 * split.c: walks a message's top-level tags over scattered input.
 *
 * Pure, any thread. Two walks: the first finds where the bulk field lies and how long the rest is,
 * the second copies the rest into one piece. A tag, varint or length may straddle pieces. The
 * input is never written and never copied where it is bulk.
 */
#include <string.h>

#include "wire_internal.h"

#define VARINT_BYTES_MAX 10u
#define TAG_BYTES_MAX    5u /* also of a length: protobuf-c reads no longer ones */

/* A place in scattered input. left_bytes counts to the end of the input. */
struct cursor {
    const struct iovec *in;
    size_t off_bytes; /* within *in */
    uint64_t left_bytes;
};

/* One top-level field: where it begins, and where its value does. */
struct field {
    uint32_t number, wire_type;
    struct cursor start;
    uint64_t total_bytes; /* tag, length and value */
    uint64_t value_bytes;
};

static struct cursor cursor_at(const struct iovec *in, uint32_t n_in)
{
    struct cursor at = {.in = in};
    for (uint32_t i = 0; i < n_in; i++)
        at.left_bytes += in[i].iov_len;
    return at;
}

/* The piece that holds the next byte, at most want bytes of it. want and left are not 0. */
static struct iovec cursor_piece(struct cursor *at, uint64_t want_bytes)
{
    while (at->off_bytes == at->in->iov_len) {
        at->in++;
        at->off_bytes = 0;
    }
    size_t have_bytes = at->in->iov_len - at->off_bytes;
    return (struct iovec){
        .iov_base = (uint8_t *)at->in->iov_base + at->off_bytes,
        .iov_len = want_bytes < have_bytes ? (size_t)want_bytes : have_bytes,
    };
}

static void cursor_move(struct cursor *at, size_t n_bytes)
{
    at->off_bytes += n_bytes;
    at->left_bytes -= n_bytes;
}

/* Moves on by n_bytes <= left_bytes; dst gets them unless it is NULL. */
static void cursor_take(struct cursor *at, uint8_t *dst, uint64_t n_bytes)
{
    while (n_bytes > 0) {
        struct iovec piece = cursor_piece(at, n_bytes);
        if (dst != NULL) {
            memcpy(dst, piece.iov_base, piece.iov_len);
            dst += piece.iov_len;
        }
        cursor_move(at, piece.iov_len);
        n_bytes -= piece.iov_len;
    }
}

static bool cursor_varint(struct cursor *at, uint32_t max_bytes, uint64_t *value_p)
{
    uint64_t value = 0;
    for (uint32_t i = 0; i < max_bytes && at->left_bytes > 0; i++) {
        uint8_t byte;
        cursor_take(at, &byte, 1);
        value |= (uint64_t)(byte & 0x7f) << (7 * i);
        if ((byte & 0x80) == 0) {
            *value_p = value;
            return true;
        }
    }
    return false;
}

/* Length of a value of this wire type, past its length prefix. */
static const char *value_length(struct cursor *at, uint32_t wire_type, uint64_t *len_bytes_p)
{
    struct cursor ahead = *at;
    uint64_t value;
    switch (wire_type) {
    case PROTOBUF_C_WIRE_TYPE_VARINT:
        if (!cursor_varint(&ahead, VARINT_BYTES_MAX, &value))
            return "a varint is cut off or too long";
        *len_bytes_p = at->left_bytes - ahead.left_bytes;
        return NULL;
    case PROTOBUF_C_WIRE_TYPE_64BIT:
        *len_bytes_p = 8;
        return NULL;
    case PROTOBUF_C_WIRE_TYPE_32BIT:
        *len_bytes_p = 4;
        return NULL;
    case PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED:
        if (!cursor_varint(at, TAG_BYTES_MAX, len_bytes_p))
            return "a length is cut off or too long";
        return NULL;
    default:
        return "groups are not supported";
    }
}

/* Reads the field at *at and moves past it. Gives the fault as text, or NULL. */
static const char *next_field(struct cursor *at, struct field *field_p)
{
    uint64_t tag;
    field_p->start = *at;
    if (!cursor_varint(at, TAG_BYTES_MAX, &tag) || tag > UINT32_MAX)
        return "a tag is cut off or too long";
    field_p->number = (uint32_t)tag >> 3;
    field_p->wire_type = (uint32_t)tag & 7;
    if (field_p->number == 0)
        return "a tag has field number 0";
    const char *why = value_length(at, field_p->wire_type, &field_p->value_bytes);
    if (why != NULL)
        return why;
    if (field_p->value_bytes > at->left_bytes)
        return "a length goes beyond the message";
    cursor_take(at, NULL, field_p->value_bytes);
    field_p->total_bytes = field_p->start.left_bytes - at->left_bytes;
    return NULL;
}

static bool has_bulk(const ProtobufCMessageDescriptor *type)
{
    const ProtobufCFieldDescriptor *field =
        protobuf_c_message_descriptor_get_field(type, KVCI_BULK_FIELD);
    return field != NULL && field->type == PROTOBUF_C_TYPE_BYTES;
}

/* What one walk does with a field. */
enum fate { DROP, HEADER, BULK };

static enum fate fate_of(const ProtobufCMessageDescriptor *type, const struct field *field)
{
    if (protobuf_c_message_descriptor_get_field(type, field->number) == NULL)
        return DROP;
    return field->number == KVCI_BULK_FIELD && has_bulk(type) ? BULK : HEADER;
}

/* First walk: header length and the last bulk field (its value_bytes 0 if there is none). */
static kvc_status measure(const ProtobufCMessageDescriptor *type, struct cursor at,
                          uint64_t *head_bytes_p, struct field *bulk_p, const char **why_p)
{
    *head_bytes_p = 0;
    bulk_p->value_bytes = 0;
    while (at.left_bytes > 0) {
        struct field field;
        *why_p = next_field(&at, &field);
        if (*why_p != NULL)
            return KVC_PROTOCOL;
        enum fate fate = fate_of(type, &field);
        if (fate == HEADER)
            *head_bytes_p += field.total_bytes;
        if (fate != BULK)
            continue;
        *why_p = "the field data is not of type bytes";
        if (field.wire_type != PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED)
            return KVC_PROTOCOL;
        *bulk_p = field;
    }
    *why_p = "the message without its data is longer than max_header_bytes";
    if (*head_bytes_p > KVC_MAX_HEADER_BYTES)
        return KVC_INVALID;
    *why_p = "the message's data is longer than max_value_bytes";
    return bulk_p->value_bytes > KVC_MAX_VALUE_BYTES ? KVC_INVALID : KVC_OK;
}

/* Second walk. The first one has seen that every field is whole. */
static void copy_header(const ProtobufCMessageDescriptor *type, struct cursor at, uint8_t *dst)
{
    while (at.left_bytes > 0) {
        struct field field;
        if (next_field(&at, &field) != NULL)
            return;
        if (fate_of(type, &field) != HEADER)
            continue;
        cursor_take(&field.start, dst, field.total_bytes);
        dst += field.total_bytes;
    }
}

/* Lists the pieces of a bulk field's value. */
static kvc_status list_bulk(const struct field *bulk, kvc_arena *arena, kvci_split *split_p)
{
    if (bulk->value_bytes == 0)
        return KVC_OK;
    struct cursor first = bulk->start;
    cursor_take(&first, NULL, bulk->total_bytes - bulk->value_bytes);
    uint32_t n_pieces = 0;
    struct cursor at = first;
    for (uint64_t left_bytes = bulk->value_bytes; left_bytes > 0; n_pieces++) {
        struct iovec piece = cursor_piece(&at, left_bytes);
        cursor_move(&at, piece.iov_len);
        left_bytes -= piece.iov_len;
    }
    split_p->data = kvc_arena_alloc(arena, n_pieces * sizeof(*split_p->data));
    if (split_p->data == NULL)
        return KVC_NO_MEMORY;
    at = first;
    for (uint64_t left_bytes = bulk->value_bytes; left_bytes > 0;) {
        struct iovec piece = cursor_piece(&at, left_bytes);
        cursor_move(&at, piece.iov_len);
        left_bytes -= piece.iov_len;
        split_p->data[split_p->n_data++] = piece;
    }
    split_p->data_bytes = bulk->value_bytes;
    return KVC_OK;
}

kvc_status kvci_split_message(const ProtobufCMessageDescriptor *type, const struct iovec *in,
                              uint32_t n_in, kvc_arena *arena, kvci_split *split_p,
                              const char **why_p)
{
    *split_p = (kvci_split){0};
    struct cursor at = cursor_at(in, n_in);
    struct field bulk;
    uint64_t head_bytes;
    kvc_status status = measure(type, at, &head_bytes, &bulk, why_p);
    if (status != KVC_OK)
        return status;
    *why_p = "memory for one message is out";
    split_p->head = kvc_arena_alloc(arena, head_bytes);
    if (split_p->head == NULL)
        return KVC_NO_MEMORY;
    split_p->head_bytes = head_bytes;
    copy_header(type, at, split_p->head);
    return list_bulk(&bulk, arena, split_p);
}
