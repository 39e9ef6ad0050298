/*
 * frame_test.c: fixed frames and hellos, there and back; every field at and beyond its limit.
 *
 * Single thread. Inputs are malloc'd at exactly their length, so that a read past it shows under
 * the address sanitizer.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "wire/frame.h"

static kvc_frame full_frame(void)
{
    return (kvc_frame){
        .kind = KVC_FRAME_END,
        .method = KVC_FETCH_ROWS,
        .flags = KVC_FRAME_ELSEWHERE | 0x4200u,
        .status = KVC_DENIED,
        .call = 0x1122334455667788u,
        .deadline_ns = KVC_FRAME_MAX_DEADLINE_NS,
        .retry_after_ms = 0xfffffffeu,
        .head_bytes = KVC_FRAME_HEAD_BYTES,
        .detail_bytes = KVC_FRAME_DETAIL_BYTES,
        .data_bytes = KVC_FRAME_DATA_BYTES,
        .spare = {UINT64_MAX, 0x0102030405060708u, 0x1112131415161718u},
    };
}

static kvc_status decode(const uint8_t *bytes, size_t n_bytes, kvc_frame *frame_p)
{
    const char *why;
    uint8_t *copy = malloc(n_bytes + (n_bytes == 0));
    assert_non_null(copy);
    memcpy(copy, bytes, n_bytes);
    kvc_status status = kvc_frame_decode(copy, n_bytes, frame_p, &why);
    if (status == KVC_PROTOCOL)
        assert_non_null(why);
    free(copy);
    return status;
}

static void frames_come_back_as_they_were(void **state)
{
    (void)state;
    uint8_t bytes[KVC_FRAME_BYTES];
    kvc_frame frame = full_frame(), got;
    assert_int_equal(kvc_frame_encode(&frame, bytes), KVC_OK);
    assert_int_equal(decode(bytes, sizeof(bytes), &got), KVC_OK);
    assert_int_equal(got.kind, frame.kind);
    assert_int_equal(got.method, frame.method);
    assert_int_equal(got.flags, frame.flags);
    assert_int_equal(got.status, frame.status);
    assert_true(got.call == frame.call);
    assert_true(got.deadline_ns == frame.deadline_ns);
    assert_int_equal(got.retry_after_ms, frame.retry_after_ms);
    assert_int_equal(got.head_bytes, frame.head_bytes);
    assert_int_equal(got.detail_bytes, frame.detail_bytes);
    assert_int_equal(got.data_bytes, frame.data_bytes);
    assert_memory_equal(got.spare, frame.spare, sizeof(got.spare));
    assert_int_equal(kvc_frame_body_bytes(&got), KVC_FRAME_HEAD_BYTES + KVC_FRAME_DETAIL_BYTES);
    got.flags = 0;
    assert_int_equal(kvc_frame_body_bytes(&got),
                     KVC_FRAME_HEAD_BYTES + KVC_FRAME_DETAIL_BYTES + KVC_FRAME_DATA_BYTES);
}

/* The bytes themselves: another language, or the other end of another build, reads the same. */
static void the_layout_is_fixed(void **state)
{
    (void)state;
    static const uint8_t want[KVC_FRAME_BYTES] = {
        'K', 'V', 'F', 1, 2, KVC_FETCH_ROWS,
        0,   0, /* magic, version, kind, method, flags */
        7,   0,   0,   0, 0, 0,
        0,   0, /* call */
        0,   0,   0,   0, 0, 0,
        0,   0, /* status, detail_bytes, retry_after_ms */
        16,  39,  0,   0, 0, 0,
        0,   0, /* deadline_ns */
        5,   0,   0,   0, 0, 1,
        0,   0, /* head_bytes, data_bytes */
        1,   0,   0,   0, 0, 0,
        0,   0, /* spare */
        2,   0,   0,   0, 0, 0,
        0,   0,
    };
    uint8_t bytes[KVC_FRAME_BYTES];
    kvc_frame frame = {.kind = KVC_FRAME_REQUEST,
                       .method = KVC_FETCH_ROWS,
                       .call = 7,
                       .deadline_ns = 10000,
                       .head_bytes = 5,
                       .data_bytes = 256,
                       .spare = {1, 2}};
    assert_int_equal(kvc_frame_encode(&frame, bytes), KVC_OK);
    assert_memory_equal(bytes, want, sizeof(want));
}

static void short_input_waits_for_more(void **state)
{
    (void)state;
    uint8_t bytes[KVC_FRAME_BYTES];
    kvc_frame frame = full_frame(), got;
    assert_int_equal(kvc_frame_encode(&frame, bytes), KVC_OK);
    for (size_t n = 0; n < sizeof(bytes); n++)
        assert_int_equal(decode(bytes, n, &got), KVC_AGAIN);
}

static void refused(kvc_frame frame)
{
    uint8_t bytes[KVC_FRAME_BYTES];
    assert_int_equal(kvc_frame_encode(&frame, bytes), KVC_INVALID);
}

static void fields_beyond_their_limits_are_refused(void **state)
{
    (void)state;
    kvc_frame frame;
#define REFUSED(field, value)                                                                      \
    do {                                                                                           \
        frame = full_frame();                                                                      \
        frame.field = (value);                                                                     \
        refused(frame);                                                                            \
    } while (0)
    REFUSED(kind, (kvc_frame_kind)0);
    REFUSED(kind, (kvc_frame_kind)(KVC_FRAME_GOAWAY + 1));
    REFUSED(kind, (kvc_frame_kind)(KVC_FRAME_OWN_LAST + 1));
    REFUSED(method, KVC_METHOD_COUNT);
    REFUSED(flags, 4u);
    REFUSED(flags, 0x10000u);
    REFUSED(flags, KVC_FRAME_LAST);
    REFUSED(status, (kvc_status)1);
    REFUSED(status, (kvc_status)-KVC_STATUS_COUNT);
    REFUSED(head_bytes, KVC_FRAME_HEAD_BYTES + 1);
    REFUSED(detail_bytes, KVC_FRAME_DETAIL_BYTES + 1);
    REFUSED(data_bytes, KVC_FRAME_DATA_BYTES + 1);
    REFUSED(deadline_ns, KVC_FRAME_MAX_DEADLINE_NS + 1);
    REFUSED(kind, KVC_FRAME_REQUEST); /* with a status and a text */
#undef REFUSED
    refused((kvc_frame){.kind = KVC_FRAME_CREDIT, .data_bytes = 1});
    refused((kvc_frame){.kind = KVC_FRAME_CANCEL, .head_bytes = 1});
    refused((kvc_frame){.kind = KVC_FRAME_REQUEST, .retry_after_ms = 1});
}

/* The same on the way in, where bytes are the peer's; each is one change of a good frame. */
static void bad_bytes_are_refused(void **state)
{
    (void)state;
    static const struct {
        uint8_t at, value;
    } changes[] = {{0, 0},  {3, 2},   {4, 0},  {4, 8},  {4, 128},   {5, KVC_METHOD_COUNT},
                   {6, 4},  {16, 18}, {17, 1}, {18, 1}, {31, 0xff}, {35, 1},
                   {39, 1}, {20, 1},  {1, 0}};
    uint8_t bytes[KVC_FRAME_BYTES];
    kvc_frame got, frame = {.kind = KVC_FRAME_REQUEST, .method = KVC_STATS, .call = 1};
    for (size_t i = 0; i < sizeof(changes) / sizeof(changes[0]); i++) {
        assert_int_equal(kvc_frame_encode(&frame, bytes), KVC_OK);
        bytes[changes[i].at] = changes[i].value;
        assert_int_equal(decode(bytes, sizeof(bytes), &got), KVC_PROTOCOL);
    }
    frame.kind = KVC_FRAME_OWN_FIRST; /* of which only the transport knows what may be in it */
    frame.head_bytes = frame.data_bytes = frame.detail_bytes = 9;
    frame.status = KVC_AGAIN;
    assert_int_equal(kvc_frame_encode(&frame, bytes), KVC_OK);
    assert_int_equal(decode(bytes, sizeof(bytes), &got), KVC_OK);
    assert_int_equal(got.status, KVC_AGAIN);
}

static void hellos_come_back_as_they_were(void **state)
{
    (void)state;
    uint8_t bytes[KVC_HELLO_BYTES + 8] = {0};
    kvc_hello got, hello = {1, 2, 3, 4, {5, 6, 7, UINT64_MAX}, 9};
    kvc_hello_encode(&hello, bytes);
    assert_int_equal(kvc_hello_decode(bytes, KVC_HELLO_BYTES - 1, &got), KVC_PROTOCOL);
    assert_int_equal(kvc_hello_decode(bytes, sizeof(bytes), &got), KVC_OK);
    assert_int_equal(got.version, 1);
    assert_int_equal(got.max_message_bytes, 2);
    assert_int_equal(got.max_calls, 3);
    assert_int_equal(got.flags, 4);
    assert_memory_equal(got.spare, hello.spare, sizeof(got.spare));
    assert_true(got.boot_id == 9);
    bytes[0] = 0;
    assert_int_equal(kvc_hello_decode(bytes, sizeof(bytes), &got), KVC_PROTOCOL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(frames_come_back_as_they_were),
        cmocka_unit_test(the_layout_is_fixed),
        cmocka_unit_test(short_input_waits_for_more),
        cmocka_unit_test(fields_beyond_their_limits_are_refused),
        cmocka_unit_test(bad_bytes_are_refused),
        cmocka_unit_test(hellos_come_back_as_they_were),
    };
    return cmocka_run_group_tests_name("frame", tests, NULL, NULL);
}
