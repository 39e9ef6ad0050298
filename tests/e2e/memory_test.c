/*
 * memory_test.c: the daemon's memory (RssAnon + RssShmem) under many values, rows and connections,
 * and over time. The bound: the dram tier, row_sums_bytes, 256 MiB, and 64 bytes a value. What
 * makes up the 256 MiB is in cachesvc/heap.h; the run of CI takes small limits, and less by as
 * much.
 *
 * Main thread; a thread for each client; one that samples. KVASIR_MEMORY_VALUES (2,000, of 256 rows
 * each; 40,000 are 10 million rows), KVASIR_MEMORY_SOCKETS (192; up to 1,024; half
 * as many over shm) and
 * KVASIR_SOAK_SECONDS (30) make it longer.
 */
#include "load.h"

#include <dirent.h>
#include <signal.h>
#include <time.h>

#include "base/log.h"

#define MIB          (1ull << 20)
#define ROW_BYTES    768u
#define BLOCK_TOKENS 256u
#define VALUE_BYTES  (ROW_BYTES * BLOCK_TOKENS)
#define DRAM_BYTES   (64 * MIB)
#define A_VALUE      64u
#define A_CONNECTION (30ull << 10)
#define CHANNELS     64u /* of one client, at most */
#define MAX_CLIENTS  16u
#define BATCH        16u /* values a put */
#define A_MESSAGE    5u  /* values of one message */
#define FLOODS       4u
#define PICKS        2048u
#define SAMPLE_MS    50u
#define MAX_SAMPLES  65536u
#define GROWTH_BYTES (12 * MIB) /* what malloc's caches may take between one third and the next */

static void nap_ms(uint64_t ms)
{
    nanosleep(&(struct timespec){(time_t)(ms / 1000), (long)(ms % 1000 * 1000000)}, NULL);
}

static uint64_t get_number(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text == NULL ? otherwise : strtoull(text, NULL, 0);
}

/* ---- what the daemon takes ---- */

typedef struct sampler {
    pid_t pid;
    atomic_bool stop;
    kvc_thread thread;
    uint32_t n;
    uint64_t bytes[MAX_SAMPLES];
} sampler;

static uint64_t get_memory(pid_t pid)
{
    char path[64], line[256];
    uint64_t sum = 0;
    (void)snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
    FILE *stream = fopen(path, "re");
    if (stream == NULL)
        return 0;
    while (fgets(line, sizeof(line), stream) != NULL)
        if (strncmp(line, "RssAnon:", 8) == 0 || strncmp(line, "RssShmem:", 9) == 0)
            sum += strtoull(strchr(line, ':') + 1, NULL, 10) << 10;
    (void)fclose(stream);
    return sum;
}

static void sampler_main(void *arg)
{
    sampler *s = arg;
    while (!atomic_load(&s->stop) && s->n < MAX_SAMPLES) {
        s->bytes[s->n++] = get_memory(s->pid);
        nap_ms(SAMPLE_MS);
    }
}

static void sampler_begin(sampler *s, pid_t pid)
{
    memset(s, 0, sizeof(*s));
    s->pid = pid;
    assert_ok(kvc_thread_start(&s->thread, "sampler", sampler_main, s));
}

static void sampler_end(sampler *s)
{
    atomic_store(&s->stop, true);
    kvc_thread_join(&s->thread);
    assert_true(s->n > 0);
}

static uint64_t max_of(const sampler *s, uint32_t from, uint32_t to)
{
    uint64_t most = 0;
    for (uint32_t i = from; i < to; i++)
        most = s->bytes[i] > most ? s->bytes[i] : most;
    return most;
}

static uint32_t count_sockets(pid_t pid)
{
    char path[64], link[512], name[64];
    uint32_t n = 0;
    (void)snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    DIR *folder = opendir(path);
    assert_non_null(folder);
    for (struct dirent *entry = readdir(folder); entry != NULL; entry = readdir(folder)) {
        (void)snprintf(link, sizeof(link), "%s/%s", path, entry->d_name);
        ssize_t len = readlink(link, name, sizeof(name) - 1);
        n += len > 7 && strncmp(name, "socket:", 7) == 0;
    }
    (void)closedir(folder);
    return n;
}

/* ---- many values, rows and connections ---- */

typedef struct crowd crowd;

typedef struct member {
    crowd *crowd;
    uint32_t first, n; /* values that it puts */
    support_random random;
    kvc_client *client;
    kvc_thread thread;
    uint32_t failed, wrong;
} member;

struct crowd {
    support_daemon daemon;
    char folder[256];
    uint32_t n_values, n_connections, n_members, n_fetches;
    kvc_digest schema, *digests;
    void (*work)(member *m, uint8_t *bytes, const kvc_region *region);
    member members[MAX_CLIENTS];
};

static void fill_row(uint64_t *row, uint32_t value, uint32_t token)
{
    uint64_t x = ((uint64_t)value * BLOCK_TOKENS + token + 1) * 0x9e3779b97f4a7c15ull;
    for (uint32_t i = 0; i < ROW_BYTES / 8; i++)
        row[i] = x ^ x >> 29 ^ (uint64_t)i * 0x2545f4914f6cdd1dull;
}

static void note(member *m, const char *what, kvc_status status)
{
    if (status != KVC_OK && m->failed++ == 0)
        print_error("%s: %s\n", what, kvc_status_name(status));
}

static void put_all(member *m, uint8_t *bytes, const kvc_region *region)
{
    kvc_value values[BATCH];
    int8_t status[BATCH];
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t at = m->first; at < m->first + m->n;) {
        uint32_t n = m->first + m->n - at < BATCH ? m->first + m->n - at : BATCH;
        for (uint32_t i = 0; i < n; i++) {
            for (uint32_t t = 0; t < BLOCK_TOKENS; t++)
                fill_row((uint64_t *)(bytes + (size_t)i * VALUE_BYTES + (size_t)t * ROW_BYTES),
                         at + i, t);
            values[i] =
                (kvc_value){m->crowd->digests[at + i], 0, VALUE_BYTES, (size_t)i * VALUE_BYTES};
        }
        kvc_status result = kvc_put(m->client, &m->crowd->schema, KVC_PROMISE_DURABLE, values, n,
                                    region, status, 0, &op);
        if (result == KVC_OK)
            result = kvc_op_wait(&op, 0);
        uint32_t taken = 0;
        for (uint32_t i = 0; result == KVC_OK && i < n; i++)
            taken += status[i] == KVC_OK || status[i] == KVC_EXISTS;
        note(m, "put", result);
        at += result != KVC_OK || taken == n ? n : 0; /* AGAIN: all of them once more */
    }
}

static void fetch_some(member *m, uint8_t *bytes, const kvc_region *region)
{
    uint64_t wanted[ROW_BYTES / 8];
    uint32_t picks[PICKS];
    int8_t status[PICKS];
    kvc_context *context;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    assert_ok(kvc_context_open(m->client, &m->crowd->schema, m->crowd->digests, m->crowd->n_values,
                               0, 0, &context));
    for (uint32_t k = 0; k < m->crowd->n_fetches; k++) {
        for (uint32_t i = 0; i < PICKS; i++)
            picks[i] =
                (uint32_t)support_below(&m->random, (uint64_t)m->crowd->n_values * BLOCK_TOKENS);
        kvc_pick_group group = {
            .context = context, .row_bytes = ROW_BYTES, .n_picks = PICKS, .picks = picks};
        kvc_status result = kvc_fetch(m->client, &group, 1, region, status, NULL, 0, &op);
        if (result == KVC_OK)
            result = kvc_op_wait(&op, 0);
        note(m, "fetch", result);
        for (uint32_t i = 0; result == KVC_OK && i < PICKS; i++) {
            fill_row(wanted, picks[i] / BLOCK_TOKENS, picks[i] % BLOCK_TOKENS);
            note(m, "row", status[i]);
            m->wrong += status[i] == KVC_OK &&
                        memcmp(bytes + (size_t)i * ROW_BYTES, wanted, ROW_BYTES) != 0;
        }
    }
    kvc_context_close(context);
}

/*
 * A message of every connection at once, as large as they may be, of values that are there already:
 * more than the server has memory for, so that some must wait or are told to come again.
 */
static void flood(member *m, uint8_t *bytes, const kvc_region *region)
{
    kvc_value values[A_MESSAGE];
    int8_t status[CHANNELS][A_MESSAGE];
    kvc_op ops[CHANNELS];
    memset(bytes, 0, (size_t)A_MESSAGE * VALUE_BYTES);
    for (uint32_t i = 0; i < A_MESSAGE; i++)
        values[i] = (kvc_value){m->crowd->digests[m->first + i % m->n], 0, VALUE_BYTES,
                                (size_t)i * VALUE_BYTES};
    for (uint32_t round = 0; round < FLOODS; round++) {
        uint32_t n = 0;
        for (; n < CHANNELS; n++) {
            kvc_op_init(&ops[n], NULL, NULL);
            kvc_status result = kvc_put(m->client, &m->crowd->schema, KVC_PROMISE_MEMORY, values,
                                        A_MESSAGE, region, status[n], 0, &ops[n]);
            note(m, "put", result);
            if (result != KVC_OK)
                break;
        }
        for (uint32_t i = 0; i < n; i++)
            note(m, "put", kvc_op_wait(&ops[i], 0));
    }
}

static void member_main(void *arg)
{
    member *m = arg;
    size_t len = (size_t)BATCH * VALUE_BYTES;
    uint8_t *bytes = malloc(len);
    kvc_region *region = NULL;
    kvc_region_desc desc = {sizeof(desc), bytes, len, KVC_MEMORY_HOST, 0, NULL};
    if (bytes == NULL || kvc_region_register(m->client, &desc, &region) != KVC_OK) {
        m->failed++;
    } else {
        m->crowd->work(m, bytes, region);
        (void)kvc_region_deregister(m->client, region);
    }
    free(bytes);
}

/* All at once, to their end: every value is put before the first row is fetched. */
static void run_members(crowd *c, void (*work)(member *m, uint8_t *bytes, const kvc_region *region))
{
    c->work = work;
    for (uint32_t i = 0; i < c->n_members; i++)
        assert_ok(kvc_thread_start(&c->members[i].thread, "member", member_main, &c->members[i]));
    for (uint32_t i = 0; i < c->n_members; i++)
        kvc_thread_join(&c->members[i].thread);
}

/* Settings, and what they allow beside the dram tier and the values. */
typedef struct limits {
    const char *lmdb_bytes, *sums_bytes, *inflight_bytes, *group_bytes;
    uint64_t slack_bytes;
} limits;

static limits get_limits(const crowd *c)
{
    static const limits full = {"10GiB", "64MiB", "64MiB", "32MiB", 64 * MIB + 256 * MIB};
    limits few = {"1GiB", "4MiB", "16MiB", "8MiB", 0};
    few.slack_bytes = 4 * MIB + 256 * MIB - 2 * (64 - 16) * MIB - (32 - 8) * MIB -
                      (1000 - c->n_connections) * A_CONNECTION;
    return c->n_values > 4000 || c->n_connections > 1000 ? full : few;
}

static void open_crowd(crowd *c, const limits *l)
{
    char values[300];
    support_random random = support_seed(1);
    support_make_folder(c->folder, sizeof(c->folder));
    (void)snprintf(values, sizeof(values), "%s/values", c->folder);
    const char *args[] = {"--max-connections",
                          "1100",
                          "--dram-bytes",
                          "64MiB",
                          "--lmdb-path",
                          values,
                          "--lmdb-bytes",
                          l->lmdb_bytes,
                          "--row-sums-bytes",
                          l->sums_bytes,
                          "--max-inflight-bytes",
                          l->inflight_bytes,
                          "--group-commit-bytes",
                          l->group_bytes,
                          NULL};
    assert_true(support_daemon_start(&c->daemon, c->folder, args));
    c->n_members = (c->n_connections + CHANNELS - 1) / CHANNELS;
    c->digests = calloc(c->n_values, sizeof(*c->digests));
    assert_true(c->digests != NULL && c->n_members <= MAX_CLIENTS);
    for (uint32_t i = 0; i < c->n_values; i++)
        support_fill(&random, &c->digests[i], sizeof(c->digests[i]));
    for (uint32_t i = 0; i < c->n_members; i++) {
        member *m = &c->members[i];
        uint32_t left = c->n_connections - i * CHANNELS;
        kvc_client_opts opts = {.size_bytes = sizeof(opts),
                                .uris = c->daemon.uri,
                                .default_timeout_ns = 300000000000ull,
                                .connect_timeout_ns = 300000000000ull,
                                .n_channels = left < CHANNELS ? left : CHANNELS};
        m->crowd = c;
        m->first = (uint32_t)((uint64_t)c->n_values * i / c->n_members);
        m->n = (uint32_t)((uint64_t)c->n_values * (i + 1) / c->n_members) - m->first;
        m->random.state = support_next(&random);
        assert_ok(kvc_client_open(&opts, &m->client));
    }
    kvc_part part = {.kind = KVC_PART_STATE, .dtype = KVC_DTYPE_RAW, .row_bytes = ROW_BYTES};
    kvc_schema schema = {.model = "memory",
                         .revision = "",
                         .recipe = "memory",
                         .tp_size = 1,
                         .block_tokens = BLOCK_TOKENS,
                         .n_parts = 1,
                         .parts = &part};
    assert_ok(kvc_schema_register(c->members[0].client, &schema, 0, &c->schema));
}

static void close_crowd(crowd *c)
{
    for (uint32_t i = 0; i < c->n_members; i++)
        kvc_client_close(c->members[i].client);
    assert_int_equal(support_daemon_stop(&c->daemon, SIGTERM), 0);
    free(c->digests);
    support_remove_folder(c->folder);
}

static void test_bound(void **state)
{
    static crowd c;
    static sampler s;
    (void)state;
    c.n_values = (uint32_t)get_number("KVASIR_MEMORY_VALUES", 2000);
    c.n_connections = (uint32_t)get_number("KVASIR_MEMORY_SOCKETS", 192);
    c.n_fetches = 60 + c.n_values / 1000;
    limits l = get_limits(&c);
    open_crowd(&c, &l);
    uint64_t idle = get_memory(c.daemon.pid);
    sampler_begin(&s, c.daemon.pid);
    run_members(&c, put_all);
    uint64_t loaded = get_memory(c.daemon.pid);
    run_members(&c, fetch_some);
    uint64_t fetched = get_memory(c.daemon.pid);
    run_members(&c, flood);
    uint32_t n_sockets = count_sockets(c.daemon.pid);
    sampler_end(&s);
    uint64_t bound = DRAM_BYTES + l.slack_bytes + (uint64_t)A_VALUE * c.n_values;
    uint64_t most = max_of(&s, 0, s.n);
    print_message("%u rows of %u B in %u values, %u connections: %llu MiB idle, %llu once put, "
                  "%llu once read, at most %llu, %llu at the end; the bound is %llu\n",
                  c.n_values * BLOCK_TOKENS, ROW_BYTES, c.n_values, n_sockets,
                  (unsigned long long)(idle / MIB), (unsigned long long)(loaded / MIB),
                  (unsigned long long)(fetched / MIB), (unsigned long long)(most / MIB),
                  (unsigned long long)(s.bytes[s.n - 1] / MIB), (unsigned long long)(bound / MIB));
    for (uint32_t i = 0; i < c.n_members; i++) {
        assert_int_equal(c.members[i].failed, 0);
        assert_int_equal(c.members[i].wrong, 0);
    }
    assert_true(n_sockets >= c.n_connections);
    assert_true(most > DRAM_BYTES / 2 && most <= bound);
    close_crowd(&c);
}

/* ---- connections of this host ---- */

#define A_SHM_CONNECTION (12ull << 10) /* measured: 2 */
#define SHM_BODIES       6u            /* that each sends: once around a ring, and more */

/* One connection, which sends bodies and reads rows, and rests from then on. */
static kvc_client *visit_shm(const char *uri, const kvc_schema *schema, kvc_digest *digests,
                             uint8_t *bytes)
{
    kvc_client_opts opts = {
        .size_bytes = sizeof(opts), .uris = uri, .default_timeout_ns = 300000000000ull};
    kvc_region_desc desc = {sizeof(desc),    bytes, (size_t)BATCH * VALUE_BYTES,
                            KVC_MEMORY_HOST, 0,     NULL};
    crowd c = {.n_values = SHM_BODIES * A_MESSAGE, .n_fetches = 2, .digests = digests};
    member m = {.crowd = &c, .n = c.n_values, .random = support_seed(7)};
    kvc_region *region;
    assert_ok(kvc_client_open(&opts, &m.client));
    assert_ok(kvc_region_register(m.client, &desc, &region));
    assert_ok(kvc_schema_register(m.client, schema, 0, &c.schema));
    kvc_value values[A_MESSAGE];
    int8_t status[A_MESSAGE];
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t k = 0; k < SHM_BODIES; k++) {
        for (uint32_t i = 0; i < A_MESSAGE; i++) {
            uint32_t at = k * A_MESSAGE + i;
            for (uint32_t t = 0; t < BLOCK_TOKENS; t++)
                fill_row((uint64_t *)(bytes + (size_t)i * VALUE_BYTES + (size_t)t * ROW_BYTES), at,
                         t);
            values[i] = (kvc_value){digests[at], 0, VALUE_BYTES, (size_t)i * VALUE_BYTES};
        }
        kvc_status result = kvc_put(m.client, &c.schema, KVC_PROMISE_MEMORY, values, A_MESSAGE,
                                    region, status, 0, &op);
        assert_ok(result != KVC_OK ? result : kvc_op_wait(&op, 0));
    }
    fetch_some(&m, bytes, region);
    assert_int_equal(m.failed + m.wrong, 0);
    assert_ok(kvc_region_deregister(m.client, region));
    return m.client;
}

/* Rings are under one cap, and a connection that rests keeps no buffer: however many there are, a
 * few KiB each. */
static void test_connections_of_this_host(void **state)
{
    static kvc_client *clients[1024];
    uint32_t n = (uint32_t)get_number("KVASIR_MEMORY_SOCKETS", 192) / 2, few = 8;
    char folder[256], uri[300];
    support_daemon daemon;
    support_random random = support_seed(1);
    kvc_digest digests[SHM_BODIES * A_MESSAGE];
    kvc_part part = {.kind = KVC_PART_STATE, .dtype = KVC_DTYPE_RAW, .row_bytes = ROW_BYTES};
    kvc_schema schema = {.model = "memory",
                         .revision = "",
                         .recipe = "memory",
                         .tp_size = 1,
                         .block_tokens = BLOCK_TOKENS,
                         .n_parts = 1,
                         .parts = &part};
    uint8_t *bytes = malloc((size_t)PICKS * ROW_BYTES + (size_t)BATCH * VALUE_BYTES);
    (void)state;
    assert_true(bytes != NULL && n > few);
    for (uint32_t i = 0; i < SHM_BODIES * A_MESSAGE; i++)
        support_fill(&random, &digests[i], sizeof(digests[i]));
    support_make_folder(folder, sizeof(folder));
    char *path = realpath(folder, NULL);
    assert_non_null(path);
    (void)snprintf(uri, sizeof(uri), "shm://%s/socket", path);
    free(path);
    const char *args[] = {"--listen", uri, "--dram-bytes", "64MiB", "--max-inflight-bytes",
                          "32MiB",    NULL};
    assert_true(support_daemon_start(&daemon, folder, args));
    for (uint32_t i = 0; i < few; i++)
        clients[i] = visit_shm(uri, &schema, digests, bytes);
    uint64_t before = get_memory(daemon.pid);
    for (uint32_t i = few; i < n; i++)
        clients[i] = visit_shm(uri, &schema, digests, bytes);
    uint64_t after = get_memory(daemon.pid), grown = after > before ? after - before : 0;
    print_message("%u connections over shm: %llu MiB with %u of them, %llu with all, %llu B each\n",
                  n, (unsigned long long)(before / MIB), few, (unsigned long long)(after / MIB),
                  (unsigned long long)(grown / (n - few)));
    assert_true(count_sockets(daemon.pid) >= n);
    assert_true(grown <= (n - few) * A_SHM_CONNECTION + 4 * MIB);
    for (uint32_t i = 0; i < n; i++)
        kvc_client_close(clients[i]);
    assert_int_equal(support_daemon_stop(&daemon, SIGTERM), 0);
    support_remove_folder(folder);
    free(bytes);
}

/* ---- over time ---- */

/* Comes, opens, holds, reads and goes: what a server could keep of each client. Its hold is
 * released, or runs out. */
static void visit(store *s, bool releases)
{
    kvc_client *client = store_connect(s->tcp_uri);
    kvc_context *context = store_context(s, client, STORE_MAX_BLOCKS), *fork = NULL;
    kvc_hold_info hold;
    bool wrong = false;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    assert_ok(kvc_context_fork(context, 7, 0, 0, &fork));
    kvc_status status = kvc_hold(fork, releases ? 600000 : 1000, &hold, 0, &op);
    assert_ok(status != KVC_OK ? status : kvc_op_wait(&op, 0));
    assert_ok(store_check(client, context, 1, 64, 4096, hold.hold, NULL, &wrong));
    assert_false(wrong);
    if (releases) {
        status = kvc_release(client, hold.hold, 0, &op);
        assert_ok(status != KVC_OK ? status : kvc_op_wait(&op, 0));
    }
    kvc_context_close(fork);
    kvc_context_close(context);
    kvc_client_close(client);
}

static void test_soak(void **state)
{
    static load l;
    static sampler samples;
    store s;
    uint64_t seconds = get_number("KVASIR_SOAK_SECONDS", 30), n_visits = 0;
    (void)state;
    assert_true(seconds >= 6 && seconds * 1000 / SAMPLE_MS < MAX_SAMPLES);
    store_open(&s, "16MiB", true);
    load_open(&l, &s, support_seed(1).state);
    l.prints = l.failure_prints = 8;
    sampler_begin(&samples, s.daemon.pid);
    load_begin(&l);
    for (uint64_t end_ns = kvc_now_ns() + seconds * 1000000000; kvc_now_ns() < end_ns; n_visits++) {
        visit(&s, n_visits % 2 == 0);
        nap_ms(20);
    }
    load_end(&l);
    sampler_end(&samples);
    uint64_t before = max_of(&samples, samples.n / 3, samples.n / 3 * 2);
    uint64_t after = max_of(&samples, samples.n / 3 * 2, samples.n);
    print_message("%llu s, %u values put, %u erased, %u reads, %llu clients came and went: %llu, "
                  "%llu and %llu KiB at most in each third\n",
                  (unsigned long long)seconds, l.counts.puts, l.counts.erased, l.counts.reads,
                  (unsigned long long)n_visits,
                  (unsigned long long)(max_of(&samples, 0, samples.n / 3) >> 10),
                  (unsigned long long)(before >> 10), (unsigned long long)(after >> 10));
    assert_int_equal(l.counts.failed + l.counts.wrong + l.counts.lost, 0);
    load_found found = load_verify(&l);
    assert_int_equal(found.lost + found.wrong + found.back, 0);
    assert_true(after <= before + GROWTH_BYTES);
    load_close(&l);
    store_close(&s);
}

int main(void)
{
    kvc_log_set_level(KVC_LOG_LEVEL_ERROR);
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_bound),
                                       cmocka_unit_test(test_connections_of_this_host),
                                       cmocka_unit_test(test_soak)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
