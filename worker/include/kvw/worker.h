/*
 * worker.h: the library that an inference engine links.
 *
 * A worker belongs to one model (one schema). A sequence is one context being read and written: the
 * worker keeps its index (compressed keys), its sink and recent rows and a residency of fetched
 * rows; everything else is in the store. Per layer and forward pass the engine calls kvw_append
 * with the new tokens' K and V (before RoPE) and runs a step: begin (select, resolve, fetch what is
 * missing), attend (resident rows, while the misses travel), finish (arrivals, merge). kvw_forward
 * is the four in one.
 *
 * A sequence is used by one thread at a time; different sequences may run in parallel. Nothing here
 * exits, prints or aborts on input; kvw_last_error has the words.
 *
 * Structs that begin with size_bytes: the caller sets it to sizeof its own struct. A shorter one,
 * of an older header, is taken, and what it lacks is 0 (kvw_stats: not written); one that is longer
 * than this library's, or no multiple of a word, is INVALID.
 */
#ifndef KVW_WORKER_H
#define KVW_WORKER_H

#include <stddef.h>
#include <stdint.h>

#include "kvc/client.h"
#include "kvk/compute.h"

#ifdef __cplusplus
extern "C" {
#endif

#ifndef KVW_API
#define KVW_API __attribute__((visibility("default")))
#endif

typedef struct kvw_worker kvw_worker;
typedef struct kvw_seq kvw_seq;
typedef struct kvw_step kvw_step;
typedef struct kvw_batch kvw_batch;
typedef struct kvw_retriever kvw_retriever;

/* What to do about rows that are late or missing. */
typedef enum kvw_policy {
    KVW_FAIL = 1, /* the step fails; out is undefined */
    KVW_DROP = 2, /* attention renormalises over what arrived; counted. Not with tp_size > 1 */
} kvw_policy;

/* How a selector keeps the keys that it scores. */
typedef enum kvw_index_kind {
    KVW_INDEX_EXACT = 1,      /* raw keys in the model's dtype */
    KVW_INDEX_COMPRESSED = 2, /* int8 rows of projected keys; projection file needed */
    KVW_INDEX_RERANKED = 3,   /* compressed, then the candidates again by a finer int8 index */
} kvw_index_kind;

/*
 * Sums over the workers of a tensor-parallel group; x [n] in place; op: "sum" or "max"; every
 * worker gets the same bits. n_q_heads and n_kv_heads are the local ones, so ESA sums its projected
 * queries and keys (over exact keys: the scores), TokenSelect the votes and the three numbers of
 * the Selection Cache's cosine; its softmax is per head and needs no sum. kvw_seq_open compares
 * heads and options and agrees on what is reused by "max". Calls come in the same order on every
 * worker as long as all of them create the same sequences and run the same steps. Blocks.
 *
 * One worker that fails alone: kvw_seq_open, kvw_append and kvw_step_begin say so to the group (by
 * "max" of one number) before they sum anything, and then fail on every worker, CANCELLED where
 * only another one had a reason. What fails later on one worker (memory in the midst of a
 * selection, resolve), in kvw_tokens or in kvw_step_finish, is that worker's alone, and a worker
 * may end. So the engine guarantees two things: it tells the others of an error before they go on,
 * and this function comes back with an error, TIMED_OUT say, on all workers when one does not come.
 */
typedef kvc_status kvw_all_reduce_fn(void *arg, const char *op, float *x, uint32_t n);

typedef struct kvw_opts {
    size_t size_bytes; /* sizeof(kvw_opts) */
    /* the model */
    const char *model, *revision; /* enter the schema */
    uint32_t n_layers, n_q_heads, n_kv_heads, head_dim;
    kvk_dtype dtype; /* of K, V, q and out; of the rows too unless row_dtype says otherwise */
    kvk_rope_params rope;
    float attention_scale;     /* 0: 1/sqrt(head_dim) */
    uint32_t tp_size, tp_rank; /* 0: 1 and 0 */
    /* the store */
    kvc_client *client;        /* kept; NULL: no store, every row stays resident */
    uint32_t block_tokens;     /* 0: 256 */
    kvc_promise promise;       /* 0: MEMORY */
    uint64_t fetch_timeout_ns; /* 0: 10 s; over rdma:// a quarter of it more (see kvc_fetch) */
    kvw_policy policy;         /* 0: FAIL */
    /* compute */
    const char *backend; /* NULL: "cpu" */
    uint32_t n_threads;  /* 0: one per core */
    /* selection */
    const char *selector;        /* "esa", "tokenselect"; of whole chunks: "gca", "hsa" */
    kvw_index_kind index;        /* 0: ESA COMPRESSED, TokenSelect EXACT */
    const char *projection_path; /* calibration artefact; NULL where index is EXACT */
    uint32_t n_sink;             /* 0: 128 */
    uint32_t n_recent;           /* 0: selector's (ESA 4096, TokenSelect 512) */
    uint32_t k;                  /* 0: 2048; chunks: 0: 8 */
    /* proximity window, tokens each side; for tokenselect on a GPU a few: time grows with eps */
    uint32_t eps;
    uint32_t chunk_tokens; /* prefill chunk; 0: 512; block_tokens must divide it or be a multiple */
    uint32_t far_position; /* ESA: w, the constant distance of far keys; 0: n_recent */
    /* TokenSelect: theta of the Selection Cache; 0: off (always reselect); the paper uses 0.9 */
    double reselect_cos;
    kvw_all_reduce_fn *all_reduce; /* NULL: single worker */
    void *all_reduce_arg;
    /* memory */
    /* Rows of fetched tokens kept, per layer and sequence; 0: 2 * k. Over rdma:// they are written
     * there without a copy where the client's region_bytes (see kvc_client_opts) has room for
     * n_layers * residency_slots * bytes of a row for each sequence in use. */
    uint32_t residency_slots;
    uint32_t exact; /* 1: no overlap; one attention in position order, bit-equal always */
    /* the compressed index: columns of the projection (best first) that it keeps per head */
    uint32_t index_dims;    /* 0: all that the file has; RERANKED: half of rerank_dims */
    uint32_t rerank_dims;   /* RERANKED: of the finer index; 0: all that the file has */
    uint32_t rerank_factor; /* RERANKED: the scan keeps rerank_factor * k candidates; 0: 4 */
    /* putting */
    uint32_t put_window;     /* blocks of a sequence on their way to the store; 0: 4 */
    uint64_t put_timeout_ns; /* how long kvw_tokens waits for the window; 0: 60 s */
    uint32_t reuse_any;      /* see kvw_tokens; 1: enters the recipe */
    /*
     * How rows that are not resident are reached: "auto" (NULL: the same) takes for each step the
     * way that has cost least, by kvc_way_choose; "rows", "near", "shm" or "rdma" asks for one of
     * them, and another is taken only where it cannot serve a step. "near": the server attends and
     * sends a partial; its o is rounded to dtype, so a step differs from one by rows by at most
     * 2^-8 (bf16) or 2^-11 (f16) of the largest |v|, beside the last bits of f32. Never with exact,
     * nor in passes of chunk_tokens, whose blocks others reuse. Of whole chunks the way is chosen
     * by what a retrieval costs, not a call: see kvw_retriever_attend.
     */
    const char *way;
    /* "gca", "hsa": elements of a landmark, a multiple of 16; else 0 */
    uint64_t landmark_dim;
    /*
     * A store of several servers, instead of client: blocks are spread over them by their digests
     * and the servers' names, so every process that is to find them has the same names, in any
     * order (base/place.h has the formula). clients, kept, are of one server each; the arrays are
     * borrowed. server_names NULL: "0", "1" ..., else 1 to 255 bytes each, all different.
     */
    kvc_client *const *clients;      /* [n_clients]; NULL: client alone */
    const char *const *server_names; /* [n_clients] */
    uint64_t n_clients;              /* at most KVW_MAX_SERVERS */
    /*
     * backend "cuda" or "cuda:N" (a GPU's number): passes and steps run on that GPU. UNSUPPORTED
     * where the build or the machine has none, or where index is neither COMPRESSED nor, for
     * "tokenselect", RERANKED, dtype not bf16, head_dim not 64 or 128, more than 8 query heads for
     * a kv head, n_kv_heads no multiple of 8 with a row_dtype, k or chunk_tokens above 4096, rows
     * longer than the GPU's shared memory takes (README), tp_size or n_clients above 1, or for
     * "tokenselect" n_q_heads above 128, n_q_heads times index_dims or rerank_dims above 16384,
     * k * rerank_factor above 16384, or a GPU whose blocks have too little shared memory for its
     * vote (sm_86, sm_89, sm_120). Rows in a server's memory on the same host are read by the GPU
     * where the client is on shm: contexts of the client are then mapped
     * (kvc_client_map_contexts), which it is not to be used for elsewhere. Of way only "near" and
     * "auto" differ from the others, in single tokens' steps over rows that the GPU cannot reach:
     * by "near" their server attends, by "auto" where that has cost least and kvw_forward is
     * called, since in parts their fetch sets off with kvw_step_begin.
     *
     * Selectors "gca" and "hsa": retrievers score, choose and attend on that GPU, which holds the
     * landmarks and each retriever's chunks; head_dim 32, 64 or 128, landmark_dim at most 4096,
     * tp_size 1, any number of servers; n_threads and all else is the CPU's. Chunks come by a fetch
     * a server into pinned memory.
     */
    uint32_t max_tokens; /* a sequence takes GPU memory for so many at open; one that grows beyond
                            gets more between two passes; 0: 131072 */
    /* 1: k, v, q, out and lse of every call are that GPU's memory (16-byte aligned: k and
     * v of passes that the GPU takes are INVALID otherwise), used in order on kvw_seq_opts.stream,
     * or a batch's; queries are not looked at then, and keys (with row_dtype values too) that are
     * not finite are found when the GPU has done with them: see kvw_append. Landmarks and the query
     * of kvw_retrieve are host memory always, and kvw_retriever_attend does not wait for out. 0:
     * host memory. */
    uint32_t device_memory;
    /* "gca", "hsa": queries that attend to what one retrieval chose, of all calls together, as far
     * as that is known, at most 2^32; 0: as many as to the one before, at first 64. */
    uint64_t retrieval_queries;
    /*
     * A kvk_dtype: KVK_I8_SCALED or KVK_E4M3_SCALED: rows are kept, stored and moved coded, a byte
     * an element and a bf16 scale a head (kvk_encode has the error), half or a quarter of the
     * bytes; 0: in dtype. Enters the schema. The index is made of the keys as they come, so it
     * cannot be made anew of rows: prefixes are reused as far as their index is stored. Not with
     * index EXACT, nor for selectors of chunks.
     */
    uint64_t row_dtype;
} kvw_opts;

#define KVW_MAX_SERVERS 64u

/*
 * Opens a worker: checks opts, loads the projection, registers the schema (blocks). INVALID with
 * kvw_last_error naming the option; UNSUPPORTED; UNAVAILABLE. Any thread.
 */
KVW_API kvc_status kvw_open(const kvw_opts *opts, kvw_worker **worker_p) KVC_MUST_CHECK;
/* Sequences must have been destroyed. NULL is fine. */
KVW_API void kvw_close(kvw_worker *worker);
/* Text of the last error on the calling thread; never NULL. */
KVW_API const char *kvw_last_error(void);
/* The schema that this worker's values have. */
KVW_API const kvc_digest *kvw_schema_digest(const kvw_worker *worker);

typedef struct kvw_seq_opts {
    size_t size_bytes;      /* sizeof(kvw_seq_opts) */
    const uint32_t *tokens; /* [n_tokens] known beforehand: the prompt; borrowed */
    uint32_t n_tokens;      /* may be 0 */
    /*
     * What else decides this sequence's keys and values, or who may share them; NULL or "":
     * nothing. Both enter every block's digest, so that sequences share blocks only where both are
     * equal. At most 255 bytes each, without a line's end; borrowed. All ranks of a group say the
     * same.
     */
    const char *adapter; /* id and revision of the weights on top of the model's (LoRA) */
    const char *salt; /* of a user, session or customer whose prompts must not be found by others */
    /* device_memory: the CUDA stream on which k, v and q are made and out is read; NULL: the
     * default stream. kvw_append comes back at once; kvw_step_finish waits for the step, but not
     * for out, which is there in stream order. */
    void *stream;
} kvw_seq_opts;

/*
 * Starts a sequence. Matches the prefix of its tokens in the store, cut to a multiple of
 * chunk_tokens and block_tokens and to at most n_tokens - 1, and brings back the index, sink and
 * recent rows of what matched. *n_reused_p tokens need no prefill: the engine goes on at that
 * position. INVALID; NO_MEMORY; what the store answers; CANCELLED: another worker of the group
 * could not start.
 *
 * Blocks: for a few round trips and the time that the index needs to travel (bytes_index in
 * kvw_stats, so dims + 2 bytes a token, layer and head). Where index values are missing, or the
 * index is EXACT, it is rebuilt here from the K and V rows of every token: row_bytes a token and
 * layer travel and are projected. index_rows_rebuilt counts them.
 */
KVW_API kvc_status kvw_seq_open(kvw_worker *worker, const kvw_seq_opts *opts, kvw_seq **seq_p,
                                uint32_t *n_reused_p) KVC_MUST_CHECK;
/* The same with nothing but tokens. */
KVW_API kvc_status kvw_seq_create(kvw_worker *worker, const uint32_t *tokens, uint32_t n_tokens,
                                  kvw_seq **seq_p, uint32_t *n_reused_p) KVC_MUST_CHECK;
/* Puts the full blocks, waits for puts in flight (up to put_timeout_ns; a put that fails otherwise
 * than by AGAIN ends it) and drops the worker's memory of it; values stay in the store. Steps that
 * are still open are abandoned. NULL is fine. */
KVW_API void kvw_seq_destroy(kvw_seq *seq);
/* Tokens held (all layers appended). */
KVW_API uint64_t kvw_seq_tokens(const kvw_seq *seq);

/*
 * Begins a forward pass over the next n_tokens (1 .. chunk_tokens) tokens, before its first
 * kvw_append: their ids enter the block digests. Every layer appends all of them, once. Accepts the
 * tokens of the pass before: blocks that they filled are put behind the engine's back (waits while
 * put_window of them are on their way, up to put_timeout_ns: TIMED_OUT, and the pass may be begun
 * again). No step may be open and every layer must have appended the pass before: INVALID.
 *
 * Prefill in passes of exactly chunk_tokens from position 0 on: only blocks computed so can be
 * found by other sequences, since KV depends on where the chunks begin. A block that saw another
 * pass (decode, a shorter chunk) is stored under a digest that covers its passes, unless
 * reuse_any is 1: then later turns reuse such blocks too, and may differ from a cold run.
 */
KVW_API kvc_status kvw_tokens(kvw_seq *seq, const uint32_t *tokens,
                              uint32_t n_tokens) KVC_MUST_CHECK;

/*
 * Takes back tokens of the last pass (rejected drafts): the sequence holds n_tokens afterwards.
 * Keeping a part of a pass makes the block that it lies in, and all later ones of this sequence,
 * impossible for other sequences to find (they saw the rejected tokens), unless reuse_any is 1.
 * INVALID: n_tokens before the last pass or beyond it, a step is open, or layers differ. DEVICE.
 */
KVW_API kvc_status kvw_truncate(kvw_seq *seq, uint64_t n_tokens) KVC_MUST_CHECK;

/*
 * The pass's new tokens in one layer: k, v [n_tokens, n_kv_heads, head_dim] dense, before RoPE,
 * borrowed. Layers in any order. Does not wait for the store. INVALID: another n_tokens than the
 * pass has, twice in one pass, or a key (with row_dtype a value too) that is not finite; CANCELLED:
 * on another worker of the group (the layer is as it was).
 *
 * In device memory what is not finite is INVALID in the layer's kvw_step_finish, kvw_forward or
 * kvw_batch_forward, and the layer is then as it was before this call, which may be repeated. Where
 * no step followed: in the layer's next kvw_append, or in kvw_tokens or kvw_flush before blocks are
 * put, until kvw_truncate takes the whole pass back. It never reaches the store.
 */
KVW_API kvc_status kvw_append(kvw_seq *seq, uint32_t layer, const void *k, const void *v,
                              uint32_t n_tokens) KVC_MUST_CHECK;

/*
 * Begins attention of layer for the last n_q tokens appended: q_select [n_q, n_q_heads, head_dim]
 * in dtype, before RoPE, the real query or a prediction (borrowed). Selects, resolves, submits at
 * most one fetch per server; never waits for the network. Several steps may be open, one per layer.
 * INVALID: the pass is not appended, or q_select is not finite. AGAIN: a step of this layer is
 * open. CANCELLED: another worker of the group could not begin.
 */
KVW_API kvc_status kvw_step_begin(kvw_seq *seq, uint32_t layer, const void *q_select, uint32_t n_q,
                                  kvw_step **step_p) KVC_MUST_CHECK;
/* Optional: attends over resident rows with the real q while the misses travel. No-op in exact.
 * Where it fails (NO_MEMORY), finish fails too. */
KVW_API kvc_status kvw_step_attend(kvw_step *step, const void *q) KVC_MUST_CHECK;
/*
 * Takes the step. out [n_q, n_q_heads, head_dim] in dtype, may be q itself; lse [n_q, n_q_heads]
 * natural log, may be NULL. Waits for the misses up to fetch_timeout_ns. FAIL policy: TIMED_OUT,
 * NOT_FOUND, UNAVAILABLE. DROP with several servers: one that did not answer in time is not waited
 * for again for a second, then two, at most a minute; its rows count as dropped meanwhile.
 */
KVW_API kvc_status kvw_step_finish(kvw_step *step, const void *q, void *out,
                                   float *lse) KVC_MUST_CHECK;
/* Takes the step and drops it: cancels what is in flight and waits for it to end. The layer's
 * tokens stay and another step may begin. NULL is fine. */
KVW_API void kvw_step_abandon(kvw_step *step);
/*
 * append + begin + attend + finish. q, k, v, out as above; n_tokens new tokens. No step is open
 * afterwards. Where it fails, the layer has the tokens unless kvw_append was what failed: then the
 * call may be repeated, else kvw_step_begin goes on with them, or kvw_truncate takes the pass back
 * once every layer has appended it.
 */
KVW_API kvc_status kvw_forward(kvw_seq *seq, uint32_t layer, const void *q, const void *k,
                               const void *v, uint32_t n_tokens, void *out,
                               float *lse) KVC_MUST_CHECK;

/*
 * Decode steps of several sequences of one worker at a time, of any lengths: on a GPU in one launch
 * a layer and one wait. Their thread is that of the batch while they are in it, and they belong to
 * it until others take their place or it is closed; a sequence may be destroyed before. n_max at
 * most KVW_MAX_BATCH; stream: of device_memory, as a sequence's, which is not used meanwhile. Holds
 * GPU memory for n_max sequences, and a graph for each layer and number of sequences that came,
 * until it is closed. INVALID; UNSUPPORTED: selectors of chunks, tp_size above 1;
 * NO_MEMORY.
 */
#define KVW_MAX_BATCH 512u
KVW_API kvc_status kvw_batch_open(kvw_worker *worker, uint32_t n_max, void *stream,
                                  kvw_batch **batch_p) KVC_MUST_CHECK;
/* Before the worker is. NULL is fine. */
KVW_API void kvw_batch_close(kvw_batch *batch);
/*
 * kvw_forward of one token of each of n different sequences, each after its kvw_tokens: q, out [n,
 * n_q_heads, head_dim], k, v [n, n_kv_heads, head_dim], lse [n, n_q_heads] or NULL, sequence after
 * sequence; out may be q. The results are those of kvw_forward. The status is that of a sequence
 * that failed; out is undefined then, no step is open, and of each sequence holds what kvw_forward
 * says: where its layer has the token (kvw_step_begin is not INVALID), its step may be done again
 * alone.
 */
KVW_API kvc_status kvw_batch_forward(kvw_batch *batch, kvw_seq *const *seqs, uint32_t n,
                                     uint32_t layer, const void *q, const void *k, const void *v,
                                     void *out, float *lse) KVC_MUST_CHECK;

/*
 * Accepts the last pass, puts what it filled, and waits until every full block has been
 * acknowledged with the worker's promise. deadline_ns 0: put_timeout_ns from now. TIMED_OUT; the
 * error of a put that can never succeed.
 */
KVW_API kvc_status kvw_flush(kvw_seq *seq, uint64_t deadline_ns) KVC_MUST_CHECK;

/* The picks of the layer's last selection, ascending positions; *n_p <= k. For tests and reports.
 */
KVW_API kvc_status kvw_last_picks(const kvw_seq *seq, uint32_t layer, const uint32_t **picks_p,
                                  uint32_t *n_p) KVC_MUST_CHECK;

/*
 * Retrieval of whole chunks: selectors "gca" (arXiv 2410.01651) and "hsa" (2504.16795).
 *
 * A layer is a memory: one K and V for all that read it. Chunks are KVW_CHUNK_TOKENS tokens, their
 * landmark token last; the engine appends them when its encoder has finished them, so a pass is of
 * whole chunks, and a chunk that is not full yet is not there to be retrieved. Where each chunk's
 * softmax has 1 in its denominator, the landmark's row of K and V is zero (exp(0) = 1). There are
 * no steps and no positions: a retriever scores landmarks, takes the k best chunks, brings them
 * whole into memory of its own and attends to each, as often as the engine likes.
 */
#define KVW_CHUNK_TOKENS 64u
#define KVW_ALL_HEADS    UINT32_MAX

/* kvw_append for such a worker: besides landmarks [n_tokens / 64, landmark_dim], borrowed. INVALID
 * also: n_tokens is not of whole chunks, or a landmark not finite. */
KVW_API kvc_status kvw_append_chunks(kvw_seq *seq, uint32_t layer, const void *k, const void *v,
                                     const float *landmarks, uint32_t n_tokens) KVC_MUST_CHECK;

/*
 * A retriever over one layer: one for each group that retrieves for itself. kv_head KVW_ALL_HEADS
 * (GCA): all heads share its chunks, and all of a landmark is scored. A kv head (HSA; not with
 * tp_size > 1): for its query heads alone, by the kv_head-th of n_kv_heads equal pieces of
 * landmarks and query. Holds k chunks. Belongs to the sequence's thread and ends with it at the
 * latest. INVALID; NO_MEMORY.
 */
KVW_API kvc_status kvw_retriever_open(kvw_seq *seq, uint32_t layer, uint32_t kv_head,
                                      kvw_retriever **retriever_p) KVC_MUST_CHECK;
/* Cancels what is in flight. NULL is fine. */
KVW_API void kvw_retriever_close(kvw_retriever *retriever);

/*
 * Chooses the k best of the first n_chunks chunks by query [landmark_dim], as it is, over landmarks
 * (scores q.l / sqrt(dim); score descending, position ascending), weighs them (gca: softmax over
 * the chosen; hsa: stick breaking, newest first) and asks the store for those that are not here, in
 * one fetch per server; never waits for it. Strict causality is n_chunks: chunk t retrieves among
 * the t before it. Replaces what was retrieved before. INVALID: fewer chunks are there, a query not
 * finite.
 */
KVW_API kvc_status kvw_retrieve(kvw_retriever *retriever, const float *query,
                                uint64_t n_chunks) KVC_MUST_CHECK;
/* What was chosen, ascending chunks, until the next kvw_retrieve: scores before the division by
 * sqrt(dim), weights; *n_p <= k. Does not wait. */
KVW_API kvc_status kvw_retrieved(const kvw_retriever *retriever, const uint32_t **chunks_p,
                                 const float **scores_p, const float **weights_p,
                                 uint32_t *n_p) KVC_MUST_CHECK;
/*
 * out = sum over the chosen of weight * attention over that chunk alone; q, out [n_q, query heads
 * of the retriever, head_dim] in dtype; out may be q; zero where nothing was there to choose. The
 * first call after kvw_retrieve waits for the chunks up to fetch_timeout_ns: TIMED_OUT, NOT_FOUND,
 * UNAVAILABLE, after which only another kvw_retrieve helps. The same bits whatever had to be
 * fetched.
 *
 * Chunks that are not here come in one request per server, as whole blocks where a chunk is one
 * (block_tokens 64) and rows cost more; or they stay. With way "near" (not with exact, not for a
 * single kv head), and with "auto" where that costs less, server by server, for as many calls as
 * are to be expected (retrieval_queries), kvw_retrieve fetches nothing: every call sends q to the
 * servers of what is not here, up to 64 queries, and gets one partial a chunk,
 * rounded to dtype, so out differs from that of fetched chunks by at most 2^-8 (bf16) or 2^-11
 * (f16) of the largest |v|, beside the last bits of f32. That moves less where few queries follow a
 * retrieval: a query and its partials are (1 + chunks) * query heads * head_dim elements, chunks
 * come once, 64 rows each. What servers do not attend is fetched in the same call.
 */
KVW_API kvc_status kvw_retriever_attend(kvw_retriever *retriever, const void *q, uint32_t n_q,
                                        void *out) KVC_MUST_CHECK;

/* Counters since kvw_seq_create; bytes are the worker's own. */
typedef struct kvw_stats {
    size_t size_bytes;
    uint64_t tokens, tokens_reused;
    uint64_t steps, reselects;    /* selections made, selections needed */
    uint64_t picks, hits, misses; /* rows picked; of these resident; not resident */
    /* Where misses came from: the servers' tiers, for what they read. Rows that this process or its
     * device reads in place (shm) count as rows_dram, also those in a server's GPU. */
    uint64_t rows_gpu, rows_dram, rows_lmdb, rows_dropped;
    uint64_t bytes_fetched, bytes_put, requests;
    uint64_t blocks_put, blocks_existed, index_rows_rebuilt;
    uint64_t bytes_index, bytes_residency, bytes_window; /* resident now */
    uint64_t ns_select, ns_fetch_wait, ns_attend, ns_append;
    uint64_t full_steps;               /* steps short enough to attend everything */
    uint64_t put_retries, ns_put_wait; /* values sent again; time that the engine waited to put */
    uint64_t rows_near;     /* misses attended beside the data; they do not become resident */
    uint64_t way_fallbacks; /* steps whose misses one way did not bring and another did */
    uint64_t steps_device;  /* of steps: on the device */
    uint64_t host_syncs;    /* times that the sequence's thread waited for the device */
    uint64_t bytes_device;  /* device memory that the sequence holds */
    uint64_t bytes_near;    /* queries and partials that moved for rows_near */
    uint64_t rows_ahead;    /* on a GPU: misses that set off when kvw_step_begin chose them */
} kvw_stats;

KVW_API kvc_status kvw_seq_stats(const kvw_seq *seq, kvw_stats *stats_p) KVC_MUST_CHECK;

/* What a sequence had from one server. */
typedef struct kvw_server_stats {
    size_t size_bytes;
    const char *name;      /* lives as long as the worker */
    uint64_t blocks;       /* of the sequence that are its own */
    uint64_t rows, bytes;  /* that came from it */
    uint64_t requests;     /* for rows, or to attend */
    uint64_t rows_near;    /* that it attended over */
    uint64_t rows_missing; /* that were asked for and did not come */
    uint64_t lost;         /* 1: it did not answer, and DROP waits for it no more just now */
} kvw_server_stats;

/* Of server `server`, a number below n_clients (0 is that of `client`). INVALID. On the sequence's
 * thread. */
KVW_API kvc_status kvw_seq_server_stats(const kvw_seq *seq, uint32_t server,
                                        kvw_server_stats *stats_p) KVC_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif
