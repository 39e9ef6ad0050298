/*
 * prefetch.c: kvctl prefetch: loads a context's values to dram, or copies them to the server's GPU,
 * ahead of their use.
 */
#include <getopt.h>
#include <stdio.h>

#include "base/text.h"
#include "kvctl.h"

static const char help[] =
    "NAME\n"
    "    kvctl prefetch - load what blocks hold to the dram tier, or to the server's GPU\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--json] prefetch [--gpu] --schema SCHEMA [--parts PARTS] DIGEST...\n"
    "    kvctl [--server URI] [--json] prefetch [--gpu] --schema SCHEMA [--parts PARTS]\n"
    "          [--block-tokens N] --digests FILE | --tokens FILE\n"
    "    kvctl [--server URI] [--json] prefetch [--gpu] --schema SCHEMA --key KEY...\n"
    "\n"
    "DESCRIPTION\n"
    "    Loads values that are only in a slower tier, as far as there is room that loses nothing,\n"
    "    and half of dram at most. Prints how many were in dram already, were loaded, are "
    "nowhere,\n"
    "    and were left where they are. --timeout bounds it; what was loaded until then stays.\n"
    "    Blocks are named as in 'kvctl match'.\n"
    "\n"
    "OPTIONS\n" KVCTL_BLOCKS_HELP KVCTL_KEYS_HELP "    --parts N[,N]... or FIRST-LAST\n"
    "        The parts to load. Default: all of the schema but index parts.\n"
    "    --gpu\n"
    "        Copy to the GPU of a server that has a gpu tier (gpu_bytes), as much as it holds: "
    "workers\n"
    "        of its host read the values there.\n"
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
    "    kvctl --timeout 1m prefetch --schema llama.schema --tokens prompt.ids\n";

static void print_info(const kvctl_globals *globals, const kvc_prefetch_info *info)
{
    char size[KVC_TEXT_BYTES];
    if (globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_number("there", info->there);
        kvctl_json_number("moved", info->moved);
        kvctl_json_number("missing", info->missing);
        kvctl_json_number("left", info->left);
        kvctl_json_number("moved_bytes", info->moved_bytes);
        kvctl_json_close();
        return;
    }
    (void)printf("%llu values loaded (%s), %llu were there, %llu are missing, %llu were left\n",
                 (unsigned long long)info->moved, kvc_bytes_short(info->moved_bytes, size),
                 (unsigned long long)info->there, (unsigned long long)info->missing,
                 (unsigned long long)info->left);
}

static kvctl_exit ask(const kvctl_globals *globals, const kvctl_blocks *blocks, kvc_tier tier)
{
    kvc_client *client = NULL;
    kvc_context *context = NULL;
    kvc_prefetch_info info;
    kvc_op op;
    kvctl_exit result = kvctl_connect(globals, &client);
    if (result != KVCTL_OK)
        return result;
    kvc_op_init(&op, NULL, NULL);
    kvc_status status = KVC_OK;
    if (blocks->n_keys == 0)
        status = kvc_context_open(client, &blocks->schema.digest, blocks->digests,
                                  blocks->n_digests, 0, kvctl_deadline_ns(globals), &context);
    if (status == KVC_OK && context != NULL)
        status = kvc_prefetch(context, blocks->parts, blocks->n_parts, 0, 0, tier, &info,
                              kvctl_deadline_ns(globals), &op);
    else if (status == KVC_OK)
        status = kvc_prefetch_blocks(client, &blocks->schema.digest, blocks->digests,
                                     blocks->n_digests, blocks->parts, blocks->n_parts, tier, &info,
                                     kvctl_deadline_ns(globals), &op);
    if (status == KVC_OK)
        status = kvctl_wait(&op, "loading");
    if (status == KVC_OK)
        print_info(globals, &info);
    else
        result = kvctl_failed(status);
    kvc_context_close(context);
    kvc_client_close(client);
    return result;
}

static kvctl_exit run(const kvctl_globals *globals, int argc, char **argv)
{
    static const struct option options[] = {
        KVCTL_BLOCKS_OPTIONS,
        {"gpu", no_argument, NULL, 'G'},
        {0},
    };
    kvctl_blocks blocks = {0};
    kvc_tier tier = KVC_TIER_DRAM;
    kvctl_exit result = KVCTL_OK;
    int option;
    while (result == KVCTL_OK && (option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == 'G')
            tier = KVC_TIER_GPU;
        else if (!kvctl_blocks_option(option, &blocks))
            result = kvctl_usage("prefetch", "an option is wrong");
    }
    if (result == KVCTL_OK)
        result = kvctl_blocks_read("prefetch", argc, argv, &blocks);
    if (result == KVCTL_OK)
        result = ask(globals, &blocks, tier);
    kvctl_blocks_free(&blocks);
    return result;
}

const kvctl_command kvctl_prefetch = {
    .name = "prefetch",
    .brief = "load what blocks hold to dram or the server's GPU",
    .help = help,
    .run = run,
};
