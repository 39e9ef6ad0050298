/*
 * rows.h: what the words of kvctl rows came to; rows_args.c fills it, rows.c does it.
 */
#ifndef KVCTL_ROWS_H
#define KVCTL_ROWS_H

#include "kvctl.h"

typedef enum rows_format { ROWS_SUMMARY = 0, ROWS_SUMS, ROWS_HEX } rows_format;

typedef struct rows_args {
    const kvctl_globals *globals;
    kvctl_schema schema;
    kvc_digest *digests;
    uint32_t *picks;
    uint32_t n_digests, n_picks, part, row_bytes, block_tokens;
    rows_format format;
    const char *out_path; /* NULL: none */
} rows_args;

kvctl_exit rows_fetch(const rows_args *args);

#endif
