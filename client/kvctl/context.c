/*
 * context.c: kvctl context: its words and its manual page.
 */
#include <getopt.h>
#include <stdio.h>
#include <string.h>

#include "context.h"

static const char help[] =
    "NAME\n"
    "    kvctl context - a context by name or in one file\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--json] context export --schema FILE [--parts PARTS]\n"
    "          (--digests FILE | --tokens FILE) [--tail FILE] --out FILE\n"
    "    kvctl [--server URI] [--json] context import [--durable] [--save NAME] FILE\n"
    "    kvctl [--json] context check FILE\n"
    "    kvctl [--server URI] [--json] context save NAME --schema SCHEMA [--durable]\n"
    "          [--replace | --generation N] (--digests FILE | --tokens FILE)\n"
    "          [--tail FILE --parts PARTS]\n"
    "    kvctl [--server URI] [--json] context restore NAME [--parts PARTS] [--digests-out FILE]\n"
    "          [--tokens-out FILE] [--tail-out FILE]\n"
    "    kvctl [--server URI] [--json] context list\n"
    "    kvctl [--server URI] [--json] context rm NAME [--generation N]\n"
    "\n"
    "DESCRIPTION\n"
    "    export writes what the server holds of the blocks, with the schema, their digests, the\n"
    "    token ids that --tokens gave and the rows of --tail, to one file. What is not there is "
    "left\n"
    "    out and counted. The file appears under its name only when it is whole.\n"
    "\n"
    "    import first checks the whole file: a file that is cut off or altered is refused, and\n"
    "    nothing is stored. Then it registers the schema and puts every value. First put wins, so\n"
    "    what is there stays as it is. --save keeps the context by that name too, as save does.\n"
    "\n"
    "    check does only the first half of that and needs no server.\n"
    "\n"
    "    save keeps a context on the server under a name: its digests, token ids and the rows of\n"
    "    its tail; the values of its blocks are put as ever and may be evicted. First put wins.\n"
    "    A server with lmdb has it on disk before it answers; one without keeps it in memory, and\n"
    "    refuses --durable.\n"
    "\n"
    "    restore reads it back to files, and says how many leading blocks the server still has.\n"
    "    list shows all names with their generations, another one for each save; rm forgets one.\n"
    "\n"
    "OPTIONS\n" KVCTL_BLOCKS_HELP
    "        For export --schema must be a file, since the lengths of values come from it.\n"
    "    --parts N[,N]... or FIRST-LAST\n"
    "        The parts to export, ascending. Default: all of the schema. For save: those whose "
    "rows\n"
    "        are in --tail, ascending. For restore: those that a block must have.\n"
    "    --out FILE\n"
    "        Where export writes.\n"
    "    --durable\n"
    "        import: answer only once each value is on disk and synced. save: refuse where the\n"
    "        server has no disk.\n"
    "    --tail FILE\n"
    "        save, export: rows of the tokens that fill no block, part after part, as raw bytes. "
    "'-'\n"
    "        is standard input. For export, of every part exported.\n"
    "    --save NAME\n"
    "        import: the name to save it under, with --replace or --generation as for save.\n"
    "    --replace\n"
    "        save: whatever has the name now.\n"
    "    --generation N\n"
    "        save, rm: only if this one has the name now.\n"
    "    --digests-out FILE, --tokens-out FILE, --tail-out FILE\n"
    "        restore: where to write what was saved; --digests, --tokens and --tail read them.\n"
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
    "    kvctl --server grpc://other:7811 context import --durable prompt.ctx\n"
    "    kvctl context save chat/42 --schema llama.schema --tokens chat.ids --durable\n"
    "    kvctl context restore chat/42 --tokens-out chat.ids\n";

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
        {"tail", required_argument, NULL, 'T'},
        {"save", required_argument, NULL, 'S'},
        {"replace", no_argument, NULL, 'R'},
        {"generation", required_argument, NULL, 'G'},
        {"digests-out", required_argument, NULL, '1'},
        {"tokens-out", required_argument, NULL, '2'},
        {"tail-out", required_argument, NULL, '3'},
        {0},
    };
    int option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        bool good = true;
        switch (option) {
        case 'o':
            args->out_path = optarg;
            break;
        case 'D':
            args->durable = true;
            break;
        case 'T':
            args->tail_path = optarg;
            break;
        case 'S':
            args->save_name = optarg;
            break;
        case 'R':
            args->replace = true;
            break;
        case 'G':
            good = kvctl_number_parse("--generation", optarg, 1, UINT64_MAX, &args->generation);
            break;
        case '1':
            args->digests_out = optarg;
            break;
        case '2':
            args->tokens_out = optarg;
            break;
        case '3':
            args->tail_out = optarg;
            break;
        default:
            good = kvctl_blocks_option(option, &args->blocks);
        }
        if (!good)
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

/* The words behind export; the others take one word, or none. */
static kvctl_exit run_word(const kvctl_globals *globals, const char *what, int argc, char **argv,
                           context_args *args)
{
    static const char *const words[] = {"export",  "import", "check", "save",
                                        "restore", "rm",     "list"};
    enum { EXPORT, IMPORT, CHECK, SAVE, RESTORE, RM, LIST, NONE };
    int word = 0, n = argc - optind;
    while (word < NONE && strcmp(what, words[word]) != 0)
        word++;
    if (word == NONE)
        return kvctl_usage("context", "export, import, check, save, restore, list or rm, not '%s'",
                           what);
    if (word == LIST && n != 0)
        return kvctl_usage("context", "list takes no words");
    if (word == SAVE && n < 1)
        return kvctl_usage("context", "save takes a name");
    if (word != EXPORT && word != SAVE && word != LIST && n != 1)
        return kvctl_usage("context", "%s takes one %s", what, word < SAVE ? "file" : "name");
    switch (word) {
    case EXPORT:
        return begin_export(globals, argc, argv, args);
    case SAVE:
        return context_save(globals, argc, argv, args);
    case RESTORE:
        return context_restore(globals, argv[optind], args);
    case RM:
        return context_rm(globals, argv[optind], args);
    case LIST:
        return context_list(globals);
    default:
        return context_import(globals, args, argv[optind], word == CHECK);
    }
}

static kvctl_exit run(const kvctl_globals *globals, int argc, char **argv)
{
    context_args args = {0};
    if (argc < 2)
        return kvctl_usage("context", "export, import, check, save, restore, list or rm?");
    kvctl_exit result = parse(argc - 1, argv + 1, &args);
    if (result == KVCTL_OK)
        result = run_word(globals, argv[1], argc - 1, argv + 1, &args);
    kvctl_blocks_free(&args.blocks);
    return result;
}

const kvctl_command kvctl_context = {
    .name = "context",
    .brief = "a context by name (save, restore, list, rm) or in one file (export, import, check)",
    .help = help,
    .run = run,
};
