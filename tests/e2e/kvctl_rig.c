/*
 * kvctl_rig.c: see kvctl_rig.h.
 */
#include "kvctl_rig.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>

store shared;
char digests_path[300], schema_hex[KVC_DIGEST_HEX_BYTES];

char *read_all(const char *path)
{
    FILE *stream = fopen(path, "re");
    assert_non_null(stream);
    char *text = calloc(1, 4 << 20);
    assert_non_null(text);
    size_t n = fread(text, 1, (4 << 20) - 1, stream);
    text[n] = '\0';
    (void)fclose(stream);
    (void)unlink(path);
    return text;
}

/* Runs kvctl with these words (NULL-terminated), input as its standard input. */
output run(const char *input, const char *const *words)
{
    char *argv[32] = {(char *)KVCTL_PATH}, in[320], out[320], err[320];
    posix_spawn_file_actions_t actions;
    output result;
    pid_t pid;
    for (int i = 0; words[i] != NULL; i++)
        argv[i + 1] = (char *)words[i];
    (void)snprintf(in, sizeof(in), "%s/in", shared.folder);
    (void)snprintf(out, sizeof(out), "%s/out", shared.folder);
    (void)snprintf(err, sizeof(err), "%s/err", shared.folder);
    support_write_file(in, input != NULL ? input : "");
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, in, O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 1, out, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_addopen(&actions, 2, err, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    assert_int_equal(posix_spawn(&pid, KVCTL_PATH, &actions, NULL, argv, environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    assert_int_equal(waitpid(pid, &result.status, 0), pid);
    assert_true(WIFEXITED(result.status));
    result.status = WEXITSTATUS(result.status);
    result.out = read_all(out);
    result.err = read_all(err);
    (void)unlink(in);
    return result;
}

void expect_text(const char *text, const char *wanted)
{
    if (strstr(text, wanted) == NULL)
        fail_msg("'%s' is not in:\n%s", wanted, text);
}

/* Runs, checks the exit status and that each text (NULL-terminated) is in the output; frees. */
void expect(const char *input, const char *const *words, int status, const char *const *out,
            const char *err)
{
    output o = run(input, words);
    if (o.status != status)
        fail_msg("exit status %d, wanted %d\n%s%s", o.status, status, o.out, o.err);
    for (int i = 0; out != NULL && out[i] != NULL; i++)
        expect_text(o.out, out[i]);
    if (err != NULL)
        expect_text(o.err, err);
    free(o.out);
    free(o.err);
}

int open_shared(void **state)
{
    (void)state;
    store_open(&shared, "32MiB", true);
    store_put(&shared, 0, 8, KVC_PROMISE_DURABLE);
    kvc_digest_hex(&shared.schema, schema_hex);
    (void)snprintf(digests_path, sizeof(digests_path), "%s/digests", shared.folder);
    FILE *stream = fopen(digests_path, "we");
    for (uint32_t i = 0; i < 10; i++) {
        char hex[KVC_DIGEST_HEX_BYTES];
        kvc_digest_hex(&shared.digests[i], hex);
        (void)fprintf(stream, "%s\n", hex);
    }
    return fclose(stream);
}

int close_shared(void **state)
{
    (void)state;
    store_close(&shared);
    return 0;
}
