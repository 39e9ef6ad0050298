/*
 * encode.c: packing, and helpers for building protobuf-c structs that borrow.
 *
 * Pure, any thread. The structs built for packing live in the arena or on the stack and borrow
 * the caller's arrays; protobuf-c only reads them.
 */
#include "wire_internal.h"

static uint8_t *put_varint(uint8_t *at, uint64_t value)
{
    while (value >= 0x80) {
        *at++ = (uint8_t)(value | 0x80);
        value >>= 7;
    }
    *at++ = (uint8_t)value;
    return at;
}

kvc_status kvci_pack(const ProtobufCMessage *msg, uint64_t data_bytes, kvc_arena *arena,
                     const void **head_p, size_t *head_bytes_p)
{
    size_t len_bytes = protobuf_c_message_get_packed_size(msg);
    if (len_bytes > KVC_MAX_HEADER_BYTES)
        return KVC_INVALID;
    uint8_t *head = kvc_arena_alloc(arena, len_bytes + KVCI_TAIL_BYTES_MAX);
    if (head == NULL)
        return KVC_NO_MEMORY;
    uint8_t *end = head + protobuf_c_message_pack(msg, head);
    if (data_bytes > 0) {
        *end++ = (uint8_t)(KVCI_BULK_FIELD << 3 | PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED);
        end = put_varint(end, data_bytes);
    }
    *head_p = head;
    *head_bytes_p = (size_t)(end - head);
    return KVC_OK;
}

kvc_status kvci_put(const kvci_out *out, const ProtobufCMessage *msg, uint64_t data_bytes)
{
    return kvci_pack(msg, data_bytes, out->arena, out->head_p, out->head_bytes_p);
}

ProtobufCBinaryData kvci_put_digest(const kvc_digest *digest)
{
    return kvci_put_digests(digest, 1);
}

ProtobufCBinaryData kvci_put_digests(const kvc_digest *digests, uint32_t n)
{
    return (ProtobufCBinaryData){
        .len = (size_t)n * KVC_DIGEST_BYTES,
        .data = (uint8_t *)(uintptr_t)digests,
    };
}

char *kvci_put_text(const char *text)
{
    return (char *)(uintptr_t)(text == NULL ? "" : text);
}

bool kvci_data_fits(const struct iovec *data, uint32_t n_data, uint64_t data_bytes)
{
    uint64_t sum_bytes = 0;
    for (uint32_t i = 0; data != NULL && i < n_data; i++)
        sum_bytes += data[i].iov_len;
    return data_bytes <= KVC_MAX_VALUE_BYTES && (data == NULL || sum_bytes == data_bytes);
}
