/*
 * thread.h: named threads, ranked mutexes and condition variables.
 *
 * A mutex has a rank; a thread may lock only ranks higher than those it holds (asserted always:
 * the held ranks are a small thread-local mask). Every thread has a name of at most 15 bytes.
 */
#ifndef KVC_BASE_THREAD_H
#define KVC_BASE_THREAD_H

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

#include "kvc/status.h"

/* Lower is taken first. Each lock's field comment says what it guards. */
typedef enum kvc_lock_rank {
    KVC_RANK_CLIENT = 1,
    KVC_RANK_WORKER = 2,
    KVC_RANK_ADMIN = 2,   /* cachesvc/admin.c: never beside a worker's */
    KVC_RANK_GROW = 3,    /* cachesvc/context.c: the length of one context */
    KVC_RANK_CONTEXT = 4, /* cachesvc/context.c: the table */
    KVC_RANK_RECORD = 5,  /* cachesvc: schema records follow the table; may wait for the disk */
    KVC_RANK_SCHEMA = 6,  /* cachesvc/schemas.c */
    KVC_RANK_INDEX = 8,   /* cachesvc/index.c */
    KVC_RANK_TIER = 12,   /* inside one tier */
    KVC_RANK_LENT = 16,   /* base/lent.c; its watchers lock transports */
    KVC_RANK_TRANSPORT = 20,
    KVC_RANK_QUEUE = 24, /* leaf locks of rings, queues and pools */
    KVC_RANK_LEAF = 28,  /* nothing is locked under it */
} kvc_lock_rank;

typedef struct kvc_mutex {
    pthread_mutex_t mutex;
    kvc_lock_rank rank;
} kvc_mutex;

typedef struct kvc_cond {
    pthread_cond_t cond; /* on CLOCK_MONOTONIC */
} kvc_cond;

typedef struct kvc_thread {
    pthread_t thread;
    bool started;
} kvc_thread;

void kvc_mutex_init(kvc_mutex *mutex, kvc_lock_rank rank);
void kvc_mutex_fini(kvc_mutex *mutex);
void kvc_mutex_lock(kvc_mutex *mutex);
void kvc_mutex_unlock(kvc_mutex *mutex);

void kvc_cond_init(kvc_cond *cond);
void kvc_cond_fini(kvc_cond *cond);
void kvc_cond_wait(kvc_cond *cond, kvc_mutex *mutex);
/* TIMED_OUT once deadline_ns (CLOCK_MONOTONIC; 0: none) passed, else OK (maybe spurious). */
kvc_status kvc_cond_wait_until(kvc_cond *cond, kvc_mutex *mutex, uint64_t deadline_ns);
void kvc_cond_signal(kvc_cond *cond);
void kvc_cond_broadcast(kvc_cond *cond);

/*
 * Blocks every signal on the calling thread but those that a fault of its own raises (SIGSEGV,
 * SIGBUS ...): to block these would be to die of them, whatever their handler. old_p: what was
 * blocked before, or NULL.
 */
void kvc_block_signals(sigset_t *old_p);
/*
 * Starts fn(arg) with every signal blocked but those that faults raise (SIGSEGV, SIGBUS ...). name:
 * 1 to 15 bytes, copied. Holding a lock when fn returns is asserted against. NO_MEMORY when none
 * can start.
 */
kvc_status kvc_thread_start(kvc_thread *thread, const char *name, void (*fn)(void *),
                            void *arg) KVC_MUST_CHECK;
/* Joins; nothing where it was never started. */
void kvc_thread_join(kvc_thread *thread);

#endif
