/*
 * fake_server.h: a server over any transport that a test drives: it answers by formula, counts
 * what it sees, and does what its rules say instead.
 *
 * Rows: byte b of the row of token t in part p is fake_byte(p, t, b). A digest is a hit in a match
 * when its first byte is 1. Calls come on transport threads; late answers come from a thread of the
 * fake. Every field of the struct below "under lock" is read by tests through the functions.
 */
#ifndef TESTS_CLIENT_FAKE_SERVER_H
#define TESTS_CLIENT_FAKE_SERVER_H

#include "base/thread.h"
#include "transport/transport.h"

#define FAKE_MAX_RULES 16
#define FAKE_MAX_PARTS 8
#define FAKE_MAX_LATE  256
#define FAKE_KEEP_MS   3600000u /* a delay_ms: until fake_let_go or fake_stop */

typedef enum fake_action {
    FAKE_STATUS = 1,   /* answer with the rule's status and hint */
    FAKE_LATE,         /* answer well, delay_ms later or once fake_let_go is called */
    FAKE_LATE_STATUS,  /* answer with the rule's status, likewise */
    FAKE_SHORT,        /* fetch: a byte less than there should be */
    FAKE_LONG,         /* fetch: a byte more */
    FAKE_WILD_MISSING, /* fetch: a missing row beyond the request */
    FAKE_FEW_STATUS,   /* put: one status less than values; stream: ends after two messages */
    FAKE_STATUS_LATER, /* stream: AGAIN after its last message */
} fake_action;

typedef struct fake_rule {
    kvc_method method;
    fake_action action;
    uint32_t skip, times; /* applies to times calls after skip calls of the method */
    kvc_status status;
    uint32_t retry_after_ms, delay_ms;
} fake_rule;

typedef struct fake_late {
    kvt_call *call;
    uint64_t due_ns;
    kvc_status status; /* OK: answer well */
} fake_late;

typedef struct fake_server {
    const kvt_ops *ops;
    kvt_listener *listener;
    kvc_mutex lock; /* rank LEAF; guards all below */
    kvc_cond cond;
    kvc_thread late_thread;
    bool stopping;
    kvc_limits limits;
    uint64_t boot_id, next_context;
    uint64_t stale_below; /* handles below it are stale */
    uint32_t n_blocks_last_open, n_extends;
    uint32_t missing_every; /* fetch: each token divisible by it is missing; 0: none */
    uint32_t row_bytes[FAKE_MAX_PARTS];
    bool no_tiers;     /* match: leave out the tiers that were asked for */
    bool schema_known; /* puts, matches and opens answer NOT_FOUND until one is registered */
    fake_rule rules[FAKE_MAX_RULES];
    uint32_t n_rules;
    uint32_t calls[KVC_METHOD_COUNT], max_in_flight, in_flight;
    uint64_t n_values, n_rows, max_payload_bytes, max_picks, max_groups, max_values, bad_values;
    fake_late late[FAKE_MAX_LATE];
    uint32_t n_late;
} fake_server;

static inline uint8_t fake_byte(uint32_t part, uint32_t token, uint32_t b)
{
    return (uint8_t)((token * 131u) ^ (part * 29u) ^ (b * 7u) ^ (b >> 8));
}

/* Byte b of the value of the block with this digest in a part: what puts must carry. */
static inline uint8_t fake_value_byte(const kvc_digest *digest, uint32_t part, uint32_t b)
{
    return (uint8_t)(digest->bytes[b % KVC_DIGEST_BYTES] + part + (b >> 5));
}

/* Zeroes and sets defaults; does not listen yet. */
void fake_init(fake_server *fake);
void fake_listen(fake_server *fake, const char *uri);
/* Ends the listener: clients see it go away. fake_listen may follow, with a new boot id. */
void fake_stop(fake_server *fake);
void fake_fini(fake_server *fake);
void fake_add_rule(fake_server *fake, const fake_rule *rule);
/* Every handle given so far is stale from now on. */
void fake_make_stale(fake_server *fake);
uint32_t fake_calls(fake_server *fake, kvc_method method);
/* Waits until n calls of the method have come. */
void fake_wait_calls(fake_server *fake, kvc_method method, uint32_t n);
/* Answers every call that waits for its time, and waits until none is without its answer. */
void fake_let_go(fake_server *fake);
/* Answers a call whose reply streams; over has the status to end it with. The fake server's own. */
void fake_stream_answer(fake_server *fake, kvt_call *call, fake_action action,
                        void (*over)(fake_server *fake, kvt_call *call, kvc_status status));

#endif
