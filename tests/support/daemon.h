/*
 * daemon.h: a real cachesvc for tests and benchmarks: started on a free port, stopped or killed.
 *
 * KVASIR_CACHESVC names the program where the build's own is not wanted.
 */
#ifndef KVASIR_TEST_DAEMON_H
#define KVASIR_TEST_DAEMON_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

typedef struct support_daemon {
    pid_t pid;
    int status; /* waitpid's, once it ended by itself */
    char ready_path[512];
    char uri[256]; /* the first address it listens on */
} support_daemon;

/*
 * Starts cachesvc with args (NULL-terminated; --ready-file is added, in folder, and --listen
 * grpc://127.0.0.1:0 unless args has one; its log goes to folder/cachesvc.log) and waits up to two
 * minutes until it serves. False, with a line on standard error, if it does not.
 */
bool support_daemon_start(support_daemon *daemon, const char *folder, const char *const *args);
/* Its two halves: the start alone, and the wait. */
bool support_daemon_spawn(support_daemon *daemon, const char *folder, const char *const *args);
bool support_daemon_wait(support_daemon *daemon);
/*
 * Writes a listening address [uri_bytes] that a daemon can take again after its end: its port is
 * free now and none of those that the system hands out, as to other tests' connections meanwhile.
 */
void support_daemon_address(char *uri, size_t uri_bytes);
/* Whether it has not ended; what it ended with is in daemon->status then. */
bool support_daemon_is_alive(support_daemon *daemon);
/* Sends the signal and waits for the end; gives waitpid's status (that of an end before it). */
int support_daemon_stop(support_daemon *daemon, int signal);

#endif
