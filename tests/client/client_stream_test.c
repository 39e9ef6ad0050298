/*
 * client_stream_test.c: rows and values that come as the messages of streams: every byte in its
 * slot, retries from the start, and a server that lies in the middle.
 */
#include "support.h"

#include "base/clock.h"
#include "fixture.h"

#define PICKS  3000u
#define BLOCKS 70u

/* Rows of two parts into slots in reverse; checks every byte. */
static kvc_status fetch_rows(fixture *f, kvc_context *context, kvc_fetch_info *info)
{
    static uint8_t rows[2][PICKS * 4096];
    static uint32_t picks[2][PICKS], slots[PICKS];
    static int8_t status[2][PICKS];
    kvc_pick_group groups[2];
    kvc_op op;
    memset(rows, 0xee, sizeof(rows));
    kvc_region *region = fixture_region(f, rows, sizeof(rows));
    for (uint32_t g = 0; g < 2; g++) {
        for (uint32_t i = 0; i < PICKS; i++) {
            picks[g][i] = (i * 7919u + g) % 10000u;
            slots[i] = PICKS - 1 - i;
        }
        groups[g] = (kvc_pick_group){
            .context = context,
            .part = g,
            .row_bytes = f->fake.row_bytes[g],
            .n_picks = PICKS,
            .picks = picks[g],
            .dst_slots = g == 0 ? slots : NULL,
            .dst_off_bytes = g * sizeof(rows[0]),
        };
    }
    kvc_op_init(&op, NULL, NULL);
    assert_ok(kvc_fetch_stream(f->client, groups, 2, region, &status[0][0], info, 0, &op));
    kvc_status result = kvc_op_wait(&op, 0);
    assert_ok(kvc_region_deregister(f->client, region));
    for (uint32_t g = 0; result == KVC_OK && g < 2; g++) {
        uint32_t row_bytes = f->fake.row_bytes[g];
        for (uint32_t i = 0; i < PICKS; i++) {
            bool missing = f->fake.missing_every && picks[g][i] % f->fake.missing_every == 0;
            const uint8_t *row = &rows[g][(size_t)(g == 0 ? slots[i] : i) * row_bytes];
            assert_int_equal(status[g][i], missing ? KVC_NOT_FOUND : KVC_OK);
            for (uint32_t b = 0; b < row_bytes; b++)
                if (row[b] != (missing ? 0xee : fake_byte(g, picks[g][i], b)))
                    fail_msg("group %u, row %u, byte %u", g, i, b);
        }
    }
    return result;
}

static void test_rows(void **state)
{
    (void)state;
    fixture f = {0};
    kvc_fetch_info info;
    fake_init(&f.fake);
    f.fake.missing_every = 5;
    fixture_open(&f);
    kvc_context *context = fixture_context(&f, 4);
    assert_ok(fetch_rows(&f, context, &info));
    assert_int_equal(info.requests, 1);
    assert_int_equal(info.rows_missing + info.rows_dram, 2 * PICKS);
    assert_true(info.rows_missing > PICKS / 4);
    kvc_context_close(context);
    fixture_stop(&f);
}

/* Values of two parts, interleaved by block; blocks 7 and 8 are not there. */
static kvc_status fetch_blocks(fixture *f, int8_t *status, uint8_t *tiers)
{
    static uint8_t bytes[BLOCKS * 64 * (2048 + 64)];
    kvc_digest *digests = fixture_digests(BLOCKS);
    uint32_t len[2] = {64 * f->fake.row_bytes[1], 64 * f->fake.row_bytes[6]};
    size_t stride = len[0] + len[1];
    kvc_block_part parts[2] = {
        {.part = 1, .value_bytes = len[0], .stride_bytes = stride},
        {.part = 6, .value_bytes = len[1], .dst_off_bytes = len[0], .stride_bytes = stride}};
    uint32_t slots[BLOCKS]; /* of the second part: the last block first */
    for (uint32_t i = 0; i < BLOCKS; i++)
        slots[i] = BLOCKS - 1 - i;
    parts[1].dst_slots = slots;
    assert_true(BLOCKS * stride <= sizeof(bytes));
    digests[7].bytes[0] = digests[8].bytes[0] = 0;
    memset(bytes, 0xee, sizeof(bytes));
    kvc_region *region = fixture_region(f, bytes, BLOCKS * stride);
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    assert_ok(kvc_fetch_blocks(f->client, &f->schema, digests, BLOCKS, parts, 2, region, status,
                               tiers, 0, &op));
    kvc_status result = kvc_op_wait(&op, 0);
    for (uint32_t v = 0; result == KVC_OK && v < 2 * BLOCKS; v++) {
        bool there = v / 2 != 7 && v / 2 != 8;
        uint32_t slot = v % 2 == 0 ? v / 2 : slots[v / 2];
        const uint8_t *value = bytes + slot * stride + parts[v % 2].dst_off_bytes;
        assert_int_equal(status[v], there ? KVC_OK : KVC_NOT_FOUND);
        assert_int_equal(tiers[v], there ? KVC_TIER_DRAM : 0);
        for (uint32_t b = 0; b < len[v % 2]; b++)
            if (value[b] != (there ? fake_value_byte(&digests[v / 2], parts[v % 2].part, b) : 0xee))
                fail_msg("value %u, byte %u", v, b);
    }
    /* One byte too few, and the last value lies outside. */
    kvc_region *small = fixture_region(f, bytes, BLOCKS * stride - 1);
    assert_status(kvc_fetch_blocks(f->client, &f->schema, digests, BLOCKS, parts, 2, small, status,
                                   tiers, 0, &op),
                  KVC_INVALID);
    assert_status(kvc_fetch_blocks(f->client, &f->schema, digests, BLOCKS, parts, 0, region, status,
                                   tiers, 0, &op),
                  KVC_INVALID);
    slots[BLOCKS / 2] = BLOCKS; /* nor may a slot lie there */
    assert_status(kvc_fetch_blocks(f->client, &f->schema, digests, BLOCKS, parts, 2, region, status,
                                   tiers, 0, &op),
                  KVC_INVALID);
    assert_ok(kvc_region_deregister(f->client, small));
    assert_ok(kvc_region_deregister(f->client, region));
    free(digests);
    return result;
}

static void test_blocks(void **state)
{
    (void)state;
    fixture f;
    int8_t status[2 * BLOCKS];
    uint8_t tiers[2 * BLOCKS];
    fixture_start(&f);
    assert_ok(fetch_blocks(&f, status, tiers));
    assert_int_equal(fake_calls(&f.fake, KVC_FETCH_BLOCKS), 2); /* one on each channel */
    fixture_stop(&f);
}

/* An error after some messages: the stream is asked for again, from its start. */
static void test_again_in_the_middle(void **state)
{
    (void)state;
    fixture f;
    int8_t status[2 * BLOCKS];
    uint8_t tiers[2 * BLOCKS];
    kvc_fetch_info info;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 4);
    static const kvc_method methods[] = {KVC_FETCH_ROWS_STREAM, KVC_FETCH_BLOCKS};
    for (uint32_t i = 0; i < 2; i++)
        fake_add_rule(&f.fake,
                      &(fake_rule){.method = methods[i], .action = FAKE_STATUS_LATER, .times = 2});
    assert_ok(fetch_rows(&f, context, &info));
    assert_int_equal(info.requests, 3);
    assert_int_equal(info.rows_dram, 2 * PICKS);
    assert_ok(fetch_blocks(&f, status, tiers));
    kvc_context_close(context);
    fixture_stop(&f);
}

static void test_lies(void **state)
{
    (void)state;
    static const fake_action actions[] = {FAKE_SHORT, FAKE_LONG, FAKE_WILD_MISSING,
                                          FAKE_FEW_STATUS};
    fixture f;
    int8_t status[2 * BLOCKS];
    uint8_t tiers[2 * BLOCKS];
    kvc_fetch_info info;
    fixture_start(&f);
    f.fake.missing_every = 0;
    kvc_context *context = fixture_context(&f, 4);
    for (size_t i = 0; i < sizeof(actions) / sizeof(actions[0]); i++) {
        fake_rule rule = {.method = KVC_FETCH_ROWS_STREAM, .action = actions[i], .times = 1};
        fake_add_rule(&f.fake, &rule);
        assert_status(fetch_rows(&f, context, &info), KVC_PROTOCOL);
        rule.method = KVC_FETCH_BLOCKS;
        rule.times = 2;
        fake_add_rule(&f.fake, &rule);
        assert_status(fetch_blocks(&f, status, tiers), KVC_PROTOCOL);
        assert_int_equal(status[2 * BLOCKS - 1], KVC_PROTOCOL);
    }
    kvc_context_close(context);
    fixture_stop(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows),
        cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_again_in_the_middle),
        cmocka_unit_test(test_lies),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
