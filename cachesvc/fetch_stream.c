/*
 * fetch_stream.c: FetchRowsStream: the picks of a FetchRows of any size, a message's worth at a
 * time.
 *
 * Everything is checked before the first message. Each piece is a FetchRows over the next picks
 * whose rows fit into one message. One thread at a time (stream.h).
 */
#include <stdlib.h>

#include "fetch.h"
#include "stream.h"

typedef struct rows_stream {
    kvs_stream base;              /* first */
    uint32_t group, pick, n_done; /* the next pick: of which group, in it, in all */
    uint32_t first[KVS_STREAM_PIECES], n[KVS_STREAM_PIECES]; /* picks of each piece */
    uint32_t row_bytes[];                                    /* [n_groups] */
} rows_stream;

/* Groups of the next piece, into out where that is not NULL; moves on and gives their number. */
static uint32_t cut(const rows_stream *rows, uint32_t *group_p, uint32_t *pick_p, uint32_t *n_p,
                    kvc_row_group *out)
{
    const kvc_request *req = &rows->base.call->req;
    uint64_t room_bytes = rows->base.server->limits.max_message_bytes;
    uint32_t n_groups = 0;
    *n_p = 0;
    while (*group_p < req->u.fetch_rows.n_groups) {
        const kvc_row_group *group = &req->u.fetch_rows.groups[*group_p];
        uint64_t left = group->n_picks - *pick_p, fit = room_bytes / rows->row_bytes[*group_p];
        uint32_t n = (uint32_t)(left < fit ? left : fit);
        if (left && !n)
            break;
        if (n && out)
            out[n_groups] = (kvc_row_group){.context = group->context,
                                            .part = group->part,
                                            .n_picks = n,
                                            .picks = group->picks + *pick_p};
        n_groups += n > 0;
        *n_p += n;
        *pick_p += n;
        room_bytes -= (uint64_t)n * rows->row_bytes[*group_p];
        if (*pick_p < group->n_picks)
            break;
        ++*group_p;
        *pick_p = 0;
    }
    return n_groups;
}

static bool rows_make(kvs_stream *stream, kvt_call *piece, uint32_t slot)
{
    rows_stream *rows = (rows_stream *)stream;
    uint32_t group = rows->group, pick = rows->pick;
    uint32_t n_groups = cut(rows, &group, &pick, &rows->n[slot], NULL);
    if (n_groups == 0)
        return false;
    kvc_row_group *groups = kvc_arena_calloc(&piece->arena, n_groups, sizeof(*groups));
    piece->req = (kvc_request){.method = KVC_FETCH_ROWS};
    if (!groups) {
        kvs_fail(piece, KVC_NO_MEMORY, "no memory for %u groups", n_groups);
        return true;
    }
    (void)cut(rows, &rows->group, &rows->pick, &rows->n[slot], groups);
    piece->req.u.fetch_rows.n_groups = n_groups;
    piece->req.u.fetch_rows.groups = groups;
    rows->first[slot] = rows->n_done;
    rows->n_done += rows->n[slot];
    kvs_on_fetch_rows(stream->server, piece, &stream->tenant);
    return true;
}

static void rows_adjust(kvs_stream *stream, uint32_t slot, kvc_reply *reply)
{
    const rows_stream *rows = (const rows_stream *)stream;
    /* The list lies in the piece's arena, which is ours. */
    kvc_missing_row *missing = (kvc_missing_row *)(uintptr_t)reply->u.fetch_rows.missing;
    reply->method = KVC_FETCH_ROWS_STREAM;
    reply->u.fetch_rows.n_picks = rows->n[slot];
    for (uint32_t i = 0; i < reply->u.fetch_rows.n_missing; i++)
        missing[i].index += rows->first[slot];
}

static void rows_close(kvs_stream *stream)
{
    free(stream);
}

static const kvs_stream_kind rows_kind = {rows_make, rows_adjust, rows_close};

/* Each group's context and part, before anything is sent. */
static kvc_status check_groups(rows_stream *rows, kvs_server *server, kvt_call *call,
                               const kvc_digest *tenant)
{
    for (uint32_t g = 0; g < call->req.u.fetch_rows.n_groups; g++) {
        kvs_context *context;
        uint32_t part;
        kvc_status status = kvs_fetch_group(server, call, tenant, g, &context, &part);
        if (status != KVC_OK)
            return status;
        rows->row_bytes[g] = context->schema->parts[part].row_bytes;
        kvs_context_put(server->contexts, context);
    }
    return KVC_OK;
}

void kvs_on_fetch_rows_stream(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    uint32_t n_groups = call->req.u.fetch_rows.n_groups, n_picks;
    if (kvs_fetch_check_limits(server, call, &n_picks) != KVC_OK)
        return;
    rows_stream *rows = calloc(1, sizeof(*rows) + n_groups * sizeof(rows->row_bytes[0]));
    if (!rows) {
        kvs_fail(call, KVC_NO_MEMORY, "no memory for %u groups", n_groups);
        return;
    }
    if (check_groups(rows, server, call, tenant) != KVC_OK) {
        free(rows);
        return;
    }
    kvs_stream_begin(&rows->base, &rows_kind, server, call, tenant);
}
