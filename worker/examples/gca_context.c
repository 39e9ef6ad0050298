/*
 * gca_context.c: a context of the decoder; see gca_model.h. Belongs to one thread.
 *
 * Rows go through in passes. What a layer's window reaches back to is kept from pass to pass, so a
 * body of any length needs the memory of one pass. The body goes through the lower half and the
 * encoder only; the tail through everything, by rows, and a chunk of it is appended when its last
 * row is there.
 */
#include <stdlib.h>
#include <string.h>

#include "gca_internal.h"

/* Where each part of the context's one memory begins; returns its floats. */
static size_t share_out(gca_context *c, float *p)
{
    const gca_model *m = c->m;
    const gca_sizes *s = &m->s;
    size_t h = s->hidden, pass = (size_t)m->math->pass_chunks * s->chunk, at = 0;
    size_t room = m->math->window_floats(m, pass);
    for (uint32_t i = 0; i < s->lower + s->upper; i++, at += room) {
        window *w = i < s->lower ? &c->lower[i] : &c->upper[i - s->lower];
        *w = (window){p ? p + at : NULL, p ? p + at + room / 2 : NULL, 0};
    }
    float **const parts[] = {&c->x,   &c->e,   &c->norm, &c->mix,     &c->k,     &c->v,
                             &c->qkv, &c->mlp, &c->sum,  &c->chunk_x, &c->logits};
    const size_t sizes[] = {pass * h,
                            pass * h,
                            pass * h,
                            pass * h,
                            pass * h,
                            pass * h,
                            pass * 3 * h,
                            pass * s->mlp,
                            pass * h,
                            s->chunk * h,
                            (size_t)s->chunk * s->vocab};
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); at += sizes[i++])
        *parts[i] = p ? p + at : NULL;
    return at;
}

kvc_status gca_context_open(const gca_model *m, kvw_seq *seq, gca_context **context_p)
{
    gca_context *c = calloc(1, sizeof(*c));
    *context_p = NULL;
    if (!c)
        return KVC_NO_MEMORY;
    c->m = m;
    c->seq = seq;
    c->tokens = calloc(m->s.chunk, sizeof(*c->tokens));
    kvc_status st = c->tokens ? m->math->context_open(c, share_out(c, NULL)) : KVC_NO_MEMORY;
    for (uint32_t g = 0; st == KVC_OK && g < m->s.groups; g++)
        st = kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &c->group[g]);
    if (st != KVC_OK) {
        gca_context_close(c);
        return st;
    }
    (void)share_out(c, c->memory);
    *context_p = c;
    return KVC_OK;
}

void gca_context_close(gca_context *c)
{
    if (!c)
        return;
    for (uint32_t g = 0; g < GCA_MAX_GROUPS; g++)
        kvw_retriever_close(c->group[g]);
    c->m->math->context_close(c);
    free(c->tokens);
    free(c);
}

/* Remembers the last tokens of a pass, newest last. */
static void remember(gca_context *c, const uint32_t *tokens, uint32_t n)
{
    uint32_t taps = c->m->s.taps, fresh = n < taps ? n : taps;
    memmove(c->last, c->last + fresh, (taps - fresh) * sizeof(*tokens));
    memcpy(c->last + taps - fresh, tokens + n - fresh, fresh * sizeof(*tokens));
    c->n_last = c->n_last + fresh < taps ? c->n_last + fresh : taps;
}

/* Tokens [n] -> c->x: embeddings with those of the few tokens before, then the lower layers. */
static kvc_status lower_half(gca_context *c, const uint32_t *tokens, uint32_t n)
{
    const gca_model *m = c->m;
    for (uint32_t i = 0; i < n; i++) {
        if (tokens[i] >= m->s.vocab)
            return KVC_INVALID;
    }
    kvc_status st = m->math->embed(c, tokens, n);
    remember(c, tokens, n);
    for (uint32_t i = 0; st == KVC_OK && i < m->s.lower; i++) {
        st = gca_window_layer(c, n, &m->lower[i], &c->lower[i]);
        if (st == KVC_OK)
            st = gca_mlp(c, c->x, n, &m->lower[i].mlp);
    }
    return st;
}

/* x [n, h] of whole chunks -> K, V and landmarks of them. */
static kvc_status encode(gca_context *c, const float *x, size_t n, gca_encoded *out_p)
{
    const gca_model *m = c->m;
    size_t h = m->s.hidden;
    kvc_status st = m->math->copy(c, c->e, x, n * h);
    for (uint32_t i = 0; st == KVC_OK && i < m->s.encoder; i++)
        st = gca_encoder_layer(c, n, &m->encoder[i]);
    if (st == KVC_OK)
        st = m->math->norm(c, c->e, m->encoder_norm, n, c->norm);
    if (st == KVC_OK)
        st = m->math->product(c, c->norm, n, h, m->key, h, GCA_STORE, c->k);
    if (st == KVC_OK)
        st = m->math->product(c, c->norm, n, h, m->value, h, GCA_STORE, c->v);
    return st == KVC_OK ? m->math->encoded(c, n, out_p) : st;
}

/* Encodes whole chunks and hands them to the worker, a pass of the worker at a time. */
static kvc_status append(gca_context *c, const float *x, const uint32_t *tokens, uint32_t n_chunks)
{
    size_t h = c->m->s.hidden, s = c->m->s.chunk;
    gca_encoded e;
    kvc_status st = encode(c, x, n_chunks * s, &e);
    for (size_t at = 0; st == KVC_OK && at < n_chunks; at += GCA_WORKER_CHUNKS) {
        size_t left = n_chunks - at, n = left < GCA_WORKER_CHUNKS ? left : GCA_WORKER_CHUNKS;
        st = kvw_tokens(c->seq, tokens + at * s, (uint32_t)(n * s));
        if (st == KVC_OK)
            st = kvw_append_chunks(c->seq, 0, e.k + at * s * h, e.v + at * s * h, e.marks + at * h,
                                   (uint32_t)(n * s));
        c->n_chunks += st == KVC_OK ? n : 0;
    }
    return st;
}

kvc_status gca_context_body(gca_context *c, const uint32_t *tokens, uint32_t n_chunks)
{
    if (n_chunks == 0 || n_chunks > c->m->math->pass_chunks || c->n_tail != 0 || c->n_rows != 0)
        return KVC_INVALID;
    kvc_status st = lower_half(c, tokens, n_chunks * c->m->s.chunk);
    return st == KVC_OK ? append(c, c->x, tokens, n_chunks) : st;
}

/* c->mix: queries of n rows, then what they found in memory. */
static kvc_status look_up(gca_context *c, size_t n, kvw_retriever *group)
{
    const gca_math *math = c->m->math;
    size_t h = c->m->s.hidden;
    float *host = NULL;
    kvc_status st = math->host(c, c->mix, n * h, &host);
    if (st == KVC_OK)
        st = kvw_retriever_attend(group, host, (uint32_t)n, host);
    return st == KVC_OK ? math->back(c, c->mix, n * h) : st;
}

/* One upper layer over n rows in c->x; the tail's first chunk has no memory. */
static kvc_status upper_layer(gca_context *c, size_t n, const layer_weights *w, window *past,
                              kvw_retriever *group)
{
    const gca_math *math = c->m->math;
    size_t h = c->m->s.hidden;
    kvc_status st = gca_window_layer(c, n, w, past);
    if (st == KVC_OK && c->n_tail != 0) {
        st = math->norm(c, c->x, w->cross_norm, n, c->norm);
        if (st == KVC_OK)
            st = math->product(c, c->norm, n, h, w->cross_query, h, GCA_STORE, c->mix);
        if (st == KVC_OK)
            st = look_up(c, n, group);
        if (st == KVC_OK)
            st = math->product(c, c->mix, n, h, w->cross_out, h, GCA_ADD, c->x);
    }
    return st == KVC_OK ? gca_mlp(c, c->x, n, &w->mlp) : st;
}

/* The query of a group, of the last of n rows in c->x. */
static kvc_status query_of(gca_context *c, size_t n, size_t group, float *query)
{
    const gca_math *math = c->m->math;
    size_t h = c->m->s.hidden;
    float *host = NULL;
    kvc_status st = math->norm(c, c->x + (n - 1) * h, c->m->query_norm[group], 1, c->norm);
    if (st == KVC_OK)
        st = math->host(c, c->norm, h, &host);
    if (st == KVC_OK)
        memcpy(query, host, h * sizeof(float));
    return st;
}

/* The upper half over n rows in c->x; each group retrieves at a chunk's last row. */
static kvc_status upper_half(gca_context *c, size_t n, bool last_row)
{
    const gca_model *m = c->m;
    size_t size = m->s.upper / m->s.groups;
    float query[1024];
    kvc_status st = KVC_OK;
    for (size_t g = 0; st == KVC_OK && g < m->s.groups; g++) {
        /* before the group's layers; asked with when they are done with what they have */
        st = last_row ? query_of(c, n, g, query) : KVC_OK;
        for (size_t i = g * size; st == KVC_OK && i < (g + 1) * size; i++)
            st = upper_layer(c, n, &m->upper[i], &c->upper[i], c->group[g]);
        if (st == KVC_OK && last_row)
            st = kvw_retrieve(c->group[g], query, c->n_chunks - 1);
    }
    return st;
}

/* Of n rows in c->x. */
static kvc_status give_logits(gca_context *c, size_t n, float *logits)
{
    const gca_model *m = c->m;
    float *host = NULL;
    kvc_status st = m->math->norm(c, c->x, m->out_norm, n, c->norm);
    if (st == KVC_OK)
        st =
            m->math->product(c, c->norm, n, m->s.hidden, m->head, m->s.vocab, GCA_STORE, c->logits);
    if (st == KVC_OK)
        st = m->math->host(c, c->logits, n * m->s.vocab, &host);
    if (st == KVC_OK)
        memcpy(logits, host, n * m->s.vocab * sizeof(float));
    return st;
}

kvc_status gca_context_rows(gca_context *c, const uint32_t *tokens, uint32_t n, float *logits)
{
    const gca_model *m = c->m;
    size_t h = m->s.hidden;
    if (n == 0 || n > m->s.chunk - c->n_rows)
        return KVC_INVALID;
    bool last_row = c->n_rows + n == m->s.chunk;
    kvc_status st = lower_half(c, tokens, n);
    if (st != KVC_OK)
        return st;
    memcpy(c->tokens + c->n_rows, tokens, n * sizeof(*tokens));
    st = m->math->copy(c, c->chunk_x + c->n_rows * h, c->x, n * h);
    if (st == KVC_OK && last_row)
        st = append(c, c->chunk_x, c->tokens, 1);
    if (st == KVC_OK)
        st = upper_half(c, n, last_row);
    if (st != KVC_OK)
        return st;
    c->n_rows = last_row ? 0 : c->n_rows + n;
    c->n_tail += last_row ? 1 : 0;
    return give_logits(c, n, logits);
}
