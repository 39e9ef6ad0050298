/*
 * rig.h: a made-up model for the worker's tests: its data, a worker over it, and forward passes.
 *
 * K, V and q of a position are random numbers of (seed, layer, position), rounded to the dtype, so
 * that two runs over the same positions see the same bytes. Tokens likewise. One thread per run.
 */
#ifndef TESTS_WORKER_RIG_H
#define TESTS_WORKER_RIG_H

#include "support.h"

#include "kvw/worker.h"
#include "projection.h"

typedef struct rig {
    kvw_opts opts; /* what the worker is opened with; change before rig_open */
    uint32_t n_tokens;
    uint64_t seed;
    uint32_t repeat;      /* keys of position p are those of p % repeat; 0: all differ */
    uint32_t head_groups; /* total kv heads that data is made for (tensor parallel: all ranks') */
    double k_scale, q_scale;
    double grain; /* data and projections are multiples of it, so that sums are exact; 0: not */
    /* [n_layers][n_tokens][heads * head_dim], as double, of this rank's heads */
    double *k, *v, *q;
    uint32_t *tokens;
    kvw_worker *worker;
    char server_name[8][24]; /* what rig_name_servers made */
    const char *server_names[8];
    char projection[256]; /* path of the file that rig_project wrote; "" none */
} rig;

/* The way by which a client's connection brings rows, so that no server attends over them however
 * long that takes; NULL without a client. */
const char *rig_rows_way(kvc_client *client);
/* Defaults: 2 layers, 4 query heads, 2 kv heads of 16, f32, small windows; no store. */
void rig_init(rig *r, const char *selector, uint32_t n_tokens);
/* Makes the data for opts as they are now. */
void rig_fill(rig *r);
/* Writes a random projection of so many dims that fits opts; opts.projection_path names it. */
void rig_project(rig *r, uint32_t dims);
/* Names opts.n_clients servers so that each of them owns some of the blocks that are whole chunks
 * and neither the first nor among the last two, whatever digests the blocks have on this machine.
 * After it opts may not change in anything that the schema names. */
void rig_name_servers(rig *r);
void rig_open(rig *r);
/* Fails unless the rows of a two-level index begin, but for coding, as those of the finer level. */
void rig_check_levels(kvw_seq *seq);
void rig_close(rig *r); /* worker, data, projection file */
/* Opens and closes it: 0, or what ctest takes for SKIPPED, 77, where there is no device, and 1
   where it fails otherwise; prints which. */
int rig_find_device(rig *r);

/* Elements [first, first + n) of one of the arrays, in the worker's dtype; the caller frees. */
void *rig_bytes(const rig *r, const double *array, uint32_t width, uint32_t layer, uint32_t first,
                uint32_t n);
double rig_get(kvk_dtype dtype, const void *data, size_t i);
void rig_set(kvk_dtype dtype, void *data, size_t i, double x);
static inline uint32_t rig_q_width(const rig *r)
{
    return r->opts.n_q_heads * r->opts.head_dim;
}
static inline uint32_t rig_kv_width(const rig *r)
{
    return r->opts.n_kv_heads * r->opts.head_dim;
}

/* Called after each step that was finished. */
typedef struct rig_step {
    kvw_seq *seq;
    uint32_t layer, first, n; /* queries are of positions first .. first + n - 1 */
    const void *out;          /* [n, n_q_heads, head_dim] in dtype */
    const float *lse;
} rig_step;
typedef void rig_check(void *arg, const rig *r, const rig_step *step);

/* One pass of n tokens through every layer; asserts that all goes well. */
void rig_pass(rig *r, kvw_seq *seq, uint32_t first, uint32_t n, rig_check *check, void *arg);
/* Passes of chunk_tokens over [first, end), the last one shorter. */
void rig_prefill(rig *r, kvw_seq *seq, uint32_t first, uint32_t end, rig_check *check, void *arg);
/* Passes of one token over [first, end). */
void rig_decode(rig *r, kvw_seq *seq, uint32_t first, uint32_t end, rig_check *check, void *arg);

/* Keeps every output, to compare runs bit for bit. */
typedef struct rig_record {
    uint8_t *out; /* [n_layers][n_tokens][q_width * elem] */
    float *lse;   /* [n_layers][n_tokens][n_q_heads] */
    size_t row_bytes;
} rig_record;
void rig_record_init(rig_record *record, const rig *r);
void rig_record_fini(rig_record *record);
void rig_record_step(void *arg, const rig *r, const rig_step *step); /* a rig_check */
/* Largest difference of outputs of positions [first, end) of all layers; 0: equal bits. */
double rig_record_diff(const rig *r, const rig_record *a, const rig_record *b, uint32_t first,
                       uint32_t end);
void rig_record_equal(const rig *r, const rig_record *a, const rig_record *b, uint32_t first,
                      uint32_t end);

/* One forward pass of a token, of which layer 0 attends and says how that went. */
kvc_status rig_one_step(const rig *r, kvw_seq *seq, uint32_t pos, float *out, float *lse);

#endif
