/*
 * msg.h: the protocol's messages as plain structs, the same for every transport.
 *
 * A message has a header (the structs below) and at most one bulk payload. Decoded structs and
 * everything they point at live in the arena given to the decoder; the payload is an iovec list
 * into the bytes that were received. Encoders borrow. See proto/kvasir.proto for the meaning of
 * each field.
 */
#ifndef KVC_WIRE_MSG_H
#define KVC_WIRE_MSG_H

#include <stdbool.h>
#include <sys/uio.h>

#include "kvc/types.h"

typedef enum kvc_method {
#define KVC_METHOD(upper, lower, name, flags) KVC_##upper,
#include "wire/methods.def"
#undef KVC_METHOD
    KVC_METHOD_COUNT,
} kvc_method;

/* What sets a method apart; see methods.def. */
#define KVC_METHOD_BULK_REQUEST 1u /* its request may carry a payload */
#define KVC_METHOD_BULK_REPLY   2u /* its reply may */
#define KVC_METHOD_NAMES_SCHEMA 4u /* NOT_FOUND may mean that the server forgot the schema */
#define KVC_METHOD_STREAM_REPLY 8u /* any number of replies, then a status */
#define KVC_METHOD_STREAM_REQUEST                                                                  \
    16u /* one request or more, the first with the call; its reply streams too */

/* What one PutBlocksStream may have under way: offers without their last answer, and bytes of
 * bodies that were asked for. */
#define KVC_PUT_WINDOW_VALUES 32u
#define KVC_PUT_WINDOW_BYTES  (8u << 20)

/* "FetchRows" and so on; never NULL. */
const char *kvc_method_name(kvc_method method);
/* KVC_METHOD_* of a method; 0 for a number that is none. */
uint32_t kvc_method_flags(kvc_method method);

/* What a piece says of the opaque value that it is of; 0 and 0 for other values. */
typedef struct kvc_whole {
    uint64_t total_bytes;
    uint64_t sum; /* XXH3-64 of the whole value, 1 where that is 0; 0: not said */
} kvc_whole;

typedef struct kvc_put_value {
    kvc_digest digest;
    uint32_t part, len_bytes;
    kvc_whole whole;
} kvc_put_value;

/* The header of a value of PutBlocksStream. */
typedef struct kvc_put_offer {
    kvc_digest schema, digest;
    uint32_t part, len_bytes;
    kvc_promise promise;
    uint64_t ttl_ms;
    kvc_whole whole;
} kvc_put_offer;

typedef struct kvc_put_answer {
    uint32_t value;
    bool send;
    kvc_status status;
    uint32_t retry_after_ms;
    uint64_t ttl_ms;
} kvc_put_answer;

typedef struct kvc_row_group {
    uint64_t context;
    uint32_t part, n_picks;
    const uint32_t *picks;
} kvc_row_group;

/* Beside a row group: the queries that attend over its rows. */
typedef struct kvc_attend_query {
    uint32_t n_q, n_q_heads;
    kvc_dtype q_dtype, o_dtype;
    bool same_q;           /* those of the group before */
    const uint32_t *ranks; /* [n_picks] positions of the keys, or NULL: taken as they are stored */
    const uint32_t *q_positions; /* [n_q] where queries are to be rotated, or NULL: they are */
} kvc_attend_query;

/* Of the memory that a MapContext reply brings: what its table calls id, from now on. */
typedef struct kvc_map_segment {
    uint32_t id; /* never 0 */
    bool gpu;    /* of a GPU: by its handle, without a descriptor */
    uint64_t len_bytes;
    kvc_gpu_handle handle;
} kvc_map_segment;

typedef struct kvc_missing_row {
    uint32_t index;
    kvc_status status;
} kvc_missing_row;

/* One value of a FetchBlocks reply. */
typedef struct kvc_block_value {
    uint32_t block, part;
    kvc_status status;
    kvc_tier tier;      /* 0 unless status is OK */
    uint32_t len_bytes; /* 0 unless status is OK */
    kvc_whole whole;
} kvc_block_value;

typedef struct kvc_counter {
    const char *name;
    uint64_t value;
} kvc_counter;

typedef struct kvc_request {
    kvc_method method;
    union {
        struct {
            const kvc_schema *schema;
        } register_schema;
        struct {
            kvc_digest schema;
            kvc_promise promise;
            uint32_t n_values;
            const kvc_put_value *values;
            /* Not on the wire, for the server's own calls: without payload; only what is there is
             * looked at, and its promise raised; what is not is NOT_FOUND. */
            bool probe;
        } put_blocks;
        struct {
            uint32_t n_offers, value;
            const kvc_put_offer *offers;
        } put_stream;
        struct {
            kvc_digest schema;
            uint32_t n_digests, n_parts;
            const kvc_digest *digests;
            const uint32_t *parts;
            bool want_tiers, want_each;
        } match_prefix;
        struct {
            kvc_digest schema;
            uint32_t n_digests;
            const kvc_digest *digests;
            uint64_t ttl_ms;
        } open_context;
        struct {
            uint64_t context;
            uint32_t n_blocks_before, n_digests;
            const kvc_digest *digests;
        } extend_context;
        struct {
            uint64_t context;
        } close_context;
        struct {
            uint64_t context;
            uint32_t n_blocks;
        } truncate_context;
        struct {
            uint64_t context, ttl_ms;
            uint32_t n_blocks;
        } fork_context;
        struct {
            kvc_digest schema; /* unused where context is not 0 */
            uint64_t context;
            uint32_t n_digests, n_parts;
            const kvc_digest *digests;
            const uint32_t *parts;
        } erase;
        struct {
            uint64_t context, hold, ttl_ms;
            kvc_digest schema; /* unused where context or hold is not 0 */
            uint32_t n_digests;
            const kvc_digest *digests;
        } hold;
        struct {
            uint64_t hold;
        } release;
        struct {
            uint64_t context;
            uint32_t n_parts, first_block, n_blocks, n_digests;
            const uint32_t *parts;
            kvc_tier tier;
            kvc_digest schema; /* unused where context is not 0 */
            const kvc_digest *digests;
        } prefetch;
        struct {
            kvc_saved_context context;
            uint64_t upload, offset, if_generation;
            bool replace;
        } put_context;
        struct {
            const char *name;
            uint64_t generation, offset;
        } get_context;
        struct {
            const char *after;
            uint32_t max;
        } list_contexts;
        struct {
            const char *name;
            uint64_t if_generation;
        } delete_context;
        struct {
            kvc_digest schema;
        } get_schema;
        struct {
            uint32_t n_groups;
            const kvc_row_group *groups;
            const kvc_attend_query *queries; /* [n_groups]; AttendRows only */
        } fetch_rows;                        /* and of FetchRowsStream and AttendRows */
        struct {
            kvc_digest schema;
            uint32_t n_digests, n_parts;
            const kvc_digest *digests;
            const uint32_t *parts;
        } fetch_blocks;
        struct {
            uint64_t context, map;
            uint32_t n_parts, first_block, n_blocks, n_unmapped;
            const uint32_t *parts, *unmapped;
            bool release, gpu;
        } map_context;
    } u;
    const struct iovec *data; /* payload; on decode, into the received bytes */
    uint32_t n_data;
    uint64_t data_bytes;
} kvc_request;

typedef struct kvc_reply {
    kvc_method method;
    union {
        struct {
            const char *version;
            uint64_t boot_id;
            kvc_limits limits;
            uint32_t n_tiers, n_schemas;
            const kvc_tier_stats *tiers;
            const kvc_digest *schemas;
            const uint8_t *opaque; /* [n_schemas] 1 for an opaque one, else 0; NULL: not told */
        } describe;
        struct {
            kvc_digest digest;
        } register_schema;
        struct {
            uint32_t n_values;
            const int8_t *status; /* kvc_status each */
        } put_blocks;
        struct {
            uint32_t n_answers;
            const kvc_put_answer *answers;
        } put_stream;
        struct {
            uint32_t hits, n_tiers; /* n_tiers: hits, all digests, or 0, as was asked for */
            const uint8_t *tiers;   /* kvc_tier each; 0: not there */
        } match_prefix;
        struct {
            uint64_t context, ttl_ms, n_tokens;
        } open_context;
        struct {
            uint64_t n_tokens;
        } extend_context;
        struct {
            uint64_t n_tokens;
        } truncate_context;
        struct {
            uint64_t context, ttl_ms, n_tokens;
        } fork_context;
        struct {
            uint64_t values, bytes;
        } erase;
        struct {
            uint64_t hold, ttl_ms, tenant_bytes, max_bytes;
            uint32_t n_blocks;
        } hold;
        struct {
            uint64_t there, moved, missing, left, moved_bytes;
        } prefetch;
        struct {
            uint64_t received, generation;
            kvc_promise promise; /* 0 where generation is */
        } put_context;
        struct {
            kvc_saved_context context;
        } get_context;
        struct {
            uint32_t n_contexts;
            const kvc_saved_context *contexts;
            bool more;
        } list_contexts;
        struct {
            const kvc_schema *schema;
        } get_schema;
        struct {
            uint32_t n_missing;
            const kvc_missing_row *missing;
            uint32_t rows_gpu, rows_dram, rows_lmdb;
            uint32_t n_picks; /* FetchRowsStream only: answered by this message */
        } fetch_rows;
        struct {
            uint32_t n_values;
            const kvc_block_value *values;
        } fetch_blocks;
        struct {
            uint64_t map, pinned_bytes, max_bytes;
            uint32_t lease_bytes, lease_slot, n_blocks, unpinned, n_segments;
            const kvc_map_segment *segments;
        } map_context;
        struct {
            uint64_t uptime_ms, boot_id;
            uint32_t n_tiers, n_counters;
            const kvc_tier_stats *tiers;
            const kvc_counter *counters;
        } stats;
    } u;
    const struct iovec *data;
    uint32_t n_data;
    uint64_t data_bytes;
} kvc_reply;

#endif
