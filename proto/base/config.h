/*
 * config.h: a program's settings, from one table: YAML file < environment < flags.
 *
 * The program gives a table of settings and a struct; kvc_config_load fills the struct. A setting
 * "dram_bytes" is "dram_bytes: 2GiB" in the file, KVASIR_DRAM_BYTES=2GiB in the environment and
 * --dram-bytes 2GiB (or --dram-bytes=2GiB) as a flag. Every program also knows --help, --version
 * and --config FILE (KVASIR_CONFIG). A value that breaks a rule is an error in every layer, also
 * where a higher layer overrides it. Unknown names in the file and unknown flags are errors;
 * unknown KVASIR_ variables only if they look like a misspelt setting, since orchestrators put
 * variables of their own there. Main thread, before others start.
 */
#ifndef KVC_BASE_CONFIG_H
#define KVC_BASE_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvc/status.h"

#define KVC_CONFIG_WHY_BYTES 1024

/* In brackets: the type of the field that the value is written to. */
typedef enum kvc_config_type {
    KVC_CONFIG_BYTES = 1, /* [uint64_t] 65536, 64KiB, 64MiB, 2GiB, 1TiB */
    KVC_CONFIG_DURATION,  /* [uint64_t ns] 20ms, 5s, 3m, 2h; 0 */
    KVC_CONFIG_UINT,      /* [uint64_t] decimal digits */
    KVC_CONFIG_STRING,    /* [const char *] never NULL; lives as long as the kvc_config */
    KVC_CONFIG_BOOL,      /* [bool] true, false, yes, no, on, off; the flag alone means true */
    KVC_CONFIG_ENUM,      /* [uint32_t] index of the word in choices */
} kvc_config_type;

/* One row of a program's table. */
typedef struct kvc_setting {
    const char *name; /* lowercase letters, digits and _ */
    kvc_config_type type;
    size_t offset;       /* of the field in the program's struct: offsetof(...) */
    const char *initial; /* the default, written as a user would; NULL: it must be given */
    uint64_t min, max;   /* inclusive; BYTES bytes, DURATION ns, UINT, STRING length in bytes */
    const char *choices; /* ENUM only: "error|warn|info" */
    const char *help;    /* one or more sentences */
} kvc_setting;

/* What a program tells about itself. Texts are wrapped; lines that start with a space are kept. */
typedef struct kvc_config_program {
    const char *name;     /* "cachesvc" */
    const char *version;  /* "0.1.0" */
    const char *brief;    /* one line, for NAME */
    const char *synopsis; /* without the program's name: "[--config FILE] [OPTION]..." */
    const char *description;
    const char *files; /* this and the two below may be NULL: the section is left out */
    const char *exit_status;
    const char *examples;
    const kvc_setting *settings;
    size_t n_settings;
} kvc_config_program;

typedef enum kvc_config_action {
    KVC_CONFIG_RUN = 0,
    KVC_CONFIG_HELP,    /* --help was given: print kvc_config_help and exit 0 */
    KVC_CONFIG_VERSION, /* --version was given */
} kvc_config_action;

typedef struct kvc_config kvc_config;

/*
 * Fills the struct at values. argv [argc] as main gets it; environment: NULL-terminated, as
 * environ, or NULL for none. On success *config_p is given to the caller and owns every string in
 * values. With an action other than RUN, values holds the defaults only and nothing was read.
 * Borrows everything; program must outlive *config_p. Reads one file.
 * INVALID (a bad setting), NOT_FOUND (the file), IO, UNSUPPORTED (a file, without libcyaml),
 * NO_MEMORY: why, one line without newline, names setting, source, value and the broken rule.
 */
kvc_status kvc_config_load(const kvc_config_program *program, int argc, char *const *argv,
                           char *const *environment, void *values, kvc_config **config_p,
                           char why[KVC_CONFIG_WHY_BYTES]) KVC_MUST_CHECK;
void kvc_config_free(kvc_config *config); /* NULL is fine */

kvc_config_action kvc_config_asked(const kvc_config *config);
/*
 * Where a setting's value came from: "default", "etc/kvasir.yaml:3", "KVASIR_X", "--x". Valid as
 * long as config; NULL for an unknown name.
 */
const char *kvc_config_source(const kvc_config *config, const char *name);
/* The value of a setting as a user would write it; gives malloc'd text. NULL: unknown, no memory.
 */
char *kvc_config_value_text(const kvc_config *config, const char *name);

/* The manual page that --help prints, at most 80 columns; gives malloc'd text. NULL: no memory. */
char *kvc_config_help(const kvc_config_program *program);

#endif
