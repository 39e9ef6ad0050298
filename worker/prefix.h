/*
 * prefix.h: a sequence's leading blocks as the servers have them.
 *
 * Made and used inside kvw_seq_open, on its thread. Each server is asked for its own blocks alone,
 * all servers at a time; the prefix ends where the first of them lacks something.
 */
#ifndef KVWI_PREFIX_H
#define KVWI_PREFIX_H

#include "internal.h"

/* One server's blocks of a prefix, ascending, and a question about them. */
typedef struct kvwi_owned {
    kvc_digest *digests;
    uint32_t *blocks; /* their numbers in the prefix */
    uint32_t n, at, ask, got;
    bool ended; /* at the first that it lacks */
    bool in_flight;
    kvc_op op;
} kvwi_owned;

/* A prefix as its servers have it; servers are those of the worker. */
typedef struct kvwi_prefix {
    kvw_seq *seq;
    kvwi_owned *servers;
    kvc_digest *digests; /* [n_blocks], by server */
    uint32_t *blocks;    /* likewise */
} kvwi_prefix;

/* The first n_blocks blocks of the sequence, which are named and placed. NO_MEMORY. */
kvc_status kvwi_prefix_open(kvwi_prefix *p, kvw_seq *seq, uint32_t n_blocks) KVC_MUST_CHECK;
void kvwi_prefix_close(kvwi_prefix *p);
/* Leading blocks, of the first n, that have all parts on their servers. Blocks. What a server
 * answers. */
kvc_status kvwi_prefix_match(kvwi_prefix *p, uint32_t n, const uint32_t *parts, uint32_t n_parts,
                             uint32_t *hits_p) KVC_MUST_CHECK;
/* Opens the sequence's context on every server, over those of its first n_blocks blocks that the
 * server has. Blocks. */
kvc_status kvwi_contexts_begin(kvw_seq *seq, uint32_t n_blocks) KVC_MUST_CHECK;

#endif
