/*
 * fuzz_wire.c: any bytes through the decoders, as one piece and scattered.
 *
 * Two properties, besides what the sanitizers see: scattering changes nothing; what decodes
 * encodes again, to the same header. FUZZ_SIDES chooses the decoder: 1 requests, 2 replies, 3 both.
 */
#include "fuzz.h"

#include <stdlib.h>
#include <string.h>

#include "base/arena.h"
#include "wire/wire.h"
#include "wire_input.h"

#define ARENA_BYTES (16u << 20)
#define PIECES_MAX  8192u

static void require(int holds)
{
    if (!holds)
        __builtin_trap();
}

/* Cuts message [len] into pieces of cut bytes; every piece is memory of its own. */
static uint32_t scatter(const uint8_t *message, size_t len, size_t cut, struct iovec *pieces)
{
    uint32_t n = 0;
    for (size_t at = 0; at < len && n < PIECES_MAX;) {
        size_t take = len - at < cut ? len - at : cut;
        if (n == PIECES_MAX - 1)
            take = len - at;
        pieces[n].iov_base = malloc(take);
        pieces[n].iov_len = take;
        require(pieces[n].iov_base != NULL);
        memcpy(pieces[n].iov_base, message + at, take);
        at += take;
        n++;
    }
    return n;
}

/* Decodes, and encodes what came out into out. The header's length, or 0 where it was refused. */
static size_t turn_request(kvc_method method, const struct iovec *in, uint32_t n_in,
                           kvc_status *status_p, kvc_arena *arena, const void **head_p)
{
    kvc_request req;
    size_t head_bytes;
    const char *why = NULL;
    *status_p = kvc_wire_decode_request(method, in, n_in, arena, &req, &why);
    require((*status_p == KVC_OK) == (why == NULL));
    if (*status_p != KVC_OK)
        return 0;
    require(kvc_wire_encode_request(&req, arena, head_p, &head_bytes) == KVC_OK);
    return head_bytes;
}

static size_t turn_reply(kvc_method method, const struct iovec *in, uint32_t n_in,
                         kvc_status *status_p, kvc_arena *arena, const void **head_p)
{
    kvc_reply reply;
    size_t head_bytes;
    const char *why = NULL;
    *status_p = kvc_wire_decode_reply(method, in, n_in, arena, &reply, &why);
    require((*status_p == KVC_OK) == (why == NULL));
    if (*status_p != KVC_OK)
        return 0;
    require(kvc_wire_encode_reply(&reply, arena, head_p, &head_bytes) == KVC_OK);
    return head_bytes;
}

typedef size_t turn_fn(kvc_method method, const struct iovec *in, uint32_t n_in,
                       kvc_status *status_p, kvc_arena *arena, const void **head_p);

static void try_input(turn_fn *turn, kvc_method method, const uint8_t *message, size_t len,
                      size_t cut)
{
    static struct iovec pieces[PIECES_MAX];
    kvc_arena arena[2];
    kvc_status status[2];
    const void *head[2];
    size_t head_bytes[2];
    struct iovec whole = {(void *)(uintptr_t)message, len};
    uint32_t n = scatter(message, len, cut, pieces);
    for (int i = 0; i < 2; i++)
        kvc_arena_init(&arena[i], ARENA_BYTES);
    head_bytes[0] = turn(method, &whole, 1, &status[0], &arena[0], &head[0]);
    head_bytes[1] = turn(method, pieces, n, &status[1], &arena[1], &head[1]);
    require(status[0] == status[1]);
    if (status[0] == KVC_OK) {
        require(head_bytes[0] == head_bytes[1]);
        require(memcmp(head[0], head[1], head_bytes[0]) == 0);
    }
    for (uint32_t i = 0; i < n; i++)
        free(pieces[i].iov_base);
    for (int i = 0; i < 2; i++)
        kvc_arena_reset(&arena[i]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < WIRE_INPUT_HEAD_BYTES)
        return 0;
    kvc_method method = (kvc_method)(data[0] % KVC_METHOD_COUNT);
    size_t cut = data[1] == 0 ? size : data[1];
    const uint8_t *message = data + WIRE_INPUT_HEAD_BYTES;
    size_t len = size - WIRE_INPUT_HEAD_BYTES;
    if ((FUZZ_SIDES & 1) != 0)
        try_input(turn_request, method, message, len, cut);
    if ((FUZZ_SIDES & 2) != 0)
        try_input(turn_reply, method, message, len, cut);
    return 0;
}
