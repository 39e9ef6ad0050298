/*
 * kvctl.h: what the files of the command line share.
 *
 * One process, one command, the main thread. A command is one file with one kvctl_command, listed
 * in main.c; its help is its manual page.
 */
#ifndef KVCTL_H
#define KVCTL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvc/client.h"

#define KVCTL_VERSION        KVASIR_VERSION
#define KVCTL_DEFAULT_SERVER "grpc://127.0.0.1:7811"

typedef enum kvctl_exit {
    KVCTL_OK = 0,
    KVCTL_FAILED = 1, /* a request failed, or a check of doctor */
    KVCTL_USAGE = 2,
    KVCTL_UNREACHED = 3, /* no server answered */
} kvctl_exit;

typedef struct kvctl_globals {
    const char *server; /* URIs */
    uint64_t timeout_ns;
    bool json;
    bool sums; /* over rdma */
} kvctl_globals;

typedef struct kvctl_command {
    const char *name;
    const char *brief; /* one line, for kvctl --help */
    const char *help;  /* the manual page, as it is printed */
    /* argv [argc]: the command's own words, its name first. */
    kvctl_exit (*run)(const kvctl_globals *globals, int argc, char **argv);
} kvctl_command;

extern const kvctl_command kvctl_status, kvctl_top, kvctl_match, kvctl_rows, kvctl_get, kvctl_put,
    kvctl_prefetch, kvctl_context, kvctl_hold, kvctl_release, kvctl_erase, kvctl_doctor,
    kvctl_bench, kvctl_explain, kvctl_place;
extern const char kvctl_help[];

/* ---- main.c ---------------------------------------------------------------------------------- */

/* "kvctl: TEXT" on standard error. */
void kvctl_error(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* The same with a hint to --help of the command; returns KVCTL_USAGE. */
kvctl_exit kvctl_usage(const char *command, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

/* ---- connect.c ------------------------------------------------------------------------------- */

/* Connects to globals->server, with a progress line where it takes long; says why it could not. */
kvctl_exit kvctl_connect(const kvctl_globals *globals, kvc_client **client_p);
/* Waits for an op, keeping the progress line alive. */
kvc_status kvctl_wait(kvc_op *op, const char *label);
/* Reports a failed request; returns KVCTL_FAILED, or KVCTL_UNREACHED where nobody answered. */
kvctl_exit kvctl_failed(kvc_status status);
/* Deadline of a request that starts now. */
uint64_t kvctl_deadline_ns(const kvctl_globals *globals);

/* ---- input.c --------------------------------------------------------------------------------- */

/* All of a file, or of standard input for "-". The caller frees. NULL: the reason was printed. */
char *kvctl_read_file(const char *path, size_t *len_bytes_p);

/* What --schema says: 64 hex digits, or a file with the schema's text, which knows more. */
typedef struct kvctl_schema {
    kvc_digest digest;
    char *text; /* NULL where only the digest is known */
} kvctl_schema;

/* False: the reason was printed. */
bool kvctl_schema_read(const char *word, kvctl_schema *schema_p);
/* A number of the schema's text ("block_tokens", "part.00003.row_bytes"); 0 where it is unknown. */
uint32_t kvctl_schema_number(const kvctl_schema *schema, const char *key);

/* The bytes of --key TEXT, or with is_hex of --key-hex HEX. The caller frees *key_p. False: why was
 * printed. */
bool kvctl_key_parse(const char *text, bool is_hex, uint8_t **key_p, size_t *key_bytes_p);
/* Digests, 64 hex digits each, apart by white space. The caller frees *digests_p. */
bool kvctl_digests_parse(const char *text, kvc_digest **digests_p, uint32_t *n_p);
/* Block digests of token ids (decimal, apart by white space or commas); a tail is left out. The ids
 * themselves, tail included, go to ids_p where that is not NULL; the caller frees both. */
bool kvctl_tokens_parse(const char *text, const kvc_digest *schema, uint32_t block_tokens,
                        kvc_digest **digests_p, uint32_t *n_p, uint32_t **ids_p, uint32_t *n_ids_p);
/* "3,5,100-199,0-1000:10" (both ends included; :STEP): token positions in the order written. */
bool kvctl_picks_parse(const char *text, uint32_t **picks_p, uint32_t *n_p);
/* A decimal number in min..max, or an error about the option. */
bool kvctl_number_parse(const char *option, const char *text, uint64_t min, uint64_t max,
                        uint64_t *value_p);

/* ---- blocks.c: which blocks, as several commands let people say it ----------------------------
 */

typedef struct kvctl_blocks {
    kvctl_schema schema;
    bool has_schema;
    const char *digests_path, *tokens_path;
    uint64_t block_tokens;
    uint32_t *parts, n_parts;
    kvc_digest *digests;
    uint32_t *tokens; /* those of --tokens, with the tail */
    uint32_t n_digests, n_tokens;
    struct kvctl_key *keys; /* --key and --key-hex, the last first */
    uint32_t n_keys;
} kvctl_blocks;

/* For the table of long options; getopt.h must be there. */
#define KVCTL_BLOCKS_OPTIONS                                                                       \
    {"schema", required_argument, NULL, 's'}, {"parts", required_argument, NULL, 'p'},             \
        {"digests", required_argument, NULL, 'd'}, {"tokens", required_argument, NULL, 't'},       \
        {"key", required_argument, NULL, 'k'}, {"key-hex", required_argument, NULL, 'K'},          \
    {                                                                                              \
        "block-tokens", required_argument, NULL, 'b'                                               \
    }
/* That of the two options for keys. */
#define KVCTL_KEYS_HELP                                                                            \
    "    --key TEXT, --key-hex HEX\n"                                                              \
    "        A key of an opaque schema, by its bytes as text or as hex digits. May be repeated.\n"
/* Their paragraphs in a manual page, but that of --parts. */
#define KVCTL_BLOCKS_HELP                                                                          \
    "    --schema SCHEMA\n"                                                                        \
    "        The schema: its digest (64 hex digits), or a file with its text (lines key=value),\n" \
    "        whose SHA-256 is the digest. Required.\n"                                             \
    "    --digests FILE\n"                                                                         \
    "        Digests of 64 hex digits, apart by white space. '-' is standard input.\n"             \
    "    --tokens FILE\n"                                                                          \
    "        Token ids in decimal, apart by white space or commas; a tail that fills no block "    \
    "is\n"                                                                                         \
    "        left out. '-' is standard input.\n"                                                   \
    "    --block-tokens N\n"                                                                       \
    "        Tokens of a block, for --tokens; not needed where --schema is a file.\n"

/* Takes one of those options. False: it was bad, and why was printed, or it is none of them. */
bool kvctl_blocks_option(int option, kvctl_blocks *blocks);
/* Reads the digests from the words left, the file named, or standard input. KVCTL_USAGE: said. */
kvctl_exit kvctl_blocks_read(const char *command, int argc, char **argv, kvctl_blocks *blocks);
void kvctl_blocks_free(kvctl_blocks *blocks);
typedef kvctl_exit kvctl_blocks_fn(const kvctl_globals *globals, const kvctl_blocks *blocks);
/* All of a command whose words only say which blocks: reads them, asks, frees them. */
kvctl_exit kvctl_blocks_run(const char *command, const kvctl_globals *globals, int argc,
                            char **argv, kvctl_blocks_fn *ask);

/* ---- opaque.c: kvctl put and get of one opaque value -------------------------------------------
 */

typedef struct kvctl_opaque {
    const kvctl_schema *schema;
    kvc_digest digest; /* of the key */
    const char *path;  /* "-": standard input or output */
    bool durable;
} kvctl_opaque;
/* value.c: bytes to a file, or to standard output for "-"; says why it could not. */
kvctl_exit kvctl_write_value(const char *path, const uint8_t *bytes, size_t len_bytes);
kvctl_exit kvctl_opaque_put(const kvctl_globals *globals, const kvctl_opaque *args);
kvctl_exit kvctl_opaque_get(const kvctl_globals *globals, const kvctl_opaque *args);

/* ---- json.c -----------------------------------------------------------------------------------
 */

/* JSON on standard output. key NULL inside a list. One document at a time. */
void kvctl_json_open(const char *key, char bracket); /* '{' or '[' */
void kvctl_json_close(void); /* the innermost; the outermost ends the line */
void kvctl_json_text(const char *key, const char *text);
void kvctl_json_number(const char *key, uint64_t value);
void kvctl_json_bool(const char *key, bool value);

#endif
