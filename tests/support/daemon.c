/*
 * daemon.c: see daemon.h.
 */
#include "daemon.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { LOWEST_PORT = 15000, MAX_TRIES = 100, MAX_ARGS = 64, WAIT_STEPS = 60000, STEP_NS = 2000000 };

static bool read_first_line(const char *path, char *text, size_t text_bytes)
{
    FILE *stream = fopen(path, "re");
    if (stream == NULL)
        return false;
    bool ok = fgets(text, (int)text_bytes, stream) != NULL;
    (void)fclose(stream);
    if (ok)
        text[strcspn(text, "\n")] = 0;
    return ok && text[0] != 0;
}

/* argv[0] is the leash's, and argv[1] the program. A lane is killed with its parent, and starts its
 * daemons in its main thread: they end with it. Other tests start them in threads that end. */
static pid_t spawn(char **argv, const char *log_path)
{
    posix_spawn_file_actions_t actions;
    pid_t pid = -1;
    bool leashed = getenv("KVASIR_LANE") != NULL;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, log_path,
                                     O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (posix_spawn(&pid, argv[leashed ? 0 : 1], &actions, NULL, argv + (leashed ? 0 : 1),
                    environ) != 0)
        pid = -1;
    posix_spawn_file_actions_destroy(&actions);
    return pid;
}

bool support_daemon_spawn(support_daemon *daemon, const char *folder, const char *const *args)
{
    char log_path[512], *argv[MAX_ARGS + 7];
    int n = 0;
    bool listens = false;
    const char *program = getenv("KVASIR_CACHESVC");
    if (program == NULL)
        program = KVASIR_CACHESVC_PATH;
    memset(daemon, 0, sizeof *daemon);
    snprintf(daemon->ready_path, sizeof daemon->ready_path, "%s/ready", folder);
    snprintf(log_path, sizeof log_path, "%s/cachesvc.log", folder);
    (void)unlink(daemon->ready_path);
    argv[n++] = (char *)KVASIR_LEASH_PATH;
    argv[n++] = (char *)program;
    argv[n++] = (char *)"--ready-file";
    argv[n++] = daemon->ready_path;
    for (; args != NULL && *args != NULL && n < MAX_ARGS; args++) {
        listens = listens || strncmp(*args, "--listen", 8) == 0;
        argv[n++] = (char *)*args;
    }
    if (!listens) {
        argv[n++] = (char *)"--listen";
        argv[n++] = (char *)"grpc://127.0.0.1:0";
    }
    argv[n] = NULL;
    daemon->pid = spawn(argv, log_path);
    return daemon->pid > 0;
}

/* The first port that the system may give to a connection. */
static unsigned first_handed_out(void)
{
    unsigned port = 32768;
    FILE *stream = fopen("/proc/sys/net/ipv4/ip_local_port_range", "re");
    if (stream == NULL)
        return port;
    if (fscanf(stream, "%u", &port) != 1 || port <= LOWEST_PORT)
        port = 32768;
    (void)fclose(stream);
    return port;
}

static bool is_free(unsigned port)
{
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool free = fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0;
    if (fd >= 0)
        (void)close(fd);
    return free;
}

void support_daemon_address(char *uri, size_t uri_bytes)
{
    unsigned random = 0, span = first_handed_out() - LOWEST_PORT;
    for (int tries = 0; tries < MAX_TRIES; tries++) {
        (void)getrandom(&random, sizeof(random), 0);
        if (is_free(LOWEST_PORT + random % span))
            break;
    }
    (void)snprintf(uri, uri_bytes, "grpc://127.0.0.1:%u", LOWEST_PORT + random % span);
}

bool support_daemon_is_alive(support_daemon *daemon)
{
    if (daemon->pid > 0 && waitpid(daemon->pid, &daemon->status, WNOHANG) == daemon->pid)
        daemon->pid = 0;
    return daemon->pid > 0;
}

bool support_daemon_wait(support_daemon *daemon)
{
    for (int i = 0; i < WAIT_STEPS; i++) {
        if (read_first_line(daemon->ready_path, daemon->uri, sizeof daemon->uri))
            return true;
        if (!support_daemon_is_alive(daemon))
            break;
        nanosleep(&(struct timespec){.tv_nsec = STEP_NS}, NULL);
    }
    fprintf(stderr, "cachesvc did not start; its log is beside %s\n", daemon->ready_path);
    if (daemon->pid > 0)
        (void)support_daemon_stop(daemon, SIGKILL);
    return false;
}

bool support_daemon_start(support_daemon *daemon, const char *folder, const char *const *args)
{
    return support_daemon_spawn(daemon, folder, args) && support_daemon_wait(daemon);
}

int support_daemon_stop(support_daemon *daemon, int signal)
{
    if (support_daemon_is_alive(daemon)) {
        (void)kill(daemon->pid, signal);
        (void)waitpid(daemon->pid, &daemon->status, 0);
        daemon->pid = 0;
    }
    return daemon->status;
}
