/*
 * raw_grpc.c: see raw_grpc.h. Transfers chain themselves: done of one submits the next, so a fixed
 * number is in flight. The lock guards the counters only.
 */
#include "raw_grpc.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/thread.h"
#include "transport/transport.h"

#define DRAIN_NS 1000000000ull /* the last answers are on their way out */

enum { PER_CHANNEL = 2, MAX_FLYING = 64, SLAB_MESSAGES = 64 };

typedef struct flight {
    kvt_xfer xfer;
    kvc_request req;
    kvc_put_value value;
    kvc_row_group group;
    struct iovec data;
    uint32_t pick, number;
    raw_grpc *grpc;
} flight;

struct raw_grpc {
    const kvt_ops *ops;
    kvt_listener *listener;
    kvt_conn *conn;
    uint32_t channels;
    uint8_t *slab; /* the server's memory */
    flight flights[MAX_FLYING];
    kvc_mutex lock; /* KVC_RANK_LEAF; guards the rest */
    kvc_cond idle;
    uint32_t next_slab, next, n, flying;
    int is_put;
    uint32_t slices; /* of one answer */
    uint8_t *memory;
    kvc_status status;
};

static uint8_t *slab_place(raw_grpc *grpc)
{
    kvc_mutex_lock(&grpc->lock);
    uint32_t place = grpc->next_slab++ % SLAB_MESSAGES;
    kvc_mutex_unlock(&grpc->lock);
    return grpc->slab + (size_t)place * RAW_GRPC_BYTES;
}

static void gather(uint8_t *dst, const struct iovec *data, uint32_t n)
{
    for (uint32_t i = 0; i < n; dst += data[i].iov_len, i++) {
        memcpy(dst, data[i].iov_base, data[i].iov_len);
    }
}

static void nothing(void *arg)
{
    (void)arg;
}

/* One message: its bytes in a row, or in pieces from all over the slab, as rows of many values are.
 */
static uint32_t fill_slices(raw_grpc *grpc, kvt_slice *slices)
{
    uint32_t n = grpc->slices, each = RAW_GRPC_BYTES / n;
    const uint8_t *place = slab_place(grpc);
    for (uint32_t i = 0; i < n; i++) {
        size_t off = (size_t)(place - grpc->slab) + (size_t)i * (n > 1 ? 5 * each : 0);
        slices[i] = (kvt_slice){.base = grpc->slab + off % (SLAB_MESSAGES * RAW_GRPC_BYTES),
                                .len_bytes = each,
                                .release = nothing};
    }
    return n;
}

static void on_call(void *arg, kvt_call *call)
{
    raw_grpc *grpc = arg;
    int8_t status = KVC_OK;
    kvc_reply reply = {.method = call->req.method};
    if (call->req.method == KVC_PUT_BLOCKS) {
        gather(slab_place(grpc), call->req.data, call->req.n_data);
        reply.u.put_blocks.n_values = 1;
        reply.u.put_blocks.status = &status;
        kvt_call_reply(call, KVC_OK, NULL, 0, &reply, NULL, 0);
    } else if (call->req.method == KVC_FETCH_ROWS) {
        kvt_slice slices[KVT_MAX_SLICES];
        kvt_call_reply(call, KVC_OK, NULL, 0, &reply, slices, fill_slices(grpc, slices));
    } else {
        kvt_call_reply(call, KVC_UNSUPPORTED, NULL, 0, NULL, NULL, 0);
    }
}

static void on_done(kvt_xfer *xfer);

/* Submits the next message on this flight, or lets it land. */
static void fly(flight *f)
{
    raw_grpc *grpc = f->grpc;
    kvc_mutex_lock(&grpc->lock);
    uint32_t number = grpc->status == KVC_OK && grpc->next < grpc->n ? grpc->next++ : UINT32_MAX;
    kvc_mutex_unlock(&grpc->lock);
    kvc_status status = KVC_OK;
    if (number != UINT32_MAX) {
        f->number = number;
        f->data.iov_base = grpc->memory + (size_t)number * RAW_GRPC_BYTES;
        f->xfer = (kvt_xfer){.req = &f->req, .channel = number, .done = on_done, .arg = f};
        status = grpc->ops->submit(grpc->conn, &f->xfer);
        if (status == KVC_OK) {
            return;
        }
    }
    kvc_mutex_lock(&grpc->lock);
    if (status != KVC_OK) {
        grpc->status = status;
    }
    if (--grpc->flying == 0) {
        kvc_cond_signal(&grpc->idle);
    }
    kvc_mutex_unlock(&grpc->lock);
}

static void on_done(kvt_xfer *xfer)
{
    flight *f = xfer->arg;
    raw_grpc *grpc = f->grpc;
    if (xfer->status == KVC_OK && !grpc->is_put) {
        gather(f->data.iov_base, xfer->reply.data, xfer->reply.n_data);
    }
    if (xfer->status != KVC_OK) {
        kvc_mutex_lock(&grpc->lock);
        grpc->status = xfer->status;
        kvc_mutex_unlock(&grpc->lock);
    }
    kvc_arena_reset(&xfer->arena);
    fly(f);
}

static void make_request(flight *f, int is_put)
{
    f->req = (kvc_request){.method = is_put ? KVC_PUT_BLOCKS : KVC_FETCH_ROWS};
    f->data.iov_len = RAW_GRPC_BYTES;
    if (is_put) {
        f->value = (kvc_put_value){.len_bytes = RAW_GRPC_BYTES};
        f->req.u.put_blocks.promise = KVC_PROMISE_MEMORY;
        f->req.u.put_blocks.n_values = 1;
        f->req.u.put_blocks.values = &f->value;
        f->req.data = &f->data;
        f->req.n_data = 1;
        f->req.data_bytes = RAW_GRPC_BYTES;
    } else {
        f->group = (kvc_row_group){.n_picks = 1, .picks = &f->pick};
        f->req.u.fetch_rows.n_groups = 1;
        f->req.u.fetch_rows.groups = &f->group;
    }
}

kvc_status raw_grpc_move(raw_grpc *grpc, int is_put, uint32_t slices, uint8_t *memory, uint32_t n)
{
    uint32_t flying = PER_CHANNEL * grpc->channels;
    flying = flying < MAX_FLYING ? flying : MAX_FLYING;
    grpc->memory = memory;
    grpc->is_put = is_put;
    grpc->slices = slices;
    grpc->n = n;
    grpc->next = 0;
    grpc->flying = flying;
    grpc->status = KVC_OK;
    for (uint32_t i = 0; i < flying; i++) {
        make_request(&grpc->flights[i], is_put);
        grpc->flights[i].grpc = grpc;
        fly(&grpc->flights[i]);
    }
    kvc_mutex_lock(&grpc->lock);
    while (grpc->flying > 0) {
        kvc_cond_wait(&grpc->idle, &grpc->lock);
    }
    kvc_mutex_unlock(&grpc->lock);
    return grpc->status;
}

kvc_status raw_grpc_open(uint32_t channels, uint32_t threads, raw_grpc **grpc_p)
{
    *grpc_p = NULL;
    raw_grpc *grpc = calloc(1, sizeof *grpc);
    if (!grpc) {
        return KVC_NO_MEMORY;
    }
    kvc_mutex_init(&grpc->lock, KVC_RANK_LEAF);
    kvc_cond_init(&grpc->idle);
    grpc->channels = channels;
    grpc->ops = kvt_find("grpc://127.0.0.1:0");
    kvt_listen_opts listen = {.size_bytes = sizeof listen,
                              .uri = "grpc://127.0.0.1:0",
                              .on_call = on_call,
                              .arg = grpc,
                              .n_threads = threads};
    kvc_status status = KVC_UNSUPPORTED;
    grpc->slab = calloc(SLAB_MESSAGES, RAW_GRPC_BYTES);
    if (grpc->slab) {
        memset(grpc->slab, 7, (size_t)SLAB_MESSAGES * RAW_GRPC_BYTES);
        status = grpc->ops ? grpc->ops->listen(&listen, &grpc->listener) : KVC_UNSUPPORTED;
    }
    if (status == KVC_OK) {
        kvt_connect_opts connect = {.size_bytes = sizeof connect,
                                    .uri = grpc->ops->listener_uri(grpc->listener),
                                    .n_channels = channels};
        status = grpc->ops->connect(&connect, &grpc->conn);
    }
    if (status != KVC_OK) {
        raw_grpc_close(grpc);
        return status;
    }
    *grpc_p = grpc;
    return KVC_OK;
}

void raw_grpc_close(raw_grpc *grpc)
{
    if (!grpc) {
        return;
    }
    if (grpc->ops && grpc->conn) {
        grpc->ops->conn_close(grpc->conn);
    }
    if (grpc->ops && grpc->listener) {
        grpc->ops->drain(grpc->listener, kvc_deadline_ns(DRAIN_NS));
        grpc->ops->listener_close(grpc->listener);
    }
    kvc_cond_fini(&grpc->idle);
    kvc_mutex_fini(&grpc->lock);
    free(grpc->slab);
    free(grpc);
}
