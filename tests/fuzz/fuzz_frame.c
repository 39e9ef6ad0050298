/*
 * fuzz_frame.c: any bytes as a row of frames, as a stream transport would cut them.
 *
 * What decodes is within the limits and encodes again to the same bytes.
 */
#include "fuzz.h"

#include <string.h>

#include "wire/frame.h"

static void require(int holds)
{
    if (!holds)
        __builtin_trap();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    size_t at = 0;
    kvc_frame frame;
    kvc_hello hello;
    uint8_t again[KVC_FRAME_BYTES];
    while (kvc_frame_decode(data + at, size - at, &frame, NULL) == KVC_OK) {
        require(kvc_frame_encode(&frame, again) == KVC_OK);
        require(memcmp(again, data + at, sizeof(again)) == 0);
        at += KVC_FRAME_BYTES;
        size_t body_bytes = kvc_frame_body_bytes(&frame);
        if (body_bytes > size - at)
            break;
        if (frame.kind == KVC_FRAME_HELLO &&
            kvc_hello_decode(data + at, frame.head_bytes, &hello) == KVC_OK)
            require(frame.head_bytes >= KVC_HELLO_BYTES && hello.version > 0);
        at += body_bytes;
    }
    require(at <= size);
    return 0;
}
