/*
 * tier_crash_test.c: kill -9 while values are written and released. After each kill the tier opens
 * again, every value whose durable write was acknowledged and that was not released since is there
 * and right, and no value reads wrong. KVS_CRASH_ROUNDS sets how many times (20).
 */
#include "tier_support.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/sum.h"

#define N_KEYS      40u
#define N_FLIGHT    12u
#define SMALL_BYTES (4u << 20)
#define MAX_ROUNDS  500u

static const shape crash_shapes[4] = {{4096, 31}, {100, 64}, {4096, 16}, {4096, 24}};
static uint32_t n_shapes;
static uint32_t *started; /* the last version that a child began to write; it outlives the child */

/* What the child tells; one pipe write each, so a kill cuts between them. */
typedef struct note {
    uint32_t key, version;
    /* GAVE: a value of another size; not of this key. OPENED: the first, of no key */
    enum { ACKED, RELEASING, GAVE, OPENED } what;
} note;

typedef struct flight {
    kvs_tier_write write;
    uint32_t key, version, sums[64];
    uint8_t rows[4096 * 32];
    bool busy, refused;
    int fd;
} flight;

static shape shape_of(uint32_t key)
{
    return crash_shapes[key % n_shapes];
}

static void say(int fd, uint32_t key, uint32_t version, int what)
{
    note n = {.key = key, .version = version, .what = what};

    if (write(fd, &n, sizeof(n)) != sizeof(n))
        _exit(9);
}

static void acked(kvs_tier_write *write)
{
    flight *f = write->arg;

    if (write->status == KVC_OK && write->durable)
        say(f->fd, f->key, f->version, ACKED);
    __atomic_store_n(&f->busy, false, __ATOMIC_RELEASE);
}

typedef struct known {
    uint32_t version; /* 0: nothing acknowledged */
    bool here;        /* listed by recover */
    kvs_slot slot;
} known;

static void start_write(tier_under_test *t, flight *f, uint32_t key, uint32_t version, int fd)
{
    shape s = shape_of(key);
    kvs_value_key name = key_of(3, key, key);

    f->key = key;
    f->version = version;
    f->fd = fd;
    fill_rows(&name, version, s, f->rows);
    kvc_row_sums(f->rows, s.row_bytes, s.n_rows, f->sums);
    f->write = (kvs_tier_write){.key = name,
                                .row_bytes = s.row_bytes,
                                .n_rows = s.n_rows,
                                .rows = f->rows,
                                .row_sums = f->sums,
                                .durable = version % 3 != 0,
                                .done = acked,
                                .arg = f};
    f->busy = true;
    __atomic_store_n(started, version, __ATOMIC_RELEASE);
    f->refused = t->ops->write(t->tier, &f->write) != KVC_OK;
    if (f->refused) {
        f->version = 0;
        __atomic_store_n(&f->busy, false, __ATOMIC_RELEASE);
    }
}

/* Releases a few values of the size that should give for this key's. */
static void give_way(tier_under_test *t, known *have, uint32_t key, int fd)
{
    shape s = shape_of(key);
    kvs_tier_shape asked = {s.row_bytes, s.n_rows};
    uint32_t pages;
    uint64_t bytes, freed = 0;

    for (uint32_t rank = 0; freed == 0 && t->ops->donor(t->tier, &asked, rank, &pages, &bytes);
         rank++) {
        for (uint32_t k = 0; k < N_KEYS && freed <= bytes; k++) {
            shape of = shape_of(k);
            kvs_value_key name = key_of(3, k, k);
            if (!have[k].here || (of.row_bytes * of.n_rows + 4095) / 4096 + 1 != pages)
                continue;
            say(fd, k, 0, RELEASING);
            t->ops->release(t->tier, &name, have[k].slot);
            have[k].here = false;
            freed += (uint64_t)of.row_bytes * of.n_rows;
            if (of.row_bytes != s.row_bytes || of.n_rows != s.n_rows)
                say(fd, k, 0, GAVE);
        }
    }
}

static bool note_slot(void *arg, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                      uint32_t n_rows)
{
    known *k = arg;

    (void)row_bytes;
    (void)n_rows;
    if (key->part < N_KEYS) {
        k[key->part].here = true;
        k[key->part].slot = slot;
    }
    return true;
}

/* Writes, and now and then releases, until it is killed. Each key is in one flight at a time. */
static void child(tier_under_test *t, uint64_t seed, uint32_t version, int fd)
{
    static flight flights[N_FLIGHT];
    static known have[N_KEYS];

    if (tut_open(t) != KVC_OK || t->ops->recover(t->tier, note_slot, have) != KVC_OK)
        _exit(8);
    say(fd, 0, 0, OPENED);
    for (;;) {
        flight *f = &flights[rng_next(&seed) % N_FLIGHT];
        if (__atomic_load_n(&f->busy, __ATOMIC_ACQUIRE))
            continue;
        if (f->write.status == KVC_OK && f->version > 0) {
            have[f->key].here = true;
            have[f->key].slot = f->write.slot;
            f->version = 0;
        }
        /* Flight i owns the keys that are i modulo N_FLIGHT. */
        uint32_t i = (uint32_t)(f - flights);
        uint32_t key = i + N_FLIGHT * (uint32_t)(rng_next(&seed) % 3);
        if (key >= N_KEYS)
            continue;
        if (have[key].here) {
            kvs_value_key name = key_of(3, key, key);
            say(fd, key, 0, RELEASING);
            t->ops->release(t->tier, &name, have[key].slot);
            have[key].here = false;
        }
        start_write(t, f, key, ++version, fd);
        if (f->refused)
            give_way(t, have, key, fd);
    }
}

static void read_notes(int fd, known *k, uint32_t *n_gave)
{
    note n;
    ssize_t got;

    while ((got = read(fd, &n, sizeof(n))) == sizeof(n)) {
        *n_gave += n.what == GAVE;
        k[n.key].version = n.what == ACKED ? n.version : 0;
    }
    assert_int_equal(got, 0);
}

/* A key's bytes are those of some version up to limit; which one. 0: of none. */
static uint32_t version_of(tier_under_test *t, uint32_t key, kvs_slot slot, uint32_t limit)
{
    kvs_value_key name = key_of(3, key, key);
    shape s = shape_of(key);
    uint8_t got[4096], want[4096];
    kvs_row_range range = {.first = 0, .n = 1, .dst = got};

    assert_int_equal(t->ops->read(t->tier, &name, slot, s.row_bytes, s.n_rows, &range, 1), KVC_OK);
    for (uint32_t v = limit; v > 0; v--) {
        fill_rows(&name, v, (shape){s.row_bytes, 1}, want);
        if (memcmp(got, want, s.row_bytes) != 0)
            continue;
        assert_value(t, &name, v, s, slot);
        return v;
    }
    return 0;
}

/* A child that works for a while and is killed then; what it told is in k. */
static void kill_one(tier_under_test *t, uint64_t *seed, uint32_t version, known *k,
                     uint32_t *n_gave)
{
    int pipes[2], status;
    note first;

    assert_int_equal(pipe(pipes), 0);
    pid_t pid = fork();
    if (pid == 0) {
        close(pipes[0]);
        child(t, rng_next(seed), version, pipes[1]);
    }
    close(pipes[1]);
    rng_next(seed);
    assert_int_equal(read(pipes[0], &first, sizeof(first)), sizeof(first));
    assert_int_equal(first.what, OPENED);
    usleep((useconds_t)(20000 + rng_next(seed) % 130000));
    kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status));
    read_notes(pipes[0], k, n_gave);
    close(pipes[0]);
}

/* With want_gave as many more as it takes until a value of another size gave way to one. */
static void kill_rounds(tier_under_test *t, bool want_gave)
{
    const char *env = getenv("KVS_CRASH_ROUNDS");
    uint32_t rounds = env != NULL ? (uint32_t)strtoul(env, NULL, 10) : 20;
    uint64_t seed = 4711;
    known k[N_KEYS] = {0};
    uint32_t version = 0, survived = 0, n_gave = 0;

    started =
        mmap(NULL, sizeof(*started), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(started != MAP_FAILED);
    assert_int_equal(tut_open(t), KVC_OK);
    tut_close(t);
    for (uint32_t round = 0; round < rounds; round++) {
        if (want_gave && n_gave == 0 && round + 1 == rounds && rounds < MAX_ROUNDS)
            rounds++;
        kill_one(t, &seed, version + 1, k, &n_gave);
        assert_int_equal(tut_open(t), KVC_OK);
        for (uint32_t i = 0; i < N_KEYS; i++)
            k[i].here = false;
        assert_int_equal(t->ops->recover(t->tier, note_slot, k), KVC_OK);
        for (uint32_t i = 0; i < N_KEYS; i++) {
            if (k[i].version > 0) /* acknowledged, nothing said since */
                assert_true(k[i].here);
            if (!k[i].here)
                continue;
            uint32_t found = version_of(t, i, k[i].slot, *started);
            assert_true(found > 0);
            if (k[i].version > 0) {
                assert_true(found >= k[i].version);
                survived++;
            }
            k[i].version = found % 3 != 0 ? found : 0;
        }
        version = *started;
        tut_close(t);
    }
    assert_int_equal(munmap(started, sizeof(*started)), 0);
    print_message("%u rounds, %u acknowledged values found again, %u versions\n", rounds, survived,
                  version);
    assert_true(survived > rounds);
    assert_true(n_gave > 0 || !want_gave);
}

static void test_kill_nine(void **state)
{
    n_shapes = 2;
    kill_rounds(*state, false);
}

/* Four sizes in a folder that has no room for all: each takes from the others, and ends come while
   files are made, removed and given holes. */
static void test_kill_nine_while_sizes_compete(void **state)
{
    tier_under_test *t = *state;

    n_shapes = 4;
    t->opts.capacity_bytes = SMALL_BYTES;
    kill_rounds(t, true);
}

static int setup(void **state)
{
    tier_under_test *t = malloc(sizeof(*t));

    tut_init(t, kvs_tier_find("lmdb"), NULL);
    t->opts.group_commit_ns = 1000000;
    t->opts.capacity_bytes = 16u << 20;
    *state = t;
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_kill_nine, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_kill_nine_while_sizes_compete, setup, tut_delete),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
