/*
 * value.c: kvctl put and kvctl get: one value from and to a file.
 *
 * Main thread. A value is the rows of one block in one part, at most 1 MiB, so it is held whole.
 */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/digest.h"
#include "base/sum.h"
#include "kvctl.h"

#define CONTEXT_TTL_MS 60000u

static const char put_help[] =
    "NAME\n"
    "    kvctl put - store one value from a file\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--json] put --schema SCHEMA --part N [--durable] DIGEST [FILE]\n"
    "    kvctl [--server URI] [--json] put --schema SCHEMA --key TEXT | --key-hex HEX [--durable]\n"
    "          [FILE]\n"
    "\n"
    "DESCRIPTION\n"
    "    Stores the bytes of FILE, or of standard input without one or for '-', as the rows of "
    "the\n"
    "    block DIGEST in one part. Their number must be block_tokens times the part's row_bytes.\n"
    "    First put wins: where the value is there already it stays as it is, and that is said.\n"
    "\n"
    "    With --key the schema is opaque: the value has any length and is named by any bytes. "
    "Where\n"
    "    SCHEMA is a file, the server is told of it first.\n"
    "\n"
    "OPTIONS\n"
    "    --schema SCHEMA\n"
    "        The schema: its digest (64 hex digits), or a file with its text (lines key=value),\n"
    "        whose SHA-256 is the digest. Required; the server must know it.\n"
    "    --part N\n"
    "        The part. Required without a key.\n"
    "    --key TEXT, --key-hex HEX\n"
    "        The key of an opaque value, by its bytes as text or as hex digits.\n"
    "    --durable\n"
    "        Answer only once the value is on disk and synced. Default: once it is in memory.\n"
    "    -h, --help\n"
    "        Print this page.\n"
    "\n"
    "EXIT STATUS\n"
    "    0   it worked\n"
    "    1   the server answered with an error\n"
    "    2   bad usage\n"
    "    3   no server answered\n"
    "\n"
    "EXAMPLES\n"
    "    kvctl put --schema llama.schema --part 3 --durable $DIGEST rows.bin\n";

static const char get_help[] =
    "NAME\n"
    "    kvctl get - write one value to a file\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--json] get --schema SCHEMA --part N [--row-bytes N]\n"
    "          [--block-tokens N] DIGEST [FILE]\n"
    "    kvctl [--server URI] [--json] get --schema SCHEMA --key TEXT | --key-hex HEX [FILE]\n"
    "\n"
    "DESCRIPTION\n"
    "    Writes the rows of the block DIGEST in one part to FILE, or to standard output without "
    "one\n"
    "    or for '-'. Nothing is written where the value is not there. With --json a FILE is "
    "needed.\n"
    "\n"
    "OPTIONS\n"
    "    --schema SCHEMA\n"
    "        The schema: its digest (64 hex digits), or a file with its text (lines key=value),\n"
    "        from which block and row sizes are taken. Required.\n"
    "    --part N\n"
    "        The part. Required without a key.\n"
    "    --key TEXT, --key-hex HEX\n"
    "        The key of an opaque value, by its bytes as text or as hex digits.\n"
    "    --row-bytes N, --block-tokens N\n"
    "        The sizes, where --schema is no file.\n"
    "    -h, --help\n"
    "        Print this page.\n"
    "\n"
    "EXIT STATUS\n"
    "    0   it worked\n"
    "    1   the server answered with an error, or the value is not there\n"
    "    2   bad usage\n"
    "    3   no server answered\n"
    "\n"
    "EXAMPLES\n"
    "    kvctl get --schema llama.schema --part 3 $DIGEST rows.bin\n"
    "    kvctl get --schema $SCHEMA --part 0 --row-bytes 4096 --block-tokens 64 $DIGEST | xxd\n";

typedef struct value_args {
    kvctl_schema schema;
    bool has_schema, has_part, durable, has_key;
    uint8_t *key;
    size_t key_bytes;
    uint64_t part, row_bytes, block_tokens;
    kvc_digest digest;
    const char *path; /* "-": standard input or output */
} value_args;

static bool parse_option(int option, value_args *args)
{
    switch (option) {
    case 's':
        args->has_schema = true;
        return kvctl_schema_read(optarg, &args->schema);
    case 'p':
        args->has_part = true;
        return kvctl_number_parse("--part", optarg, 0, KVC_MAX_PART_ID, &args->part);
    case 'r':
        return kvctl_number_parse("--row-bytes", optarg, 1, KVC_MAX_VALUE_BYTES, &args->row_bytes);
    case 'b':
        return kvctl_number_parse("--block-tokens", optarg, KVC_BLOCK_TOKENS_MIN,
                                  KVC_BLOCK_TOKENS_MAX, &args->block_tokens);
    case 'D':
        args->durable = true;
        return true;
    case 'k':
    case 'K':
        if (args->has_key)
            return false;
        args->has_key = kvctl_key_parse(optarg, option == 'K', &args->key, &args->key_bytes);
        return args->has_key;
    default:
        return false;
    }
}

/* [FILE], where the value has a key. */
static kvctl_exit parse_key_words(const char *command, int argc, char **argv, value_args *args)
{
    if (!args->has_schema || args->has_part)
        return kvctl_usage(command, "--key wants --schema, and no --part");
    if (argc - optind > 1)
        return kvctl_usage(command, "a file or none: the key names the value");
    if (kvc_opaque_key(&args->schema.digest, args->key, args->key_bytes, &args->digest) != KVC_OK)
        return KVCTL_FAILED;
    args->path = argc - optind == 1 ? argv[optind] : "-";
    return KVCTL_OK;
}

/* DIGEST [FILE], after the options. */
static kvctl_exit parse_words(const char *command, int argc, char **argv, value_args *args)
{
    if (args->has_key)
        return parse_key_words(command, argc, argv, args);
    if (!args->has_schema || !args->has_part)
        return kvctl_usage(command, "--schema and --part are needed");
    if (argc - optind < 1 || argc - optind > 2)
        return kvctl_usage(command, "a digest, and a file or none");
    if (kvc_digest_parse(argv[optind], &args->digest) != KVC_OK)
        return kvctl_usage(command, "'%s' is not 64 hex digits", argv[optind]);
    args->path = argc - optind == 2 ? argv[optind + 1] : "-";
    return KVCTL_OK;
}

static kvctl_exit parse(const char *command, const struct option *options, int argc, char **argv,
                        value_args *args)
{
    int option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
        if (!parse_option(option, args))
            return kvctl_usage(command, "an option is wrong");
    return parse_words(command, argc, argv, args);
}

/* ---- put ------------------------------------------------------------------------------------- */

static kvc_status put_value(const kvctl_globals *globals, const value_args *args,
                            kvc_client *client, char *bytes, size_t len_bytes, int8_t *stored_p)
{
    kvc_region *region = NULL;
    kvc_region_desc desc = {
        .size_bytes = sizeof(desc), .base = bytes, .len_bytes = len_bytes, .kind = KVC_MEMORY_HOST};
    kvc_value value = {
        .digest = args->digest, .part = (uint32_t)args->part, .len_bytes = (uint32_t)len_bytes};
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    kvc_status status = kvc_region_register(client, &desc, &region);
    if (status == KVC_OK)
        status = kvc_put(client, &args->schema.digest,
                         args->durable ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY, &value, 1,
                         region, stored_p, kvctl_deadline_ns(globals), &op);
    if (status == KVC_OK)
        status = kvctl_wait(&op, "storing");
    (void)kvc_region_deregister(client, region);
    return status;
}

static kvctl_exit put(const kvctl_globals *globals, const value_args *args)
{
    size_t len_bytes = 0;
    kvc_client *client = NULL;
    int8_t stored = KVC_OK;
    char *bytes = kvctl_read_file(args->path, &len_bytes);
    if (bytes == NULL)
        return KVCTL_USAGE;
    kvctl_exit result = KVCTL_USAGE;
    if (len_bytes == 0 || len_bytes > KVC_MAX_VALUE_BYTES)
        kvctl_error("%s has %zu bytes; a value has 1 to %u", args->path, len_bytes,
                    KVC_MAX_VALUE_BYTES);
    else
        result = kvctl_connect(globals, &client);
    if (result != KVCTL_OK)
        goto done;
    kvc_status status = put_value(globals, args, client, bytes, len_bytes, &stored);
    if (status != KVC_OK) {
        result = kvctl_failed(status);
        goto done;
    }
    if (globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_text("status", kvc_status_name((kvc_status)stored));
        kvctl_json_number("bytes", len_bytes);
        kvctl_json_close();
    } else if (stored == KVC_OK) {
        (void)printf("stored %zu bytes\n", len_bytes);
    } else if (stored == KVC_EXISTS) {
        (void)printf("it was there already: first put wins\n");
    } else {
        kvctl_error("not stored: %s", kvc_status_name((kvc_status)stored));
    }
    result = stored == KVC_OK || stored == KVC_EXISTS ? KVCTL_OK : KVCTL_FAILED;
done:
    kvc_client_close(client);
    free(bytes);
    return result;
}

static kvctl_exit run_put(const kvctl_globals *globals, int argc, char **argv)
{
    static const struct option options[] = {
        {"schema", required_argument, NULL, 's'},  {"part", required_argument, NULL, 'p'},
        {"durable", no_argument, NULL, 'D'},       {"key", required_argument, NULL, 'k'},
        {"key-hex", required_argument, NULL, 'K'}, {0},
    };
    value_args args = {.path = "-"};
    kvctl_exit result = parse("put", options, argc, argv, &args);
    if (result == KVCTL_OK && args.has_key)
        result = kvctl_opaque_put(
            globals, &(kvctl_opaque){&args.schema, args.digest, args.path, args.durable});
    else if (result == KVCTL_OK)
        result = put(globals, &args);
    free(args.schema.text);
    free(args.key);
    return result;
}

/* ---- get ------------------------------------------------------------------------------------- */

/* All rows of the block, as a context of it alone. */
static kvc_status fetch(const kvctl_globals *globals, const value_args *args, kvc_client *client,
                        uint8_t *bytes, int8_t *missing)
{
    uint32_t n = (uint32_t)args->block_tokens;
    uint32_t picks[KVC_BLOCK_TOKENS_MAX];
    kvc_context *context = NULL;
    kvc_region *region = NULL;
    kvc_region_desc desc = {.size_bytes = sizeof(desc),
                            .base = bytes,
                            .len_bytes = (size_t)n * args->row_bytes,
                            .kind = KVC_MEMORY_HOST};
    kvc_pick_group group = {.part = (uint32_t)args->part,
                            .row_bytes = (uint32_t)args->row_bytes,
                            .n_picks = n,
                            .picks = picks};
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t i = 0; i < n; i++)
        picks[i] = i;
    kvc_status status = kvc_region_register(client, &desc, &region);
    if (status == KVC_OK)
        status = kvc_context_open(client, &args->schema.digest, &args->digest, 1, CONTEXT_TTL_MS,
                                  kvctl_deadline_ns(globals), &context);
    group.context = context;
    if (status == KVC_OK)
        status =
            kvc_fetch(client, &group, 1, region, missing, NULL, kvctl_deadline_ns(globals), &op);
    if (status == KVC_OK)
        status = kvctl_wait(&op, "fetching");
    kvc_context_close(context);
    (void)kvc_region_deregister(client, region);
    return status;
}

kvctl_exit kvctl_write_value(const char *path, const uint8_t *bytes, size_t len_bytes)
{
    bool standard = strcmp(path, "-") == 0;
    FILE *stream = standard ? stdout : fopen(path, "we");
    if (stream == NULL) {
        kvctl_error("cannot create %s: %s", path, strerror(errno));
        return KVCTL_FAILED;
    }
    bool good = fwrite(bytes, 1, len_bytes, stream) == len_bytes;
    good = (standard ? fflush(stream) : fclose(stream)) == 0 && good;
    if (!good)
        kvctl_error("cannot write %s: %s", path, strerror(errno));
    return good ? KVCTL_OK : KVCTL_FAILED;
}

static void report(const kvctl_globals *globals, const value_args *args, const uint8_t *bytes,
                   size_t len_bytes)
{
    char sum[17];
    (void)snprintf(sum, sizeof(sum), "%016llx",
                   (unsigned long long)kvc_value_sum(bytes, len_bytes));
    if (globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_text("file", args->path);
        kvctl_json_number("bytes", len_bytes);
        kvctl_json_text("sum", sum);
        kvctl_json_close();
    } else if (strcmp(args->path, "-") != 0) {
        (void)printf("%zu bytes, XXH3-64 %s\n", len_bytes, sum);
    }
}

static kvctl_exit get(const kvctl_globals *globals, const value_args *args)
{
    size_t len_bytes = args->block_tokens * args->row_bytes;
    int8_t missing[KVC_BLOCK_TOKENS_MAX] = {0};
    kvc_client *client = NULL;
    uint8_t *bytes = malloc(len_bytes + 1);
    kvctl_exit result = bytes != NULL ? kvctl_connect(globals, &client) : KVCTL_FAILED;
    if (result != KVCTL_OK)
        goto done;
    kvc_status status = fetch(globals, args, client, bytes, missing);
    if (status != KVC_OK) {
        result = kvctl_failed(status);
        goto done;
    }
    for (uint64_t i = 0; i < args->block_tokens && result == KVCTL_OK; i++) {
        if (missing[i] == KVC_OK)
            continue;
        kvctl_error("%s: row %llu of the value", kvc_status_name((kvc_status)missing[i]),
                    (unsigned long long)i);
        result = KVCTL_FAILED;
    }
    if (result == KVCTL_OK)
        result = kvctl_write_value(args->path, bytes, len_bytes);
    if (result == KVCTL_OK)
        report(globals, args, bytes, len_bytes);
done:
    kvc_client_close(client);
    free(bytes);
    return result;
}

/* The sizes of a value of rows, and then the value. */
static kvctl_exit get_rows(const kvctl_globals *globals, value_args *args)
{
    char key[64];
    (void)snprintf(key, sizeof(key), "part.%05llu.row_bytes", (unsigned long long)args->part);
    if (args->row_bytes == 0)
        args->row_bytes = kvctl_schema_number(&args->schema, key);
    if (args->block_tokens == 0)
        args->block_tokens = kvctl_schema_number(&args->schema, "block_tokens");
    if (args->row_bytes == 0 || args->block_tokens == 0)
        return kvctl_usage("get", "--row-bytes and --block-tokens, or a file as --schema");
    if (args->block_tokens > KVC_BLOCK_TOKENS_MAX ||
        args->block_tokens * args->row_bytes > KVC_MAX_VALUE_BYTES)
        return kvctl_usage("get", "a value has at most %u bytes", KVC_MAX_VALUE_BYTES);
    return get(globals, args);
}

static kvctl_exit run_get(const kvctl_globals *globals, int argc, char **argv)
{
    static const struct option options[] = {
        {"schema", required_argument, NULL, 's'},
        {"part", required_argument, NULL, 'p'},
        {"row-bytes", required_argument, NULL, 'r'},
        {"block-tokens", required_argument, NULL, 'b'},
        {"key", required_argument, NULL, 'k'},
        {"key-hex", required_argument, NULL, 'K'},
        {0},
    };
    value_args args = {.path = "-"};
    kvctl_exit result = parse("get", options, argc, argv, &args);
    if (result == KVCTL_OK && globals->json && strcmp(args.path, "-") == 0)
        result = kvctl_usage("get", "--json needs a file for the bytes");
    if (result == KVCTL_OK && args.has_key)
        result =
            kvctl_opaque_get(globals, &(kvctl_opaque){&args.schema, args.digest, args.path, false});
    else if (result == KVCTL_OK)
        result = get_rows(globals, &args);
    free(args.schema.text);
    free(args.key);
    return result;
}

const kvctl_command kvctl_put = {
    .name = "put",
    .brief = "store one value from a file",
    .help = put_help,
    .run = run_put,
};

const kvctl_command kvctl_get = {
    .name = "get",
    .brief = "write one value to a file",
    .help = get_help,
    .run = run_get,
};
