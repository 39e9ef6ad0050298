/*
 * place.c: kvctl place: which of several servers owns a block, as a worker over them places it.
 *
 * Main thread. Asks nobody: the answer follows from the block's digest and the servers' names.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/place.h"
#include "kvctl.h"

#define MAX_NAMES 64u

static const char help[] =
    "NAME\n"
    "    kvctl place - which of several servers owns a block\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--json] place --names NAME,NAME... --schema SCHEMA DIGEST...\n"
    "    kvctl [--json] place --names NAME,NAME... --schema SCHEMA [--block-tokens N]\n"
    "          --digests FILE | --tokens FILE\n"
    "    kvctl [--json] place --names NAME,NAME... --schema SCHEMA --key TEXT | --key-hex HEX ...\n"
    "\n"
    "DESCRIPTION\n"
    "    Workers that have a list of servers put each block to one of them, which follows from "
    "the\n"
    "    block's digest and the servers' names alone. Prints the owner of each block, in the "
    "order\n"
    "    in which they were named, and how many each server has. No server is asked. Where a "
    "worker\n"
    "    gives no names, its servers are called 0, 1 and so on.\n"
    "\n"
    "OPTIONS\n"
    "    --names NAME[,NAME]...\n"
    "        The servers' names, in any order. Required.\n" KVCTL_BLOCKS_HELP KVCTL_KEYS_HELP
    "    -h, --help\n"
    "        Print this page.\n"
    "\n"
    "EXIT STATUS\n"
    "    0   printed\n"
    "    2   bad usage\n"
    "\n"
    "EXAMPLES\n"
    "    kvctl place --names 0,1,2 --schema llama.schema --tokens prompt.ids\n"
    "    kvctl --json place --names east,west --schema $SCHEMA $DIGEST | jq -r .owners[0]\n";

typedef struct place_args {
    kvctl_blocks blocks;
    char *list; /* names, cut apart in place */
    const char *names[MAX_NAMES];
    uint64_t keys[MAX_NAMES];
    uint32_t n;
} place_args;

static bool add_name(place_args *args, const char *name)
{
    if (args->n == MAX_NAMES) {
        kvctl_error("--names: more than %u", MAX_NAMES);
        return false;
    }
    uint64_t key = 0;
    if (kvc_place_key(name, &key) != KVC_OK) {
        kvctl_error("--names: a name has 1 to %u bytes", KVC_MAX_NAME_BYTES);
        return false;
    }
    for (uint32_t i = 0; i < args->n; i++) {
        if (args->keys[i] == key) {
            kvctl_error("--names: '%s' is there twice", name);
            return false;
        }
    }
    args->keys[args->n] = key;
    args->names[args->n++] = name;
    return true;
}

static bool take_names(place_args *args, const char *text)
{
    free(args->list);
    args->n = 0;
    args->list = strdup(text);
    if (args->list == NULL) {
        kvctl_error("memory is out");
        return false;
    }
    for (char *name = args->list;;) {
        size_t len = strcspn(name, ",");
        bool last = name[len] == '\0';
        name[len] = '\0';
        if (!add_name(args, name))
            return false;
        if (last)
            return true;
        name += len + 1;
    }
}

static void print_json(const place_args *args)
{
    kvctl_json_open(NULL, '{');
    kvctl_json_number("blocks", args->blocks.n_digests);
    kvctl_json_open("owners", '[');
    for (uint32_t i = 0; i < args->blocks.n_digests; i++)
        kvctl_json_text(
            NULL, args->names[kvc_place_owner(args->keys, args->n, &args->blocks.digests[i])]);
    kvctl_json_close();
    kvctl_json_close();
}

static void print_text(const place_args *args)
{
    uint32_t count[MAX_NAMES] = {0};
    for (uint32_t i = 0; i < args->blocks.n_digests; i++) {
        uint32_t owner = kvc_place_owner(args->keys, args->n, &args->blocks.digests[i]);
        count[owner]++;
        (void)printf("%u %s\n", i, args->names[owner]);
    }
    for (uint32_t s = 0; s < args->n; s++)
        (void)printf("%s has %u of %u\n", args->names[s], count[s], args->blocks.n_digests);
}

static kvctl_exit run(const kvctl_globals *globals, int argc, char **argv)
{
    static const struct option options[] = {
        KVCTL_BLOCKS_OPTIONS,
        {"names", required_argument, NULL, 'n'},
        {0},
    };
    place_args args = {0};
    kvctl_exit result = KVCTL_OK;
    int option;
    while (result == KVCTL_OK && (option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        bool good =
            option == 'n' ? take_names(&args, optarg) : kvctl_blocks_option(option, &args.blocks);
        if (!good)
            result = kvctl_usage("place", "an option is wrong");
    }
    if (result == KVCTL_OK && args.n == 0)
        result = kvctl_usage("place", "--names is missing");
    if (result == KVCTL_OK)
        result = kvctl_blocks_read("place", argc, argv, &args.blocks);
    if (result == KVCTL_OK && globals->json)
        print_json(&args);
    else if (result == KVCTL_OK)
        print_text(&args);
    kvctl_blocks_free(&args.blocks);
    free(args.list);
    return result;
}

const kvctl_command kvctl_place = {
    .name = "place",
    .brief = "which of several servers owns a block",
    .help = help,
    .run = run,
};
