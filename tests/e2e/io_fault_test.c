/*
 * io_fault_test.c: each file call of the daemon fails once, in turn (support/iofault.h), through
 * its whole life: a first start, puts, an erase, kill -9, a start that checks, cold reads, a clean
 * stop, a start that trusts. Whatever fails: the daemon never dies of a signal; what it answers is
 * right or an error with a line in the log; memory goes on serving; and once the fault is gone, a
 * start finds every acknowledged DURABLE value; but for those that, on a disk without room or in a
 * map that could not grow, made room for others, and were counted.
 *
 * Main thread. KVASIR_IO_FAULTS sets how many faults of each sort are tried, spread over the calls
 * there are (1; a large number: every call); KVASIR_IO_FAULT names one sort, as "sync EIO".
 */
#include "load.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>

#include "base/log.h"
#include "iofault.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define STRIDE 4u /* a start takes seconds there: a part of the sorts, others each time */
#else
#define STRIDE 1u
#endif

#define SECOND     1000000000ull
#define N_DURABLE  4u /* blocks 0 .. 3; then as many for memory, and more in each start */
#define MAX_VALUES (STORE_PARTS * N_DURABLE)
#define N_BLOCKS   112u /* that it may put at all */
#define AGAIN_MAX  20
#define ALL_BYTES  (N_DURABLE * STORE_BLOCK_TOKENS * (4096u + 512u + 128u))

/* One run: a life of the daemon in which the nth call of a kind fails. */
typedef struct life {
    store store;
    load ledger; /* its clients are not used */
    iofault_page *page;
    uint8_t *bytes;
    kvc_region *region;
    uint32_t n_errors;  /* operations or starts that failed */
    uint64_t n_evicted; /* values that made room for others in lmdb: a full disk may ask for it */
} life;

static uint32_t value_bytes(uint32_t part)
{
    return STORE_BLOCK_TOKENS * store_row_bytes[part];
}

/* Waits; an answer that does not come is a failure of its own. */
static kvc_status answer(life *f, kvc_status submitted, kvc_op *op)
{
    kvc_status status = submitted == KVC_OK ? kvc_op_wait(op, 0) : submitted;
    assert_int_not_equal(status, KVC_TIMED_OUT);
    f->n_errors += status != KVC_OK;
    return status;
}

/* Puts all parts of n blocks; how many values were not taken. */
static uint32_t put(life *f, uint32_t first, uint32_t n, kvc_promise promise)
{
    kvc_value values[MAX_VALUES];
    int8_t status[MAX_VALUES];
    uint32_t n_values = 0, n_left = 0;
    size_t off = 0;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t block = first; block < first + n; block++) {
        for (uint32_t part = 0; part < STORE_PARTS; part++) {
            values[n_values++] = (kvc_value){f->store.digests[block], part, value_bytes(part), off};
            load_fill(f->bytes + off, part, block);
            off += value_bytes(part);
            if (atomic_load(&f->ledger.owed[block][part]) != LOAD_DURABLE)
                atomic_store(&f->ledger.owed[block][part], LOAD_UNKNOWN);
        }
    }
    kvc_status result = answer(f,
                               kvc_put(f->store.client, &f->store.schema, promise, values, n_values,
                                       f->region, status, kvc_now_ns() + 20 * SECOND, &op),
                               &op);
    for (uint32_t i = 0; i < n_values; i++) {
        bool taken = result == KVC_OK && (status[i] == KVC_OK || status[i] == KVC_EXISTS);
        n_left += !taken;
        f->n_errors += !taken && (result != KVC_OK || status[i] != KVC_AGAIN);
        if (taken && promise == KVC_PROMISE_DURABLE)
            atomic_store(&f->ledger.owed[first + i / STORE_PARTS][i % STORE_PARTS], LOAD_DURABLE);
    }
    return n_left;
}

static void erase(life *f, uint32_t block)
{
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t part = 0; part < STORE_PARTS; part++)
        atomic_store(&f->ledger.owed[block][part], LOAD_UNKNOWN);
    kvc_status status =
        answer(f,
               kvc_erase(f->store.client, &f->store.schema, &f->store.digests[block], 1, NULL, 0,
                         NULL, kvc_now_ns() + 20 * SECOND, &op),
               &op);
    for (uint32_t part = 0; status == KVC_OK && part < STORE_PARTS; part++)
        atomic_store(&f->ledger.owed[block][part], LOAD_ERASED);
}

/* Reads n blocks whole. Errors are allowed, other bytes are not; gives how many values came. */
static uint32_t get(life *f, uint32_t first, uint32_t n)
{
    uint32_t n_right = 0;
    int8_t status[N_DURABLE];
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t part = 0; part < STORE_PARTS; part++) {
        kvc_block_part where = {
            .part = part, .value_bytes = value_bytes(part), .stride_bytes = value_bytes(part)};
        kvc_status result = answer(
            f,
            kvc_fetch_blocks(f->store.client, &f->store.schema, f->store.digests + first, n, &where,
                             1, f->region, status, NULL, kvc_now_ns() + 20 * SECOND, &op),
            &op);
        for (uint32_t i = 0; result == KVC_OK && i < n; i++) {
            f->n_errors += status[i] != KVC_OK && status[i] != KVC_NOT_FOUND;
            if (status[i] != KVC_OK)
                continue;
            assert_true(load_is_right(f->bytes + (size_t)i * value_bytes(part), part, first + i));
            n_right++;
        }
    }
    return n_right;
}

/* ---- starts and stops ---- */

static int drop_file(const char *path, const struct stat *stat, int type, struct FTW *walk)
{
    (void)stat;
    (void)walk;
    int fd = type == FTW_F ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0) {
        (void)fsync(fd);
        (void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        close(fd);
    }
    return 0;
}

/* Starts, with nothing of its files in RAM. One fault may cost one start, never a second. */
static void start(life *f)
{
    (void)nftw(f->store.lmdb_path, drop_file, 16, FTW_PHYS);
    if (!store_try_start(&f->store)) {
        int status = f->store.daemon.status;
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 1)
            fail_msg("a start ended with %s %d", WIFSIGNALED(status) ? "signal" : "status",
                     WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
        f->n_errors++;
        atomic_store(&f->page->nth, 0);
        store_start(&f->store);
    }
    kvc_status status = store_register(&f->store);
    f->n_errors += status != KVC_OK;
    if (status != KVC_OK) { /* the record could not be written; without the fault it can */
        atomic_store(&f->page->nth, 0);
        status = store_register(&f->store);
    }
    if (status == KVC_IO) { /* LMDB writes no more where half a meta page was written */
        (void)support_daemon_stop(&f->store.daemon, SIGKILL);
        store_start(&f->store);
        status = store_register(&f->store);
    }
    assert_ok(status);
    if (f->region == NULL) {
        kvc_region_desc desc = {sizeof(desc), f->bytes, ALL_BYTES, KVC_MEMORY_HOST, 0, NULL};
        assert_ok(kvc_region_register(f->store.client, &desc, &f->region));
    }
}

/* Whatever failed: it lives, and memory takes and gives. */
static void check_alive(life *f, uint32_t block)
{
    uint32_t n_left = STORE_PARTS;
    assert_true(support_daemon_is_alive(&f->store.daemon));
    for (int tries = 0; n_left > 0 && tries < AGAIN_MAX; tries++) {
        n_left = put(f, block, 1, KVC_PROMISE_MEMORY);
        if (n_left > 0)
            usleep(10000);
    }
    assert_int_equal(n_left, 0);
    assert_int_equal(get(f, block, 1), STORE_PARTS);
}

static uint64_t count_evicted(life *f)
{
    kvc_server_stats *stats = NULL;
    uint64_t n = 0;
    assert_ok(kvc_stats(f->store.client, kvc_now_ns() + 20 * SECOND, &stats));
    for (uint32_t i = 0; i < stats->n_tiers; i++)
        if (strcmp(stats->tiers[i].name, "lmdb") == 0)
            n = stats->tiers[i].evictions;
    kvc_stats_free(stats);
    return n;
}

/* Its end, and what it may be: no signal but the one that was sent. */
static void stop(life *f, int signal)
{
    assert_true(support_daemon_is_alive(&f->store.daemon));
    f->n_evicted += count_evicted(f);
    int status = support_daemon_stop(&f->store.daemon, signal);
    if (signal == SIGKILL)
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    else
        assert_true(WIFEXITED(status));
}

static void live(life *f)
{
    start(f);
    (void)put(f, 0, N_DURABLE, KVC_PROMISE_DURABLE);
    (void)put(f, N_DURABLE, N_DURABLE, KVC_PROMISE_MEMORY);
    erase(f, 1);
    check_alive(f, 100);
    stop(f, SIGKILL);
    start(f);
    (void)get(f, 0, N_DURABLE);
    (void)put(f, 2 * N_DURABLE, N_DURABLE, KVC_PROMISE_DURABLE);
    check_alive(f, 101);
    stop(f, SIGTERM);
    start(f);
    (void)get(f, 0, N_DURABLE);
    (void)put(f, 3 * N_DURABLE, 1, KVC_PROMISE_DURABLE);
    check_alive(f, 102);
    stop(f, SIGKILL);
}

/* Whether the log has a line of that level. */
static bool log_says(const life *f, const char *what)
{
    char path[320], line[1024];
    bool found = false;
    (void)snprintf(path, sizeof(path), "%s/cachesvc.log", f->store.folder);
    FILE *stream = fopen(path, "re");
    assert_non_null(stream);
    while (!found && fgets(line, sizeof(line), stream) != NULL)
        found = strstr(line, what) != NULL;
    (void)fclose(stream);
    return found;
}

static life *alive; /* of the run that is under way, for end_daemon */

/* A whole life with one fault; passes [IOFAULT_KINDS] gets how many calls there were, if given.
 * True: the call that was to fail came by. */
static bool run(const iofault_sort *s, uint32_t nth, uint32_t *passes)
{
    life *f = calloc(1, sizeof(*f));
    assert_non_null(f);
    alive = f;
    store_make(&f->store, "16MiB", NULL);
    f->ledger.store = &f->store;
    f->ledger.n_blocks = N_BLOCKS;
    f->ledger.prints = 8;
    f->page = iofault_arm(f->store.folder, f->store.lmdb_path);
    f->bytes = malloc(ALL_BYTES);
    assert_true(f->page != NULL && f->bytes != NULL);
    atomic_store(&f->page->kind, (int)s->kind);
    atomic_store(&f->page->error, s->error);
    atomic_store(&f->page->lasting, s->lasting);
    atomic_store(&f->page->nth, nth);
    live(f);
    bool hit = atomic_load(&f->page->hits) > 0;
    atomic_store(&f->page->nth, 0);
    start(f);
    load_found found = load_verify(&f->ledger);
    assert_int_equal(found.wrong + found.back, 0);
    assert_true(found.lost <= f->n_evicted);
    assert_true(f->n_evicted == 0 || s->error == ENOSPC || s->error == ENOMEM);
    assert_true(f->n_errors == 0 || log_says(f, " error ") || log_says(f, " warn "));
    for (int i = 0; passes != NULL && i < IOFAULT_KINDS; i++)
        passes[i] = atomic_load(&f->page->passes[i]);
    iofault_disarm();
    assert_ok(kvc_region_deregister(f->store.client, f->region));
    store_close(&f->store);
    free(f->bytes);
    free(f);
    alive = NULL;
    return hit;
}

static int end_daemon(void **state)
{
    (void)state;
    if (alive != NULL)
        (void)support_daemon_stop(&alive->store.daemon, SIGKILL);
    return 0;
}

/* The number of calls varies from life to life: where the chosen one did not come by, an earlier.
 */
static bool run_until_hit(const iofault_sort *s, uint32_t nth, uint32_t n_calls)
{
    bool hit = false;
    for (uint32_t i = 0; !hit && i < 3; i++, nth = nth / 2 + 1) {
        print_message("%s at call %u of %u\n", s->name, nth, n_calls);
        hit = run(s, nth, NULL);
    }
    return hit;
}

static void test_each_call(void **state)
{
    (void)state;
    static const iofault_sort none = {0};
    uint32_t passes[IOFAULT_KINDS], n_runs = 0, n_hits = 0;
    const char *text = getenv("KVASIR_IO_FAULTS"), *only = getenv("KVASIR_IO_FAULT");
    uint32_t wanted = text == NULL ? 1 : (uint32_t)strtoul(text, NULL, 0);
    support_random random = support_seed((uint64_t)kvc_now_ns());
    assert_false(run(&none, 0, passes));
    for (uint32_t k = (uint32_t)support_below(&random, STRIDE); k < IOFAULT_SORTS; k += STRIDE) {
        const iofault_sort *s = &iofault_sorts[k];
        uint32_t n = passes[s->kind], tries = wanted < n ? wanted : n;
        assert_true(n > 0);
        if (only != NULL && strcmp(only, s->name) != 0)
            continue;
        for (uint32_t i = 0; i < tries; i++) {
            /* One of each stretch of calls; all of them where as many are wanted. */
            uint32_t from = (uint32_t)((uint64_t)n * i / tries);
            uint32_t to = (uint32_t)((uint64_t)n * (i + 1) / tries);
            uint32_t nth = 1 + from + (uint32_t)support_below(&random, to - from);
            n_hits += run_until_hit(s, nth, n);
            n_runs++;
        }
    }
    print_message("%u lives, in %u of them a call failed\n", n_runs, n_hits);
    assert_true(n_hits * 2 > n_runs);
}

int main(void)
{
    kvc_log_set_level(KVC_LOG_LEVEL_OFF);
    const struct CMUnitTest tests[] = {cmocka_unit_test_teardown(test_each_call, end_daemon)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
