/*
 * cuda.h: the decode path on a CUDA device, plain C11.
 *
 * The op table (compute.h) takes host memory and counts by value. A step on a GPU must not return
 * to the host between its ops, so here every op takes a batch of sequences of different lengths,
 * reads its counts in device memory, and writes lists that the next op reads there. What an op
 * computes is what the table's ops of the same names compute; the table's "reference" backend is
 * the oracle.
 *
 * Rules for all ops. Pointers are device memory unless the comment says host, 16-byte aligned, and
 * borrowed until the op has completed on its stream. An op only enqueues: it never blocks,
 * allocates or synchronises, so a stream that is being captured into a graph may record it, and one
 * graph may be replayed while lengths and contents change. Order is score descending, position
 * ascending, NaN last. Results do not depend on timing or on what the other sequences of a batch
 * hold. INVALID: arguments that can be seen on the host are wrong, nothing was enqueued; DEVICE:
 * CUDA refused. A kvk_cuda may be used from any thread; ops that share a workspace must run one
 * after another.
 */
#ifndef KVK_CUDA_H
#define KVK_CUDA_H

#include "kvk/compute.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#define KVK_CUDA_K_MAX     4096u  /* picks per sequence */
#define KVK_CUDA_WIDE_MAX  16384u /* picks of select_vote, for kvk_cuda_rerank */
#define KVK_CUDA_SEQS_MAX  512u   /* sequences per batch */
#define KVK_CUDA_CHUNK_MAX 4096u  /* queries of a chunk */
#define KVK_CUDA_RESIDENT  UINT32_MAX

typedef struct kvk_cuda kvk_cuda;
typedef struct kvk_cuda_graph kvk_cuda_graph;
typedef struct kvk_cuda_event kvk_cuda_event;

/* What a memory call allocates: device memory, or pinned host memory that kernels can read too. */
typedef enum kvk_cuda_memory { KVK_CUDA_DEVICE = 1, KVK_CUDA_PINNED = 2 } kvk_cuda_memory;

typedef struct kvk_cuda_info {
    char name[64];
    uint32_t sm; /* 90: compute capability 9.0 */
    uint32_t n_multiprocessors;
    size_t memory_bytes, l2_bytes;
    uint8_t uuid[16]; /* the same in every process */
} kvk_cuda_info;

/*
 * Opens device number `device`. UNSUPPORTED: this build, machine or driver has no such device, or
 * it is older than sm_80. May block for the start of the driver. *cuda_p is NULL on error.
 */
kvc_status kvk_cuda_open(uint32_t device, kvk_cuda **cuda_p) KVC_MUST_CHECK;
/* Frees; NULL is fine. No op may be running. Memory, streams and graphs must be gone before. */
void kvk_cuda_close(kvk_cuda *cuda);
void kvk_cuda_describe(const kvk_cuda *cuda, kvk_cuda_info *info_p);

/*
 * Memory. Pinned memory has one address for host and device. register makes host memory that exists
 * (a mapped segment of the dram tier; whole pages) readable by kernels at *device_p; read_only for
 * a mapping without write permission. copy and fill run on the stream; copy takes any pair of
 * addresses. NO_MEMORY; DEVICE; UNSUPPORTED where a mapping cannot be registered.
 */
kvc_status kvk_cuda_alloc(kvk_cuda *cuda, kvk_cuda_memory kind, size_t len_bytes,
                          void **memory_p) KVC_MUST_CHECK;
void kvk_cuda_free(kvk_cuda *cuda, kvk_cuda_memory kind, void *memory);
kvc_status kvk_cuda_register(kvk_cuda *cuda, void *host, size_t len_bytes, int read_only,
                             void **device_p) KVC_MUST_CHECK;
void kvk_cuda_unregister(kvk_cuda *cuda, void *host);
kvc_status kvk_cuda_copy(kvk_cuda *cuda, void *to, const void *from, size_t len_bytes,
                         kvk_stream *stream) KVC_MUST_CHECK;
kvc_status kvk_cuda_fill(kvk_cuda *cuda, void *to, uint8_t byte, size_t len_bytes,
                         kvk_stream *stream) KVC_MUST_CHECK;
/* Of the device, whoever uses it. */
kvc_status kvk_cuda_memory_info(kvk_cuda *cuda, size_t *free_bytes_p,
                                size_t *total_bytes_p) KVC_MUST_CHECK;

/*
 * Device memory that another process on this host reads and writes in place: nothing keeps it from
 * writing. share names an
 * allocation of a whole number of KVK_CUDA_SHARE_UNIT bytes (kvk_cuda_alloc, from its first byte;
 * shorter ones may lie beside others, which would be shared too). Its owner keeps it until every
 * process has closed it; who opened it may die at any time. share_open: in another process, and
 * once at a time; the device may be another one, where the two can reach each other. UNSUPPORTED:
 * device, system or container cannot; INVALID; DEVICE.
 */
#define KVK_CUDA_SHARE_BYTES 64u
#define KVK_CUDA_SHARE_UNIT  (2u << 20)
typedef struct kvk_cuda_shared {
    uint8_t bytes[KVK_CUDA_SHARE_BYTES];
} kvk_cuda_shared;
kvc_status kvk_cuda_share(kvk_cuda *cuda, void *memory, kvk_cuda_shared *shared_p) KVC_MUST_CHECK;
kvc_status kvk_cuda_share_open(kvk_cuda *cuda, const kvk_cuda_shared *shared,
                               void **memory_p) KVC_MUST_CHECK;
void kvk_cuda_share_close(kvk_cuda *cuda, void *memory); /* NULL is fine */

/*
 * Device memory that another device on this host (RDMA) writes to. export: of an allocation of a
 * whole number of KVK_CUDA_SHARE_UNIT bytes, the descriptor of its dma-buf, for export_close, and
 * where memory begins in it. UNSUPPORTED: the driver exports none; *fd_p is -1 then. flush_writes:
 * what such a device has written is seen by all that the device does from now on; UNSUPPORTED: that
 * cannot be had.
 */
kvc_status kvk_cuda_export(kvk_cuda *cuda, void *memory, size_t len_bytes, int *fd_p,
                           uint64_t *off_bytes_p) KVC_MUST_CHECK;
void kvk_cuda_export_close(kvk_cuda *cuda, int fd); /* -1 is fine */
kvc_status kvk_cuda_flush_writes(kvk_cuda *cuda) KVC_MUST_CHECK;

/* Streams, events and graphs. sync blocks; elapsed needs both events completed; stream_wait lets
 * what is enqueued on the stream from now on wait for the event's last record. begin/end capture
 * what is enqueued on the stream between them into *graph_p; launch replays it in stream order. */
kvc_status kvk_cuda_stream_create(kvk_cuda *cuda, kvk_stream **stream_p) KVC_MUST_CHECK;
void kvk_cuda_stream_destroy(kvk_cuda *cuda, kvk_stream *stream);
kvc_status kvk_cuda_stream_sync(kvk_cuda *cuda, kvk_stream *stream) KVC_MUST_CHECK;
kvc_status kvk_cuda_event_create(kvk_cuda *cuda, kvk_cuda_event **event_p) KVC_MUST_CHECK;
void kvk_cuda_event_destroy(kvk_cuda *cuda, kvk_cuda_event *event);
kvc_status kvk_cuda_event_record(kvk_cuda *cuda, kvk_cuda_event *event,
                                 kvk_stream *stream) KVC_MUST_CHECK;
kvc_status kvk_cuda_stream_wait(kvk_cuda *cuda, kvk_stream *stream,
                                const kvk_cuda_event *event) KVC_MUST_CHECK;
kvc_status kvk_cuda_event_elapsed(kvk_cuda *cuda, const kvk_cuda_event *from,
                                  const kvk_cuda_event *to, float *elapsed_ms_p) KVC_MUST_CHECK;
kvc_status kvk_cuda_graph_begin(kvk_cuda *cuda, kvk_stream *stream) KVC_MUST_CHECK;
kvc_status kvk_cuda_graph_end(kvk_cuda *cuda, kvk_stream *stream,
                              kvk_cuda_graph **graph_p) KVC_MUST_CHECK;
kvc_status kvk_cuda_graph_launch(kvk_cuda *cuda, kvk_cuda_graph *graph,
                                 kvk_stream *stream) KVC_MUST_CHECK;
void kvk_cuda_graph_destroy(kvk_cuda *cuda, kvk_cuda_graph *graph);

/*
 * Index rows of n tokens: in [n, n_heads_in, head_dim] bf16 keys, in_stride_bytes from one token to
 * the next (0: dense; an even number) -> n dense rows as kvk_quantize
 * writes them, kvk_index_row_bytes(n_heads, dims) each, at out (no alignment needed). ESA (n_heads
 * 1): proj [n_heads_in * head_dim, dims] f32 maps the keys of all heads together. Per head (n_heads
 * = n_heads_in): proj [n_heads, head_dim, dims]. The projection is one chain of fused multiply-adds
 * over the inputs; from those floats the bits equal kvk_quantize's. projected [n, n_heads, dims]
 * f32 may be NULL. A head with a non-finite element gets scale 0, so a score of 0. dims <= 256,
 * n_heads_in * head_dim <= 8192.
 */
typedef struct kvk_cuda_digest_args {
    const void *in;
    uint32_t n, n_heads_in, head_dim, n_heads, dims;
    const float *proj;
    float *projected;
    void *out;
    size_t in_stride_bytes;
} kvk_cuda_digest_args;
kvc_status kvk_cuda_digest(kvk_cuda *cuda, const kvk_cuda_digest_args *args,
                           kvk_stream *stream) KVC_MUST_CHECK;

/*
 * Index queries of a batch: q [n_seqs, n_q_heads, head_dim] f32. For a shared index (ESA; per_head
 * 0) the query heads of a group are added (2502.14477 eq. 3) and all kv heads together meet proj
 * [n_kv_heads * head_dim, dims] f32: out [n_seqs, dims] f32. For an index of each kv head
 * (TokenSelect; per_head 1) each query head meets its own kv head's proj [n_kv_heads, head_dim,
 * dims]: out [n_seqs, n_q_heads, dims]. Bound: as kvk_project's. dims <= 256.
 */
typedef struct kvk_cuda_query_args {
    const float *q;
    uint32_t n_seqs, n_q_heads, n_kv_heads, head_dim, dims;
    const float *proj;
    float *out;
    uint32_t per_head; /* 0 or 1 */
} kvk_cuda_query_args;
kvc_status kvk_cuda_query(kvk_cuda *cuda, const kvk_cuda_query_args *args,
                          kvk_stream *stream) KVC_MUST_CHECK;

/* The candidates of one sequence: dense index rows; row j is position base + j. */
typedef struct kvk_cuda_candidates {
    const void *index; /* device */
    uint32_t n_rows, base;
} kvk_cuda_candidates;

/*
 * The k best candidates of each sequence, exactly, on scores whose bits are kvk_score_index's:
 * n_q_heads = n_kv_heads = 1 and, with eps > 0, kvk_window_max (ESA). n_rows above rows_max is cut
 * to it. Unused entries of picks and scores are left as they are. A non-finite query gives
 * arbitrary picks, in range. workspace: kvk_cuda_select_workspace_bytes, cleared once with
 * kvk_cuda_fill 0 before its first use; an op leaves it ready for the next of as many sequences,
 * and to be cleared again for another number. Fast at dims 126 and 62 (128 and 64 bytes a row);
 * dims <= 256, k <= KVK_CUDA_K_MAX. early: the scan sets off beside the op before this one, which
 * may write n_rows but not index: the rows below what it leaves n_rows at were there before it
 * began, and those below the n_rows it found, rows_max at most, may be read.
 */
typedef struct kvk_cuda_select_args {
    uint32_t n_seqs, dims, k, eps, rows_max;
    const float *q;                   /* [n_seqs, dims] */
    const kvk_cuda_candidates *cands; /* [n_seqs] */
    uint32_t *picks;                  /* [n_seqs, k] positions */
    float *scores;                    /* [n_seqs, k] or NULL */
    uint32_t *n_picks;                /* [n_seqs] = min(k, n_rows) */
    void *workspace;
    size_t workspace_bytes;
    const uint32_t *keep; /* [n_seqs] or NULL: where not 0, nothing is done for the sequence */
    uint32_t early;       /* 0 or 1 */
} kvk_cuda_select_args;
size_t kvk_cuda_select_workspace_bytes(uint32_t n_seqs, uint32_t rows_max);
kvc_status kvk_cuda_select(kvk_cuda *cuda, const kvk_cuda_select_args *args,
                           kvk_stream *stream) KVC_MUST_CHECK;

/*
 * The k best candidates of each sequence by TokenSelect's soft vote (2411.02886 eq. 7) over an
 * index of each kv head: rows as kvk_quantize writes them, kvk_index_row_bytes(n_kv_heads, dims)
 * each, 16-byte aligned. Logits are those of kvk_score_index, of which every query head takes a
 * softmax over all candidates of the sequence; a token's score is the sum over the heads. Bound
 * against kvk_vote: (4 m + 64) 2^-24 of the vote + n_q_heads 2^-120, m the largest |logit|. The
 * bits of a sequence depend on its own q and index alone. A logit that is not finite gives
 * arbitrary picks, in range. Fast at dims 32 (34 bytes a head and row) with 8 kv heads of up to 4
 * query heads or 4 of up to 8, and at dims 16 with the former. n_q_heads <= 128 a multiple of
 * n_kv_heads, dims <= 256, n_q_heads * dims <= 16384, k <= KVK_CUDA_WIDE_MAX. Else as
 * kvk_cuda_select, also with eps > 0, and its rules for the workspace hold.
 */
typedef struct kvk_cuda_select_vote_args {
    uint32_t n_seqs, n_q_heads, n_kv_heads, dims, k, eps, rows_max;
    const float *q;                   /* [n_seqs, n_q_heads, dims] */
    const kvk_cuda_candidates *cands; /* [n_seqs] */
    uint32_t *picks;                  /* [n_seqs, k] positions */
    float *scores;                    /* [n_seqs, k] or NULL */
    uint32_t *n_picks;                /* [n_seqs] = min(k, n_rows) */
    void *workspace;
    size_t workspace_bytes;
    const uint32_t *keep; /* [n_seqs] or NULL: where not 0, nothing is done for the sequence */
} kvk_cuda_select_vote_args;
size_t kvk_cuda_select_vote_workspace_bytes(uint32_t n_seqs, uint32_t rows_max);
kvc_status kvk_cuda_select_vote(kvk_cuda *cuda, const kvk_cuda_select_vote_args *args,
                                kvk_stream *stream) KVC_MUST_CHECK;
/* Whether the device can do it, before there is any memory: looks at heads and dims, and at the
 * shared memory that a block may have (sm_86, sm_89 and sm_120 have too little). UNSUPPORTED. */
kvc_status kvk_cuda_select_vote_supports(const kvk_cuda *cuda,
                                         const kvk_cuda_select_vote_args *args) KVC_MUST_CHECK;

/*
 * The Selection Cache (2411.02886 Alg. 1), for a batch: keep[s] = 1 where the cosine of q[s] and
 * last[s], [n_seqs, width] f32 each, is at least threshold: select and select_vote then leave that
 * sequence's picks as they are. Else keep[s] = 0, and q[s] becomes last[s]. The cosine is that of
 * kvk_cosine, in double, within 1e-14; where a norm is 0 it is 0, so a sequence whose last was
 * cleared selects (threshold > 0). A q that is not finite selects.
 */
typedef struct kvk_cuda_keep_args {
    uint32_t n_seqs, width; /* width: all heads of a query */
    const float *q;
    float *last;
    double threshold;
    uint32_t *keep;
} kvk_cuda_keep_args;
kvc_status kvk_cuda_keep(kvk_cuda *cuda, const kvk_cuda_keep_args *args,
                         kvk_stream *stream) KVC_MUST_CHECK;

/* The picks of each sequence in ascending order: ordered is another memory than picks; no two picks
 * of a sequence are the same. */
typedef struct kvk_cuda_order_args {
    uint32_t n_seqs, k;
    const uint32_t *picks, *n_picks; /* [n_seqs, k], [n_seqs] */
    uint32_t *ordered;               /* [n_seqs, k] */
} kvk_cuda_order_args;
kvc_status kvk_cuda_order(kvk_cuda *cuda, const kvk_cuda_order_args *args,
                          kvk_stream *stream) KVC_MUST_CHECK;

/* kvk_mean for a batch, with its bits: the mean query of a chunk. in [n_seqs, n, width] in dtype
 * (F32, F16 or BF16), out [n_seqs, width] f32; n = 0 gives zeros. */
typedef struct kvk_cuda_mean_args {
    const void *in;
    kvk_dtype dtype;
    uint32_t n_seqs, n, width;
    float *out;
} kvk_cuda_mean_args;
kvc_status kvk_cuda_mean(kvk_cuda *cuda, const kvk_cuda_mean_args *args,
                         kvk_stream *stream) KVC_MUST_CHECK;

/*
 * The rows of one sequence and part that are in device memory. slots [n_slots, row_bytes]; slot_of
 * [n_positions], -1 = not resident; pos_of [n_slots], UINT32_MAX = empty; used [n_slots], 4 times
 * the step that last used a slot and how often its row was picked again since it came (at most 3),
 * 0 = never; step starts at 0 and is counted by resolve. The caller may place rows itself (sink,
 * recent) in the first n_pinned slots, which are never evicted, and may set slot_of back to -1
 * where a position has another row now, without a look at pos_of.
 */
typedef struct kvk_cuda_residency {
    void *slots;
    int32_t *slot_of;
    uint32_t *pos_of, *used, *step;
    uint32_t n_positions;
} kvk_cuda_residency;

/*
 * Gives each pick a slot. A pick that is resident keeps its slot; the others are named in fetch and
 * take the oldest slots, first missing pick the lowest of them. A slot's age is the steps since its
 * row was picked and four for each time, of three, that it has not been picked again (from 1,023 on
 * equal; ties: the lower number). For pick i of sequence s:
 *   list[s * stride + off + i]  = its slot
 *   fetch[s * stride + off + i] = KVK_CUDA_RESIDENT, or the position to bring into that slot
 * n_list[s] = off + n_picks[s]; n_misses[s] counts. Entries before off are the caller's (say, the
 * sink's slots). A pick at or above n_positions gets list -1, which attend passes over. The row of
 * a named position must be in its slot before the next op that reads it: kvk_cuda_attend and
 * kvk_cuda_gather bring it. Picks of a sequence are distinct. n_slots - n_pinned >= k <=
 * KVK_CUDA_K_MAX; n_slots <= 1 << 20.
 */
typedef struct kvk_cuda_resolve_args {
    uint32_t n_seqs, k, n_slots, n_pinned;
    const uint32_t *picks;         /* [n_seqs, k] */
    const uint32_t *n_picks;       /* [n_seqs] */
    const kvk_cuda_residency *res; /* [n_seqs] */
    int32_t *list;
    uint32_t *fetch;
    uint32_t stride, off;
    uint32_t *n_list, *n_misses; /* [n_seqs] */
} kvk_cuda_resolve_args;
kvc_status kvk_cuda_resolve(kvk_cuda *cuda, const kvk_cuda_resolve_args *args,
                            kvk_stream *stream) KVC_MUST_CHECK;

/* Where the rows of a sequence come from: position p is row p % block_tokens of blocks[p /
 * block_tokens], a host mapping that kernels can read (kvk_cuda_register) or device memory. */
typedef struct kvk_cuda_source {
    const void *const *blocks; /* [n_blocks] */
    uint32_t n_blocks, block_tokens;
} kvk_cuda_source;

/* Brings every row that fetch names into its slot, and nothing else: for rows that are wanted
 * before they are attended, and for whole chunks, each a long row, of which every byte is asked for
 * at once. A position outside the source is passed over. */
typedef struct kvk_cuda_gather_args {
    uint32_t n_seqs, stride;
    const int32_t *list;           /* [n_seqs, stride] */
    const uint32_t *fetch;         /* [n_seqs, stride] */
    const uint32_t *n_list;        /* [n_seqs] */
    const kvk_cuda_residency *res; /* [n_seqs] */
    const kvk_cuda_source *source; /* [n_seqs] */
    uint32_t row_bytes;            /* a multiple of 16 */
} kvk_cuda_gather_args;
kvc_status kvk_cuda_gather(kvk_cuda *cuda, const kvk_cuda_gather_args *args,
                           kvk_stream *stream) KVC_MUST_CHECK;

/*
 * What a sequence attends besides its list, with a query of its own: n[s] tokens from first[s] on,
 * whose rows are in a ring, token p in slot p % ring_rows of ring[s]; their keys are rotated by 0,
 * 1, ... (without inv_freq not at all). early: all of this was there before the op before this one
 * (kvk_cuda_resolve, say) began, and is read while that one runs, whose workspace is another.
 */
typedef struct kvk_cuda_near {
    const float *q;                 /* [n_seqs, n_q_heads, head_dim] */
    const kvk_cuda_residency *ring; /* [n_seqs], slots alone */
    const uint32_t *first, *n;      /* [n_seqs] */
    uint32_t ring_rows, n_max;      /* n_max 0: there is nothing */
    const double *inv_freq;         /* [head_dim / 2] or NULL */
    uint32_t early;                 /* 0 or 1 */
} kvk_cuda_near;

/* Where a result goes as the engine wants it, and what then tells the host: the i-th op that has
 * these counts, which were cleared once, writes i to *done, which is pinned, behind its results. */
typedef struct kvk_cuda_result {
    void *out; /* [n_seqs, n_q_heads, head_dim] in dtype, device or pinned; NULL: none of this */
    kvk_dtype dtype;         /* BF16 or F16 */
    float *lse;              /* [n_seqs, n_q_heads] or NULL */
    uint32_t *counts, *done; /* [2], device; or both NULL */
} kvk_cuda_result;

/*
 * Attention of one query per sequence over its list, a partial as in kvk_attend: o normalised over
 * the listed rows, lse natural log; nothing listed gives o = 0, lse = -INFINITY. With fetch and
 * source, a row that fetch names is read from its source, written into its slot and attended in the
 * same pass. The sums are taken per 16 rows in list order and merged in an order that their number
 * gives, near's too, so the bits do not depend on what was resident. A row: K [n_kv_heads,
 * head_dim] at k_off_bytes, V at v_off_bytes, in dtype (BF16, F16 or a coded one), both offsets and
 * row_bytes multiples of 16. With inv_freq, K of entry j is rotated by k_positions[s * stride + j]
 * (angles in double). Bound: as kvk_attend's. head_dim 64 or 128, n_q_heads / n_kv_heads 1 to 8, a
 * tile of 16 rows must fit in shared memory; else UNSUPPORTED, as is near with F16, or where keys
 * of the list are rotated and its are not. near is added behind the list, the workspace is then
 * that of a stride of stride + near.n_max + 16. With result.out o and lse are not written and may
 * be NULL. With resolve.k not 0 the list is made in the same launch, as by kvk_cuda_resolve before
 * it, which nothing waits for: list, fetch, n_list, the tables, o and lse are the same afterwards.
 * resolve's n_seqs, list, fetch, n_list, stride and res are the attention's, source not NULL.
 */
typedef struct kvk_cuda_attend_args {
    uint32_t n_seqs, n_q_heads, n_kv_heads, head_dim;
    const float *q;                /* [n_seqs, n_q_heads, head_dim] */
    const int32_t *list;           /* [n_seqs, stride] */
    const uint32_t *fetch;         /* [n_seqs, stride] or NULL */
    const uint32_t *n_list;        /* [n_seqs] */
    uint32_t stride;               /* the longest list possible */
    const kvk_cuda_residency *res; /* [n_seqs] */
    const kvk_cuda_source *source; /* [n_seqs] or NULL */
    uint32_t row_bytes, k_off_bytes, v_off_bytes;
    kvk_dtype dtype;
    const int32_t *k_positions; /* [n_seqs, stride] or NULL */
    const double *inv_freq;     /* [head_dim / 2] or NULL */
    float scale, softcap;
    float *o;   /* [n_seqs, n_q_heads, head_dim] */
    float *lse; /* [n_seqs, n_q_heads] */
    void *workspace;
    size_t workspace_bytes; /* no need to clear it */
    kvk_cuda_near near;
    kvk_cuda_result result;
    kvk_cuda_resolve_args resolve; /* k 0: the list is there */
    uint32_t *resolved;            /* [n_seqs, stride] for resolve, cleared once; else NULL */
} kvk_cuda_attend_args;
size_t kvk_cuda_attend_workspace_bytes(uint32_t n_seqs, uint32_t stride, uint32_t n_q_heads,
                                       uint32_t head_dim);
kvc_status kvk_cuda_attend(kvk_cuda *cuda, const kvk_cuda_attend_args *args,
                           kvk_stream *stream) KVC_MUST_CHECK;
/* Whether the device can do it, before there is any memory: looks at heads, head_dim, dtype, the
 * row, and whether inv_freq and k_positions are NULL. UNSUPPORTED. */
kvc_status kvk_cuda_attend_supports(const kvk_cuda *cuda,
                                    const kvk_cuda_attend_args *args) KVC_MUST_CHECK;

/*
 * Attention of a chunk of queries per sequence, a partial as in kvk_attend: query i sees the rows
 * of the list (sinks, picks, recent: bring them with kvk_cuda_gather first) and rows 0 .. i of the
 * chunk itself; or, without `chunk`, the chunk is the end of the list, or none of this partial:
 * see kvk_cuda_own. n_queries may be NULL (n_q each); o and lse of queries beyond it are left as
 * they are. Rows as in kvk_cuda_attend, also those of the chunk. With inv_freq, K of the list is
 * rotated by k_positions and K of the chunk by chunk_positions, either of which may be NULL (not
 * rotated).
 *
 * Bound, with S as in kernels/README.md: e = 2^-16 scale S + 2^-16 + n_kv 2^-25, and with `fast`,
 * which rounds q, rotated keys and weights to bf16 as dense kernels do, 2^-7 scale S + 2^-8: lse
 * within 2 e, o within 2 e max|v|. Rows of the list and the chunk must be finite: what is not may
 * reach the queries that do not see it. head_dim 64 or 128, else UNSUPPORTED.
 */
typedef enum kvk_cuda_own {
    KVK_CUDA_OWN_CHUNK = 0, /* the chunk's rows are at `chunk`, which is NULL else */
    KVK_CUDA_OWN_LISTED,    /* they are the last n_queries of the list, at least as long */
    KVK_CUDA_OWN_NONE,      /* every query sees the whole list, and nothing else */
} kvk_cuda_own;
typedef struct kvk_cuda_prefill_args {
    uint32_t n_seqs, n_q, n_q_heads, n_kv_heads, head_dim;
    const float *q;                /* [n_seqs, n_q, n_q_heads, head_dim] */
    const uint32_t *n_queries;     /* [n_seqs] or NULL */
    const int32_t *list;           /* [n_seqs, stride] slots, -1: passed over */
    const uint32_t *n_list;        /* [n_seqs] */
    uint32_t stride;               /* the longest list possible */
    const kvk_cuda_residency *res; /* [n_seqs] */
    kvk_cuda_own own;
    const void *chunk; /* [n_seqs, n_q, row_bytes] */
    uint32_t row_bytes, k_off_bytes, v_off_bytes;
    kvk_dtype dtype;
    const int32_t *k_positions;     /* [n_seqs, stride] or NULL */
    const int32_t *chunk_positions; /* [n_seqs, n_q] or NULL */
    const double *inv_freq;         /* [head_dim / 2] or NULL */
    float scale, softcap;
    uint32_t fast; /* 0 or 1 */
    float *o;      /* [n_seqs, n_q, n_q_heads, head_dim] */
    float *lse;    /* [n_seqs, n_q, n_q_heads] */
    void *workspace;
    size_t workspace_bytes; /* no need to clear it */
} kvk_cuda_prefill_args;
/* For the shape in args (n_seqs, n_q, heads, head_dim, stride, fast); 0: it is out of range. */
size_t kvk_cuda_prefill_workspace_bytes(const kvk_cuda_prefill_args *args);
/* As kvk_cuda_attend_supports: looks at head_dim and `fast`. */
kvc_status kvk_cuda_prefill_supports(const kvk_cuda *cuda,
                                     const kvk_cuda_prefill_args *args) KVC_MUST_CHECK;
kvc_status kvk_cuda_prefill(kvk_cuda *cuda, const kvk_cuda_prefill_args *args,
                            kvk_stream *stream) KVC_MUST_CHECK;

/*
 * Coded rows of n tokens: k and v [n, n_heads, head_dim] bf16 -> row i at out + i * row_bytes, K at
 * k_off_bytes and V at v_off_bytes of it, each with the bytes that kvk_encode writes in dtype. A
 * head with a non-finite element gets a NaN scale. out may be device memory or pinned. head_dim <=
 * 256.
 */
typedef struct kvk_cuda_encode_args {
    const void *k, *v;
    uint32_t n, n_heads, head_dim;
    kvk_dtype dtype;
    uint32_t row_bytes, k_off_bytes, v_off_bytes;
    void *out;
} kvk_cuda_encode_args;
kvc_status kvk_cuda_encode(kvk_cuda *cuda, const kvk_cuda_encode_args *args,
                           kvk_stream *stream) KVC_MUST_CHECK;

/* kvk_merge on the device: partial b into a; o [n, dim], lse [n]. */
kvc_status kvk_cuda_merge(kvk_cuda *cuda, const kvk_merge_args *args,
                          kvk_stream *stream) KVC_MUST_CHECK;

/*
 * Partials a and b (o [n, dim], lse [n]) merged as by kvk_merge, o rounded to dtype (BF16,
 * F16) at out [n, dim], lse [n] f32 (may be NULL). a and b stay as they are.
 */
typedef struct kvk_cuda_finish_args {
    const float *o_a, *lse_a, *o_b, *lse_b;
    uint32_t n, dim;
    kvk_dtype dtype;
    void *out;
    float *lse;
} kvk_cuda_finish_args;
kvc_status kvk_cuda_finish(kvk_cuda *cuda, const kvk_cuda_finish_args *args,
                           kvk_stream *stream) KVC_MUST_CHECK;

/*
 * Retrieval of whole chunks (GCA 2410.01651, HSA 2504.16795) is select, weights, resolve and gather
 * with a chunk for a row, attend and fuse; a list of a batch is a (sequence, group) and its
 * chunks, positions are chunks, and slots hold whole chunks. Prefetch: all but the last two on
 * another stream.
 */

/*
 * The k best landmarks of each list and their scores, exactly: q . landmark in f32, no 1/sqrt(d).
 * Bound of a score: as kvk_score_keys'; picks are the k best of these scores. The landmarks of list
 * s: cands[s].n_rows rows of dims elements (F32 or BF16), stride_bytes apart, so a list may score a
 * piece of each (a head of HSA), at chunk base + row; n_rows says what the list may see (strictly
 * earlier chunks) and is cut to rows_max. Places past n_picks get pick UINT32_MAX and score
 * -INFINITY, which weigh nothing. NaN comes last. dims <= KVK_CUDA_LANDMARK_MAX, a row and the
 * stride multiples of 16 bytes; k <= KVK_CHUNKS_MAX. The workspace needs no clearing.
 */
#define KVK_CUDA_LANDMARK_MAX 4096u
typedef struct kvk_cuda_chunk_select_args {
    uint32_t n_seqs, dims, k, rows_max;
    kvk_dtype dtype;
    size_t stride_bytes;
    const float *q;                   /* [n_seqs, dims] */
    const kvk_cuda_candidates *cands; /* [n_seqs] */
    uint32_t *picks;                  /* [n_seqs, k] */
    float *scores;                    /* [n_seqs, k] */
    uint32_t *n_picks;                /* [n_seqs] = min(k, n_rows) */
    void *workspace;
    size_t workspace_bytes;
} kvk_cuda_chunk_select_args;
size_t kvk_cuda_chunk_select_workspace_bytes(uint32_t n_seqs, uint32_t rows_max);
kvc_status kvk_cuda_chunk_select(kvk_cuda *cuda, const kvk_cuda_chunk_select_args *args,
                                 kvk_stream *stream) KVC_MUST_CHECK;

/* kvk_chunk_weights on the device, with its bits; ids of one list that are equal make its weights
 * meaningless. */
kvc_status kvk_cuda_chunk_weights(kvk_cuda *cuda, const kvk_chunk_weights_args *args,
                                  kvk_stream *stream) KVC_MUST_CHECK;

/*
 * Attention of n_q queries over each chunk of a list alone, a partial a chunk as in kvk_attend:
 * entry i of list s is slot list[s * k + i] of res[s], of chunk_bytes, its first n_rows rows are
 * attended. An entry of -1, or past n_list, gets lse = -INFINITY and no o, so fuse passes over it.
 * first_head [n_seqs]: the kv head that n_kv_heads begin at (NULL: 0). Rows are F32, BF16 or F16;
 * offsets, row_bytes and chunk_bytes multiples of 16; bound as kvk_attend's. head_dim 32, 64 or
 * 128, n_rows <= KVK_CUDA_CHUNK_ROWS; else UNSUPPORTED.
 */
#define KVK_CUDA_CHUNK_ROWS 64u
typedef struct kvk_cuda_chunk_attend_args {
    uint32_t n_seqs, k, n_q, n_q_heads, n_kv_heads, head_dim;
    const float *q;                /* [n_seqs, n_q, n_q_heads, head_dim] */
    const int32_t *list;           /* [n_seqs, k] */
    const uint32_t *n_list;        /* [n_seqs] */
    const kvk_cuda_residency *res; /* [n_seqs] */
    const uint32_t *first_head;    /* [n_seqs] or NULL */
    uint32_t n_rows, row_bytes, chunk_bytes, k_off_bytes, v_off_bytes;
    kvk_dtype dtype;
    float scale;
    float *o;   /* [n_seqs, k, n_q, n_q_heads, head_dim] */
    float *lse; /* [n_seqs, k, n_q, n_q_heads] */
} kvk_cuda_chunk_attend_args;
kvc_status kvk_cuda_chunk_attend(kvk_cuda *cuda, const kvk_cuda_chunk_attend_args *args,
                                 kvk_stream *stream) KVC_MUST_CHECK;

/* kvk_chunk_fuse of n_seqs lists of k chunks each; same bound. */
typedef struct kvk_cuda_chunk_fuse_args {
    uint32_t n_seqs, k, n, dim;
    uint32_t off_by_one;  /* 0 or 1 */
    const float *o;       /* [n_seqs, k, n, dim] */
    const float *lse;     /* [n_seqs, k, n] */
    const float *weights; /* [n_seqs, k] */
    float *out;           /* [n_seqs, n, dim] */
} kvk_cuda_chunk_fuse_args;
kvc_status kvk_cuda_chunk_fuse(kvk_cuda *cuda, const kvk_cuda_chunk_fuse_args *args,
                               kvk_stream *stream) KVC_MUST_CHECK;

/*
 * One sequence, after resolve: the rows named by fetch that its source does not have, in list
 * order: miss_pos[j] (room for stride) is the position of the j-th, *n_far their number (both may
 * be pinned), and its entry of fetch becomes staged + j, the position at which whoever brings it
 * will make the source have it.
 */
typedef struct kvk_cuda_misses_args {
    uint32_t *fetch;        /* [stride] */
    const uint32_t *n_list; /* one */
    uint32_t stride, staged;
    const kvk_cuda_source *source; /* one */
    uint32_t *miss_pos, *n_far;
} kvk_cuda_misses_args;
kvc_status kvk_cuda_misses(kvk_cuda *cuda, const kvk_cuda_misses_args *args,
                           kvk_stream *stream) KVC_MUST_CHECK;

/*
 * One sequence: slots that resolve gave to rows which did not come are empty again, and their
 * entries of list are -1. With status: entries whose fetch is staged + j and status[j] is not 0;
 * without: every entry that fetch names.
 */
typedef struct kvk_cuda_forget_args {
    int32_t *list;
    const uint32_t *fetch;
    const uint32_t *n_list; /* one */
    uint32_t stride, staged;
    const int8_t *status;          /* or NULL; may be pinned */
    const kvk_cuda_residency *res; /* one */
} kvk_cuda_forget_args;
kvc_status kvk_cuda_forget(kvk_cuda *cuda, const kvk_cuda_forget_args *args,
                           kvk_stream *stream) KVC_MUST_CHECK;

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
