/*
 * power_cut_test.c: the power fails while several clients put, erase and read: the folder of the
 * lmdb tier lies on an ext4 of its own (a loop device), which is shut down without flushing its
 * journal, so that what was not synced is gone. Mounted again, it must hold every acknowledged
 * DURABLE value, and no byte may be wrong. A server whose syncs do nothing fails this.
 *
 * Some lanes (lanes.h) at once, each with a disk, a daemon and a share of the cuts. The disk's
 * image may lie in memory: what the image keeps is what the file system has sent to its disk.
 * Skipped, out loud, where no loop device can be mounted. KVASIR_CUT_ROUNDS sets how many cuts
 * (100; fewer under sanitizers).
 */
#include "lanes.h"
#include "load.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/ioctl.h>
#include <time.h>

#include "base/log.h"
#include "iofault.h"

#define IMAGE_BYTES   (1536ll << 20) /* sparse */
#define EXT4_SHUTDOWN _IOR('X', 125, uint32_t)
#define EXT4_NO_FLUSH 2u
#define PATIENCE_MS   60000u /* for whatever a slow or busy disk makes wait */

#define ROUNDS_NAME "KVASIR_CUT_ROUNDS"
#define N_BLOCKS    64u
#define FREE_BYTES  (UINT64_C(4) << 30) /* of memory for images */

#ifdef __SANITIZE_THREAD__
#define LANES  1u
#define ROUNDS 2u
#elif defined(__SANITIZE_ADDRESS__)
#define LANES  2u
#define ROUNDS 4u
#else
#define LANES  4u
#define ROUNDS 100u
#endif

typedef struct disk {
    char folder[256], image[300], mount[300], values[320];
} disk;

static store s;

static void nap_ms(uint64_t ms)
{
    nanosleep(&(struct timespec){(time_t)(ms / 1000), (long)(ms % 1000 * 1000000)}, NULL);
}

/* Runs a program to its end; whether it went well. Quiet: what it says goes to /dev/null. */
static bool run(const char *const *argv)
{
    posix_spawn_file_actions_t quiet;
    pid_t pid;
    int status = -1;
    posix_spawn_file_actions_init(&quiet);
    posix_spawn_file_actions_addopen(&quiet, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_adddup2(&quiet, STDOUT_FILENO, STDERR_FILENO);
    int rc = posix_spawnp(&pid, argv[0], &quiet, NULL, (char *const *)argv, environ);
    posix_spawn_file_actions_destroy(&quiet);
    return rc == 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) &&
           WEXITSTATUS(status) == 0;
}

/* As run, again until it goes well or patience ends. */
static bool run_patiently(const char *const *argv, uint32_t patience_ms)
{
    bool ok = run(argv);
    for (uint32_t ms = 0; !ok && ms < patience_ms; ms += 50) {
        nap_ms(50);
        ok = run(argv);
    }
    return ok;
}

/* After an unmount, the loop device may not have gone yet. */
static bool mount_disk(const disk *d, uint32_t patience_ms)
{
    const char *argv[] = {"mount", "-o", "loop", d->image, d->mount, NULL};
    return run_patiently(argv, patience_ms);
}

/* What the killed daemon had open may be busy for a moment. */
static bool unmount_disk(const disk *d)
{
    const char *argv[] = {"umount", d->mount, NULL};
    return run_patiently(argv, PATIENCE_MS);
}

/* patience_ms: lanes may ask for the same loop device. */
static bool make_disk(disk *d, uint32_t patience_ms)
{
    char relative[256];
    support_make_folder(relative, sizeof(relative));
    char *whole = realpath(relative, NULL);
    assert_non_null(whole);
    (void)snprintf(d->folder, sizeof(d->folder), "%s", whole);
    free(whole);
    (void)snprintf(d->image, sizeof(d->image), "%s/image", d->folder);
    (void)snprintf(d->mount, sizeof(d->mount), "%s/disk", d->folder);
    (void)snprintf(d->values, sizeof(d->values), "%s/values", d->mount);
    assert_int_equal(mkdir(d->mount, 0700), 0);
    int fd = open(d->image, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    assert_true(fd >= 0 && ftruncate(fd, IMAGE_BYTES) == 0 && close(fd) == 0);
    const char *argv[] = {"mkfs.ext4", "-q", "-F", d->image, NULL};
    return run(argv) && mount_disk(d, patience_ms);
}

static void remove_disk(const disk *d)
{
    assert_true(unmount_disk(d));
    support_remove_folder(d->folder);
}

/* From here on every write to the disk fails, and what was not synced is lost. */
static void cut_power(const disk *d)
{
    uint32_t how = EXT4_NO_FLUSH;
    int fd = open(d->mount, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(ioctl(fd, EXT4_SHUTDOWN, &how), 0);
    close(fd);
}

/* After a cut: the daemon has met a dead disk and lives; it is killed, and the disk comes back. */
static void bring_back(const disk *d)
{
    assert_true(support_daemon_is_alive(&s.daemon));
    store_end(&s, SIGKILL);
    assert_true(unmount_disk(d));
    assert_true(mount_disk(d, PATIENCE_MS));
    store_start(&s);
}

/* Waits until n values more were acknowledged as DURABLE; false: patience ended before. */
static bool wait_for_durable(const load *l, uint32_t n)
{
    uint32_t wanted = atomic_load(&l->counts.durable) + n;
    for (uint32_t ms = 0; ms < PATIENCE_MS && atomic_load(&l->counts.durable) < wanted; ms += 10)
        nap_ms(10);
    return atomic_load(&l->counts.durable) >= wanted;
}

/* The disk cannot go while the daemon of a test that failed has it. */
static int end_daemon(void **state)
{
    (void)state;
    (void)support_daemon_stop(&s.daemon, SIGKILL);
    return 0;
}

static void test_cuts(void **state)
{
    const disk *d = *state;
    uint64_t n_rounds = lanes_rounds(ROUNDS_NAME, 0);
    support_random random = support_seed((uint64_t)time(NULL));
    static load l;
    store_open_at(&s, "16MiB", d->values);
    load_open(&l, &s, support_next(&random));
    l.n_blocks = N_BLOCKS;
    l.prints = 8;
    for (uint64_t i = 0; i < n_rounds; i++) {
        load_begin(&l);
        assert_true(wait_for_durable(&l, 1 + (uint32_t)support_below(&random, 12)));
        nap_ms(support_below(&random, 20));
        cut_power(d);
        nap_ms(support_below(&random, 20));
        bring_back(d);
        load_end(&l);
        load_found found = load_verify(&l);
        assert_int_equal(found.lost + found.wrong + found.back, 0);
        assert_int_equal(l.counts.wrong + l.counts.lost, 0);
        if (i + 1 == n_rounds || i % 100 == 99)
            print_message("%llu power cuts: %u values put, %u of them DURABLE, %u erased, %u "
                          "reads, %u there now\n",
                          (unsigned long long)i + 1, l.counts.puts, l.counts.durable,
                          l.counts.erased, l.counts.reads, found.there);
    }
    assert_int_equal(store_counter(&s, "lmdb_set_aside"), 0);
    assert_int_equal(store_counter(&s, "corrupt_values"), 0);
    load_close(&l);
    store_close(&s);
}

/* One cut of a server whose syncs are real, or do nothing. The DURABLE values that it lost. */
static uint32_t count_lost(const disk *d, const char *values, bool syncs, uint32_t *n_durable_p)
{
    static load l;
    iofault_page *page = iofault_arm(d->folder, d->mount);
    assert_non_null(page);
    atomic_store(&page->no_sync, !syncs);
    store_open_at(&s, "16MiB", values);
    iofault_disarm();
    load_open(&l, &s, 1);
    load_begin(&l);
    assert_true(wait_for_durable(&l, 100));
    load_end(&l);
    assert_true(atomic_load(&page->passes[IOFAULT_SYNC]) > 0);
    *n_durable_p = l.counts.durable;
    cut_power(d);
    bring_back(d);
    load_found found = load_verify(&l);
    assert_int_equal(found.wrong, 0);
    load_close(&l);
    store_close(&s);
    return found.lost;
}

static void test_without_syncs_it_fails(void **state)
{
    const disk *d = *state;
    char values[400];
    uint32_t n_durable, n_lost;
    (void)snprintf(values, sizeof(values), "%s/synced", d->mount);
    assert_int_equal(count_lost(d, values, true, &n_durable), 0);
    (void)snprintf(values, sizeof(values), "%s/unsynced", d->mount);
    n_lost = count_lost(d, values, false, &n_durable);
    print_message("a server that never syncs lost %u DURABLE values, after %u acknowledgements\n",
                  n_lost, n_durable);
    assert_true(n_lost > 0);
}

static void test_lanes(void **state)
{
    (void)state;
    uint64_t n_rounds = lanes_rounds(ROUNDS_NAME, ROUNDS);
    support_random random = support_seed((uint64_t)time(NULL));
    uint32_t n_skipped;
    assert_int_equal(lanes_run(LANES, ROUNDS_NAME, n_rounds, random.state, &n_skipped), 0);
    if (n_skipped > 0)
        print_message("%u of %u shares of the cuts were left out for want of loop devices\n",
                      n_skipped, LANES);
    assert_true(n_skipped < LANES);
}

int main(void)
{
    static disk d;
    bool is_lane = lanes_is_lane(NULL);
    lanes_use_memory(FREE_BYTES);
    if (!make_disk(&d, is_lane ? PATIENCE_MS : 0)) {
        support_remove_folder(d.folder);
        print_message("SKIPPED: cannot mount an ext4 on a loop device here (needs root, mkfs.ext4 "
                      "and loop devices)\n");
        return LANES_SKIPPED;
    }
    kvc_log_set_level(KVC_LOG_LEVEL_ERROR);
    const struct CMUnitTest lane[] = {
        cmocka_unit_test_prestate_setup_teardown(test_cuts, NULL, end_daemon, &d),
    };
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lanes),
        cmocka_unit_test_prestate_setup_teardown(test_without_syncs_it_fails, NULL, end_daemon, &d),
    };
    int failed = is_lane ? cmocka_run_group_tests_name("lane", lane, NULL, NULL)
                         : cmocka_run_group_tests(tests, NULL, NULL);
    remove_disk(&d);
    return failed;
}
