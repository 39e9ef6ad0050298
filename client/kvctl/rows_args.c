/*
 * rows_args.c: the words and the manual page of kvctl rows.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rows.h"

static const char help[] =
    "NAME\n"
    "    kvctl rows - fetch the rows of tokens\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--json] rows --schema SCHEMA (--digests FILE | --tokens FILE)\n"
    "          --part N --picks PICKS [--row-bytes N] [--block-tokens N]\n"
    "          [--format summary|sums|hex] [--out FILE]\n"
    "\n"
    "DESCRIPTION\n"
    "    Opens a context over the blocks given, fetches one part's rows of the tokens picked, and\n"
    "    prints how many came from which tier and how fast, the checksum of each, or their bytes.\n"
    "    The context is closed again. Missing rows are named on standard error, twenty at most.\n"
    "\n"
    "OPTIONS\n"
    "    --schema SCHEMA\n"
    "        The schema: its digest (64 hex digits), or a file with its text (lines key=value),\n"
    "        from which block and row sizes are taken. Required.\n"
    "    --digests FILE\n"
    "        The context's blocks: digests of 64 hex digits, apart by white space. '-' is "
    "standard\n"
    "        input.\n"
    "    --tokens FILE\n"
    "        The context's token ids in decimal; their block digests are computed. '-' is "
    "standard\n"
    "        input.\n"
    "    --part N\n"
    "        The part whose rows are wanted. Required.\n"
    "    --picks PICKS\n"
    "        Token positions: single ones, FIRST-LAST (both included) and FIRST-LAST:STEP, apart\n"
    "        by commas, in the order in which the rows are wanted. Required.\n"
    "    --row-bytes N\n"
    "        Bytes of a row of the part; not needed where --schema is a file.\n"
    "    --block-tokens N\n"
    "        Tokens of a block, for --tokens; not needed where --schema is a file.\n"
    "    --format summary|sums|hex\n"
    "        summary: the totals only (the default). sums: a line 'POSITION SUM' per row, the sum\n"
    "        being the low 32 bits of its XXH3-64. hex: a line 'POSITION BYTES' per row.\n"
    "    --out FILE\n"
    "        Write the rows' bytes to FILE, dense, in the order of the picks; a missing row is\n"
    "        zeros.\n"
    "    -h, --help\n"
    "        Print this page.\n"
    "\n"
    "EXIT STATUS\n"
    "    0   every row was there\n"
    "    1   rows are missing, or the server answered with an error\n"
    "    2   bad usage\n"
    "    3   no server answered\n"
    "\n"
    "EXAMPLES\n"
    "    The first and the last row of a context of 4,096 tokens, as hex:\n"
    "        kvctl rows --schema $SCHEMA --row-bytes 4096 --digests blocks.txt --part 3 \\\n"
    "              --picks 0,4095 --format hex\n"
    "    How fast do scattered rows come?\n"
    "        kvctl rows --schema llama.schema --tokens prompt.ids --part 0 --picks 0-131071:64\n";

typedef struct words {
    rows_args *args;
    const char *digests_path, *tokens_path;
    bool has_schema, has_part, has_picks;
} words;

static bool parse_format(const char *text, rows_format *format_p)
{
    static const char *const names[] = {"summary", "sums", "hex"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (strcmp(text, names[i]) == 0) {
            *format_p = (rows_format)i;
            return true;
        }
    }
    kvctl_error("--format wants summary, sums or hex, not '%s'", text);
    return false;
}

static bool parse_u32(const char *option, uint64_t min, uint64_t max, uint32_t *value_p)
{
    uint64_t value = 0;
    if (!kvctl_number_parse(option, optarg, min, max, &value))
        return false;
    *value_p = (uint32_t)value;
    return true;
}

static bool parse_option(int option, words *w)
{
    rows_args *args = w->args;
    switch (option) {
    case 's':
        w->has_schema = true;
        return kvctl_schema_read(optarg, &args->schema);
    case 'd':
        w->digests_path = optarg;
        return true;
    case 't':
        w->tokens_path = optarg;
        return true;
    case 'p':
        w->has_part = true;
        return parse_u32("--part", 0, UINT32_MAX, &args->part);
    case 'k':
        w->has_picks = true;
        return kvctl_picks_parse(optarg, &args->picks, &args->n_picks);
    case 'r':
        return parse_u32("--row-bytes", 1, KVC_MAX_VALUE_BYTES, &args->row_bytes);
    case 'b':
        return parse_u32("--block-tokens", KVC_BLOCK_TOKENS_MIN, KVC_BLOCK_TOKENS_MAX,
                         &args->block_tokens);
    case 'f':
        return parse_format(optarg, &args->format);
    case 'o':
        args->out_path = optarg;
        return true;
    default:
        return false;
    }
}

/* What the schema's text knows and the words did not say. */
static void fill_from_schema(rows_args *args)
{
    char key[40];
    (void)snprintf(key, sizeof(key), "part.%05u.row_bytes", args->part);
    if (args->row_bytes == 0)
        args->row_bytes = kvctl_schema_number(&args->schema, key);
    if (args->block_tokens == 0)
        args->block_tokens = kvctl_schema_number(&args->schema, "block_tokens");
}

/* NULL: the words make sense. */
static const char *complaint(const words *w, bool extra_words)
{
    if (extra_words)
        return "rows takes options only";
    if (!w->has_schema)
        return "--schema is missing";
    if (!w->has_part)
        return "--part is missing";
    if (!w->has_picks)
        return "--picks is missing";
    if ((w->digests_path != NULL) == (w->tokens_path != NULL))
        return "blocks come from either --digests or --tokens";
    if (w->args->row_bytes == 0)
        return "--row-bytes is missing (the schema's digest does not tell, or has no such part)";
    if (w->tokens_path != NULL && w->args->block_tokens == 0)
        return "--tokens needs --block-tokens, or a file as --schema";
    return NULL;
}

static bool read_blocks(const words *w)
{
    rows_args *args = w->args;
    size_t len_bytes;
    char *text = kvctl_read_file(w->tokens_path ? w->tokens_path : w->digests_path, &len_bytes);
    bool good = text != NULL;
    if (good && w->tokens_path != NULL)
        good = kvctl_tokens_parse(text, &args->schema.digest, args->block_tokens, &args->digests,
                                  &args->n_digests, NULL, NULL);
    else if (good)
        good = kvctl_digests_parse(text, &args->digests, &args->n_digests);
    free(text);
    return good;
}

static kvctl_exit run(const kvctl_globals *globals, int argc, char **argv)
{
    static const struct option options[] = {
        {"schema", required_argument, NULL, 's'},       {"digests", required_argument, NULL, 'd'},
        {"tokens", required_argument, NULL, 't'},       {"part", required_argument, NULL, 'p'},
        {"picks", required_argument, NULL, 'k'},        {"row-bytes", required_argument, NULL, 'r'},
        {"block-tokens", required_argument, NULL, 'b'}, {"format", required_argument, NULL, 'f'},
        {"out", required_argument, NULL, 'o'},          {0},
    };
    rows_args args = {.globals = globals};
    words w = {.args = &args};
    kvctl_exit result = KVCTL_USAGE;
    int option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (!parse_option(option, &w)) {
            result = kvctl_usage("rows", "an option is wrong");
            goto done;
        }
    }
    fill_from_schema(&args);
    const char *wrong = complaint(&w, optind < argc);
    if (wrong != NULL)
        result = kvctl_usage("rows", "%s", wrong);
    else if (read_blocks(&w))
        result = rows_fetch(&args);
done:
    free(args.schema.text);
    free(args.digests);
    free(args.picks);
    return result;
}

const kvctl_command kvctl_rows = {
    .name = "rows",
    .brief = "fetch the rows of tokens",
    .help = help,
    .run = run,
};
