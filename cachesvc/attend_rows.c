/*
 * attend_rows.c: the arithmetic of AttendRows: one attend of the compute layer for each group, over
 * the addresses of its rows.
 *
 * An attender's thread. Nothing is copied but queries and results: rows in dram are read where they
 * lie, those of lmdb from the buffer they were read into. A group's memory is the largest group's,
 * taken once a call from the buffers of answers, whose cap counts it; so is what the compute layer
 * needs for itself.
 */
#include <math.h>
#include <string.h>

#include "attend.h"

typedef struct work {
    kvs_buffer *memory; /* of all that follows but q_positions */
    const void **rows;
    int32_t *positions;
    int32_t q_positions[KVC_MAX_ATTEND_QUERIES];
    double *inv_freq;
    float *q, *o, *lse; /* of one group */
    void *raw;          /* queries as they came */
    /* where the queries of the next group begin in the payload */
    uint32_t piece;
    size_t piece_off_bytes;
} work;

static size_t max_of(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Places in one piece of memory; before there is any, how much it must be. */
typedef struct carver {
    char *base;
    size_t used_bytes;
} carver;

static void *carve(carver *c, size_t n, size_t size_bytes)
{
    void *place = c->base ? c->base + c->used_bytes : NULL;
    c->used_bytes += (n * size_bytes + 63) / 64 * 64;
    return place;
}

static void lay_out(work *w, const kvs_attend *attend, carver *c)
{
    size_t n_rows = 1, n_heads = 1, n_numbers = 1, dim = 1, raw_bytes = 1;
    for (uint32_t g = 0; g < attend->fetch.n_groups; g++) {
        const kvs_attend_group *group = &attend->groups[g];
        size_t heads = (size_t)group->query->n_q * group->query->n_q_heads;
        n_rows = max_of(n_rows, group->n_picks);
        n_heads = max_of(n_heads, heads);
        n_numbers = max_of(n_numbers, heads * group->dim);
        dim = max_of(dim, group->dim);
        raw_bytes = max_of(raw_bytes, group->q_bytes);
    }
    w->rows = carve(c, n_rows, sizeof(*w->rows));
    w->positions = carve(c, n_rows, sizeof(*w->positions));
    w->inv_freq = carve(c, dim / 2 + 1, sizeof(*w->inv_freq));
    w->q = carve(c, n_numbers, sizeof(*w->q));
    w->o = carve(c, n_numbers, sizeof(*w->o));
    w->lse = carve(c, n_heads, sizeof(*w->lse));
    w->raw = carve(c, raw_bytes, 1);
}

/* AGAIN: answers have all the memory that there is for them and for this. */
static kvc_status work_init(work *w, const kvs_attend *attend)
{
    carver c = {0};
    lay_out(w, attend, &c);
    if (c.used_bytes > UINT32_MAX)
        return KVC_NO_MEMORY;
    kvc_status status =
        kvs_buffer_get(&attend->fetch.server->buffers, (uint32_t)c.used_bytes, &w->memory);
    if (status != KVC_OK)
        return status;
    c = (carver){.base = w->memory->bytes};
    lay_out(w, attend, &c);
    return KVC_OK;
}

/* The next len_bytes of the payload, which is as long as all groups need. */
static void take(work *w, const kvc_request *req, size_t len_bytes)
{
    char *to = w->raw;
    while (len_bytes) {
        const struct iovec *piece = &req->data[w->piece];
        size_t n = piece->iov_len - w->piece_off_bytes;
        n = n < len_bytes ? n : len_bytes;
        memcpy(to, (const char *)piece->iov_base + w->piece_off_bytes, n);
        to += n;
        len_bytes -= n;
        w->piece_off_bytes += n;
        if (w->piece_off_bytes == piece->iov_len) {
            w->piece++;
            w->piece_off_bytes = 0;
        }
    }
}

/* Queries in f32, rotated where that is asked for. */
static kvc_status take_queries(work *w, const kvs_attend *attend, const kvs_attend_group *group)
{
    kvk_backend *be = attend->fetch.server->attender->backend;
    const kvc_attend_query *query = group->query;
    uint32_t width = query->n_q_heads * group->dim;
    kvk_rows in = {w->raw, width * kvk_dtype_bytes((kvk_dtype)query->q_dtype),
                   (kvk_dtype)query->q_dtype};
    take(w, &attend->fetch.call->req, group->q_bytes); /* else those before are still there */
    if (!query->q_positions) {
        const kvk_convert_args args = {.in = in, .n = query->n_q, .width = width, .out = w->q};
        return kvk_backend_ops(be)->convert(be, &args, NULL);
    }
    for (uint32_t i = 0; i < query->n_q; i++)
        w->q_positions[i] = (int32_t)query->q_positions[i];
    const kvk_rope_args args = {
        .in = in,
        .n = query->n_q,
        .n_heads = query->n_q_heads,
        .head_dim = group->dim,
        .inv_freq = w->inv_freq,
        .positions = w->q_positions,
        .out = w->q,
    };
    return kvk_backend_ops(be)->rope(be, &args, NULL);
}

/* Addresses and positions of the group's rows that are here. */
static uint32_t list_rows(work *w, const kvs_fetch *fetch, const kvs_attend_group *group)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < group->n_picks; i++) {
        uint32_t pick = group->first_pick + i, read = fetch->pick_read[pick];
        if (read == KVS_NO_READ || fetch->extra[read].status != KVC_OK)
            continue;
        const kvs_fetch_read *extra = &fetch->extra[read];
        w->rows[n] = extra->base ? extra->base + (size_t)fetch->pick_row[pick] *
                                                     extra->schema->parts[extra->part].row_bytes
                                 : fetch->buffer->bytes + fetch->pick_off[pick];
        w->positions[n++] = group->ranks ? (int32_t)group->ranks[i] : 0;
    }
    return n;
}

static kvc_status frequencies(work *w, const kvs_attend_group *group)
{
    const kvk_rope_params params = {
        .type = group->rope.type == KVC_ROPE_LLAMA3,
        .theta = group->rope.theta,
        .factor = group->rope.factor,
        .low_freq_factor = group->rope.low_freq_factor,
        .high_freq_factor = group->rope.high_freq_factor,
        .original_max_position = group->rope.original_max_position,
    };
    bool rotates = group->ranks || group->query->q_positions;
    return rotates ? kvk_rope_inv_freq(&params, group->dim, w->inv_freq) : KVC_OK;
}

static kvc_status attend_group(work *w, const kvs_attend *attend, const kvs_attend_group *group)
{
    kvk_backend *be = attend->fetch.server->attender->backend;
    kvc_status status = frequencies(w, group);
    if (status == KVC_OK)
        status = take_queries(w, attend, group);
    if (status != KVC_OK)
        return status;
    const kvk_attend_args args = {
        .q = w->q,
        .n_q = group->query->n_q,
        .n_q_heads = group->query->n_q_heads,
        .n_kv_heads = group->kv_heads,
        .head_dim = group->dim,
        .rows = w->rows,
        .n_kv = list_rows(w, &attend->fetch, group),
        .k_off_bytes = group->k_off_bytes,
        .v_off_bytes = group->v_off_bytes,
        .dtype = group->dtype,
        .k_positions = group->ranks ? w->positions : NULL,
        .inv_freq = group->ranks ? w->inv_freq : NULL,
        .scale = group->scale,
        .softcap = group->softcap,
        .o = w->o,
        .lse = w->lse,
    };
    status = kvk_backend_ops(be)->attend(be, &args, NULL);
    return status == KVC_NO_MEMORY ? KVC_AGAIN : status; /* other calls have the bytes, for now */
}

static kvc_status attend_groups(work *w, const kvs_attend *attend, char *out)
{
    for (uint32_t g = 0; g < attend->fetch.n_groups; g++) {
        const kvs_attend_group *group = &attend->groups[g];
        kvc_status status = g ? kvs_given_up(attend->fetch.call) : KVC_OK;
        if (status == KVC_OK)
            status = attend_group(w, attend, group);
        if (status != KVC_OK)
            return status;
        size_t n = (size_t)group->query->n_q * group->query->n_q_heads;
        kvk_from_f32(w->o, n * group->dim, (kvk_dtype)group->query->o_dtype, out);
        memcpy(out + group->o_bytes, w->lse, group->lse_bytes);
        out += group->o_bytes + group->lse_bytes;
    }
    return KVC_OK;
}

kvc_status kvs_attend_compute(kvs_attend *attend, char *out)
{
    work w = {0};
    kvc_status status = work_init(&w, attend);
    if (status != KVC_OK)
        return status;
    status = attend_groups(&w, attend, out);
    kvs_buffer_release(w.memory);
    return status;
}
