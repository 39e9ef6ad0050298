/*
 * cascade_segment.c: a segment of dram changes hands: its values give way, or move; see cascade.h.
 *
 * Any thread. Invariants: a value that moves is referenced while it is copied, so nobody evicts it;
 * it changes its place only if nobody else has met it meanwhile, and then its old slot is released
 * once; nothing is put into a segment while it is emptied.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/metrics.h"
#include "cascade.h"

#define SEGMENT_RETRY_NS 50000000ull
#define MAX_TRIES        64u /* at room for one value, each a look at KVS_EVICT_SCAN others */

/* A slot of the value's own size; others of its class give way for it. */
static bool reserve(kvs_server *server, const kvs_move *move, kvs_slot *slot_p, void **addr_p)
{
    const kvs_part *part = kvs_part_at(move->schema, move->part);
    const kvs_store *dram = &server->dram;
    kvs_victim victim;
    for (uint32_t i = 0; i <= MAX_TRIES; i++) {
        kvc_status status = dram->ops->reserve(dram->tier, &move->key, part->row_bytes,
                                               part->n_rows, 1, slot_p, addr_p);
        if (status != KVC_AGAIN)
            return status == KVC_OK;
        if (kvs_evict_dram(server->index, part->cls, &victim))
            kvs_cascade_release(server, &victim, 1);
    }
    return false;
}

/* False: the value stays where it is. */
static bool move_one(kvs_server *server, const kvs_move *move)
{
    const kvs_store *dram = &server->dram;
    kvs_slot to;
    void *addr;
    bool room = reserve(server, move, &to, &addr);
    if (room) {
        memcpy(addr, dram->ops->map(dram->tier, move->from),
               kvs_part_at(move->schema, move->part)->value_bytes);
        dram->ops->commit(dram->tier, &to, 1);
    }
    bool moved = kvs_evict_moved(server->index, move, room ? &to : NULL);
    if (room)
        dram->ops->release(dram->tier, &move->key, moved ? move->from : to);
    if (moved)
        KVC_COUNT(held_values_moved);
    return moved;
}

static bool find(kvs_server *server, uint32_t cls, uint32_t *segment_p)
{
    const kvs_store *dram = &server->dram;
    uint32_t n = dram->ops->segments(dram->tier, NULL, 0);
    uint32_t *used = calloc(n + 1, sizeof(*used));
    if (!used)
        return false;
    uint32_t n_now = dram->ops->segments(dram->tier, used, n);
    n = n < n_now ? n : n_now;
    bool found = kvs_evict_find_segment(server->index, cls, used, n, false, segment_p) ||
                 kvs_evict_find_segment(server->index, cls, used, n, true, segment_p);
    free(used);
    return found;
}

bool kvs_cascade_empty_segment(kvs_server *server, uint32_t cls)
{
    const kvs_store *dram = &server->dram;
    kvs_victim victim;
    kvs_move move;
    uint32_t segment, cursor = 0;
    bool moved = true;
    if (kvc_now_ns() < atomic_load(&server->no_segment_until_ns))
        return false;
    if (!find(server, cls, &segment)) {
        atomic_store(&server->no_segment_until_ns, kvc_deadline_ns(SEGMENT_RETRY_NS));
        return false;
    }
    dram->ops->close_segment(dram->tier, segment, true);
    while (kvs_evict_from_segment(server->index, segment, &cursor, &victim))
        kvs_cascade_release(server, &victim, 1);
    cursor = 0;
    while (moved && kvs_evict_next_held(server->index, segment, &cursor, &move))
        moved = move_one(server, &move);
    dram->ops->close_segment(dram->tier, segment, false);
    if (!moved)
        atomic_store(&server->no_segment_until_ns, kvc_deadline_ns(SEGMENT_RETRY_NS));
    return moved;
}
