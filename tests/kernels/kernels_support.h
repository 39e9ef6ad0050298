/*
 * kernels_support.h: what the kernel tests share: the backends under test, made-up data in every
 * dtype, and comparisons that name the element.
 */
#ifndef KERNELS_SUPPORT_H
#define KERNELS_SUPPORT_H

#include <math.h>
#include <stdbool.h>

#include "kvk/compute.h"
#include "support.h"

/* One backend, isa and thread count under test. */
typedef struct subject {
    char label[64];
    kvk_backend *be;
    const kvk_ops *ops;
} subject;

/* The isas under test. The thread sanitizer is there for what threads share, which no isa changes
 * but by its tiles: it runs subjects of several threads, in the plain form and the widest two. */
#ifdef __SANITIZE_THREAD__
#define SUBJECT_THREADS_MIN 3
#define SUBJECT_ISAS        "portable", "avx512", "amx"
#else
#define SUBJECT_THREADS_MIN 1
#define SUBJECT_ISAS        "double", "portable", "avx2", "avx512", "amx"
#endif

/* Under a sanitizer, tenfold slower, the same work is cut in fewer ways. */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define SUBJECT_BRIEF true
#else
#define SUBJECT_BRIEF false
#endif

/* Calls fn for every registered backend x isa that this machine has x thread count (1 and 3). */
void for_each_subject(void (*fn)(const subject *s, void *arg), void *arg);

/* The reference backend, opened on first use. */
const subject *reference(void);

/* Calls an op of a subject; the result must be OK. */
#define CALL(s, op, ...) assert_ok((s)->ops->op((s)->be, &(kvk_##op##_args){__VA_ARGS__}, NULL))
/* The same for arguments that must be refused. */
#define REFUSE(s, op, ...)                                                                         \
    assert_status((s)->ops->op((s)->be, &(kvk_##op##_args){__VA_ARGS__}, NULL), KVC_INVALID)

/* Memory that is freed by free_all at the end of a case. */
void *get(size_t len_bytes);
float *get_floats(size_t n);
void free_all(void);

/* About normal(0, 1), with a slow drift along the array, so that no two regions look alike. */
void fill_floats(support_random *random, float *x, size_t n);
float *random_floats(support_random *random, size_t n);

/* Encodes rows [n, width] at a stride in a dtype (I8: rounded to -127..127 after times 20). */
void *encode_rows(const float *x, size_t n, size_t width, size_t stride_bytes, kvk_dtype dtype);
/* The float that the encoder put there; of a coded row, before its scale. */
float decoded(const void *row, kvk_dtype dtype, size_t i);
extern const kvk_dtype all_dtypes[4];

/* Fails unless |got - want| <= bound; NaN matches NaN, infinities themselves. */
void assert_near(const subject *s, const char *what, size_t at, double got, double want,
                 double bound);
void assert_same_bits(const subject *s, const char *what, const void *got, const void *want,
                      size_t len_bytes);

/* The worst-case bound of a chain of n float multiply-adds with sum of absolute products `sum`. */
double chain_bound(size_t n, double sum);

#endif
