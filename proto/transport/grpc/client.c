/*
 * client.c: a connection: its channels, its completion queues and their threads ("kvc-grpc-N").
 *
 * Channels do not share a socket: each has its own subchannel pool, so that bulk can be striped.
 * One thread copies some 3 GB/s, so channels are spread over several queues where there are cores.
 * conn->mutex guards the list of transfers; no call into gRPC is made under it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/assert.h"
#include "base/log.h"
#include "grpc_internal.h"

#define CHANNELS_MAX     64u
#define LANES_AUTO       8u
#define CHANNEL_ARG      "kvasir.channel"
#define BACKOFF_FIRST_MS 100
#define CONNECT_MS       10000 /* what one attempt gets: a busy server may not run for seconds */
#define BACKOFF_MAX_MS   2000
#define KEEPALIVE_MS     10000
#define KEEPALIVE_OUT_MS 5000

static void run_lane(void *arg)
{
    kvti_lane *lane = arg;
    kvti_run_queue(lane->cq);
}

/* Half of the cores, since the peer or the caller's own work has the rest; never more than there
 * are channels. */
static uint32_t lanes_wanted(uint32_t n_threads, uint32_t n_channels)
{
    if (n_threads == 0) {
        long cores = sysconf(_SC_NPROCESSORS_ONLN);
        n_threads = cores < 4 ? 1 : (uint32_t)cores / 2;
        n_threads = n_threads < LANES_AUTO ? n_threads : LANES_AUTO;
    }
    return n_threads < n_channels ? n_threads : n_channels;
}

/* On failure those made so far are closed by close_lanes. */
static kvc_status open_lanes(kvt_conn *conn, uint32_t n)
{
    conn->lanes = calloc(n, sizeof(*conn->lanes));
    if (conn->lanes == NULL)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        char name[16];
        (void)snprintf(name, sizeof(name), "kvc-grpc-%u", i % CHANNELS_MAX);
        conn->lanes[i].cq = grpc_completion_queue_create_for_next(NULL);
        conn->n_lanes++;
        kvc_status status =
            kvc_thread_start(&conn->lanes[i].thread, name, run_lane, &conn->lanes[i]);
        if (status != KVC_OK)
            return status;
    }
    return KVC_OK;
}

static void close_lanes(kvt_conn *conn)
{
    for (uint32_t i = 0; i < conn->n_lanes; i++) {
        kvti_lane *lane = &conn->lanes[i];
        grpc_completion_queue_shutdown(lane->cq);
        if (lane->thread.started)
            kvc_thread_join(&lane->thread);
        else
            kvti_run_queue(lane->cq);
        grpc_completion_queue_destroy(lane->cq);
    }
    free(conn->lanes);
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
        kvti_arg(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, CONNECT_MS),
        kvti_arg(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, BACKOFF_MAX_MS),
        kvti_arg(GRPC_ARG_KEEPALIVE_TIME_MS, KEEPALIVE_MS),
        kvti_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, KEEPALIVE_OUT_MS),
        kvti_arg(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0),
        kvti_arg(GRPC_ARG_ENABLE_CHANNELZ, 0),
        kvti_sockets_arg(), /* last: only where it fits */
    };
    size_t n_args = sizeof(args) / sizeof(args[0]) - !kvti_target_is_local(target);
    grpc_channel_args list = {n_args, args};
    grpc_channel_credentials *plain = grpc_insecure_credentials_create();
    grpc_channel *channel = grpc_channel_create(target, plain, &list);
    grpc_channel_credentials_release(plain);
    kvti_sockets_arg_end(&args[sizeof(args) / sizeof(args[0]) - 1]);
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
    for (uint32_t i = 0; i < conn->n_lanes; i++)
        conn->lanes[i].poster = grpc_channel_create_registered_call(
            conn->channels[i].channel, NULL, GRPC_PROPAGATE_DEFAULTS, conn->lanes[i].cq,
            conn->channels[i].methods[KVC_STATS], gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
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
    kvc_mutex_init(&conn->mutex, KVC_RANK_TRANSPORT);
    kvc_cond_init(&conn->idle);
    status = open_lanes(conn, lanes_wanted(opts->n_threads, conn->n_channels));
    if (status != KVC_OK)
        goto err_lanes;
    open_channels(conn, target,
                  opts->max_message_bytes == 0 ? KVC_MAX_VALUE_BYTES : opts->max_message_bytes);
    *conn_p = conn;
    return KVC_OK;

err_lanes:
    close_lanes(conn);
    kvc_cond_fini(&conn->idle);
    kvc_mutex_fini(&conn->mutex);
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
    for (uint32_t i = 0; i < conn->n_lanes; i++)
        grpc_call_unref(conn->lanes[i].poster);
    close_lanes(conn);
    kvc_cond_fini(&conn->idle);
    kvc_mutex_fini(&conn->mutex);
    free(conn->channels);
    free(conn);
    grpc_shutdown();
}
