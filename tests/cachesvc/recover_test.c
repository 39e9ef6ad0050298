/*
 * recover_test.c: starts of a server over a damaged lmdb folder: what was promised comes back, what
 * is lost is set aside, and the service starts.
 *
 * The test's one thread. Invariant: files are damaged only while no server has the folder.
 */
#include "harness.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/fault.h"
#include "base/metrics.h"

#define ROW   512u
#define MODEL "a-model-with-a-name"

typedef struct fixture {
    h_server h;
    h_peer *peer;
    h_schema schema;
    char dir[256];
} fixture;

static void open_server(fixture *f)
{
    h_server_start(&f->h);
    f->peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
}

static void close_server(fixture *f)
{
    if (f->peer)
        h_disconnect(f->peer);
    f->peer = NULL;
    if (f->h.server)
        h_server_stop(&f->h, false);
}

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof(*f));
    h_server_init(&f->h);
    h_temp_dir(f->dir);
    h_schema_init(&f->schema, MODEL, 3, ROW, false);
    f->h.settings.lmdb_path = f->dir;
    f->h.settings.lmdb_bytes = 64u << 20;
    f->h.settings.dram_bytes = 8 * H_TOKENS * ROW;
    open_server(f);
    assert_int_equal(h_register(f->peer, &f->schema), KVC_OK);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    close_server(f);
    h_server_fini(&f->h);
    h_remove_dir(f->dir);
    free(f);
    return 0;
}

static void put_durable(fixture *f, const h_schema *schema, uint64_t first, uint32_t n)
{
    for (uint32_t b = 0; b < n; b++)
        assert_int_equal(h_put1(f->peer, schema, first + b, 0, KVC_PROMISE_DURABLE), KVC_OK);
}

static uint32_t count_hits(fixture *f, const h_schema *schema, uint64_t first, uint32_t n)
{
    const uint32_t part = 0;
    uint32_t hits;
    assert_int_equal(h_match(f->peer, schema, first, n, &part, 1, &hits), KVC_OK);
    return hits;
}

/* Maps dir/env/data.mdb for writing. */
typedef struct file {
    int fd;
    size_t size;
    unsigned char *bytes;
} file;

static file load(fixture *f, const char *env)
{
    char path[512];
    struct stat st;
    file in;
    snprintf(path, sizeof(path), "%s/%s/data.mdb", f->dir, env);
    in.fd = open(path, O_RDWR);
    assert_true(in.fd >= 0 && fstat(in.fd, &st) == 0);
    in.size = (size_t)st.st_size;
    in.bytes = malloc(in.size);
    assert_non_null(in.bytes);
    assert_int_equal(pread(in.fd, in.bytes, in.size, 0), (ssize_t)in.size);
    return in;
}

static void store(file *out)
{
    assert_int_equal(pwrite(out->fd, out->bytes, out->size, 0), (ssize_t)out->size);
    free(out->bytes);
    close(out->fd);
}

/* How many names in the folder begin and end so; the last one's name. */
static uint32_t count_names(fixture *f, const char *begin, const char *end, char name[256])
{
    uint32_t n = 0;
    DIR *dir = opendir(f->dir);
    assert_non_null(dir);
    for (struct dirent *entry; (entry = readdir(dir));) {
        size_t len = strlen(entry->d_name), tail = strlen(end);
        if (strncmp(entry->d_name, begin, strlen(begin)) != 0 || len < tail ||
            strcmp(entry->d_name + len - tail, end) != 0)
            continue;
        snprintf(name, 256, "%s", entry->d_name);
        n++;
    }
    closedir(dir);
    return n;
}

static void check_served(fixture *f, uint64_t first, uint32_t n)
{
    uint64_t context;
    uint32_t picks[40];
    assert_int_equal(count_hits(f, &f->schema, first, n + 1), n);
    for (uint32_t i = 0; i < n; i++)
        picks[i] = i * H_TOKENS + i;
    assert_int_equal(h_open(f->peer, &f->schema, first, n, 0, &context), KVC_OK);
    h_fetch_equal(f->peer, &f->schema, context, first, 0, picks, n);
}

/* Started over lost schemas, the server keeps the values; with the schemas back, it serves them. */
static void check_kept(fixture *f)
{
    open_server(f);
    assert_int_equal(kvs_schemas_count(f->h.server->schemas), 0);
    assert_int_equal(h_register(f->peer, &f->schema), KVC_OK);
    assert_int_equal(count_hits(f, &f->schema, 0, 40), 0);
    close_server(f);
    open_server(f);
    assert_int_equal(kvs_schemas_count(f->h.server->schemas), 1);
    check_served(f, 0, 40);
}

static void test_corrupt_schema_record(void **state)
{
    fixture *f = *state;
    uint32_t n = 0;
    put_durable(f, &f->schema, 0, 40);
    close_server(f);
    file meta = load(f, "meta");
    for (size_t at = 0; at + sizeof(MODEL) - 1 <= meta.size; at++) {
        if (memcmp(meta.bytes + at, MODEL, sizeof(MODEL) - 1) != 0)
            continue;
        meta.bytes[at] ^= 1;
        n++;
    }
    store(&meta);
    assert_true(n > 0);
    check_kept(f);
}

static void test_meta_set_aside(void **state)
{
    fixture *f = *state;
    char name[256];
    put_durable(f, &f->schema, 0, 40);
    close_server(f);
    file meta = load(f, "meta");
    memset(meta.bytes, 0x5a, meta.size);
    store(&meta);
    check_kept(f);
    assert_int_equal(count_names(f, "meta.", ".bad", name), 1);
}

/* Takes the mark of a leaf from every page that is one, but leaves LMDB's own lists alone. */
static void damage_leaves(file *class, size_t key_bytes)
{
    uint32_t n = 0;
    for (size_t page = 2; (page + 1) * 4096 <= class->size; page++) {
        unsigned char *at = class->bytes + page * 4096;
        uint64_t number;
        uint16_t flags, first, name_bytes;
        memcpy(&number, at, 8);
        memcpy(&flags, at + 10, 2);
        memcpy(&first, at + 16, 2);
        if (number != page || flags != 2 || first < 16 || first > 4088)
            continue;
        memcpy(&name_bytes, at + first + 6, 2);
        if (name_bytes != key_bytes)
            continue;
        memset(at + 10, 0, 2);
        n++;
    }
    assert_true(n > 0);
}

/* A size class that LMDB cannot walk is lost; the others and the service are not. */
static void test_class_set_aside(void **state)
{
    fixture *f = *state;
    h_schema large;
    char name[256];
    h_schema_init(&large, "large", 3, 8 * ROW, false);
    assert_int_equal(h_register(f->peer, &large), KVC_OK);
    put_durable(f, &f->schema, 0, 40);
    assert_int_equal(count_names(f, "class-", "", name), 1);
    put_durable(f, &large, 100, 20);
    close_server(f);
    file class = load(f, name);
    damage_leaves(&class, 108);
    store(&class);
    open_server(f);
    assert_int_equal(count_hits(f, &f->schema, 0, 40), 0);
    assert_int_equal(count_hits(f, &large, 100, 21), 20);
    assert_int_equal(count_names(f, name, ".bad", name), 1);
    /* The class is made anew. */
    put_durable(f, &f->schema, 0, 5);
    close_server(f);
    open_server(f);
    check_served(f, 0, 5);
    assert_int_equal(count_hits(f, &large, 100, 21), 20);
}

/* A fault on the medium's side fails the put that met it, and that one only; work is counted. */
static void test_fault_points(void **state)
{
    fixture *f = *state;
    const uint32_t pick = 7;
    uint64_t context, commits = kvc_metric_get(KVC_M_lmdb_commits);
    uint64_t syncs = kvc_metric_get(KVC_M_lmdb_syncs);
    put_durable(f, &f->schema, 0, 1);
    assert_true(kvc_metric_get(KVC_M_lmdb_commits) > commits);
    assert_true(kvc_metric_get(KVC_M_lmdb_syncs) > syncs);
    assert_int_equal(kvc_fault_arm("lmdb.commit=always"), KVC_OK);
    assert_int_equal(h_put1(f->peer, &f->schema, 1, 0, KVC_PROMISE_DURABLE), KVC_IO);
    assert_int_equal(kvc_fault_arm("lmdb.commit=once"), KVC_OK);
    put_durable(f, &f->schema, 1, 1); /* the tier tries again by itself */
    assert_int_equal(kvc_fault_arm("put.reserve=once"), KVC_OK);
    put_durable(f, &f->schema, 2, 1); /* straight to lmdb */
    assert_int_equal(h_open(f->peer, &f->schema, 2, 1, 0, &context), KVC_OK);
    assert_int_equal(kvc_fault_arm("fetch.read=once"), KVC_OK);
    assert_int_equal(h_fetch(f->peer, context, 0, &pick, 1), KVC_OK);
    assert_int_equal(f->peer->n_missing, 1);
    assert_int_equal(f->peer->missing[0].status, KVC_IO);
    assert_int_equal(kvc_fault_arm(NULL), KVC_OK);
    check_served(f, 0, 3);
    assert_int_equal(kvc_fault_arm("lmdb.sync=once"), KVC_OK);
    assert_int_equal(h_put1(f->peer, &f->schema, 3, 0, KVC_PROMISE_DURABLE), KVC_IO);
    assert_int_equal(kvc_fault_arm(NULL), KVC_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_corrupt_schema_record, setup, teardown),
        cmocka_unit_test_setup_teardown(test_meta_set_aside, setup, teardown),
        cmocka_unit_test_setup_teardown(test_class_set_aside, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fault_points, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
