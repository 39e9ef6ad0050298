/*
 * gca_task.c: see gca_task.h. Random numbers come from a counter-based generator (splitmix64), a
 * stream for each chunk, so that nothing but the needles is kept.
 */
#include "gca_task.h"

#include <stdbool.h>
#include <string.h>

enum { KEY = 1, LINK = 3, PASS = 4, ASKP = 5, ASK = 6, ASK2 = 7, FIRST = 16, VOCAB = 256 };

typedef struct random_stream {
    uint64_t state;
} random_stream;

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t next(random_stream *r)
{
    return mix(r->state += 0x9e3779b97f4a7c15u);
}

/* kind: 0 the needles, 1 the body, 2 the tail's text, 3 its questions. */
static random_stream stream(const gca_task *task, uint64_t kind, uint64_t i)
{
    return (random_stream){mix(task->seed * 4 + kind) ^ mix(i + 1)};
}

static uint64_t below(random_stream *r, uint64_t n)
{
    return ((next(r) >> 32) * n) >> 32; /* n is below 2^32 */
}

static uint32_t plain(random_stream *r)
{
    return FIRST + (uint32_t)below(r, VOCAB - FIRST);
}

/* Whether a needle before n has its key, or its chunk. */
static bool taken(const gca_task *t, uint32_t n, const gca_needle *needle, bool key)
{
    for (uint32_t i = key ? 1 : 0; i < n; i++) {
        const gca_needle *other = &t->needles[i];
        if (key ? other->text[1] == needle->text[1] && other->text[2] == needle->text[2]
                : other->chunk == needle->chunk)
            return true;
    }
    return false;
}

static void plant(gca_task *t, random_stream *r, uint32_t n)
{
    gca_needle *needle = &t->needles[n];
    bool link = n > t->n_keys;
    for (uint32_t i = 0; i < GCA_NEEDLE; i++)
        needle->text[i] = plain(r);
    do {
        needle->chunk = below(r, t->n_body);
    } while (taken(t, n, needle, false));
    needle->offset = (uint32_t)below(r, GCA_TEXT - GCA_NEEDLE + 1);
    if (n == 0) {
        needle->text[0] = PASS;
        needle->text[1] = GCA_VAL;
        return;
    }
    while (taken(t, n, needle, true))
        needle->text[1] = plain(r);
    needle->text[0] = KEY;
    needle->text[3] = link ? LINK : GCA_VAL;
    if (link)
        memcpy(&needle->text[4], &t->needles[n - t->n_keys].text[1], 2 * sizeof(uint32_t));
}

kvc_status gca_task_init(gca_task *t, uint64_t seed, uint64_t n_body, uint32_t n_keys,
                         uint32_t n_links)
{
    memset(t, 0, sizeof(*t));
    if (n_keys > GCA_MAX_KEYS || n_links > n_keys || 1 + (uint64_t)n_keys + n_links > n_body)
        return KVC_INVALID;
    *t = (gca_task){.seed = seed, .n_body = n_body, .n_keys = n_keys, .n_links = n_links};
    random_stream r = stream(t, 0, 0);
    for (t->n_needles = 0; t->n_needles < 1 + n_keys + n_links; t->n_needles++)
        plant(t, &r, t->n_needles);
    return KVC_OK;
}

static void fill(random_stream r, uint32_t *tokens)
{
    for (uint32_t i = 0; i < GCA_TEXT; i++)
        tokens[i] = plain(&r);
    tokens[GCA_TEXT] = 0;
}

void gca_task_chunk(const gca_task *t, uint64_t chunk, uint32_t *tokens)
{
    fill(stream(t, 1, chunk), tokens);
    for (uint32_t i = 0; i < t->n_needles; i++) {
        const gca_needle *n = &t->needles[i];
        if (n->chunk == chunk)
            memcpy(tokens + n->offset, n->text, (i == 0 ? 6 : GCA_NEEDLE) * sizeof(*tokens));
    }
}

void gca_task_tail(const gca_task *t, uint64_t i, uint32_t *tokens)
{
    fill(stream(t, 2, i), tokens);
}

void gca_task_ask(const gca_task *t, uint64_t i, const uint32_t *text, uint32_t n, uint32_t *tokens)
{
    random_stream r = stream(t, 3, i);
    uint64_t at = GCA_ANSWER_ROWS + below(&r, GCA_TEXT - n - GCA_ANSWER_ROWS + 1);
    memcpy(tokens + at, text, n * sizeof(*tokens));
}

static gca_question question(const gca_task *t, uint32_t needle)
{
    bool link = needle > t->n_keys;
    const gca_needle *asked = &t->needles[needle];
    const gca_needle *value = link ? &t->needles[needle - t->n_keys] : asked;
    gca_question q = {.kind = needle == 0 ? GCA_PASSKEY
                              : link      ? GCA_TWOHOP
                                          : GCA_MULTIKEY,
                      .n_text = needle == 0 ? 1 : 3,
                      .answer = value->text + (needle == 0 ? 2 : 4),
                      .chunk = value->chunk};
    q.text[0] = needle == 0 ? ASKP : link ? ASK2 : ASK;
    memcpy(q.text + 1, asked->text + 1, 2 * sizeof(uint32_t));
    return q;
}

void gca_task_questions(const gca_task *t, gca_question *questions)
{
    random_stream r = stream(t, 0, 1);
    for (uint32_t i = 0; i < t->n_needles; i++) {
        uint32_t j = (uint32_t)below(&r, i + 1);
        questions[i] = questions[j];
        questions[j] = question(t, i);
    }
}
