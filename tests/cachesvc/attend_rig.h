/*
 * attend_rig.h: what the tests of AttendRows share: shapes, numbers that any test can tell, a
 * server that holds them, calls, and attention in double over them, written from the protocol's
 * text.
 *
 * The test's thread, unless a function's harness_peer is its own.
 */
#ifndef KVS_TEST_ATTEND_RIG_H
#define KVS_TEST_ATTEND_RIG_H

#include "attend.h"
#include "harness.h"

#define MAX_DIM   128u
#define MAX_HEADS 32u
#define MAX_Q     4u
#define MAX_PICKS 700u
#define N_BLOCKS  8u

typedef struct a_shape {
    uint32_t n_q, n_q_heads, kv_heads, dim;
    kvc_dtype dtype, q_dtype, o_dtype;
    kvc_rope_type rope;
    double scale, softcap;
    bool ranks;
    uint32_t n_picks;
    bool q_moved; /* the server rotates query i at position 40 + 7 i */
} a_shape;

typedef struct a_server {
    h_server h;
    char dir[256];
    h_peer *peer;
    kvc_part part;
    kvc_schema schema;
    kvc_digest digest;
    uint64_t context;
    void (*spoil)(const a_shape *s, char *value, uint32_t block); /* before a put; NULL: nothing */
} a_server;

typedef struct a_partial {
    double o[MAX_Q * MAX_HEADS * MAX_DIM], lse[MAX_Q * MAX_HEADS];
} a_partial;

/* A small shape: eight heads over two, bf16, 300 picks. */
extern const a_shape a_plain;

int a_setup(void **state);
int a_teardown(void **state);
/* The part (id 7) and schema of a shape in f, and their registration. */
void a_make_schema(a_server *f, const a_shape *s);
void a_register_schema(a_server *f);
/* A server with every block of a shape but `absent` (N_BLOCKS: none), and a context over all. */
void a_start(a_server *f, const a_shape *s, uint32_t absent);
void a_open_context(a_server *f);
void a_stop(a_server *f);

typedef struct a_ask {
    kvc_request req;
    kvc_row_group groups[4];
    kvc_attend_query queries[4];
    uint32_t q_positions[MAX_Q];
    struct iovec iov[3];
    char *q;
} a_ask;

/* One group of all of a shape's queries, in pieces that fit no row. The caller frees a->q. */
void a_ask_init(a_ask *a, const a_server *f, const a_shape *s, const uint32_t *picks,
                const uint32_t *ranks, uint32_t n);
/* The partial of group g of the last reply, all of whose groups have one shape. */
void a_result(const a_server *f, const a_shape *s, uint32_t g, a_partial *out);
/* A call of one group, which must succeed. */
void a_attend(a_server *f, const a_shape *s, const uint32_t *picks, const uint32_t *ranks,
              uint32_t n, a_partial *out);
/* s->n_picks picks, any order, and ranks for them. */
void a_choose(const a_shape *s, uint32_t *picks, uint32_t *ranks);

/* Attention in double over picks [n], those for which here (NULL: all) says no left out. */
void a_oracle(const a_shape *s, const uint32_t *picks, const uint32_t *ranks, uint32_t n,
              const bool *here, a_partial *out);
/* Merges b into a as proto/kvasir.proto defines it, in double. */
void a_merge(const a_shape *s, a_partial *a, const a_partial *b);
/* Within the bound of kernels/README.md (values are at most 1, logits small) and o's rounding. */
void a_check_equal(const a_shape *s, const a_partial *got, const a_partial *want, const char *what);

#endif
