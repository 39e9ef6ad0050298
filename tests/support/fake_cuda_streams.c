/*
 * fake_cuda_streams.c: the fake's streams, events and graphs. See fake_cuda.h. Ops run on the
 * caller's thread: when they are enqueued, or with the graph that they are captured into; on a
 * stream that runs late, when something waits for it.
 */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "fake_cuda_internal.h"

enum { MAX_OPS = 32, MAX_ARGS = 512 };

struct kvk_cuda_graph {
    uint32_t n;
    struct {
        fake_op *fn;
        _Alignas(16) uint8_t args[MAX_ARGS];
    } op[MAX_OPS];
};

struct kvk_stream {
    kvk_cuda_graph *captured; /* NULL: ops run at once, or late */
    kvk_cuda_graph *late;     /* those that nothing has waited for; NULL: they run at once */
    uint64_t n_enqueued;
};

struct kvk_cuda_event {
    kvk_stream *on; /* recorded last; NULL: not */
};

static atomic_uint n_graphs;
static atomic_bool sides_are_late;
static atomic_uint syncs_left = UINT32_MAX;

void fake_cuda_late(bool are_late)
{
    atomic_store(&sides_are_late, are_late);
}

void fake_cuda_syncs(uint32_t n)
{
    atomic_store(&syncs_left, n);
}

static kvc_status run_all(kvk_cuda *cuda, const kvk_cuda_graph *graph)
{
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < graph->n; i++)
        st = graph->op[i].fn(cuda, graph->op[i].args);
    return st;
}

static kvc_status append(kvk_cuda_graph *graph, fake_op *fn, const void *args, size_t len_bytes)
{
    if (graph->n == MAX_OPS || len_bytes > MAX_ARGS)
        return KVC_INVALID;
    graph->op[graph->n].fn = fn;
    memcpy(graph->op[graph->n++].args, args, len_bytes);
    return KVC_OK;
}

/* What the stream still has to do. */
static kvc_status catch_up(kvk_cuda *cuda, kvk_stream *stream)
{
    if (stream == NULL || stream->late == NULL)
        return KVC_OK;
    kvc_status st = run_all(cuda, stream->late);
    stream->late->n = 0;
    return st;
}

kvk_stream *fake_cuda_stream(void)
{
    return calloc(1, sizeof(kvk_stream));
}

uint64_t fake_cuda_enqueued(const kvk_stream *stream)
{
    return stream->n_enqueued;
}

void fake_cuda_stream_free(kvk_stream *stream)
{
    free(stream);
}

uint32_t fake_cuda_graphs(void)
{
    return atomic_load(&n_graphs);
}

kvc_status kvk_cuda_stream_create(kvk_cuda *cuda, kvk_stream **stream_p)
{
    (void)cuda;
    *stream_p = calloc(1, sizeof(**stream_p));
    return *stream_p == NULL ? KVC_NO_MEMORY : KVC_OK;
}

void kvk_cuda_stream_destroy(kvk_cuda *cuda, kvk_stream *stream)
{
    (void)catch_up(cuda, stream);
    if (stream != NULL)
        free(stream->late);
    free(stream);
}

kvc_status kvk_cuda_stream_sync(kvk_cuda *cuda, kvk_stream *stream)
{
    return fake_cuda_take(&syncs_left) ? catch_up(cuda, stream) : KVC_DEVICE;
}

kvc_status kvk_cuda_event_create(kvk_cuda *cuda, kvk_cuda_event **event_p)
{
    (void)cuda;
    *event_p = calloc(1, sizeof(**event_p));
    return *event_p == NULL ? KVC_NO_MEMORY : KVC_OK;
}

void kvk_cuda_event_destroy(kvk_cuda *cuda, kvk_cuda_event *event)
{
    (void)cuda;
    free(event);
}

kvc_status kvk_cuda_event_record(kvk_cuda *cuda, kvk_cuda_event *event, kvk_stream *stream)
{
    (void)cuda;
    event->on = stream;
    return KVC_OK;
}

/* While sides are late, a stream that waits for one whose ops run at once becomes one. */
kvc_status kvk_cuda_stream_wait(kvk_cuda *cuda, kvk_stream *stream, const kvk_cuda_event *event)
{
    if (event->on != NULL && event->on->late != NULL)
        return catch_up(cuda, event->on);
    if (stream != NULL && stream->late == NULL && atomic_load(&sides_are_late))
        stream->late = calloc(1, sizeof(*stream->late));
    return KVC_OK;
}

kvc_status kvk_cuda_graph_begin(kvk_cuda *cuda, kvk_stream *stream)
{
    (void)cuda;
    stream->captured = calloc(1, sizeof(*stream->captured));
    if (stream->captured == NULL)
        return KVC_NO_MEMORY;
    atomic_fetch_add(&n_graphs, 1);
    return KVC_OK;
}

kvc_status kvk_cuda_graph_end(kvk_cuda *cuda, kvk_stream *stream, kvk_cuda_graph **graph_p)
{
    (void)cuda;
    *graph_p = stream->captured;
    stream->captured = NULL;
    return KVC_OK;
}

kvc_status kvk_cuda_graph_launch(kvk_cuda *cuda, kvk_cuda_graph *graph, kvk_stream *stream)
{
    fake_cuda_announce();
    if (stream != NULL)
        stream->n_enqueued++;
    return run_all(cuda, graph);
}

void kvk_cuda_graph_destroy(kvk_cuda *cuda, kvk_cuda_graph *graph)
{
    (void)cuda;
    if (graph != NULL)
        atomic_fetch_sub(&n_graphs, 1);
    free(graph);
}

/* Now, or when the graph that the stream is captured into runs, or late. */
kvc_status fake_cuda_enqueue(kvk_cuda *cuda, kvk_stream *stream, fake_op *fn, const void *args,
                             size_t len_bytes)
{
    kvk_cuda_graph *graph = stream == NULL ? NULL : stream->captured;
    if (!fake_cuda_take_op())
        return KVC_UNSUPPORTED;
    if (stream != NULL && graph == NULL)
        stream->n_enqueued++;
    if (graph != NULL)
        return append(graph, fn, args, len_bytes);
    return stream != NULL && stream->late != NULL ? append(stream->late, fn, args, len_bytes)
                                                  : fn(cuda, args);
}
