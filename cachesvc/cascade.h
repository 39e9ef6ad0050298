/*
 * cascade.h: values on their way between tiers, and the room they need.
 *
 * Any thread unless it says so. A tier is called with no lock held.
 */
#ifndef KVS_CASCADE_H
#define KVS_CASCADE_H

#include "evict.h"
#include "server.h"

/*
 * Room in dram for n values of this part's shape, evicting what can give way. OK: for the first
 * *n_p of them, one at least; slots [n] are reserved, not committed, and their rows go to addrs
 * [n]. AGAIN: nothing can give way. NO_MEMORY, INVALID from the tier.
 */
kvc_status kvs_cascade_reserve(kvs_server *server, const kvs_schema *schema, uint32_t part,
                               uint32_t n, kvs_slot *slots, void **addrs,
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

/*
 * Empties one segment that another class than cls has, so that this one may have it: what is held
 * there moves to other segments of its class, all else gives way. False: there is none that can be
 * emptied; it is not looked for again for a while, since a look takes long. Copies a segment's
 * bytes at most.
 */
bool kvs_cascade_empty_segment(kvs_server *server, uint32_t cls);

#endif
