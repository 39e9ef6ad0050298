/*
 * samples.h: one full request and one full reply of each method, with every field set, and deep
 * comparison. For the tests of wire and transport and for the fuzz corpus.
 *
 * Single thread. Everything is static or lives in the arena given.
 */
#ifndef TESTS_SUPPORT_SAMPLES_H
#define TESTS_SUPPORT_SAMPLES_H

#include "base/arena.h"
#include "wire/msg.h"

/* A digest whose bytes follow from seed. */
kvc_digest sample_digest(uint32_t seed);
/* A request of this method; put requests carry data_bytes of payload in a few pieces. */
kvc_request sample_request(kvc_method method, size_t data_bytes, kvc_arena *arena);
/* A reply of this method; fetch replies carry data_bytes of payload. */
kvc_reply sample_reply(kvc_method method, size_t data_bytes, kvc_arena *arena);
/* Name of the first field that differs, or NULL. Payloads are compared as bytes. */
const char *sample_request_diff(const kvc_request *a, const kvc_request *b);
const char *sample_reply_diff(const kvc_reply *a, const kvc_reply *b);

#endif
