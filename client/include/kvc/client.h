/*
 * client.h: the client library of a Kvasir store.
 *
 * Calls are asynchronous with a caller-allocated kvc_op. A submit that fails returns its error and
 * never calls back; one that succeeds completes the op exactly once, on the client's own progress
 * thread, with no lock held. kvc_op_wait blocks instead. Deadlines are absolute nanoseconds of
 * CLOCK_MONOTONIC, 0 for the client's default. Every function may be called from any thread unless
 * it says otherwise; one op belongs to one request at a time.
 *
 * Lost connections are re-established by themselves. A request that failed because the server was
 * away, or full (AGAIN with a hint), is retried within its deadline when repeating it is harmless:
 * every request of this interface is (first put wins; extends carry their position) but kvc_hold,
 * which ends with UNAVAILABLE where its connection broke before the answer. Where the deadline ends
 * that, the op has the status of its last attempt (AGAIN, UNAVAILABLE ...), or TIMED_OUT if it was
 * never answered.
 *
 * Structs that begin with size_bytes: the caller sets it to sizeof its own struct. They grow only
 * at their ends, by whole words. A shorter one, of an older header, is taken, and what it lacks is
 * 0; one that is longer than this library's, or no multiple of a word, is INVALID.
 */
#ifndef KVC_CLIENT_H
#define KVC_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvc/region.h"
#include "kvc/types.h"
#include "kvc/ways.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

typedef struct kvc_client kvc_client;
typedef struct kvc_region kvc_region;
typedef struct kvc_context kvc_context;

typedef struct kvc_client_opts {
    size_t size_bytes; /* sizeof(kvc_client_opts) */
    /* "grpc://host:port,grpc+unix:///path": in order of preference. "rdma://host:port?sums=1" asks
     * for the sums below by this address alone, "?sums=0" refuses them for it. */
    const char *uris;
    uint64_t connect_timeout_ns; /* 0: 5 s */
    uint64_t default_timeout_ns; /* of a request without a deadline; 0: 30 s */
    uint32_t n_channels;         /* connections that bulk is striped over; 0: 2 */
    /* Over rdma:// both ends sum and verify all that crosses (XXH3-64), which costs each a look at
     * every byte; a difference is CORRUPT. Without it, the fabric's own CRCs are all there is. */
    uint64_t sums; /* not 0: so */
    /* Over rdma://: bytes of regions that are registered at once, to be written to; 0: 1 GiB, and
     * at most a quarter of the limit on locked memory, together with all other clients of the
     * process. Of a larger region only so much comes without a copy (log, and count
     * rdma_regions_too_large). */
    uint64_t region_bytes;
} kvc_client_opts;

/*
 * Connects and exchanges limits (Describe). Blocks up to connect_timeout_ns, trying every URI again
 * and again: a server that is just starting is worth the wait. Copies opts.
 * INVALID: bad URI; UNSUPPORTED: no transport built in for it; UNAVAILABLE or TIMED_OUT: nobody
 * answered. *client_p is NULL on error.
 */
kvc_status kvc_client_open(const kvc_client_opts *opts, kvc_client **client_p) KVC_MUST_CHECK;
/* Cancels what is in flight and returns after every callback has run; up to two seconds more where
 * a lost server is being looked for, one more where a server is told that memory of its GPU has
 * been closed. NULL is fine. Never from a callback. Contexts and regions of the client must have
 * been closed before. */
void kvc_client_close(kvc_client *client);
/* Limits that the server advertised at connect; lives as long as the client. */
const kvc_limits *kvc_client_limits(const kvc_client *client);
/* Whether all that crosses the present connection, one over rdma://, is summed and verified. */
bool kvc_client_sums(kvc_client *client);
/* Text of the last error on the calling thread, for people; never NULL; valid to the next call. */
const char *kvc_last_error(void);

/* ---- operations ---------------------------------------------------------------------------- */

typedef struct kvc_op kvc_op;
/* Runs on the progress thread. May submit other ops; must not block, wait or close the client. */
typedef void kvc_done_fn(kvc_op *op, void *arg);

/* Fixed size, allocated by the caller, untouched by it between submit and completion. */
struct kvc_op {
    kvc_status status; /* result, once complete */
    kvc_done_fn *done;
    void *arg;
    void *impl[13]; /* the library's */
};

/* done NULL: use kvc_op_wait. The op may be used again after completion without another init. */
void kvc_op_init(kvc_op *op, kvc_done_fn *done, void *arg);
/* Blocks until the op is complete; returns op->status. deadline_ns (0: none) passed: TIMED_OUT, and
 * the op is still in flight. INVALID: never submitted, or it has a done. Not from a callback. */
kvc_status kvc_op_wait(kvc_op *op, uint64_t deadline_ns);
/* Asks for an early end; completion still comes, once, with CANCELLED or what happened before. */
void kvc_op_cancel(kvc_op *op);

/* ---- requests -------------------------------------------------------------------------------- */

/* Makes the schema known to the server; blocks. *digest_p is its name. */
kvc_status kvc_schema_register(kvc_client *client, const kvc_schema *schema, uint64_t deadline_ns,
                               kvc_digest *digest_p) KVC_MUST_CHECK;

typedef struct kvc_value {
    kvc_digest digest; /* of the block */
    uint32_t part;
    uint32_t len_bytes;
    size_t src_off_bytes; /* in the region */
} kvc_value;

/*
 * Stores n whole values from src. Larger batches than a message holds are split and striped.
 * Borrows values; keeps src's bytes and status [n] until completion. status[i]: OK, EXISTS, AGAIN,
 * ... per value; the op is OK when every request was answered. INVALID: an offset outside src.
 */
kvc_status kvc_put(kvc_client *client, const kvc_digest *schema, kvc_promise promise,
                   const kvc_value *values, uint32_t n, const kvc_region *src, int8_t *status,
                   uint64_t deadline_ns, kvc_op *op) KVC_MUST_CHECK;

/*
 * The same, with the bytes of a value sent only where the server lacks it: for batches of which
 * some may be there, as of a prompt that others share. Costs a round trip more than kvc_put. ttl_ms
 * (0: none): for so long each value's block is kept from eviction, as far as the tenant's holds
 * leave room; granted_ms [n] (may be NULL), kept until completion, gets what was granted, 0 where
 * nothing was, and is undefined where status[i] is neither OK nor EXISTS.
 */
kvc_status kvc_put_stream(kvc_client *client, const kvc_digest *schema, kvc_promise promise,
                          uint64_t ttl_ms, const kvc_value *values, uint32_t n,
                          const kvc_region *src, int8_t *status, uint64_t *granted_ms,
                          uint64_t deadline_ns, kvc_op *op) KVC_MUST_CHECK;

/* *hits_p = leading digests that have all of parts [n_parts] (0: all but index parts). Borrows
 * digests and parts; keeps hits_p until completion. */
kvc_status kvc_match(kvc_client *client, const kvc_digest *schema, const kvc_digest *digests,
                     uint32_t n, const uint32_t *parts, uint32_t n_parts, uint32_t *hits_p,
                     uint64_t deadline_ns, kvc_op *op) KVC_MUST_CHECK;

/*
 * The same, with the tier of each hit: tiers [n], kept until completion, gets a kvc_tier for each
 * of the *hits_p leading digests: that of the slowest of parts, read from the fastest of its
 * copies. The rest of tiers is undefined.
 */
kvc_status kvc_match_tiers(kvc_client *client, const kvc_digest *schema, const kvc_digest *digests,
                           uint32_t n, const uint32_t *parts, uint32_t n_parts, uint8_t *tiers,
                           uint32_t *hits_p, uint64_t deadline_ns, kvc_op *op) KVC_MUST_CHECK;

/*
 * Opens a context over blocks [n] (copied; n may be 0). Blocks. The library keeps the digest list
 * and reopens by itself when the server answers STALE_HANDLE. ttl_ms 0: the server's default.
 */
kvc_status kvc_context_open(kvc_client *client, const kvc_digest *schema, const kvc_digest *blocks,
                            uint32_t n, uint64_t ttl_ms, uint64_t deadline_ns,
                            kvc_context **context_p) KVC_MUST_CHECK;
/* Appends blocks [n], copied. Blocks. On error the context is as it was. */
kvc_status kvc_context_extend(kvc_context *context, const kvc_digest *blocks, uint32_t n,
                              uint64_t deadline_ns) KVC_MUST_CHECK;
/*
 * Keeps the first n_blocks, as when drafted tokens were refused. Blocks. Fetches that are in flight
 * may still find the rows behind them. On error the context is as it was. INVALID: it is shorter.
 */
kvc_status kvc_context_truncate(kvc_context *context, uint32_t n_blocks,
                                uint64_t deadline_ns) KVC_MUST_CHECK;
/*
 * A second context over the first n_blocks of this one, as for a beam; each goes its own way then.
 * Blocks. ttl_ms 0: the server's default. INVALID: it is shorter. *context_p is NULL on error.
 */
kvc_status kvc_context_fork(kvc_context *context, uint32_t n_blocks, uint64_t ttl_ms,
                            uint64_t deadline_ns, kvc_context **context_p) KVC_MUST_CHECK;
/* Closes it on the server and frees. Waits for a reopen that is under way, five seconds at most,
 * and for the server, best effort and a second at most. No fetch or extend may be in flight. NULL
 * is fine. Not from a callback. */
void kvc_context_close(kvc_context *context);
/* Blocks that the context holds. */
uint32_t kvc_context_blocks(const kvc_context *context);

/* Rows of one part of one context: pick i lands at dst_off_bytes + slot(i) * row_bytes, where
 * slot(i) = dst_slots[i], or i where dst_slots is NULL. */
typedef struct kvc_pick_group {
    kvc_context *context;
    uint32_t part, row_bytes, n_picks;
    const uint32_t *picks; /* token positions */
    const uint32_t *dst_slots;
    size_t dst_off_bytes;
} kvc_pick_group;

/* Where the rows of a fetch came from; filled at completion. */
typedef struct kvc_fetch_info {
    uint32_t rows_gpu, rows_dram, rows_lmdb, rows_missing;
    uint32_t requests;
} kvc_fetch_info;

/*
 * Fetches rows into dst. More rows than a message holds are split and striped over the channels,
 * up to 2 MiB for each channel in flight at once. Borrows groups (the array); keeps picks,
 * dst_slots, dst, status and info_p until completion. status [total picks] may be NULL; a missing
 * row leaves its bytes untouched and has status[i] = NOT_FOUND (or AGAIN, IO, CORRUPT); the op is
 * still OK. Where the op fails, or a request was repeated, slots of rows that are not there are
 * undefined. info_p may be NULL. Over rdma://, rows that the server writes to dst itself: a cancel
 * or the deadline completes the op only once it has said that it writes no more; where that takes
 * longer than a quarter of the time there was (1 s at least, 4 s at most), the connection is given
 * up, and what else is on it is asked again (count rdma_let_go_late).
 */
kvc_status kvc_fetch(kvc_client *client, const kvc_pick_group *groups, uint32_t n_groups,
                     const kvc_region *dst, int8_t *status, kvc_fetch_info *info_p,
                     uint64_t deadline_ns, kvc_op *op) KVC_MUST_CHECK;

/* The same, also over rdma://, in one request for up to max_picks rows, which come as the messages
 * of a stream: for many rows at once, where latency counts less than one place in the server's
 * queues. */
kvc_status kvc_fetch_stream(kvc_client *client, const kvc_pick_group *groups, uint32_t n_groups,
                            const kvc_region *dst, int8_t *status, kvc_fetch_info *info_p,
                            uint64_t deadline_ns, kvc_op *op) KVC_MUST_CHECK;

/*
 * Queries that attend over the rows of one list of picks, beside the data. The result is a partial:
 * o normalised over the rows that the server has, lse the natural log of the sum of exponentials;
 * rows that it lacks have their status and count in none of it. Partials merge by log-sum-exp (see
 * AttendRows in kvasir.proto). Scale, softcap, heads and rotary embedding are those of the part.
 */
typedef struct kvc_attend_group {
    kvc_context *context;
    uint32_t part, n_picks;
    const uint32_t *picks; /* token positions */
    const uint32_t *ranks; /* [n_picks] positions at which keys are rotated; NULL: as stored */
    const uint32_t *q_positions;  /* [n_q] where the server rotates q; NULL: it is as it shall be */
    uint32_t row_bytes;           /* of the part, for what is learnt about ways; 0: not known */
    uint32_t n_q, n_q_heads, dim; /* dim: the part's q_dim and v_dim */
    kvc_dtype q_dtype, o_dtype;   /* F32, F16 or BF16 */
    const void *q;                /* [n_q, n_q_heads, dim]; NULL: the group before has the same */
    void *o;                      /* [n_q, n_q_heads, dim] */
    float *lse;                   /* [n_q, n_q_heads] */
} kvc_attend_group;

/*
 * Attends in one request. Borrows groups (the array); keeps picks, ranks, q, o, lse, status and
 * info_p until completion. status [total picks] (may be NULL) and info_p as for kvc_fetch; where
 * the op fails o and lse are undefined. A server that attends too much already ends it with AGAIN
 * at once, with no retry: the rows can be fetched, which costs it less. UNSUPPORTED: the server
 * does not attend, or not over this part. INVALID: more than one request holds (max_picks,
 * max_groups, max_attend_queries, max_message_bytes of queries or of results): the caller cuts it.
 */
kvc_status kvc_attend(kvc_client *client, const kvc_attend_group *groups, uint32_t n_groups,
                      int8_t *status, kvc_fetch_info *info_p, uint64_t deadline_ns,
                      kvc_op *op) KVC_MUST_CHECK;

/* Where the values of one part go: that of block i to dst_off_bytes + slot(i) * stride_bytes, where
 * slot(i) = dst_slots[i], or i where dst_slots is NULL. */
typedef struct kvc_block_part {
    uint32_t part, value_bytes; /* block_tokens * row_bytes of the part */
    size_t dst_off_bytes, stride_bytes;
    const uint32_t *dst_slots;
} kvc_block_part;

/*
 * Fetches whole values: of each of digests [n], each of parts [n_parts], for prefix reuse and for
 * chunks. Borrows digests and parts; keeps dst_slots, dst, status and tiers until completion.
 * status [n * n_parts], in the order of the digests and then of the parts: OK, NOT_FOUND (its bytes
 * are untouched), AGAIN, IO, CORRUPT; the op is still OK. tiers [n * n_parts] (may be NULL):
 * kvc_tier of each value found, else 0. INVALID: no parts, or a place outside dst. Over rdma:// the
 * server may write values to dst itself, as rows are by kvc_fetch.
 */
kvc_status kvc_fetch_blocks(kvc_client *client, const kvc_digest *schema, const kvc_digest *digests,
                            uint32_t n, const kvc_block_part *parts, uint32_t n_parts,
                            const kvc_region *dst, int8_t *status, uint8_t *tiers,
                            uint64_t deadline_ns, kvc_op *op) KVC_MUST_CHECK;

/* ---- rows without a request (shm) --------------------------------------------------------------
 */

/*
 * Over shm:// a context's values can be mapped: kvc_fetch and kvc_fetch_stream then copy its rows
 * from the server's memory with no request, and ask only for what is not mapped. The results are
 * the same, but that a row which an Erase took away in that very moment, and which is answered
 * NOT_FOUND, may have left bytes in its slot. What is mapped stays in its place at the server (a
 * map-pin, within caps).
 */
typedef struct kvc_map_opts {
    size_t size_bytes; /* sizeof(kvc_map_opts) */
    bool all;      /* contexts map all parts but index ones as they open and grow, best effort */
    bool populate; /* fault a segment's pages in as it is mapped */
    /* May be NULL: a segment has been mapped, or is about to be unmapped; for who registers memory
     * with a device. On a thread that maps, closes, unmaps or lets go, or ends a fetch, or on one
     * of the client's own; must not call back. */
    void (*on_segment)(void *arg, const void *base, size_t len_bytes, bool mapped);
    void *arg;
    /* A segment that no context has had a value in for so long is unmapped, so that the server can
     * give it to others. 0: 10 s. */
    uint64_t keep_ns;
    /* Both or none: values may lie in a GPU of the server too, where it has a copy, if this process
     * is the server's own user's or the server names its user (shm_map_gpu_uids): nothing keeps
     * whoever has that memory open from writing there, and all that the tenant's workers attend
     * over is theirs to spoil, so only read. gpu_open opens it (kvk_cuda_share_open) and gives
     * where the caller's device sees it; should it fail, none is asked for until the next
     * kvc_client_map_contexts. gpu_close gives it back; what is open when a connection breaks the
     * server keeps until the process ends. On the threads of on_segment, with arg; must not call
     * back. */
    kvc_status (*gpu_open)(void *arg, const kvc_gpu_handle *handle, size_t len_bytes,
                           void **base_p);
    void (*gpu_close)(void *arg, void *base);
} kvc_map_opts;

typedef struct kvc_map_info {
    uint64_t values, by_request;      /* of the context: mapped; not */
    uint64_t pinned_bytes, max_bytes; /* of all maps of the tenant; their cap */
} kvc_map_info;

/* What holds for segments and contexts that are mapped from now on. Copies opts. */
kvc_status kvc_client_map_contexts(kvc_client *client, const kvc_map_opts *opts);
/*
 * Maps parts [n_parts] (0: all but index parts) of the context, or what came since; later extends
 * follow by themselves. Other parts than before replace them. Blocks. UNSUPPORTED: the connection
 * is not shm; DENIED: the server lets only other users map. info_p may be NULL.
 */
kvc_status kvc_context_map(kvc_context *context, const uint32_t *parts, uint32_t n_parts,
                           uint64_t deadline_ns, kvc_map_info *info_p);
/* Gives it back; fetches go by request. Blocks for a second at most. */
void kvc_context_unmap(kvc_context *context);

typedef struct kvc_mapped_value {
    const void *rows; /* [block_tokens, row_bytes], read-only, in a segment */
    uint32_t row_bytes;
    uint64_t stamp;
    const void *device_rows; /* rows is NULL: in memory that gpu_open has opened, only to be read */
} kvc_mapped_value;

/*
 * Where a value lies, for who reads it himself. The address is good until the context is mapped,
 * grows, is unmapped or closed. The server may take the map back, and use the place for other
 * values: read first, then ask kvc_context_is_mapped, and drop what was read if it says no. A
 * device reads until its work has completed. NOT_FOUND: by request.
 */
kvc_status kvc_context_locate(kvc_context *context, uint32_t part, uint32_t block,
                              kvc_mapped_value *value_p);
bool kvc_context_is_mapped(kvc_context *context, uint64_t stamp);
/*
 * Keeps the memory that the map of this stamp lies in mapped, whatever happens to map and
 * connection, until kvc_map_let_go: for who reads addresses of kvc_context_locate while other
 * threads may use the context, or the connection may go. NULL: the context is not mapped so any
 * more. Whether the bytes are still the values' is kvc_context_is_mapped's to say. Let go before
 * the context is closed. Any thread; does not block.
 */
typedef struct kvc_map_hold kvc_map_hold;
kvc_map_hold *kvc_context_hold_map(kvc_context *context, uint64_t stamp);
void kvc_map_let_go(kvc_map_hold *hold); /* may unmap segments; NULL is fine */

/* ---- opaque values: of any length, under any bytes ---------------------------------------------
 */

/* The name of a key of an opaque schema, as all calls take it. key may be NULL when key_bytes is 0.
 * IO if libcrypto fails. */
kvc_status kvc_opaque_key(const kvc_digest *schema, const void *key, size_t key_bytes,
                          kvc_digest *digest_p) KVC_MUST_CHECK;

typedef struct kvc_opaque_value {
    kvc_digest digest;  /* of the key */
    size_t off_bytes;   /* in the region */
    uint64_t len_bytes; /* of the value; to get one: the room there, then its length */
} kvc_opaque_value;

/*
 * Stores n values from src, each cut into pieces, which are sent only where the server lacks them.
 * Borrows values; keeps src's bytes and status [n] until completion. status[i]: OK; EXISTS, also
 * where another value has the key; AGAIN, where there is no room, or another value is being put
 * under the key: put it again later; ... The op is OK when every piece was answered. ttl_ms as for
 * kvc_put_stream. INVALID: a place outside src, or more than KVC_MAX_PIECES pieces.
 */
kvc_status kvc_opaque_put(kvc_client *client, const kvc_digest *schema, kvc_promise promise,
                          uint64_t ttl_ms, const kvc_opaque_value *values, uint32_t n,
                          const kvc_region *src, int8_t *status, uint64_t deadline_ns,
                          kvc_op *op) KVC_MUST_CHECK;

/*
 * Gets n values. Keeps values, dst and status [n] until completion. status[i]: OK, all of the value
 * is at its place, its sum was compared, and len_bytes is its length; NO_SPACE: it is longer than
 * its room, and len_bytes says how long; NOT_FOUND; AGAIN, IO, CORRUPT. The bytes of a value that
 * is not OK are undefined, and those behind one are untouched. INVALID: a place outside dst.
 */
kvc_status kvc_opaque_get(kvc_client *client, const kvc_digest *schema, kvc_opaque_value *values,
                          uint32_t n, const kvc_region *dst, int8_t *status, uint64_t deadline_ns,
                          kvc_op *op) KVC_MUST_CHECK;

/* tiers [n], kept until completion: where each value would be read from (kvc_tier), 0 where it is
 * not there. Borrows digests. */
kvc_status kvc_opaque_match(kvc_client *client, const kvc_digest *schema, const kvc_digest *digests,
                            uint32_t n, uint8_t *tiers, uint64_t deadline_ns,
                            kvc_op *op) KVC_MUST_CHECK;

/* ---- what stays and what goes ------------------------------------------------------------------
 */

typedef struct kvc_erase_info {
    uint64_t values, bytes; /* that were there */
} kvc_erase_info;

/*
 * Removes the values of blocks [n] in parts [n_parts] (0: all) from every tier of the server,
 * whoever else names them and whatever holds them. OK: no reader has them any more, and no restart
 * or power loss brings them back; their bytes may stay in freed pages of the server's files until
 * those are used again. TIMED_OUT, CANCELLED: some may be left; those met are served no more.
 * Borrows digests and parts; keeps info_p (may be NULL) until completion.
 */
kvc_status kvc_erase(kvc_client *client, const kvc_digest *schema, const kvc_digest *digests,
                     uint32_t n, const uint32_t *parts, uint32_t n_parts, kvc_erase_info *info_p,
                     uint64_t deadline_ns, kvc_op *op) KVC_MUST_CHECK;

typedef struct kvc_hold_info {
    uint64_t hold;                    /* its name, for renew and release */
    uint64_t ttl_ms;                  /* as the server took it */
    uint64_t tenant_bytes, max_bytes; /* of all holds of the tenant; their cap */
    uint32_t n_blocks;
} kvc_hold_info;

/*
 * Keeps what the context's blocks hold from eviction for ttl_ms (0: the server's default), also
 * after the context was closed. NO_SPACE: the tenant's cap. UNAVAILABLE, TIMED_OUT: it may
 * have been made, and then ends with its TTL; it is not asked for twice. Keeps info_p until
 * completion; context must stay open until then.
 */
kvc_status kvc_hold(kvc_context *context, uint64_t ttl_ms, kvc_hold_info *info_p,
                    uint64_t deadline_ns, kvc_op *op) KVC_MUST_CHECK;
/* The same for blocks by name [n], of an opaque schema values, without a context. Borrows schema
 * and digests. INVALID: more than limits.max_digests. */
kvc_status kvc_hold_blocks(kvc_client *client, const kvc_digest *schema, const kvc_digest *digests,
                           uint32_t n, uint64_t ttl_ms, kvc_hold_info *info_p, uint64_t deadline_ns,
                           kvc_op *op) KVC_MUST_CHECK;
/* Its TTL begins anew. NOT_FOUND: it ran out, was released, or the server was restarted. */
kvc_status kvc_hold_renew(kvc_client *client, uint64_t hold, uint64_t ttl_ms, kvc_hold_info *info_p,
                          uint64_t deadline_ns, kvc_op *op) KVC_MUST_CHECK;
/* Ends a hold. NOT_FOUND as for renew. */
kvc_status kvc_release(kvc_client *client, uint64_t hold, uint64_t deadline_ns,
                       kvc_op *op) KVC_MUST_CHECK;

/* Values, by what became of them. */
typedef struct kvc_prefetch_info {
    uint64_t there, moved, missing;
    uint64_t left; /* in a slower tier still: no room, or somebody else has them in hand */
    uint64_t moved_bytes;
} kvc_prefetch_info;

/*
 * Loads parts [n_parts] (0: all but index parts) of blocks first_block .. first_block + n_blocks -
 * 1 (n_blocks 0: to the end) to tier (KVC_TIER_DRAM; KVC_TIER_GPU: UNSUPPORTED where the server
 * has none that works), as far as there is room that loses nothing. Completes when it is done;
 * kvc_op_cancel stops it, and what was loaded stays. Borrows parts; keeps info_p until completion;
 * context must stay open until then.
 */
kvc_status kvc_prefetch(kvc_context *context, const uint32_t *parts, uint32_t n_parts,
                        uint32_t first_block, uint32_t n_blocks, kvc_tier tier,
                        kvc_prefetch_info *info_p, uint64_t deadline_ns, kvc_op *op) KVC_MUST_CHECK;
/* The same for blocks by name [n], without a context; of an opaque schema values, and n_parts is 0.
 * Borrows schema, digests and parts. INVALID: more than limits.max_digests. */
kvc_status kvc_prefetch_blocks(kvc_client *client, const kvc_digest *schema,
                               const kvc_digest *digests, uint32_t n, const uint32_t *parts,
                               uint32_t n_parts, kvc_tier tier, kvc_prefetch_info *info_p,
                               uint64_t deadline_ns, kvc_op *op) KVC_MUST_CHECK;

/* ---- contexts saved by name --------------------------------------------------------------------
 */

/* What has a name, and what may take its place. */
typedef struct kvc_saved_when {
    bool replace;           /* whatever has the name now */
    uint64_t if_generation; /* or only this one; both 0: nothing, first put wins */
} kvc_saved_when;

/*
 * Saves a context under context->name: what the server gives is not looked at. digests [n_blocks],
 * ids [n_ids], tail: rows [n_tail, row_bytes] for each of tail_parts, tail_bytes in all. Sent in
 * messages, visible with the last one; blocks until it is. *generation_p (may be NULL) is its new
 * generation. EXISTS: something else has the name. NOT_FOUND: nothing does, or the schema is not
 * registered. NO_SPACE: max_saved, max_saved_bytes. UNSUPPORTED: DURABLE without lmdb. INVALID. The
 * values of the blocks are put as ever.
 */
kvc_status kvc_saved_put(kvc_client *client, const kvc_saved_context *context,
                         const kvc_digest *digests, const uint32_t *ids, const void *tail,
                         size_t tail_bytes, const kvc_saved_when *when, uint64_t deadline_ns,
                         uint64_t *generation_p) KVC_MUST_CHECK;

typedef struct kvc_saved {
    kvc_saved_context context;
    const kvc_digest *digests; /* [n_blocks] */
    const uint32_t *ids;       /* [n_ids] */
    const uint8_t *tail;       /* tail_bytes */
    size_t tail_bytes;
} kvc_saved;

/* A saved context, all of one generation. Blocks. *saved_p is given to the caller: kvc_saved_free.
 * NOT_FOUND, CORRUPT (damaged on the server's disk), PROTOCOL, NO_MEMORY. Its blocks' values may
 * have been evicted: kvc_match. */
kvc_status kvc_saved_get(kvc_client *client, const char *name, uint64_t deadline_ns,
                         kvc_saved **saved_p) KVC_MUST_CHECK;
void kvc_saved_free(kvc_saved *saved); /* NULL is fine */

/* Called for each saved context in the order of names, on the caller's thread; what it points at
 * lives until it returns, tail_parts are left out. False: stop. */
typedef bool kvc_saved_each(void *arg, const kvc_saved_context *context);
/* Blocks. Names that come or go meanwhile may be listed or not. */
kvc_status kvc_saved_list(kvc_client *client, uint64_t deadline_ns, kvc_saved_each *each,
                          void *arg) KVC_MUST_CHECK;
/* Forgets it, for good on OK. Blocks. if_generation 0: any. NOT_FOUND; EXISTS: another one. */
kvc_status kvc_saved_delete(kvc_client *client, const char *name, uint64_t if_generation,
                            uint64_t deadline_ns) KVC_MUST_CHECK;

/* A schema by its digest, checked against it. Blocks. *schema_p is given to the caller: free().
 * NOT_FOUND: it is not registered there. PROTOCOL: it is another one. */
kvc_status kvc_schema_get(kvc_client *client, const kvc_digest *digest, uint64_t deadline_ns,
                          kvc_schema **schema_p) KVC_MUST_CHECK;

/* ---- what the server says of itself ------------------------------------------------------------
 */

typedef struct kvc_named_count {
    const char *name;
    uint64_t value;
} kvc_named_count;

/* The library's: members behind its size_bytes are those of a newer header, and not there. */
typedef struct kvc_server_stats {
    size_t size_bytes;
    const char *version;
    uint64_t boot_id, uptime_ms;
    const kvc_limits *limits;
    uint32_t n_tiers, n_counters, n_schemas;
    const kvc_tier_stats *tiers;
    const kvc_named_count *counters;
    const kvc_digest *schemas;
    const uint8_t *opaque; /* [n_schemas] 1 for an opaque one, else 0; NULL: the server is older */
} kvc_server_stats;

/* The counters of this process, as way_<way>_<why>: counts [n] gets the first n of them, whose
 * names live for ever. Returns how many there are. Any thread; does not block. */
uint32_t kvc_process_counts(kvc_named_count *counts, uint32_t n);

/* Describe and Stats in one. Blocks. *stats_p is given to the caller: kvc_stats_free. */
kvc_status kvc_stats(kvc_client *client, uint64_t deadline_ns,
                     kvc_server_stats **stats_p) KVC_MUST_CHECK;
void kvc_stats_free(kvc_server_stats *stats);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
