/*
 * config_value.c: one value of one setting: parse, check, store, show; and names that are unknown.
 *
 * Main thread. Invariant: texts[i] and sources[i] are set together with the field in the program's
 * struct; on an error the field keeps its old value.
 */
#include "config_private.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

kvc_status kvci_config_why(kvc_config *config, kvc_status status, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    (void)vsnprintf(config->why, KVC_CONFIG_WHY_BYTES, fmt, args);
    va_end(args);
    for (char *at = config->why; *at != '\0'; at++) {
        if (iscntrl((unsigned char)*at))
            *at = ' ';
    }
    return status;
}

int kvci_config_find(const kvc_config_program *program, const char *name)
{
    for (size_t i = 0; i < program->n_settings; i++) {
        if (strcmp(program->settings[i].name, name) == 0)
            return (int)i;
    }
    return -1;
}

const char *kvci_config_nearest(const kvc_config_program *program, const char *name)
{
    const char *nearest = NULL;
    /* A third of the letters wrong is no longer a slip of the finger. */
    uint32_t best = (uint32_t)strnlen(name, KVCI_NAME_BYTES) / 3 + 1;
    for (size_t i = 0; i < program->n_settings; i++) {
        uint32_t distance = kvc_edit_distance(program->settings[i].name, name);
        if (distance < best) {
            best = distance;
            nearest = program->settings[i].name;
        }
    }
    return nearest;
}

kvc_status kvci_config_unknown(kvc_config *config, const char *shown, const char *name,
                               const char *source)
{
    const char *nearest = kvci_config_nearest(config->program, name);
    if (nearest == NULL)
        return kvci_config_why(config, KVC_INVALID,
                               "unknown setting '%s' (%s); --help lists the known ones", shown,
                               source);
    return kvci_config_why(config, KVC_INVALID, "unknown setting '%s' (%s); did you mean '%s'?",
                           shown, source, nearest);
}

void kvci_config_variable(const char *name, char out[KVCI_NAME_BYTES + 8])
{
    (void)snprintf(out, KVCI_NAME_BYTES + 8, "KVASIR_%s", name);
    for (char *at = out; *at != '\0'; at++)
        *at = (char)toupper((unsigned char)*at);
}

void kvci_config_flag(const char *name, char out[KVCI_NAME_BYTES + 8])
{
    (void)snprintf(out, KVCI_NAME_BYTES + 8, "--%s", name);
    for (char *at = out; *at != '\0'; at++)
        *at = *at == '_' ? '-' : *at;
}

static void number_text(kvc_config_type type, uint64_t value, char out[KVC_TEXT_BYTES])
{
    if (type == KVC_CONFIG_BYTES)
        (void)kvc_bytes_text(value, out);
    else if (type == KVC_CONFIG_DURATION)
        (void)kvc_duration_text(value, out);
    else
        (void)snprintf(out, KVC_TEXT_BYTES, "%llu", (unsigned long long)value);
}

static kvc_status refuse(kvc_config *config, const kvc_setting *setting, const char *text,
                         const char *source, const char *rule)
{
    return kvci_config_why(config, KVC_INVALID, "%s is '%s' (%s): %s", setting->name, text, source,
                           rule);
}

/* BYTES, DURATION and UINT: syntax, then range. */
static kvc_status set_number(kvc_config *config, const kvc_setting *setting, const char *text,
                             const char *source)
{
    static const char *const rules[] = {
        [KVC_CONFIG_BYTES] = "wanted a size such as 512MiB: digits, then KiB, MiB, GiB, TiB or "
                             "nothing for bytes",
        [KVC_CONFIG_DURATION] = "wanted a duration such as 500ms: digits, then ms, s, m or h",
        [KVC_CONFIG_UINT] = "wanted a whole number in decimal digits",
    };
    uint64_t value;
    kvc_status status = setting->type == KVC_CONFIG_BYTES      ? kvc_bytes_parse(text, &value)
                        : setting->type == KVC_CONFIG_DURATION ? kvc_duration_parse(text, &value)
                                                               : kvc_uint_parse(text, &value);
    if (status != KVC_OK)
        return refuse(config, setting, text, source, rules[setting->type]);
    if (value < setting->min || value > setting->max) {
        char min[KVC_TEXT_BYTES], max[KVC_TEXT_BYTES], rule[128];
        number_text(setting->type, setting->min, min);
        number_text(setting->type, setting->max, max);
        (void)snprintf(rule, sizeof(rule), "must be from %s to %s", min, max);
        return refuse(config, setting, text, source, rule);
    }
    memcpy((char *)config->values + setting->offset, &value, sizeof(value));
    return KVC_OK;
}

static kvc_status set_string(kvc_config *config, const kvc_setting *setting, const char *text,
                             const char *source)
{
    size_t len_bytes = strlen(text);
    if (len_bytes >= setting->min && len_bytes <= setting->max) {
        memcpy((char *)config->values + setting->offset, &text, sizeof(text));
        return KVC_OK;
    }
    char rule[96];
    if (len_bytes == 0)
        (void)snprintf(rule, sizeof(rule), "must not be empty");
    else
        (void)snprintf(rule, sizeof(rule), "must have %llu to %llu bytes, has %zu",
                       (unsigned long long)setting->min, (unsigned long long)setting->max,
                       len_bytes);
    return refuse(config, setting, text, source, rule);
}

static kvc_status set_bool(kvc_config *config, const kvc_setting *setting, const char *text,
                           const char *source)
{
    bool value;
    if (kvc_bool_parse(text, &value) != KVC_OK)
        return refuse(config, setting, text, source, "wanted true or false");
    memcpy((char *)config->values + setting->offset, &value, sizeof(value));
    return KVC_OK;
}

static kvc_status set_enum(kvc_config *config, const kvc_setting *setting, const char *text,
                           const char *source)
{
    size_t len_bytes = strlen(text);
    uint32_t index = 0;
    for (const char *at = setting->choices; *at != '\0'; index++) {
        size_t word_bytes = strcspn(at, "|");
        if (word_bytes == len_bytes && strncmp(at, text, word_bytes) == 0) {
            memcpy((char *)config->values + setting->offset, &index, sizeof(index));
            return KVC_OK;
        }
        at += word_bytes + (at[word_bytes] == '|' ? 1 : 0);
    }
    char rule[256];
    (void)snprintf(rule, sizeof(rule), "must be one of %s", setting->choices);
    return refuse(config, setting, text, source, rule);
}

kvc_status kvci_config_set(kvc_config *config, int setting, const char *text, const char *source)
{
    const kvc_setting *row = &config->program->settings[setting];
    const char *own_text = kvc_arena_strndup(&config->arena, text, strlen(text));
    const char *own_source = kvc_arena_strndup(&config->arena, source, strlen(source));
    if (own_text == NULL || own_source == NULL)
        return kvci_config_why(config, KVC_NO_MEMORY, "%s (%s): the settings are too long",
                               row->name, source);
    kvc_status status = KVC_INVALID;
    switch (row->type) {
    case KVC_CONFIG_BYTES:
    case KVC_CONFIG_DURATION:
    case KVC_CONFIG_UINT:
        status = set_number(config, row, own_text, own_source);
        break;
    case KVC_CONFIG_STRING:
        status = set_string(config, row, own_text, own_source);
        break;
    case KVC_CONFIG_BOOL:
        status = set_bool(config, row, own_text, own_source);
        break;
    case KVC_CONFIG_ENUM:
        status = set_enum(config, row, own_text, own_source);
        break;
    }
    if (status == KVC_OK) {
        config->texts[setting] = own_text;
        config->sources[setting] = own_source;
    }
    return status;
}
