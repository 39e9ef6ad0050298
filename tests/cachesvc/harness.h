/*
 * harness.h: what the server's tests share: schemas, contents, a server in this process, and calls
 * that wait. One thread per harness_peer.
 */
#ifndef KVS_TEST_HARNESS_H
#define KVS_TEST_HARNESS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include <cmocka.h>

#include "base/clock.h"
#include "base/digest.h"
#include "server.h"

#define H_TOKENS    64u
#define H_MAX_BATCH 200u

/* A schema of n_parts parts with ids 0, 10, 20 ...; the last one is of kind INDEX if with_index. */
typedef struct h_schema {
    kvc_schema schema;
    kvc_part parts[16];
    kvc_digest digest;
} h_schema;
void h_schema_init(h_schema *schema, const char *model, uint32_t n_parts, uint32_t row_bytes,
                   bool with_index);

/* Name and content of block number b: any test can tell what any row must hold. */
kvc_digest h_digest(uint64_t b);
void h_fill(uint64_t b, uint32_t part, uint32_t row_bytes, void *value);
bool h_row_is(uint64_t b, uint32_t part, uint32_t row, uint32_t row_bytes, const void *bytes);

/* Where h_server_init lets servers listen; NULL: inproc, each at a name of its own. */
extern const char *h_listen;
/* A server with small settings; change them before h_server_start. */
typedef struct h_server {
    kvs_settings settings;
    kvc_config *config;
    kvs_server *server;
    char listen[512];
} h_server;
void h_server_init(h_server *h);
void h_server_start(h_server *h);
void h_server_stop(h_server *h, bool flush);
void h_server_fini(h_server *h);
/* A fresh folder under the system's temporary one, and its removal with all it holds. */
void h_temp_dir(char path[256]);
void h_remove_dir(const char *path);
/* What the system says that the tiers take: memory of this process's dram segments, and blocks of
   the files in a folder. Never asks the tiers themselves. */
uint64_t h_segment_bytes(void);
uint64_t h_disk_bytes(const char *path);
/* Asserts that both stay within the settings of a server, the only one in this process. */
void h_check_caps(const h_server *h);

/* Breaks the connections to a unix socket at the server's ends; the socket goes on listening. */
void h_break_shm(const char *path);

/* A connection and the last reply. */
typedef struct h_peer h_peer;
struct h_peer {
    const kvt_ops *ops;
    kvt_conn *conn;
    kvt_xfer xfer;
    kvc_mutex lock;
    kvc_cond cond;
    bool done;
    uint64_t timeout_ns; /* of each call; 0: none */
    char *data;          /* of the last reply */
    uint64_t data_bytes;
    kvc_missing_row missing[65536];
    uint32_t n_missing;
    uint32_t n_opaque; /* schemas that Describe marked */
    int8_t status[H_MAX_BATCH];
    uint8_t *tiers; /* where those of a match go; NULL: nowhere */
    /* Of a reply that streams; data and missing are those of all its messages. */
    uint32_t n_messages, n_picks, n_values, rows_dram, rows_lmdb;
    uint64_t max_data_bytes; /* of one message */
    kvc_block_value values[8192];
    void (*on_message)(h_peer *peer); /* NULL: nothing */
    /* Of the last MapContext: descriptors, which are the test's, and what segments they are. */
    int fds[KVT_MAX_FDS];
    uint32_t n_fds;
    kvc_map_segment segments[KVC_MAX_MAP_SEGMENTS];
};
h_peer *h_connect(const char *uri, const char *tenant);
void h_disconnect(h_peer *peer);
/* Sends and waits; the reply is in peer->xfer.reply (its pointers are not), data and missing. */
kvc_status h_call(h_peer *peer, const kvc_request *req);

kvc_status h_register(h_peer *peer, const h_schema *schema);
/* Puts parts [n] (ids) of block b in one request; peer->status has what became of each. */
kvc_status h_put(h_peer *peer, const h_schema *schema, uint64_t b, const uint32_t *parts,
                 uint32_t n, kvc_promise promise);
/* The same for n values, number i of which is part parts[i] of block blocks[i]. */
kvc_status h_put_each(h_peer *peer, const h_schema *schema, const uint64_t *blocks,
                      const uint32_t *parts, uint32_t n, kvc_promise promise);
/* The status of one value put alone. */
kvc_status h_put1(h_peer *peer, const h_schema *schema, uint64_t b, uint32_t part,
                  kvc_promise promise);
/* Opens a context over blocks first .. first + n - 1. */
kvc_status h_open(h_peer *peer, const h_schema *schema, uint64_t first, uint32_t n, uint64_t ttl_ms,
                  uint64_t *context_p);
kvc_status h_extend(h_peer *peer, uint64_t context, uint32_t before, uint64_t first, uint32_t n);
kvc_status h_close(h_peer *peer, uint64_t context);
kvc_status h_match(h_peer *peer, const h_schema *schema, uint64_t first, uint32_t n,
                   const uint32_t *parts, uint32_t n_parts, uint32_t *hits_p);
/* tiers [n]: NULL: not asked for. */
kvc_status h_match_tiers(h_peer *peer, const h_schema *schema, uint64_t first, uint32_t n,
                         const uint32_t *parts, uint32_t n_parts, uint8_t *tiers, uint32_t *hits_p);
kvc_status h_fetch(h_peer *peer, uint64_t context, uint32_t part, const uint32_t *picks,
                   uint32_t n);
/* Fetches picks of a context over blocks first.. and asserts every row bit-equal. */
void h_fetch_equal(h_peer *peer, const h_schema *schema, uint64_t context, uint64_t first,
                   uint32_t part, const uint32_t *picks, uint32_t n);

/* xorshift; the seed is printed by tests that use it. */
uint64_t h_random(uint64_t *state);

/*
 * Starts `program`, which is this test's own, as "program mode listen", and waits for the byte that
 * it writes to its standard output once it has done its part. Gives its pid.
 */
pid_t h_start_again(const char *program, const char *mode, const char *listen);

#endif
