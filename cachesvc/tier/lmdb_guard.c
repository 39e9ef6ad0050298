/*
 * lmdb_guard.c: the handler of SIGBUS and SIGSEGV and the places that it returns to; see
 * lmdb_guard.h.
 *
 * Any thread: each has its own innermost guard. The handler is installed when an environment is
 * opened, and stays. It jumps only when the thread is inside a guard; the signal comes from the
 * instruction that touched the map, so nothing asynchronous is interrupted.
 */
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "lmdb_guard.h"

#define OURS_BYTES 65536u /* a fault below it is a null pointer of ours */

typedef struct guard {
    sigjmp_buf back;
    struct guard *outer;
    bool reads;
} guard;

static _Thread_local guard *volatile innermost;
static struct sigaction bus_before, segv_before;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of installing; guards the two */

/* The handler is left for good: the signals that it blocked are let in again. */
static _Noreturn void leave(guard *g, int why, const void *context)
{
    (void)pthread_sigmask(SIG_SETMASK, &((const ucontext_t *)context)->uc_sigmask, NULL);
    siglongjmp(g->back, why);
}

/* A store to a wild address is ours, not LMDB's. */
static bool is_read(const void *context)
{
#if defined(__x86_64__)
    return (((const ucontext_t *)context)->uc_mcontext.gregs[REG_ERR] & 2) == 0;
#else
    (void)context;
    return true;
#endif
}

/* Where nobody waits for it, the instruction runs again and meets the old handler. */
static void on_fault(int number, siginfo_t *info, void *context)
{
    guard *g = innermost;

    if (g != NULL && number == SIGBUS)
        leave(g, KVSI_GUARD_BUS, context);
    if (g != NULL && g->reads && is_read(context) && (uintptr_t)info->si_addr >= OURS_BYTES)
        leave(g, KVSI_GUARD_WILD, context);
    (void)sigaction(number, number == SIGBUS ? &bus_before : &segv_before, NULL);
}

static void install(int number, struct sigaction *before)
{
    struct sigaction action, now;

    memset(&action, 0, sizeof(action));
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    (void)sigaction(number, NULL, &now);
    if (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_fault)
        (void)sigaction(number, &action, before);
}

void kvsi_guard_install(void)
{
    pthread_mutex_lock(&lock);
    install(SIGBUS, &bus_before);
    install(SIGSEGV, &segv_before);
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

static int run(int (*fn)(void *arg), void *arg, bool reads)
{
    guard g;

    g.outer = innermost;
    g.reads = reads;
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

int kvsi_guard_run(int (*fn)(void *arg), void *arg)
{
    return run(fn, arg, false);
}

int kvsi_guard_read(int (*fn)(void *arg), void *arg)
{
    return run(fn, arg, true);
}
