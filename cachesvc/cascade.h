/*
 * cascade.h: values on their way between tiers, and the room they need.
 *
 * Any thread unless it says so. A tier is called with no lock held.
 */
#ifndef KVS_CASCADE_H
#define KVS_CASCADE_H

#include "evict.h"
#include "server.h"

/* How far a search for room goes. */
typedef enum kvs_room {
    KVS_ROOM_ASK,    /* values of the same class give way; a segment of another would be WANTED */
    KVS_ROOM_WANTED, /* what ASK becomes if the room thread could do more than was done */
    KVS_ROOM_EMPTY,  /* a segment of another class is emptied: the room thread alone */
    KVS_ROOM_OWN,    /* as ASK, but nothing is wanted */
} kvs_room;

/*
 * Room in dram for n values of this part's shape, evicting what can give way. OK: for the first
 * *n_p of them, one at least; slots [n] are reserved, not committed, and their rows go to addrs
 * [n]. AGAIN: nothing can give way, or *room_p is WANTED. NO_MEMORY, INVALID from the tier.
 */
kvc_status kvs_cascade_reserve(kvs_server *server, const kvs_schema *schema, uint32_t part,
                               uint32_t n, kvs_room *room_p, kvs_slot *slots, void **addrs,
                               uint32_t *n_p) KVC_MUST_CHECK;
/* Evicts from lmdb what makes room for a value of the class and shape: values of its size, or of
   others that have more than their share; returns their bytes, 0 if nothing gives way. */
uint64_t kvs_cascade_lmdb_room(kvs_server *server, uint32_t cls, const kvs_tier_shape *shape);
/* Releases doomed values that nobody reads any more. */
void kvs_cascade_reap(kvs_server *server);
/* Loads a value that kvs_index_ref marked LOADING on a disk thread; takes its extra reference. */
void kvs_cascade_promote(kvs_server *server, const kvs_schema *schema, uint32_t part,
                         uint32_t value, kvs_slot lmdb);
/* Does so on the calling disk thread. AGAIN: no room that loses nothing; CORRUPT, NOT_FOUND, IO. */
kvc_status kvs_cascade_load(kvs_server *server, const kvs_schema *schema, uint32_t part,
                            uint32_t value, kvs_slot lmdb);
/* Loads a value that kvs_gpu_evict marked LOADING from its copy in the gpu, if there is room that
   loses nothing; takes its extra reference. The gpu thread's. */
void kvs_cascade_demote(kvs_server *server, uint32_t value, kvs_slot gpu);
/* A reader found the lmdb copy bad (CORRUPT) or gone (NOT_FOUND); the caller holds a reference. */
void kvs_cascade_bad(kvs_server *server, uint32_t value, kvc_status status);
/* Releases the dram slots of victims [n], which are finished then. */
void kvs_cascade_release(kvs_server *server, const kvs_victim *victims, uint32_t n);

/* ---- cascade_segment.c ---- */

/* Whether it is time to look for a segment that can be emptied: the last look was not in vain, or
   some time ago. Any thread. */
bool kvs_cascade_may_empty(const kvs_server *server);
/*
 * Empties one segment that another class than cls has, so that this one may have it: what is held
 * there moves to other segments of its class, and once all has moved, all else gives way. False:
 * there is none that can be emptied; it is not looked for again for a while, since a look takes
 * long. The room thread's, one at a time: copies a segment's bytes at most, and waits some
 * milliseconds for readers.
 */
bool kvs_cascade_empty_segment(kvs_server *server, uint32_t cls);

#endif
