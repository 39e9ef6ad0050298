/*
 * fixture.h: one fake server over inproc and one client of it, for the tests of this folder.
 *
 * Owned by the test's main thread.
 */
#ifndef TESTS_CLIENT_FIXTURE_H
#define TESTS_CLIENT_FIXTURE_H

#include "support.h"

#include <stdatomic.h>

#include "base/clock.h"
#include "base/digest.h"
#include "fake_server.h"
#include "kvc/client.h"

#define FIXTURE_URI "inproc://client-test"
#define MS          1000000ull
#define PATIENCE_MS (SUPPORT_PATIENCE_S * 1000)

typedef struct fixture {
    fake_server fake;
    kvc_client *client;
    kvc_digest schema;
} fixture;

void fixture_open(fixture *f);  /* listens with fake's settings, connects */
void fixture_start(fixture *f); /* fake_init, then fixture_open */
void fixture_stop(fixture *f);

/* The pointer, which is not NULL. */
static inline void *must(void *pointer)
{
    if (pointer == NULL)
        abort();
    return pointer;
}

static inline uint64_t in_ms(uint64_t ms)
{
    return kvc_now_ns() + ms * MS;
}

kvc_region *fixture_region(fixture *f, void *base, size_t len_bytes);
/* A context of n blocks. */
kvc_context *fixture_context(fixture *f, uint32_t n);
/* Digests whose first byte is 1: hits in a match. The caller frees. */
kvc_digest *fixture_digests(uint32_t n);
/* Fetches n rows of part from tokens first, first + step ... and checks each byte. */
void fixture_fetch_check(fixture *f, kvc_context *context, uint32_t part, uint32_t n,
                         uint32_t first, uint32_t step);
/* An op with room for what it needs, and how often it has completed. */
typedef struct counted {
    kvc_op op;
    atomic_uint done;
    kvc_status status;
    uint32_t hits;
    uint32_t picks[64];
    int8_t states[64];
    uint8_t rows[64 * 64];
} counted;

/* The callback of a counted op, which is its arg. */
void count_done(kvc_op *op, void *arg);
/* Waits until it has completed, once. */
void await_done(counted *c);
/* Fetches 64 rows of 64 bytes: tokens 0, 3, 6 ... of part 6. */
void fetch_async(fixture *f, kvc_context *context, kvc_region *region, counted *c,
                 uint64_t deadline_ns);

/* A valid schema of one part, its model named so. */
void fixture_schema(const char *model, kvc_schema *schema_p, kvc_part *part_p);

#endif
