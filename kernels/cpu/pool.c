/*
 * pool.c: a fixed set of threads (kvk-cpu-1 ..) that share out the items of one call.
 *
 * The caller works too, so n_threads = 1 starts none. `busy` lets one caller use the threads at a
 * time; another caller does its own items alone instead of waiting. Items are handed out by an
 * atomic counter. Invariant: outside kvki_pool_run, running == 0 and no thread reads the job.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "internal.h"

#define THREADS_MAX 256

typedef struct thread_arg {
    kvki_pool *pool;
    uint32_t worker;
} thread_arg;

struct kvki_pool {
    pthread_mutex_t busy; /* rank 1: held by the caller whose items the threads run */
    pthread_mutex_t lock; /* rank 2: guards generation, running, stop and the job below */
    pthread_cond_t wake, idle;
    uint64_t generation; /* one up for each job */
    uint32_t running;    /* threads that have not finished this job */
    bool stop;
    kvki_item_fn fn;
    void *fn_arg;
    size_t n_items;
    atomic_size_t next;
    uint32_t n_threads; /* with the caller */
    uint32_t n_started;
    pthread_t threads[THREADS_MAX];
    thread_arg args[THREADS_MAX];
};

static void run_items(kvki_pool *pool, kvki_item_fn fn, void *arg, size_t n, uint32_t worker)
{
    for (;;) {
        size_t item = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
        if (item >= n)
            return;
        fn(arg, item, worker);
    }
}

static void *thread_main(void *p)
{
    thread_arg *me = p;
    kvki_pool *pool = me->pool;
    uint64_t seen = 0;
    char name[16];

    (void)snprintf(name, sizeof(name), "kvk-cpu-%u", me->worker);
    (void)pthread_setname_np(pthread_self(), name);
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->stop && pool->generation == seen)
            pthread_cond_wait(&pool->wake, &pool->lock);
        if (pool->stop)
            break;
        seen = pool->generation;
        kvki_item_fn fn = pool->fn;
        void *arg = pool->fn_arg;
        size_t n = pool->n_items;
        pthread_mutex_unlock(&pool->lock);
        run_items(pool, fn, arg, n, me->worker);
        pthread_mutex_lock(&pool->lock);
        if (--pool->running == 0)
            pthread_cond_signal(&pool->idle);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* Cores that this process may run on: in a container fewer than are online. */
static uint32_t usable_cores(void)
{
    cpu_set_t set;
    long n = sysconf(_SC_NPROCESSORS_ONLN);

    if (sched_getaffinity(0, sizeof(set), &set) == 0)
        n = CPU_COUNT(&set);
    return n < 1 ? 1 : n > THREADS_MAX ? THREADS_MAX : (uint32_t)n;
}

kvc_status kvki_pool_create(uint32_t n_threads, kvki_pool **pool_p)
{
    kvki_pool *pool = NULL;

    *pool_p = NULL;
    if (n_threads > THREADS_MAX)
        return KVC_INVALID;
    pool = calloc(1, sizeof(*pool));
    if (!pool)
        return KVC_NO_MEMORY;
    pool->n_threads = n_threads ? n_threads : usable_cores();
    pthread_mutex_init(&pool->busy, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->idle, NULL);
    for (uint32_t i = 1; i < pool->n_threads; i++) {
        thread_arg *arg = &pool->args[pool->n_started];
        *arg = (thread_arg){.pool = pool, .worker = i};
        if (pthread_create(&pool->threads[pool->n_started], NULL, thread_main, arg) != 0)
            goto err_destroy;
        pool->n_started++;
    }
    *pool_p = pool;
    return KVC_OK;

err_destroy:
    kvki_pool_destroy(pool);
    return KVC_NO_MEMORY;
}

void kvki_pool_destroy(kvki_pool *pool)
{
    if (!pool)
        return;
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->n_started; i++)
        pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->idle);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    pthread_mutex_destroy(&pool->busy);
    free(pool);
}

uint32_t kvki_pool_threads(const kvki_pool *pool)
{
    return pool->n_threads;
}

static void run_alone(size_t n_items, kvki_item_fn fn, void *arg)
{
    for (size_t item = 0; item < n_items; item++)
        fn(arg, item, 0);
}

void kvki_pool_run(kvki_pool *pool, size_t n_items, kvki_item_fn fn, void *arg)
{
    if (n_items <= 1 || pool->n_started == 0 || pthread_mutex_trylock(&pool->busy) != 0) {
        run_alone(n_items, fn, arg);
        return;
    }
    pthread_mutex_lock(&pool->lock);
    pool->fn = fn;
    pool->fn_arg = arg;
    pool->n_items = n_items;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    pool->running = pool->n_started;
    pool->generation++;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);

    run_items(pool, fn, arg, n_items, 0);

    pthread_mutex_lock(&pool->lock);
    while (pool->running != 0)
        pthread_cond_wait(&pool->idle, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
    pthread_mutex_unlock(&pool->busy);
}
