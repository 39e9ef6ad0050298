/*
 * map_kill_test.c: kill -9 of a client and of the server in the middle of random reads and puts,
 * of mapped rows, by request over shm, over gRPC, and over RDMA where KVASIR_RDMA_ADDRESS is a
 * device's (then of these alone): no byte of a completed read is wrong, and the server keeps no
 * pin, map, segment, slot, request, RDMA connection or registration.
 *
 * A real cachesvc. Clients that are to be killed are this program again, with "--client WAY URI
 * SEED FILE": FILE counts the transfers that they completed. KVASIR_KILL_ROUNDS sets how many kills
 * of each kind and way (clients 8, servers 2; fewer under sanitizers), KVASIR_KILL_TRANSFERS how
 * many transfers must have been completed between them at least (0), by as many more kills as that
 * takes.
 */
#include "harness.h"

#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/metrics.h"
#include "daemon.h"
#include "kvc/client.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define ROUNDS 4
#else
#define ROUNDS 8
#endif

#define ROW_BYTES 512u
#define BLOCKS    24u
#define FIRST     100u
#define PICKS     300u
#define WRONG     3 /* exit status of a client that has read a wrong byte */
#define MS        1000000ull

static char program[4096];

#define RDMA_PORT 7897
#define CHANNELS  2u

typedef enum kill_way { MAPPED = 0, BY_REQUEST, GRPC, RDMA } kill_way;
static const char *const way_names[] = {"mapped", "by request", "grpc", "rdma"};

/* ---- a client ------------------------------------------------------------------------------- */

typedef struct worker {
    kvc_client *client;
    kvc_region *region;
    kvc_context *context;
    h_schema schema;
    uint8_t *bytes; /* [PICKS * ROW_BYTES] */
    uint64_t random;
    uint64_t timeout_ns;        /* of a transfer that need not go well */
    uint64_t n_reads, n_served; /* without a request */
    atomic_ullong *n_transfers; /* reads and puts that were answered */
} worker;

/* A counter that processes share, in a file that the caller removes; NULL: there is none. */
static atomic_ullong *shared_count(const char *path)
{
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    void *at = MAP_FAILED;
    if (fd >= 0 && ftruncate(fd, sizeof(atomic_ullong)) == 0)
        at = mmap(NULL, sizeof(atomic_ullong), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd >= 0)
        close(fd);
    return at == MAP_FAILED ? NULL : at;
}

static bool worker_open(worker *w, kill_way way, const char *uri, uint64_t seed, const char *count)
{
    memset(w, 0, sizeof(*w));
    w->n_transfers = shared_count(count);
    w->random = seed | 1;
    w->timeout_ns = (way == RDMA ? 5000 : 500) * MS; /* which runs on emulated machines */
    h_schema_init(&w->schema, "kill", 2, ROW_BYTES, false);
    w->bytes = calloc(PICKS, ROW_BYTES);
    kvc_client_opts opts = {.size_bytes = sizeof(opts),
                            .connect_timeout_ns = 60000 * MS,
                            .default_timeout_ns = 60000 * MS,
                            .n_channels = CHANNELS,
                            .uris = uri};
    kvc_region_desc desc = {.size_bytes = sizeof(desc),
                            .base = w->bytes,
                            .len_bytes = PICKS * ROW_BYTES,
                            .kind = KVC_MEMORY_HOST};
    kvc_map_opts map = {.size_bytes = sizeof(map), .all = way == MAPPED};
    kvc_digest digest;
    return w->bytes != NULL && w->n_transfers != NULL &&
           kvc_client_open(&opts, &w->client) == KVC_OK &&
           kvc_region_register(w->client, &desc, &w->region) == KVC_OK &&
           kvc_client_map_contexts(w->client, &map) == KVC_OK &&
           kvc_schema_register(w->client, &w->schema.schema, 0, &digest) == KVC_OK;
}

static void worker_close(worker *w)
{
    kvc_context_close(w->context);
    (void)kvc_region_deregister(w->client, w->region);
    kvc_client_close(w->client);
    free(w->bytes);
    (void)munmap(w->n_transfers, sizeof(*w->n_transfers));
}

static kvc_status worker_context(worker *w)
{
    kvc_digest digests[BLOCKS];
    for (uint32_t i = 0; i < BLOCKS; i++)
        digests[i] = h_digest(FIRST + i);
    kvc_context_close(w->context);
    w->context = NULL;
    return kvc_context_open(w->client, &w->schema.digest, digests, BLOCKS, 0, 0, &w->context);
}

/* One value of a block, of bytes that follow from its name. */
static kvc_status worker_put(worker *w, uint64_t block, uint32_t part, uint64_t timeout_ns)
{
    int8_t status = KVC_OK;
    kvc_value value = {.digest = h_digest(block), .part = part, .len_bytes = ROW_BYTES * H_TOKENS};
    kvc_op op;
    h_fill(block, part, ROW_BYTES, w->bytes);
    kvc_op_init(&op, NULL, NULL);
    kvc_status sent = kvc_put(w->client, &w->schema.digest, KVC_PROMISE_MEMORY, &value, 1,
                              w->region, &status, kvc_deadline_ns(timeout_ns), &op);
    sent = sent == KVC_OK ? kvc_op_wait(&op, 0) : sent;
    if (sent == KVC_OK)
        atomic_fetch_add(w->n_transfers, 1);
    return sent;
}

/* Random rows; false: one of a completed read was wrong. */
static bool worker_read(worker *w)
{
    static uint32_t picks[PICKS];
    static int8_t status[PICKS];
    uint32_t part = h_random(&w->random) % 2 ? 10 : 0;
    for (uint32_t i = 0; i < PICKS; i++)
        picks[i] = (uint32_t)(h_random(&w->random) % (BLOCKS * H_TOKENS));
    kvc_pick_group group = {.context = w->context,
                            .part = part,
                            .row_bytes = ROW_BYTES,
                            .n_picks = PICKS,
                            .picks = picks};
    kvc_fetch_info info = {0};
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    memset(w->bytes, 0, PICKS * ROW_BYTES);
    if (kvc_fetch(w->client, &group, 1, w->region, status, &info, kvc_deadline_ns(w->timeout_ns),
                  &op) != KVC_OK ||
        kvc_op_wait(&op, 0) != KVC_OK)
        return true; /* nobody answered: that is no wrong byte */
    w->n_reads++;
    atomic_fetch_add(w->n_transfers, 1);
    w->n_served += info.requests == 0;
    for (uint32_t i = 0; i < PICKS; i++) {
        const uint8_t *row = w->bytes + i * ROW_BYTES;
        if (status[i] == KVC_OK &&
            !h_row_is(FIRST + picks[i] / H_TOKENS, part, picks[i] % H_TOKENS, ROW_BYTES, row))
            return false;
    }
    return true;
}

/* Reads, puts and opens until it is killed. */
static int run_client(kill_way way, const char *uri, uint64_t seed, const char *count)
{
    static worker w;
    kvc_log_set_level(KVC_LOG_LEVEL_OFF);
    if (!worker_open(&w, way, uri, seed, count))
        return 2;
    for (;;) {
        uint64_t what = h_random(&w.random) % 16;
        if (what < 2 || w.context == NULL)
            (void)worker_context(&w);
        else if (what < 4)
            (void)worker_put(&w, 100000 + h_random(&w.random) % 100000, 0, w.timeout_ns);
        else if (!worker_read(&w))
            return WRONG;
    }
}

/* ---- the server -------------------------------------------------------------------------------
 */

typedef struct rig {
    char dir[256], uri[300], count[300];
    kill_way way;
    uint64_t slow; /* times longer than elsewhere until a kill */
    support_daemon daemon;
    worker w;
} rig;

static void start_daemon(rig *r)
{
    const char *const args[] = {"--listen", r->uri, "--dram-bytes", "8MiB", NULL};
    bool up = support_daemon_start(&r->daemon, r->dir, args);
    /* One that was killed may leave its port taken for a moment. */
    for (int i = 0; r->way == RDMA && !up && i < 60; i++) {
        usleep(500000);
        up = support_daemon_start(&r->daemon, r->dir, args);
    }
    assert_true(up);
}

static void open_rig(rig *r, kill_way way)
{
    memset(r, 0, sizeof(*r));
    r->way = way;
    r->slow = way == RDMA ? 20 : 1;
    h_temp_dir(r->dir);
    if (way == RDMA)
        snprintf(r->uri, sizeof(r->uri), "rdma://%s:%d", getenv("KVASIR_RDMA_ADDRESS"), RDMA_PORT);
    else
        snprintf(r->uri, sizeof(r->uri), "%s://%s/socket", way == GRPC ? "grpc+unix" : "shm",
                 r->dir);
    snprintf(r->count, sizeof(r->count), "%s/count", r->dir);
    start_daemon(r);
    assert_true(worker_open(&r->w, way, r->uri, (uint64_t)time(NULL), r->count));
}

static void fill(rig *r)
{
    for (uint32_t i = 0; i < BLOCKS; i++)
        for (uint32_t p = 0; p < 2; p++)
            assert_int_equal(worker_put(&r->w, FIRST + i, 10 * p, 60000 * MS), KVC_OK);
}

static void close_rig(rig *r)
{
    worker_close(&r->w);
    int status = support_daemon_stop(&r->daemon, SIGTERM);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    h_remove_dir(r->dir);
}

static uint64_t counter(rig *r, const char *name)
{
    kvc_server_stats *stats = NULL;
    uint64_t value = UINT64_MAX;
    assert_int_equal(kvc_stats(r->w.client, kvc_deadline_ns(60000 * MS), &stats), KVC_OK);
    for (uint32_t i = 0; i < stats->n_counters; i++)
        if (strcmp(stats->counters[i].name, name) == 0)
            value = stats->counters[i].value;
    kvc_stats_free(stats);
    return value;
}

static void wait_counter(rig *r, const char *name, uint64_t want)
{
    uint64_t deadline_ns = kvc_deadline_ns(60000 * MS), got;
    while ((got = counter(r, name)) != want && !kvc_expired(deadline_ns))
        usleep(5000);
    if (got != want)
        fail_msg("%s: %llu, not %llu", name, (unsigned long long)got, (unsigned long long)want);
}

/* What the device holds for the server: a connection for each channel of the one client that is
 * left, the memory of each, and what is lent, once or (iWARP) for each of them; buffers of the pool
 * are given back after 10 s. */
static void wait_device(rig *r, uint64_t n_lent)
{
    uint64_t deadline_ns = kvc_deadline_ns(60000 * MS), least_ns = kvc_deadline_ns(15000 * MS);
    uint64_t n_links, n_regs;
    bool few, right;
    do {
        usleep(100000);
        n_links = counter(r, "rdma_connections");
        n_regs = counter(r, "rdma_registrations");
        few = n_links <= CHANNELS && n_regs <= n_links + n_lent;
        right = n_links <= CHANNELS && n_regs <= n_links * (1 + n_lent);
    } while (!few && !(right && kvc_expired(least_ns)) && !kvc_expired(deadline_ns));
    print_message("rdma: %llu connections, %llu registrations are left\n",
                  (unsigned long long)n_links, (unsigned long long)n_regs);
    assert_true(n_links > 0 && n_links <= CHANNELS);
    assert_true(n_regs >= n_links && n_regs <= n_links * (1 + n_lent));
}

/* Every slot of dram that is taken has a value in it: none is lost with a put that was torn. */
static void wait_slots(rig *r)
{
    uint64_t deadline_ns = kvc_deadline_ns(60000 * MS), used = 1, values = 0;
    while (used != values * ROW_BYTES * H_TOKENS && !kvc_expired(deadline_ns)) {
        kvc_server_stats *stats = NULL;
        usleep(5000);
        assert_int_equal(kvc_stats(r->w.client, kvc_deadline_ns(20000 * MS), &stats), KVC_OK);
        for (uint32_t i = 0; i < stats->n_tiers; i++) {
            if (strcmp(stats->tiers[i].name, "dram") != 0)
                continue;
            used = stats->tiers[i].used_bytes;
            values = stats->tiers[i].values;
        }
        kvc_stats_free(stats);
    }
    assert_true(values > 0);
    assert_int_equal(used, values * ROW_BYTES * H_TOKENS);
}

static uint64_t number_of(const char *name, uint64_t ours)
{
    const char *text = getenv(name);
    return text == NULL ? ours : strtoull(text, NULL, 0);
}

static uint64_t rounds(uint64_t ours)
{
    return number_of("KVASIR_KILL_ROUNDS", ours);
}

static bool enough_transfers(const rig *r, uint64_t before)
{
    return atomic_load(r->w.n_transfers) - before >= number_of("KVASIR_KILL_TRANSFERS", 0);
}

static void nap(uint64_t us)
{
    nanosleep(&(struct timespec){.tv_sec = (time_t)(us / 1000000),
                                 .tv_nsec = (long)(us % 1000000 * 1000)},
              NULL);
}

static pid_t spawn_client(const rig *r, uint64_t seed)
{
    char text[32], way[2] = {(char)('0' + (int)r->way), 0};
    snprintf(text, sizeof(text), "%llu", (unsigned long long)seed);
    pid_t pid = fork();
    if (pid == 0) {
        execl(program, program, "--client", way, r->uri, text, r->count, (char *)NULL);
        _exit(4);
    }
    return pid;
}

/* ---- cases ------------------------------------------------------------------------------------
 */

/* Three at a time; each has mapped, is reading, putting, or only about to connect. */
static void kill_clients(kill_way way)
{
    rig r;
    /* where a busy machine lets none come far */
    const uint64_t n_max = 20 * rounds(ROUNDS) + number_of("KVASIR_KILL_TRANSFERS", 0);
    uint64_t n = rounds(ROUNDS), most_pins = 0;
    pid_t pids[3] = {0};
    open_rig(&r, way);
    fill(&r);
    const uint64_t before = atomic_load(r.w.n_transfers);
    for (uint64_t i = 0; i < n + 3; i++) {
        pid_t *pid = &pids[i % 3];
        int status;
        if (*pid != 0) {
            assert_int_equal(kill(*pid, SIGKILL), 0);
            assert_int_equal(waitpid(*pid, &status, 0), *pid);
            if (!WIFSIGNALED(status))
                fail_msg("a client ended with %d (%d: it read a wrong byte)", WEXITSTATUS(status),
                         WRONG);
        }
        bool tested = (way != MAPPED || most_pins > 0) && enough_transfers(&r, before);
        if (!tested && i + 1 == n && n < n_max)
            n++;
        *pid = i < n ? spawn_client(&r, h_random(&r.w.random)) : 0;
        nap(h_random(&r.w.random) % (100000 * r.slow));
        uint64_t pins = counter(&r, "map_pins");
        most_pins = pins > most_pins ? pins : most_pins;
    }
    assert_true((most_pins > 0) == (way == MAPPED)); /* else nothing was put to the test */
    assert_true(enough_transfers(&r, before));
    const uint64_t n_transfers = atomic_load(r.w.n_transfers) - before;
    wait_counter(&r, "maps", 0);
    wait_counter(&r, "map_pins", 0);
    wait_counter(&r, "map_pinned_bytes", 0);
    wait_counter(&r, "mapped_segments", 0);
    wait_counter(&r, "requests_in_flight", 1); /* the one that asks */
    wait_slots(&r);
    if (way == RDMA)
        wait_device(&r, 1);
    for (int i = 0; i < 2; i++) { /* what they had pinned can be mapped and read like all else */
        fill(&r);
        assert_int_equal(worker_context(&r.w), KVC_OK);
        assert_true(worker_read(&r.w));
    }
    print_message("%s: %llu clients killed in %llu transfers, at most %llu pins at a time\n",
                  way_names[way], (unsigned long long)n, (unsigned long long)n_transfers,
                  (unsigned long long)most_pins);
    close_rig(&r);
}

static bool on_device(void)
{
    return getenv("KVASIR_RDMA_ADDRESS") != NULL;
}

static void killed_clients_leave_nothing(void **state)
{
    (void)state;
    if (on_device()) {
        kill_clients(RDMA);
        return;
    }
    kill_clients(MAPPED);
    kill_clients(BY_REQUEST);
#ifdef KVASIR_GRPC
    kill_clients(GRPC);
#endif
}

typedef struct killer {
    rig *r;
    uint64_t after_us;
} killer;

static void run_killer(void *arg)
{
    killer *k = arg;
    nap(k->after_us);
    (void)support_daemon_stop(&k->r->daemon, SIGKILL);
}

static void kill_servers(kill_way way)
{
    rig r;
    uint64_t n = rounds(ROUNDS / 4), i = 0;
    open_rig(&r, way);
    for (; i < n || (way == MAPPED && r.w.n_served == 0 && i < 20 * n) || !enough_transfers(&r, 0);
         i++) {
        kvc_thread thread;
        killer k = {&r, h_random(&r.w.random) % (60000 * r.slow)};
        assert_int_equal(kvc_schema_register(r.w.client, &r.w.schema.schema, 0, &(kvc_digest){{0}}),
                         KVC_OK);
        fill(&r);
        assert_int_equal(worker_context(&r.w), KVC_OK);
        assert_true(worker_read(&r.w));
        assert_int_equal(kvc_thread_start(&thread, "killer", run_killer, &k), KVC_OK);
        uint64_t end_ns = kvc_deadline_ns(k.after_us * 1000 + 30 * MS);
        while (!kvc_expired(end_ns)) {
            assert_true(worker_read(&r.w));
            if (h_random(&r.w.random) % 8 == 0)
                (void)worker_put(&r.w, 100000 + h_random(&r.w.random) % 1000, 10, r.w.timeout_ns);
        }
        kvc_thread_join(&thread);
        start_daemon(&r); /* its socket was left behind */
    }
    assert_true(r.w.n_reads > 0 && (r.w.n_served > 0) == (way == MAPPED));
    if (way == RDMA)
        print_message("rdma: %llu bytes of rows without a copy\n",
                      (unsigned long long)kvc_metric_get(KVC_M_rdma_placed_bytes));
    print_message("%s: %llu servers killed in %llu transfers, %llu reads, %llu without a request\n",
                  way_names[way], (unsigned long long)i,
                  (unsigned long long)atomic_load(r.w.n_transfers), (unsigned long long)r.w.n_reads,
                  (unsigned long long)r.w.n_served);
    close_rig(&r);
}

static void a_killed_server_gives_no_wrong_byte(void **state)
{
    (void)state;
    if (on_device()) {
        kill_servers(RDMA);
        return;
    }
    kill_servers(MAPPED);
    kill_servers(BY_REQUEST);
#ifdef KVASIR_GRPC
    kill_servers(GRPC);
#endif
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(killed_clients_leave_nothing),
        cmocka_unit_test(a_killed_server_gives_no_wrong_byte),
    };
    if (argc == 6 && strcmp(argv[1], "--client") == 0)
        return run_client((kill_way)(argv[2][0] - '0'), argv[3], strtoull(argv[4], NULL, 0),
                          argv[5]);
    ssize_t len = readlink("/proc/self/exe", program, sizeof(program) - 1);
    if (len <= 0)
        return 1;
    kvc_log_set_level(KVC_LOG_LEVEL_ERROR);
    return cmocka_run_group_tests_name("map_kill", tests, NULL, NULL);
}
