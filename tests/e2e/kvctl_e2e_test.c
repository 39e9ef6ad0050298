/*
 * kvctl_e2e_test.c: each command of kvctl against a real cachesvc: what it prints and how it exits.
 */
#include "kvctl_rig.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>

static void test_help(void **state)
{
    (void)state;
    static const char *const commands[] = {"status", "match",   "rows",  "doctor",  "top",
                                           "get",    "put",     "hold",  "release", "prefetch",
                                           "erase",  "context", "bench", "explain", "place"};
    static const char *const sections[] = {
        "NAME\n", "SYNOPSIS\n", "DESCRIPTION\n", "OPTIONS\n", "EXIT STATUS\n", "EXAMPLES\n", NULL};
    expect(NULL, WORDS("--help"), 0, sections, NULL);
    expect(NULL, WORDS("help"), 0, sections, NULL);
    expect(NULL, WORDS("--version"), 0, WORDS("kvctl 0.1.0"), NULL);
    for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
        char name[40];
        (void)snprintf(name, sizeof(name), "kvctl %s - ", commands[i]);
        expect(NULL, WORDS("--help"), 0, WORDS(commands[i]), NULL);
        expect(NULL, WORDS(commands[i], "--help"), 0, sections, NULL);
        expect(NULL, WORDS(commands[i], "-h"), 0, WORDS(name), NULL);
        expect(NULL, WORDS("help", commands[i]), 0, WORDS(name), NULL);
    }
}

static void test_usage(void **state)
{
    (void)state;
    static const char hint[] = "--help'";
    expect(NULL, (const char *const[]){NULL}, 2, NULL, hint);
    expect(NULL, WORDS("statsu"), 2, NULL, "did you mean 'status'");
    expect(NULL, WORDS("help", "nothing"), 2, NULL, hint);
    expect(NULL, WORDS("--timeout", "5", "status"), 2, NULL, "duration");
    expect(NULL, WORDS("--server", "nonsense", "status"), 2, NULL, "nonsense");
    expect(NULL, WORDS(ON, "status", "now"), 2, NULL, "now");
    expect(NULL, WORDS(ON, "status", "--wrong"), 2, NULL, hint);
    expect(NULL, WORDS(ON, "match"), 2, NULL, "--schema");
    expect(NULL, WORDS(ON, "match", "--schema", "12"), 2, NULL, "64 hex digits");
    expect("zz", WORDS(ON, "match", "--schema", schema_hex), 2, NULL, "digest 1");
    expect(NULL, WORDS(ON, "match", "--schema", schema_hex, "--tokens", "-"), 2, NULL,
           "--block-tokens");
    expect(NULL, WORDS(ON, "rows", "--schema", schema_hex), 2, NULL, "--part");
    expect(NULL, WORDS(ON, "rows", "--schema", schema_hex, "--part", "0", "--picks", "3-1"), 2,
           NULL, "--picks");
    expect(NULL, WORDS(ON, "doctor", "now"), 2, NULL, hint);
}

static void test_nobody(void **state)
{
    (void)state;
    static const char *const nobody[] = {
        "--server", "grpc://127.0.0.1:1", "--timeout", "500ms", "status", NULL};
    expect(NULL, nobody, 3, NULL, "cannot reach");
    expect(NULL, WORDS("--server", "grpc://127.0.0.1:1", "--timeout", "500ms", "doctor"), 1,
           WORDS("FAIL  server", "start cachesvc", "OK    clock", "1 failed"), NULL);
}

static void test_status(void **state)
{
    (void)state;
    expect(NULL, WORDS(ON, "status"), 0,
           WORDS("version  0.1.0", "schemas  1", "TIER", "dram", "lmdb", "COUNTERS", "put_values "),
           NULL);
    expect(NULL, WORDS("--server", shared.unix_uri, "status", "--all"), 0,
           WORDS("LIMITS", "picks in a fetch       65536", schema_hex), NULL);
    expect(NULL, WORDS(ON, "--json", "status"), 0,
           WORDS("{\"server\":", "\"tiers\":[{\"name\":\"dram\",\"capacity_bytes\":33554432",
                 "\"put_values\":24", schema_hex, "}}\n"),
           NULL);
}

static void test_match(void **state)
{
    (void)state;
    char *all = NULL;
    FILE *stream = fopen(digests_path, "re");
    size_t size = 0;
    assert_true(getdelim(&all, &size, '\0', stream) > 0);
    (void)fclose(stream);
    expect(all, WORDS(ON, "match", "--schema", schema_hex), 0, WORDS("8 of 10 leading blocks"),
           NULL);
    expect(NULL, WORDS(ON, "match", "--schema", schema_hex, "--digests", digests_path), 0,
           WORDS("8 of 10 leading blocks"), NULL);
    expect(NULL,
           WORDS(ON, "--json", "match", "--schema", schema_hex, "--parts", "0-1", "--digests",
                 digests_path),
           0, WORDS("{\"hits\":8,\"blocks\":10}\n"), NULL);
    all[64] = '\0'; /* the first digest, as a word */
    expect(NULL, WORDS(ON, "match", "--schema", schema_hex, all), 0, WORDS("1 of 1"), NULL);
    expect(NULL, WORDS(ON, "match", "--schema", schema_hex, "--tiers", "--digests", digests_path),
           0, WORDS("8 of 10", "dram  8"), NULL);
    expect(NULL, WORDS(ON, "--json", "match", "--schema", schema_hex, "--tiers", all), 0,
           WORDS("\"tiers\":[\"dram\"]"), NULL);
    expect(NULL, WORDS(ON, "match", "--schema", all, all), 1, NULL, "NOT_FOUND");
    expect(NULL, WORDS(ON, "match", "--schema", schema_hex, "--parts", "77", all), 1, NULL,
           "part 77");
    expect("", WORDS(ON, "match", "--schema", schema_hex), 0, WORDS("0 of 0"), NULL);
    free(all);
}

/* The token ids that the digests were made of give the same blocks. */
static void test_match_tokens(void **state)
{
    (void)state;
    enum { ROOM = 100000 };
    char *text = calloc(1, ROOM);
    size_t len = 0;
    assert_non_null(text);
    for (uint32_t t = 0; t < 9 * STORE_BLOCK_TOKENS + 10; t++)
        len += (size_t)snprintf(text + len, ROOM - len, "%u%s", t, t % 7 ? " " : ",\n");
    expect(text,
           WORDS(ON, "match", "--schema", schema_hex, "--block-tokens", "64", "--tokens", "-"), 0,
           WORDS("8 of 9 leading blocks"), NULL);
    expect("1 2 x",
           WORDS(ON, "match", "--schema", schema_hex, "--block-tokens", "64", "--tokens", "-"), 2,
           NULL, "token 3");
    free(text);
}

#define ROWS                                                                                       \
    ON, "rows", "--schema", schema_hex, "--row-bytes", "512", "--digests", digests_path, "--part", \
        "1"

static void test_rows(void **state)
{
    (void)state;
    char hex[2 * 512 + 20], path[320], *bytes;
    expect(NULL, WORDS(ROWS, "--picks", "0-511"), 0, WORDS("512 rows, 256 KiB", "0 missing"), NULL);
    int n = snprintf(hex, sizeof(hex), "300 ");
    for (uint32_t b = 0; b < 512; b++)
        n += snprintf(hex + n, sizeof(hex) - (size_t)n, "%02x", store_byte(1, 300, b));
    expect(NULL, WORDS(ROWS, "--picks", "5,300,7-9", "--format", "hex"), 0,
           WORDS("5 ", hex, "\n9 "), NULL);
    expect(NULL, WORDS(ROWS, "--picks", "5,300", "--format", "sums"), 0, WORDS("5 ", "300 "), NULL);
    /* Blocks 8 and 9 were not put. */
    expect(NULL, WORDS(ROWS, "--picks", "500-529"), 1, WORDS("12 rows", "18 missing"),
           "token 512: NOT_FOUND");
    expect(NULL, WORDS("--json", ROWS, "--picks", "511,512", "--format", "sums"), 1,
           WORDS("{\"data\":[{\"pick\":511,\"sum\":", "{\"pick\":512,\"status\":\"NOT_FOUND\"}",
                 "\"missing\":1", "}\n"),
           NULL);
    (void)snprintf(path, sizeof(path), "%s/rows", shared.folder);
    expect(NULL, WORDS(ROWS, "--picks", "0-511:3,511,512", "--out", path), 1, NULL, NULL);
    bytes = malloc(173 * 512);
    FILE *stream = fopen(path, "re");
    assert_int_equal(fread(bytes, 512, 174, stream), 173);
    (void)fclose(stream);
    for (uint32_t i = 0; i < 171; i++)
        for (uint32_t b = 0; b < 512; b++)
            assert_int_equal((uint8_t)bytes[i * 512 + b], store_byte(1, i * 3, b));
    assert_int_equal((uint8_t)bytes[171 * 512 + 3], store_byte(1, 511, 3));
    assert_int_equal(bytes[172 * 512 + 3], 0); /* missing: zeros */
    free(bytes);
    expect(NULL, WORDS(ROWS, "--picks", "0", "--out", "/nowhere/file"), 1, NULL, "/nowhere/file");
    expect(NULL,
           WORDS(ON, "rows", "--schema", schema_hex, "--row-bytes", "100", "--digests",
                 digests_path, "--part", "1", "--picks", "0"),
           1, NULL, "row_bytes");
}

/* A file with the schema's text knows the sizes. */
static void test_schema_file(void **state)
{
    (void)state;
    char path[320];
    (void)snprintf(path, sizeof(path), "%s/schema", shared.folder);
    store_write_schema(path);
    expect(NULL,
           WORDS(ON, "rows", "--schema", path, "--digests", digests_path, "--part", "2", "--picks",
                 "0-63"),
           0, WORDS("64 rows, 8.00 KiB"), NULL);
    expect(NULL,
           WORDS(ON, "rows", "--schema", path, "--digests", digests_path, "--part", "9", "--picks",
                 "0"),
           2, NULL, "--row-bytes");
    expect(NULL, WORDS(ON, "match", "--schema", digests_path, "--digests", digests_path), 2, NULL,
           "no schema text");
}

/* A server of this host, and who may come to it. */
static void test_doctor_shm(void **state)
{
    (void)state;
    char folder[320], uri[384], *path = uri + strlen("shm://");
    support_daemon daemon;
    (void)snprintf(folder, sizeof(folder), "%s/shm", shared.folder);
    (void)snprintf(uri, sizeof(uri), "shm://%s/socket", folder);
    assert_int_equal(mkdir(folder, 0700), 0);
    const char *args[] = {"--listen", uri, "--dram-bytes", "16MiB", NULL};
    assert_true(support_daemon_start(&daemon, folder, args));
    assert_int_equal(chmod(path, 0600), 0);
    expect(NULL, WORDS("--server", uri, "doctor"), 0,
           WORDS("OK    caps      dram", "OK    shm       process", path, "0 maps pin"), NULL);
    assert_int_equal(chmod(path, 0666), 0);
    expect(NULL, WORDS("--server", uri, "doctor"), 0,
           WORDS("WARN  shm       every user of this host", "-> chmod 660"), NULL);
    assert_int_equal(support_daemon_stop(&daemon, SIGTERM), 0);
    expect(NULL, WORDS("--server", uri, "--timeout", "2s", "doctor"), 1,
           WORDS("FAIL  shm       nobody answers", "-> start cachesvc"), NULL);
}

/* A server with a GPU, which is a fake. */
static void test_doctor_gpu(void **state)
{
    (void)state;
    char folder[320], uri[384], own[512] = "";
    const char *was = getenv("KVASIR_CACHESVC");
    support_daemon daemon;
    (void)snprintf(folder, sizeof(folder), "%s/gpu", shared.folder);
    (void)snprintf(uri, sizeof(uri), "shm://%s/socket", folder);
    (void)snprintf(own, sizeof(own), "%s", was != NULL ? was : "");
    assert_int_equal(mkdir(folder, 0700), 0);
    const char *args[] = {"--listen",    uri,     "--dram-bytes",       "16MiB",
                          "--gpu-bytes", "32MiB", "--attend-gpu-bytes", "8MiB",
                          NULL};
    assert_int_equal(setenv("KVASIR_CACHESVC", CACHESVC_OVER_FAKE, 1), 0);
    bool started = support_daemon_start(&daemon, folder, args);
    assert_int_equal(was != NULL ? setenv("KVASIR_CACHESVC", own, 1) : unsetenv("KVASIR_CACHESVC"),
                     0);
    assert_true(started);
    expect(NULL, WORDS("--server", uri, "doctor"), 0,
           WORDS("OK    caps      gpu may grow to 32.0 MiB: copies of 0 values take 0 B",
                 "OK    server    large attends run on its GPU, which reads 0 B of dram in place"),
           NULL);
    expect(NULL, WORDS("--server", uri, "status"), 0, WORDS("large attends run on a GPU"), NULL);
    assert_int_equal(support_daemon_stop(&daemon, SIGTERM), 0);
}

static void test_doctor(void **state)
{
    (void)state;
    char lmdb[320], missing[320], bad[352];
    (void)snprintf(lmdb, sizeof(lmdb), "%s/values", shared.folder);
    (void)snprintf(missing, sizeof(missing), "%s/missing", shared.folder);
    expect(NULL, WORDS(ON, "doctor", "--lmdb-path", lmdb), 0,
           WORDS("OK    server", "OK    caps", "clock", "limits", "cpu", "memory", "rdma", "gpu",
                 "OK    lmdb      only its owner", "of 1000 connections, none", "shm       memory",
                 "0 maps pin 0 B", "INFO  caps      the server has no gpu tier",
                 "INFO  server    attends run on its CPU", "0 failed"),
           NULL);
    expect(NULL, WORDS(ON, "--json", "doctor", "--lmdb-path", lmdb), 0,
           WORDS("{\"failed\":false,\"findings\":[{\"level\":", /* slow may a busy machine be */
                 "{\"level\":\"OK\",\"check\":\"server\""),
           NULL);
    expect(NULL, WORDS(ON, "doctor", "--lmdb-path", missing), 1,
           WORDS("FAIL  lmdb", "-> make the folder", "1 failed"), NULL);
    (void)snprintf(bad, sizeof(bad), "%s/class-9.1.bad", lmdb);
    assert_int_equal(mkdir(bad, 0700), 0);
    expect(NULL, WORDS(ON, "doctor", "--lmdb-path", lmdb), 0,
           WORDS("WARN  lmdb      class-9.1.bad was found damaged and set aside", "then remove"),
           NULL);
    assert_int_equal(rmdir(bad), 0);
    assert_int_equal(chmod(lmdb, 0777), 0);
    expect(NULL, WORDS(ON, "doctor", "--lmdb-path", lmdb), 1, WORDS("FAIL  lmdb", "chmod 700"),
           NULL);
    assert_int_equal(chmod(lmdb, 0700), 0);
}

/* The file has these bytes. */
static void expect_file(const char *path, const uint8_t *bytes, size_t len_bytes)
{
    FILE *stream = fopen(path, "re");
    assert_non_null(stream);
    uint8_t *got = malloc(len_bytes + 1);
    assert_non_null(got);
    assert_int_equal(fread(got, 1, len_bytes + 1, stream), len_bytes);
    assert_memory_equal(got, bytes, len_bytes);
    free(got);
    (void)fclose(stream);
}

static void write_file(const char *path, const uint8_t *bytes, size_t len_bytes)
{
    FILE *stream = fopen(path, "we");
    assert_non_null(stream);
    assert_int_equal(fwrite(bytes, 1, len_bytes, stream), len_bytes);
    assert_int_equal(fclose(stream), 0);
}

/* Blocks beyond those that the other tests count on. */
static void test_put_get(void **state)
{
    (void)state;
    char schema[320], in[320], out[320], hex[KVC_DIGEST_HEX_BYTES];
    uint8_t bytes[64 * 128];
    for (uint32_t i = 0; i < sizeof(bytes); i++)
        bytes[i] = (uint8_t)(i * 7 + (i >> 8));
    (void)snprintf(schema, sizeof(schema), "%s/put.schema", shared.folder);
    (void)snprintf(in, sizeof(in), "%s/put.bytes", shared.folder);
    (void)snprintf(out, sizeof(out), "%s/get.bytes", shared.folder);
    store_write_schema(schema);
    write_file(in, bytes, sizeof(bytes));
    kvc_digest_hex(&shared.digests[100], hex);
#define PUT(name, ...) WORDS(ON, name, "--schema", schema, "--part", "2", __VA_ARGS__)
    expect(NULL, PUT("get", hex, out), 1, NULL, "NOT_FOUND");
    assert_int_not_equal(access(out, F_OK), 0);
    expect(NULL, PUT("put", "--durable", hex, in), 0, WORDS("stored 8192 bytes"), NULL);
    expect(NULL, PUT("put", hex, in), 0, WORDS("first put wins"), NULL);
    expect(NULL, WORDS(ON, "--json", "put", "--schema", schema, "--part", "2", hex, in), 0,
           WORDS("{\"status\":\"EXISTS\",\"bytes\":8192}"), NULL);
    expect(NULL, PUT("get", hex, out), 0, WORDS("8192 bytes"), NULL);
    expect_file(out, bytes, sizeof(bytes));
    expect(NULL,
           WORDS(ON, "--json", "get", "--schema", schema_hex, "--part", "2", "--row-bytes", "128",
                 "--block-tokens", "64", hex, out),
           0, WORDS("\"bytes\":8192", "\"sum\":\""), NULL);
    write_file(in, bytes, 100);
    expect(NULL, PUT("put", hex, in), 1, NULL, "not 100");
    expect("", PUT("put", hex), 2, NULL, "0 bytes");
    expect(NULL, PUT("put", "zz", in), 2, NULL, "64 hex digits");
    expect(NULL, PUT("put", hex, "/nowhere/at/all"), 2, NULL, "/nowhere/at/all");
    expect(NULL, PUT("get", hex, "/nowhere/at/all"), 1, NULL, "/nowhere/at/all");
    expect(NULL, WORDS(ON, "--json", "get", "--schema", schema, "--part", "2", hex), 2, NULL,
           "needs a file");
    expect(NULL, WORDS(ON, "get", "--schema", schema_hex, "--part", "2", hex), 2, NULL,
           "--row-bytes");
    expect(NULL, WORDS(ON, "put", "--schema", schema, hex), 2, NULL, "--part");
    (void)unlink(in);
    (void)unlink(out);
    (void)unlink(schema);
}

/* The ways of a gRPC connection; part 0 of the shared store is a kv part. */
static void test_explain(void **state)
{
    (void)state;
    expect(NULL, WORDS(ON, "explain", "--schema", schema_hex, "--part", "0", "--q-heads", "8"), 0,
           WORDS("rows ", "near ", "(measured)", "shm    not possible", "it costs least"), NULL);
    expect(NULL,
           WORDS(ON, "--json", "explain", "--schema", schema_hex, "--part", "0", "--q-heads", "8",
                 "--queries", "65"),
           0,
           WORDS("{\"way\":\"rows\",\"why\":\"only\",\"ways\":[",
                 "more queries than the server takes", "\"rdma_sums\":false"),
           NULL);
    /* a chunk is 64 rows; those that a million calls use are worth fetching */
    expect(NULL,
           WORDS(ON, "explain", "--schema", schema_hex, "--part", "0", "--q-heads", "8", "--chunks",
                 "2048"),
           0, WORDS("more rows than one request names", "rows: no other way is possible"), NULL);
    expect(NULL,
           WORDS(ON, "--json", "explain", "--schema", schema_hex, "--part", "0", "--q-heads", "8",
                 "--chunks", "8", "--reuse", "1000000"),
           0, WORDS("{\"way\":\"rows\",\"why\":\"cheapest\""), NULL);
    expect(NULL,
           WORDS(ON, "explain", "--schema", schema_hex, "--part", "0", "--q-heads", "8", "--chunks",
                 "0"),
           2, NULL, "--chunks");
    expect(NULL, WORDS("--sums", ON, "status"), 0, WORDS("version"), NULL);
    expect(NULL, WORDS("--server", "grpc://127.0.0.1:1?sums=1", "status"), 2, NULL, "rdma's alone");
    expect(NULL, WORDS(ON, "explain", "--schema", schema_hex, "--part", "999", "--q-heads", "8"), 1,
           NULL, "no part 999");
    expect(NULL, WORDS(ON, "explain", "--schema", schema_hex, "--part", "0"), 2, NULL, "--q-heads");
    expect(NULL,
           WORDS(ON, "explain", "--schema", schema_hex, "--part", "0", "--q-heads", "8", "--rows",
                 "9", "--chunks", "2"),
           2, NULL, "exclude");
}

/* Owners are the published ones (tests/base/place_vectors.txt), and nobody is asked. */
static void test_place(void **state)
{
    (void)state;
    static const char zeros[] = "0000000000000000000000000000000000000000000000000000000000000000";
    static const char ones[] = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff";
    expect(NULL,
           WORDS("--server", "grpc://127.0.0.1:1", "place", "--names", "2,0,1", "--schema", zeros,
                 zeros, ones),
           0, WORDS("0 1\n1 2\n", "2 has 1 of 2\n0 has 0 of 2\n1 has 1 of 2\n"), NULL);
    expect(NULL, WORDS("--json", "place", "--names", "west,east", "--schema", zeros, zeros, ones),
           0, WORDS("{\"blocks\":2,\"owners\":[\"west\",\"east\"]}"), NULL);
    expect(NULL, WORDS("place", "--names", "a,a", "--schema", zeros, zeros), 2, NULL, "twice");
    expect(NULL, WORDS("place", "--names", "a,,b", "--schema", zeros, zeros), 2, NULL, "1 to 255");
    expect(NULL, WORDS("place", "--schema", zeros, zeros), 2, NULL, "--names is missing");
    expect(NULL, WORDS("place", "--names", "a", zeros), 2, NULL, "--schema is missing");
}

static void test_keep(void **state)
{
    (void)state;
    char text[KVC_DIGEST_HEX_BYTES * 2 + 2], hold[17];
    store_put(&shared, 110, 2, KVC_PROMISE_DURABLE);
    kvc_digest_hex(&shared.digests[110], text);
    text[KVC_DIGEST_HEX_BYTES - 1] = '\n';
    kvc_digest_hex(&shared.digests[111], text + KVC_DIGEST_HEX_BYTES);
    expect(text, WORDS(ON, "prefetch", "--schema", schema_hex), 0,
           WORDS("0 values loaded", "4 were there", "0 are missing"), NULL);
    expect(text, WORDS(ON, "--json", "prefetch", "--schema", schema_hex, "--parts", "0-2"), 0,
           WORDS("{\"there\":6,\"moved\":0,\"missing\":0,\"left\":0,\"moved_bytes\":0}"), NULL);
    expect(text, WORDS(ON, "prefetch", "--gpu", "--schema", schema_hex), 1, NULL,
           "this server has no GPU");
    output o = run(text, WORDS(ON, "--json", "hold", "--schema", schema_hex, "--ttl", "90s"));
    assert_int_equal(o.status, 0);
    expect_text(o.out, "\"ttl_ms\":90000,\"blocks\":2");
    const char *name = strstr(o.out, "\"hold\":\"");
    assert_non_null(name);
    (void)snprintf(hold, sizeof(hold), "%.16s", name + 8);
    free(o.out);
    free(o.err);
    expect(NULL, WORDS(ON, "hold", "--renew", hold, "--ttl", "5m"), 0, WORDS(hold, "5m"), NULL);
    expect(NULL, WORDS(ON, "--json", "release", hold), 0, WORDS("{\"released\":1}"), NULL);
    expect(NULL, WORDS(ON, "release", hold), 1, WORDS("0 released"), "NOT_FOUND");
    expect(NULL, WORDS(ON, "hold", "--renew", hold), 1, NULL, "NOT_FOUND");
    expect(NULL, WORDS(ON, "hold", "--renew", "xyz"), 2, NULL, "16 hex digits");
    expect(NULL, WORDS(ON, "hold", "--renew", hold, text), 2, NULL, "no blocks besides");
    expect(text, WORDS(ON, "hold", "--schema", schema_hex, "--parts", "0"), 2, NULL, "every part");
    expect(text, WORDS(ON, "hold", "--schema", schema_hex, "--ttl", "soon"), 2, NULL, "duration");
    expect(NULL, WORDS(ON, "release"), 2, NULL, "which hold");
    expect(NULL, WORDS(ON, "release", hold, "0"), 2, NULL, "nothing was released");
    expect(text, WORDS(ON, "erase", "--schema", schema_hex, "--parts", "0"), 0,
           WORDS("2 values erased (512 KiB)"), NULL);
    expect(text, WORDS(ON, "--json", "erase", "--schema", schema_hex), 0,
           WORDS("{\"values\":4,\"bytes\":81920}"), NULL);
    expect(text, WORDS(ON, "match", "--schema", schema_hex), 0, WORDS("0 of 2"), NULL);
    expect(text, WORDS(ON, "erase", "--schema", schema_hex, "--parts", "77"), 1, NULL, "part 77");
}

static void test_top(void **state)
{
    (void)state;
    expect(NULL, WORDS(ON, "top", "--once", "--interval", "100ms"), 0,
           WORDS("PER SECOND", "rows from dram", "TIER", "dram", "lmdb", "holds 0"), NULL);
    expect(NULL, WORDS(ON, "--json", "top", "-n", "2", "-i", "100ms"), 0,
           WORDS("{\"interval_ms\":1", "\"rates\":{\"requests\":", "}\n{\"interval_ms\":"), NULL);
    expect(NULL, WORDS(ON, "top", "--interval", "1ms"), 2, NULL, "100ms");
    expect(NULL, WORDS(ON, "top", "--count", "0"), 2, NULL, "--count");
    expect(NULL, WORDS(ON, "top", "now"), 2, NULL, "now");
}

/* The number after "key": in a JSON text, behind the first place that says after; else nothing. */
static uint64_t json_number(const char *text, const char *after, const char *key)
{
    char quoted[64];
    (void)snprintf(quoted, sizeof(quoted), "\"%s\":", key);
    expect_text(text, after);
    const char *at = strstr(text, after), *found = at != NULL ? strstr(at, quoted) : NULL;
    if (found == NULL)
        fail_msg("no %s behind '%s' in:\n%s", key, after, text);
    return found != NULL ? strtoull(found + strlen(quoted), NULL, 10) : 0;
}

/* Every case moves what it says, and nothing of it stays. */
static void test_bench(void **state)
{
    (void)state;
    const char *const *small = WORDS(ON, "--json", "bench", "--value-bytes", "16KiB", "--row-bytes",
                                     "256", "--values", "40", "--runs", "3");
    output before = run(NULL, WORDS(ON, "--json", "status"));
    output o = run(NULL, small);
    assert_int_equal(o.status, 0);
    const char *const get = "\"case\":\"get\"", *const rows = "\"case\":\"rows\"";
    assert_int_equal(json_number(o.out, "", "bytes"), 3 * 40 * 16384);
    assert_int_equal(json_number(o.out, get, "bytes"), 3 * 40 * 16384);
    assert_int_equal(json_number(o.out, rows, "bytes"), 3 * 2048 * 256);
    assert_int_equal(json_number(o.out, rows, "unit_bytes"), 256);
    assert_int_equal(json_number(o.out, get, "rows_dram") + json_number(o.out, get, "rows_lmdb"),
                     3 * 40 * 64);
    assert_true(json_number(o.out, "", "bytes_per_s_min") > 0);
    assert_true(json_number(o.out, "", "bytes_per_s_min") <= json_number(o.out, "", "bytes_per_s"));
    assert_true(json_number(o.out, "", "bytes_per_s") <= json_number(o.out, "", "bytes_per_s_max"));
    output after = run(NULL, WORDS(ON, "--json", "status"));
    assert_int_equal(json_number(after.out, "", "values"), json_number(before.out, "", "values"));
    expect(NULL, WORDS(ON, "bench", "--values", "2", "--runs", "1", "--durable", "put"), 0,
           WORDS("| case | who | GB/s | min-max | a second | of the floor | CPU ns/KiB |\n",
                 "| put 1.00 MiB, DURABLE "),
           NULL);
    expect(NULL, WORDS(ON, "bench", "--values", "100", "--runs", "1", "--keep", "walk"), 2, NULL,
           "'walk' is none of put, get, rows");
    expect(NULL, WORDS(ON, "bench", "--row-bytes", "1MiB"), 2, NULL, "64 to 1024 rows");
    expect(NULL, WORDS(ON, "bench", "--row-bytes", "0"), 2, NULL, "--row-bytes wants a size");
    expect(NULL, WORDS(ON, "bench", "--values", "100000"), 2, NULL, "4GiB");
    free(before.out);
    free(before.err);
    free(after.out);
    free(after.err);
    free(o.out);
    free(o.err);
}

/* Opaque values: any length, named by a key; the server is told of the schema by its text. */
static void test_keys(void **state)
{
    (void)state;
    char schema[320], in[320], out[320], hex[KVC_DIGEST_HEX_BYTES], hold[17];
    static const char text[] = "model=m%20x\nopaque=1\nrecipe=engine\nrevision=\ntp_size=1\n";
    static uint8_t bytes[3 << 20];
    kvc_digest digest;
    (void)snprintf(schema, sizeof(schema), "%s/opaque.schema", shared.folder);
    (void)snprintf(in, sizeof(in), "%s/in.bin", shared.folder);
    (void)snprintf(out, sizeof(out), "%s/out.bin", shared.folder);
    write_file(schema, (const uint8_t *)text, sizeof(text) - 1);
    assert_int_equal(kvc_sha256(text, sizeof(text) - 1, &digest), KVC_OK);
    kvc_digest_hex(&digest, hex);
    memset(bytes, 'x', sizeof(bytes));
    write_file(in, bytes, sizeof(bytes));
#define KEY(command, ...) WORDS(ON, command, "--schema", schema, __VA_ARGS__)
    expect(NULL, KEY("put", "--key", "a/b@1", in), 0, WORDS("stored 3145728 bytes"), NULL);
    expect(NULL, KEY("put", "--key", "a/b@1", in), 0, WORDS("first put wins"), NULL);
    expect(NULL, WORDS(ON, "status", "--all"), 0,
           WORDS(hex, "m x, opaque values", "one opaque value       2GiB", "connections  "), NULL);
    char marked[KVC_DIGEST_HEX_BYTES + 32];
    (void)snprintf(marked, sizeof(marked), "\"opaque_schemas\":[\"%s\"]", hex);
    expect(NULL, WORDS(ON, "--json", "status"), 0, WORDS(marked), NULL);
    expect(NULL, WORDS(ON, "doctor"), 0, WORDS("schemas are registered, 1 of them opaque"), NULL);
    expect("", KEY("put", "--key", "empty", "--durable"), 0, WORDS("stored 0 bytes"), NULL);
    expect(NULL, KEY("get", "--key", "a/b@1", out), 0, WORDS("3145728 bytes"), NULL);
    expect(NULL, KEY("get", "--key-hex", "612F624031", out), 0, WORDS("3145728 bytes"), NULL);
    expect(NULL, WORDS(ON, "--json", "get", "--schema", hex, "--key", "empty", out), 0,
           WORDS("\"bytes\":0"), NULL);
    expect(NULL, KEY("match", "--key", "a/b@1", "--key", "none", "--key", "empty"), 0,
           WORDS("2 of 3 values are there", "0 dram", "1 -", "2 dram"), NULL);
    output held = run(NULL, WORDS(ON, "--json", "hold", "--schema", schema, "--ttl", "1h", "--key",
                                  "a/b@1", "--key", "none"));
    assert_int_equal(held.status, 0);
    expect_text(held.out, "\"blocks\":2");
    const char *name = strstr(held.out, "\"hold\":\"");
    assert_non_null(name);
    (void)snprintf(hold, sizeof(hold), "%.16s", name + 8);
    free(held.out);
    free(held.err);
    expect(NULL, KEY("prefetch", "--key", "a/b@1", "--key", "none"), 0,
           WORDS("3 were there", "1 are missing"), NULL);
    expect(NULL, KEY("hold", "--key", "a", hex), 2, NULL, "one place");
    expect(NULL, WORDS(ON, "release", hold), 0, WORDS("1 released"), NULL);
    expect(NULL, KEY("erase", "--key", "a/b@1"), 0, WORDS("3 values erased"), NULL);
    expect(NULL, KEY("get", "--key", "a/b@1", out), 1, NULL, "NOT_FOUND");
    expect(NULL, KEY("get", "--key-hex", "123", out), 2, NULL, "hex digits");
    expect(NULL, KEY("get", "--key", "a", "--part", "0", out), 2, NULL, "--part");
    expect(NULL, KEY("match", "--key", "a", hex), 2, NULL, "one place");
#undef KEY
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_help),        cmocka_unit_test(test_usage),
        cmocka_unit_test(test_nobody),      cmocka_unit_test(test_status),
        cmocka_unit_test(test_match),       cmocka_unit_test(test_match_tokens),
        cmocka_unit_test(test_rows),        cmocka_unit_test(test_doctor),
        cmocka_unit_test(test_doctor_shm),  cmocka_unit_test(test_doctor_gpu),
        cmocka_unit_test(test_schema_file), cmocka_unit_test(test_put_get),
        cmocka_unit_test(test_keys),        cmocka_unit_test(test_keep),
        cmocka_unit_test(test_top),         cmocka_unit_test(test_explain),
        cmocka_unit_test(test_place),       cmocka_unit_test(test_bench),
    };
    return cmocka_run_group_tests(tests, open_shared, close_shared);
}
