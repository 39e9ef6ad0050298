/*
 * gca_model.h: forward pass of the tiny GCA decoder that worker/python/kvasir/gca trains: plain C
 * over the compute layer's ops, on the CPU or on a GPU, with all its memory of a context in a
 * worker's sequence.
 *
 * A model is immutable and may be shared; a context belongs to one thread, as its sequence does.
 */
#ifndef GCA_MODEL_H
#define GCA_MODEL_H

#include <stddef.h>
#include <stdint.h>

#include "kvk/compute.h"
#include "kvw/worker.h"

/* As in the file's metadata, "config". */
typedef struct gca_sizes {
    uint32_t vocab, hidden, heads, mlp, lower, encoder, upper, groups, chunk, window, topk, taps;
} gca_sizes;

enum { GCA_MAX_LAYERS = 16, GCA_MAX_GROUPS = 4 };

/* gca_weights.c: a safetensors file, whole in memory. */
typedef struct gca_weights gca_weights;
/* Reads sizes too. IO; INVALID: not a file that the trainer wrote. */
kvc_status gca_weights_load(const char *path, gca_weights **weights_p,
                            gca_sizes *sizes_p) KVC_MUST_CHECK;
void gca_weights_free(gca_weights *weights);
/* Of every number in the file: a name under which its keys and values may be shared. */
const char *gca_weights_fingerprint(const gca_weights *weights);
/* The f32 tensor of a name with n elements, which lives as long as weights; NULL: there is none. */
const float *gca_weights_get(const gca_weights *weights, const char *name, size_t n);

typedef struct gca_model gca_model;
/* backend: "cpu", "cuda", or "cuda:N" for another GPU than the first. UNSUPPORTED: there is none of
 * it here, or not for these sizes. */
kvc_status gca_model_open(const char *path, const char *backend,
                          gca_model **model_p) KVC_MUST_CHECK;
void gca_model_close(gca_model *model);
const gca_sizes *gca_model_sizes(const gca_model *model);
/* Chunks that gca_context_body takes at once. */
uint32_t gca_model_pass_chunks(const gca_model *model);
/* What a worker for its memory has to be opened with, besides model and client; strings live as
 * long as the model. */
void gca_model_opts(const gca_model *model, kvw_opts *opts_p);

typedef struct gca_context gca_context;
/* seq is borrowed, empty, and outlives the context. */
kvc_status gca_context_open(const gca_model *model, kvw_seq *seq,
                            gca_context **context_p) KVC_MUST_CHECK;
void gca_context_close(gca_context *context);
/* Appends n_chunks (1 .. gca_model_pass_chunks) chunks of tokens: lower half and encoder only.
 * Before the first chunk of the tail. */
kvc_status gca_context_body(gca_context *context, const uint32_t *tokens,
                            uint32_t n_chunks) KVC_MUST_CHECK;
/* The next n rows of the tail, which do not go beyond a chunk's end; logits [n, vocab]. With a
 * chunk's last row it is appended, and the groups retrieve for the next one. A context that failed
 * is of no more use. */
kvc_status gca_context_rows(gca_context *context, const uint32_t *tokens, uint32_t n,
                            float *logits) KVC_MUST_CHECK;

#endif
