/*
 * settings_test.c: the example file names every setting, what --print-config prints can be fed
 * back, and bad addresses of the admin port are refused.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "admin.h"
#include "base/text.h"
#include "harness.h"

static bool not_in_files(const kvc_setting *setting)
{
    return strcmp(setting->name, "print_config") == 0;
}

/* Settings of these words; gives the config. */
static kvc_config *load(int argc, char **argv, kvs_settings *settings)
{
    char why[KVC_CONFIG_WHY_BYTES];
    kvc_config *config = NULL;
    kvc_status status = kvc_config_load(&kvs_program, argc, argv, NULL, settings, &config, why);
    if (status == KVC_UNSUPPORTED)
        skip(); /* built without YAML */
    if (status != KVC_OK)
        print_error("%s\n", why);
    assert_int_equal(status, KVC_OK);
    return config;
}

static void test_example_has_every_setting(void **state)
{
    (void)state;
    char *argv[] = {"cachesvc", "--config", EXAMPLE_YAML, NULL};
    kvs_settings settings = {0};
    kvc_config *config = load(3, argv, &settings);
    for (size_t i = 0; i < kvs_program.n_settings; i++) {
        const kvc_setting *setting = &kvs_program.settings[i];
        if (not_in_files(setting))
            continue;
        const char *source = kvc_config_source(config, setting->name);
        if (strncmp(source, EXAMPLE_YAML, strlen(EXAMPLE_YAML)) != 0)
            fail_msg("%s is not in deploy/cachesvc.yaml", setting->name);
    }
    kvc_config_free(config);
}

static void test_printed_settings_can_be_fed_back(void **state)
{
    (void)state;
    char dir[256], path[300];
    char *argv[] = {"cachesvc",     "--lmdb-path",    "/a \"b\"\\c # d: 'e'\t[f]",
                    "--dram-bytes", "3MiB",           "--drain=1500ms",
                    "--log-format", "json",           "--print-config",
                    "--ready-file", "\xc3\xa4 %s {}", NULL};
    kvs_settings first = {0}, second = {0};
    kvc_config *before = load(11, argv, &first);
    char *text = kvs_settings_text(before);
    assert_non_null(text);
    assert_non_null(strstr(text, "dram_bytes: 3MiB # --dram-bytes\n"));
    assert_non_null(strstr(text, "log_level: info # default\n"));
    h_temp_dir(dir);
    snprintf(path, sizeof(path), "%s/printed.yaml", dir);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
    char *again[] = {"cachesvc", "--config", path, NULL};
    kvc_config *after = load(3, again, &second);
    assert_false(second.print_config);
    for (size_t i = 0; i < kvs_program.n_settings; i++) {
        const char *name = kvs_program.settings[i].name;
        if (not_in_files(&kvs_program.settings[i]))
            continue;
        char *a = kvc_config_value_text(before, name), *b = kvc_config_value_text(after, name);
        assert_string_equal(a, b);
        assert_int_equal(strncmp(kvc_config_source(after, name), path, strlen(path)), 0);
        free(a);
        free(b);
    }
    free(text);
    kvc_config_free(before);
    kvc_config_free(after);
    h_remove_dir(dir);
}

static void test_admin_addresses(void **state)
{
    (void)state;
    static const char *const bad[] = {"7812",
                                      ":7812",
                                      "127.0.0.1",
                                      "127.0.0.1:",
                                      "127.0.0.1:70000",
                                      "127.0.0.1:-1",
                                      "127.0.0.1:7a",
                                      "::1:7812",
                                      "[::1]",
                                      "[127.0.0.1]:1",
                                      "[::1:7812",
                                      "example.org:7812",
                                      "http://127.0.0.1:7812",
                                      "1.2.3:4",
                                      "[]:1",
                                      "127.0.0.1:99999999999999999999"};
    static const char *const good[] = {"127.0.0.1:7812", "[::1]:0", "localhost:65535", "0.0.0.0:80",
                                       "[::]:7812"};
    char why[KVC_CONFIG_WHY_BYTES];
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        if (kvs_admin_check(bad[i], why) != KVC_INVALID)
            fail_msg("taken: %s", bad[i]);
        assert_non_null(strstr(why, bad[i]));
        assert_non_null(strstr(why, "HOST:PORT"));
    }
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++)
        assert_int_equal(kvs_admin_check(good[i], why), HAS_ADMIN ? KVC_OK : KVC_UNSUPPORTED);
}

/* A whole server is refused too, with the setting's name. */
static void test_settings_check_asks(void **state)
{
    (void)state;
    kvs_settings settings;
    kvc_config *config;
    char why[KVC_CONFIG_WHY_BYTES];
    assert_int_equal(kvs_settings_defaults(&settings, &config), KVC_OK);
    assert_string_equal(settings.admin_listen, "");
    assert_int_equal(kvs_settings_check(&settings, why), KVC_OK);
    settings.admin_listen = "everywhere";
    assert_int_equal(kvs_settings_check(&settings, why), KVC_INVALID);
    assert_non_null(strstr(why, "admin_listen is 'everywhere'"));
    kvc_config_free(config);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_example_has_every_setting),
        cmocka_unit_test(test_printed_settings_can_be_fed_back),
        cmocka_unit_test(test_admin_addresses),
        cmocka_unit_test(test_settings_check_asks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
