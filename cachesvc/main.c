/*
 * main.c: the daemon around a server: settings, signals, exit status; and, asked by a starting
 * server, the checker of one LMDB environment.
 *
 * The main thread sleeps in sigwait; every other thread has all signals blocked. A second signal is
 * met by a thread of its own, which ends the process at once.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "admin.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/thread.h"
#include "heap.h"
#include "server.h"

#define EXIT_START 1
#define EXIT_BAD   2
#define EXIT_HURRY 3

static void wait_for_stop(void)
{
    sigset_t set;
    int number = 0;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigwait(&set, &number);
    KVC_LOG_INFO(SERVER, "stopping: %s", number == SIGINT ? "SIGINT" : "SIGTERM");
}

static void hurry_main(void *arg)
{
    (void)arg;
    wait_for_stop();
    KVC_LOG_WARN(SERVER, "second signal: stopping at once");
    _exit(EXIT_HURRY);
}

/* Writes the URIs beside the file and renames, so that a reader sees all of it or nothing. */
static kvc_status write_ready_file(const kvs_server *server, const char *path)
{
    char temp[4096];
    const char *uri;
    if (snprintf(temp, sizeof(temp), "%s.part", path) >= (int)sizeof(temp))
        return KVC_INVALID;
    FILE *file = fopen(temp, "w");
    if (!file)
        return KVC_IO;
    for (uint32_t i = 0; (uri = kvs_server_uri(server, i)); i++)
        fprintf(file, "%s\n", uri);
    bool bad = ferror(file);
    if (fclose(file) != 0 || bad || rename(temp, path) != 0) {
        unlink(temp);
        return KVC_IO;
    }
    return KVC_OK;
}

static int serve(const kvs_settings *settings, kvs_admin *admin)
{
    kvs_server *server;
    kvc_thread hurry = {0};
    const char *uri;
    if (kvs_server_open(settings, &server) != KVC_OK)
        return EXIT_START;
    kvs_admin_show(admin, server);
    kvc_status status = kvs_server_listen(server);
    if (status == KVC_OK && settings->ready_file[0]) {
        status = write_ready_file(server, settings->ready_file);
        if (status != KVC_OK)
            KVC_LOG_ERROR(SERVER, "cannot write the ready file %s", settings->ready_file);
    }
    if (status == KVC_OK) {
        for (uint32_t i = 0; (uri = kvs_server_uri(server, i)); i++)
            printf("listening on %s\n", uri);
        if (admin)
            printf("admin port %s\n", kvs_admin_uri(admin));
        fflush(stdout);
        KVC_LOG_INFO(SERVER, "serving");
        wait_for_stop();
        if (kvc_thread_start(&hurry, "kvs-hurry", hurry_main, NULL) != KVC_OK)
            KVC_LOG_WARN(SERVER, "a second signal will not be heard");
    }
    kvs_server_drain(server, kvc_now_ns() + settings->drain_ns + 1);
    kvs_admin_show(admin, NULL);
    kvs_server_close(server, status == KVC_OK);
    if (status != KVC_OK)
        return EXIT_START;
    if (settings->ready_file[0])
        unlink(settings->ready_file);
    KVC_LOG_INFO(SERVER, "stopped");
    return EXIT_SUCCESS;
}

static int serve_with_admin(const kvs_settings *settings)
{
    kvs_admin *admin = NULL;
    if (settings->admin_listen[0] && kvs_admin_open(settings->admin_listen, &admin) != KVC_OK)
        return EXIT_START;
    int code = serve(settings, admin);
    kvs_admin_close(admin);
    return code;
}

/* Prints text and frees it. */
static int print_text(char *text)
{
    if (!text)
        return EXIT_START;
    fputs(text, stdout);
    free(text);
    return fflush(stdout) == 0 ? EXIT_SUCCESS : EXIT_START;
}

static int run(const kvs_settings *settings, const kvc_config *config)
{
    char why[KVC_CONFIG_WHY_BYTES];
    switch (kvc_config_asked(config)) {
    case KVC_CONFIG_HELP:
        return print_text(kvc_config_help(&kvs_program));
    case KVC_CONFIG_VERSION:
        printf("%s %s\n", kvs_program.name, kvs_program.version);
        return EXIT_SUCCESS;
    case KVC_CONFIG_RUN:
        break;
    }
    if (kvs_settings_check(settings, why) != KVC_OK) {
        fprintf(stderr, "cachesvc: %s\n", why);
        return EXIT_BAD;
    }
    if (settings->print_config)
        return print_text(kvs_settings_text(config));
    kvc_log_set_level((kvc_log_level)settings->log_level);
    kvc_log_set_format((kvc_log_format)settings->log_format);
    KVC_LOG_INFO(SERVER, "%s %s starting", kvs_program.name, kvs_program.version);
    if (kvc_fault_arm_env() != KVC_OK) {
        fprintf(stderr, "cachesvc: KVASIR_FAULT is malformed\n");
        return EXIT_BAD;
    }
    return serve_with_admin(settings);
}

int main(int argc, char **argv)
{
    kvs_settings settings = {0};
    kvc_config *config = NULL;
    char why[KVC_CONFIG_WHY_BYTES];
    /* Not for people: the server runs itself like this to look at files that may kill it. */
    if (argc == 3 && strcmp(argv[1], "--check-env") == 0)
        return kvs_tier_check_main(argv[2]);
    kvc_block_signals(NULL); /* but SIGBUS: a start may meet a map whose file fails */
    kvt_init();
    kvs_heap_init();
    if (kvc_config_load(&kvs_program, argc, argv, environ, &settings, &config, why) != KVC_OK) {
        fprintf(stderr, "cachesvc: %s\nTry 'cachesvc --help'.\n", why);
        return EXIT_BAD;
    }
    settings.lmdb_checker = "/proc/self/exe";
    int code = run(&settings, config);
    kvc_config_free(config);
    return code;
}
