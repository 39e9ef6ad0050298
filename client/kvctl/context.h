/*
 * context.h: what the words of kvctl context came to; context.c parses them, context_export.c,
 * context_import.c and context_saved.c do it.
 */
#ifndef KVCTL_CONTEXT_H
#define KVCTL_CONTEXT_H

#include "context_file.h"
#include "kvctl.h"

#define CONTEXT_BATCH_BYTES  ((size_t)8 << 20)
#define CONTEXT_BATCH_VALUES 1024u

typedef struct context_args {
    kvctl_blocks blocks;
    const char *out_path;
    const char *tail_path;                           /* save, export */
    const char *save_name;                           /* import */
    const char *digests_out, *tokens_out, *tail_out; /* restore */
    uint64_t generation;
    bool durable, replace;
} context_args;

/* What an export or import came to. */
typedef struct context_total {
    uint64_t values, missing, stored, exist;
    uint32_t n_blocks, n_tokens;
} context_total;

/* verb: "exported" ... */
void context_print_total(const kvctl_globals *globals, const char *verb,
                         const context_total *total);
kvctl_exit context_export(const kvctl_globals *globals, const context_args *args);
/* check_only: what is wrong with the file, and no server. */
kvctl_exit context_import(const kvctl_globals *globals, const context_args *args, const char *path,
                          bool check_only);
/* argv [argc]: the name is the first word left, digests may follow. */
kvctl_exit context_save(const kvctl_globals *globals, int argc, char **argv, context_args *args);
kvctl_exit context_restore(const kvctl_globals *globals, const char *name,
                           const context_args *args);
kvctl_exit context_list(const kvctl_globals *globals);
kvctl_exit context_rm(const kvctl_globals *globals, const char *name, const context_args *args);

#endif
