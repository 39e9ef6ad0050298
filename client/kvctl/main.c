/*
 * main.c: kvctl, the command line of a Kvasir store: global options, the list of commands, help.
 *
 * Main thread. Results go to standard output, everything else to standard error. Exit statuses are
 * those of kvctl_exit.
 */
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/text.h"
#include "kvctl.h"

#define DEFAULT_TIMEOUT_NS (5ull * 1000000000)

static const kvctl_command *const commands[] = {
    &kvctl_status, &kvctl_top,      &kvctl_match,   &kvctl_rows,    &kvctl_get,
    &kvctl_put,    &kvctl_prefetch, &kvctl_context, &kvctl_hold,    &kvctl_release,
    &kvctl_erase,  &kvctl_doctor,   &kvctl_bench,   &kvctl_explain, &kvctl_place,
};

#define N_COMMANDS (sizeof(commands) / sizeof(commands[0]))

void kvctl_error(const char *fmt, ...)
{
    va_list args;
    (void)fputs("kvctl: ", stderr);
    va_start(args, fmt);
    (void)vfprintf(stderr, fmt, args);
    va_end(args);
    (void)fputc('\n', stderr);
}

kvctl_exit kvctl_usage(const char *command, const char *fmt, ...)
{
    va_list args;
    (void)fputs("kvctl: ", stderr);
    va_start(args, fmt);
    (void)vfprintf(stderr, fmt, args);
    va_end(args);
    (void)fprintf(stderr, "\nTry 'kvctl %s%s--help'.\n", command, *command != '\0' ? " " : "");
    return KVCTL_USAGE;
}

static const kvctl_command *find(const char *name)
{
    for (size_t i = 0; i < N_COMMANDS; i++)
        if (strcmp(commands[i]->name, name) == 0)
            return commands[i];
    return NULL;
}

/* The command that was probably meant, or NULL. */
static const char *nearest(const char *name)
{
    const char *best = NULL;
    uint32_t best_edits = 3;
    for (size_t i = 0; i < N_COMMANDS; i++) {
        uint32_t edits = kvc_edit_distance(name, commands[i]->name);
        if (edits < best_edits) {
            best_edits = edits;
            best = commands[i]->name;
        }
    }
    return best;
}

static kvctl_exit unknown(const char *name)
{
    const char *meant = nearest(name);
    if (meant != NULL)
        return kvctl_usage("", "unknown command '%s'; did you mean '%s'?", name, meant);
    return kvctl_usage("", "unknown command '%s'", name);
}

/* kvctl help [COMMAND] */
static kvctl_exit run_help(int argc, char **argv)
{
    const kvctl_command *command = argc > 1 ? find(argv[1]) : NULL;
    if (argc > 1 && command == NULL)
        return unknown(argv[1]);
    (void)fputs(command != NULL ? command->help : kvctl_help, stdout);
    return KVCTL_OK;
}

static bool asks_help(int argc, char **argv)
{
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0)
            return true;
    return false;
}

/* Takes the options before the command. -1: go on with argv[optind]. */
static int parse_globals(int argc, char **argv, kvctl_globals *globals)
{
    static const struct option options[] = {
        {"server", required_argument, NULL, 's'},
        {"timeout", required_argument, NULL, 't'},
        {"json", no_argument, NULL, 'j'},
        {"help", no_argument, NULL, 'h'},
        {"version", no_argument, NULL, 'V'},
        {"sums", no_argument, NULL, 'S'},
        {0},
    };
    int option;
    while ((option = getopt_long(argc, argv, "+s:t:jhV", options, NULL)) != -1) {
        switch (option) {
        case 's':
            globals->server = optarg;
            break;
        case 't':
            if (kvc_duration_parse(optarg, &globals->timeout_ns) != KVC_OK ||
                globals->timeout_ns == 0)
                return kvctl_usage("", "--timeout wants a duration such as 5s, not '%s'", optarg);
            break;
        case 'j':
            globals->json = true;
            break;
        case 'S':
            globals->sums = true;
            break;
        case 'h':
            (void)fputs(kvctl_help, stdout);
            return KVCTL_OK;
        case 'V':
            (void)puts("kvctl " KVCTL_VERSION);
            return KVCTL_OK;
        default:
            return kvctl_usage("", "see the message above");
        }
    }
    return -1;
}

int main(int argc, char **argv)
{
    const char *server = getenv("KVASIR_SERVER");
    kvctl_globals globals = {
        .server = server != NULL && *server != '\0' ? server : KVCTL_DEFAULT_SERVER,
        .timeout_ns = DEFAULT_TIMEOUT_NS,
    };
    int status = parse_globals(argc, argv, &globals);
    if (status != -1)
        return status;
    argc -= optind;
    argv += optind;
    if (argc == 0)
        return kvctl_usage("", "a command is missing");
    if (strcmp(argv[0], "help") == 0)
        return run_help(argc, argv);
    const kvctl_command *command = find(argv[0]);
    if (command == NULL)
        return unknown(argv[0]);
    if (asks_help(argc, argv)) {
        (void)fputs(command->help, stdout);
        return KVCTL_OK;
    }
    optind = 0; /* the command parses its own words from the start */
    status = command->run(&globals, argc, argv);
    if (fflush(stdout) != 0) {
        kvctl_error("cannot write to standard output");
        return status == KVCTL_OK ? KVCTL_FAILED : status;
    }
    return status;
}
