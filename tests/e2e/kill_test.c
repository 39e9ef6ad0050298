/*
 * kill_test.c: kill -9 while several clients put, erase and read: no acknowledged DURABLE value is
 * lost, nothing that was erased comes back, no byte is ever wrong, and the clients notice nothing.
 *
 * KVASIR_KILL_ROUNDS sets how many times (12; fewer under sanitizers).
 */
#include "load.h"

#include <signal.h>
#include <time.h>

#include "base/log.h"

#ifdef __SANITIZE_THREAD__
#define ROUNDS 2
#elif defined(__SANITIZE_ADDRESS__)
#define ROUNDS 4
#else
#define ROUNDS 12
#endif

static void nap_ms(uint64_t ms)
{
    nanosleep(&(struct timespec){(time_t)(ms / 1000), (long)(ms % 1000 * 1000000)}, NULL);
}

/* The end comes out of the blue, in the middle of a clean stop, or once more while it starts. */
static void kill_somehow(store *s, support_random *random)
{
    uint64_t how = support_below(random, 4);
    if (how == 0) {
        (void)kill(s->daemon.pid, SIGTERM);
        nap_ms(support_below(random, 60));
    }
    int status = support_daemon_stop(&s->daemon, SIGKILL);
    assert_true((WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) ||
                (how == 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0));
    if (how != 1)
        return;
    assert_true(store_spawn(s));
    nap_ms(support_below(random, 150));
    status = support_daemon_stop(&s->daemon, SIGKILL);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

static void test_kill(void **state)
{
    (void)state;
    const char *text = getenv("KVASIR_KILL_ROUNDS");
    uint64_t rounds = text == NULL ? ROUNDS : strtoull(text, NULL, 0);
    support_random random = support_seed((uint64_t)time(NULL));
    static load l;
    store s;
    store_open(&s, "16MiB", true);
    load_open(&l, &s, support_next(&random));
    l.prints = l.failure_prints = 8;
    kvc_log_set_level(KVC_LOG_LEVEL_ERROR); /* that nobody answers is no news here */
    for (uint64_t i = 0; i < rounds; i++) {
        load_begin(&l);
        nap_ms(20 + support_below(&random, 300));
        kill_somehow(&s, &random);
        store_start(&s);
        load_end(&l);
        load_found found = load_verify(&l);
        assert_int_equal(found.lost + found.wrong + found.back, 0);
        assert_int_equal(l.counts.wrong + l.counts.lost, 0);
        assert_int_equal(l.counts.failed, 0);
        if (i + 1 == rounds || i % 100 == 99)
            print_message("%llu kills: %u values put, %u of them DURABLE, %u erased, %u reads, %u "
                          "there now\n",
                          (unsigned long long)i + 1, l.counts.puts, l.counts.durable,
                          l.counts.erased, l.counts.reads, found.there);
    }
    assert_true(l.counts.durable > 0 && l.counts.reads > 0);
    assert_int_equal(store_counter(&s, "lmdb_set_aside"), 0);
    assert_int_equal(store_counter(&s, "corrupt_values"), 0);
    load_close(&l);
    store_close(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_kill)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
