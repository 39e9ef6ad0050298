/*
 * decode.c: the way from received bytes to protobuf-c structs, and helpers for converting those.
 *
 * Pure, any thread. protobuf-c allocates from the arena and never frees; its structs, and the
 * arrays that the plain structs borrow from them, live as long as the arena.
 */
#include <string.h>

#include "wire_internal.h"

struct alloc_state {
    kvc_arena *arena;
    bool out_of_memory;
};

static void *arena_alloc(void *arg, size_t size_bytes)
{
    struct alloc_state *state = arg;
    void *piece = kvc_arena_alloc(state->arena, size_bytes);
    if (piece == NULL)
        state->out_of_memory = true;
    return piece;
}

static void arena_free(void *arg, void *piece)
{
    (void)arg;
    (void)piece;
}

kvc_status kvci_unpack(const ProtobufCMessageDescriptor *type, const struct iovec *in,
                       uint32_t n_in, kvc_arena *arena, kvci_split *split_p,
                       ProtobufCMessage **msg_p, const char **why_p)
{
    *msg_p = NULL;
    kvc_status status = kvci_split_message(type, in, n_in, arena, split_p, why_p);
    if (status == KVC_OK)
        status = kvci_check_message(type, split_p->head, split_p->head_bytes, why_p);
    if (status != KVC_OK)
        return status;
    struct alloc_state state = {.arena = arena};
    ProtobufCAllocator allocator = {
        .alloc = arena_alloc,
        .free = arena_free,
        .allocator_data = &state,
    };
    *msg_p = protobuf_c_message_unpack(type, &allocator, split_p->head_bytes, split_p->head);
    if (*msg_p != NULL)
        return KVC_OK;
    *why_p = state.out_of_memory ? "memory for one message is out" : "the message does not parse";
    return state.out_of_memory ? KVC_NO_MEMORY : KVC_PROTOCOL;
}

kvc_status kvci_get_digest(const ProtobufCBinaryData *bytes, kvc_digest *digest_p)
{
    if (bytes->len != KVC_DIGEST_BYTES)
        return KVC_INVALID;
    memcpy(digest_p->bytes, bytes->data, KVC_DIGEST_BYTES);
    return KVC_OK;
}

kvc_status kvci_get_digests(const ProtobufCBinaryData *bytes, uint32_t *n_p,
                            const kvc_digest **digests_p)
{
    _Static_assert(sizeof(kvc_digest) == KVC_DIGEST_BYTES, "digests are borrowed as an array");
    size_t n = bytes->len / KVC_DIGEST_BYTES;
    if (bytes->len % KVC_DIGEST_BYTES != 0 || n > KVC_MAX_DIGESTS)
        return KVC_INVALID;
    *n_p = (uint32_t)n;
    *digests_p = (const kvc_digest *)bytes->data;
    return KVC_OK;
}

bool kvci_fits(const char *text, size_t max_bytes)
{
    return strnlen(text, max_bytes + 1) <= max_bytes;
}
