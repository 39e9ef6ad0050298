/*
 * frame.c: fixed frames <-> bytes.
 *
 * The header: magic "KVF" and version (u32), kind (u8), method (u8), flags (u16), call (u64),
 * status (u16, negated), detail_bytes (u16), retry_after_ms (u32), deadline_ns (u64), head_bytes
 * (u32), data_bytes (u32), spare (3 x u64). Encoding refuses what decoding refuses.
 */
#include "wire/frame.h"

#include <string.h>

#include "base/le.h"

#define MAGIC 0x0046564bu /* "KVF", the version in the fourth byte */

static bool carries_message(kvc_frame_kind kind)
{
    return kind == KVC_FRAME_REQUEST || kind == KVC_FRAME_MESSAGE || kind == KVC_FRAME_END;
}

static bool is_own(kvc_frame_kind kind)
{
    return kind >= KVC_FRAME_OWN_FIRST && kind <= KVC_FRAME_OWN_LAST;
}

/* What the lengths and fields of a kind may be; NULL: all is well. */
static const char *fault_of(const kvc_frame *frame)
{
    kvc_frame_kind kind = frame->kind;
    bool own = is_own(kind);
    if ((kind < KVC_FRAME_HELLO || kind > KVC_FRAME_GOAWAY) && !own)
        return "a frame of an unknown kind";
    if ((uint32_t)frame->method >= KVC_METHOD_COUNT)
        return "a frame of an unknown method";
    if ((frame->flags & ~(KVC_FRAME_LAST | KVC_FRAME_ELSEWHERE | KVC_FRAME_OWN_FLAGS)) != 0)
        return "a frame with an unknown flag";
    if (frame->status > KVC_OK || frame->status <= -KVC_STATUS_COUNT)
        return "a frame with an unknown status";
    if (frame->head_bytes > KVC_FRAME_HEAD_BYTES)
        return "a frame's header is beyond its limit";
    if (frame->detail_bytes > KVC_FRAME_DETAIL_BYTES)
        return "a frame's text is beyond its limit";
    if (frame->data_bytes > KVC_FRAME_DATA_BYTES)
        return "a frame's data is beyond its limit";
    if (frame->deadline_ns > KVC_FRAME_MAX_DEADLINE_NS)
        return "a frame's deadline is beyond its limit";
    if (!own && kind != KVC_FRAME_END &&
        (frame->status != KVC_OK || frame->detail_bytes != 0 || frame->retry_after_ms != 0))
        return "a status in a frame that is no answer";
    if (!own && !carries_message(kind) &&
        (frame->data_bytes != 0 || (frame->head_bytes != 0 && kind != KVC_FRAME_HELLO)))
        return "a body in a frame that has none";
    if ((frame->flags & KVC_FRAME_LAST) != 0 && !own && kind != KVC_FRAME_MESSAGE)
        return "the mark of the last message in a frame that is none";
    return NULL;
}

kvc_status kvc_frame_encode(const kvc_frame *frame, uint8_t out_p[KVC_FRAME_BYTES])
{
    if (fault_of(frame) != NULL)
        return KVC_INVALID;
    memset(out_p, 0, KVC_FRAME_BYTES);
    kvc_le_put(out_p, MAGIC | KVC_FRAME_VERSION << 24, 4);
    kvc_le_put(out_p + 4, (uint64_t)frame->kind, 1);
    kvc_le_put(out_p + 5, (uint64_t)frame->method, 1);
    kvc_le_put(out_p + 6, frame->flags, 2);
    kvc_le_put(out_p + 8, frame->call, 8);
    kvc_le_put(out_p + 16, (uint64_t)(-(int)frame->status), 2);
    kvc_le_put(out_p + 18, frame->detail_bytes, 2);
    kvc_le_put(out_p + 20, frame->retry_after_ms, 4);
    kvc_le_put(out_p + 24, frame->deadline_ns, 8);
    kvc_le_put(out_p + 32, frame->head_bytes, 4);
    kvc_le_put(out_p + 36, frame->data_bytes, 4);
    kvc_le_put(out_p + 40, frame->spare[0], 8);
    kvc_le_put(out_p + 48, frame->spare[1], 8);
    kvc_le_put(out_p + 56, frame->spare[2], 8);
    return KVC_OK;
}

kvc_status kvc_frame_decode(const void *in, size_t in_bytes, kvc_frame *frame_p, const char **why_p)
{
    const uint8_t *at = in;
    const char *why = NULL;
    if (in_bytes < KVC_FRAME_BYTES)
        return KVC_AGAIN;
    if (kvc_le_get(at, 4) != (MAGIC | KVC_FRAME_VERSION << 24)) {
        why = "no frame of this version";
    } else {
        *frame_p = (kvc_frame){
            .kind = (kvc_frame_kind)at[4],
            .method = (kvc_method)at[5],
            .flags = (uint32_t)kvc_le_get(at + 6, 2),
            .call = kvc_le_get(at + 8, 8),
            .status = (kvc_status)(-(int)kvc_le_get(at + 16, 2)),
            .detail_bytes = (uint32_t)kvc_le_get(at + 18, 2),
            .retry_after_ms = (uint32_t)kvc_le_get(at + 20, 4),
            .deadline_ns = kvc_le_get(at + 24, 8),
            .head_bytes = (uint32_t)kvc_le_get(at + 32, 4),
            .data_bytes = (uint32_t)kvc_le_get(at + 36, 4),
            .spare = {kvc_le_get(at + 40, 8), kvc_le_get(at + 48, 8), kvc_le_get(at + 56, 8)},
        };
        why = fault_of(frame_p);
    }
    if (why_p != NULL)
        *why_p = why;
    return why == NULL ? KVC_OK : KVC_PROTOCOL;
}

size_t kvc_frame_body_bytes(const kvc_frame *frame)
{
    bool here = (frame->flags & KVC_FRAME_ELSEWHERE) == 0;
    return (size_t)frame->head_bytes + frame->detail_bytes + (here ? frame->data_bytes : 0);
}

void kvc_hello_encode(const kvc_hello *hello, uint8_t out_p[KVC_HELLO_BYTES])
{
    memset(out_p, 0, KVC_HELLO_BYTES);
    kvc_le_put(out_p, hello->version, 4);
    kvc_le_put(out_p + 4, hello->max_message_bytes, 4);
    kvc_le_put(out_p + 8, hello->max_calls, 4);
    kvc_le_put(out_p + 12, hello->flags, 4);
    for (uint32_t i = 0; i < 4; i++)
        kvc_le_put(out_p + 16 + 8 * (size_t)i, hello->spare[i], 8);
    kvc_le_put(out_p + 48, hello->boot_id, 8);
}

kvc_status kvc_hello_decode(const void *in, size_t in_bytes, kvc_hello *hello_p)
{
    const uint8_t *at = in;
    if (in_bytes < KVC_HELLO_BYTES || kvc_le_get(at, 4) == 0)
        return KVC_PROTOCOL;
    *hello_p = (kvc_hello){
        .version = (uint32_t)kvc_le_get(at, 4),
        .max_message_bytes = (uint32_t)kvc_le_get(at + 4, 4),
        .max_calls = (uint32_t)kvc_le_get(at + 8, 4),
        .flags = (uint32_t)kvc_le_get(at + 12, 4),
        .boot_id = kvc_le_get(at + 48, 8),
    };
    for (uint32_t i = 0; i < 4; i++)
        hello_p->spare[i] = kvc_le_get(at + 16 + 8 * (size_t)i, 8);
    return KVC_OK;
}
