/*
 * device.h: what the worker asks of a device that its decode steps run on, or that chunks are
 * retrieved on: one table for each kind, and for selectors of chunks another.
 *
 * A worker with a device has a CPU backend beside it, which does what the device's kind cannot.
 * Host memory has every row and index row as without a device, once `settle` has run; the device
 * has copies of what its steps read. All slots are called on the sequence's thread, map and unmap
 * on any. Errors: kvwi_fail has the words.
 */
#ifndef KVWI_DEVICE_H
#define KVWI_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "buf.h"
#include "kvw/worker.h"

typedef struct kvwi_device kvwi_device;                     /* of a worker */
typedef struct kvwi_device_seq kvwi_device_seq;             /* of a sequence, seq->device */
typedef struct kvwi_device_retriever kvwi_device_retriever; /* retriever->device */
typedef struct kvwi_device_batch kvwi_device_batch;         /* of a kvw_batch */

typedef struct kvwi_device_ops {
    const char *name;
    bool chunks; /* for selectors of whole chunks: retriever slots, and none of passes and steps */
    /* Device `number` for a worker whose options and levels are known. UNSUPPORTED: not in this
     * build, on this machine, or not with these options. */
    kvc_status (*open)(kvw_worker *worker, uint32_t number, kvwi_device **device_p);
    void (*close)(kvwi_device *device);
    /* What the results depend on, for the recipe. */
    const char *(*isa)(const kvwi_device *device);
    /* Host memory (whole pages) that the device may read and write until unmap. */
    kvc_status (*map)(kvwi_device *device, void *base, size_t len_bytes);
    void (*unmap)(kvwi_device *device, void *base);
    /* All memory that steps need. NO_MEMORY. */
    kvc_status (*seq_open)(kvw_seq *seq, uint32_t n_tokens, void *stream);
    void (*seq_close)(kvw_seq *seq); /* seq->device may be NULL */
    /* Passes of several tokens and steps that attend everything are for the device too. */
    bool takes_passes;
    /* A pass that is for the device is about to begin, of n tokens, with which the sequence has
     * n_tokens: room for it, and the device's copies. */
    kvc_status (*pass)(kvw_seq *seq, uint32_t n_tokens, uint32_t n);
    /* The pass's n tokens in one layer; host memory of their blocks is written behind the caller.
     * whole: a step follows at once (step_begin's whole), which may take a token along; if none
     * does, settle. */
    kvc_status (*append)(kvw_seq *seq, uint32_t layer, const void *k, const void *v, uint32_t n,
                         bool whole);
    /* Host memory has what the device wrote for it. Blocks. */
    kvc_status (*settle)(kvw_seq *seq);
    /* Tokens of the last pass (seq->pass) from n_tokens on go; a failure leaves all as it was. */
    kvc_status (*truncate)(kvw_seq *seq, uint32_t n_tokens);
    /* A step that kvwi_device_takes. whole: begin and finish have the same queries, and nothing is
     * done in between. */
    kvc_status (*step_begin)(kvw_step *step, const void *q_select, bool whole);
    kvc_status (*step_attend)(kvw_step *step, const void *q);
    kvc_status (*step_finish)(kvw_step *step, const void *q, void *out, float *lse);
    void (*step_abandon)(kvw_step *step);
    /* The last selection into the layer's picks, ascending. */
    kvc_status (*picks)(const kvw_seq *seq, uint32_t layer);
    /* Any pair of addresses; done on return. */
    kvc_status (*copy)(kvw_seq *seq, void *to, const void *from, size_t len_bytes);
    uint64_t (*bytes)(const kvw_seq *seq); /* of device memory that the sequence holds */
    /* For steps of up to n_max sequences. NO_MEMORY. */
    kvc_status (*batch_open)(kvw_worker *worker, uint32_t n_max, void *stream,
                             kvwi_device_batch **batch_p);
    void (*batch_close)(kvwi_device_batch *batch);
    /* n different sequences enqueue on the batch's stream from now on: before the first append of a
     * call, whose k and v are made on it. */
    kvc_status (*batch_join)(kvwi_device_batch *batch, kvw_seq *const *seqs, uint32_t n);
    /* step_finish of the sequences' steps of one layer, which were begun as whole ones; q, out and
     * lse of all, one after the other. A failure leaves every step to be abandoned. */
    kvc_status (*batch_finish)(kvwi_device_batch *batch, kvw_seq *const *seqs,
                               kvw_step *const *steps, uint32_t n, const void *q, void *out,
                               float *lse);

    /* All memory that a retriever needs, its slab made readable to the device. NO_MEMORY. */
    kvc_status (*retriever_open)(kvw_retriever *r);
    /* Waits for what the retriever enqueued; r->device may be NULL. */
    void (*retriever_close)(kvw_retriever *r);
    /* The k best of chunks 0 .. n - 1 into r's order_ids, order_scores, order_w and n. Afterwards
     * nothing that the retriever enqueued before is under way. */
    kvc_status (*retriever_choose)(kvw_retriever *r, const float *query, uint32_t n);
    /* Over the chosen chunks, whose rows are in the slab; takes those of slots that are fresh. */
    kvc_status (*retriever_attend)(kvw_retriever *r, const void *q, uint32_t n_q, void *out);
} kvwi_device_ops;

/* The kind that a backend's name asks for ("cuda", "cuda:1"), and the number; NULL: it names none.
 * chunks: what the selector chooses. */
const kvwi_device_ops *kvwi_device_find(const char *backend, bool chunks, uint32_t *number_p);
/* Whether a step is one for the device; a pass of n tokens likewise. */
bool kvwi_device_takes(const kvw_step *step);
bool kvwi_device_takes_pass(const kvw_worker *worker, uint32_t n);
/*
 * Where device_memory says so, n bytes at p brought into buf, else p itself; NULL: it failed, said.
 */
const void *kvwi_device_to_host(kvw_seq *seq, const void *p, size_t len_bytes, kvwi_buf *buf);

extern const kvwi_device_ops kvwi_device_cuda, kvwi_device_cuda_chunks;

#endif
