/* chunk_rig.c: see chunk_rig.h. */
#include "chunk_rig.h"

#include "base/clock.h"

void chunk_rig_init(chunk_rig *c, const char *selector, kvk_dtype dtype, kvc_client *client)
{
    support_random random = {91};
    rig_init(&c->r, selector, CHUNKS * S);
    c->r.opts.dtype = dtype;
    c->r.opts.rope = (kvk_rope_params){0};
    c->r.opts.n_layers = 1;
    c->r.opts.k = K;
    c->r.opts.landmark_dim = DIM;
    c->r.opts.n_recent = S;
    c->r.opts.client = client;
    c->r.opts.exact = 0;
    for (size_t i = 0; i < (size_t)CHUNKS * DIM; i++) {
        (&c->marks[0][0])[i] = (float)support_below(&random, 2001) / 1000.0f - 1;
        (&c->queries[0][0])[i] = (float)support_below(&random, 2001) / 300.0f - 3;
    }
    memcpy(c->marks[7], c->marks[5], sizeof(c->marks[5])); /* a tie */
    memcpy(c->queries[9], c->marks[5], sizeof(c->marks[5]));
}

void chunk_rig_ready(chunk_rig *c)
{
    rig_open(&c->r);
    for (size_t t = S - 1; t < c->r.n_tokens; t += S) { /* the landmarks' rows */
        memset(c->r.k + t * rig_kv_width(&c->r), 0, rig_kv_width(&c->r) * sizeof(double));
        memset(c->r.v + t * rig_kv_width(&c->r), 0, rig_kv_width(&c->r) * sizeof(double));
    }
}

void open_rig_by(chunk_rig *c, const char *selector, kvk_dtype dtype, kvc_client *client,
                 const char *way)
{
    chunk_rig_init(c, selector, dtype, client);
    c->r.opts.way = way;
    chunk_rig_ready(c);
}

void open_rig(chunk_rig *c, const char *selector, kvk_dtype dtype, kvc_client *client)
{
    open_rig_by(c, selector, dtype, client, NULL);
}

kvc_status append(chunk_rig *c, kvw_seq *seq, uint32_t first, uint32_t n)
{
    rig *r = &c->r;
    void *k = rig_bytes(r, r->k, rig_kv_width(r), 0, first * S, n * S);
    void *v = rig_bytes(r, r->v, rig_kv_width(r), 0, first * S, n * S);
    kvc_status st = kvw_tokens(seq, r->tokens + (size_t)first * S, n * S);
    if (st == KVC_OK)
        st = kvw_append_chunks(seq, 0, k, v, c->marks[first], n * S);
    free(k);
    free(v);
    return st;
}

kvw_seq *create(chunk_rig *c, uint32_t n_known, uint32_t *reused_p)
{
    kvw_seq *seq = NULL;
    assert_ok(kvw_seq_create(c->r.worker, c->r.tokens, n_known * S, &seq, reused_p));
    return seq;
}

kvw_seq *offloaded(chunk_rig *c)
{
    uint32_t reused = 0;
    kvw_seq *seq = create(c, 0, &reused);
    for (uint32_t t = 0; t + 1 < CHUNKS; t++)
        assert_ok(append(c, seq, t, 1));
    assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
    assert_ok(append(c, seq, CHUNKS - 1, 1)); /* lets go of what has been acknowledged */
    return seq;
}
