/*
 * wire_bad_input_test.c: what a peer may send that our encoder never would.
 *
 * Single thread. Messages are built by hand with the small writer below, so that this file does
 * not lean on the code under test.
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
#define VARINT      0u
#define LENGTH      2u
#define FIXED32     5u

/* A message being written. */
struct buf {
    uint8_t *bytes;
    size_t len, size;
};

static void put(struct buf *buf, const void *bytes, size_t len)
{
    if (buf->len + len > buf->size) {
        buf->size = (buf->len + len) * 2;
        buf->bytes = realloc(buf->bytes, buf->size);
        assert_non_null(buf->bytes);
    }
    if (len > 0)
        memcpy(buf->bytes + buf->len, bytes, len);
    buf->len += len;
}

static void put_varint(struct buf *buf, uint64_t value)
{
    do {
        uint8_t byte = (uint8_t)((value & 0x7f) | (value > 0x7f ? 0x80 : 0));
        put(buf, &byte, 1);
        value >>= 7;
    } while (value > 0);
}

static void put_tag(struct buf *buf, uint32_t number, uint32_t wire_type)
{
    put_varint(buf, number << 3 | wire_type);
}

static void put_bytes(struct buf *buf, uint32_t number, const void *bytes, size_t len)
{
    put_tag(buf, number, LENGTH);
    put_varint(buf, len);
    put(buf, bytes, len);
}

static void put_number(struct buf *buf, uint32_t number, uint64_t value)
{
    put_tag(buf, number, VARINT);
    put_varint(buf, value);
}

static void clear(struct buf *buf)
{
    free(buf->bytes);
    *buf = (struct buf){0};
}

static kvc_status decode_request(kvc_method method, const struct buf *buf, const char **why_p)
{
    kvc_arena arena;
    kvc_request req;
    struct iovec in = {buf->bytes, buf->len};
    kvc_arena_init(&arena, ARENA_BYTES);
    kvc_status status = kvc_wire_decode_request(method, &in, 1, &arena, &req, why_p);
    kvc_arena_reset(&arena);
    return status;
}

/* Decodes, expects status, and a reason with every refusal; clears buf. */
static void expect(kvc_method method, struct buf *buf, kvc_status want)
{
    const char *why = "";
    kvc_status status = decode_request(method, buf, &why);
    if (status != want)
        fail_msg("%s, not %s: %s", kvc_status_name(status), kvc_status_name(want), why);
    assert_true((why == NULL) == (want == KVC_OK));
    clear(buf);
}

static void expect_reply(kvc_method method, struct buf *buf, kvc_status want)
{
    kvc_arena arena;
    kvc_reply reply;
    const char *why = "";
    struct iovec in = {buf->bytes, buf->len};
    kvc_arena_init(&arena, ARENA_BYTES);
    kvc_status status = kvc_wire_decode_reply(method, &in, 1, &arena, &reply, &why);
    kvc_arena_reset(&arena);
    if (status != want)
        fail_msg("%s, not %s: %s", kvc_status_name(status), kvc_status_name(want), why);
    clear(buf);
}

void bad_framing(void **state)
{
    (void)state;
    static const struct {
        const char *bytes;
        size_t len;
    } bad[] = {
        {"\x80", 1},     /* tag cut off */
        {"\x00\x01", 2}, /* field number 0 */
        {"\x0b\x0c", 2}, /* group start and end */
        {"\x0c", 1},     /* group end */
        {"\x0e\x01", 2}, /* wire type 6 */
        {"\x0f\x01", 2}, /* wire type 7 */
        {"\x7a\x05"
         "abc",
         5},                                 /* data goes beyond the message */
        {"\x7a\xff\xff\xff\xff\x0f", 6},     /* the same by 4 GiB */
        {"\x7a\xff\xff\xff\xff\xff\x01", 7}, /* a length of more than 32 bits */
        {"\x7a", 1},                         /* no length */
        {"\x78\x01", 2},                     /* data as a varint */
        {"\x10\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", 12}, /* varint of 11 bytes */
        {"\x10\x80", 2},                                          /* varint cut off */
        {"\xff\xff\xff\xff\xff\x01", 6},                          /* tag of 6 bytes */
        {"\x0d\x01\x02", 3},                                      /* fixed32 cut off */
        {"\x09\x01\x02\x03\x04\x05", 6},                          /* fixed64 cut off */
        {"\x08\x01", 2},                                          /* field 1, bytes, as a varint */
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct buf buf = {0};
        put(&buf, bad[i].bytes, bad[i].len);
        expect(KVC_PUT_BLOCKS, &buf, KVC_PROTOCOL);
    }
}

/* RegisterSchema { schema { <inner> } } */
static void put_schema(struct buf *buf, const struct buf *inner)
{
    put_bytes(buf, 1, inner->bytes, inner->len);
}

void bad_nesting(void **state)
{
    (void)state;
    struct buf inner = {0}, buf = {0};
    put(&inner,
        "\x0a\x05"
        "ab",
        4); /* the model goes beyond the schema */
    put_schema(&buf, &inner);
    expect(KVC_REGISTER_SCHEMA, &buf, KVC_PROTOCOL);
    clear(&inner);
    put_number(&inner, 1, 5); /* the model as a number */
    put_schema(&buf, &inner);
    expect(KVC_REGISTER_SCHEMA, &buf, KVC_PROTOCOL);
    clear(&inner);
    put(&inner, "\x33\x34", 2); /* a group in the schema */
    put_schema(&buf, &inner);
    expect(KVC_REGISTER_SCHEMA, &buf, KVC_PROTOCOL);
    clear(&inner);
    put_bytes(&inner, 1, "a\0b", 3);
    put_schema(&buf, &inner);
    expect(KVC_REGISTER_SCHEMA, &buf, KVC_INVALID);
    clear(&inner);
    expect(KVC_REGISTER_SCHEMA, &buf, KVC_INVALID); /* no schema at all */
    for (int i = 0; i < 2000; i++)
        put_number(&inner, 900, 1); /* unknown fields without end */
    put_schema(&buf, &inner);
    expect(KVC_REGISTER_SCHEMA, &buf, KVC_INVALID);
    clear(&inner);
    for (uint32_t i = 0; i < KVC_MAX_PICKS + 1; i++)
        put_bytes(&inner, 6, NULL, 0); /* empty parts without end */
    put_schema(&buf, &inner);
    expect(KVC_REGISTER_SCHEMA, &buf, KVC_INVALID);
    clear(&inner);
}

static void long_strings(void)
{
    char text[KVC_MAX_RECIPE_BYTES + 1];
    struct buf inner = {0}, buf = {0};
    memset(text, 'x', sizeof(text));
    put_bytes(&inner, 1, text, KVC_MAX_NAME_BYTES + 1);
    put_schema(&buf, &inner);
    expect(KVC_REGISTER_SCHEMA, &buf, KVC_INVALID);
    clear(&inner);
    put_bytes(&inner, 3, text, KVC_MAX_RECIPE_BYTES + 1);
    put_schema(&buf, &inner);
    expect(KVC_REGISTER_SCHEMA, &buf, KVC_INVALID);
    clear(&inner);
    put_bytes(&inner, 1, text, KVC_MAX_NAME_BYTES);
    put_bytes(&inner, 3, text, KVC_MAX_RECIPE_BYTES);
    put_schema(&buf, &inner);
    expect(KVC_REGISTER_SCHEMA, &buf, KVC_OK);
    clear(&inner);
}

static void digest_lengths(void)
{
    uint8_t *many = calloc(KVC_MAX_DIGESTS + 1, KVC_DIGEST_BYTES);
    struct buf buf = {0};
    assert_non_null(many);
    expect(KVC_OPEN_CONTEXT, &buf, KVC_INVALID); /* no schema digest */
    put_bytes(&buf, 1, many, 31);
    expect(KVC_OPEN_CONTEXT, &buf, KVC_INVALID);
    put_bytes(&buf, 1, many, 33);
    expect(KVC_OPEN_CONTEXT, &buf, KVC_INVALID);
    put_bytes(&buf, 1, many, 32);
    put_bytes(&buf, 2, many, 65);
    expect(KVC_OPEN_CONTEXT, &buf, KVC_INVALID);
    put_bytes(&buf, 1, many, 32);
    put_bytes(&buf, 2, many, (size_t)KVC_MAX_DIGESTS * 32 + 32);
    expect(KVC_OPEN_CONTEXT, &buf, KVC_INVALID);
    put_bytes(&buf, 1, many, 32);
    put_bytes(&buf, 2, many, (size_t)KVC_MAX_DIGESTS * 32);
    expect(KVC_OPEN_CONTEXT, &buf, KVC_OK);
    free(many);
}

static void put_limits(void)
{
    struct buf value = {0}, buf = {0};
    uint8_t digest[32] = {0};
    uint8_t *big = calloc(KVC_MAX_HEADER_BYTES + 1, 1);
    assert_non_null(big);
    put_bytes(&value, 1, digest, 32);
    for (uint32_t n = KVC_MAX_BATCH_VALUES; n <= KVC_MAX_BATCH_VALUES + 1; n++) {
        put_bytes(&buf, 1, digest, 32);
        put_number(&buf, 2, KVC_PROMISE_MEMORY);
        for (uint32_t i = 0; i < n; i++)
            put_bytes(&buf, 3, value.bytes, value.len);
        expect(KVC_PUT_BLOCKS, &buf, n == KVC_MAX_BATCH_VALUES ? KVC_OK : KVC_INVALID);
    }
    for (uint32_t promise = 0; promise <= 3; promise += 3) {
        put_bytes(&buf, 1, digest, 32);
        put_number(&buf, 2, promise);
        expect(KVC_PUT_BLOCKS, &buf, KVC_INVALID);
    }
    put_bytes(&buf, 1, digest, 32);
    put_number(&buf, 2, KVC_PROMISE_MEMORY);
    put_bytes(&buf, 15, big, KVC_MAX_VALUE_BYTES + 1);
    expect(KVC_PUT_BLOCKS, &buf, KVC_INVALID);
    put_bytes(&buf, 1, big, KVC_MAX_HEADER_BYTES); /* a header beyond its cap */
    expect(KVC_PUT_BLOCKS, &buf, KVC_INVALID);
    put_bytes(&buf, 1, digest, 32);
    put_number(&buf, 2, KVC_PROMISE_MEMORY);
    put_bytes(&buf, 77, big, KVC_MAX_HEADER_BYTES); /* an unknown field is none of it */
    expect(KVC_PUT_BLOCKS, &buf, KVC_OK);
    free(big);
    clear(&value);
}

static void fetch_limits(void)
{
    struct buf group = {0}, buf = {0};
    uint32_t *picks = calloc(KVC_MAX_PICKS, sizeof(*picks));
    assert_non_null(picks);
    for (uint32_t i = 0; i <= KVC_MAX_GROUPS; i++)
        put_bytes(&buf, 1, NULL, 0);
    expect(KVC_FETCH_ROWS, &buf, KVC_INVALID);
    put_bytes(&group, 3, picks, KVC_MAX_PICKS * sizeof(*picks));
    put_bytes(&buf, 1, group.bytes, group.len);
    expect(KVC_FETCH_ROWS, &buf, KVC_OK);
    put_bytes(&buf, 1, group.bytes, group.len);
    clear(&group);
    put_bytes(&group, 3, picks, sizeof(*picks));
    put_bytes(&buf, 1, group.bytes, group.len); /* one more, in a group of its own */
    expect(KVC_FETCH_ROWS, &buf, KVC_INVALID);
    clear(&group);
    put_bytes(&group, 3, picks, 7); /* not a whole number of picks */
    put_bytes(&buf, 1, group.bytes, group.len);
    expect(KVC_FETCH_ROWS, &buf, KVC_PROTOCOL);
    clear(&group);
    free(picks);
}

/* A group of AttendRows: rows with n_picks, n_q, n_q_heads, dtypes, same_q, n_ranks of one value.
 */
static kvc_status attend_group(uint32_t n_picks, uint64_t n_q, uint64_t heads, uint64_t q_dtype,
                               bool same_q, uint32_t n_ranks, uint64_t rank, const char **why_p)
{
    struct buf rows = {0}, group = {0}, ranks = {0}, buf = {0};
    uint32_t picks[8] = {0};
    put_bytes(&rows, 3, picks, n_picks * sizeof(*picks));
    put_bytes(&group, 1, rows.bytes, rows.len);
    put_number(&group, 2, n_q);
    put_number(&group, 3, heads);
    put_number(&group, 4, q_dtype);
    put_number(&group, 5, KVC_DTYPE_F32);
    put_number(&group, 6, same_q);
    for (uint32_t i = 0; i < n_ranks; i++)
        put_varint(&ranks, rank);
    put_bytes(&group, 7, ranks.bytes, ranks.len);
    put_bytes(&buf, 1, group.bytes, group.len);
    kvc_status status = decode_request(KVC_ATTEND_ROWS, &buf, why_p);
    clear(&rows);
    clear(&group);
    clear(&ranks);
    clear(&buf);
    return status;
}

static void attend_refused(kvc_status status, const char **why_p, const char *word)
{
    assert_int_equal(status, KVC_INVALID);
    assert_non_null(strstr(*why_p, word));
}

static void attend_limits(void)
{
    const char *why = "";
    const uint64_t bf16 = KVC_DTYPE_BF16;
    struct buf rows = {0}, group = {0}, buf = {0};
    const uint32_t picks[2] = {0};
    assert_int_equal(attend_group(3, 1, 32, bf16, false, 3, KVC_MAX_RANK - 1, &why), KVC_OK);
    assert_int_equal(attend_group(0, KVC_MAX_ATTEND_QUERIES, 1024, bf16, false, 0, 0, &why),
                     KVC_OK);
    attend_refused(attend_group(3, 0, 32, bf16, false, 0, 0, &why), &why, "n_q ");
    attend_refused(attend_group(3, KVC_MAX_ATTEND_QUERIES + 1, 32, bf16, false, 0, 0, &why), &why,
                   "n_q ");
    attend_refused(attend_group(3, 1, 0, bf16, false, 0, 0, &why), &why, "n_q_heads");
    attend_refused(attend_group(3, 1, 1025, bf16, false, 0, 0, &why), &why, "n_q_heads");
    attend_refused(attend_group(3, 1, 32, KVC_DTYPE_I8, false, 0, 0, &why), &why, "dtype");
    attend_refused(attend_group(3, 1, 32, 77, false, 0, 0, &why), &why, "dtype");
    attend_refused(attend_group(3, 1, 32, bf16, true, 0, 0, &why), &why, "first group");
    attend_refused(attend_group(3, 1, 32, bf16, false, 2, 0, &why), &why, "rank");
    attend_refused(attend_group(0, 1, 32, bf16, false, 1, 0, &why), &why, "rank");
    attend_refused(attend_group(3, 1, 32, bf16, false, 3, KVC_MAX_RANK, &why), &why, "2^30");
    put_bytes(&rows, 3, picks, sizeof(picks));
    put_bytes(&group, 1, rows.bytes, rows.len);
    put_number(&group, 2, 1);
    put_number(&group, 3, 1);
    put_number(&group, 4, bf16);
    put_number(&group, 5, bf16);
    put_bytes(&group, 8, "\1\2", 2);
    put_bytes(&buf, 1, group.bytes, group.len);
    attend_refused(decode_request(KVC_ATTEND_ROWS, &buf, &why), &why, "each query");
    clear(&rows);
    clear(&group);
    clear(&buf);
    put_number(&group, 2, 1);
    put_bytes(&buf, 1, group.bytes, group.len);
    attend_refused(decode_request(KVC_ATTEND_ROWS, &buf, &why), &why, "no rows");
    clear(&group);
    clear(&buf);
    for (uint32_t i = 0; i <= KVC_MAX_GROUPS; i++)
        put_bytes(&buf, 1, NULL, 0);
    attend_refused(decode_request(KVC_ATTEND_ROWS, &buf, &why), &why, "max_groups");
    clear(&buf);
}

void limits_on_decode(void **state)
{
    (void)state;
    long_strings();
    digest_lengths();
    put_limits();
    fetch_limits();
    attend_limits();
}

void order_and_repeats(void **state)
{
    (void)state;
    kvc_arena arena;
    kvc_request req;
    struct buf buf = {0};
    kvc_digest digest = sample_digest(3);
    kvc_arena_init(&arena, ARENA_BYTES);
    put_bytes(&buf, 15, "the first data loses", 20);
    put_number(&buf, 2, KVC_PROMISE_MEMORY);
    put_number(&buf, 2000, 1ull << 63); /* unknown fields of every wire type */
    put_tag(&buf, 2001, FIXED32);
    put(&buf, "abcd", 4);
    put_bytes(&buf, 2002, "unknown", 7);
    put_bytes(&buf, 15, "won", 3);
    put_number(&buf, 2, KVC_PROMISE_DURABLE);
    put_bytes(&buf, 1, digest.bytes, 32);
    struct iovec in[2] = {{buf.bytes, 2}, {buf.bytes + 2, buf.len - 2}};
    assert_int_equal(kvc_wire_decode_request(KVC_PUT_BLOCKS, in, 2, &arena, &req, NULL), KVC_OK);
    assert_int_equal(req.data_bytes, 3);
    assert_int_equal(req.n_data, 1);
    assert_memory_equal(req.data[0].iov_base, "won", 3);
    assert_int_equal(req.u.put_blocks.promise, KVC_PROMISE_DURABLE);
    assert_memory_equal(req.u.put_blocks.schema.bytes, digest.bytes, 32);
    kvc_arena_reset(&arena);
    put_bytes(&buf, 15, NULL, 0); /* an empty data after it wins too */
    in[1] = (struct iovec){buf.bytes + 2, buf.len - 2};
    in[0].iov_base = buf.bytes;
    assert_int_equal(kvc_wire_decode_request(KVC_PUT_BLOCKS, in, 2, &arena, &req, NULL), KVC_OK);
    assert_int_equal(req.data_bytes, 0);
    assert_int_equal(req.n_data, 0);
    kvc_arena_reset(&arena);
    clear(&buf);
}

void packed_and_unpacked(void **state)
{
    (void)state;
    kvc_arena arena;
    kvc_request req;
    struct buf group = {0}, buf = {0};
    const uint32_t picks[] = {1, 0xffffffffu, 3, 4};
    kvc_digest digest = sample_digest(4);
    kvc_arena_init(&arena, ARENA_BYTES);
    put_bytes(&group, 3, picks, 8); /* packed, then one by one */
    for (int i = 2; i < 4; i++) {
        put_tag(&group, 3, FIXED32);
        put(&group, &picks[i], 4);
    }
    put_bytes(&buf, 1, group.bytes, group.len);
    struct iovec in = {buf.bytes, buf.len};
    assert_int_equal(kvc_wire_decode_request(KVC_FETCH_ROWS, &in, 1, &arena, &req, NULL), KVC_OK);
    assert_int_equal(req.u.fetch_rows.groups[0].n_picks, 4);
    assert_memory_equal(req.u.fetch_rows.groups[0].picks, picks, sizeof(picks));
    kvc_arena_reset(&arena);
    clear(&buf);
    clear(&group);
    put_bytes(&buf, 1, digest.bytes, 32);
    put_number(&buf, 3, 300);
    put_bytes(&buf, 3, "\x01\xac\x02", 3);
    in = (struct iovec){buf.bytes, buf.len};
    assert_int_equal(kvc_wire_decode_request(KVC_MATCH_PREFIX, &in, 1, &arena, &req, NULL), KVC_OK);
    assert_int_equal(req.u.match_prefix.n_parts, 3);
    assert_int_equal(req.u.match_prefix.parts[0], 300);
    assert_int_equal(req.u.match_prefix.parts[1], 1);
    assert_int_equal(req.u.match_prefix.parts[2], 300);
    kvc_arena_reset(&arena);
    clear(&buf);
}

/* A message that was cut off decodes to something or is refused; it never reads past its end. */
void every_truncation(void **state)
{
    (void)state;
    for (int m = 0; m < KVC_METHOD_COUNT; m++) {
        kvc_arena arena;
        const void *head;
        size_t len;
        kvc_request got;
        kvc_arena_init(&arena, ARENA_BYTES);
        kvc_request req = sample_request((kvc_method)m, 0, &arena);
        assert_int_equal(kvc_wire_encode_request(&req, &arena, &head, &len), KVC_OK);
        for (size_t cut = 0; cut < len; cut++) {
            kvc_arena scratch;
            uint8_t *bytes = malloc(cut + (cut == 0));
            assert_non_null(bytes);
            memcpy(bytes, head, cut);
            struct iovec in = {bytes, cut};
            kvc_arena_init(&scratch, ARENA_BYTES);
            kvc_status status =
                kvc_wire_decode_request((kvc_method)m, &in, 1, &scratch, &got, NULL);
            assert_true(status == KVC_OK || status == KVC_PROTOCOL || status == KVC_INVALID);
            kvc_arena_reset(&scratch);
            free(bytes);
        }
        kvc_arena_reset(&arena);
    }
}

void bad_replies(void **state)
{
    (void)state;
    struct buf buf = {0};
    expect_reply(KVC_DESCRIBE, &buf, KVC_INVALID); /* no limits */
    expect_reply(KVC_REGISTER_SCHEMA, &buf, KVC_INVALID);
    put_bytes(&buf, 1, "\x00\x12", 2); /* status 18 does not exist */
    expect_reply(KVC_PUT_BLOCKS, &buf, KVC_INVALID);
    put_bytes(&buf, 1, "\x00\x11", 2);
    expect_reply(KVC_PUT_BLOCKS, &buf, KVC_OK);
    put_bytes(&buf, 1, "\x08\x05\x10\x02", 4);
    put_bytes(&buf, 1, "\x08\x05\x10\x02", 4); /* the same index twice */
    expect_reply(KVC_FETCH_ROWS, &buf, KVC_INVALID);
    put_bytes(&buf, 1, "\x08\x05", 2); /* missing, but with status OK */
    expect_reply(KVC_FETCH_ROWS, &buf, KVC_INVALID);
    put_bytes(&buf, 1, "\x08\x80\x80\x04\x10\x02", 6); /* index 65,536 */
    expect_reply(KVC_FETCH_ROWS, &buf, KVC_INVALID);
    put_bytes(&buf, 1, "\x08\xff\xff\x03\x10\x02", 6);
    expect_reply(KVC_FETCH_ROWS, &buf, KVC_OK);
    for (int i = 0; i < 65; i++)
        put_bytes(&buf, 2, NULL, 0); /* tiers */
    expect_reply(KVC_STATS, &buf, KVC_INVALID);
}

/* With every arena too small for it the message is refused, and nothing else happens. */
void little_memory(void **state)
{
    (void)state;
    for (int m = 0; m < KVC_METHOD_COUNT; m++) {
        kvc_arena arena;
        const void *head;
        size_t len;
        kvc_arena_init(&arena, ARENA_BYTES);
        kvc_reply reply = sample_reply((kvc_method)m, 0, &arena);
        assert_int_equal(kvc_wire_encode_reply(&reply, &arena, &head, &len), KVC_OK);
        struct iovec in = {(void *)(uintptr_t)head, len};
        kvc_status status = KVC_NO_MEMORY;
        for (size_t max_bytes = 0; status == KVC_NO_MEMORY; max_bytes += 16) {
            kvc_arena small;
            kvc_arena_init(&small, max_bytes);
            status = kvc_wire_decode_reply((kvc_method)m, &in, 1, &small, &reply, NULL);
            kvc_arena_reset(&small);
        }
        assert_int_equal(status, KVC_OK);
        kvc_arena_reset(&arena);
    }
}
