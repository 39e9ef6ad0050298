/*
 * maps.h: what clients of this host have mapped of dram and gpu, and the pins that keep it in its
 * place.
 *
 * A map belongs to one connection and dies with it; it references values of the index as a reader
 * does, so none of them moves, gives way or is written over. The client reads them without asking.
 * So that a map can be taken back, each connection shares one page or more with the server, the
 * lease: a word per map, which holds the map's number while it is good. The server clears the word
 * before it lets the values go; a reader copies first, then looks at the word, and drops what it
 * copied if the word is another. Pinned bytes are counted once for each map.
 *
 * A value with a copy in the gpu tier may be mapped there instead, by a client that asked for it
 * and opens the segment by its handle (CUDA IPC); everything said here holds for those segments
 * too.
 *
 * Segments are passed once to a connection and are its until it says that it maps them no more, or
 * goes. Meanwhile no other tenant can have them, empty or not, so they are capped as pins are.
 * Those of the GPU, whose memory must not be given back to CUDA while another process has it open,
 * are its until it says so or its process has ended: a connection may break under a client that
 * reads.
 */
#ifndef KVS_MAPS_H
#define KVS_MAPS_H

#include "server.h"

#define KVS_MAP_ENTRIES 32768u /* of one reply's table */

kvs_maps *kvs_maps_create(kvs_server *server); /* NULL: no memory */
void kvs_maps_destroy(kvs_maps *maps);         /* no connection is left; NULL is fine */
/* As kvt_listen_opts.peer_gone wants it; arg: the server. */
void kvs_maps_peer_gone(void *arg, uint64_t id);
/* Takes back the maps that pin a value which was erased. Any thread; may block for milliseconds. */
void kvs_maps_revoke_erased(kvs_maps *maps);

/* ---- for MapContext; id: of the connection (kvt_peer), number: of one of its maps ---- */

/* Where a map's word is, and the lease's own descriptor where the connection lacks it (else -1). */
typedef struct kvs_lease_at {
    uint32_t slot, lease_bytes;
    int fd; /* the caller's to close */
} kvs_lease_at;

/*
 * Finds a connection's map, or begins one (*map_p 0). The calls of one connection come one by one,
 * so it stays unless it is revoked. NOT_FOUND: it was, or never was. NO_SPACE: the connection has
 * too many; NO_MEMORY; AGAIN: descriptors are short; UNSUPPORTED: the system has no memfd or seals.
 */
kvc_status kvs_map_begin(kvs_maps *maps, uint64_t id, const kvc_digest *tenant, uint64_t *map_p,
                         kvs_lease_at *lease_p) KVC_MUST_CHECK;
/* Reserves up to want_bytes of the tenant's pins; gives how many. */
uint64_t kvs_map_reserve(kvs_maps *maps, const kvc_digest *tenant, uint64_t want_bytes);
/*
 * Adds values [*n_p], which the caller has referenced, to the map, and gives back what is left of
 * the reserved bytes. Those that the map has already go to the end of the list, *n_p becomes how
 * many were taken, and the rest are the caller's still. NOT_FOUND, NO_MEMORY: they all are, and no
 * bytes are reserved.
 */
kvc_status kvs_map_add(kvs_maps *maps, uint64_t id, uint64_t number, uint32_t *values,
                       uint32_t *n_p, uint64_t used_bytes, uint64_t reserved_bytes) KVC_MUST_CHECK;

/* A segment of which a slot is held. */
typedef struct kvs_map_segment {
    bool gpu;        /* of the gpu tier, else of dram */
    uint32_t number; /* in its tier */
    int fd;          /* of dram's, borrowed */
} kvs_map_segment;

typedef struct kvs_map_place {
    uint32_t id; /* what the connection calls the segment; 0: it has not been passed */
    int fd;      /* of its own, to be passed, as the segment is new to it; else -1 */
    bool fresh;  /* the segment is new to it: of dram with fd, of the gpu without */
    bool capped; /* id 0: no more can be mapped now, whatever the reply has room for */
    bool again;  /* the map pins the value already */
} kvs_map_place;
/* Finds the segment among those of the connection, or passes it, unless the reply is full. fits: a
 * value more may be pinned; else only what the map pins already is found. */
void kvs_map_place_value(kvs_maps *maps, uint64_t id, uint64_t number, uint32_t value,
                         const kvs_map_segment *segment, bool full, bool fits,
                         kvs_map_place *place_p);
/* These segments, by the connection's ids [n], are mapped by it no more, or were not passed after
 * all, and so is the lease. Ids that mean nothing are passed over. */
void kvs_map_unpass(kvs_maps *maps, uint64_t id, const uint32_t *ids, uint32_t n, bool lease);
void kvs_map_release(kvs_maps *maps, uint64_t id, uint64_t number);
/* Before a connection that has mapped something is given memory of the GPU: its process is watched
 * from now on. False: it cannot be, or too many are, and it is given none. */
bool kvs_map_watch(kvs_maps *maps, uint64_t id, int32_t pid);
/* What processes that have ended had open of the GPU is others' to use. Any thread. */
void kvs_map_reap(kvs_maps *maps);
uint64_t kvs_map_pinned(kvs_maps *maps, const kvc_digest *tenant);
uint64_t kvs_map_max_bytes(const kvs_maps *maps);

#endif
