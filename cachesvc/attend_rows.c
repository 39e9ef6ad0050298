/*
 * attend_rows.c: the arithmetic of AttendRows: one attend of the compute layer for each group, over
 * the addresses of its rows, and one of a GPU over those that were left to it; the GPU merges.
 *
 * An attender's thread. Nothing is copied but queries and results: rows in dram are read where they
 * lie, those of lmdb from the buffer they were read into. All groups are set off on the GPU before
 * the CPU begins, and waited for once. A group's memory is the largest group's, taken once a call
 * from the buffers of answers, whose cap counts it; so is what the compute layer needs for itself.
 */
#include <math.h>
#include <string.h>

#include "attend.h"

/* Rows of one group that are attended over by one of the two. */
typedef struct rows {
    const void **at;
    int32_t *positions;
    uint32_t n;
} rows;

typedef struct work {
    kvs_attender *attender;
    kvs_buffer *memory; /* of all that follows but q_positions */
    rows here, device;
    int32_t q_positions[KVC_MAX_ATTEND_QUERIES];
    double *inv_freq;
    float *q, *o, *lse; /* of one group */
    void *raw;          /* queries as they came */
    /* where the queries of the next group begin in the payload */
    uint32_t piece;
    size_t piece_off_bytes;
    kvs_gpu_lane *lane; /* NULL: the CPU attends over all */
    kvc_status gpu;     /* what a GPU's call failed with */
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
    bool split = attend->fetch.server->attender->gpu != NULL;
    w->here.at = carve(c, n_rows, sizeof(*w->here.at));
    w->here.positions = carve(c, n_rows, sizeof(*w->here.positions));
    w->device.at = carve(c, split ? n_rows : 0, sizeof(*w->device.at));
    w->device.positions = carve(c, split ? n_rows : 0, sizeof(*w->device.positions));
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
static kvc_status convert_queries(work *w, const kvs_attend_group *group)
{
    kvk_backend *be = w->attender->backend;
    const kvc_attend_query *query = group->query;
    uint32_t width = query->n_q_heads * group->dim;
    kvk_rows in = {w->raw, width * kvk_dtype_bytes((kvk_dtype)query->q_dtype),
                   (kvk_dtype)query->q_dtype};
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

static void add_row(rows *to, const void *at, int32_t position)
{
    to->at[to->n] = at;
    to->positions[to->n++] = position;
}

/* Addresses and positions of the group's rows that are here. */
static void list_rows(work *w, const kvs_fetch *fetch, const kvs_attend_group *group)
{
    w->here.n = w->device.n = 0;
    for (uint32_t i = 0; i < group->n_picks; i++) {
        uint32_t pick = group->first_pick + i, read = fetch->pick_read[pick];
        if (read == KVS_NO_READ || fetch->extra[read].status != KVC_OK)
            continue;
        const kvs_fetch_read *extra = &fetch->extra[read];
        int32_t position = group->ranks ? (int32_t)group->ranks[i] : 0;
        size_t off = (size_t)fetch->pick_row[pick] * extra->schema->parts[extra->part].row_bytes;
        if (extra->device)
            add_row(&w->device, extra->device + off, position);
        else
            add_row(&w->here,
                    extra->base ? extra->base + off : fetch->buffer->bytes + fetch->pick_off[pick],
                    position);
    }
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

static kvk_attend_args args_of(const work *w, const kvs_attend_group *group, const rows *of)
{
    return (kvk_attend_args){
        .q = w->q,
        .n_q = group->query->n_q,
        .n_q_heads = group->query->n_q_heads,
        .n_kv_heads = group->kv_heads,
        .head_dim = group->dim,
        .rows = of->at,
        .n_kv = of->n,
        .k_off_bytes = group->k_off_bytes,
        .v_off_bytes = group->v_off_bytes,
        .dtype = group->dtype,
        .k_positions = group->ranks ? of->positions : NULL,
        .inv_freq = group->ranks ? w->inv_freq : NULL,
        .scale = group->scale,
        .softcap = group->softcap,
        .o = w->o,
        .lse = w->lse,
    };
}

/* Sets the GPU off on its rows of the group. */
static kvc_status begin_on_gpu(work *w, kvs_attend_group *group)
{
    const kvs_gpu_attend_ops *ops = w->attender->gpu_ops;
    const kvs_gpu_group on_gpu = {args_of(w, group, &w->device), group->row_bytes};
    w->gpu = ops->attend(w->lane, &on_gpu, &group->partial);
    if (w->gpu == KVC_UNSUPPORTED)
        kvs_attend_gpu_refused(w->attender, group);
    return w->gpu;
}

static void store(const kvs_attend_group *group, const float *o, const float *lse)
{
    size_t n = (size_t)group->query->n_q * group->query->n_q_heads;
    kvk_from_f32(o, n * group->dim, (kvk_dtype)group->query->o_dtype, group->out);
    memcpy(group->out + group->o_bytes, lse, group->lse_bytes);
}

/* What the CPU has of the group, to its place, or to the GPU, which merges. */
static kvc_status attend_here(work *w, kvs_attend_group *group)
{
    kvk_backend *be = w->attender->backend;
    const kvk_attend_args args = args_of(w, group, &w->here);
    kvc_status status = kvk_backend_ops(be)->attend(be, &args, NULL);
    if (status == KVC_NO_MEMORY)
        return KVC_AGAIN; /* other calls have the bytes, for now */
    if (status == KVC_OK && group->partial.n)
        return w->gpu = w->attender->gpu_ops->add(w->lane, &group->partial, w->o, w->lse);
    if (status == KVC_OK)
        store(group, w->o, w->lse);
    return status;
}

/* What one of the two does of a group, which needs nothing but its place in the payload where it
 * has no rows. */
static kvc_status visit_group(work *w, const kvs_attend *attend, kvs_attend_group *group,
                              bool on_gpu)
{
    take(w, &attend->fetch.call->req, group->q_bytes); /* else those before are still there */
    list_rows(w, &attend->fetch, group);
    if (on_gpu ? !w->device.n : group->partial.n && !w->here.n)
        return KVC_OK;
    kvc_status status = frequencies(w, group);
    if (status == KVC_OK)
        status = convert_queries(w, group);
    if (status != KVC_OK)
        return status;
    return on_gpu ? begin_on_gpu(w, group) : attend_here(w, group);
}

static kvc_status visit_groups(work *w, const kvs_attend *attend, bool on_gpu)
{
    kvc_status status = KVC_OK;
    w->piece = 0;
    w->piece_off_bytes = 0;
    for (uint32_t g = 0; status == KVC_OK && g < attend->fetch.n_groups; g++) {
        status = kvs_given_up(attend->fetch.call);
        if (status == KVC_OK)
            status = visit_group(w, attend, &attend->groups[g], on_gpu);
    }
    return status;
}

/* The GPU has all of its groups before the CPU begins with the first of its own. */
static kvc_status attend_groups(work *w, const kvs_attend *attend, char *out)
{
    kvc_status status = KVC_OK;
    w->gpu = KVC_OK;
    for (uint32_t g = 0; g < attend->fetch.n_groups; g++) {
        kvs_attend_group *group = &attend->groups[g];
        group->partial.n = 0;
        group->out = out;
        out += group->o_bytes + group->lse_bytes;
    }
    if (w->lane)
        status = visit_groups(w, attend, true);
    return status == KVC_OK ? visit_groups(w, attend, false) : status;
}

/* What the GPU has been set off on. */
static kvc_status finish_on_gpu(work *w, const kvs_attend *attend)
{
    w->gpu = w->attender->gpu_ops->finish(w->lane);
    for (uint32_t g = 0; w->gpu == KVC_OK && g < attend->fetch.n_groups; g++) {
        const kvs_attend_group *group = &attend->groups[g];
        if (group->partial.n)
            store(group, group->partial.o, group->partial.lse);
    }
    if (w->gpu == KVC_OK)
        kvs_attend_gpu_count(attend);
    return w->gpu;
}

/* With a GPU; where that fails, once more without. */
static kvc_status attend_with_gpu(work *w, kvs_attend *attend, char *out)
{
    kvc_status status = attend_groups(w, attend, out);
    if (status == KVC_OK)
        status = finish_on_gpu(w, attend);
    w->attender->gpu_ops->give(w->lane);
    w->lane = NULL;
    if (w->gpu == KVC_OK)
        return status;
    kvs_attend_gpu_failed(attend, w->gpu);
    return attend_groups(w, attend, out);
}

kvc_status kvs_attend_compute(kvs_attend *attend, char *out)
{
    work w = {.attender = attend->fetch.server->attender};
    kvc_status status = work_init(&w, attend);
    if (status != KVC_OK)
        return status;
    w.lane = kvs_attend_gpu_take(attend);
    status = w.lane ? attend_with_gpu(&w, attend, out) : attend_groups(&w, attend, out);
    kvs_buffer_release(w.memory);
    return status;
}
