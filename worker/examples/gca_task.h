/*
 * gca_task.h: the synthetic contexts that the GCA decoder was trained on, at any length: random
 * tokens with needles in a few chunks, and questions about them. The formats are those of data.py
 * in worker/python/kvasir/gca. Pure functions of the seed; a chunk can be made at any time.
 */
#ifndef GCA_TASK_H
#define GCA_TASK_H

#include <stdint.h>

#include "kvc/status.h"

enum {
    GCA_CHUNK = 64,
    GCA_TEXT = 63, /* rows of a chunk before the landmark token, which is 0 */
    GCA_VAL = 2,
    GCA_HOP = 8,
    GCA_VALUE = 4,        /* tokens of an answer */
    GCA_NEEDLE = 8,       /* tokens of a needle */
    GCA_MAX_KEYS = 128,   /* each of keys and links */
    GCA_ANSWER_ROWS = 29, /* rows of an answer's chunk in which no question lies */
};

typedef enum gca_kind { GCA_PASSKEY, GCA_MULTIKEY, GCA_TWOHOP, GCA_KINDS } gca_kind;

typedef struct gca_needle {
    uint64_t chunk;
    uint32_t offset, text[GCA_NEEDLE];
} gca_needle;

/* needles: the passkey, n_keys keys, then n_links links, of which link i names key i. */
typedef struct gca_task {
    uint64_t seed, n_body;
    uint32_t n_keys, n_links, n_needles;
    gca_needle needles[1 + 2 * GCA_MAX_KEYS];
} gca_task;

typedef struct gca_question {
    gca_kind kind;
    uint32_t n_text, text[3];
    const uint32_t *answer; /* [GCA_VALUE], in the task's needle */
    uint64_t chunk;         /* where the answer lies */
} gca_question;

/* A body of n_body chunks with needles at random places. INVALID: more needles than chunks or than
 * fit the table, or more links than keys. */
kvc_status gca_task_init(gca_task *task, uint64_t seed, uint64_t n_body, uint32_t n_keys,
                         uint32_t n_links) KVC_MUST_CHECK;
/* Tokens [GCA_CHUNK] of a chunk of the body. */
void gca_task_chunk(const gca_task *task, uint64_t chunk, uint32_t *tokens);
/* Tokens [GCA_CHUNK] of the i-th chunk of the tail, without its question: random ones. */
void gca_task_tail(const gca_task *task, uint64_t i, uint32_t *tokens);
/* Writes a question of n tokens into a tail chunk, anywhere behind an answer. */
void gca_task_ask(const gca_task *task, uint64_t i, const uint32_t *text, uint32_t n,
                  uint32_t *tokens);
/* One question for each needle with an answer, and one for each link, shuffled: questions
 * [n_needles]. */
void gca_task_questions(const gca_task *task, gca_question *questions);

#endif
