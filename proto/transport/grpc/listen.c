/*
 * listen.c: the server end's life: bind, run, drain, close.
 *
 * n_threads completion queues, one thread each ("kvt-grpc-N"); nothing on them blocks. Shutdown
 * goes: refuse new calls, wait for the answers, send clients elsewhere, cancel what is left, wait
 * until gRPC has let go of everything, and only then close the queues.
 */
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/log.h"
#include "grpc_internal.h"

#define THREADS_MAX   64u
#define THREADS_AUTO  4u
#define ARMED_BULK    64u /* request slots per queue of Put and Fetch */
#define ARMED_OTHER   16u
#define ARMED_HEALTH  4u
#define GOODBYE_MS    2000u /* at most, for clients to read the last answer and to close */
#define LEAST_MS      200u  /* the same behind a drain's deadline, and for who watches health */
#define NS_PER_MS     1000000ull
#define PING_MS       500
#define HANDSHAKE_NS  (10ull * 1000000000) /* what listen takes for options that are 0 */
#define KEEPALIVE_NS  (30ull * 1000000000)
#define IDLE_NS       (1800ull * 1000000000)
#define STREAMS_SLACK 256u
#define STREAMS_MAX   100000u

static void run_queue(void *arg)
{
    kvti_serve_queue(arg);
}

static void on_shutdown(kvti_tag *tag, bool ok)
{
    kvt_listener *listener = KVTI_CONTAINER(tag, kvt_listener, shutdown_tag);
    (void)ok;
    kvc_mutex_lock(&listener->mutex);
    listener->gone = true;
    kvc_cond_broadcast(&listener->changed);
    kvc_mutex_unlock(&listener->mutex);
}

static uint32_t threads_wanted(uint32_t n_threads)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    if (n_threads > 0)
        return n_threads < THREADS_MAX ? n_threads : THREADS_MAX;
    if (cores < 1)
        return 1;
    return cores < (long)THREADS_AUTO ? (uint32_t)cores : THREADS_AUTO;
}

/* Fills in what opts leaves at 0. INVALID: not one of ours. */
static kvc_status take_opts(kvt_listener *listener, const kvt_listen_opts *opts,
                            char target_p[KVTI_TARGET_BYTES])
{
    if (opts->size_bytes != sizeof(*opts) || opts->on_call == NULL || opts->uri == NULL)
        return KVC_INVALID;
    if (opts->max_message_bytes > KVC_MAX_VALUE_BYTES)
        return KVC_INVALID;
    listener->opts = *opts;
    listener->opts.uri = NULL;
    if (listener->opts.max_message_bytes == 0)
        listener->opts.max_message_bytes = KVC_MAX_VALUE_BYTES;
    if (listener->opts.max_calls == 0)
        listener->opts.max_calls = KVTI_MAX_CALLS;
    if (listener->opts.max_inflight_bytes == 0)
        listener->opts.max_inflight_bytes = KVTI_MAX_INFLIGHT_BYTES;
    if (listener->opts.max_deadline_ns == 0)
        listener->opts.max_deadline_ns = KVTI_MAX_DEADLINE_NS;
    listener->budget = kvti_budget(&listener->opts, &listener->own_budget);
    listener->opts.n_threads = threads_wanted(opts->n_threads);
    return kvti_grpc_target(opts->uri, target_p);
}

/* Milliseconds for an option of gRPC: at least 1, so that rounding never means "at once". */
static int to_ms(uint64_t ns, uint64_t default_ns)
{
    uint64_t ms = (ns == 0 ? default_ns : ns) / NS_PER_MS;
    return ms == 0 ? 1 : ms > INT_MAX ? INT_MAX : (int)ms;
}

/*
 * What gRPC may take for messages that it receives, those that are in flight with the server
 * included: one quota for all listeners, for the largest that was asked for. Where it comes short,
 * gRPC reads in small pieces, shrinks its windows and gives back what waiting connections have
 * ready for their next message; in the end it breaks off calls.
 */
static pthread_mutex_t quota_lock = PTHREAD_MUTEX_INITIALIZER; /* guards the three below */
static grpc_resource_quota *quota;
static uint64_t quota_bytes;
static uint32_t n_quota_users;

static grpc_resource_quota *hold_quota(uint64_t inflight_bytes)
{
    pthread_mutex_lock(&quota_lock);
    if (n_quota_users++ == 0) {
        quota = grpc_resource_quota_create("kvasir");
        quota_bytes = 0;
    }
    if (quota_bytes < inflight_bytes + KVT_GRPC_READ_BYTES) {
        quota_bytes = inflight_bytes + KVT_GRPC_READ_BYTES;
        grpc_resource_quota_resize(quota, (size_t)quota_bytes);
    }
    pthread_mutex_unlock(&quota_lock);
    return quota;
}

static void put_quota(void)
{
    pthread_mutex_lock(&quota_lock);
    if (--n_quota_users == 0)
        grpc_resource_quota_unref(quota);
    pthread_mutex_unlock(&quota_lock);
}

static grpc_server *create_server(kvt_listener *listener)
{
    const kvt_listen_opts *opts = &listener->opts;
    uint32_t streams =
        opts->max_calls < STREAMS_MAX ? opts->max_calls + STREAMS_SLACK : STREAMS_MAX;
    listener->sockets = kvti_server_sockets_arg(
        (to_ms(opts->keepalive_ns, KEEPALIVE_NS) + 999) / 1000, opts->peers);
    grpc_arg args[] = {
        kvti_arg(GRPC_ARG_ALLOW_REUSEPORT, 0),
        kvti_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH,
                 (int)(opts->max_message_bytes + KVTI_MESSAGE_SLACK_BYTES)),
        kvti_arg(GRPC_ARG_MAX_METADATA_SIZE, KVTI_METADATA_BYTES),
        kvti_arg(GRPC_ARG_MAX_CONCURRENT_STREAMS, (int)streams),
        kvti_arg(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, PING_MS),
        kvti_arg(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1),
        kvti_arg(GRPC_ARG_KEEPALIVE_TIME_MS, INT_MAX), /* the system does that: socket.c */
        kvti_arg(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, to_ms(opts->handshake_ns, HANDSHAKE_NS)),
        kvti_arg(GRPC_ARG_MAX_CONNECTION_IDLE_MS, to_ms(opts->idle_ns, IDLE_NS)),
        kvti_arg(GRPC_ARG_ENABLE_CHANNELZ, 0),
        listener->sockets,
        {.type = GRPC_ARG_POINTER,
         .key = (char *)(uintptr_t)GRPC_ARG_RESOURCE_QUOTA,
         .value.pointer = {hold_quota(listener->budget->max_bytes),
                           grpc_resource_quota_arg_vtable()}},
    };
    grpc_channel_args list = {sizeof(args) / sizeof(args[0]), args};
    return grpc_server_create(&list, NULL);
}

static void register_methods(kvt_listener *listener)
{
    for (int m = 0; m < KVC_METHOD_COUNT; m++)
        listener->methods[m] =
            grpc_server_register_method(listener->server, kvti_method_path((kvc_method)m), NULL,
                                        GRPC_SRM_PAYLOAD_READ_INITIAL_BYTE_BUFFER, 0);
    static const struct {
        int slot;
        const char *path;
    } others[] = {
        {KVTI_HEALTH_CHECK, "/grpc.health.v1.Health/Check"},
        {KVTI_HEALTH_WATCH, "/grpc.health.v1.Health/Watch"},
        {KVTI_REFLECT_V1, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"},
        {KVTI_REFLECT_V1ALPHA, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"},
    };
    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++)
        listener->methods[others[i].slot] = grpc_server_register_method(
            listener->server, others[i].path, NULL, GRPC_SRM_PAYLOAD_READ_INITIAL_BYTE_BUFFER, 0);
}

/* Queues and their threads; on failure the ones made so far are closed by close_queues. */
static kvc_status open_queues(kvt_listener *listener)
{
    listener->queues = calloc(listener->opts.n_threads, sizeof(*listener->queues));
    if (listener->queues == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < listener->opts.n_threads; i++) {
        kvti_queue *queue = &listener->queues[i];
        char name[16];
        (void)snprintf(name, sizeof(name), "kvt-grpc-%u", i % THREADS_MAX);
        queue->listener = listener;
        queue->cq = grpc_completion_queue_create_for_next(NULL);
        listener->n_queues++;
        grpc_server_register_completion_queue(listener->server, queue->cq, NULL);
        kvc_status status = kvc_thread_start(&queue->thread, name, run_queue, queue);
        if (status != KVC_OK)
            return status;
    }
    return KVC_OK;
}

static void close_queues(kvt_listener *listener)
{
    for (uint32_t i = 0; i < listener->n_queues; i++)
        grpc_completion_queue_shutdown(listener->queues[i].cq);
    for (uint32_t i = 0; i < listener->n_queues; i++) {
        if (listener->queues[i].thread.started)
            kvc_thread_join(&listener->queues[i].thread);
        else
            kvti_serve_queue(&listener->queues[i]);
    }
}

static void destroy_queues(kvt_listener *listener)
{
    for (uint32_t i = 0; i < listener->n_queues; i++)
        grpc_completion_queue_destroy(listener->queues[i].cq);
    free(listener->queues);
}

/* gRPC would unlink a socket that another server still answers on. */
static bool unix_socket_in_use(const char *target)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    const char *path = target + strlen("unix:");
    if (strncmp(target, "unix:", 5) != 0 || strlen(path) >= sizeof(addr.sun_path))
        return false;
    memcpy(addr.sun_path, path, strlen(path) + 1);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return false;
    bool in_use = connect(fd, (struct sockaddr *)&addr, sizeof(addr)) == 0 || errno == EAGAIN;
    (void)close(fd);
    return in_use;
}

/* Binds, and writes down the URI under which the listener can be reached. */
static kvc_status bind_port(kvt_listener *listener, const char *uri, const char *target)
{
    if (unix_socket_in_use(target)) {
        KVC_LOG_WARN(GRPC, "cannot listen on %s: another server answers there", uri);
        return KVC_IO;
    }
    grpc_server_credentials *plain = grpc_insecure_server_credentials_create();
    int port = grpc_server_add_http2_port(listener->server, target, plain);
    grpc_server_credentials_release(plain);
    if (port <= 0) {
        KVC_LOG_WARN(GRPC, "cannot listen on %s", uri);
        return KVC_IO;
    }
    if (strncmp(target, "unix:", 5) == 0) {
        (void)snprintf(listener->uri, sizeof(listener->uri), "%s", uri);
    } else {
        int host_len = (int)(strrchr(target, ':') - target);
        (void)snprintf(listener->uri, sizeof(listener->uri), "grpc://%.*s:%d", host_len, target,
                       port);
    }
    listener->opts.uri = listener->uri;
    return KVC_OK;
}

static void arm_all(kvt_listener *listener)
{
    for (uint32_t q = 0; q < listener->n_queues; q++) {
        for (int slot = 0; slot < KVTI_SLOTS; slot++) {
            uint32_t n = slot >= KVC_METHOD_COUNT                         ? ARMED_HEALTH
                         : kvc_method_flags((kvc_method)slot) & KVTI_BULK ? ARMED_BULK
                                                                          : ARMED_OTHER;
            for (uint32_t i = 0; i < n; i++)
                kvti_arm(&listener->queues[q], slot);
        }
    }
}

static kvc_status grpc_listen(const kvt_listen_opts *opts, kvt_listener **listener_p)
{
    char target[KVTI_TARGET_BYTES];
    *listener_p = NULL;
    kvt_init();
    kvt_listener *listener = calloc(1, sizeof(*listener));
    if (listener == NULL)
        return KVC_NO_MEMORY;
    kvc_status status = take_opts(listener, opts, target);
    if (status != KVC_OK)
        goto err_listener;
    grpc_init();
    kvc_mutex_init(&listener->mutex, KVC_RANK_TRANSPORT);
    kvc_cond_init(&listener->changed);
    listener->shutdown_tag.fn = on_shutdown;
    listener->server = create_server(listener);
    register_methods(listener);
    status = open_queues(listener);
    if (status != KVC_OK)
        goto err_queues;
    status = bind_port(listener, opts->uri, target);
    if (status != KVC_OK)
        goto err_queues;
    grpc_server_start(listener->server);
    arm_all(listener);
    *listener_p = listener;
    return KVC_OK;

err_queues:
    close_queues(listener);
    grpc_server_destroy(listener->server);
    kvti_sockets_arg_end(&listener->sockets);
    put_quota();
    destroy_queues(listener);
    kvc_cond_fini(&listener->changed);
    kvc_mutex_fini(&listener->mutex);
    grpc_shutdown();
err_listener:
    free(listener);
    return status;
}

static const char *grpc_listener_uri(const kvt_listener *listener)
{
    return listener->uri;
}

static void grpc_set_serving(kvt_listener *listener, bool serving)
{
    kvc_mutex_lock(&listener->mutex);
    listener->serving = serving && !listener->draining;
    kvc_mutex_unlock(&listener->mutex);
    kvti_watch_publish(listener);
}

/* Waits until no call is in flight; false if deadline_ns came first. */
static bool wait_for_answers(kvt_listener *listener, uint64_t deadline_ns)
{
    kvc_mutex_lock(&listener->mutex);
    while (listener->n_calls > 0 && !kvc_expired(deadline_ns))
        (void)kvc_cond_wait_until(&listener->changed, &listener->mutex, deadline_ns);
    bool done = listener->n_calls == 0;
    kvc_mutex_unlock(&listener->mutex);
    return done;
}

static void wait_until_gone(kvt_listener *listener, uint64_t deadline_ns)
{
    kvc_mutex_lock(&listener->mutex);
    while (!listener->gone && !kvc_expired(deadline_ns))
        (void)kvc_cond_wait_until(&listener->changed, &listener->mutex, deadline_ns);
    kvc_mutex_unlock(&listener->mutex);
}

/* Lets clients read what they were sent, and close: those that watch health do not, nor does one
 * that is silent, for which nobody waits beyond the drain's deadline. */
static void say_goodbye(kvt_listener *listener, uint64_t deadline_ns)
{
    uint64_t least_ns = kvc_deadline_ns(LEAST_MS * NS_PER_MS);
    uint64_t until_ns = kvc_deadline_ns(GOODBYE_MS * NS_PER_MS);
    kvc_mutex_lock(&listener->mutex);
    bool watched = listener->n_watches > 0;
    kvc_mutex_unlock(&listener->mutex);
    if (deadline_ns != 0 && deadline_ns < until_ns)
        until_ns = deadline_ns;
    wait_until_gone(listener, watched || until_ns < least_ns ? least_ns : until_ns);
}

/* Waits for what gRPC has handed over; whatever it hands over after that is dropped. */
static void wait_until_quiet(kvt_listener *listener)
{
    kvc_mutex_lock(&listener->mutex);
    while (listener->n_calls > 0 || listener->n_arriving > 0 || listener->n_reflections > 0)
        kvc_cond_wait(&listener->changed, &listener->mutex);
    listener->closed = true;
    kvc_mutex_unlock(&listener->mutex);
}

static void grpc_drain(kvt_listener *listener, uint64_t deadline_ns)
{
    kvc_mutex_lock(&listener->mutex);
    bool again = listener->draining;
    listener->draining = true;
    listener->serving = false;
    kvc_mutex_unlock(&listener->mutex);
    if (again)
        return;
    kvti_watch_publish(listener);
    bool done = wait_for_answers(listener, deadline_ns);
    if (!done)
        KVC_LOG_WARN(GRPC, "drain: calls still in flight are cancelled");
    /* Only now: this closes the port and tells clients to go elsewhere (GOAWAY). gRPC closes a
       connection that it has told so at once with its last call; a client that is still reading,
       and writes to open its window, then fails with the end of its answer unread. Without calls,
       the connection stays until the client has answered, so has read everything. */
    kvti_give(&listener->shutdown_tag);
    grpc_server_shutdown_and_notify(listener->server, listener->queues[0].cq,
                                    &listener->shutdown_tag);
    if (done)
        say_goodbye(listener, deadline_ns);
    grpc_server_cancel_all_calls(listener->server);
}

static void grpc_listener_close(kvt_listener *listener)
{
    if (listener == NULL)
        return;
    grpc_drain(listener, 1);
    wait_until_gone(listener, 0);
    wait_until_quiet(listener);
    close_queues(listener);
    grpc_server_destroy(listener->server);
    kvti_sockets_arg_end(&listener->sockets);
    put_quota();
    destroy_queues(listener);
    KVC_ASSERT(listener->n_calls == 0 && atomic_load(&listener->own_budget.used_bytes) == 0);
    kvc_cond_fini(&listener->changed);
    kvc_mutex_fini(&listener->mutex);
    free(listener);
    grpc_shutdown();
}

static const char *const schemes[] = {"grpc", "grpc+unix", NULL};

const kvt_ops kvt_grpc_ops = {
    .name = "grpc",
    .schemes = schemes,
    .listen = grpc_listen,
    .listener_uri = grpc_listener_uri,
    .set_serving = grpc_set_serving,
    .drain = grpc_drain,
    .listener_close = grpc_listener_close,
    .reply = kvti_call_reply,
    .send = kvti_call_send,
    .recv = kvti_call_recv,
    .unrecv = kvti_call_unrecv,
    .drop_data = kvti_call_drop_data,
    .connect = kvti_connect,
    .submit = kvti_submit,
    .push = kvti_push,
    .cancel = kvti_cancel,
    .conn_close = kvti_conn_close,
};
