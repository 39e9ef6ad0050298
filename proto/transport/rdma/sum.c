/*
 * sum.c: the sum that goes with a frame where the client asked for it.
 *
 * XXH3-64, chained: of the data, wherever it is; seeded with that, of header and text; seeded with
 * that, of the frame itself, whose field for the sum is 0 then. Pure, any thread.
 */
#include "base/sum.h"

#include "base/assert.h"
#include "base/log.h"
#include "base/metrics.h"
#include "rdma_internal.h"

uint64_t kvtr_frame_sum(const kvc_frame *frame, const void *head, uint64_t data_sum)
{
    uint8_t bytes[KVC_FRAME_BYTES];
    kvc_frame bare = *frame;
    size_t head_bytes = (size_t)frame->head_bytes + frame->detail_bytes;
    bare.spare[2] = 0;
    kvc_status status = kvc_frame_encode(&bare, bytes);
    KVC_ASSERT(status == KVC_OK); /* it was encoded, or decoded, before */
    uint64_t sum = head_bytes == 0 ? data_sum : kvc_seeded_sum(head, head_bytes, data_sum);
    return kvc_seeded_sum(bytes, sizeof(bytes), sum);
}

kvc_status kvtr_check_sum(const kvc_frame *frame, const void *head, const struct iovec *data,
                          uint32_t n_data, const char **why_p)
{
    if ((frame->flags & KVTI_SUMMED) == 0 ||
        kvtr_frame_sum(frame, head, kvc_pieces_sum(data, n_data)) == frame->spare[2])
        return KVC_OK;
    KVC_COUNT(rdma_sums_wrong);
    KVC_LOG_WARN(RDMA, "the bytes of a %s message are not those that were summed",
                 kvc_method_name(frame->method));
    *why_p = "the message's bytes do not match their sum";
    return KVC_CORRUPT;
}
