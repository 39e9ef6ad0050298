/*
 * store.h: a real cachesvc with a client of it, and contexts whose rows follow from a formula, so
 * that every byte that comes back can be checked.
 *
 * Owned by the test's main thread, but for store_check, which any thread may call.
 */
#ifndef TESTS_E2E_STORE_H
#define TESTS_E2E_STORE_H

#include "support.h"

#include "base/clock.h"
#include "base/digest.h"
#include "daemon.h"
#include "kvc/client.h"

#define STORE_BLOCK_TOKENS 64u
#define STORE_PARTS        3u /* 0 and 1: KV; 2: INDEX */
#define STORE_MAX_BLOCKS   256u

extern const uint32_t store_row_bytes[STORE_PARTS];

typedef struct store {
    char folder[256];
    support_daemon daemon;
    char tcp_uri[256], unix_uri[320];
    const char *dram_bytes; /* settings of the next start */
    bool has_lmdb;
    bool streams; /* puts go through kvc_put_stream */
    char lmdb_path[320];
    kvc_client *client;
    kvc_digest schema;
    kvc_digest digests[STORE_MAX_BLOCKS]; /* of one context of that many blocks */
} store;

/* A folder, a daemon on tcp and unix, a client of tcp, the schema registered. */
void store_open(store *s, const char *dram_bytes, bool has_lmdb);
/* The same, its lmdb tier in this folder. */
void store_open_at(store *s, const char *dram_bytes, const char *lmdb_path);
/* The same with no daemon, client or registered schema yet. */
void store_make(store *s, const char *dram_bytes, const char *lmdb_path);
/* Connects, if that was not done, and registers the schema. */
kvc_status store_register(store *s);
/* Starts the daemon (again) at the same addresses. */
void store_start(store *s);
/* The same; false if it does not start. */
bool store_try_start(store *s);
/* The same, not waiting until it serves: for those who kill it before. */
bool store_spawn(store *s);
/* Ends it by a signal; the client stays. */
void store_end(store *s, int signal);
void store_close(store *s);
/* Another client, of these URIs. */
kvc_client *store_connect(const char *uris);

uint8_t store_byte(uint32_t part, uint32_t token, uint32_t b);
/* Puts all parts of blocks first .. first + n; repeats what is answered AGAIN. Returns how many
 * values were stored; the others were there. */
uint32_t store_put(store *s, uint32_t first, uint32_t n, kvc_promise promise);
kvc_context *store_context(store *s, kvc_client *client, uint32_t n_blocks);
uint32_t store_match(store *s, uint32_t n_blocks);
/*
 * Fetches n random rows of the part below n_tokens and compares every byte. Gives the op's status;
 * rows that are missing must say NOT_FOUND and be untouched, and are counted in info_p. *wrong_p
 * is true if any byte was another.
 */
kvc_status store_check(kvc_client *client, kvc_context *context, uint32_t part, uint32_t n,
                       uint32_t n_tokens, uint64_t seed, kvc_fetch_info *info_p, bool *wrong_p);
/* The same, which must succeed with every row there. */
void store_expect(store *s, kvc_context *context, uint32_t n_tokens, kvc_fetch_info *info_p);
uint64_t store_counter(store *s, const char *name);
/* Writes the schema's canonical text to a file. */
void store_write_schema(const char *path);

#endif
