/*
 * erase.c: kvctl erase: removes values of blocks for good.
 */
#include <stdio.h>

#include "base/text.h"
#include "kvctl.h"

static const char help[] =
    "NAME\n"
    "    kvctl erase - remove values from every tier of the server\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--json] erase --schema SCHEMA [--parts PARTS] DIGEST...\n"
    "    kvctl [--server URI] [--json] erase --schema SCHEMA [--parts PARTS] [--block-tokens N]\n"
    "          --digests FILE | --tokens FILE\n"
    "    kvctl [--server URI] [--json] erase --schema SCHEMA --key TEXT | --key-hex HEX ...\n"
    "\n"
    "DESCRIPTION\n"
    "    Removes what the blocks hold, whoever else uses those blocks and whatever holds them.\n"
    "    Once it says so no reader has the values any more, and neither a restart nor a power "
    "loss\n"
    "    brings them back. It may take as long as the slowest reader; --timeout bounds it, and\n"
    "    what was met until then is served no more. Blocks are named as in 'kvctl match'.\n"
    "\n"
    "    The bytes are not overwritten: freed pages of the server's LMDB files keep them until\n"
    "    they are used again, and so may the drive. Where that matters, keep the folder on an\n"
    "    encrypted disk.\n"
    "\n"
    "OPTIONS\n" KVCTL_BLOCKS_HELP KVCTL_KEYS_HELP "    --parts N[,N]... or FIRST-LAST\n"
    "        The parts to erase. Default: all of the schema.\n"
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
    "    kvctl erase --schema llama.schema --tokens prompt.ids\n"
    "    kvctl --json erase --schema $SCHEMA --digests blocks.txt | jq .values\n";

static kvctl_exit ask(const kvctl_globals *globals, const kvctl_blocks *blocks)
{
    kvc_client *client = NULL;
    kvctl_exit result = kvctl_connect(globals, &client);
    if (result != KVCTL_OK)
        return result;
    kvc_op op;
    kvc_erase_info info = {0};
    char size[KVC_TEXT_BYTES];
    kvc_op_init(&op, NULL, NULL);
    kvc_status status =
        kvc_erase(client, &blocks->schema.digest, blocks->digests, blocks->n_digests, blocks->parts,
                  blocks->n_parts, &info, kvctl_deadline_ns(globals), &op);
    if (status == KVC_OK)
        status = kvctl_wait(&op, "erasing");
    if (status != KVC_OK) {
        result = kvctl_failed(status);
    } else if (globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_number("values", info.values);
        kvctl_json_number("bytes", info.bytes);
        kvctl_json_close();
    } else {
        (void)printf("%llu values erased (%s)\n", (unsigned long long)info.values,
                     kvc_bytes_short(info.bytes, size));
    }
    kvc_client_close(client);
    return result;
}

static kvctl_exit run(const kvctl_globals *globals, int argc, char **argv)
{
    return kvctl_blocks_run("erase", globals, argc, argv, ask);
}

const kvctl_command kvctl_erase = {
    .name = "erase",
    .brief = "remove values from every tier of the server",
    .help = help,
    .run = run,
};
