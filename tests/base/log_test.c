/*
 * log_test.c: the form of a line, escaping in both formats, and lines that stay whole under
 * concurrency.
 */
#include "support.h"

#include <fcntl.h>
#include <signal.h>

#include "base/assert.h"
#include "base/log.h"
#include "base/thread.h"

static char last_line[8192];
static unsigned n_lines;

static void keep_line(void *arg, const char *line, size_t len_bytes)
{
    (void)arg;
    assert_true(len_bytes < sizeof(last_line));
    memcpy(last_line, line, len_bytes);
    last_line[len_bytes] = '\0';
    n_lines++;
}

static int setup(void **state)
{
    (void)state;
    n_lines = 0;
    kvc_log_set_sink(keep_line, NULL);
    kvc_log_set_level(KVC_LOG_LEVEL_DEBUG);
    kvc_log_set_format(KVC_LOG_TEXT);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    kvc_log_set_sink(NULL, NULL);
    kvc_log_set_level(KVC_LOG_LEVEL_WARN);
    return 0;
}

static unsigned evaluated;

static int evaluate(void)
{
    return (int)++evaluated;
}

static void only_enabled_levels_cost(void **state)
{
    (void)state;
    evaluated = 0;
    kvc_log_set_level(KVC_LOG_LEVEL_INFO);
    KVC_LOG_INFO(TEST, "seen %d", evaluate());
    KVC_LOG_DEBUG(TEST, "unseen %d", evaluate());
    assert_int_equal(evaluated, 1);
    assert_int_equal(n_lines, 1);
    kvc_log_set_level(KVC_LOG_LEVEL_OFF);
    KVC_LOG_ERROR(TEST, "unseen");
    assert_int_equal(n_lines, 1);
}

/* The line without its time, which must have the form 2026-01-02T03:04:05.678901Z. */
static const char *after_time(void)
{
    int end = 0;
    assert_int_equal(sscanf(last_line, "%*4d-%*2d-%*2dT%*2d:%*2d:%*2d.%*6dZ %n", &end), 0);
    assert_int_equal(end, 28);
    return last_line + end;
}

static void text_line(void **state)
{
    (void)state;
    char name[16];
    char wanted[256];
    assert_int_equal(pthread_getname_np(pthread_self(), name, sizeof(name)), 0);
    KVC_LOG_WARN(TIER, "map \"full\" at %d\n100%%\\ \x01", 7);
    (void)snprintf(wanted, sizeof(wanted),
                   "warn TIER %s \"map \\\"full\\\" at 7\\u000a100%%\\\\ \\u0001\"\n", name);
    assert_string_equal(after_time(), wanted);
}

static void json_line(void **state)
{
    (void)state;
    kvc_log_set_format(KVC_LOG_JSON);
    KVC_LOG_ERROR(GRPC, "caf\xc3\xa9 \xff \xed\xa0\x80 \xf0\x9f\x8d\x8e tab\t");
    assert_int_equal(strncmp(last_line, "{\"time\":\"", 9), 0);
    assert_non_null(strstr(last_line, "Z\",\"level\":\"error\",\"area\":\"GRPC\",\"thread\":\""));
    assert_non_null(strstr(last_line, "\"message\":\"caf\xc3\xa9 \\ufffd \\ufffd\\ufffd\\ufffd "
                                      "\xf0\x9f\x8d\x8e tab\\u0009\"}\n"));
}

/* Plain, and of bytes that each become six. */
static void long_lines_are_cut_and_whole(void **state)
{
    (void)state;
    char text[6000];
    for (int kind = 0; kind < 2; kind++) {
        memset(text, kind == 0 ? 'x' : '\x01', sizeof(text) - 1);
        text[sizeof(text) - 1] = '\0';
        KVC_LOG_WARN(TEST, "%s", text);
        size_t len = strlen(last_line);
        assert_true(len <= 2048);
        assert_string_equal(last_line + len - 5, "...\"\n");
        kvc_log_set_format(KVC_LOG_JSON);
        KVC_LOG_WARN(TEST, "%s", text);
        len = strlen(last_line);
        assert_true(len <= 2048);
        assert_string_equal(last_line + len - 6, "...\"}\n");
        kvc_log_set_format(KVC_LOG_TEXT);
    }
}

#define WRITERS  4
#define PER_EACH 500

static void write_lines(void *arg)
{
    char text[301];
    memset(text, *(const char *)arg, sizeof(text) - 1);
    text[sizeof(text) - 1] = '\0';
    for (int i = 0; i < PER_EACH; i++)
        KVC_LOG_WARN(TEST, "%s", text);
}

/* Counts the lines of one writer; fails on any line that mixes. */
static void check_lines(FILE *stream)
{
    unsigned counts[WRITERS] = {0};
    char line[1024];
    while (fgets(line, sizeof(line), stream) != NULL) {
        char *message = strchr(line, '"');
        assert_non_null(message);
        assert_int_equal(strlen(message), 303);
        unsigned writer = (unsigned)(message[1] - 'a');
        assert_true(writer < WRITERS);
        for (int i = 1; i <= 300; i++)
            assert_int_equal(message[i], message[1]);
        counts[writer]++;
    }
    for (int i = 0; i < WRITERS; i++)
        assert_int_equal(counts[i], PER_EACH);
}

static void lines_stay_whole(void **state)
{
    (void)state;
    static const char letters[WRITERS] = {'a', 'b', 'c', 'd'};
    kvc_thread threads[WRITERS];
    FILE *stream = tmpfile();
    assert_non_null(stream);
    kvc_log_set_sink(NULL, NULL);
    int saved = dup(STDERR_FILENO);
    assert_true(saved >= 0);
    /* Append, as a log file is opened: each write lands behind the one before it. */
    assert_true(fcntl(fileno(stream), F_SETFL, O_APPEND) == 0);
    assert_true(dup2(fileno(stream), STDERR_FILENO) >= 0);
    for (int i = 0; i < WRITERS; i++)
        assert_ok(kvc_thread_start(&threads[i], "writer", write_lines, (void *)&letters[i]));
    for (int i = 0; i < WRITERS; i++)
        kvc_thread_join(&threads[i]);
    assert_true(dup2(saved, STDERR_FILENO) >= 0);
    assert_int_equal(close(saved), 0);
    rewind(stream);
    check_lines(stream);
    assert_int_equal(fclose(stream), 0);
}

static void fail_assert(void *arg)
{
    kvc_log_set_sink(NULL, NULL);
    KVC_ASSERT(arg == NULL);
}

static void asserts_stay_on(void **state)
{
    (void)state;
    int something;
    assert_int_equal(support_death_signal(fail_assert, NULL), 0);
    assert_int_equal(support_death_signal(fail_assert, &something), SIGABRT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(only_enabled_levels_cost, setup, teardown),
        cmocka_unit_test_setup_teardown(text_line, setup, teardown),
        cmocka_unit_test_setup_teardown(json_line, setup, teardown),
        cmocka_unit_test_setup_teardown(long_lines_are_cut_and_whole, setup, teardown),
        cmocka_unit_test_setup_teardown(lines_stay_whole, setup, teardown),
        cmocka_unit_test_setup_teardown(asserts_stay_on, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
