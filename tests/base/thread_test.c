/*
 * thread_test.c: ranked mutexes, conditions, named threads, the queue, and the clock they wait by.
 *
 * Rank violations abort, so they run in forked children. Meant for the thread sanitizer too.
 */
#include "support.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#include "base/clock.h"
#include "base/queue.h"
#include "base/thread.h"

#define NS_PER_MS 1000000ull

static void deadlines_saturate(void **state)
{
    (void)state;
    assert_true(kvc_deadline_ns(0) == 0);
    assert_true(kvc_deadline_ns(UINT64_MAX) == UINT64_MAX);
    uint64_t before_ns = kvc_now_ns(), deadline_ns = kvc_deadline_ns(NS_PER_MS);
    assert_true(deadline_ns >= before_ns + NS_PER_MS);
    assert_false(kvc_expired(0));
    assert_false(kvc_expired(UINT64_MAX));
    assert_true(kvc_expired(1));
    assert_true(kvc_wall_ns() > 1600000000ull * 1000000000ull);
}

static void lock_in_order(void *arg)
{
    (void)arg;
    kvc_mutex low, high;
    kvc_mutex_init(&low, KVC_RANK_INDEX);
    kvc_mutex_init(&high, KVC_RANK_TIER);
    kvc_mutex_lock(&low);
    kvc_mutex_lock(&high);
    kvc_mutex_unlock(&low);
    kvc_mutex_unlock(&high);
    kvc_mutex_lock(&low);
    kvc_mutex_unlock(&low);
    kvc_mutex_fini(&low);
    kvc_mutex_fini(&high);
}

static void lock_against_order(void *arg)
{
    (void)arg;
    kvc_mutex low, high;
    kvc_mutex_init(&low, KVC_RANK_INDEX);
    kvc_mutex_init(&high, KVC_RANK_TIER);
    kvc_mutex_lock(&high);
    kvc_mutex_lock(&low);
}

static void lock_one_rank_twice(void *arg)
{
    (void)arg;
    kvc_mutex one, other;
    kvc_mutex_init(&one, KVC_RANK_TIER);
    kvc_mutex_init(&other, KVC_RANK_TIER);
    kvc_mutex_lock(&one);
    kvc_mutex_lock(&other);
}

static void unlock_what_is_not_held(void *arg)
{
    (void)arg;
    kvc_mutex mutex;
    kvc_mutex_init(&mutex, KVC_RANK_TIER);
    kvc_mutex_unlock(&mutex);
}

static void wait_without_the_lock(void *arg)
{
    (void)arg;
    kvc_mutex mutex;
    kvc_cond cond;
    kvc_mutex_init(&mutex, KVC_RANK_TIER);
    kvc_cond_init(&cond);
    (void)kvc_cond_wait_until(&cond, &mutex, 1);
}

static void destroy_full_queue(void *arg)
{
    kvc_queue *queue;
    if (kvc_queue_create(1, &queue) == KVC_OK && kvc_queue_push(queue, arg) == KVC_OK)
        kvc_queue_destroy(queue);
}

static void rank_violations_abort(void **state)
{
    (void)state;
    int item;
    assert_int_equal(support_death_signal(lock_in_order, NULL), 0);
    assert_int_equal(support_death_signal(lock_against_order, NULL), SIGABRT);
    assert_int_equal(support_death_signal(lock_one_rank_twice, NULL), SIGABRT);
    assert_int_equal(support_death_signal(unlock_what_is_not_held, NULL), SIGABRT);
    assert_int_equal(support_death_signal(wait_without_the_lock, NULL), SIGABRT);
    assert_int_equal(support_death_signal(destroy_full_queue, &item), SIGABRT);
}

static void wait_until_times_out(void **state)
{
    (void)state;
    kvc_mutex mutex;
    kvc_cond cond;
    kvc_mutex_init(&mutex, KVC_RANK_LEAF);
    kvc_cond_init(&cond);
    kvc_mutex_lock(&mutex);
    uint64_t start_ns = kvc_now_ns(), deadline_ns = start_ns + 20 * NS_PER_MS;
    kvc_status status = KVC_OK;
    while (status == KVC_OK)
        status = kvc_cond_wait_until(&cond, &mutex, deadline_ns);
    assert_status(status, KVC_TIMED_OUT);
    assert_true(kvc_now_ns() >= deadline_ns);
    kvc_mutex_unlock(&mutex);
    kvc_cond_fini(&cond);
    kvc_mutex_fini(&mutex);
}

struct seen {
    char name[16];
    sigset_t blocked;
};

static void look_around(void *arg)
{
    struct seen *seen = arg;
    (void)pthread_getname_np(pthread_self(), seen->name, sizeof(seen->name));
    (void)pthread_sigmask(SIG_SETMASK, NULL, &seen->blocked);
}

static void threads_have_names_and_no_signals(void **state)
{
    (void)state;
    struct seen seen;
    kvc_thread thread, never = {.started = false};
    sigset_t own;
    assert_ok(kvc_thread_start(&thread, "fifteen-bytes-x", look_around, &seen));
    kvc_thread_join(&thread);
    kvc_thread_join(&thread);
    kvc_thread_join(&never);
    assert_string_equal(seen.name, "fifteen-bytes-x");
    assert_int_equal(sigismember(&seen.blocked, SIGTERM), 1);
    assert_int_equal(sigismember(&seen.blocked, SIGINT), 1);
    assert_int_equal(sigismember(&seen.blocked, SIGBUS), 0);
    assert_int_equal(sigismember(&seen.blocked, SIGSEGV), 0);
    (void)pthread_sigmask(SIG_SETMASK, NULL, &own);
    assert_int_equal(sigismember(&own, SIGTERM), 0);
}

static void queue_is_bounded_and_fifo(void **state)
{
    (void)state;
    kvc_queue *queue;
    int items[3];
    void *item;
    assert_status(kvc_queue_create(0, &queue), KVC_INVALID);
    assert_null(queue);
    kvc_queue_destroy(NULL);
    assert_ok(kvc_queue_create(2, &queue));
    for (int turn = 0; turn < 3; turn++) {
        assert_ok(kvc_queue_push(queue, &items[0]));
        assert_ok(kvc_queue_push(queue, &items[1]));
        assert_status(kvc_queue_push(queue, &items[2]), KVC_AGAIN);
        assert_ok(kvc_queue_pop(queue, 1, &item));
        assert_ptr_equal(item, &items[0]);
        assert_ok(kvc_queue_push(queue, &items[2]));
        assert_ok(kvc_queue_pop(queue, 0, &item));
        assert_ptr_equal(item, &items[1]);
        assert_ok(kvc_queue_pop(queue, 0, &item));
        assert_ptr_equal(item, &items[2]);
        assert_status(kvc_queue_pop(queue, kvc_now_ns() + NS_PER_MS, &item), KVC_TIMED_OUT);
        assert_null(item);
    }
    assert_ok(kvc_queue_push(queue, &items[0]));
    kvc_queue_close(queue);
    assert_status(kvc_queue_push(queue, &items[1]), KVC_CLOSED);
    assert_ok(kvc_queue_pop(queue, 0, &item));
    assert_ptr_equal(item, &items[0]);
    assert_status(kvc_queue_pop(queue, 0, &item), KVC_CLOSED);
    kvc_queue_destroy(queue);
}

#define PRODUCERS 3
#define CONSUMERS 3
#define PER_EACH  2000

struct traffic {
    kvc_queue *queue;
    atomic_uint next_producer;
    atomic_uint taken[PRODUCERS * PER_EACH]; /* how often each item was popped */
    unsigned items[PRODUCERS * PER_EACH];
    atomic_bool out_of_order;
};

static void produce(void *arg)
{
    struct traffic *traffic = arg;
    unsigned first = atomic_fetch_add(&traffic->next_producer, 1) * PER_EACH;
    for (unsigned i = first; i < first + PER_EACH; i++) {
        traffic->items[i] = i;
        while (kvc_queue_push(traffic->queue, &traffic->items[i]) == KVC_AGAIN)
            (void)sched_yield();
    }
}

static void consume(void *arg)
{
    struct traffic *traffic = arg;
    unsigned last[PRODUCERS] = {0};
    void *item;
    while (kvc_queue_pop(traffic->queue, 0, &item) == KVC_OK) {
        unsigned i = *(unsigned *)item;
        atomic_fetch_add(&traffic->taken[i], 1);
        /* What one producer pushed arrives in order at each consumer. */
        if (i % PER_EACH + 1 <= last[i / PER_EACH])
            atomic_store(&traffic->out_of_order, true);
        last[i / PER_EACH] = i % PER_EACH + 1;
    }
}

static void queue_loses_and_doubles_nothing(void **state)
{
    (void)state;
    static struct traffic traffic;
    kvc_thread producers[PRODUCERS], consumers[CONSUMERS];
    assert_ok(kvc_queue_create(7, &traffic.queue));
    for (int i = 0; i < CONSUMERS; i++)
        assert_ok(kvc_thread_start(&consumers[i], "consumer", consume, &traffic));
    for (int i = 0; i < PRODUCERS; i++)
        assert_ok(kvc_thread_start(&producers[i], "producer", produce, &traffic));
    for (int i = 0; i < PRODUCERS; i++)
        kvc_thread_join(&producers[i]);
    kvc_queue_close(traffic.queue);
    for (int i = 0; i < CONSUMERS; i++)
        kvc_thread_join(&consumers[i]);
    for (unsigned i = 0; i < PRODUCERS * PER_EACH; i++)
        assert_int_equal(atomic_load(&traffic.taken[i]), 1);
    assert_false(atomic_load(&traffic.out_of_order));
    kvc_queue_destroy(traffic.queue);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(deadlines_saturate),
        cmocka_unit_test(rank_violations_abort),
        cmocka_unit_test(wait_until_times_out),
        cmocka_unit_test(threads_have_names_and_no_signals),
        cmocka_unit_test(queue_is_bounded_and_fifo),
        cmocka_unit_test(queue_loses_and_doubles_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
