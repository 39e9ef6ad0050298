/*
 * recv.c: fragments put together to frames.
 *
 * The loop's thread, mutex free. A frame that came in one fragment is looked at where it lies; a
 * longer one is put together first, one at a time on a link. What its header says is the owner's to
 * admit before a byte of the body is kept. Every length is the peer's word and checked.
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
    const kvtr_owner *owner = link->loop->owner;
    kvtr_begun *begun = &link->begun;
    const char *why = NULL;
    bool keep = true;
    if (kvc_frame_decode(bytes, len_bytes, &link->frame, &why) != KVC_OK)
        return refuse(why == NULL ? "a frame that is cut off" : why);
    size_t body_bytes = kvc_frame_body_bytes(&link->frame);
    size_t here_bytes = len_bytes - KVC_FRAME_BYTES;
    if (here_bytes > body_bytes)
        return refuse("more bytes than its frame says");
    *begun = (kvtr_begun){.body_bytes = body_bytes, .got_bytes = here_bytes};
    if (!owner->on_begin(link, &link->frame, &keep))
        return refuse("a frame that may not come now");
    if (here_bytes == body_bytes)
        return owner->on_frame(link, &link->frame, keep ? bytes + KVC_FRAME_BYTES : NULL);
    begun->in_body = true;
    if (!keep)
        return true;
    begun->body = malloc(body_bytes);
    if (begun->body == NULL)
        return false;
    memcpy(begun->body, bytes + KVC_FRAME_BYTES, here_bytes);
    return true;
}

static bool go_on(kvtr_link *link, const uint8_t *bytes, size_t len_bytes)
{
    kvtr_begun *begun = &link->begun;
    if (len_bytes > begun->body_bytes - begun->got_bytes)
        return refuse("more bytes than its frame says");
    if (begun->body != NULL)
        memcpy(begun->body + begun->got_bytes, bytes, len_bytes);
    begun->got_bytes += len_bytes;
    if (begun->got_bytes < begun->body_bytes)
        return true;
    begun->in_body = false;
    bool ok = link->loop->owner->on_frame(link, &link->frame, begun->body);
    free(begun->body);
    begun->body = NULL;
    return ok;
}

uint8_t *kvtr_take_body(kvtr_link *link, const uint8_t *body)
{
    kvtr_begun *begun = &link->begun;
    uint8_t *own = begun->body;
    if (own != NULL) {
        begun->body = NULL;
        return own;
    }
    own = malloc(begun->body_bytes + 1);
    if (own != NULL && begun->body_bytes > 0)
        memcpy(own, body, begun->body_bytes);
    return own;
}

/* With the mutex held: the fragment was granted, and what it gives is sane. */
static const char *count_credits(kvtr_link *link, uint32_t given)
{
    if (link->granted == 0)
        return "more fragments than it was granted";
    link->granted--;
    if (given > KVTI_MAX_CREDITS - link->credits)
        return "more credits than there are receives";
    link->credits += given;
    kvtr_pump(link);
    return NULL;
}

bool kvtr_take_fragment(kvtr_link *link, uint8_t *bytes, uint32_t len_bytes)
{
    if (len_bytes < KVTI_ENV_BYTES ||
        (uint32_t)kvc_le_get(bytes, 4) != len_bytes - KVTI_ENV_BYTES || bytes[6] != 0 ||
        bytes[7] != 0)
        return refuse("an envelope that does not fit");
    kvc_mutex_lock(&link->loop->mutex);
    link->heard_ns = kvc_now_ns();
    link->spoken = true;
    const char *why = count_credits(link, (uint32_t)kvc_le_get(bytes + 4, 2));
    kvc_mutex_unlock(&link->loop->mutex);
    if (why != NULL)
        return refuse(why);
    len_bytes -= KVTI_ENV_BYTES;
    if (len_bytes == 0)
        return true;
    bytes += KVTI_ENV_BYTES;
    return link->begun.in_body ? go_on(link, bytes, len_bytes)
                               : begin_frame(link, bytes, len_bytes);
}
