/*
 * client.c: opening and closing a client.
 *
 * Open connects and exchanges limits before any thread runs; close refuses new calls, cancels the
 * others, waits until each has completed and its callback has returned, then stops the threads and
 * closes the link.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "map.h"

#define RETRY_PAUSE_NS (20ull * 1000000)

/* What a URI asks for behind its '?', which is cut off: sums=1 or sums=0, of rdma:// only. */
static kvc_status parse_options(char *uri, int8_t *sums_p)
{
    char *options = strchr(uri, '?');
    if (options == NULL)
        return KVC_OK;
    *options++ = '\0';
    if (strcmp(options, "sums=1") != 0 && strcmp(options, "sums=0") != 0)
        return kvci_fail(KVC_INVALID,
                         "client: '%s' is no option of a URI: there are sums=1 and sums=0",
                         options);
    if (strncmp(uri, "rdma://", 7) != 0)
        return kvci_fail(KVC_INVALID, "client: '%s' takes no %s, which is rdma's alone", uri,
                         options);
    *sums_p = options[5] == '1' ? 1 : -1;
    return KVC_OK;
}

/* Splits the list in place; every URI must have a transport. */
static kvc_status parse_uris(kvc_client *client, const char *uris)
{
    client->uri_text = strdup(uris);
    if (client->uri_text == NULL)
        return kvci_fail(KVC_NO_MEMORY, "client: no memory");
    char *rest = client->uri_text, *uri;
    while ((uri = strsep(&rest, ",")) != NULL) {
        uri += strspn(uri, " \t");
        uri[strcspn(uri, " \t")] = '\0';
        if (*uri == '\0')
            continue;
        if (client->n_uris == KVCI_MAX_URIS)
            return kvci_fail(KVC_INVALID, "client: more than %u URIs", KVCI_MAX_URIS);
        if (strstr(uri, "://") == NULL)
            return kvci_fail(KVC_INVALID, "client: '%s' is not a URI such as grpc://host:port",
                             uri);
        kvc_status status = parse_options(uri, &client->uri_sums[client->n_uris]);
        if (status != KVC_OK)
            return status;
        if (kvt_find(uri) == NULL)
            return kvci_fail(KVC_UNSUPPORTED, "client: no transport is built in for '%s'", uri);
        client->uris[client->n_uris++] = uri;
    }
    if (client->n_uris == 0)
        return kvci_fail(KVC_INVALID, "client: no URI given");
    return KVC_OK;
}

static void init_state(kvc_client *client)
{
    kvc_mutex_init(&client->lock, KVC_RANK_CLIENT);
    kvc_cond_init(&client->prog_cond);
    kvc_cond_init(&client->keeper_cond);
    kvc_cond_init(&client->done_cond);
    kvci_node *const heads[] = {&client->lanes[0],     &client->lanes[1], &client->timed,
                                &client->wait_link,    &client->reopens,  &client->calls,
                                &client->wait_context, &client->finished, &client->pool};
    for (size_t i = 0; i < sizeof(heads) / sizeof(heads[0]); i++)
        kvci_list_init(heads[i]);
    client->next_due_ns = UINT64_MAX;
    client->sweep_due_ns = UINT64_MAX;
    kvci_ways_init(client);
    client->seed = kvc_now_ns() | 1;
}

/* Tries the URIs again and again: a server that is just starting is worth the wait. */
static kvc_status first_link(kvc_client *client)
{
    uint64_t deadline_ns = kvc_now_ns() + client->connect_timeout_ns;
    for (;;) {
        kvc_status status = kvci_relink(client, deadline_ns);
        uint64_t now_ns = kvc_now_ns();
        bool absent = status == KVC_UNAVAILABLE || status == KVC_CLOSED || status == KVC_AGAIN;
        if (!absent || now_ns + RETRY_PAUSE_NS >= deadline_ns)
            return status == KVC_CLOSED || status == KVC_AGAIN ? KVC_UNAVAILABLE : status;
        struct timespec pause = {.tv_nsec = (long)RETRY_PAUSE_NS};
        (void)nanosleep(&pause, NULL);
    }
}

static void free_client(kvc_client *client)
{
    free(client->left);
    for (kvci_node *node = client->pool.next, *next; node != &client->pool; node = next) {
        kvci_call *call = (kvci_call *)node;
        next = node->next;
        free(call->scratch);
        free(call);
    }
    for (uint32_t i = 0; i < client->n_schemas; i++)
        free(client->schemas[i].schema);
    kvc_cond_fini(&client->prog_cond);
    kvc_cond_fini(&client->keeper_cond);
    kvc_cond_fini(&client->done_cond);
    kvc_mutex_fini(&client->lock);
    free(client->uri_text);
    free(client);
}

static void stop_threads(kvc_client *client)
{
    kvc_mutex_lock(&client->lock);
    client->stopping = true;
    kvc_cond_broadcast(&client->prog_cond);
    kvc_cond_broadcast(&client->keeper_cond);
    kvc_mutex_unlock(&client->lock);
    kvc_thread_join(&client->keeper);
    kvc_thread_join(&client->prog);
}

bool kvci_take_sized(void *struct_p, const void *callers, size_t first_bytes, size_t now_bytes)
{
    size_t size_bytes;
    memcpy(&size_bytes, callers, sizeof(size_bytes));
    if (size_bytes < first_bytes || size_bytes > now_bytes || size_bytes % sizeof(uint64_t) != 0)
        return false;
    memset(struct_p, 0, now_bytes);
    memcpy(struct_p, callers, size_bytes);
    return true;
}

kvc_status kvc_client_open(const kvc_client_opts *opts, kvc_client **client_p)
{
    kvc_client_opts taken;
    *client_p = NULL;
    if (!kvci_take_sized(&taken, opts, offsetof(kvc_client_opts, sums), sizeof(taken)))
        return kvci_fail(KVC_INVALID, "client: size_bytes is not that of kvc_client_opts");
    opts = &taken;
    if (opts->uris == NULL)
        return kvci_fail(KVC_INVALID, "client: uris is NULL");
    kvt_init();
    kvc_client *client = calloc(1, sizeof(*client));
    if (client == NULL)
        return kvci_fail(KVC_NO_MEMORY, "client: no memory");
    init_state(client);
    client->connect_timeout_ns =
        opts->connect_timeout_ns != 0 ? opts->connect_timeout_ns : KVCI_CONNECT_TIMEOUT_NS;
    client->reopen_timeout_ns = KVCI_REOPEN_TIMEOUT_NS;
    client->default_timeout_ns =
        opts->default_timeout_ns != 0 ? opts->default_timeout_ns : KVCI_DEFAULT_TIMEOUT_NS;
    client->n_channels = opts->n_channels != 0 ? opts->n_channels : 2;
    client->sums = opts->sums != 0;
    client->region_bytes = opts->region_bytes;
    kvc_status status = parse_uris(client, opts->uris);
    if (status != KVC_OK)
        goto err_free;
    status = first_link(client);
    if (status != KVC_OK)
        goto err_free;
    client->limits_at_open = client->limits;
    status = kvc_thread_start(&client->prog, "kvc-prog", kvci_progress_main, client);
    if (status == KVC_OK)
        status = kvc_thread_start(&client->keeper, "kvc-link", kvci_keeper_main, client);
    if (status != KVC_OK) {
        (void)kvci_fail(status, "client: no thread can be started");
        goto err_stop;
    }
    *client_p = client;
    return KVC_OK;
err_stop:
    stop_threads(client);
    kvci_link_close(client->link);
err_free:
    free_client(client);
    return status;
}

void kvc_client_close(kvc_client *client)
{
    if (client == NULL)
        return;
    kvci_map_goodbye(client);
    kvc_mutex_lock(&client->lock);
    client->closing = true;
    for (kvci_node *node = client->calls.next, *next; node != &client->calls; node = next) {
        next = node->next;
        kvci_call_cancel(client, (kvci_call *)node);
    }
    while (client->live > 0 || client->waiters > 0 || client->pumpers > 0)
        kvc_cond_wait(&client->done_cond, &client->lock);
    kvc_mutex_unlock(&client->lock);
    stop_threads(client);
    kvci_link_close(client->link);
    kvci_epoch_unref(client->epoch);
    free_client(client);
}

const kvc_limits *kvc_client_limits(const kvc_client *client)
{
    return &client->limits_at_open;
}

bool kvc_client_sums(kvc_client *client)
{
    kvc_mutex_lock(&client->lock);
    bool sums = client->link != NULL && client->link->sums;
    kvc_mutex_unlock(&client->lock);
    return sums;
}

kvc_limits kvci_limits(kvc_client *client)
{
    kvc_mutex_lock(&client->lock);
    kvc_limits limits = client->limits;
    kvc_mutex_unlock(&client->lock);
    return limits;
}

uint32_t kvci_target_bytes(const kvc_client *client, uint64_t bytes, uint32_t max_bytes)
{
    uint64_t share_bytes = bytes / client->n_channels + (bytes % client->n_channels != 0);
    if (share_bytes < KVCI_STRIPE_MIN_BYTES)
        share_bytes = KVCI_STRIPE_MIN_BYTES;
    return share_bytes < max_bytes ? (uint32_t)share_bytes : max_bytes;
}
