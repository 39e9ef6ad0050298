/*
 * config.c: the layers of settings, applied in rising order: defaults, file, environment, flags.
 *
 * Main thread. Flags are read twice: first for --help, --version and --config, which decide what
 * happens at all, then for their values, which must be applied last.
 */
#include "base/config.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "config_private.h"

#define STRINGS_MAX_BYTES (4u << 20)
#define VARIABLE_PREFIX   "KVASIR_"

/* One argument taken apart. */
struct flag {
    char name[KVCI_NAME_BYTES]; /* as in the table: '_' between words */
    char shown[KVCI_NAME_BYTES + 8];
    const char *value; /* NULL: none in this argument */
};

/* Splits "--name=value". False: not a flag, or its name is too long to be one. */
static bool split_flag(const char *argument, struct flag *flag)
{
    if (strncmp(argument, "--", 2) != 0 || argument[2] == '\0')
        return false;
    const char *name = argument + 2;
    size_t len_bytes = strcspn(name, "=");
    if (len_bytes == 0 || len_bytes >= sizeof(flag->name))
        return false;
    for (size_t i = 0; i < len_bytes; i++)
        flag->name[i] = name[i] == '-' ? '_' : name[i];
    flag->name[len_bytes] = '\0';
    flag->value = name[len_bytes] == '=' ? name + len_bytes + 1 : NULL;
    kvci_config_flag(flag->name, flag->shown);
    return true;
}

/* A bool flag takes the next argument only if that is a truth value. */
static bool takes_next(const kvc_setting *setting, const char *next)
{
    bool ignored;
    return setting->type != KVC_CONFIG_BOOL ||
           (next != NULL && kvc_bool_parse(next, &ignored) == KVC_OK);
}

/* Takes --help, --version and --config. *path_p: of the file, unchanged where no flag names it. */
static kvc_status read_own_flag(kvc_config *config, const struct flag *flag, const char *next,
                                int *i_p, const char **path_p, bool *taken_p)
{
    bool help = strcmp(flag->name, "help") == 0;
    *taken_p = true;
    if (help || strcmp(flag->name, "version") == 0) {
        if (flag->value != NULL)
            return kvci_config_why(config, KVC_INVALID, "%s takes no value", flag->shown);
        if (config->action == KVC_CONFIG_RUN)
            config->action = help ? KVC_CONFIG_HELP : KVC_CONFIG_VERSION;
        return KVC_OK;
    }
    *taken_p = strcmp(flag->name, "config") == 0;
    if (!*taken_p)
        return KVC_OK;
    if (flag->value == NULL && next == NULL)
        return kvci_config_why(config, KVC_INVALID, "--config needs a value: --config FILE");
    *i_p += flag->value == NULL ? 1 : 0;
    *path_p = flag->value != NULL ? flag->value : next;
    return KVC_OK;
}

/*
 * Walks over the arguments. apply: sets the values; else only looks for the program's own flags and
 * checks that each argument is a known flag.
 */
static kvc_status walk_flags(kvc_config *config, int argc, char *const *argv, bool apply,
                             const char **path_p)
{
    for (int i = 1; i < argc; i++) {
        struct flag flag;
        const char *next = i + 1 < argc ? argv[i + 1] : NULL;
        bool taken;
        if (strcmp(argv[i], "-h") == 0) {
            config->action = KVC_CONFIG_HELP;
            continue;
        }
        if (!split_flag(argv[i], &flag))
            return kvci_config_why(config, KVC_INVALID,
                                   "unexpected argument '%s': settings are given as --name value",
                                   argv[i]);
        kvc_status status = read_own_flag(config, &flag, next, &i, path_p, &taken);
        if (status != KVC_OK)
            return status;
        if (taken)
            continue;
        int setting = kvci_config_find(config->program, flag.name);
        if (setting < 0)
            return kvci_config_unknown(config, flag.shown, flag.name, "a flag");
        if (flag.value == NULL && takes_next(&config->program->settings[setting], next)) {
            if (next == NULL)
                return kvci_config_why(config, KVC_INVALID, "%s needs a value: %s VALUE",
                                       flag.shown, flag.shown);
            flag.value = next;
            i++;
        }
        if (apply)
            status = kvci_config_set(config, setting, flag.value == NULL ? "true" : flag.value,
                                     flag.shown);
        if (status != KVC_OK)
            return status;
    }
    return KVC_OK;
}

/* The variable's lowercase name after the prefix. False: not one of ours. */
static bool split_variable(const char *entry, char name[KVCI_NAME_BYTES], const char **value_p)
{
    size_t prefix_bytes = sizeof(VARIABLE_PREFIX) - 1;
    const char *equals = strchr(entry, '=');
    if (strncmp(entry, VARIABLE_PREFIX, prefix_bytes) != 0 || equals == NULL)
        return false;
    size_t len_bytes = (size_t)(equals - entry) - prefix_bytes;
    if (len_bytes == 0 || len_bytes >= KVCI_NAME_BYTES)
        return false;
    for (size_t i = 0; i < len_bytes; i++) {
        char c = entry[prefix_bytes + i];
        name[i] = (char)(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
    }
    name[len_bytes] = '\0';
    *value_p = equals + 1;
    return true;
}

static const char *variable(char *const *environment, const char *wanted)
{
    for (; environment != NULL && *environment != NULL; environment++) {
        char name[KVCI_NAME_BYTES];
        const char *value;
        if (split_variable(*environment, name, &value) && strcmp(name, wanted) == 0)
            return value;
    }
    return NULL;
}

static kvc_status apply_environment(kvc_config *config, char *const *environment)
{
    for (; environment != NULL && *environment != NULL; environment++) {
        char name[KVCI_NAME_BYTES], shown[KVCI_NAME_BYTES + 8];
        const char *value;
        if (!split_variable(*environment, name, &value) || strcmp(name, "config") == 0 ||
            strcmp(name, "fault") == 0)
            continue;
        kvci_config_variable(name, shown);
        int setting = kvci_config_find(config->program, name);
        kvc_status status = KVC_OK;
        if (setting >= 0)
            status = kvci_config_set(config, setting, value, shown);
        else if (kvci_config_nearest(config->program, name) != NULL)
            status = kvci_config_unknown(config, shown, name, "environment");
        if (status != KVC_OK)
            return status;
    }
    return KVC_OK;
}

static kvc_status apply_defaults(kvc_config *config)
{
    for (size_t i = 0; i < config->program->n_settings; i++) {
        const char *initial = config->program->settings[i].initial;
        kvc_status status =
            initial == NULL ? KVC_OK : kvci_config_set(config, (int)i, initial, "default");
        if (status != KVC_OK)
            return status;
    }
    return KVC_OK;
}

static kvc_status check_given(kvc_config *config)
{
    for (size_t i = 0; i < config->program->n_settings; i++) {
        const char *name = config->program->settings[i].name;
        char flag[KVCI_NAME_BYTES + 8], shown[KVCI_NAME_BYTES + 8];
        if (config->texts[i] != NULL)
            continue;
        kvci_config_flag(name, flag);
        kvci_config_variable(name, shown);
        return kvci_config_why(config, KVC_INVALID,
                               "%s must be given: %s VALUE, %s, or '%s: VALUE' in the file", name,
                               flag, shown, name);
    }
    return KVC_OK;
}

static kvc_status load_layers(kvc_config *config, int argc, char *const *argv,
                              char *const *environment)
{
    const char *path = variable(environment, "config");
    kvc_status status = apply_defaults(config);
    KVC_ASSERT(status != KVC_INVALID); /* a default that breaks its own rule is our bug */
    if (status == KVC_OK)
        status = walk_flags(config, argc, argv, false, &path);
    if (status != KVC_OK || config->action != KVC_CONFIG_RUN)
        return status;
    if (path != NULL && path[0] != '\0')
        status = kvci_config_load_file(config, path);
    if (status == KVC_OK)
        status = apply_environment(config, environment);
    if (status == KVC_OK)
        status = walk_flags(config, argc, argv, true, &path);
    return status == KVC_OK ? check_given(config) : status;
}

kvc_status kvc_config_load(const kvc_config_program *program, int argc, char *const *argv,
                           char *const *environment, void *values, kvc_config **config_p,
                           char why[KVC_CONFIG_WHY_BYTES])
{
    *config_p = NULL;
    why[0] = '\0';
    size_t n = program->n_settings;
    kvc_config *config = calloc(1, sizeof(*config) + 2 * n * sizeof(char *));
    if (config == NULL) {
        (void)snprintf(why, KVC_CONFIG_WHY_BYTES, "out of memory");
        return KVC_NO_MEMORY;
    }
    kvc_arena_init(&config->arena, STRINGS_MAX_BYTES);
    config->program = program;
    config->values = values;
    config->texts = (const char **)(config + 1);
    config->sources = config->texts + n;
    config->why = why;
    kvc_status status = load_layers(config, argc, argv, environment);
    config->why = NULL;
    if (status != KVC_OK) {
        kvc_config_free(config);
        return status;
    }
    *config_p = config;
    return KVC_OK;
}

void kvc_config_free(kvc_config *config)
{
    if (config == NULL)
        return;
    kvc_arena_reset(&config->arena);
    free(config);
}

kvc_config_action kvc_config_asked(const kvc_config *config)
{
    return config->action;
}

const char *kvc_config_source(const kvc_config *config, const char *name)
{
    int setting = kvci_config_find(config->program, name);
    return setting < 0 ? NULL : config->sources[setting];
}

char *kvc_config_value_text(const kvc_config *config, const char *name)
{
    int setting = kvci_config_find(config->program, name);
    return setting < 0 || config->texts[setting] == NULL ? NULL : strdup(config->texts[setting]);
}
