/*
 * types.h: the few types that every layer above the kernels shares.
 *
 * Words as in the design: part, row, block, value, schema, digest, context. Plain data, no
 * ownership: every pointer in these structs is borrowed from whoever filled them in, for as long as
 * the function that takes the struct says.
 */
#ifndef KVC_TYPES_H
#define KVC_TYPES_H

#include <stdint.h>

#include "kvc/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Named limits. A server may advertise smaller ones in Describe, never larger ones. */
#define KVC_DIGEST_BYTES       32u
#define KVC_BLOCK_TOKENS_MIN   64u
#define KVC_BLOCK_TOKENS_MAX   1024u
#define KVC_MAX_VALUE_BYTES    (1u << 20) /* payload of one value, and of one message */
#define KVC_MAX_PARTS          4096u      /* parts of one schema */
#define KVC_MAX_PIECES         2048u      /* pieces of one opaque value */
#define KVC_MAX_PART_ID        65535u
#define KVC_MAX_BATCH_VALUES   1024u  /* values in one PutBlocks */
#define KVC_MAX_DIGESTS        16384u /* digests in one message */
#define KVC_MAX_CONTEXT_BLOCKS (1u << 20)
#define KVC_MAX_PICKS          65536u /* rows in one FetchRows, over all its groups */
#define KVC_MAX_GROUPS         1024u  /* groups in one FetchRows */
#define KVC_MAX_NAME_BYTES     255u   /* model ids, revisions, tenants */
#define KVC_MAX_RECIPE_BYTES   4096u
#define KVC_MAX_HEADER_BYTES   (4u << 20) /* a message without its bulk field */
#define KVC_MAX_ATTEND_QUERIES 64u        /* of one group of AttendRows */
#define KVC_MAX_ATTEND_HEADS   1024u
#define KVC_MAX_RANK           (1u << 30)  /* positions of keys in AttendRows lie below it */
#define KVC_MAX_SAVED_PAGE     256u        /* saved contexts in one ListContexts reply */
#define KVC_MAX_UNMAPPED       1024u       /* segments given back by one MapContext */
#define KVC_MAX_MAP_SEGMENTS   63u         /* that come with one MapContext reply */
#define KVC_MIN_SAVED_PIECE    (64u << 10) /* of a saved context's body, but for the last one */

typedef struct kvc_digest {
    uint8_t bytes[KVC_DIGEST_BYTES];
} kvc_digest;

/* What a put promises about crashes (not about eviction). */
typedef enum kvc_promise {
    KVC_PROMISE_MEMORY = 1,  /* in RAM when acknowledged */
    KVC_PROMISE_DURABLE = 2, /* committed to LMDB and synced when acknowledged */
} kvc_promise;

/* A place where the server keeps values, the fastest first. */
typedef enum kvc_tier {
    KVC_TIER_GPU = 1,
    KVC_TIER_DRAM = 2,
    KVC_TIER_LMDB = 3,
} kvc_tier;

/* How another process of the same host opens a piece of a GPU's memory: what kvk_cuda_share says,
   and which GPU it is (kvk_cuda_info). */
#define KVC_GPU_SHARE_BYTES  64u
#define KVC_GPU_DEVICE_BYTES 16u
typedef struct kvc_gpu_handle {
    uint8_t share[KVC_GPU_SHARE_BYTES];
    uint8_t device[KVC_GPU_DEVICE_BYTES];
} kvc_gpu_handle;

typedef enum kvc_part_kind {
    KVC_PART_KV = 1,       /* K then V of all heads of the slice */
    KVC_PART_LATENT = 2,   /* MLA latent */
    KVC_PART_INDEXER = 3,  /* DSA indexer keys */
    KVC_PART_INDEX = 4,    /* compressed keys of a selector */
    KVC_PART_CHUNK_KV = 5, /* GCA, HSA */
    KVC_PART_STATE = 6,
} kvc_part_kind;

typedef enum kvc_dtype {
    KVC_DTYPE_F32 = 1,
    KVC_DTYPE_F16 = 2,
    KVC_DTYPE_BF16 = 3,
    KVC_DTYPE_I8 = 4,   /* int8 with scales, laid out as the part's codec says */
    KVC_DTYPE_RAW = 5,  /* bytes without a meaning to the service */
    KVC_DTYPE_E4M3 = 6, /* 8-bit floats with scales, laid out as the part's codec says */
} kvc_dtype;

/*
 * The codec of KV and CHUNK_KV parts of dtype I8 or E4M3: each slice, K and V, is its values
 * [kv_heads, dim], a byte each, then their scales [kv_heads], bf16; an element is value * scale.
 */
#define KVC_CODEC_HEAD_SCALES "head-scales"

typedef enum kvc_rope_type {
    KVC_ROPE_NONE = 1,
    KVC_ROPE_PLAIN = 2,  /* Llama: theta only */
    KVC_ROPE_LLAMA3 = 3, /* Llama-3 frequency-dependent scaling */
} kvc_rope_type;

/* Rotary embedding of a part. Unused factors are 0. "rotate-half" pairing (i, i + d/2). */
typedef struct kvc_rope {
    kvc_rope_type type;
    uint32_t stored_rotated; /* 0: keys are stored raw (the rule); 1: stored rotated */
    double theta;
    double factor; /* LLAMA3 only, as the four below */
    double low_freq_factor;
    double high_freq_factor;
    uint32_t original_max_position;
} kvc_rope;

/*
 * One row of the schema's table: what one layer (or one kv-head slice of it) keeps per token.
 * Offsets and lengths are bytes inside a row. The row of a KV part is K [kv_heads, q_dim] then
 * V [kv_heads, v_dim] of the slice, in dtype, or as its codec says.
 */
typedef struct kvc_part {
    uint32_t part; /* the id that requests use; unique in the schema */
    kvc_part_kind kind;
    kvc_dtype dtype;
    uint32_t layer;
    uint32_t kv_head_first, kv_head_count;
    uint32_t row_bytes;
    uint32_t k_off_bytes, k_len_bytes, v_off_bytes, v_len_bytes;
    uint32_t q_dim, v_dim; /* per head, elements */
    uint32_t window;       /* tokens; 0: none */
    kvc_rope rope;
    double attention_scale; /* 0: 1/sqrt(q_dim) */
    double softcap;         /* 0: none */
    uint32_t sinks;         /* 1: the layer has learned sink logits */
    /* INDEX parts: selector, dims and projection digest; KVC_CODEC_HEAD_SCALES; else NULL */
    const char *codec;
} kvc_part;

/* What makes bytes meaningful. Its digest is over sorted key=value text; see base/digest.h. */
typedef struct kvc_schema {
    const char *model;    /* id, <= KVC_MAX_NAME_BYTES, not empty */
    const char *revision; /* may be empty */
    const char *recipe;   /* how the KV was computed; <= KVC_MAX_RECIPE_BYTES, not empty */
    uint32_t tp_size;     /* >= 1 */
    uint32_t block_tokens;
    uint32_t n_parts;
    const kvc_part *parts;
    uint32_t opaque; /* 1: values of any length under keys of any bytes; no parts, block_tokens 0 */
} kvc_schema;

/*
 * A context saved under a name. Its body: digests [n_blocks], token ids [n_ids] u32 little-endian,
 * then for each of tail_parts rows [n_tail, row_bytes].
 */
typedef struct kvc_saved_context {
    const char *name; /* 1..KVC_MAX_NAME_BYTES bytes of '!'..'~' */
    kvc_digest schema;
    kvc_promise promise;
    uint32_t n_blocks;
    uint32_t n_ids;  /* 0, or n_blocks * block_tokens + n_tail */
    uint32_t n_tail; /* tokens; below block_tokens */
    uint32_t n_tail_parts;
    const uint32_t *tail_parts; /* ids, ascending */
    /* given by the server */
    uint32_t piece_bytes;
    uint64_t generation, upload, body_bytes, saved_unix_ms;
} kvc_saved_context;

/* Limits that a server exchanges at connect (Describe). It grows at its end, so libraries hand it
 * out by pointer and callers never by its size. */
typedef struct kvc_limits {
    uint32_t max_value_bytes;
    uint32_t max_message_bytes; /* bulk payload of one message */
    uint32_t max_batch_values;
    uint32_t max_digests;
    uint32_t max_context_blocks;
    uint32_t max_picks;
    uint32_t max_groups;
    uint32_t max_contexts; /* open per tenant */
    uint64_t max_ttl_ms;
    uint32_t max_attend_queries; /* of one group of AttendRows; 0: it is not served */
    /* The rest is 0 where the server is older than the limit. */
    uint32_t max_attend_calls;  /* AttendRows at once, those that wait included */
    uint32_t max_pieces;        /* of max_value_bytes, of one opaque value; 0: none are taken */
    uint64_t max_open_blocks;   /* in all open contexts, of all tenants */
    uint32_t max_holds;         /* of a tenant */
    uint32_t max_schemas;       /* of all tenants */
    uint64_t max_hold_bytes;    /* that a tenant's holds and TTLs keep */
    uint64_t max_map_pin_bytes; /* that a tenant's maps pin (shm) */
    uint64_t max_mapped_bytes;  /* of segments that a tenant's clients have mapped */
    uint64_t max_saved_tenant_bytes; /* of a tenant's saved contexts */
    uint64_t max_inflight_bytes;     /* of requests that the server holds at once */
    uint64_t max_put_window_bytes;   /* of bodies under way in one put stream */
    uint32_t max_put_window_values;  /* offers of it without their last answer */
    uint32_t max_saved;              /* contexts that a tenant may have saved by name */
    uint32_t max_calls;              /* at once at one address of the server */
    uint32_t max_connections;        /* of all clients; one beyond is closed at once */
} kvc_limits;

/* Bytes and traffic of one tier, as Stats and Describe report them. */
typedef struct kvc_tier_stats {
    const char *name;        /* "dram", "lmdb", "gpu" */
    uint64_t capacity_bytes; /* the configured cap */
    uint64_t used_bytes;     /* what the cap is measured against */
    uint64_t values;
    uint64_t rows_read;
    uint64_t bytes_read;
    uint64_t bytes_written;
    uint64_t evictions;
} kvc_tier_stats;

#ifdef __cplusplus
}
#endif
#endif
