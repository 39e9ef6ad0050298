/*
 * cases.h: one conformance case per op, case_<op>: compares a subject with the reference on shapes,
 * dtypes, edges and bad arguments. An op without a case does not link.
 */
#ifndef CASES_H
#define CASES_H

#include "kernels_support.h"

#define DECLARE_CASE(op) void case_##op(const subject *s, support_random *random);
KVK_OPS(DECLARE_CASE)
#undef DECLARE_CASE

#endif
