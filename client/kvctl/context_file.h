/*
 * context_file.h: the file that holds a context: schema, digests, token ids, rows of the tail and
 * values, with their sums.
 *
 * Pure: bytes come and go through functions of the caller, so that a test can feed it anything.
 * Numbers are little-endian. The layout is in client/README.md. A file is taken only whole: a walk
 * ends OK only after the end mark, with every sum right.
 */
#ifndef KVCTL_CONTEXT_FILE_H
#define KVCTL_CONTEXT_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvc/types.h"

#define KVCTL_FILE_MAX_TOKENS (64u << 20)
#define KVCTL_FILE_MAX_SCHEMA (4u << 20)
#define KVCTL_FILE_MAX_TAIL   (256u << 20)

typedef struct kvctl_file_part {
    uint32_t part, value_bytes;
} kvctl_file_part;

typedef struct kvctl_file_head {
    kvc_digest schema;
    uint32_t block_tokens, n_blocks, n_parts, n_tokens;
    const kvc_digest *digests;    /* [n_blocks] */
    const kvctl_file_part *parts; /* [n_parts] */
    const uint32_t *tokens;       /* [n_tokens]; 0: not known, else all blocks' and the tail's */
    uint32_t schema_bytes, tail_bytes;
    const uint8_t *schema_msg; /* [schema_bytes] a RegisterSchemaRequest; 0: not there */
    const uint8_t *tail;       /* [tail_bytes] rows of the tail, of every part; 0: not there */
} kvctl_file_head;

/* What a walk met. */
typedef struct kvctl_file_totals {
    uint64_t n_values; /* that are there */
    uint32_t n_blocks, n_parts, n_tokens;
} kvctl_file_totals;

/* Exactly n bytes; false: the medium failed or ended. */
typedef bool kvctl_file_read(void *arg, void *dst, size_t n);
typedef bool kvctl_file_write(void *arg, const void *src, size_t n);
/* The head, before the values; what it points at lives until the walk ends. False: stop. */
typedef bool kvctl_file_opened(void *arg, const kvctl_file_head *head);
/* One value that is there, in the file's order: block by block, part by part. False: stop. */
typedef bool kvctl_file_value(void *arg, const kvctl_file_head *head, uint32_t block, uint32_t part,
                              const uint8_t *bytes);

/*
 * Walks a whole file; opened is called for its head, each for each value (either may be NULL). OK,
 * or with a static text in *why_p: PROTOCOL: it is no such file, or cut off; INVALID: it breaks a
 * limit; CORRUPT: a sum is wrong; CANCELLED: each said stop; NO_MEMORY. Values were given to each
 * before a later fault was seen: walk once without it first.
 */
kvc_status kvctl_file_walk(kvctl_file_read *read, void *read_arg, kvctl_file_opened *opened,
                           kvctl_file_value *each, void *arg, kvctl_file_totals *totals_p,
                           const char **why_p) KVC_MUST_CHECK;

/* Writing: the head, then every value in order (bytes NULL: it is not there), then the end. False:
   write failed. */
bool kvctl_file_put_head(kvctl_file_write *write, void *arg, const kvctl_file_head *head);
bool kvctl_file_put_value(kvctl_file_write *write, void *arg, const uint8_t *bytes,
                          uint32_t len_bytes);
bool kvctl_file_put_end(kvctl_file_write *write, void *arg, uint64_t n_values);

#endif
