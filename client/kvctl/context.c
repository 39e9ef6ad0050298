/*
 * context.c: kvctl context: its words and its manual page.
 */
#include <getopt.h>
#include <stdio.h>
#include <string.h>

#include "context.h"

static const char help[] =
    "NAME\n"
    "    kvctl context - a context in one file: export, import, check\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--json] context export --schema FILE [--parts PARTS]\n"
    "          (--digests FILE | --tokens FILE) --out FILE\n"
    "    kvctl [--server URI] [--json] context import [--durable] FILE\n"
    "    kvctl [--json] context check FILE\n"
    "\n"
    "DESCRIPTION\n"
    "    export writes what the server holds of the blocks, with their digests and, where "
    "--tokens\n"
    "    gave them, the token ids, to one file. What is not there is left out and counted. The "
    "file\n"
    "    appears under its name only when it is whole.\n"
    "\n"
    "    import first checks the whole file: a file that is cut off or altered is refused, and\n"
    "    nothing is stored. Then it puts every value; the server must know the schema. First put\n"
    "    wins, so what is there stays as it is.\n"
    "\n"
    "    check does only the first half of that and needs no server.\n"
    "\n"
    "OPTIONS\n" KVCTL_BLOCKS_HELP
    "        For export --schema must be a file, since the lengths of values come from it.\n"
    "    --parts N[,N]... or FIRST-LAST\n"
    "        The parts to export, ascending. Default: all of the schema.\n"
    "    --out FILE\n"
    "        Where export writes.\n"
    "    --durable\n"
    "        import: answer only once each value is on disk and synced.\n"
    "    -h, --help\n"
    "        Print this page.\n"
    "\n"
    "EXIT STATUS\n"
    "    0   it worked\n"
    "    1   the file is damaged, nothing was there, or the server answered with an error\n"
    "    2   bad usage\n"
    "    3   no server answered\n"
    "\n"
    "EXAMPLES\n"
    "    kvctl context export --schema llama.schema --tokens prompt.ids --out prompt.ctx\n"
    "    kvctl --server grpc://other:7811 context import --durable prompt.ctx\n";

void context_print_total(const kvctl_globals *globals, const char *verb, const context_total *total)
{
    if (globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_number("blocks", total->n_blocks);
        kvctl_json_number("tokens", total->n_tokens);
        kvctl_json_number("values", total->values);
        kvctl_json_number("missing", total->missing);
        kvctl_json_number("stored", total->stored);
        kvctl_json_number("existed", total->exist);
        kvctl_json_close();
        return;
    }
    (void)printf("%s: %u blocks, %llu values, %llu missing", verb, total->n_blocks,
                 (unsigned long long)total->values, (unsigned long long)total->missing);
    if (total->stored + total->exist > 0)
        (void)printf("; %llu stored, %llu were there", (unsigned long long)total->stored,
                     (unsigned long long)total->exist);
    (void)putchar('\n');
}

static kvctl_exit parse(int argc, char **argv, context_args *args)
{
    static const struct option options[] = {
        KVCTL_BLOCKS_OPTIONS,
        {"out", required_argument, NULL, 'o'},
        {"durable", no_argument, NULL, 'D'},
        {0},
    };
    int option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == 'o')
            args->out_path = optarg;
        else if (option == 'D')
            args->durable = true;
        else if (!kvctl_blocks_option(option, &args->blocks))
            return kvctl_usage("context", "an option is wrong");
    }
    return KVCTL_OK;
}

static kvctl_exit begin_export(const kvctl_globals *globals, int argc, char **argv,
                               context_args *args)
{
    if (args->out_path == NULL)
        return kvctl_usage("context", "export needs --out");
    if (args->blocks.has_schema && args->blocks.schema.text == NULL)
        return kvctl_usage("context", "export needs a file as --schema");
    kvctl_exit result = kvctl_blocks_read("context", argc, argv, &args->blocks);
    return result == KVCTL_OK ? context_export(globals, args) : result;
}

static kvctl_exit run(const kvctl_globals *globals, int argc, char **argv)
{
    context_args args = {0};
    if (argc < 2)
        return kvctl_usage("context", "export, import or check?");
    const char *what = argv[1];
    kvctl_exit result = parse(argc - 1, argv + 1, &args);
    argc -= 1;
    argv += 1;
    bool import = strcmp(what, "import") == 0, check = strcmp(what, "check") == 0;
    if (result != KVCTL_OK)
        ;
    else if (strcmp(what, "export") == 0)
        result = begin_export(globals, argc, argv, &args);
    else if (!import && !check)
        result = kvctl_usage("context", "export, import or check, not '%s'", what);
    else if (argc - optind != 1)
        result = kvctl_usage("context", "%s takes one file", what);
    else
        result = context_import(globals, &args, argv[optind], check);
    kvctl_blocks_free(&args.blocks);
    return result;
}

const kvctl_command kvctl_context = {
    .name = "context",
    .brief = "a context in one file: export, import, check",
    .help = help,
    .run = run,
};
