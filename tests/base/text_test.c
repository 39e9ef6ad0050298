/*
 * text_test.c: numbers with units there and back, edit distance, growing text.
 */
#include "support.h"

#include "base/text.h"

#define KIB(n) ((uint64_t)(n) << 10)
#define GIB(n) ((uint64_t)(n) << 30)
#define MS(n)  ((uint64_t)(n)*1000000ull)

static void bytes_parse(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        uint64_t bytes;
    } good[] = {
        {"0", 0},           {"65536", 65536},
        {"64KiB", KIB(64)}, {"1MiB", 1048576},
        {"2GiB", GIB(2)},   {"1TiB", GIB(1024)},
        {"007", 7},         {"18446744073709551615", UINT64_MAX},
    };
    static const char *const bad[] = {
        "",
        "MiB",
        " 1",
        "1 MiB",
        "1MB",
        "1mib",
        "1K",
        "-1",
        "+1",
        "1.5GiB",
        "0x10",
        "1MiBs",
        "16777216TiB",
        "18446744073709551616",
        "99999999999999999999GiB",
    };
    uint64_t bytes;
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        assert_ok(kvc_bytes_parse(good[i].text, &bytes));
        assert_true(bytes == good[i].bytes);
    }
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        bytes = 1;
        assert_status(kvc_bytes_parse(bad[i], &bytes), KVC_INVALID);
        assert_true(bytes == 0);
    }
}

static void durations_parse(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        uint64_t ns;
    } good[] = {{"0", 0},         {"0ms", 0},         {"20ms", MS(20)},
                {"5s", MS(5000)}, {"3m", MS(180000)}, {"2h", MS(7200000)}};
    static const char *const bad[] = {"",    "5",   "00", "ms",   "1.5s",
                                      "-1s", "5 s", "1d", "1sec", "99999999999h"};
    uint64_t ns;
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        assert_ok(kvc_duration_parse(good[i].text, &ns));
        assert_true(ns == good[i].ns);
    }
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        assert_status(kvc_duration_parse(bad[i], &ns), KVC_INVALID);
}

static void truth_and_numbers_parse(void **state)
{
    (void)state;
    bool yes;
    uint64_t value;
    static const char *const words[] = {"true", "yes", "on", "1"};
    static const char *const others[] = {"false", "no", "off", "0"};
    for (int i = 0; i < 4; i++) {
        assert_ok(kvc_bool_parse(words[i], &yes));
        assert_true(yes);
        assert_ok(kvc_bool_parse(others[i], &yes));
        assert_false(yes);
    }
    assert_status(kvc_bool_parse("True", &yes), KVC_INVALID);
    assert_status(kvc_bool_parse("", &yes), KVC_INVALID);
    assert_ok(kvc_uint_parse("42", &value));
    assert_true(value == 42);
    assert_status(kvc_uint_parse("42KiB", &value), KVC_INVALID);
    assert_status(kvc_uint_parse("", &value), KVC_INVALID);
}

/* Whatever the exact formats write, the parsers read back. */
static void exact_formats_come_back(void **state)
{
    (void)state;
    support_random random = support_seed(3);
    char text[KVC_TEXT_BYTES];
    for (int i = 0; i < 20000; i++) {
        uint64_t value = support_next(&random) >> support_below(&random, 64);
        value <<= support_below(&random, 20);
        uint64_t back;
        assert_ok(kvc_bytes_parse(kvc_bytes_text(value, text), &back));
        assert_true(back == value);
        value -= value % MS(1);
        assert_ok(kvc_duration_parse(kvc_duration_text(value, text), &back));
        assert_true(back == value);
    }
    assert_string_equal(kvc_bytes_text(GIB(2), text), "2GiB");
    assert_string_equal(kvc_bytes_text(0, text), "0");
    assert_string_equal(kvc_bytes_text(1000, text), "1000");
    assert_string_equal(kvc_duration_text(MS(90000), text), "90s");
    assert_string_equal(kvc_duration_text(MS(7200000), text), "2h");
    assert_string_equal(kvc_duration_text(MS(1500), text), "1500ms");
    assert_string_equal(kvc_duration_text(999, text), "0");
}

static void short_formats_have_three_digits(void **state)
{
    (void)state;
    char text[KVC_TEXT_BYTES];
    assert_string_equal(kvc_bytes_short(0, text), "0 B");
    assert_string_equal(kvc_bytes_short(1023, text), "1023 B");
    assert_string_equal(kvc_bytes_short(1024, text), "1.00 KiB");
    assert_string_equal(kvc_bytes_short(KIB(10) + 512, text), "10.5 KiB");
    assert_string_equal(kvc_bytes_short(GIB(3) / 2, text), "1.50 GiB");
    assert_string_equal(kvc_bytes_short(UINT64_MAX, text), "16777215 TiB");
    assert_string_equal(kvc_duration_short(999, text), "999 ns");
    assert_string_equal(kvc_duration_short(172000, text), "172 us");
    assert_string_equal(kvc_duration_short(1240000, text), "1.24 ms");
    assert_string_equal(kvc_duration_short(MS(5000), text), "5.00 s");
    assert_string_equal(kvc_duration_short(MS(125000), text), "2m 05s");
    assert_string_equal(kvc_duration_short(MS(12000000), text), "3h 20m");
    assert_string_equal(kvc_duration_short(UINT64_MAX, text), "5124095h 34m");
}

static void distance_counts_edits(void **state)
{
    (void)state;
    char long_text[80];
    assert_int_equal(kvc_edit_distance("", ""), 0);
    assert_int_equal(kvc_edit_distance("abc", ""), 3);
    assert_int_equal(kvc_edit_distance("dram_bytes", "dram_byte"), 1);
    assert_int_equal(kvc_edit_distance("kitten", "sitting"), 3);
    assert_int_equal(kvc_edit_distance("sitting", "kitten"), 3);
    memset(long_text, 'x', sizeof(long_text) - 1);
    long_text[79] = '\0';
    assert_int_equal(kvc_edit_distance(long_text, "x"), UINT32_MAX);
    long_text[63] = '\0';
    assert_int_equal(kvc_edit_distance(long_text, "x"), 62);
}

static void strbuf_grows(void **state)
{
    (void)state;
    kvc_strbuf buf = {0};
    char *text = kvc_strbuf_take(&buf);
    assert_string_equal(text, "");
    free(text);
    char long_text[700];
    memset(long_text, 'x', sizeof(long_text) - 1);
    long_text[699] = '\0';
    for (int i = 0; i < 50; i++)
        kvc_strbuf_putf(&buf, "%s%d,", long_text, i % 10);
    assert_int_equal(buf.len_bytes, 50 * 701);
    text = kvc_strbuf_take(&buf);
    assert_int_equal(strlen(text), 50 * 701);
    assert_string_equal(text + 50 * 701 - 2, "9,");
    assert_null(buf.text);
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bytes_parse),
        cmocka_unit_test(durations_parse),
        cmocka_unit_test(truth_and_numbers_parse),
        cmocka_unit_test(exact_formats_come_back),
        cmocka_unit_test(short_formats_have_three_digits),
        cmocka_unit_test(distance_counts_edits),
        cmocka_unit_test(strbuf_grows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
