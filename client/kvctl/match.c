/*
 * match.c: kvctl match: how many leading blocks the server holds.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>

#include "kvctl.h"

static const char help[] =
    "NAME\n"
    "    kvctl match - how many leading blocks of a context the server holds\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--json] match --schema SCHEMA [--parts PARTS] [--tiers] DIGEST...\n"
    "    kvctl [--server URI] [--json] match --schema SCHEMA [--parts PARTS] [--tiers]\n"
    "          [--block-tokens N] --digests FILE | --tokens FILE\n"
    "    kvctl [--server URI] [--json] match --schema SCHEMA --key TEXT | --key-hex HEX ...\n"
    "\n"
    "DESCRIPTION\n"
    "    Prints the length of the leading run of blocks of which the server holds every part "
    "asked\n"
    "    for. Blocks are named by their digests, in the order of the context: as arguments, in a\n"
    "    file, or computed from a file of token ids. Without any of these, digests are read from\n"
    "    standard input.\n"
    "\n"
    "    Keys of an opaque schema follow nothing: for each the tier is printed that its value "
    "would\n"
    "    be read from, or that it is not there.\n"
    "\n"
    "OPTIONS\n" KVCTL_BLOCKS_HELP KVCTL_KEYS_HELP "    --parts N[,N]... or FIRST-LAST\n"
    "        The parts that must be there. Default: all of the schema but index parts.\n"
    "    --tiers\n"
    "        Also say how many of the blocks are read from which tier: of several parts the "
    "slowest\n"
    "        counts, of several copies the fastest. With --json a list, one tier for each hit.\n"
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
    kvctl_blocks blocks;
    uint8_t *tiers; /* [n_digests]; NULL: not asked for */
    bool want_tiers;
} match_args;

static const char *const tier_names[] = {
    [KVC_TIER_GPU] = "gpu",
    [KVC_TIER_DRAM] = "dram",
    [KVC_TIER_LMDB] = "lmdb",
};

static void print_text(const match_args *args, uint32_t hits)
{
    uint32_t n[KVC_TIER_LMDB + 1] = {0};
    (void)printf("%u of %u leading blocks are there\n", hits, args->blocks.n_digests);
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
    kvctl_json_number("blocks", args->blocks.n_digests);
    if (args->tiers != NULL) {
        kvctl_json_open("tiers", '[');
        for (uint32_t i = 0; i < hits; i++)
            kvctl_json_text(NULL, tier_names[args->tiers[i]]);
        kvctl_json_close();
    }
    kvctl_json_close();
}

/* Keys: each by itself. */
static void print_keys(const kvctl_globals *globals, const match_args *args)
{
    uint32_t n_there = 0;
    for (uint32_t i = 0; i < args->blocks.n_digests; i++)
        n_there += args->tiers[i] != 0;
    if (!globals->json) {
        (void)printf("%u of %u values are there\n", n_there, args->blocks.n_digests);
        for (uint32_t i = 0; i < args->blocks.n_digests; i++)
            (void)printf("  %u %s\n", i, args->tiers[i] ? tier_names[args->tiers[i]] : "-");
        return;
    }
    kvctl_json_open(NULL, '{');
    kvctl_json_number("there", n_there);
    kvctl_json_open("tiers", '[');
    for (uint32_t i = 0; i < args->blocks.n_digests; i++)
        kvctl_json_text(NULL, args->tiers[i] ? tier_names[args->tiers[i]] : "");
    kvctl_json_close();
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
    bool keys = args->blocks.n_keys > 0;
    kvc_status status =
        keys
            ? kvc_opaque_match(client, &args->blocks.schema.digest, args->blocks.digests,
                               args->blocks.n_digests, args->tiers, kvctl_deadline_ns(globals), &op)
            : kvc_match_tiers(client, &args->blocks.schema.digest, args->blocks.digests,
                              args->blocks.n_digests, args->blocks.parts, args->blocks.n_parts,
                              args->tiers, &hits, kvctl_deadline_ns(globals), &op);
    if (status == KVC_OK)
        status = kvctl_wait(&op, "matching");
    if (status != KVC_OK)
        result = kvctl_failed(status);
    else if (keys)
        print_keys(globals, args);
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
        KVCTL_BLOCKS_OPTIONS,
        {"tiers", no_argument, NULL, 'T'},
        {0},
    };
    match_args args = {0};
    kvctl_exit result = KVCTL_OK;
    int option;
    while (result == KVCTL_OK && (option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == 'T')
            args.want_tiers = true;
        else if (!kvctl_blocks_option(option, &args.blocks))
            result = kvctl_usage("match", "an option is wrong");
    }
    if (result == KVCTL_OK)
        result = kvctl_blocks_read("match", argc, argv, &args.blocks);
    if (result == KVCTL_OK && (args.want_tiers || args.blocks.n_keys > 0)) {
        args.tiers = calloc(args.blocks.n_digests + 1, 1);
        result = args.tiers != NULL ? KVCTL_OK : KVCTL_FAILED;
    }
    if (result == KVCTL_OK)
        result = ask(globals, &args);
    free(args.tiers);
    kvctl_blocks_free(&args.blocks);
    return result;
}

const kvctl_command kvctl_match = {
    .name = "match",
    .brief = "how many leading blocks of a context the server holds",
    .help = help,
    .run = run,
};
