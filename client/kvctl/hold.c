/*
 * hold.c: kvctl hold and kvctl release: what stays, whatever else comes.
 */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/text.h"
#include "kvctl.h"

#define NS_PER_MS 1000000ull

static const char hold_help[] =
    "NAME\n"
    "    kvctl hold - keep what blocks hold from eviction for a time\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--json] hold --schema SCHEMA [--ttl DURATION] DIGEST...\n"
    "    kvctl [--server URI] [--json] hold --schema SCHEMA [--ttl DURATION] [--block-tokens N]\n"
    "          --digests FILE | --tokens FILE\n"
    "    kvctl [--server URI] [--json] hold --schema SCHEMA [--ttl DURATION] --key KEY...\n"
    "    kvctl [--server URI] [--json] hold --renew HOLD [--ttl DURATION]\n"
    "\n"
    "DESCRIPTION\n"
    "    Keeps the values of the blocks, of every part, from being dropped by the last tier that\n"
    "    has them, until 'kvctl release' or the end of the TTL. Prints the name of the hold. "
    "Values\n"
    "    put to the blocks later are kept too while there is room. What a tenant may hold is\n"
    "    capped by the server's setting max_hold_bytes; a hold that would pass it is refused as a\n"
    "    whole. Erase removes values that are held. Blocks are named as in 'kvctl match'.\n"
    "\n"
    "OPTIONS\n" KVCTL_BLOCKS_HELP KVCTL_KEYS_HELP "    --ttl DURATION\n"
    "        How long: 90s, 2h. Default: the server's default for contexts. The server may "
    "shorten\n"
    "        it; what it took is printed.\n"
    "    --renew HOLD\n"
    "        Let the TTL of a hold begin anew, instead of making one.\n"
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
    "    HOLD=$(kvctl --json hold --schema llama.schema --tokens prompt.ids --ttl 2h | jq -r "
    ".hold)\n"
    "    kvctl hold --renew $HOLD --ttl 2h\n"
    "    kvctl release $HOLD\n";

static const char release_help[] =
    "NAME\n"
    "    kvctl release - end holds\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--json] release HOLD...\n"
    "\n"
    "DESCRIPTION\n"
    "    Lets the values that 'kvctl hold' kept give way again. HOLD is the name it printed: 16 "
    "hex\n"
    "    digits. A hold that ran out, or that a restart of the server ended, is not found.\n"
    "\n"
    "OPTIONS\n"
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
    "    kvctl release 5f3a000000000001\n";

typedef struct hold_args {
    kvctl_blocks blocks;
    uint64_t ttl_ns, renew; /* renew 0: a new one */
} hold_args;

static bool parse_hold(const char *text, uint64_t *hold_p)
{
    char *end;
    errno = 0;
    *hold_p = strtoull(text, &end, 16);
    if (*text != '\0' && *end == '\0' && errno == 0 && *hold_p != 0)
        return true;
    kvctl_error("a hold has 16 hex digits, not '%s'", text);
    return false;
}

static void print_hold(const kvctl_globals *globals, const kvc_hold_info *info)
{
    char name[17], ttl[KVC_TEXT_BYTES], used[KVC_TEXT_BYTES], cap[KVC_TEXT_BYTES];
    (void)snprintf(name, sizeof(name), "%016llx", (unsigned long long)info->hold);
    if (globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_text("hold", name); /* more bits than a JSON number keeps */
        kvctl_json_number("ttl_ms", info->ttl_ms);
        kvctl_json_number("blocks", info->n_blocks);
        kvctl_json_number("tenant_bytes", info->tenant_bytes);
        kvctl_json_number("max_bytes", info->max_bytes);
        kvctl_json_close();
        return;
    }
    (void)printf("hold %s: %u blocks for %s; %s of %s are held in all\n", name, info->n_blocks,
                 kvc_duration_short(info->ttl_ms * NS_PER_MS, ttl),
                 kvc_bytes_short(info->tenant_bytes, used), kvc_bytes_short(info->max_bytes, cap));
}

/* The context is needed only until the hold has its blocks. */
static kvc_status make_hold(const kvctl_globals *globals, const hold_args *args, kvc_client *client,
                            kvc_hold_info *info_p)
{
    const kvctl_blocks *blocks = &args->blocks;
    kvc_op op;
    kvc_context *context = NULL;
    kvc_op_init(&op, NULL, NULL);
    if (blocks->n_keys > 0) {
        kvc_status made =
            kvc_hold_blocks(client, &blocks->schema.digest, blocks->digests, blocks->n_digests,
                            args->ttl_ns / NS_PER_MS, info_p, kvctl_deadline_ns(globals), &op);
        return made == KVC_OK ? kvctl_wait(&op, "holding") : made;
    }
    kvc_status status =
        kvc_context_open(client, &blocks->schema.digest, blocks->digests, blocks->n_digests, 60000,
                         kvctl_deadline_ns(globals), &context);
    if (status != KVC_OK)
        return status;
    status = kvc_hold(context, args->ttl_ns / NS_PER_MS, info_p, kvctl_deadline_ns(globals), &op);
    if (status == KVC_OK)
        status = kvctl_wait(&op, "holding");
    kvc_context_close(context);
    return status;
}

static kvctl_exit ask(const kvctl_globals *globals, const hold_args *args)
{
    kvc_client *client = NULL;
    kvc_hold_info info;
    kvc_op op;
    kvc_status status;
    kvctl_exit result = kvctl_connect(globals, &client);
    if (result != KVCTL_OK)
        return result;
    if (args->renew == 0) {
        status = make_hold(globals, args, client, &info);
    } else {
        kvc_op_init(&op, NULL, NULL);
        status = kvc_hold_renew(client, args->renew, args->ttl_ns / NS_PER_MS, &info,
                                kvctl_deadline_ns(globals), &op);
        if (status == KVC_OK)
            status = kvctl_wait(&op, "renewing");
    }
    if (status == KVC_OK)
        print_hold(globals, &info);
    else
        result = kvctl_failed(status);
    kvc_client_close(client);
    return result;
}

static bool parse_option(int option, hold_args *args)
{
    if (option == 'l') {
        if (kvc_duration_parse(optarg, &args->ttl_ns) == KVC_OK && args->ttl_ns >= NS_PER_MS)
            return true;
        kvctl_error("--ttl wants a duration such as 10m, not '%s'", optarg);
        return false;
    }
    if (option == 'r')
        return parse_hold(optarg, &args->renew);
    return kvctl_blocks_option(option, &args->blocks);
}

static kvctl_exit run_hold(const kvctl_globals *globals, int argc, char **argv)
{
    static const struct option options[] = {
        KVCTL_BLOCKS_OPTIONS,
        {"ttl", required_argument, NULL, 'l'},
        {"renew", required_argument, NULL, 'r'},
        {0},
    };
    hold_args args = {0};
    kvctl_exit result = KVCTL_OK;
    int option;
    while (result == KVCTL_OK && (option = getopt_long(argc, argv, "", options, NULL)) != -1)
        if (!parse_option(option, &args))
            result = kvctl_usage("hold", "an option is wrong");
    if (result == KVCTL_OK && args.blocks.n_parts > 0)
        result = kvctl_usage("hold", "a hold keeps every part: --parts is not for it");
    if (result == KVCTL_OK && args.renew != 0 && (args.blocks.has_schema || optind < argc))
        result = kvctl_usage("hold", "--renew names a hold: no blocks besides");
    if (result == KVCTL_OK && args.renew == 0)
        result = kvctl_blocks_read("hold", argc, argv, &args.blocks);
    if (result == KVCTL_OK)
        result = ask(globals, &args);
    kvctl_blocks_free(&args.blocks);
    return result;
}

static kvctl_exit release_all(const kvctl_globals *globals, int n, char **names)
{
    kvc_client *client = NULL;
    kvctl_exit result = kvctl_connect(globals, &client);
    if (result != KVCTL_OK)
        return result;
    uint64_t released = 0;
    for (int i = 0; i < n; i++) {
        uint64_t hold = 0;
        kvc_op op;
        kvc_op_init(&op, NULL, NULL);
        (void)parse_hold(names[i], &hold); /* run_release has looked at it */
        kvc_status status = kvc_release(client, hold, kvctl_deadline_ns(globals), &op);
        if (status == KVC_OK)
            status = kvctl_wait(&op, "releasing");
        released += status == KVC_OK;
        if (status != KVC_OK)
            result = kvctl_failed(status);
    }
    if (globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_number("released", released);
        kvctl_json_close();
    } else {
        (void)printf("%llu released\n", (unsigned long long)released);
    }
    kvc_client_close(client);
    return result;
}

static kvctl_exit run_release(const kvctl_globals *globals, int argc, char **argv)
{
    static const struct option options[] = {{0}};
    uint64_t hold;
    if (getopt_long(argc, argv, "", options, NULL) != -1)
        return kvctl_usage("release", "see the message above");
    if (optind == argc)
        return kvctl_usage("release", "which hold?");
    for (int i = optind; i < argc; i++)
        if (!parse_hold(argv[i], &hold))
            return kvctl_usage("release", "nothing was released");
    return release_all(globals, argc - optind, argv + optind);
}

const kvctl_command kvctl_hold = {
    .name = "hold",
    .brief = "keep what blocks hold from eviction for a time",
    .help = hold_help,
    .run = run_hold,
};

const kvctl_command kvctl_release = {
    .name = "release",
    .brief = "end holds",
    .help = release_help,
    .run = run_release,
};
