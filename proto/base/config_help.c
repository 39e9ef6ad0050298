/*
 * config_help.c: the manual page of a program, made from its table of settings.
 *
 * Any thread, no state. What --help says cannot differ from what is parsed, since both come from
 * one table.
 */
#include <stdlib.h>
#include <string.h>

#include "config_private.h"

#define PAGE_COLUMNS 80

static void put_indent(kvc_strbuf *page, size_t columns)
{
    for (size_t i = 0; i < columns; i++)
        kvc_strbuf_put(page, " ", 1);
}

/* One paragraph, broken at spaces. */
static void put_paragraph(kvc_strbuf *page, size_t indent, const char *text, size_t len_bytes)
{
    size_t column = 0;
    const char *end = text + len_bytes;
    while (text < end) {
        size_t word_bytes = 0;
        while (text + word_bytes < end && text[word_bytes] != ' ')
            word_bytes++;
        if (column > 0 && column + 1 + word_bytes > PAGE_COLUMNS) {
            kvc_strbuf_put(page, "\n", 1);
            column = 0;
        }
        if (column == 0) {
            put_indent(page, indent);
            column = indent;
        } else {
            kvc_strbuf_put(page, " ", 1);
            column++;
        }
        kvc_strbuf_put(page, text, word_bytes);
        column += word_bytes;
        text += word_bytes;
        while (text < end && *text == ' ')
            text++;
    }
    kvc_strbuf_put(page, "\n", 1);
}

/* Lines are paragraphs; those that start with a space are kept as they are, indented. */
static void put_text(kvc_strbuf *page, size_t indent, const char *text)
{
    while (*text != '\0') {
        size_t len_bytes = strcspn(text, "\n");
        if (len_bytes > 0 && text[0] == ' ') {
            put_indent(page, indent);
            kvc_strbuf_put(page, text, len_bytes);
            kvc_strbuf_put(page, "\n", 1);
        } else {
            put_paragraph(page, indent, text, len_bytes);
        }
        text += len_bytes + (text[len_bytes] == '\n' ? 1 : 0);
    }
}

static void put_section(kvc_strbuf *page, const char *title, const char *text)
{
    if (text == NULL)
        return;
    kvc_strbuf_putf(page, "\n%s\n", title);
    put_text(page, 7, text);
}

static const char *value_word(kvc_config_type type)
{
    switch (type) {
    case KVC_CONFIG_BYTES:
        return "SIZE";
    case KVC_CONFIG_DURATION:
        return "TIME";
    case KVC_CONFIG_UINT:
        return "NUMBER";
    case KVC_CONFIG_STRING:
        return "TEXT";
    case KVC_CONFIG_BOOL:
        return "true|false";
    case KVC_CONFIG_ENUM:
        break;
    }
    return "WORD";
}

/* "From 64MiB to 16TiB." where the type has a range worth telling. */
static void put_range(kvc_strbuf *rules, const kvc_setting *setting)
{
    char min[KVC_TEXT_BYTES], max[KVC_TEXT_BYTES];
    switch (setting->type) {
    case KVC_CONFIG_BYTES:
        kvc_strbuf_putf(rules, " From %s to %s.", kvc_bytes_text(setting->min, min),
                        kvc_bytes_text(setting->max, max));
        break;
    case KVC_CONFIG_DURATION:
        kvc_strbuf_putf(rules, " From %s to %s.", kvc_duration_text(setting->min, min),
                        kvc_duration_text(setting->max, max));
        break;
    case KVC_CONFIG_UINT:
        kvc_strbuf_putf(rules, " From %llu to %llu.", (unsigned long long)setting->min,
                        (unsigned long long)setting->max);
        break;
    case KVC_CONFIG_STRING:
    case KVC_CONFIG_BOOL:
    case KVC_CONFIG_ENUM:
        break;
    }
}

static void put_option(kvc_strbuf *page, const kvc_setting *setting)
{
    char flag[KVCI_NAME_BYTES + 8];
    kvci_config_flag(setting->name, flag);
    kvc_strbuf_putf(page, "       %s %s\n", flag,
                    setting->type == KVC_CONFIG_ENUM ? setting->choices
                                                     : value_word(setting->type));
    kvc_strbuf rules = {0};
    kvc_strbuf_putf(&rules, "%s", setting->help);
    put_range(&rules, setting);
    if (setting->initial == NULL)
        kvc_strbuf_putf(&rules, " Must be given.");
    else if (setting->initial[0] == '\0')
        kvc_strbuf_putf(&rules, " Default: empty.");
    else
        kvc_strbuf_putf(&rules, " Default: %s.", setting->initial);
    char *text = kvc_strbuf_take(&rules);
    if (text == NULL)
        page->failed = true;
    else
        put_text(page, 14, text);
    free(text);
    kvc_strbuf_put(page, "\n", 1);
}

static void put_options(kvc_strbuf *page, const kvc_config_program *program)
{
    kvc_strbuf_putf(page, "\nOPTIONS\n");
    put_text(page, 7,
             "Each setting can be given in the YAML file (name: value, with _ for -), in the "
             "environment and as a flag, --name value or --name=value. The later of these "
             "wins over the earlier.\n");
    kvc_strbuf_putf(page, "\n");
    for (size_t i = 0; i < program->n_settings; i++)
        put_option(page, &program->settings[i]);
    kvc_strbuf_putf(page, "       --config FILE\n");
    put_text(page, 14, "Reads settings from this YAML file. Default: none.");
    kvc_strbuf_putf(page, "\n       -h, --help\n");
    put_text(page, 14, "Shows this page.");
    kvc_strbuf_putf(page, "\n       --version\n");
    put_text(page, 14, "Shows the version.");
}

static void put_environment(kvc_strbuf *page, const kvc_config_program *program)
{
    kvc_strbuf_putf(page, "\nENVIRONMENT\n");
    put_text(page, 7,
             "KVASIR_CONFIG names the file where --config does not. KVASIR_FAULT arms fault points "
             "(for tests). Every option has a variable:");
    for (size_t i = 0; i < program->n_settings; i++) {
        char shown[KVCI_NAME_BYTES + 8];
        kvci_config_variable(program->settings[i].name, shown);
        kvc_strbuf_putf(page, "       %s\n", shown);
    }
}

char *kvc_config_help(const kvc_config_program *program)
{
    kvc_strbuf page = {0};
    kvc_strbuf_putf(&page, "NAME\n       %s - %s\n\nSYNOPSIS\n       %s %s\n", program->name,
                    program->brief, program->name, program->synopsis);
    put_section(&page, "DESCRIPTION", program->description);
    put_options(&page, program);
    put_environment(&page, program);
    put_section(&page, "FILES", program->files);
    put_section(&page, "EXIT STATUS", program->exit_status);
    put_section(&page, "EXAMPLES", program->examples);
    return kvc_strbuf_take(&page);
}
