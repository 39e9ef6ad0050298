/*
 * cuda_bench_rig.h: what the timings of the CUDA decode path share: worlds of STEPS layers with
 * their own indexes, slots and tables, the ops over them, and how a time is taken and printed.
 *
 * A function that makes something fills it for step t; host memory and device memory live until
 * release_all. Single-threaded.
 */
#ifndef CUDA_BENCH_RIG_H
#define CUDA_BENCH_RIG_H

#include "cuda_support.h"
#include "kvk/cuda_rerank.h"

#define STEPS        8u
#define REPEATS      15u
#define HEADS        32u
#define KV_HEADS     8u
#define DIM          128u
#define K            2048u
#define SLOTS        4096u
#define BLOCK_TOKENS 256u

/* What a row is: bf16 (4,096 bytes), or coded (2,080), its keys to be rotated on the way or not. */
typedef struct row_kind {
    const char *name;
    kvk_dtype dtype;
    bool rotated;
    uint32_t row_bytes;
} row_kind;

/* One batch shape: every step has its own copies. */
typedef struct world {
    const row_kind *rows;
    uint32_t n, n_seqs, dims, missing_percent;
    uint32_t index_bytes; /* a token's */
    kvk_cuda_select_args select[STEPS];
    kvk_cuda_select_vote_args vote[STEPS]; /* a world of votes: select has its picks alone */
    kvk_cuda_rerank_args rerank[STEPS];    /* of a world of votes that leave candidates */
    kvk_cuda_resolve_args resolve[STEPS];
    kvk_cuda_attend_args attend[STEPS];
    kvk_cuda_gather_args gather[STEPS];
    kvk_cuda_prefill_args prefill[STEPS];
    kvk_cuda_residency *res; /* host copy, [STEPS, n_seqs] */
    void *saved[STEPS];      /* tables with the wanted share missing, [n_seqs] each */
    void *tables[STEPS];
    size_t table_bytes;
    const void *index[STEPS]; /* of the first sequence */
    void *flush, *sink;       /* other bytes: L2 holds them after they were read, and clean */
} world;

typedef void (*enqueue_fn)(world *w, uint32_t step);

/* Rows of bf16. */
extern const row_kind plain;

void restore(world *w);
void report(world *w, const char *what, enqueue_fn enqueue, double floor_us);
void do_select(world *w, uint32_t t);
void do_vote(world *w, uint32_t t);
void do_resolve(world *w, uint32_t t);
void do_attend(world *w, uint32_t t);
void do_gather(world *w, uint32_t t);
void do_resolve_attend(world *w, uint32_t t);
void do_picked(world *w, uint32_t t);
void do_step(world *w, uint32_t t);
void do_step_apart(world *w, uint32_t t);
void do_read(world *w, uint32_t t);
void do_launch(world *w, uint32_t t);
void do_vote_step(world *w, uint32_t t);
void do_rerank(world *w, uint32_t t);
void do_vote_rerank(world *w, uint32_t t);
void measure_copy(size_t bytes);
double floor_us(double bytes);
kvk_cuda_source source_of(uint32_t n, uint32_t row_bytes, const char *arena, size_t arena_bytes);
void make_select(world *w, uint32_t t, numbers *from, const void *rows);
void make_vote(world *w, uint32_t t, numbers *from, const void *rows);
/* factor times as many votes, and their re-ranking by the finer rows [n] on the device. */
void make_rerank(world *w, uint32_t t, numbers *from, const void *rows, const void *finer,
                 uint32_t dims, uint32_t factor);
void make_flush(world *w);
size_t tables_of(uint32_t n);
void make_residency(world *w, uint32_t t, const kvk_cuda_source *source);
void make_attend(world *w, uint32_t t, numbers *from);
void set_missing(world *w, uint32_t missing_percent);

#endif
