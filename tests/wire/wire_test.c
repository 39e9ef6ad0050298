/*
 * wire_test.c: every message through encode and decode, at every split point.
 *
 * Single thread. The malformed inputs are in wire_bad_input_test.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/arena.h"
#include "samples.h"
#include "wire/wire.h"
#include "wire_test.h"

#define ARENA_BYTES (64u << 20)

/* Header and payload as one message in fresh memory of exactly that size (for ASan). */
static uint8_t *join(const void *head, size_t head_bytes, const struct iovec *data, uint32_t n_data,
                     size_t *len_p)
{
    size_t len = head_bytes;
    for (uint32_t i = 0; i < n_data; i++)
        len += data[i].iov_len;
    uint8_t *bytes = malloc(len + 1);
    assert_non_null(bytes);
    memcpy(bytes, head, head_bytes);
    size_t at = head_bytes;
    for (uint32_t i = 0; i < n_data; i++) {
        memcpy(bytes + at, data[i].iov_base, data[i].iov_len);
        at += data[i].iov_len;
    }
    *len_p = len;
    return bytes;
}

static uint8_t *encoded_request(const kvc_request *req, size_t *len_p)
{
    kvc_arena arena;
    const void *head;
    size_t head_bytes;
    kvc_arena_init(&arena, ARENA_BYTES);
    assert_int_equal(kvc_wire_encode_request(req, &arena, &head, &head_bytes), KVC_OK);
    uint8_t *bytes = join(head, head_bytes, req->data, req->n_data, len_p);
    kvc_arena_reset(&arena);
    return bytes;
}

static uint8_t *encoded_reply(const kvc_reply *reply, size_t *len_p)
{
    kvc_arena arena;
    const void *head;
    size_t head_bytes;
    kvc_arena_init(&arena, ARENA_BYTES);
    assert_int_equal(kvc_wire_encode_reply(reply, &arena, &head, &head_bytes), KVC_OK);
    uint8_t *bytes = join(head, head_bytes, reply->data, reply->n_data, len_p);
    kvc_arena_reset(&arena);
    return bytes;
}

/* Copies each piece to memory of its own, decodes, compares. */
static void check_request(const kvc_request *want, const struct iovec *in, uint32_t n_in)
{
    kvc_arena arena;
    kvc_request got;
    const char *why;
    kvc_arena_init(&arena, ARENA_BYTES);
    kvc_status status = kvc_wire_decode_request(want->method, in, n_in, &arena, &got, &why);
    if (status != KVC_OK)
        fail_msg("%s: %s", kvc_method_name(want->method), why);
    const char *diff = sample_request_diff(want, &got);
    if (diff != NULL)
        fail_msg("%s: field %s differs", kvc_method_name(want->method), diff);
    kvc_arena_reset(&arena);
}

static void check_reply(const kvc_reply *want, const struct iovec *in, uint32_t n_in)
{
    kvc_arena arena;
    kvc_reply got;
    const char *why;
    kvc_arena_init(&arena, ARENA_BYTES);
    kvc_status status = kvc_wire_decode_reply(want->method, in, n_in, &arena, &got, &why);
    if (status != KVC_OK)
        fail_msg("%s: %s", kvc_method_name(want->method), why);
    const char *diff = sample_reply_diff(want, &got);
    if (diff != NULL)
        fail_msg("%s: field %s differs", kvc_method_name(want->method), diff);
    kvc_arena_reset(&arena);
}

static void round_trip(void **state)
{
    (void)state;
    static const size_t sizes[] = {0, 1, 127, 128, 70000, KVC_MAX_VALUE_BYTES};
    for (int m = 0; m < KVC_METHOD_COUNT; m++) {
        for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
            kvc_arena arena;
            size_t len;
            kvc_arena_init(&arena, ARENA_BYTES);
            kvc_request req = sample_request((kvc_method)m, sizes[s], &arena);
            uint8_t *bytes = encoded_request(&req, &len);
            check_request(&req, &(struct iovec){bytes, len}, 1);
            free(bytes);
            kvc_reply reply = sample_reply((kvc_method)m, sizes[s], &arena);
            bytes = encoded_reply(&reply, &len);
            check_reply(&reply, &(struct iovec){bytes, len}, 1);
            free(bytes);
            kvc_arena_reset(&arena);
        }
    }
}

/* [0, cut) [cut, cut] empty [cut, len) in memory of their own, so that a read past a piece shows */
static void split_at(const uint8_t *bytes, size_t len, size_t cut, struct iovec in[3])
{
    in[0] = (struct iovec){malloc(cut + (cut == 0)), cut};
    in[1] = (struct iovec){NULL, 0};
    in[2] = (struct iovec){malloc(len - cut + (cut == len)), len - cut};
    assert_non_null(in[0].iov_base);
    assert_non_null(in[2].iov_base);
    memcpy(in[0].iov_base, bytes, cut);
    memcpy(in[2].iov_base, bytes + cut, len - cut);
}

static void free_pieces(struct iovec in[3])
{
    free(in[0].iov_base);
    free(in[2].iov_base);
}

static void every_split_point(void **state)
{
    (void)state;
    for (int m = 0; m < KVC_METHOD_COUNT; m++) {
        kvc_arena arena;
        size_t len;
        struct iovec in[3];
        kvc_arena_init(&arena, ARENA_BYTES);
        kvc_request req = sample_request((kvc_method)m, 300, &arena);
        uint8_t *bytes = encoded_request(&req, &len);
        for (size_t cut = 0; cut <= len; cut++) {
            split_at(bytes, len, cut, in);
            check_request(&req, in, 3);
            free_pieces(in);
        }
        free(bytes);
        kvc_reply reply = sample_reply((kvc_method)m, 300, &arena);
        bytes = encoded_reply(&reply, &len);
        for (size_t cut = 0; cut <= len; cut++) {
            split_at(bytes, len, cut, in);
            check_reply(&reply, in, 3);
            free_pieces(in);
        }
        free(bytes);
        kvc_arena_reset(&arena);
    }
}

static void one_byte_pieces(void **state)
{
    (void)state;
    kvc_arena arena;
    size_t len;
    kvc_arena_init(&arena, ARENA_BYTES);
    kvc_request req = sample_request(KVC_PUT_BLOCKS, 1000, &arena);
    uint8_t *bytes = encoded_request(&req, &len);
    struct iovec *in = calloc(2 * len, sizeof(*in));
    assert_non_null(in);
    for (size_t i = 0; i < len; i++)
        in[2 * i + 1] = (struct iovec){bytes + i, 1};
    check_request(&req, in, (uint32_t)(2 * len));
    free(in);
    free(bytes);
    kvc_arena_reset(&arena);
}

static void payload_is_not_copied(void **state)
{
    (void)state;
    kvc_arena arena;
    size_t len;
    kvc_request got;
    kvc_arena_init(&arena, ARENA_BYTES);
    kvc_request req = sample_request(KVC_PUT_BLOCKS, 5000, &arena);
    uint8_t *bytes = encoded_request(&req, &len);
    struct iovec in = {bytes, len};
    assert_int_equal(kvc_wire_decode_request(KVC_PUT_BLOCKS, &in, 1, &arena, &got, NULL), KVC_OK);
    assert_int_equal(got.n_data, 1);
    assert_ptr_equal(got.data[0].iov_base, bytes + len - 5000);
    free(bytes);
    kvc_arena_reset(&arena);
}

static void encoder_limits(void **state)
{
    (void)state;
    kvc_arena arena;
    const void *head;
    size_t head_bytes;
    kvc_arena_init(&arena, ARENA_BYTES);
    kvc_request req = sample_request(KVC_PUT_BLOCKS, 10, &arena);
    req.data_bytes = 11; /* not what the pieces hold */
    assert_int_equal(kvc_wire_encode_request(&req, &arena, &head, &head_bytes), KVC_INVALID);
    assert_null(head);
    req = sample_request(KVC_PUT_BLOCKS, KVC_MAX_VALUE_BYTES + 1, &arena);
    assert_int_equal(kvc_wire_encode_request(&req, &arena, &head, &head_bytes), KVC_INVALID);
    req = sample_request(KVC_PUT_BLOCKS, 10, &arena);
    req.u.put_blocks.n_values = KVC_MAX_BATCH_VALUES + 1;
    assert_int_equal(kvc_wire_encode_request(&req, &arena, &head, &head_bytes), KVC_INVALID);
    req = sample_request(KVC_STATS, 0, &arena);
    req.data_bytes = 1; /* a method without payload */
    assert_int_equal(kvc_wire_encode_request(&req, &arena, &head, &head_bytes), KVC_INVALID);
    req.method = KVC_METHOD_COUNT;
    assert_int_equal(kvc_wire_encode_request(&req, &arena, &head, &head_bytes), KVC_INVALID);
    static const int8_t positive[] = {1};
    kvc_reply reply = sample_reply(KVC_PUT_BLOCKS, 0, &arena);
    reply.u.put_blocks.n_values = 1;
    reply.u.put_blocks.status = positive;
    assert_int_equal(kvc_wire_encode_reply(&reply, &arena, &head, &head_bytes), KVC_INVALID);
    kvc_arena_reset(&arena);
    kvc_arena_init(&arena, 64);
    req.method = KVC_OPEN_CONTEXT;
    req.data_bytes = 0;
    req.u.open_context.n_digests = 0;
    assert_int_equal(kvc_wire_encode_request(&req, &arena, &head, &head_bytes), KVC_OK);
    kvc_arena_reset(&arena);
    kvc_arena_init(&arena, 16);
    assert_int_equal(kvc_wire_encode_request(&req, &arena, &head, &head_bytes), KVC_NO_MEMORY);
    kvc_arena_reset(&arena);
}

static void names(void **state)
{
    (void)state;
    assert_string_equal(kvc_method_name(KVC_FETCH_ROWS), "FetchRows");
    assert_string_equal(kvc_method_name(KVC_DESCRIBE), "Describe");
    assert_string_equal(kvc_method_name(KVC_METHOD_COUNT), "Unknown");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(round_trip),          cmocka_unit_test(every_split_point),
        cmocka_unit_test(one_byte_pieces),     cmocka_unit_test(payload_is_not_copied),
        cmocka_unit_test(encoder_limits),      cmocka_unit_test(names),
        cmocka_unit_test(bad_framing),         cmocka_unit_test(bad_nesting),
        cmocka_unit_test(limits_on_decode),    cmocka_unit_test(order_and_repeats),
        cmocka_unit_test(packed_and_unpacked), cmocka_unit_test(every_truncation),
        cmocka_unit_test(bad_replies),         cmocka_unit_test(little_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
