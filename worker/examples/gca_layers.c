/*
 * gca_layers.c: the layers of the decoder, on whatever does its math; shapes and formulas are those
 * of model.py in worker/python/kvasir/gca, and a test compares the two. Belongs to the context's
 * thread.
 */
#include "gca_internal.h"

kvc_status gca_mlp(gca_context *c, float *x, size_t n, const mlp_weights *w)
{
    const gca_math *math = c->m->math;
    size_t h = c->m->s.hidden, wide = c->m->s.mlp;
    kvc_status st = math->norm(c, x, w->norm, n, c->norm);
    if (st == KVC_OK)
        st = math->product(c, c->norm, n, h, w->up, wide, GCA_GELU, c->mlp);
    return st == KVC_OK ? math->product(c, c->mlp, n, wide, w->down, h, GCA_ADD, x) : st;
}

kvc_status gca_window_layer(gca_context *c, size_t n, const layer_weights *w, window *past)
{
    const gca_math *math = c->m->math;
    size_t h = c->m->s.hidden;
    kvc_status st = math->norm(c, c->x, w->norm, n, c->norm);
    if (st == KVC_OK)
        st = math->product(c, c->norm, n, h, w->qkv, 3 * h, GCA_STORE, math->qkv(c, past));
    if (st == KVC_OK)
        st = math->window(c, n, past);
    return st == KVC_OK ? math->product(c, c->mix, n, h, w->out, h, GCA_ADD, c->x) : st;
}

kvc_status gca_encoder_layer(gca_context *c, size_t n, const layer_weights *w)
{
    const gca_math *math = c->m->math;
    size_t h = c->m->s.hidden;
    kvc_status st = math->norm(c, c->e, w->norm, n, c->norm);
    if (st == KVC_OK)
        st = math->product(c, c->norm, n, h, w->qkv, 3 * h, GCA_STORE, c->qkv);
    if (st == KVC_OK)
        st = math->chunks(c, n);
    if (st == KVC_OK)
        st = math->product(c, c->mix, n, h, w->out, h, GCA_ADD, c->e);
    return st == KVC_OK ? gca_mlp(c, c->e, n, &w->mlp) : st;
}
