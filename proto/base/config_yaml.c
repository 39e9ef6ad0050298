/*
 * config_yaml.c: the YAML layer; the only file that sees cyaml.h.
 *
 * Main thread. The file is one flat mapping of name: value. libcyaml parses it; since it tells
 * neither lines nor unknown names to its caller, a scan over the lines before it finds on which
 * line each name stands. Values go through the same parser as those of flags.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "config_private.h"

#ifdef KVC_HAVE_YAML
#include <cyaml/cyaml.h>

#define FILE_MAX_BYTES (1u << 20)
#define SOURCE_BYTES   512

/* Everything that one load needs. */
struct file {
    kvc_config *config;
    const char *path;
    char *text; /* malloc'd, NUL-terminated */
    size_t len_bytes;
    unsigned *lines; /* [n_settings] line of each name, 0: not there; malloc'd */
    char error[256]; /* the first that libcyaml logged */
    unsigned error_line;
};

static void source_of(const struct file *file, unsigned line, char out[SOURCE_BYTES])
{
    if (line > 0)
        (void)snprintf(out, SOURCE_BYTES, "%s:%u", file->path, line);
    else
        (void)snprintf(out, SOURCE_BYTES, "%s", file->path);
}

static kvc_status read_file(struct file *file)
{
    FILE *stream = fopen(file->path, "re");
    if (stream == NULL)
        return kvci_config_why(file->config, errno == ENOENT ? KVC_NOT_FOUND : KVC_IO,
                               "cannot open the settings file %s: %s", file->path, strerror(errno));
    kvc_status status = KVC_OK;
    file->text = malloc(FILE_MAX_BYTES + 1);
    if (file->text == NULL) {
        status = kvci_config_why(file->config, KVC_NO_MEMORY, "out of memory");
        goto out;
    }
    file->len_bytes = fread(file->text, 1, FILE_MAX_BYTES + 1, stream);
    if (ferror(stream))
        status = kvci_config_why(file->config, KVC_IO, "cannot read the settings file %s: %s",
                                 file->path, strerror(errno));
    else if (file->len_bytes > FILE_MAX_BYTES)
        status = kvci_config_why(file->config, KVC_INVALID,
                                 "the settings file %s is longer than 1MiB", file->path);
    else
        file->text[file->len_bytes] = '\0';
out:
    (void)fclose(stream);
    return status;
}

/* A name that starts a line: copies it to name. False: the line starts no entry. */
static bool entry_name(const char *line, size_t len_bytes, char name[KVCI_NAME_BYTES])
{
    bool quoted = len_bytes > 0 && (line[0] == '"' || line[0] == '\'');
    const char *first = line + (quoted ? 1 : 0);
    size_t n = 0;
    while (first + n < line + len_bytes && n < KVCI_NAME_BYTES - 1 &&
           strchr(quoted ? "\"'" : " \t:#{}[]", first[n]) == NULL)
        n++;
    const char *after = first + n + (quoted ? 1 : 0);
    while (after < line + len_bytes && (*after == ' ' || *after == '\t'))
        after++;
    if (n == 0 || after >= line + len_bytes || *after != ':')
        return false;
    memcpy(name, first, n);
    name[n] = '\0';
    return true;
}

/* Notes the line of each name; refuses unknown names and names that come twice. */
static kvc_status scan_lines(struct file *file)
{
    KVC_ASSERT(file->text != NULL);
    unsigned number = 1;
    for (const char *line = file->text; *line != '\0'; number++) {
        size_t len_bytes = strcspn(line, "\n");
        char name[KVCI_NAME_BYTES], source[SOURCE_BYTES];
        if (entry_name(line, len_bytes, name)) {
            int setting = kvci_config_find(file->config->program, name);
            source_of(file, number, source);
            if (setting < 0)
                return kvci_config_unknown(file->config, name, name, source);
            if (file->lines[setting] != 0)
                return kvci_config_why(file->config, KVC_INVALID,
                                       "%s is given twice: %s and line %u", name, source,
                                       file->lines[setting]);
            file->lines[setting] = number;
        }
        line += len_bytes + (line[len_bytes] == '\n' ? 1 : 0);
    }
    return KVC_OK;
}

/* Keeps libcyaml's first message, and the line that it or the trace after it names. */
static void keep_error(cyaml_log_t level, void *ctx, const char *fmt, va_list args)
{
    struct file *file = ctx;
    char message[sizeof(file->error)];
    if (level < CYAML_LOG_ERROR)
        return;
    (void)vsnprintf(message, sizeof(message), fmt, args);
    const char *at = strstr(message, "line: ");
    if (file->error_line == 0 && at != NULL)
        file->error_line = (unsigned)strtoul(at + 6, NULL, 10);
    if (file->error[0] == '\0' && strncmp(message, "Load: ", 6) == 0 &&
        strncmp(message + 6, "Backtrace", 9) != 0)
        (void)snprintf(file->error, sizeof(file->error), "%s", message + 6);
    file->error[strcspn(file->error, "\n")] = '\0';
}

/* One optional string per setting; data is an array of char * in the table's order. */
static cyaml_schema_field_t *make_fields(const kvc_config_program *program)
{
    cyaml_schema_field_t *fields = calloc(program->n_settings + 1, sizeof(*fields));
    for (size_t i = 0; fields != NULL && i < program->n_settings; i++)
        fields[i] = (cyaml_schema_field_t){
            .key = program->settings[i].name,
            .data_offset = (uint32_t)(i * sizeof(char *)),
            .value =
                {
                    .type = CYAML_STRING,
                    .flags = CYAML_FLAG_POINTER | CYAML_FLAG_OPTIONAL,
                    .data_size = sizeof(char),
                    .string = {.min = 0, .max = CYAML_UNLIMITED},
                },
        };
    return fields;
}

static kvc_status apply_values(struct file *file, char *const *values)
{
    for (size_t i = 0; i < file->config->program->n_settings; i++) {
        char source[SOURCE_BYTES];
        if (values[i] == NULL)
            continue;
        source_of(file, file->lines[i], source);
        kvc_status status = kvci_config_set(file->config, (int)i, values[i], source);
        if (status != KVC_OK)
            return status;
    }
    return KVC_OK;
}

/* True: there is something other than comments, blank lines and document marks. */
static bool has_content(const char *text)
{
    while (*text != '\0') {
        size_t len_bytes = strcspn(text, "\n");
        size_t blank_bytes = strspn(text, " \t\r");
        const char *first = text + blank_bytes;
        bool mark = strncmp(first, "---", 3) == 0 && strspn(first + 3, " \t\r") == len_bytes - 3;
        if (blank_bytes < len_bytes && *first != '#' && !mark)
            return true;
        text += len_bytes + (text[len_bytes] == '\n' ? 1 : 0);
    }
    return false;
}

static kvc_status parse_file(struct file *file)
{
    if (!has_content(file->text))
        return KVC_OK;
    const kvc_config_program *program = file->config->program;
    cyaml_schema_field_t *fields = make_fields(program);
    if (fields == NULL)
        return kvci_config_why(file->config, KVC_NO_MEMORY, "out of memory");
    const cyaml_schema_value_t schema = {
        .type = CYAML_MAPPING,
        .flags = CYAML_FLAG_POINTER,
        .data_size = (uint32_t)(program->n_settings * sizeof(char *)),
        .mapping = {.fields = fields},
    };
    const cyaml_config_t cyaml = {
        .log_fn = keep_error,
        .log_ctx = file,
        .mem_fn = cyaml_mem,
        .log_level = CYAML_LOG_ERROR,
        .flags = CYAML_CFG_NO_ALIAS,
    };
    cyaml_data_t *data = NULL;
    kvc_status status;
    cyaml_err_t rc =
        cyaml_load_data((const uint8_t *)file->text, file->len_bytes, &cyaml, &schema, &data, NULL);
    if (rc == CYAML_OK) {
        /* A document with nothing in it, such as a lone byte order mark, has no data. */
        status = data == NULL ? KVC_OK : apply_values(file, data);
    } else {
        char source[SOURCE_BYTES];
        source_of(file, file->error_line, source);
        status = kvci_config_why(file->config, rc == CYAML_ERR_OOM ? KVC_NO_MEMORY : KVC_INVALID,
                                 "%s: the file must be a flat mapping of name: value: %s", source,
                                 file->error[0] != '\0' ? file->error : cyaml_strerror(rc));
    }
    if (data != NULL)
        (void)cyaml_free(&cyaml, &schema, data, 0);
    free(fields);
    return status;
}

kvc_status kvci_config_load_file(kvc_config *config, const char *path)
{
    struct file file = {.config = config, .path = path};
    file.lines = calloc(config->program->n_settings, sizeof(*file.lines));
    kvc_status status = file.lines == NULL ? kvci_config_why(config, KVC_NO_MEMORY, "out of memory")
                                           : read_file(&file);
    if (status == KVC_OK)
        status = scan_lines(&file);
    if (status == KVC_OK)
        status = parse_file(&file);
    free(file.lines);
    free(file.text);
    return status;
}

#else

kvc_status kvci_config_load_file(kvc_config *config, const char *path)
{
    return kvci_config_why(config, KVC_UNSUPPORTED,
                           "cannot read the settings file %s: this build has no libcyaml; use "
                           "environment or flags",
                           path);
}

#endif
