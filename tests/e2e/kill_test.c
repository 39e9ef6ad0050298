/*
 * kill_test.c: kill -9 while several clients put, erase and read: no acknowledged DURABLE value is
 * lost, nothing that was erased comes back, no byte is ever wrong, and the clients notice nothing.
 *
 * Some lanes (lanes.h) at once, each with a daemon, its clients and a share of the kills; a kill
 * needs no disk, since what a process wrote stays with the system. KVASIR_KILL_ROUNDS sets how many
 * kills (100; fewer under sanitizers).
 */
#include "lanes.h"
#include "load.h"

#include <signal.h>
#include <time.h>

#include "base/log.h"

#ifdef __SANITIZE_THREAD__
#define LANES  1u
#define ROUNDS 3u
#elif defined(__SANITIZE_ADDRESS__)
#define LANES  2u
#define ROUNDS 8u
#else
#define LANES  4u
#define ROUNDS 100u
#endif

#define ROUNDS_NAME "KVASIR_KILL_ROUNDS"
#define N_BLOCKS    64u
#define FREE_BYTES  (UINT64_C(4) << 30) /* of memory for files */

static void nap_us(uint64_t us)
{
    nanosleep(&(struct timespec){(time_t)(us / 1000000), (long)(us % 1000000 * 1000)}, NULL);
}

/* The end comes out of the blue, in the middle of a clean stop, or once more while it starts. Gives
 * how many times it was a kill. */
static uint32_t kill_somehow(store *s, support_random *random)
{
    uint64_t how = support_below(random, 4);
    if (how == 0) {
        (void)kill(s->daemon.pid, SIGTERM);
        nap_us(support_below(random, 30000));
    }
    int status = support_daemon_stop(&s->daemon, SIGKILL);
    bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
    assert_true(killed || (how == 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0));
    if (how != 1)
        return killed;
    assert_true(store_spawn(s));
    nap_us(support_below(random, 60000));
    status = support_daemon_stop(&s->daemon, SIGKILL);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    return 2;
}

static void test_kill(void **state)
{
    (void)state;
    uint64_t n_rounds = lanes_rounds(ROUNDS_NAME, 0), n_kills = 0, n_printed = 0;
    support_random random = support_seed((uint64_t)time(NULL));
    static load l;
    store s;
    store_open(&s, "16MiB", true);
    load_open(&l, &s, support_next(&random));
    l.n_blocks = N_BLOCKS;
    l.prints = l.failure_prints = 8;
    kvc_log_set_level(KVC_LOG_LEVEL_ERROR); /* that nobody answers is no news here */
    while (n_kills < n_rounds) {
        uint32_t wanted = l.counts.puts + 1 + (uint32_t)support_below(&random, 24);
        load_begin(&l);
        support_wait_for(atomic_load(&l.counts.puts) >= wanted);
        nap_us(support_below(&random, 4000));
        n_kills += kill_somehow(&s, &random);
        store_start(&s);
        load_end(&l);
        load_found found = load_verify(&l);
        assert_int_equal(found.lost + found.wrong + found.back, 0);
        assert_int_equal(l.counts.wrong + l.counts.lost, 0);
        assert_int_equal(l.counts.failed, 0);
        if (n_kills < n_rounds && n_kills < n_printed + 100)
            continue;
        print_message("%llu kills: %u values put, %u of them DURABLE, %u erased, %u reads, %u "
                      "there now\n",
                      (unsigned long long)n_kills, l.counts.puts, l.counts.durable, l.counts.erased,
                      l.counts.reads, found.there);
        n_printed = n_kills;
    }
    assert_true(n_rounds == 0 || l.counts.durable > 0);
    assert_int_equal(store_counter(&s, "lmdb_set_aside"), 0);
    assert_int_equal(store_counter(&s, "corrupt_values"), 0);
    load_close(&l);
    store_close(&s);
}

static void test_lanes(void **state)
{
    (void)state;
    uint64_t n_rounds = lanes_rounds(ROUNDS_NAME, ROUNDS);
    support_random random = support_seed((uint64_t)time(NULL));
    lanes_use_memory(FREE_BYTES);
    uint32_t n_skipped;
    assert_int_equal(lanes_run(LANES, ROUNDS_NAME, n_rounds, random.state, &n_skipped), 0);
    assert_int_equal(n_skipped, 0);
}

int main(void)
{
    const struct CMUnitTest lane[] = {cmocka_unit_test(test_kill)};
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_lanes)};
    if (lanes_is_lane(NULL))
        return cmocka_run_group_tests_name("lane", lane, NULL, NULL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
