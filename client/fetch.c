/*
 * fetch.c: rows of any tokens into the caller's slots.
 *
 * The picks of all groups are cut into messages within max_message_bytes, max_picks and max_groups;
 * the cut is walked twice, to count and to fill. As many are in flight as send.c's window holds;
 * each scatters its reply on the transport thread that brought it, unless the transport has put the
 * rows into their slots itself, and writes the statuses of its own picks.
 */
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "map.h"

/* Where the next message starts. */
typedef struct cut {
    const kvc_pick_group *groups;
    uint32_t n_groups, max_picks, max_groups, target_bytes;
    uint32_t group, pick;
} cut;

/* Segments of the next message, written to segs where that is not NULL; 0 at the end. */
static uint32_t cut_next(cut *c, uint8_t *base, kvci_seg *segs, kvc_row_group *rows,
                         uint32_t *n_picks_p)
{
    uint32_t n_segs = 0, n_picks = 0;
    /* One row always fits, however small an even share is. */
    uint64_t room_bytes = c->target_bytes;
    while (c->group < c->n_groups && n_segs < c->max_groups && n_picks < c->max_picks) {
        const kvc_pick_group *group = &c->groups[c->group];
        uint64_t n = group->n_picks - c->pick;
        if (n_picks == 0 && room_bytes < group->row_bytes)
            room_bytes = group->row_bytes;
        if (n > room_bytes / group->row_bytes)
            n = room_bytes / group->row_bytes;
        if (n > c->max_picks - n_picks)
            n = c->max_picks - n_picks;
        if (n == 0 && group->n_picks > c->pick)
            break;
        if (n > 0 && segs != NULL) {
            segs[n_segs] = (kvci_seg){
                .context = group->context,
                .base = base + group->dst_off_bytes,
                .slots = group->dst_slots != NULL ? group->dst_slots + c->pick : NULL,
                .first_slot = c->pick,
                .n = (uint32_t)n,
                .row_bytes = group->row_bytes,
            };
            rows[n_segs] = (kvc_row_group){
                .part = group->part, .n_picks = (uint32_t)n, .picks = group->picks + c->pick};
        }
        n_segs += n > 0;
        n_picks += (uint32_t)n;
        room_bytes -= n * group->row_bytes;
        c->pick += (uint32_t)n;
        if (c->pick == group->n_picks) {
            c->group++;
            c->pick = 0;
        }
    }
    *n_picks_p = n_picks;
    return n_segs;
}

/* The rows of a group must lie inside the region. */
static kvc_status check_slots(const kvc_pick_group *group, uint32_t g, const kvc_region *dst)
{
    if (group->dst_off_bytes > dst->len_bytes)
        return kvci_fail(KVC_INVALID, "fetch: group %u starts outside its region", g);
    uint64_t n_slots = (dst->len_bytes - group->dst_off_bytes) / group->row_bytes;
    if (group->dst_slots == NULL && group->n_picks > n_slots)
        return kvci_fail(KVC_INVALID, "fetch: group %u has %u rows, its region room for %llu", g,
                         group->n_picks, (unsigned long long)n_slots);
    for (uint32_t i = 0; group->dst_slots != NULL && i < group->n_picks; i++)
        if (group->dst_slots[i] >= n_slots)
            return kvci_fail(KVC_INVALID, "fetch: slot %u of group %u lies outside its region",
                             group->dst_slots[i], g);
    return KVC_OK;
}

static kvc_status check(const kvc_client *client, const kvc_pick_group *groups, uint32_t n_groups,
                        const kvc_region *dst, const kvc_limits *limits, uint64_t *bytes_p)
{
    uint64_t n_picks = 0;
    for (uint32_t g = 0; g < n_groups; g++) {
        const kvc_pick_group *group = &groups[g];
        if (group->context == NULL || group->context->client != client)
            return kvci_fail(KVC_INVALID, "fetch: group %u has no context of this client", g);
        if (group->row_bytes == 0 || group->row_bytes > limits->max_message_bytes)
            return kvci_fail(KVC_INVALID,
                             "fetch: group %u has rows of %u bytes, allowed are 1 to %u", g,
                             group->row_bytes, limits->max_message_bytes);
        kvc_status status = check_slots(group, g, dst);
        if (status != KVC_OK)
            return status;
        n_picks += group->n_picks;
        *bytes_p += (uint64_t)group->n_picks * group->row_bytes;
    }
    if (n_picks > UINT32_MAX)
        return kvci_fail(KVC_INVALID, "fetch: more than 2^32 - 1 picks");
    return KVC_OK;
}

static kvc_status fetch_take(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    kvci_call *call = msg->call;
    int8_t *status = call->u.fetch.status != NULL ? call->u.fetch.status + msg->first : NULL;
    kvc_status taken =
        msg->xfer.placed
            ? kvci_take_placed(call->region, msg->segs, msg->n_segs, reply, status, why_p)
            : kvci_scatter(call->region, msg->segs, msg->n_segs, reply, status, why_p);
    if (taken != KVC_OK)
        return taken;
    kvc_client *client = call->client;
    kvc_fetch_info *info = &call->u.fetch.info;
    kvc_mutex_lock(&client->lock);
    info->rows_gpu += reply->u.fetch_rows.rows_gpu;
    info->rows_dram += reply->u.fetch_rows.rows_dram;
    info->rows_lmdb += reply->u.fetch_rows.rows_lmdb;
    info->rows_missing += reply->u.fetch_rows.n_missing;
    kvc_mutex_unlock(&client->lock);
    return KVC_OK;
}

static void fetch_fail(kvci_msg *msg, kvc_status status)
{
    if (msg->call->u.fetch.status != NULL)
        memset(msg->call->u.fetch.status + msg->first, (int8_t)status, msg->n_items);
}

/* Of what went through without a retry: those say little about the way. */
static void learn(kvci_call *call)
{
    uint64_t bytes = 0, n_rows = 0, n_missing = call->u.fetch.info.rows_missing;
    for (uint32_t i = 0; i < call->n_msgs; i++) {
        const kvci_msg *msg = &call->msgs[i];
        if (msg->sends != 1)
            return;
        for (uint32_t s = 0; s < msg->n_segs; s++) {
            bytes += (uint64_t)msg->segs[s].n * msg->segs[s].row_bytes;
            n_rows += msg->segs[s].n;
        }
    }
    if (call->status == KVC_OK && n_rows > 0)
        kvci_way_learn(call->client, false, bytes / n_rows * (n_rows - n_missing), 0,
                       kvc_now_ns() - call->began_ns);
}

void kvci_fetch_settle(kvci_call *call)
{
    kvci_left *left = call->u.fetch.left;
    for (uint32_t i = 0; left != NULL && left->final != NULL && i < left->n; i++)
        left->final[left->index[i]] = left->status[i];
    kvci_left_put(call->client, left);
}

static void fetch_finish(kvci_call *call)
{
    kvci_fetch_settle(call);
    learn(call);
    for (uint32_t i = 0; i < call->n_msgs; i++)
        call->u.fetch.info.requests += call->msgs[i].sends;
    if (call->u.fetch.info_p != NULL)
        *call->u.fetch.info_p = call->u.fetch.info;
}

static const kvci_kind fetch_kind = {
    .name = "fetch",
    .stop_on_error = true,
    .take = fetch_take,
    .fail = fetch_fail,
    .finish = fetch_finish,
};

/* Where the transport may put the rows of a message itself. */
static void name_rooms(kvci_msg *msg, kvt_room *rooms)
{
    for (uint32_t g = 0; g < msg->n_segs; g++) {
        const kvci_seg *seg = &msg->segs[g];
        rooms[g] = (kvt_room){.base = seg->base,
                              .slots = seg->slots,
                              .first_slot = seg->first_slot,
                              .n = seg->n,
                              .row_bytes = seg->row_bytes};
    }
    msg->xfer.rooms = rooms;
    msg->xfer.n_rooms = msg->n_segs;
}

/* rooms: NULL: rows are to be copied. */
static void fill(kvci_call *call, cut c, uint8_t *base, kvci_seg *segs, kvc_row_group *rows,
                 kvt_room *rooms)
{
    uint32_t first = 0;
    for (uint32_t i = 0; i < call->n_msgs; i++) {
        kvci_msg *msg = &call->msgs[i];
        KVC_ASSERT(segs != NULL); /* carved for all that is cut */
        msg->segs = segs;
        msg->row_groups = rows;
        msg->n_segs = cut_next(&c, base, segs, rows, &msg->n_items);
        msg->first = first;
        bool streams = call->kind->message != NULL;
        /* A stream is held back by its own reader. */
        for (uint32_t g = 0; !streams && g < msg->n_segs; g++)
            msg->flight_bytes += segs[g].n * segs[g].row_bytes;
        if (streams)
            msg->window = kvci_carve(call, msg->n_segs, sizeof(*msg->window));
        msg->req.method = streams ? KVC_FETCH_ROWS_STREAM : KVC_FETCH_ROWS;
        msg->req.u.fetch_rows.n_groups = msg->n_segs;
        msg->req.u.fetch_rows.groups = rows;
        if (rooms != NULL) {
            name_rooms(msg, rooms);
            rooms += msg->n_segs;
        }
        segs += msg->n_segs;
        rows += msg->n_segs;
        first += msg->n_items;
    }
}

/* Cuts what is to be fetched, which was checked, into messages and sends them. left as in the call.
 */
static kvc_status start(kvc_client *client, const kvci_kind *kind, cut c, const kvc_region *dst,
                        const kvc_fetch_info *served, kvci_left *left, int8_t *status,
                        kvc_fetch_info *info_p, uint64_t deadline_ns, kvc_op *op)
{
    uint32_t n_msgs = 0, n_segs = 0, n_picks = 0;
    cut count = c;
    for (uint32_t n; (n = cut_next(&count, NULL, NULL, NULL, &n_picks)) > 0; n_msgs++)
        n_segs += n;
    size_t extra_bytes = kvci_carve_bytes(n_segs, sizeof(kvci_seg)) +
                         kvci_carve_bytes(n_segs, sizeof(kvc_row_group));
    if (dst->lent)
        extra_bytes += kvci_carve_bytes(n_segs, sizeof(kvt_room));
    if (kind->message != NULL) /* the windows, each rounded up by itself */
        extra_bytes += ((size_t)n_segs + n_msgs) * sizeof(kvci_seg);
    kvci_call *call = kvci_call_new(client, kind, n_msgs, extra_bytes, deadline_ns);
    if (call == NULL)
        return kvci_fail(KVC_NO_MEMORY, "fetch: no memory");
    call->region = (kvc_region *)dst; /* counts its users only */
    call->u.fetch.status = left != NULL ? left->status : status;
    call->u.fetch.info_p = info_p;
    call->u.fetch.info = *served;
    call->u.fetch.left = left;
    kvci_seg *segs = kvci_carve(call, n_segs, sizeof(*segs));
    kvc_row_group *rows = kvci_carve(call, n_segs, sizeof(*rows));
    fill(call, c, dst->base, segs, rows,
         dst->lent ? kvci_carve(call, n_segs, sizeof(kvt_room)) : NULL);
    return kvci_call_start(call, op);
}

/* Rows that were all mapped are learnt too: nothing else says what that way costs. */
static void learn_mapped(kvc_client *client, uint64_t bytes, uint64_t began_ns)
{
    kvc_mutex_lock(&client->lock);
    kvci_way_learn(client, false, bytes, 0, kvc_now_ns() - began_ns);
    kvc_mutex_unlock(&client->lock);
}

static uint64_t left_bytes(const kvci_left *left)
{
    uint64_t bytes = 0;
    for (uint32_t g = 0; g < left->n_groups; g++)
        bytes += (uint64_t)left->groups[g].n_picks * left->groups[g].row_bytes;
    return bytes;
}

static kvc_status fetch(kvc_client *client, const kvci_kind *kind, const kvc_pick_group *groups,
                        uint32_t n_groups, const kvc_region *dst, int8_t *status,
                        kvc_fetch_info *info_p, uint64_t deadline_ns, kvc_op *op)
{
    uint64_t bytes = 0;
    kvc_limits limits = kvci_limits(client);
    if (dst == NULL || dst->client != client)
        return kvci_fail(KVC_INVALID, "fetch: the region is NULL or another client's");
    kvc_status checked = check(client, groups, n_groups, dst, &limits, &bytes);
    if (checked != KVC_OK)
        return checked;
    kvc_fetch_info served = {0};
    uint64_t began_ns = kvc_now_ns();
    kvci_left *left =
        kvci_region_on_gpu(dst) ? NULL : kvci_serve(client, groups, n_groups, dst, status, &served);
    if (left != NULL && left->n == 0 && bytes > 0)
        learn_mapped(client, bytes, began_ns);
    if (left != NULL)
        bytes = left_bytes(left);
    cut c = {
        .groups = left != NULL ? left->groups : groups,
        .n_groups = n_groups,
        .max_picks = limits.max_picks,
        .max_groups = limits.max_groups,
        .target_bytes = kind->message != NULL
                            ? UINT32_MAX
                            : kvci_target_bytes(client, bytes, limits.max_message_bytes),
    };
    kvc_status started =
        start(client, kind, c, dst, &served, left, status, info_p, deadline_ns, op);
    if (started != KVC_OK)
        free(left);
    return started;
}

kvc_status kvc_fetch(kvc_client *client, const kvc_pick_group *groups, uint32_t n_groups,
                     const kvc_region *dst, int8_t *status, kvc_fetch_info *info_p,
                     uint64_t deadline_ns, kvc_op *op)
{
    return fetch(client, &fetch_kind, groups, n_groups, dst, status, info_p, deadline_ns, op);
}

kvc_status kvc_fetch_stream(kvc_client *client, const kvc_pick_group *groups, uint32_t n_groups,
                            const kvc_region *dst, int8_t *status, kvc_fetch_info *info_p,
                            uint64_t deadline_ns, kvc_op *op)
{
    return fetch(client, &kvci_fetch_stream_kind, groups, n_groups, dst, status, info_p,
                 deadline_ns, op);
}
