/*
 * config_fuzz.c: a settings file, a fault spec and the number parsers over arbitrary bytes.
 *
 * The file goes through a memfd, since kvc_config_load takes a path. What is checked beside memory
 * errors: a refusal always says why, on one line; what was taken is in range; numbers come back.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/assert.h"
#include "base/config.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/text.h"
#include "fuzz.h"

struct values {
    uint64_t dram_bytes, grace_ns, workers;
    const char *listen;
    bool durable;
    uint32_t log_level;
};

static const kvc_setting settings[] = {
    {"dram_bytes", KVC_CONFIG_BYTES, offsetof(struct values, dram_bytes), "1GiB", 65536, 1ull << 40,
     NULL, "h"},
    {"grace", KVC_CONFIG_DURATION, offsetof(struct values, grace_ns), "5s", 0, 1ull << 40, NULL,
     "h"},
    {"workers", KVC_CONFIG_UINT, offsetof(struct values, workers), "4", 1, 64, NULL, "h"},
    {"listen", KVC_CONFIG_STRING, offsetof(struct values, listen), "x", 1, 20, NULL, "h"},
    {"durable", KVC_CONFIG_BOOL, offsetof(struct values, durable), "no", 0, 0, NULL, "h"},
    {"log_level", KVC_CONFIG_ENUM, offsetof(struct values, log_level), "b", 0, 0, "a|b|c", "h"},
};

static const kvc_config_program program = {
    .name = "fuzz",
    .brief = "b",
    .synopsis = "s",
    .settings = settings,
    .n_settings = sizeof(settings) / sizeof(settings[0]),
};

static void load_file(const char *text, size_t len_bytes)
{
    char path[64], why[KVC_CONFIG_WHY_BYTES];
    int fd = memfd_create("settings", MFD_CLOEXEC);
    KVC_ASSERT(fd >= 0 && write(fd, text, len_bytes) == (ssize_t)len_bytes);
    (void)snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    char *argv[] = {(char *)"fuzz", (char *)"--config", path, NULL};
    struct values values;
    kvc_config *config;
    kvc_status status = kvc_config_load(&program, 3, argv, NULL, &values, &config, why);
    if (status == KVC_OK) {
        size_t listen_bytes = strlen(values.listen);
        KVC_ASSERT(values.workers >= 1 && values.workers <= 64 && values.log_level <= 2);
        KVC_ASSERT(values.dram_bytes >= 65536 && listen_bytes >= 1 && listen_bytes <= 20);
    } else {
        KVC_ASSERT(why[0] != '\0' && strchr(why, '\n') == NULL);
    }
    kvc_config_free(config);
    (void)close(fd);
}

static void parse_numbers(const char *text)
{
    char out[KVC_TEXT_BYTES];
    uint64_t value, back;
    bool yes;
    if (kvc_bytes_parse(text, &value) == KVC_OK)
        KVC_ASSERT(kvc_bytes_parse(kvc_bytes_text(value, out), &back) == KVC_OK && back == value);
    if (kvc_duration_parse(text, &value) == KVC_OK)
        KVC_ASSERT(kvc_duration_parse(kvc_duration_text(value, out), &back) == KVC_OK &&
                   back == value);
    (void)!kvc_bool_parse(text, &yes);
    (void)kvc_edit_distance(text, "dram_bytes");
    if (kvc_fault_arm(text) == KVC_OK)
        (void)KVC_FAULT("a.point");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    kvc_log_set_level(KVC_LOG_LEVEL_OFF);
    char *text = malloc(size + 1);
    KVC_ASSERT(text != NULL);
    if (size > 0)
        memcpy(text, data, size);
    text[size] = '\0';
    load_file(text, size);
    parse_numbers(text);
    free(text);
    return 0;
}
