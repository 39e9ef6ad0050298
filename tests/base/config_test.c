/*
 * config_test.c: the layers of settings, the text of every refusal, and the manual page.
 *
 * Each refusal is compared as a whole line, since it is what an operator reads.
 */
#include "support.h"

#include <signal.h>

#include "base/config.h"

#define KIB(n) ((uint64_t)(n) << 10)
#define GIB(n) ((uint64_t)(n) << 30)
#define MS(n)  ((uint64_t)(n)*1000000ull)

struct values {
    uint64_t dram_bytes, grace_ns, workers;
    const char *listen;
    bool durable;
    uint32_t log_level;
};

static const kvc_setting settings[] = {
    {"dram_bytes", KVC_CONFIG_BYTES, offsetof(struct values, dram_bytes), "1GiB", KIB(64),
     GIB(1024), NULL, "Bytes of host memory that values may take."},
    {"grace", KVC_CONFIG_DURATION, offsetof(struct values, grace_ns), "5s", 0, MS(60000), NULL,
     "How long a stop waits for requests that were taken, before it gives them up and closes."},
    {"workers", KVC_CONFIG_UINT, offsetof(struct values, workers), "4", 1, 64, NULL,
     "Worker threads."},
    {"listen", KVC_CONFIG_STRING, offsetof(struct values, listen), "127.0.0.1:7420", 1, 20, NULL,
     "Address to serve."},
    {"durable", KVC_CONFIG_BOOL, offsetof(struct values, durable), "false", 0, 0, NULL,
     "Whether puts are durable."},
    {"log_level", KVC_CONFIG_ENUM, offsetof(struct values, log_level), "info", 0, 0,
     "error|warn|info", "What is logged."},
};

static const kvc_config_program program = {
    .name = "testsvc",
    .version = "1.2.3",
    .brief = "keeps values for a test",
    .synopsis = "[--config FILE] [OPTION]...",
    .description = "testsvc keeps values.\n\nIt is a test.",
    .files = "/etc/testsvc.yaml is read when --config names it.",
    .exit_status = "0 after a clean stop, 2 for bad settings.",
    .examples = "  testsvc --dram-bytes 2GiB",
    .settings = settings,
    .n_settings = sizeof(settings) / sizeof(settings[0]),
};

/* The state of one test: what was loaded, and where its file lies. */
struct load {
    struct values values;
    kvc_config *config;
    char why[KVC_CONFIG_WHY_BYTES];
    char folder[256], path[300];
};

static int setup(void **state)
{
    struct load *load = calloc(1, sizeof(*load));
    assert_non_null(load);
    support_make_folder(load->folder, sizeof(load->folder));
    (void)snprintf(load->path, sizeof(load->path), "%s/s.yaml", load->folder);
    *state = load;
    return 0;
}

static int teardown(void **state)
{
    struct load *load = *state;
    kvc_config_free(load->config);
    support_remove_folder(load->folder);
    free(load);
    return 0;
}

/* Both lists are of at most 7 words and end at the first NULL; the file is named by KVASIR_CONFIG.
 */
static kvc_status load_with(struct load *load, const char *file, char *const *variables,
                            char *const *flags)
{
    char *argv[9] = {(char *)"testsvc"}, *environment[10] = {NULL}, variable[400];
    int argc = 1, n = 0;
    for (; flags != NULL && flags[argc - 1] != NULL; argc++)
        argv[argc] = flags[argc - 1];
    for (; variables != NULL && variables[n] != NULL; n++)
        environment[n] = variables[n];
    if (file != NULL) {
        support_write_file(load->path, file);
        (void)snprintf(variable, sizeof(variable), "KVASIR_CONFIG=%s", load->path);
        environment[n] = variable;
    }
    kvc_config_free(load->config);
    return kvc_config_load(&program, argc, argv, environment, &load->values, &load->config,
                           load->why);
}

#define WORDS(...) ((char *[]){__VA_ARGS__, NULL})

static void defaults_hold_alone(void **state)
{
    struct load *load = *state;
    assert_ok(load_with(load, NULL, NULL, NULL));
    assert_int_equal(load->values.dram_bytes, GIB(1));
    assert_int_equal(load->values.grace_ns, MS(5000));
    assert_int_equal(load->values.workers, 4);
    assert_string_equal(load->values.listen, "127.0.0.1:7420");
    assert_false(load->values.durable);
    assert_int_equal(load->values.log_level, 2);
    assert_string_equal(load->why, "");
    assert_string_equal(kvc_config_source(load->config, "workers"), "default");
    assert_null(kvc_config_source(load->config, "nothing"));
    assert_null(kvc_config_value_text(load->config, "nothing"));
}

static void flags_and_environment_layer(void **state)
{
    struct load *load = *state;
    assert_ok(load_with(
        load, NULL,
        WORDS("KVASIR_WORKERS=5", "KVASIR_GRACE=1m", "KVASIR_DURABLE=yes", "OTHER=1",
              "KVASIR_FAULT=x=once", "KVASIR_SERVICE_PORT_GRPC=tcp://1"),
        WORDS("--workers", "6", "--dram-bytes=128KiB", "--log_level", "error", "--workers=7")));
    assert_int_equal(load->values.workers, 7);
    assert_int_equal(load->values.grace_ns, MS(60000));
    assert_int_equal(load->values.dram_bytes, KIB(128));
    assert_int_equal(load->values.log_level, 0);
    assert_true(load->values.durable);
    assert_string_equal(kvc_config_source(load->config, "workers"), "--workers");
    assert_string_equal(kvc_config_source(load->config, "grace"), "KVASIR_GRACE");
    char *text = kvc_config_value_text(load->config, "dram_bytes");
    assert_string_equal(text, "128KiB");
    free(text);
}

static void bool_flags_stand_alone(void **state)
{
    struct load *load = *state;
    assert_ok(load_with(load, NULL, NULL, WORDS("--durable", "--workers", "2")));
    assert_true(load->values.durable);
    assert_ok(load_with(load, NULL, NULL, WORDS("--durable", "off")));
    assert_false(load->values.durable);
    assert_ok(load_with(load, NULL, NULL, WORDS("--durable=true")));
    assert_true(load->values.durable);
}

static void help_and_version_read_nothing(void **state)
{
    struct load *load = *state;
    char *const broken[] = {(char *)"KVASIR_WORKERS=many", NULL};
    assert_ok(load_with(load, NULL, broken, WORDS("--help")));
    assert_int_equal(kvc_config_asked(load->config), KVC_CONFIG_HELP);
    assert_ok(load_with(load, "no: such\n", broken, WORDS("-h")));
    assert_int_equal(kvc_config_asked(load->config), KVC_CONFIG_HELP);
    assert_ok(load_with(load, NULL, broken, WORDS("--version")));
    assert_int_equal(kvc_config_asked(load->config), KVC_CONFIG_VERSION);
    assert_ok(load_with(load, NULL, NULL, NULL));
    assert_int_equal(kvc_config_asked(load->config), KVC_CONFIG_RUN);
}

static void each_refusal_is_clear(void **state)
{
    static const struct {
        const char *variable, *flag, *next, *why;
    } cases[] = {
        {NULL, "--dram-bytes", "12xb",
         "dram_bytes is '12xb' (--dram-bytes): wanted a size such as 512MiB: digits, then KiB, "
         "MiB, GiB, TiB or nothing for bytes"},
        {NULL, "--dram-bytes=1KiB", NULL,
         "dram_bytes is '1KiB' (--dram-bytes): must be from 64KiB to 1TiB"},
        {"KVASIR_GRACE=5", NULL, NULL,
         "grace is '5' (KVASIR_GRACE): wanted a duration such as 500ms: digits, then ms, s, m or "
         "h"},
        {"KVASIR_GRACE=2h", NULL, NULL, "grace is '2h' (KVASIR_GRACE): must be from 0 to 1m"},
        {NULL, "--workers=4.5", NULL,
         "workers is '4.5' (--workers): wanted a whole number in decimal digits"},
        {NULL, "--workers", "0", "workers is '0' (--workers): must be from 1 to 64"},
        {NULL, "--listen=", NULL, "listen is '' (--listen): must not be empty"},
        {NULL, "--listen", "a-name-that-is-too-long",
         "listen is 'a-name-that-is-too-long' (--listen): must have 1 to 20 bytes, has 23"},
        {NULL, "--durable=maybe", NULL, "durable is 'maybe' (--durable): wanted true or false"},
        {NULL, "--log-level", "loud",
         "log_level is 'loud' (--log-level): must be one of error|warn|info"},
        {NULL, "--log-level", "warn|info",
         "log_level is 'warn|info' (--log-level): must be one of error|warn|info"},
        {NULL, "--log-level=", NULL,
         "log_level is '' (--log-level): must be one of error|warn|info"},
        {NULL, "--worker", "3", "unknown setting '--worker' (a flag); did you mean 'workers'?"},
        {NULL, "--qqq", NULL, "unknown setting '--qqq' (a flag); --help lists the known ones"},
        {"KVASIR_DRAM_BYTE=1GiB", NULL, NULL,
         "unknown setting 'KVASIR_DRAM_BYTE' (environment); did you mean 'dram_bytes'?"},
        {NULL, "--workers", NULL, "--workers needs a value: --workers VALUE"},
        {NULL, "--config", NULL, "--config needs a value: --config FILE"},
        {NULL, "--help=1", NULL, "--help takes no value"},
        {NULL, "start", NULL, "unexpected argument 'start': settings are given as --name value"},
        {NULL, "--durable", "maybe",
         "unexpected argument 'maybe': settings are given as --name value"},
        {NULL, "--", NULL, "unexpected argument '--': settings are given as --name value"},
        {NULL, "--listen", "a\nb\x1b[2J and more than 20",
         "listen is 'a b [2J and more than 20' (--listen): must have 1 to 20 bytes, has 24"},
        /* A higher layer does not excuse a lower one. */
        {"KVASIR_WORKERS=x", "--workers", "3",
         "workers is 'x' (KVASIR_WORKERS): wanted a whole number in decimal digits"},
    };
    struct load *load = *state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char *flags[] = {(char *)cases[i].flag, (char *)cases[i].next, NULL};
        char *variables[] = {(char *)cases[i].variable, NULL};
        assert_status(load_with(load, NULL, variables, flags), KVC_INVALID);
        assert_string_equal(load->why, cases[i].why);
        assert_null(load->config);
    }
}

static void required_settings_must_be_given(void **state)
{
    struct load *load = *state;
    static const kvc_setting required[] = {
        {"data_dir", KVC_CONFIG_STRING, 0, NULL, 1, 100, NULL, "Folder of the store."}};
    const kvc_config_program needy = {
        .name = "needy", .brief = "b", .synopsis = "", .settings = required, .n_settings = 1};
    const char *folder = NULL;
    char *argv[] = {(char *)"needy", (char *)"--data-dir=/x", NULL};
    assert_status(kvc_config_load(&needy, 1, argv, NULL, &folder, &load->config, load->why),
                  KVC_INVALID);
    assert_string_equal(load->why, "data_dir must be given: --data-dir VALUE, KVASIR_DATA_DIR, or "
                                   "'data_dir: VALUE' in the file");
    assert_ok(kvc_config_load(&needy, 2, argv, NULL, &folder, &load->config, load->why));
    assert_string_equal(folder, "/x");
}

static void load_broken_table(void *arg)
{
    static const kvc_setting broken[] = {
        {"n", KVC_CONFIG_UINT, 0, "9", 1, 5, NULL, "Default outside of its own range."}};
    const kvc_config_program wrong = {
        .name = "w", .brief = "b", .synopsis = "", .settings = broken, .n_settings = 1};
    struct load *load = arg;
    uint64_t n;
    char *argv[] = {(char *)"w", NULL};
    (void)!kvc_config_load(&wrong, 1, argv, NULL, &n, &load->config, load->why);
}

static void a_broken_default_is_our_bug(void **state)
{
    assert_int_equal(support_death_signal(load_broken_table, *state), SIGABRT);
}

#ifdef KVASIR_HAVE_YAML

static void the_file_is_the_lowest_layer(void **state)
{
    struct load *load = *state;
    const char *file = "# settings\n---\ndram_bytes: 2GiB # two\n\nlisten: \"0.0.0.0:1\"\n"
                       "workers: 9\ngrace: 1s\n'durable': true\n";
    char source[400];
    assert_ok(
        load_with(load, file, WORDS("KVASIR_WORKERS=10", "KVASIR_GRACE=2s"), WORDS("--grace=3s")));
    assert_int_equal(load->values.dram_bytes, GIB(2));
    assert_string_equal(load->values.listen, "0.0.0.0:1");
    assert_true(load->values.durable);
    assert_int_equal(load->values.workers, 10);
    assert_int_equal(load->values.grace_ns, MS(3000));
    (void)snprintf(source, sizeof(source), "%s:3", load->path);
    assert_string_equal(kvc_config_source(load->config, "dram_bytes"), source);
    /* --config wins over KVASIR_CONFIG. */
    assert_status(load_with(load, file, NULL, WORDS("--config", "no/such")), KVC_NOT_FOUND);
    assert_string_equal(load->why,
                        "cannot open the settings file no/such: No such file or directory");
    assert_ok(load_with(load, file, NULL, WORDS("--config=")));
    assert_int_equal(load->values.workers, 4);
}

static void empty_files_are_fine(void **state)
{
    struct load *load = *state;
    assert_ok(load_with(load, "", NULL, NULL));
    assert_ok(load_with(load, "# nothing\n\n---\n  # more\n", NULL, NULL));
    assert_ok(load_with(load, "\xff\xfe", NULL, NULL)); /* byte order marks and no more */
    assert_ok(load_with(load, "\xef\xbb\xbf", NULL, NULL));
    assert_ok(load_with(load, "{workers: 8, listen: x}\n", NULL, NULL));
    assert_int_equal(load->values.workers, 8);
    assert_string_equal(kvc_config_source(load->config, "workers"), load->path);
}

static void each_refusal_of_a_file_is_clear(void **state)
{
    /* In why, @ stands for the file's path. */
    static const struct {
        const char *file, *why;
    } cases[] = {
        {"workers: 3\ndram_bytes: lots\n",
         "dram_bytes is 'lots' (@:2): wanted a size such as 512MiB: digits, then KiB, MiB, GiB, "
         "TiB or nothing for bytes"},
        {"workers: 3\ndram-bytes: 1GiB\n",
         "unknown setting 'dram-bytes' (@:2); did you mean 'dram_bytes'?"},
        {"colour: red\n", "unknown setting 'colour' (@:1); --help lists the known ones"},
        {"workers: 3\n\nworkers: 4\n", "workers is given twice: @:3 and line 1"},
        {"workers:\n", "workers is '' (@:1): wanted a whole number in decimal digits"},
        {"workers: {a: 1}\n",
         "@:1: the file must be a flat mapping of name: value: Expecting STRING, got event: "
         "MAPPING_START"},
        {"workers:\n  - 1\n",
         "@:2: the file must be a flat mapping of name: value: Expecting STRING, got event: "
         "SEQUENCE_START"},
        {"- workers\n",
         "@: the file must be a flat mapping of name: value: Expecting MAPPING, got event: "
         "SEQUENCE_START"},
        {"{colour: red}\n",
         "@:1: the file must be a flat mapping of name: value: Unexpected key: colour"},
        {"listen: \"open\n", "@:1: the file must be a flat mapping of name: value: libyaml: found "
                             "unexpected end of stream"},
        {"listen: &a x\nworkers: *a\n",
         "@:2: the file must be a flat mapping of name: value: YAML alias unsupported"},
    };
    struct load *load = *state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char wanted[KVC_CONFIG_WHY_BYTES];
        const char *at = strchr(cases[i].why, '@');
        assert_status(load_with(load, cases[i].file, NULL, NULL), KVC_INVALID);
        (void)snprintf(wanted, sizeof(wanted), "%.*s%s%s", (int)(at - cases[i].why), cases[i].why,
                       load->path, at + 1);
        assert_string_equal(load->why, wanted);
    }
}

static void odd_files_are_refused(void **state)
{
    struct load *load = *state;
    size_t len_bytes = (1u << 20) + 2;
    char *large = malloc(len_bytes);
    assert_non_null(large);
    memset(large, '\n', len_bytes - 1);
    large[len_bytes - 1] = '\0';
    assert_status(load_with(load, large, NULL, NULL), KVC_INVALID);
    assert_non_null(strstr(load->why, "is longer than 1MiB"));
    free(large);
    assert_status(load_with(load, NULL, NULL, WORDS("--config", load->folder)), KVC_IO);
    assert_non_null(strstr(load->why, "cannot read the settings file"));
    /* Nothing that a file may hold crashes the loader. */
    support_random random = support_seed(4);
    static const char letters[] = "workers:dram_bytes 1GiB\n\t{}[]'\"#-&*!|>%@?,\x01\xff";
    for (int i = 0; i < 3000; i++) {
        char text[64] = "";
        size_t n = support_below(&random, sizeof(text));
        for (size_t j = 0; j + 1 < n; j++)
            text[j] = letters[support_below(&random, sizeof(letters) - 1)];
        kvc_status status = load_with(load, text, NULL, NULL);
        assert_true(status == KVC_OK || (status == KVC_INVALID && load->why[0] != '\0'));
    }
}

#else

static void a_file_is_unsupported(void **state)
{
    struct load *load = *state;
    assert_status(load_with(load, "workers: 1\n", NULL, NULL), KVC_UNSUPPORTED);
    assert_non_null(strstr(load->why, "this build has no libcyaml"));
}

#endif

static void help_is_a_manual_page(void **state)
{
    (void)state;
    char *page = kvc_config_help(&program);
    assert_non_null(page);
    static const char *const sections[] = {"NAME\n",          "\nSYNOPSIS\n",    "\nDESCRIPTION\n",
                                           "\nOPTIONS\n",     "\nENVIRONMENT\n", "\nFILES\n",
                                           "\nEXIT STATUS\n", "\nEXAMPLES\n"};
    const char *at = page;
    for (size_t i = 0; i < sizeof(sections) / sizeof(sections[0]); i++) {
        at = strstr(at, sections[i]);
        assert_non_null(at);
    }
    assert_non_null(strstr(page, "       testsvc - keeps values for a test\n"));
    assert_non_null(strstr(page, "       testsvc [--config FILE] [OPTION]...\n"));
    assert_non_null(strstr(page, "       --log-level error|warn|info\n"
                                 "              What is logged. Default: info.\n"));
    assert_non_null(strstr(page, "              Worker threads. From 1 to 64. Default: 4.\n"));
    assert_non_null(strstr(page, "       KVASIR_DRAM_BYTES\n"));
    assert_non_null(strstr(page, "         testsvc --dram-bytes 2GiB\n"));
    for (const char *line = page; *line != '\0'; line += strcspn(line, "\n") + 1) {
        size_t len = strcspn(line, "\n");
        assert_true(len <= 80);
        assert_true(len == 0 || line[len - 1] != ' ');
    }
    free(page);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(defaults_hold_alone),
        TEST(flags_and_environment_layer),
        TEST(bool_flags_stand_alone),
        TEST(help_and_version_read_nothing),
        TEST(each_refusal_is_clear),
        TEST(required_settings_must_be_given),
        TEST(a_broken_default_is_our_bug),
#ifdef KVASIR_HAVE_YAML
        TEST(the_file_is_the_lowest_layer),
        TEST(empty_files_are_fine),
        TEST(each_refusal_of_a_file_is_clear),
        TEST(odd_files_are_refused),
#else
        TEST(a_file_is_unsupported),
#endif
        TEST(help_is_a_manual_page),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
