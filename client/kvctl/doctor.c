/*
 * doctor.c: kvctl doctor: runs the checks and prints what they found.
 */
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "doctor.h"

static const char help[] =
    "NAME\n"
    "    kvctl doctor - check server and machine, and say what to do\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--json] doctor [--admin HOST:PORT] [--lmdb-path FOLDER]\n"
    "\n"
    "DESCRIPTION\n"
    "    Looks at what commonly goes wrong and prints one line for each thing: OK, INFO (nothing\n"
    "    to do), WARN (it works, but worse than it could) or FAIL (it does not work, or will not\n"
    "    for long), followed by the remedy. The machine is checked also where no server answers.\n"
    "\n"
    "    server    it answers, how quickly, its version, whether its limits make sense, its\n"
    "              connections, and its schemas, opaque ones apart\n"
    "    caps      the tiers' configured bytes against this machine's memory and disk (only where\n"
    "              the server is on this machine)\n"
    "    admin     the admin port: it answers, the server is ready, no tier has failed\n"
    "    clock     the clock source, and whether the time is synchronised\n"
    "    limits    locked memory and open files that a process started from here may have\n"
    "    cpu       AVX-512 or AVX2 for the kernels\n"
    "    memory    shared memory and huge pages\n"
    "    gpu       its name and driver, for workers that use one\n"
    "    rdma      devices, for information, and whether they write to a GPU's memory\n"
    "    shm       memory that can be passed and sealed, the server's maps, and, where --server "
    "is\n"
    "              shm://PATH, the socket and who answers there\n"
    "    lmdb      the folder's owner, permissions, file system and free space\n"
    "\n"
    "OPTIONS\n"
    "    --admin HOST:PORT\n"
    "        The server's admin_listen. Default: 127.0.0.1:7812 where the server is on this\n"
    "        machine; there, it is no failure if nobody listens.\n"
    "    --lmdb-path FOLDER\n"
    "        The folder given to cachesvc as lmdb_path. Without it the disk is not checked.\n"
    "    -h, --help\n"
    "        Print this page.\n"
    "\n"
    "EXIT STATUS\n"
    "    0   no check failed; there may be warnings\n"
    "    1   a check failed\n"
    "    2   bad usage\n"
    "\n"
    "EXAMPLES\n"
    "    kvctl doctor\n"
    "    kvctl doctor --lmdb-path /var/lib/kvasir\n"
    "    kvctl --json doctor | jq '.findings[] | select(.level == \"FAIL\")'\n";

static const char *const level_names[] = {"OK", "INFO", "WARN", "FAIL"};

void doctor_report(doctor *d, doctor_level level, const char *check, const char *fmt, ...)
{
    KVC_ASSERT(d->n_findings < DOCTOR_MAX_FINDINGS);
    doctor_finding *finding = &d->findings[d->n_findings++];
    va_list args;
    finding->level = level;
    finding->check = check;
    finding->fix[0] = '\0';
    va_start(args, fmt);
    (void)vsnprintf(finding->text, sizeof(finding->text), fmt, args);
    va_end(args);
}

void doctor_fix(doctor *d, const char *fmt, ...)
{
    KVC_ASSERT(d->n_findings > 0);
    doctor_finding *finding = &d->findings[d->n_findings - 1];
    va_list args;
    va_start(args, fmt);
    (void)vsnprintf(finding->fix, sizeof(finding->fix), fmt, args);
    va_end(args);
}

const char *doctor_line(const char *path, char *out, size_t out_bytes)
{
    out[0] = '\0';
    FILE *stream = fopen(path, "re");
    if (stream == NULL)
        return out;
    if (fgets(out, (int)out_bytes, stream) == NULL)
        out[0] = '\0';
    out[strcspn(out, "\n")] = '\0';
    (void)fclose(stream);
    return out;
}

static void print_text(const doctor *d, const uint32_t counts[4])
{
    for (uint32_t i = 0; i < d->n_findings; i++) {
        const doctor_finding *finding = &d->findings[i];
        (void)printf("%-4s  %-9s %s\n", level_names[finding->level], finding->check, finding->text);
        if (finding->fix[0] != '\0')
            (void)printf("%-16s-> %s\n", "", finding->fix);
    }
    (void)printf("\n%u checks: %u OK, %u for information, %u warnings, %u failed\n", d->n_findings,
                 counts[DOCTOR_OK], counts[DOCTOR_INFO], counts[DOCTOR_WARN], counts[DOCTOR_FAIL]);
}

static void print_json(const doctor *d, const uint32_t counts[4])
{
    kvctl_json_open(NULL, '{');
    kvctl_json_bool("failed", counts[DOCTOR_FAIL] > 0);
    kvctl_json_open("findings", '[');
    for (uint32_t i = 0; i < d->n_findings; i++) {
        const doctor_finding *finding = &d->findings[i];
        kvctl_json_open(NULL, '{');
        kvctl_json_text("level", level_names[finding->level]);
        kvctl_json_text("check", finding->check);
        kvctl_json_text("text", finding->text);
        kvctl_json_text("fix", finding->fix);
        kvctl_json_close();
    }
    kvctl_json_close();
    kvctl_json_close();
}

static kvctl_exit run(const kvctl_globals *globals, int argc, char **argv)
{
    static const struct option options[] = {
        {"lmdb-path", required_argument, NULL, 'l'}, {"admin", required_argument, NULL, 'a'}, {0}};
    const char *lmdb_path = NULL, *admin = NULL;
    int option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == 'l')
            lmdb_path = optarg;
        else if (option == 'a')
            admin = optarg;
        else
            return kvctl_usage("doctor", "see the message above");
    }
    if (optind < argc)
        return kvctl_usage("doctor", "doctor takes no argument '%s'", argv[optind]);
    doctor *d = calloc(1, sizeof(*d));
    if (d == NULL)
        return KVCTL_FAILED;
    uint32_t counts[4] = {0};
    d->globals = globals;
    d->lmdb_path = lmdb_path;
    d->admin = admin;
    doctor_check_server(d);
    doctor_check_connections(d);
    doctor_check_tiers(d);
    doctor_check_admin(d);
    doctor_check_gpu(d);
    doctor_check_machine(d);
    doctor_check_shm(d);
    doctor_check_disk(d);
    for (uint32_t i = 0; i < d->n_findings; i++)
        counts[d->findings[i].level]++;
    if (globals->json)
        print_json(d, counts);
    else
        print_text(d, counts);
    kvc_stats_free(d->stats);
    free(d);
    return counts[DOCTOR_FAIL] > 0 ? KVCTL_FAILED : KVCTL_OK;
}

const kvctl_command kvctl_doctor = {
    .name = "doctor",
    .brief = "check server and machine, and say what to do",
    .help = help,
    .run = run,
};
