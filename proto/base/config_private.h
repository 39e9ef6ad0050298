/*
 * config_private.h: what the files of config share. Nothing outside proto/base includes it.
 *
 * The layers all end in kvci_config_set, so one parser and one text per broken rule serve file,
 * environment and flags alike.
 */
#ifndef KVC_BASE_CONFIG_PRIVATE_H
#define KVC_BASE_CONFIG_PRIVATE_H

#include "base/arena.h"
#include "base/config.h"
#include "base/text.h"

#define KVCI_NAME_BYTES 64 /* of a setting's name, NUL included */

struct kvc_config {
    const kvc_config_program *program;
    kvc_arena arena; /* owns every string */
    void *values;
    const char **texts;   /* [n_settings] as given, NULL until set */
    const char **sources; /* [n_settings] */
    kvc_config_action action;
    char *why; /* the caller's, KVC_CONFIG_WHY_BYTES */
};

/* Writes the reason, one line; gives status back. */
kvc_status kvci_config_why(kvc_config *config, kvc_status status, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Index of a setting, or -1. */
int kvci_config_find(const kvc_config_program *program, const char *name);
/* The known name nearest to this one, or NULL where none is near. */
const char *kvci_config_nearest(const kvc_config_program *program, const char *name);
/* INVALID: the value breaks a rule of the setting. Copies text and source. */
kvc_status kvci_config_set(kvc_config *config, int setting, const char *text, const char *source);
/* UNKNOWN name: INVALID with the reason. shown: the name as the user wrote it. */
kvc_status kvci_config_unknown(kvc_config *config, const char *shown, const char *name,
                               const char *source);

/* Lowercase to the environment's KVASIR_NAME or the flag's --na-me. */
void kvci_config_variable(const char *name, char out[KVCI_NAME_BYTES + 8]);
void kvci_config_flag(const char *name, char out[KVCI_NAME_BYTES + 8]);

/* Reads the YAML file and sets what it says. UNSUPPORTED in a build without libcyaml. */
kvc_status kvci_config_load_file(kvc_config *config, const char *path);

#endif
