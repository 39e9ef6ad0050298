/* cuda_cases.h: the cases of cuda_conformance; one row adds one. */
#ifndef CUDA_CASES_H
#define CUDA_CASES_H

#include "cuda_support.h"

/* clang-format off */
#define CUDA_CASES(X) \
    X(digest) X(query) X(edges) X(select_small) X(select) X(select_ties) \
    X(select_batch) X(select_window) X(select_early) X(early_small) X(select_large) \
    X(resolve) X(gather) X(encode) X(frame) X(frame_heads) X(order) X(attend) X(attend_exact) \
    X(attend_near) X(near_small) X(attend_resolve) X(prefill_edges) X(prefill) X(merge) X(graph) \
    X(export) X(vote_edges) X(vote_small) X(vote_behind) X(vote) X(vote_ties) X(vote_batch) \
    X(vote_large) X(vote_window) X(vote_wide) X(rerank_edges) X(rerank) X(rerank_ties) \
    X(rerank_batch) X(keep) X(mean) X(kept) X(rope) X(rows) X(finite) X(select_many) X(many_edges) \
    X(chunk_select) X(chunk_select_ties) X(chunk_select_batch) X(chunk_edges) X(chunk_weights) \
    X(chunk_attend) X(chunk_attend_heads) X(chunk_fuse) X(chunk_gather) X(chunk_path) \
    X(embed) X(rms_norm) X(linear) X(rotate) X(local_attend) X(layers_edges)
/* clang-format on */

#define DECLARE_CASE(name) void cuda_case_##name(numbers *from);
CUDA_CASES(DECLARE_CASE)
#undef DECLARE_CASE

#endif
