/*
 * opaque_support.h: opaque values for tests: content by seed, puts cut into pieces, gets put
 * together again with every rule of the protocol asserted. One thread per peer.
 */
#ifndef KVS_TEST_OPAQUE_SUPPORT_H
#define KVS_TEST_OPAQUE_SUPPORT_H

#include "harness.h"

#define O_PIECE KVC_MAX_VALUE_BYTES

/* A schema without parts. */
void o_schema_init(h_schema *schema, const char *model);
/* The digest of the key with this number. */
kvc_digest o_key(const h_schema *schema, uint64_t key);
/* len bytes that differ for each seed and length; free. */
uint8_t *o_content(uint64_t seed, size_t len_bytes);
/* What its pieces say of it. */
kvc_whole o_whole(const uint8_t *content, size_t len_bytes);
uint32_t o_pieces(size_t len_bytes);

/* Puts one piece of the value with this content; the call's status, or that of the piece. */
kvc_status o_put_piece(h_peer *peer, const h_schema *schema, uint64_t key, uint64_t seed,
                       size_t len_bytes, uint32_t piece, kvc_promise promise);
/* All of them in order, each again while it is AGAIN and until_ns has not come (0: once). OK; the
   first other status. EXISTS where every piece was. */
kvc_status o_put(h_peer *peer, const h_schema *schema, uint64_t key, uint64_t seed,
                 size_t len_bytes, kvc_promise promise, uint64_t until_ns);
/* A value as FetchBlocks gives it, checked to be whole. NOT_FOUND and so on; *value_p: free. */
kvc_status o_get(h_peer *peer, const h_schema *schema, uint64_t key, uint8_t **value_p,
                 size_t *len_bytes_p);
/* Asserts that a get gives exactly that content. */
void o_get_equal(h_peer *peer, const h_schema *schema, uint64_t key, uint64_t seed,
                 size_t len_bytes);
/* Whether the value is there; asserts that MatchPrefix says the same both ways. */
bool o_there(h_peer *peer, const h_schema *schema, uint64_t key);
uint64_t o_erase(h_peer *peer, const h_schema *schema, uint64_t key);

/* A server with room for some such values, one peer, and lmdb in a fresh folder or none. */
typedef struct o_rig {
    h_server h; /* its settings may be changed before the start */
    h_schema schema;
    h_peer *peer;
    char dir[256];
} o_rig;
o_rig *o_rig_create(bool lmdb);
void o_rig_start(o_rig *r);
void o_rig_stop(o_rig *r, bool flush);
void o_rig_destroy(o_rig *r);

/* Lengths at which something changes. */
#define O_N_LENGTHS 21u
extern const size_t o_lengths[O_N_LENGTHS];
/* Puts and gets a value of each, under its number as the key, and tries to put another. */
void o_put_and_get_all(o_rig *r, kvc_promise promise);

#endif
