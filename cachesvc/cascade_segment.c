/*
 * cascade_segment.c: a segment of dram changes hands: its values give way, or move; see cascade.h.
 *
 * The room thread, so one at a time. Invariants: a value that moves is referenced while it is
 * copied, so nobody evicts it; it changes its place only if nobody else has met it meanwhile, and
 * then its old slot is released once. What nobody holds gives way only when nothing else is left.
 * A segment that was empty in between is another one from then on: its generation says so, and it
 * is left alone.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/fault.h"
#include "base/metrics.h"
#include "cascade.h"

#define SEGMENT_RETRY_NS 50000000ull
#define MAX_ROOM         64u /* values that give way for one that moves: others may be faster */
#define MAX_LOOKS        4u  /* at the class's queues, KVS_EVICT_SCAN values each */
#define MAX_TURNS        8u  /* at a segment in which somebody reads */
#define TURN_NS          2000000l

typedef struct emptying {
    kvs_server *server;
    kvs_segment segment;
    uint32_t beside; /* where the walk over what may give way for it is */
    bool walks;      /* the queues hardly have any such */
} emptying;

bool kvs_cascade_may_empty(const kvs_server *server)
{
    return kvc_now_ns() >= atomic_load(&server->no_segment_until_ns);
}

/* Slots of the segment that are taken; 0: it was empty. */
static uint32_t set_closed(const emptying *e, bool yes)
{
    const kvs_store *dram = &e->server->dram;
    return dram->ops->close_segment(dram->tier, e->segment.number, e->segment.generation, yes);
}

/* ---- what is held ---------------------------------------------------------------------------- */

/* Something of the class, in another segment, gives way: what its queues say, else what comes. */
static bool make_room(emptying *e, uint32_t cls)
{
    kvs_index *index = e->server->index;
    kvs_victim victim;
    bool found = false;
    for (uint32_t i = 0; !found && !e->walks && i < MAX_LOOKS; i++)
        found = kvs_evict_dram_beside(index, cls, &e->segment, &victim);
    e->walks = !found;
    if (!found)
        found = kvs_evict_beside_segment(index, cls, &e->segment, &e->beside, &victim);
    if (found)
        kvs_cascade_release(e->server, &victim, 1);
    return found;
}

/* A slot of the value's own size; others of its class give way for it. */
static bool reserve(emptying *e, const kvs_move *move, kvs_slot *slot_p, void **addr_p)
{
    const kvs_part *part = kvs_part_at(move->schema, move->part);
    const kvs_store *dram = &e->server->dram;
    for (uint32_t i = 0; i <= MAX_ROOM; i++) {
        kvc_status status = dram->ops->reserve(dram->tier, &move->key, part->row_bytes,
                                               part->n_rows, 1, slot_p, addr_p);
        if (status != KVC_AGAIN || !make_room(e, part->cls))
            return status == KVC_OK;
    }
    return false;
}

/* False: there is no room for it elsewhere. A value that somebody met stays where it is. */
static bool move_one(emptying *e, const kvs_move *move)
{
    const kvs_store *dram = &e->server->dram;
    kvs_slot to;
    void *addr;
    bool room = reserve(e, move, &to, &addr);
    if (room) {
        memcpy(addr, dram->ops->map(dram->tier, move->from),
               kvs_part_at(move->schema, move->part)->value_bytes);
        dram->ops->commit(dram->tier, &to, 1);
    }
    bool met = !room || KVC_FAULT("segment.met");
    bool moved = kvs_evict_moved(e->server->index, move, met ? NULL : &to);
    if (room)
        dram->ops->release(dram->tier, &move->key, moved ? move->from : to);
    if (moved)
        KVC_COUNT(held_values_moved);
    return room;
}

static bool move_held(emptying *e)
{
    kvs_move move;
    uint32_t cursor = 0;
    bool room = true;
    while (room && kvs_evict_next_held(e->server->index, &e->segment, &cursor, &move))
        room = move_one(e, &move);
    return room;
}

/* ---- the segment ----------------------------------------------------------------------------- */

static bool find(kvs_server *server, uint32_t cls, kvs_segment *segment_p)
{
    const kvs_store *dram = &server->dram;
    uint32_t n = dram->ops->segments(dram->tier, NULL, 0);
    uint32_t *used = calloc(n + 1, sizeof(*used));
    if (!used)
        return false;
    uint32_t n_now = dram->ops->segments(dram->tier, used, n);
    bool found = kvs_evict_find_segment(server->index, cls, used, n < n_now ? n : n_now, segment_p);
    free(used);
    return found;
}

static void evict_all(const emptying *e)
{
    kvs_victim victim;
    uint32_t cursor = 0;
    while (kvs_evict_from_segment(e->server->index, &e->segment, &cursor, &victim))
        kvs_cascade_release(e->server, &victim, 1);
}

/* Readers leave soon, as a rule; what is held and was in use moves in another turn, and until all
   of that has, nothing else gives way. */
static bool empty(emptying *e)
{
    const struct timespec nap = {.tv_nsec = TURN_NS};
    uint32_t n = set_closed(e, true);
    for (uint32_t turn = 0; n > 0 && turn < MAX_TURNS; turn++) {
        if (turn > 0)
            nanosleep(&nap, NULL);
        if (!move_held(e))
            break;
        n = set_closed(e, true);
        if (n > 0 && kvs_evict_count_segment(e->server->index, &e->segment) == n)
            evict_all(e);
        n = set_closed(e, true);
    }
    return set_closed(e, false) == 0;
}

bool kvs_cascade_empty_segment(kvs_server *server, uint32_t cls)
{
    emptying e = {.server = server};
    bool emptied = kvs_cascade_may_empty(server) && find(server, cls, &e.segment) && empty(&e);
    if (!emptied && kvs_cascade_may_empty(server))
        atomic_store(&server->no_segment_until_ns, kvc_deadline_ns(SEGMENT_RETRY_NS));
    return emptied;
}
