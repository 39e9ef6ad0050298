/*
 * fake_rig.c: see fake_rig.h.
 */
#include "fake_rig.h"

#include <signal.h>

void fake_rig(rig *r, kvc_client *client)
{
    rig_init(r, "esa", FAKE_TOKENS);
    r->opts.client = client;
    r->opts.way = rig_rows_way(client);
    r->opts.backend = "cuda:0";
    r->opts.dtype = KVK_BF16;
    r->opts.head_dim = 64;
    r->opts.index = KVW_INDEX_COMPRESSED;
    r->opts.residency_slots = 48;
    r->opts.max_tokens = FAKE_TOKENS;
    rig_project(r, FAKE_DIMS);
}

int open_served(void **state)
{
    char uri[400];
    served *s = calloc(1, sizeof(*s));
    assert_non_null(s);
    support_make_folder(s->folder, sizeof(s->folder));
    char *whole = realpath(s->folder, NULL);
    assert_non_null(whole);
    (void)snprintf(uri, sizeof(uri), "shm://%s/shm.sock", whole);
    free(whole);
    const char *args[] = {"--listen", uri, "--dram-bytes", "256MiB", NULL};
    assert_true(support_daemon_start(&s->daemon, s->folder, args));
    const kvc_client_opts opts = {
        .size_bytes = sizeof(opts), .uris = uri, .connect_timeout_ns = SUPPORT_PATIENCE_NS};
    assert_ok(kvc_client_open(&opts, &s->client));
    *state = s;
    return 0;
}

int close_served(void **state)
{
    served *s = *state;
    kvc_client_close(s->client);
    (void)support_daemon_stop(&s->daemon, SIGTERM);
    support_remove_folder(s->folder);
    free(s);
    return 0;
}
