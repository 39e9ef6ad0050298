/*
 * context_file_test.c: the file that holds a context: round trips, every cut, every flipped bit,
 * and counts beyond their limits.
 */
#include "support.h"

#include <endian.h>

#include "base/digest.h"
#include "base/sum.h"
#include "context_sample.h"

#define BLOCKS 3u
#define PARTS  2u
#define TOKENS (BLOCKS * 64u + 5u)

static const kvctl_file_part parts[PARTS] = {{3, 128}, {70, 64}};

static const uint8_t schema_msg[] = "a schema", tail[5 * 3] = "fourteen bytes";

typedef struct sample {
    kvctl_file_head head;
    kvc_digest digests[BLOCKS];
    uint32_t tokens[TOKENS];
    memory_file file;
} sample;

static uint8_t value_byte(uint32_t block, uint32_t part, uint32_t i)
{
    return (uint8_t)(block * 31 + part * 7 + i);
}

/* Value (1, 0) is missing. */
static void sample_init(sample *s, uint32_t n_tokens)
{
    uint8_t value[128];
    memset(s, 0, sizeof(*s));
    memset(&s->head.schema, 7, sizeof(s->head.schema));
    for (uint32_t i = 0; i < TOKENS; i++)
        s->tokens[i] = i * 3;
    for (uint32_t i = 0; i < BLOCKS; i++)
        assert_ok(kvc_block_digest(&s->head.schema, i == 0 ? NULL : &s->digests[i - 1],
                                   s->tokens + (size_t)i * 64, 64, NULL, 0, &s->digests[i]));
    s->head.block_tokens = 64;
    s->head.n_blocks = BLOCKS;
    s->head.n_parts = PARTS;
    s->head.n_tokens = n_tokens;
    s->head.digests = s->digests;
    s->head.parts = parts;
    s->head.tokens = s->tokens;
    s->head.schema_msg = schema_msg;
    s->head.schema_bytes = sizeof(schema_msg);
    s->head.tail = tail;
    s->head.tail_bytes = n_tokens == TOKENS ? sizeof(tail) : 0;
    assert_true(kvctl_file_put_head(memory_write, &s->file, &s->head));
    for (uint32_t b = 0; b < BLOCKS; b++) {
        for (uint32_t p = 0; p < PARTS; p++) {
            for (uint32_t i = 0; i < parts[p].value_bytes; i++)
                value[i] = value_byte(b, p, i);
            bool missing = b == 1 && p == 0;
            assert_true(kvctl_file_put_value(memory_write, &s->file, missing ? NULL : value,
                                             parts[p].value_bytes));
        }
    }
    assert_true(kvctl_file_put_end(memory_write, &s->file, BLOCKS * PARTS - 1));
}

static bool check_head(void *arg, const kvctl_file_head *head)
{
    (void)arg;
    bool whole = head->schema_bytes == sizeof(schema_msg) &&
                 memcmp(head->schema_msg, schema_msg, sizeof(schema_msg)) == 0;
    bool has_tail = head->tail_bytes == sizeof(tail) && memcmp(head->tail, tail, sizeof(tail)) == 0;
    assert_true(whole && (has_tail || head->n_tokens != TOKENS));
    return true;
}

static bool check_value(void *arg, const kvctl_file_head *head, uint32_t block, uint32_t part,
                        const uint8_t *bytes)
{
    uint32_t *n_p = arg;
    ++*n_p;
    assert_int_equal(head->n_blocks, BLOCKS);
    assert_int_equal(head->parts[part].part, parts[part].part);
    for (uint32_t i = 0; i < parts[part].value_bytes; i++)
        assert_int_equal(bytes[i], value_byte(block, part, i));
    return true;
}

static kvc_status walk(const uint8_t *bytes, size_t len_bytes, kvctl_file_value *each, void *arg)
{
    /* Exactly as long as the input, so that a read past its end shows. */
    memory_file file = {.bytes = malloc(len_bytes + 1), .len_bytes = len_bytes};
    const char *why = "";
    kvctl_file_totals totals;
    assert_non_null(file.bytes);
    memcpy(file.bytes, bytes, len_bytes);
    kvc_status status = kvctl_file_walk(memory_read, &file, check_head, each, arg, &totals, &why);
    assert_true((status == KVC_OK) == (why == NULL));
    if (status == KVC_OK) {
        assert_int_equal(totals.n_values, BLOCKS * PARTS - 1);
        assert_int_equal(totals.n_blocks, BLOCKS);
        assert_int_equal(totals.n_parts, PARTS);
    }
    free(file.bytes);
    return status;
}

static bool stop(void *arg, const kvctl_file_head *head, uint32_t block, uint32_t part,
                 const uint8_t *bytes)
{
    (void)arg;
    (void)head;
    (void)block;
    (void)part;
    (void)bytes;
    return false;
}

static void test_round_trip(void **state)
{
    (void)state;
    static const uint32_t n_tokens[] = {0, BLOCKS * 64, TOKENS};
    for (size_t i = 0; i < 3; i++) {
        sample s;
        uint32_t n = 0;
        sample_init(&s, n_tokens[i]);
        assert_ok(walk(s.file.bytes, s.file.len_bytes, check_value, &n));
        assert_int_equal(n, BLOCKS * PARTS - 1);
        assert_ok(walk(s.file.bytes, s.file.len_bytes, NULL, NULL));
        assert_status(walk(s.file.bytes, s.file.len_bytes, stop, NULL), KVC_CANCELLED);
        free(s.file.bytes);
    }
}

static void test_every_cut(void **state)
{
    (void)state;
    sample s;
    sample_init(&s, TOKENS);
    for (size_t n = 0; n < s.file.len_bytes; n++)
        assert_int_not_equal(walk(s.file.bytes, n, NULL, NULL), KVC_OK);
    assert_true(memory_write(&s.file, "", 1));
    assert_status(walk(s.file.bytes, s.file.len_bytes, NULL, NULL), KVC_CORRUPT);
    free(s.file.bytes);
}

static void test_every_flip(void **state)
{
    (void)state;
    sample s;
    sample_init(&s, TOKENS);
    for (size_t i = 0; i < s.file.len_bytes * 8; i++) {
        s.file.bytes[i / 8] ^= (uint8_t)(1u << i % 8);
        if (walk(s.file.bytes, s.file.len_bytes, NULL, NULL) == KVC_OK)
            fail_msg("bit %zu may be flipped", i);
        s.file.bytes[i / 8] ^= (uint8_t)(1u << i % 8);
    }
    free(s.file.bytes);
}

/* A file whose sums are right and whose counts are not. */
static void expect_counts(uint32_t block_tokens, uint32_t n_blocks, uint32_t n_parts,
                          uint32_t n_tokens, kvc_status wanted)
{
    sample s;
    uint32_t counts[] = {htole32(block_tokens), htole32(n_blocks), htole32(n_parts),
                         htole32(n_tokens)};
    sample_init(&s, 0);
    memcpy(s.file.bytes + 40, counts, sizeof(counts));
    assert_status(walk(s.file.bytes, s.file.len_bytes, NULL, NULL), wanted);
    free(s.file.bytes);
}

static void test_limits(void **state)
{
    (void)state;
    expect_counts(63, BLOCKS, PARTS, 0, KVC_INVALID);
    expect_counts(1025, BLOCKS, PARTS, 0, KVC_INVALID);
    expect_counts(64, KVC_MAX_CONTEXT_BLOCKS + 1, PARTS, 0, KVC_INVALID);
    expect_counts(64, UINT32_MAX, PARTS, 0, KVC_INVALID);
    expect_counts(64, BLOCKS, 0, 0, KVC_INVALID);
    expect_counts(64, BLOCKS, KVC_MAX_PARTS + 1, 0, KVC_INVALID);
    expect_counts(64, BLOCKS, PARTS, 1, KVC_INVALID);
    expect_counts(64, BLOCKS, PARTS, (BLOCKS + 1) * 64, KVC_INVALID);
    expect_counts(64, BLOCKS, PARTS, UINT32_MAX, KVC_INVALID);
    /* Within the limits, but not there: found out at the cost of what is there. */
    expect_counts(64, KVC_MAX_CONTEXT_BLOCKS, KVC_MAX_PARTS, 0, KVC_PROTOCOL);
}

/* Right sums over wrong contents: parts out of order, digests that are not the tokens'. */
static void test_contents(void **state)
{
    (void)state;
    static const kvctl_file_part bad[][PARTS] = {
        {{70, 64}, {3, 128}}, {{3, 128}, {3, 64}},  {{3, 128}, {70000, 64}},
        {{3, 0}, {70, 64}},   {{3, 100}, {70, 64}}, {{3, 2u << 20}, {70, 64}}};
    sample s;
    memory_file file;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        sample_init(&s, 0);
        file = (memory_file){0};
        s.head.parts = bad[i];
        assert_true(kvctl_file_put_head(memory_write, &file, &s.head));
        assert_status(walk(file.bytes, file.len_bytes, NULL, NULL), KVC_INVALID);
        free(file.bytes);
        free(s.file.bytes);
    }
    for (uint32_t i = 0; i < 2; i++) {
        sample_init(&s, TOKENS);
        file = (memory_file){0};
        s.head.tail_bytes = i == 0 ? sizeof(tail) - 1 : s.head.tail_bytes;
        s.head.n_tokens -= i == 1; /* rows of five tokens for four */
        assert_true(kvctl_file_put_head(memory_write, &file, &s.head));
        assert_status(walk(file.bytes, file.len_bytes, NULL, NULL), KVC_INVALID);
        free(file.bytes);
        free(s.file.bytes);
    }
    sample_init(&s, TOKENS);
    file = (memory_file){0};
    s.tokens[64]++;
    assert_true(kvctl_file_put_head(memory_write, &file, &s.head));
    assert_status(walk(file.bytes, file.len_bytes, NULL, NULL), KVC_CORRUPT);
    free(file.bytes);
    free(s.file.bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_every_cut),
        cmocka_unit_test(test_every_flip), cmocka_unit_test(test_limits),
        cmocka_unit_test(test_contents),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
