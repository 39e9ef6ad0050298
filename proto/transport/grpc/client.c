/*
 * client.c: a connection: its channels, its completion queue and the thread on it ("kvc-prog").
 *
 * Channels do not share a socket: each has its own subchannel pool, so that bulk can be striped.
 * conn->mutex guards the list of transfers; no call into gRPC is made under it.
 */
#include <stdlib.h>

#include "base/assert.h"
#include "base/log.h"
#include "grpc_internal.h"

#define CHANNELS_MAX     64u
#define CHANNEL_ARG      "kvasir.channel"
#define BACKOFF_FIRST_MS 100
#define BACKOFF_MIN_MS   2000 /* also the time that one attempt to connect gets */
#define BACKOFF_MAX_MS   2000
#define KEEPALIVE_MS     10000
#define KEEPALIVE_OUT_MS 5000

static void run_conn(void *arg)
{
    kvt_conn *conn = arg;
    kvti_run_queue(conn->cq);
}

static grpc_channel *create_channel(const char *target, uint32_t i, uint32_t max_message_bytes)
{
    grpc_arg args[] = {
        kvti_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH,
                 (int)(max_message_bytes + KVTI_MESSAGE_SLACK_BYTES)),
        kvti_arg(GRPC_ARG_MAX_METADATA_SIZE, KVTI_METADATA_BYTES),
        kvti_arg(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1),
        kvti_arg(CHANNEL_ARG, (int)i),
        kvti_arg(GRPC_ARG_ENABLE_HTTP_PROXY, 0),
        kvti_arg(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1),
        kvti_arg(GRPC_ARG_ENABLE_RETRIES, 0),
        kvti_arg(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, BACKOFF_FIRST_MS),
        kvti_arg(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, BACKOFF_MIN_MS),
        kvti_arg(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, BACKOFF_MAX_MS),
        kvti_arg(GRPC_ARG_KEEPALIVE_TIME_MS, KEEPALIVE_MS),
        kvti_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, KEEPALIVE_OUT_MS),
        kvti_arg(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0),
        kvti_arg(GRPC_ARG_ENABLE_CHANNELZ, 0),
    };
    grpc_channel_args list = {sizeof(args) / sizeof(args[0]), args};
    grpc_channel_credentials *plain = grpc_insecure_credentials_create();
    grpc_channel *channel = grpc_channel_create(target, plain, &list);
    grpc_channel_credentials_release(plain);
    return channel;
}

static void open_channels(kvt_conn *conn, const char *target, uint32_t max_message_bytes)
{
    for (uint32_t i = 0; i < conn->n_channels; i++) {
        kvti_channel *channel = &conn->channels[i];
        channel->channel = create_channel(target, i, max_message_bytes);
        for (int m = 0; m < KVC_METHOD_COUNT; m++)
            channel->methods[m] = grpc_channel_register_call(
                channel->channel, kvti_method_path((kvc_method)m), NULL, NULL);
    }
    conn->poster = grpc_channel_create_registered_call(
        conn->channels[0].channel, NULL, GRPC_PROPAGATE_DEFAULTS, conn->cq,
        conn->channels[0].methods[KVC_STATS], gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
}

kvc_status kvti_connect(const kvt_connect_opts *opts, kvt_conn **conn_p)
{
    char target[KVTI_TARGET_BYTES];
    *conn_p = NULL;
    kvt_init();
    if (opts->size_bytes != sizeof(*opts) || opts->uri == NULL || opts->n_channels > CHANNELS_MAX ||
        opts->max_message_bytes > KVC_MAX_VALUE_BYTES)
        return KVC_INVALID;
    kvc_status status = kvti_grpc_target(opts->uri, target);
    if (status != KVC_OK)
        return status;
    kvt_conn *conn = calloc(1, sizeof(*conn));
    if (conn == NULL)
        return KVC_NO_MEMORY;
    conn->n_channels = opts->n_channels == 0 ? 1 : opts->n_channels;
    conn->channels = calloc(conn->n_channels, sizeof(*conn->channels));
    status = KVC_NO_MEMORY;
    if (conn->channels == NULL)
        goto err_conn;
    grpc_init();
    conn->cq = grpc_completion_queue_create_for_next(NULL);
    kvc_mutex_init(&conn->mutex, KVC_RANK_TRANSPORT);
    kvc_cond_init(&conn->idle);
    status = kvc_thread_start(&conn->thread, "kvc-prog", run_conn, conn);
    if (status != KVC_OK)
        goto err_cq;
    open_channels(conn, target,
                  opts->max_message_bytes == 0 ? KVC_MAX_VALUE_BYTES : opts->max_message_bytes);
    *conn_p = conn;
    return KVC_OK;

err_cq:
    kvc_cond_fini(&conn->idle);
    kvc_mutex_fini(&conn->mutex);
    grpc_completion_queue_shutdown(conn->cq);
    kvti_run_queue(conn->cq);
    grpc_completion_queue_destroy(conn->cq);
    grpc_shutdown();
    free(conn->channels);
err_conn:
    free(conn);
    return status;
}

void kvti_conn_close(kvt_conn *conn)
{
    if (conn == NULL)
        return;
    kvc_mutex_lock(&conn->mutex);
    conn->closed = true;
    kvc_mutex_unlock(&conn->mutex);
    kvti_cancel_all(conn);
    kvc_mutex_lock(&conn->mutex);
    while (conn->n_starting > 0)
        kvc_cond_wait(&conn->idle, &conn->mutex);
    kvc_mutex_unlock(&conn->mutex);
    /* Closes the sockets, so that a peer that does not read cannot keep a transfer's bytes. */
    for (uint32_t i = 0; i < conn->n_channels; i++)
        grpc_channel_destroy(conn->channels[i].channel);
    kvc_mutex_lock(&conn->mutex);
    while (conn->n_xfers > 0)
        kvc_cond_wait(&conn->idle, &conn->mutex);
    kvc_mutex_unlock(&conn->mutex);
    grpc_call_unref(conn->poster);
    grpc_completion_queue_shutdown(conn->cq);
    kvc_thread_join(&conn->thread);
    grpc_completion_queue_destroy(conn->cq);
    kvc_cond_fini(&conn->idle);
    kvc_mutex_fini(&conn->mutex);
    free(conn->channels);
    free(conn);
    grpc_shutdown();
}
