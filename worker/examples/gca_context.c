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

/* Where each part of the context's one allocation begins; returns its floats. */
static size_t share_out(gca_context *c, float *p)
{
    const gca_sizes *s = &c->m->s;
    size_t h = s->hidden, pass = (size_t)GCA_PASS_CHUNKS * s->chunk, rows = s->window + pass;
    size_t keys = (size_t)s->window + s->chunk, at = 0;
    for (uint32_t i = 0; i < s->lower + s->upper; i++, at += 2 * rows * h) {
        window *w = i < s->lower ? &c->lower[i] : &c->upper[i - s->lower];
        *w = (window){p ? p + at : NULL, p ? p + at + rows * h : NULL, 0};
    }
    float **const parts[] = {&c->x,   &c->e,   &c->norm,    &c->mix, &c->k,  &c->v,
                             &c->qkv, &c->mlp, &c->chunk_x, &c->kt,  &c->vh, &c->scores};
    const size_t sizes[] = {pass * h,     pass * h, pass * h,     pass * h,
                            pass * h,     pass * h, pass * 3 * h, pass * s->mlp,
                            s->chunk * h, keys * h, keys * h,     s->chunk * s->heads * keys};
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
    c->memory = calloc(share_out(c, NULL), sizeof(float));
    kvc_status st = c->tokens && c->memory ? KVC_OK : KVC_NO_MEMORY;
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
    free(c->tokens);
    free(c->memory);
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
    size_t h = m->s.hidden, taps = m->s.taps;
    for (size_t i = 0; i < n; i++) {
        float *x = c->x + i * h;
        if (tokens[i] >= m->s.vocab)
            return KVC_INVALID;
        memcpy(x, m->embed + tokens[i] * h, h * sizeof(float));
        for (size_t j = 0; j < taps; j++) {
            bool here = i >= j + 1, before = !here && j + 1 - i <= c->n_last;
            if (!here && !before)
                continue;
            uint32_t token = here ? tokens[i - j - 1] : c->last[taps - (j + 1 - i)];
            gca_add_scaled(x, m->taps + j * h, m->embed + token * h, h);
        }
    }
    remember(c, tokens, n);
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < m->s.lower; i++) {
        st = gca_window_layer(c, c->x, n, &m->lower[i], &c->lower[i]);
        if (st == KVC_OK)
            st = gca_mlp(c, c->x, n, &m->lower[i].mlp);
    }
    return st;
}

/* x [n, h] of whole chunks -> K, V and landmarks (c->mix) of them: a row has the V of the next
 * token, a landmark's row is zero. */
static kvc_status encode(gca_context *c, const float *x, size_t n)
{
    const gca_model *m = c->m;
    size_t h = m->s.hidden, s = m->s.chunk, bytes = h * sizeof(float);
    memcpy(c->e, x, n * bytes);
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < m->s.encoder; i++)
        st = gca_encoder_layer(c, n, &m->encoder[i]);
    if (st != KVC_OK)
        return st;
    gca_rms_norm(c->e, m->encoder_norm, n, h, c->norm);
    st = gca_product(c, c->norm, n, h, m->key, h, c->k);
    if (st == KVC_OK)
        st = gca_product(c, c->norm, n, h, m->value, h, c->v);
    for (size_t i = 0; i < n; i += s) {
        memcpy(c->mix + i / s * h, c->norm + (i + s - 1) * h, bytes);
        memmove(c->v + i * h, c->v + (i + 1) * h, (s - 1) * bytes);
        memset(c->v + (i + s - 1) * h, 0, bytes);
        memset(c->k + (i + s - 1) * h, 0, bytes);
    }
    return st;
}

/* Encodes whole chunks and hands them to the worker. */
static kvc_status append(gca_context *c, const float *x, const uint32_t *tokens, uint32_t n_chunks)
{
    uint32_t n = n_chunks * c->m->s.chunk;
    kvc_status st = encode(c, x, n);
    if (st == KVC_OK)
        st = kvw_tokens(c->seq, tokens, n);
    if (st == KVC_OK)
        st = kvw_append_chunks(c->seq, 0, c->k, c->v, c->mix, n);
    if (st == KVC_OK)
        c->n_chunks += n_chunks;
    return st;
}

kvc_status gca_context_body(gca_context *c, const uint32_t *tokens, uint32_t n_chunks)
{
    if (n_chunks == 0 || n_chunks > GCA_PASS_CHUNKS || c->n_tail != 0 || c->n_rows != 0)
        return KVC_INVALID;
    kvc_status st = lower_half(c, tokens, n_chunks * c->m->s.chunk);
    return st == KVC_OK ? append(c, c->x, tokens, n_chunks) : st;
}

/* One upper layer over n rows in c->x; the tail's first chunk has no memory. */
static kvc_status upper_layer(gca_context *c, size_t n, const layer_weights *w, window *past,
                              kvw_retriever *group)
{
    size_t h = c->m->s.hidden;
    kvc_status st = gca_window_layer(c, c->x, n, w, past);
    if (st == KVC_OK && c->n_tail != 0) {
        gca_rms_norm(c->x, w->cross_norm, n, h, c->norm);
        st = gca_product(c, c->norm, n, h, w->cross_query, h, c->mix);
        if (st == KVC_OK)
            st = kvw_retriever_attend(group, c->mix, (uint32_t)n, c->mix);
        if (st == KVC_OK)
            st = gca_add_product(c, c->x, n, w->cross_out);
    }
    return st == KVC_OK ? gca_mlp(c, c->x, n, &w->mlp) : st;
}

/* The upper half over n rows in c->x; each group retrieves at a chunk's last row. */
static kvc_status upper_half(gca_context *c, size_t n, bool last_row)
{
    const gca_model *m = c->m;
    size_t h = m->s.hidden, size = m->s.upper / m->s.groups;
    float query[1024];
    kvc_status st = KVC_OK;
    for (size_t g = 0; st == KVC_OK && g < m->s.groups; g++) {
        /* before the group's layers; asked with when they are done with what they have */
        gca_rms_norm(c->x + (n - 1) * h, m->query_norm[g], 1, h, query);
        for (size_t i = g * size; st == KVC_OK && i < (g + 1) * size; i++)
            st = upper_layer(c, n, &m->upper[i], &c->upper[i], c->group[g]);
        if (st == KVC_OK && last_row)
            st = kvw_retrieve(c->group[g], query, c->n_chunks - 1);
    }
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
    memcpy(c->chunk_x + c->n_rows * h, c->x, n * h * sizeof(float));
    if (last_row)
        st = append(c, c->chunk_x, c->tokens, 1);
    if (st == KVC_OK)
        st = upper_half(c, n, last_row);
    if (st != KVC_OK)
        return st;
    c->n_rows = last_row ? 0 : c->n_rows + n;
    c->n_tail += last_row ? 1 : 0;
    gca_rms_norm(c->x, m->out_norm, n, h, c->norm);
    return gca_product(c, c->norm, n, h, m->head, m->s.vocab, logits);
}
