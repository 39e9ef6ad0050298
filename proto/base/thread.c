/*
 * thread.c: pthreads with names, and mutexes whose order is asserted.
 *
 * Any thread. Invariant: held_ranks has bit r set while this thread holds a mutex of rank r; two of
 * one rank are never held together, so that a bit is enough.
 */
#include "base/thread.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/assert.h"

#define NAME_BYTES 16 /* the kernel's limit, NUL included */
#define NS_PER_S   1000000000ull

struct start {
    void (*fn)(void *);
    void *arg;
    char name[NAME_BYTES];
};

static _Thread_local uint32_t held_ranks;

void kvc_mutex_init(kvc_mutex *mutex, kvc_lock_rank rank)
{
    KVC_ASSERT(rank > 0 && rank < 32);
    KVC_ASSERT(pthread_mutex_init(&mutex->mutex, NULL) == 0);
    mutex->rank = rank;
}

void kvc_mutex_fini(kvc_mutex *mutex)
{
    KVC_ASSERT(pthread_mutex_destroy(&mutex->mutex) == 0);
}

void kvc_mutex_lock(kvc_mutex *mutex)
{
    /* No rank at or above this one may be held. */
    KVC_ASSERT((held_ranks >> mutex->rank) == 0);
    KVC_ASSERT(pthread_mutex_lock(&mutex->mutex) == 0);
    held_ranks |= 1u << mutex->rank;
}

void kvc_mutex_unlock(kvc_mutex *mutex)
{
    KVC_ASSERT((held_ranks & (1u << mutex->rank)) != 0);
    held_ranks &= ~(1u << mutex->rank);
    KVC_ASSERT(pthread_mutex_unlock(&mutex->mutex) == 0);
}

void kvc_cond_init(kvc_cond *cond)
{
    pthread_condattr_t attr;
    KVC_ASSERT(pthread_condattr_init(&attr) == 0);
    KVC_ASSERT(pthread_condattr_setclock(&attr, CLOCK_MONOTONIC) == 0);
    KVC_ASSERT(pthread_cond_init(&cond->cond, &attr) == 0);
    (void)pthread_condattr_destroy(&attr);
}

void kvc_cond_fini(kvc_cond *cond)
{
    KVC_ASSERT(pthread_cond_destroy(&cond->cond) == 0);
}

void kvc_cond_wait(kvc_cond *cond, kvc_mutex *mutex)
{
    KVC_ASSERT((held_ranks & (1u << mutex->rank)) != 0);
    KVC_ASSERT(pthread_cond_wait(&cond->cond, &mutex->mutex) == 0);
}

kvc_status kvc_cond_wait_until(kvc_cond *cond, kvc_mutex *mutex, uint64_t deadline_ns)
{
    if (deadline_ns == 0) {
        kvc_cond_wait(cond, mutex);
        return KVC_OK;
    }
    KVC_ASSERT((held_ranks & (1u << mutex->rank)) != 0);
    struct timespec until = {
        .tv_sec = (time_t)(deadline_ns / NS_PER_S),
        .tv_nsec = (long)(deadline_ns % NS_PER_S),
    };
    int rc = pthread_cond_timedwait(&cond->cond, &mutex->mutex, &until);
    KVC_ASSERT(rc == 0 || rc == ETIMEDOUT);
    return rc == ETIMEDOUT ? KVC_TIMED_OUT : KVC_OK;
}

void kvc_cond_signal(kvc_cond *cond)
{
    KVC_ASSERT(pthread_cond_signal(&cond->cond) == 0);
}

void kvc_cond_broadcast(kvc_cond *cond)
{
    KVC_ASSERT(pthread_cond_broadcast(&cond->cond) == 0);
}

static void *thread_main(void *arg)
{
    struct start start = *(struct start *)arg;
    free(arg);
    (void)pthread_setname_np(pthread_self(), start.name);
    start.fn(start.arg);
    KVC_ASSERT(held_ranks == 0);
    return NULL;
}

void kvc_block_signals(sigset_t *old_p)
{
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT};
    sigset_t all;
    sigfillset(&all);
    for (size_t i = 0; i < sizeof(faults) / sizeof(faults[0]); i++)
        sigdelset(&all, faults[i]);
    (void)pthread_sigmask(SIG_SETMASK, &all, old_p);
}

kvc_status kvc_thread_start(kvc_thread *thread, const char *name, void (*fn)(void *), void *arg)
{
    thread->started = false;
    size_t len_bytes = strlen(name);
    KVC_ASSERT(len_bytes > 0 && len_bytes < NAME_BYTES);
    struct start *start = malloc(sizeof(*start));
    if (start == NULL)
        return KVC_NO_MEMORY;
    start->fn = fn;
    start->arg = arg;
    memcpy(start->name, name, len_bytes + 1);
    sigset_t old;
    kvc_block_signals(&old);
    int rc = pthread_create(&thread->thread, NULL, thread_main, start);
    (void)pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc != 0) {
        free(start);
        return KVC_NO_MEMORY;
    }
    thread->started = true;
    return KVC_OK;
}

void kvc_thread_join(kvc_thread *thread)
{
    if (!thread->started)
        return;
    KVC_ASSERT(pthread_join(thread->thread, NULL) == 0);
    thread->started = false;
}
