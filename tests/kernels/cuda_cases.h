/* cuda_cases.h: the cases of cuda_conformance; one row adds one. */
#ifndef CUDA_CASES_H
#define CUDA_CASES_H

#include "cuda_support.h"

/* clang-format off */
#define CUDA_CASES(X) \
    X(digest) X(query) X(edges) X(select) X(select_ties) X(select_batch) \
    X(select_window) X(select_large) \
    X(resolve) X(gather) X(attend) X(attend_exact) X(merge) X(graph)
/* clang-format on */

#define DECLARE_CASE(name) void cuda_case_##name(numbers *from);
CUDA_CASES(DECLARE_CASE)
#undef DECLARE_CASE

#endif
