/*
 * lmdb_guard.c: the handler of SIGBUS and the places that it returns to; see lmdb_guard.h.
 *
 * Any thread: each has its own innermost guard. The handler is installed when an environment is
 * opened, and stays. It jumps only when the thread is inside a guard; the signal comes from the
 * instruction that touched the map, so nothing asynchronous is interrupted.
 */
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#include "lmdb_guard.h"

typedef struct guard {
    sigjmp_buf back;
    struct guard *outer;
} guard;

static _Thread_local guard *volatile innermost;
static struct sigaction before;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of installing; guards before */

static void on_bus(int number, siginfo_t *info, void *context)
{
    guard *g = innermost;

    (void)info;
    if (g != NULL) {
        /* The handler is left for good: the signals that it blocked are let in again. */
        (void)pthread_sigmask(SIG_SETMASK, &((const ucontext_t *)context)->uc_sigmask, NULL);
        siglongjmp(g->back, KVSI_GUARD_BUS);
    }
    (void)sigaction(number, &before, NULL); /* the instruction runs again and meets the old one */
}

void kvsi_guard_install(void)
{
    struct sigaction action, now;

    memset(&action, 0, sizeof(action));
    action.sa_sigaction = on_bus;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    pthread_mutex_lock(&lock);
    (void)sigaction(SIGBUS, NULL, &now);
    if (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_bus)
        (void)sigaction(SIGBUS, &action, &before);
    pthread_mutex_unlock(&lock);
}

void kvsi_guard_assert(MDB_env *env, const char *text)
{
    guard *g = innermost;

    (void)env;
    (void)text;
    if (g != NULL)
        siglongjmp(g->back, KVSI_GUARD_ASSERT);
}

int kvsi_guard_run(int (*fn)(void *arg), void *arg)
{
    guard g;

    g.outer = innermost;
    int why = sigsetjmp(g.back, 0);
    if (why != 0) {
        innermost = g.outer;
        return why;
    }
    innermost = &g;
    atomic_signal_fence(memory_order_seq_cst);
    int rc = fn(arg);
    atomic_signal_fence(memory_order_seq_cst);
    innermost = g.outer;
    return rc;
}
