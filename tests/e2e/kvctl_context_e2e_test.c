/*
 * kvctl_context_e2e_test.c: kvctl context against a real cachesvc: files, and contexts by name.
 */
#include "kvctl_rig.h"

#include <signal.h>

/* Writes the first n bytes of a file to another, with the byte at flip changed where it is below n.
 */
static void copy_file(const char *from, const char *to, size_t n, size_t flip)
{
    FILE *in = fopen(from, "re"), *out = fopen(to, "we");
    assert_non_null(in);
    assert_non_null(out);
    for (size_t i = 0; i < n; i++) {
        int byte = fgetc(in);
        if (byte == EOF)
            break;
        (void)fputc(i == flip ? byte ^ 1 : byte, out);
    }
    (void)fclose(in);
    assert_int_equal(fclose(out), 0);
}

/* The eight blocks that the other tests count on leave and come back. */
static void test_context_file(void **state)
{
    (void)state;
    char schema[320], file[320], bad[320];
    (void)snprintf(schema, sizeof(schema), "%s/context.schema", shared.folder);
    (void)snprintf(file, sizeof(file), "%s/context.file", shared.folder);
    (void)snprintf(bad, sizeof(bad), "%s/context.bad", shared.folder);
    store_write_schema(schema);
#define CONTEXT(...) WORDS(ON, "context", __VA_ARGS__)
#define ERASE(part)                                                                                \
    WORDS(ON, "erase", "--schema", schema_hex, "--parts", part, "--digests", digests_path)
    expect(NULL, CONTEXT("export", "--schema", schema, "--digests", digests_path, "--out", file), 0,
           WORDS("exported: 10 blocks, 24 values, 6 missing"), NULL);
    expect(NULL, WORDS("context", "check", file), 0,
           WORDS("whole: 10 blocks, 24 values, 6 missing"), NULL);
    expect(NULL, CONTEXT("import", file), 0, WORDS("0 stored, 24 were there"), NULL);
    expect(NULL, ERASE("0"), 0, WORDS("8 values erased"), NULL);
    expect(NULL, CONTEXT("import", "--durable", file), 0, WORDS("8 stored, 16 were there"), NULL);
    kvc_context *context = store_context(&shared, shared.client, 8);
    kvc_fetch_info info;
    store_expect(&shared, context, 8 * STORE_BLOCK_TOKENS, &info);
    kvc_context_close(context);
    /* Altered near its end, or cut off there: nothing of it is stored. */
    expect(NULL, ERASE("2"), 0, WORDS("8 values erased"), NULL);
    copy_file(file, bad, SIZE_MAX, (size_t)7 * 64 * (4096 + 512 + 128));
    expect(NULL, CONTEXT("import", bad), 1, NULL, "CORRUPT: a value's sum is wrong");
    copy_file(file, bad, (size_t)7 * 64 * (4096 + 512 + 128), SIZE_MAX);
    expect(NULL, CONTEXT("import", bad), 1, NULL, "PROTOCOL: the file is cut off");
    expect(NULL, CONTEXT("check", digests_path), 1, NULL, "PROTOCOL: it is not a context file");
    expect(NULL,
           WORDS(ON, "match", "--schema", schema_hex, "--parts", "2", "--digests", digests_path), 0,
           WORDS("0 of 10"), NULL);
    expect(NULL, WORDS(ON, "--json", "context", "import", file), 0,
           WORDS("\"values\":24,\"missing\":6,\"stored\":8,\"existed\":16"), NULL);
    /* Token ids travel with it, and must be those of the digests. */
    char ids[64 * 8] = "";
    for (int i = 0; i < 70; i++)
        (void)snprintf(ids + strlen(ids), sizeof(ids) - strlen(ids), "%d ", i);
    expect(ids,
           WORDS(ON, "--json", "context", "export", "--schema", schema, "--parts", "1", "--tokens",
                 "-", "--out", file),
           0, WORDS("\"blocks\":1,\"tokens\":70"), NULL);
    expect(NULL, WORDS("context", "check", file), 0, WORDS("whole:"), NULL);
    expect(NULL,
           CONTEXT("export", "--schema", schema_hex, "--digests", digests_path, "--out", file), 2,
           NULL, "needs a file as --schema");
    expect(NULL, CONTEXT("export", "--schema", schema, "--digests", digests_path), 2, NULL,
           "--out");
    expect(NULL, CONTEXT("import"), 2, NULL, "one file");
    expect(NULL, CONTEXT("import", "/nowhere/at/all"), 2, NULL, "/nowhere/at/all");
    expect(NULL, CONTEXT("melt"), 2, NULL, "not 'melt'");
    expect(NULL, WORDS(ON, "context"), 2, NULL, "export, import, check, save, restore, list or rm");
    (void)unlink(schema);
    (void)unlink(file);
    (void)unlink(bad);
}

/* 70 token ids: a block and a tail of 6, whose rows of part 1 have 512 bytes each. */
static void test_context_saved(void **state)
{
    (void)state;
    char tail[320], digests[320], ids_path[320], back[320], ids[64 * 8] = "", rows[6 * 512 + 1];
    (void)snprintf(tail, sizeof(tail), "%s/saved.tail", shared.folder);
    (void)snprintf(digests, sizeof(digests), "%s/saved.digests", shared.folder);
    (void)snprintf(ids_path, sizeof(ids_path), "%s/saved.ids", shared.folder);
    (void)snprintf(back, sizeof(back), "%s/saved.back", shared.folder);
    for (int i = 0; i < 70; i++)
        (void)snprintf(ids + strlen(ids), sizeof(ids) - strlen(ids), "%d\n", i);
    for (size_t i = 0; i < sizeof(rows); i++)
        rows[i] = i + 1 == sizeof(rows) ? '\0' : (char)('a' + i % 23);
    support_write_file(tail, rows);
#define SAVE(...)                                                                                  \
    WORDS(ON, "context", "save", "chat/1", "--schema", schema_hex, "--block-tokens", "64",         \
          "--tokens", "-", "--tail", tail, "--durable", __VA_ARGS__)
    expect(NULL, CONTEXT("list"), 0, NULL, NULL);
    expect(ids, SAVE("--parts", "1"), 0, WORDS("saved: chat/1", "1 blocks, 6 tokens"), NULL);
    expect(ids, SAVE("--parts", "1"), 1, NULL, "EXISTS");
    expect(ids, SAVE("--parts", "1", "--generation", "7"), 1, NULL, "EXISTS");
    expect(ids, SAVE("--parts", "1", "--replace"), 0, WORDS("saved: chat/1"), NULL);
    expect(ids, SAVE("--parts", "0", "--replace"), 1, NULL, "INVALID");
    expect(ids, SAVE("--parts", "1", "--replace", "--generation", "7"), 2, NULL, "either");
    expect(ids, SAVE("--replace"), 2, NULL, "--tail needs --parts");
    expect(NULL, CONTEXT("list"), 0, WORDS("chat/1", "1 blocks", "6 tail", "durable"), NULL);
    expect(NULL, WORDS(ON, "--json", "context", "list"), 0,
           WORDS("{\"contexts\":[{\"name\":\"chat/1\"", "\"bytes\":3384", "\"durable\":true"),
           NULL);
    expect(NULL,
           CONTEXT("restore", "chat/1", "--tokens-out", ids_path, "--digests-out", digests,
                   "--tail-out", back),
           0, WORDS("1 blocks, 70 token ids", "3072 bytes", "all blocks are there"), NULL);
    char *text = read_all(ids_path);
    assert_string_equal(text, ids);
    free(text);
    text = read_all(back);
    assert_string_equal(text, rows);
    free(text);
    expect(NULL, WORDS(ON, "match", "--schema", schema_hex, "--digests", digests), 0,
           WORDS("1 of 1"), NULL);
    expect(NULL,
           CONTEXT("save", "eight", "--schema", schema_hex, "--digests", digests_path, "--durable"),
           0, WORDS("10 blocks, 0 tokens"), NULL);
    expect(NULL, WORDS(ON, "--json", "context", "restore", "eight"), 0,
           WORDS("\"blocks\":10,\"hits\":8", "\"tokens\":0"), NULL);
    expect(NULL, CONTEXT("restore", "eight"), 0, WORDS("block 8 is missing: 8 of 10"), NULL);
    expect(NULL, CONTEXT("restore", "eight", "--tail-out", "/nowhere/at/all"), 1, NULL,
           "/nowhere/at/all");
    expect(NULL, CONTEXT("rm", "chat/1", "--generation", "5"), 1, NULL, "EXISTS");
    expect(NULL, CONTEXT("rm", "chat/1"), 0, WORDS("removed: chat/1"), NULL);
    expect(NULL, CONTEXT("rm", "chat/1"), 1, NULL, "NOT_FOUND");
    expect(NULL, WORDS(ON, "--json", "context", "rm", "eight"), 0, WORDS("\"removed\":\"eight\""),
           NULL);
    expect(NULL, CONTEXT("restore", "eight"), 1, NULL, "NOT_FOUND");
    expect(NULL, CONTEXT("restore", "a b"), 1, NULL, "INVALID");
    expect(NULL, CONTEXT("restore"), 2, NULL, "one name");
    expect(NULL, CONTEXT("save"), 2, NULL, "a name");
    expect(NULL, CONTEXT("list", "x"), 2, NULL, "no words");
    (void)unlink(tail);
    (void)unlink(digests);
}

/* A server that knows nothing gets schema, values, token ids and tail from one file. */
static void test_context_moves(void **state)
{
    (void)state;
    static store fresh;
    char schema[320], tail[320], file[320], ids[64 * 8] = "", rows[6 * 512 + 1];
    (void)snprintf(schema, sizeof(schema), "%s/move.schema", shared.folder);
    (void)snprintf(tail, sizeof(tail), "%s/move.tail", shared.folder);
    (void)snprintf(file, sizeof(file), "%s/move.file", shared.folder);
    for (int i = 0; i < 70; i++)
        (void)snprintf(ids + strlen(ids), sizeof(ids) - strlen(ids), "%d\n", i);
    memset(rows, 'r', sizeof(rows) - 1);
    rows[sizeof(rows) - 1] = '\0';
    store_write_schema(schema);
    support_write_file(tail, rows);
#define EXPORT(...)                                                                                \
    CONTEXT("export", "--schema", schema, "--tokens", "-", "--tail", tail, "--out", file,          \
            __VA_ARGS__)
    expect(ids, EXPORT("--parts", "0"), 2, NULL, "--tail has 3072 bytes");
    expect(ids, EXPORT("--parts", "1"), 0, WORDS("exported: 1 blocks, 1 values"), NULL);
    store_open(&fresh, "16MiB", false);
    kvc_client_close(fresh.client); /* or it would register the schema again */
    fresh.client = NULL;
    store_end(&fresh, SIGKILL);
    store_start(&fresh);
#define FRESH(...) WORDS("--server", fresh.tcp_uri, "context", __VA_ARGS__)
    expect(NULL, FRESH("import", "--save", "moved", "--durable", file), 1, NULL, "UNSUPPORTED");
    expect(NULL, FRESH("import", "--save", "moved", file), 0, WORDS("1 stored"), NULL);
    expect(NULL, FRESH("import", "--save", "moved", file), 1, NULL, "EXISTS");
    expect(NULL, FRESH("import", "--save", "moved", "--replace", file), 0, WORDS("1 were there"),
           NULL);
    expect(NULL, FRESH("restore", "moved", "--parts", "1", "--tail-out", tail), 0,
           WORDS("1 blocks, 70 token ids", "6 tokens with 3072 bytes", "all blocks are there"),
           NULL);
    char *text = read_all(tail);
    assert_string_equal(text, rows);
    free(text);
    store_close(&fresh);
    (void)unlink(schema);
    (void)unlink(file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_context_file),
        cmocka_unit_test(test_context_saved),
        cmocka_unit_test(test_context_moves),
    };
    return cmocka_run_group_tests(tests, open_shared, close_shared);
}
