/*
 * ghost.h: the names of values that left dram lately, so that one that comes back is known.
 *
 * A table of fixed-size entries that forgets: a later name may take an earlier one's place, and two
 * names may look alike. Either only changes the order in which values give way. The owner's lock
 * guards it. At most 8 MiB.
 */
#ifndef KVS_GHOST_H
#define KVS_GHOST_H

#include <stdbool.h>
#include <stdint.h>

typedef struct kvs_ghosts {
    uint64_t *entries; /* [size]: the name's low half, and above it when it was noted */
    uint32_t size;     /* a power of two, or 0 */
} kvs_ghosts;

void kvs_ghosts_fini(kvs_ghosts *ghosts);
/* Notes a name (any 64 well-mixed bits); now: of the caller's clock. n_values: how many names are
   worth keeping; the table grows to it while memory lasts. */
void kvs_ghost_note(kvs_ghosts *ghosts, uint64_t name, uint32_t now, uint64_t n_values);
/* Whether the name was noted less than max_age ago; it is forgotten. */
bool kvs_ghost_take(kvs_ghosts *ghosts, uint64_t name, uint32_t now, uint32_t max_age);

#endif
