/*
 * recv.c: fragments put together to frames.
 *
 * The loop's thread, mutex free. A frame that came in one fragment is looked at where it lies; a
 * longer one is put together first, one at a time on a link, so a peer costs the memory of one
 * frame at most. Every length is the peer's word and checked.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/le.h"
#include "base/log.h"
#include "rdma_internal.h"

static bool refuse(const char *why)
{
    KVC_LOG_WARN(RDMA, "a peer broke the protocol: %s", why);
    return false;
}

/* The first fragment of a frame. */
static bool begin_frame(kvtr_link *link, uint8_t *bytes, size_t len_bytes)
{
    const char *why = NULL;
    if (kvc_frame_decode(bytes, len_bytes, &link->frame, &why) != KVC_OK)
        return refuse(why == NULL ? "a frame that is cut off" : why);
    size_t body_bytes = kvc_frame_body_bytes(&link->frame);
    size_t here_bytes = len_bytes - KVC_FRAME_BYTES;
    if (here_bytes > body_bytes)
        return refuse("more bytes than its frame says");
    if (here_bytes == body_bytes)
        return link->loop->owner->on_frame(link, &link->frame, bytes + KVC_FRAME_BYTES);
    link->partial = malloc(body_bytes);
    if (link->partial == NULL)
        return false;
    memcpy(link->partial, bytes + KVC_FRAME_BYTES, here_bytes);
    link->partial_bytes = here_bytes;
    link->partial_len_bytes = body_bytes;
    return true;
}

static bool go_on(kvtr_link *link, const uint8_t *bytes, size_t len_bytes)
{
    if (len_bytes > link->partial_len_bytes - link->partial_bytes)
        return refuse("more bytes than its frame says");
    memcpy(link->partial + link->partial_bytes, bytes, len_bytes);
    link->partial_bytes += len_bytes;
    if (link->partial_bytes < link->partial_len_bytes)
        return true;
    uint8_t *body = link->partial;
    link->partial = NULL;
    bool ok = link->loop->owner->on_frame(link, &link->frame, body);
    free(body);
    return ok;
}

bool kvtr_take_fragment(kvtr_link *link, uint8_t *bytes, uint32_t len_bytes)
{
    if (len_bytes < KVTI_ENV_BYTES ||
        (uint32_t)kvc_le_get(bytes, 4) != len_bytes - KVTI_ENV_BYTES || bytes[6] != 0 ||
        bytes[7] != 0)
        return refuse("an envelope that does not fit");
    uint32_t given = bytes[4] | (uint32_t)bytes[5] << 8;
    kvc_mutex_lock(&link->loop->mutex);
    link->heard_ns = kvc_now_ns();
    link->spoken = true;
    link->credits += given;
    bool sane = link->credits <= UINT16_MAX;
    kvtr_pump(link);
    kvc_mutex_unlock(&link->loop->mutex);
    if (!sane)
        return refuse("more credits than there are receives");
    len_bytes -= KVTI_ENV_BYTES;
    if (len_bytes == 0)
        return true;
    bytes += KVTI_ENV_BYTES;
    return link->partial == NULL ? begin_frame(link, bytes, len_bytes)
                                 : go_on(link, bytes, len_bytes);
}
