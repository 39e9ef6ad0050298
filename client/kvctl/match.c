/*
 * match.c: kvctl match: how many leading blocks the server holds.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/digest.h"
#include "base/text.h"
#include "kvctl.h"

static const char help[] =
    "NAME\n"
    "    kvctl match - how many leading blocks of a context the server holds\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--json] match --schema SCHEMA [--parts PARTS] [--tiers] DIGEST...\n"
    "    kvctl [--server URI] [--json] match --schema SCHEMA [--parts PARTS] [--tiers]\n"
    "          [--block-tokens N] --digests FILE | --tokens FILE\n"
    "\n"
    "DESCRIPTION\n"
    "    Prints the length of the leading run of blocks of which the server holds every part "
    "asked\n"
    "    for. Blocks are named by their digests, in the order of the context: as arguments, in a\n"
    "    file, or computed from a file of token ids. Without any of these, digests are read from\n"
    "    standard input.\n"
    "\n"
    "OPTIONS\n"
    "    --schema SCHEMA\n"
    "        The schema: its digest (64 hex digits), or a file with its text (lines key=value),\n"
    "        whose SHA-256 is the digest. Required.\n"
    "    --parts N[,N]... or FIRST-LAST\n"
    "        The parts that must be there. Default: all of the schema but index parts.\n"
    "    --tiers\n"
    "        Also say how many of the blocks are read from which tier: of several parts the "
    "slowest\n"
    "        counts, of several copies the fastest. With --json a list, one tier for each hit.\n"
    "    --digests FILE\n"
    "        Digests of 64 hex digits, apart by white space. '-' is standard input.\n"
    "    --tokens FILE\n"
    "        Token ids in decimal, apart by white space or commas; a tail that fills no block is\n"
    "        left out. '-' is standard input.\n"
    "    --block-tokens N\n"
    "        Tokens of a block, for --tokens; not needed where --schema is a file.\n"
    "    -h, --help\n"
    "        Print this page.\n"
    "\n"
    "EXIT STATUS\n"
    "    0   the server answered, whatever the number\n"
    "    1   it answered with an error, such as NOT_FOUND for an unknown schema\n"
    "    2   bad usage\n"
    "    3   no server answered\n"
    "\n"
    "EXAMPLES\n"
    "    kvctl match --schema $SCHEMA < digests.txt\n"
    "    kvctl match --schema llama.schema --tokens prompt.ids\n"
    "    kvctl --json match --schema $SCHEMA --parts 0-31 $DIGEST | jq .hits\n";

typedef struct match_args {
    kvctl_schema schema;
    const char *digests_path, *tokens_path;
    uint64_t block_tokens;
    uint32_t *parts, n_parts;
    kvc_digest *digests;
    uint32_t n_digests;
    uint8_t *tiers; /* [n_digests]; NULL: not asked for */
    bool want_tiers;
} match_args;

static const char *const tier_names[] = {
    [KVC_TIER_GPU] = "gpu",
    [KVC_TIER_DRAM] = "dram",
    [KVC_TIER_LMDB] = "lmdb",
};

static bool parse_option(int option, match_args *args)
{
    switch (option) {
    case 's':
        return kvctl_schema_read(optarg, &args->schema);
    case 'p':
        return kvctl_picks_parse(optarg, &args->parts, &args->n_parts);
    case 'd':
        args->digests_path = optarg;
        return true;
    case 't':
        args->tokens_path = optarg;
        return true;
    case 'T':
        args->want_tiers = true;
        return true;
    case 'b':
        return kvctl_number_parse("--block-tokens", optarg, KVC_BLOCK_TOKENS_MIN,
                                  KVC_BLOCK_TOKENS_MAX, &args->block_tokens);
    default:
        return false;
    }
}

static bool digests_from_words(int argc, char **argv, match_args *args)
{
    kvc_strbuf words = {0};
    for (int i = optind; i < argc; i++)
        kvc_strbuf_putf(&words, "%s ", argv[i]);
    char *text = kvc_strbuf_take(&words);
    bool good = text != NULL && kvctl_digests_parse(text, &args->digests, &args->n_digests);
    free(text);
    return good;
}

static bool read_digests(int argc, char **argv, match_args *args)
{
    if (optind < argc)
        return digests_from_words(argc, argv, args);
    size_t len_bytes;
    const char *path = args->tokens_path    ? args->tokens_path
                       : args->digests_path ? args->digests_path
                                            : "-";
    char *text = kvctl_read_file(path, &len_bytes);
    bool good = text != NULL;
    if (good && args->tokens_path != NULL)
        good = kvctl_tokens_parse(text, &args->schema.digest, (uint32_t)args->block_tokens,
                                  &args->digests, &args->n_digests);
    else if (good)
        good = kvctl_digests_parse(text, &args->digests, &args->n_digests);
    free(text);
    return good;
}

static void print_text(const match_args *args, uint32_t hits)
{
    uint32_t n[KVC_TIER_LMDB + 1] = {0};
    (void)printf("%u of %u leading blocks are there\n", hits, args->n_digests);
    for (uint32_t i = 0; args->tiers != NULL && i < hits; i++)
        n[args->tiers[i]]++;
    for (int tier = KVC_TIER_GPU; tier <= KVC_TIER_LMDB; tier++)
        if (n[tier] > 0)
            (void)printf("  %-5s %u\n", tier_names[tier], n[tier]);
}

static void print_json(const match_args *args, uint32_t hits)
{
    kvctl_json_open(NULL, '{');
    kvctl_json_number("hits", hits);
    kvctl_json_number("blocks", args->n_digests);
    if (args->tiers != NULL) {
        kvctl_json_open("tiers", '[');
        for (uint32_t i = 0; i < hits; i++)
            kvctl_json_text(NULL, tier_names[args->tiers[i]]);
        kvctl_json_close();
    }
    kvctl_json_close();
}

static kvctl_exit ask(const kvctl_globals *globals, const match_args *args)
{
    kvc_client *client = NULL;
    kvctl_exit result = kvctl_connect(globals, &client);
    if (result != KVCTL_OK)
        return result;
    kvc_op op;
    uint32_t hits = 0;
    kvc_op_init(&op, NULL, NULL);
    kvc_status status =
        kvc_match_tiers(client, &args->schema.digest, args->digests, args->n_digests, args->parts,
                        args->n_parts, args->tiers, &hits, kvctl_deadline_ns(globals), &op);
    if (status == KVC_OK)
        status = kvctl_wait(&op, "matching");
    if (status != KVC_OK)
        result = kvctl_failed(status);
    else if (globals->json)
        print_json(args, hits);
    else
        print_text(args, hits);
    kvc_client_close(client);
    return result;
}

static kvctl_exit run(const kvctl_globals *globals, int argc, char **argv)
{
    static const struct option options[] = {
        {"schema", required_argument, NULL, 's'},
        {"parts", required_argument, NULL, 'p'},
        {"digests", required_argument, NULL, 'd'},
        {"tokens", required_argument, NULL, 't'},
        {"block-tokens", required_argument, NULL, 'b'},
        {"tiers", no_argument, NULL, 'T'},
        {0},
    };
    match_args args = {0};
    kvctl_exit result = KVCTL_USAGE;
    bool has_schema = false;
    int option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        has_schema = has_schema || option == 's';
        if (!parse_option(option, &args)) {
            result = kvctl_usage("match", "an option is wrong");
            goto done;
        }
    }
    if (args.block_tokens == 0)
        args.block_tokens = kvctl_schema_number(&args.schema, "block_tokens");
    bool from_words = optind < argc;
    if (!has_schema)
        result = kvctl_usage("match", "--schema is missing");
    else if (from_words + (args.digests_path != NULL) + (args.tokens_path != NULL) > 1)
        result = kvctl_usage("match", "digests come from one place: words, --digests or --tokens");
    else if (args.tokens_path != NULL && args.block_tokens == 0)
        result = kvctl_usage("match", "--tokens needs --block-tokens, or a file as --schema");
    else if (read_digests(argc, argv, &args)) {
        if (args.want_tiers)
            args.tiers = calloc(args.n_digests + 1, 1);
        result = args.want_tiers && args.tiers == NULL ? KVCTL_FAILED : ask(globals, &args);
    }
done:
    free(args.tiers);
    free(args.schema.text);
    free(args.parts);
    free(args.digests);
    return result;
}

const kvctl_command kvctl_match = {
    .name = "match",
    .brief = "how many leading blocks of a context the server holds",
    .help = help,
    .run = run,
};
