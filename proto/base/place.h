/*
 * place.h: which of several servers a block belongs to, the same in every process and language.
 *
 * Rendezvous hashing: each server has a key made of its name, each (server, digest) a score, and
 * the owner is the server with the highest. A server that is added takes 1 of n blocks from each of
 * the others and moves no other; one that is removed leaves its own to all the rest. The order of
 * the list does not matter. Pure functions, any thread. Vectors are published in
 * tests/base/place_vectors.txt.
 *
 *   key(name) = the first 8 bytes, little-endian, of SHA-256("kvasir-place-v1" + name)
 *   mix(x)    = x ^= x >> 30, x *= 0xbf58476d1ce4e5b9, x ^= x >> 27, x *= 0x94d049bb133111eb,
 *               x ^= x >> 31, modulo 2^64
 *   score     = mix(key(name) ^ mix(the first 8 bytes of the digest, little-endian))
 *   owner     = the highest score; of equal ones the smaller key
 */
#ifndef KVC_BASE_PLACE_H
#define KVC_BASE_PLACE_H

#include "kvc/types.h"

/* The key of a server's name, at most KVC_MAX_NAME_BYTES bytes and not empty: INVALID. IO if
 * libcrypto fails. *key_p is 0 on error. */
kvc_status kvc_place_key(const char *name, uint64_t *key_p) KVC_MUST_CHECK;
/* The server, a number below n, that owns the block; keys [n], all different, n at least 1. */
uint32_t kvc_place_owner(const uint64_t *keys, uint32_t n, const kvc_digest *digest);

#endif
