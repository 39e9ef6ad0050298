/*
 * oracle.c: see oracle.h. Plain loops in double on purpose: slow and easy to read.
 */
#include "oracle.h"

#include <math.h>

typedef struct pair {
    uint32_t pos, rope;
} pair;

static bool is_esa(const rig *r)
{
    return strcmp(r->opts.selector, "esa") == 0;
}

/* x [d] rotated by position p, pairs (i, i + d/2). */
static void rotate(const rig *r, const double *x, double p, double *out)
{
    uint32_t half = r->opts.head_dim / 2;
    for (uint32_t i = 0; i < half; i++) {
        double f = r->opts.rope.theta == 0
                       ? 0
                       : p * pow(r->opts.rope.theta, -2.0 * i / (double)r->opts.head_dim);
        out[i] = x[i] * cos(f) - x[i + half] * sin(f);
        out[i + half] = x[i + half] * cos(f) + x[i] * sin(f);
    }
}

static const double *key(const rig *r, uint32_t layer, uint32_t pos, uint32_t kv_head)
{
    return r->k +
           (((size_t)layer * r->n_tokens + pos) * r->opts.n_kv_heads + kv_head) * r->opts.head_dim;
}

static const double *query(const rig *r, uint32_t layer, uint32_t pos, uint32_t head)
{
    return r->q +
           (((size_t)layer * r->n_tokens + pos) * r->opts.n_q_heads + head) * r->opts.head_dim;
}

/* ---- selection ---- */

/* Matrices of one layer as the file has them; a NULL: exact. */
typedef struct matrices {
    kvwi_projection *p;
    uint32_t layer, dims;
} matrices;

/* in [d_in] x matrix of head -> out [dims]. */
static void project(const matrices *m, const float *all, uint32_t head, const double *in,
                    double *out)
{
    const kvwi_projection *p = m->p;
    const float *w = all + ((size_t)m->layer * p->heads + head) * p->d_in * p->dims;
    for (uint32_t j = 0; j < m->dims; j++) {
        double sum = 0;
        for (uint32_t i = 0; i < p->d_in; i++)
            sum += in[i] * (double)w[i * p->dims + j];
        out[j] = sum;
    }
}

/* q.k of vectors of n elements, and how far int8 (or f32) may move it. */
static double dot(const double *q, const double *k, uint32_t n, bool int8, double *bound_p)
{
    double sum = 0, q_abs = 0, k_abs = 0, q_max = 0, k_max = 0, both = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += q[i] * k[i];
        both += fabs(q[i] * k[i]);
        q_abs += fabs(q[i]);
        k_abs += fabs(k[i]);
        q_max = fmax(q_max, fabs(q[i]));
        k_max = fmax(k_max, fabs(k[i]));
    }
    *bound_p = 1e-5 * both + 1e-12;
    if (int8) {
        double k_err = 1.01 * k_max / 127 / 2, q_err = q_max / 32767 / 2;
        *bound_p += q_abs * k_err + k_abs * q_err + n * k_err * q_err;
    }
    return sum;
}

/*
 * Keys of s's positions as they are scored, [n, *width_p]: raw, width numbers from head on, or
 * projected by the matrix of head. Once for all queries: most of an oracle's time. Caller frees.
 */
static double *scored_keys(const rig *r, const matrices *m, const oracle_scores *s, uint32_t head,
                           uint32_t width, uint32_t *width_p)
{
    *width_p = m->p != NULL ? m->dims : width;
    double *keys = malloc(((size_t)s->n * *width_p + 1) * sizeof(double));
    assert_non_null(keys);
    for (uint32_t j = 0; j < s->n; j++) {
        const double *raw = key(r, m->layer, s->begin + j, head);
        double *out = keys + (size_t)j * *width_p;
        if (m->p != NULL)
            project(m, m->p->b, head, raw, out);
        else
            memcpy(out, raw, width * sizeof(double));
    }
    return keys;
}

/* Soft vote (TokenSelect eq. 7) with the mean of the rotated queries. */
static void vote(const rig *r, uint32_t first, uint32_t n_q, const matrices *m, oracle_scores *s)
{
    const kvw_opts *o = &r->opts;
    uint32_t d = o->head_dim, group = o->n_q_heads / o->n_kv_heads;
    double mean[512], rot[512], q[512];
    double *logit = malloc(s->n * sizeof(double)), *keys = NULL;
    for (uint32_t h = 0, n = 0; h < o->n_q_heads; h++) {
        double top = -INFINITY, z = 0, worst = 0, b = 0;
        if (h % group == 0) {
            free(keys);
            keys = scored_keys(r, m, s, h / group, d, &n);
        }
        memset(mean, 0, sizeof(mean));
        for (uint32_t i = 0; i < n_q; i++) {
            rotate(r, query(r, m->layer, first + i, h), o->n_recent + i, rot);
            for (uint32_t j = 0; j < d; j++)
                mean[j] += rot[j] / n_q;
        }
        if (m->p != NULL)
            project(m, m->p->a, h / group, mean, q);
        for (uint32_t j = 0; j < s->n; j++) {
            logit[j] = dot(m->p != NULL ? q : mean, keys + (size_t)j * n, n, m->p != NULL, &b);
            worst = fmax(worst, b);
            top = fmax(top, logit[j]);
        }
        for (uint32_t j = 0; j < s->n; j++)
            z += exp(logit[j] - top);
        for (uint32_t j = 0; j < s->n; j++) {
            double p = exp(logit[j] - top) / z;
            s->score[j] += p;
            s->bound[j] += p * (exp(2 * worst) - 1) + 1e-6 * p;
        }
    }
    free(keys);
    free(logit);
}

/* ESA eq. 3 and 4 with queries at the far position. */
static void fold(const rig *r, uint32_t first, uint32_t n_q, const matrices *m, oracle_scores *s)
{
    const kvw_opts *o = &r->opts;
    uint32_t d = o->head_dim, group = o->n_q_heads / o->n_kv_heads, width = o->n_kv_heads * d;
    uint32_t n = 0;
    double cat[512], rot[512], q[512];
    double *f = malloc(s->n * sizeof(double)), *keys = scored_keys(r, m, s, 0, width, &n);
    for (uint32_t j = 0; j < s->n; j++)
        s->score[j] = -INFINITY;
    for (uint32_t c = 0; c < n_q; c++) {
        double top = -INFINITY, b = 0;
        memset(cat, 0, sizeof(cat));
        for (uint32_t h = 0; h < o->n_q_heads; h++) {
            rotate(r, query(r, m->layer, first + c, h),
                   o->far_position ? o->far_position : o->n_recent, rot);
            for (uint32_t i = 0; i < d; i++)
                cat[h / group * d + i] += rot[i];
        }
        if (m->p != NULL)
            project(m, m->p->a, 0, cat, q);
        for (uint32_t j = 0; j < s->n; j++) {
            f[j] = dot(m->p != NULL ? q : cat, keys + (size_t)j * n, n, m->p != NULL, &b);
            s->bound[j] = fmax(s->bound[j], 2 * b);
            top = fmax(top, f[j]);
        }
        for (uint32_t j = 0; j < s->n; j++)
            s->score[j] = fmax(s->score[j], f[j] - top);
    }
    double worst = 0;
    for (uint32_t j = 0; j < s->n; j++)
        worst = fmax(worst, s->bound[j]);
    for (uint32_t j = 0; j < s->n; j++)
        s->bound[j] = 2 * worst;
    free(keys);
    free(f);
}

static void widen(double *x, uint32_t n, uint32_t eps)
{
    double *in = malloc(n * sizeof(double));
    memcpy(in, x, n * sizeof(double));
    for (uint32_t j = 0; j < n; j++) {
        uint32_t lo = j > eps ? j - eps : 0, hi = j + eps < n ? j + eps : n - 1;
        for (uint32_t i = lo; i <= hi; i++)
            x[j] = fmax(x[j], in[i]);
    }
    free(in);
}

oracle_scores oracle_score(const rig *r, uint32_t layer, uint32_t first, uint32_t n_q,
                           uint32_t begin, uint32_t end, uint32_t dims)
{
    oracle_scores s = {.begin = begin, .n = end - begin};
    matrices m = {.layer = layer, .dims = dims};
    const char *why = NULL;
    s.score = calloc(s.n, sizeof(double));
    s.bound = calloc(s.n, sizeof(double));
    assert_true(s.score != NULL && s.bound != NULL);
    if (dims != 0)
        assert_ok(kvwi_projection_load(r->projection, &m.p, &why));
    if (is_esa(r))
        fold(r, first, n_q, &m, &s);
    else
        vote(r, first, n_q, &m, &s);
    kvwi_projection_free(m.p);
    if (r->opts.eps != 0) {
        widen(s.score, s.n, r->opts.eps);
        widen(s.bound, s.n, r->opts.eps);
    }
    return s;
}

void oracle_scores_fini(oracle_scores *s)
{
    free(s->score);
    free(s->bound);
}

void oracle_check_picks(const oracle_scores *s, uint32_t k, const uint32_t *picks, uint32_t n)
{
    double worst_in = INFINITY, best_out = -INFINITY;
    uint8_t *in = calloc(s->n, 1);
    assert_int_equal(n, k < s->n ? k : s->n);
    for (uint32_t i = 0; i < n; i++) {
        assert_true(picks[i] >= s->begin && picks[i] - s->begin < s->n);
        assert_true(i == 0 || picks[i] > picks[i - 1]);
        in[picks[i] - s->begin] = 1;
    }
    for (uint32_t j = 0; j < s->n; j++) {
        if (in[j])
            worst_in = fmin(worst_in, s->score[j] + s->bound[j]);
        else
            best_out = fmax(best_out, s->score[j] - s->bound[j]);
    }
    free(in);
    if (worst_in < best_out)
        fail_msg("a pick scores at most %.9g, a token left out at least %.9g", worst_in, best_out);
}

void oracle_top(const oracle_scores *s, uint32_t k, uint32_t *out)
{
    uint8_t *in = calloc(s->n, 1);
    uint32_t n = 0;
    for (uint32_t i = 0; i < k && i < s->n; i++) {
        uint32_t best = UINT32_MAX;
        for (uint32_t j = 0; j < s->n; j++)
            if (!in[j] && (best == UINT32_MAX || s->score[j] > s->score[best]))
                best = j;
        in[best] = 1;
    }
    for (uint32_t j = 0; j < s->n; j++)
        if (in[j])
            out[n++] = s->begin + j;
    free(in);
}

/* ---- attention ---- */

uint32_t oracle_near(const rig *r, uint32_t n_tokens, uint32_t n_q)
{
    uint32_t span = r->opts.n_recent + n_q;
    if (!is_esa(r))
        span = r->opts.n_recent > n_q ? r->opts.n_recent : n_q;
    return n_tokens > span ? n_tokens - span : 0;
}

/* Softmax sums of one query head over a list of keys. */
typedef struct sums {
    double max, z, o[512];
} sums;

static void add_key(const rig *r, uint32_t layer, uint32_t kv, const double *q, pair p, bool rot,
                    sums *s)
{
    uint32_t d = r->opts.head_dim;
    double k[512], x = 0,
                   scale = r->opts.attention_scale != 0 ? (double)r->opts.attention_scale
                                                        : 1 / sqrt((double)d);
    const double *v = r->v + (((size_t)layer * r->n_tokens + p.pos) * r->opts.n_kv_heads + kv) * d;
    if (rot)
        rotate(r, key(r, layer, p.pos, kv), p.rope, k);
    else
        memcpy(k, key(r, layer, p.pos, kv), d * sizeof(double));
    for (uint32_t i = 0; i < d; i++)
        x += q[i] * k[i] * scale;
    double top = fmax(s->max, x), old = s->z == 0 ? 0 : exp(s->max - top), add = exp(x - top);
    for (uint32_t i = 0; i < d; i++)
        s->o[i] = s->o[i] * old + add * v[i];
    s->z = s->z * old + add;
    s->max = top;
}

static bool skipped(const uint32_t *skip, uint32_t n, uint32_t pos)
{
    for (uint32_t i = 0; i < n; i++)
        if (skip[i] == pos)
            return true;
    return false;
}

/* The keys of a step: far [0, n_far) and near; RoPE positions of near by place in its list. */
static uint32_t list_keys(const rig *r, uint32_t n_tokens, const uint32_t *picks, uint32_t n_picks,
                          uint32_t near, pair *keys, uint32_t *n_far_p)
{
    uint32_t n = 0, from = 0;
    if (picks == NULL) {
        near = 0;
    } else {
        for (uint32_t p = 0; p < r->opts.n_sink; p++)
            keys[n++].pos = p;
        for (uint32_t i = 0; i < n_picks; i++)
            keys[n++].pos = picks[i];
    }
    from = is_esa(r) ? n : 0;
    for (uint32_t p = near; p < n_tokens; p++)
        keys[n++].pos = p;
    for (uint32_t i = from; i < n; i++)
        keys[i].rope = i - from;
    *n_far_p = from;
    return n;
}

void oracle_attend(const rig *r, uint32_t layer, uint32_t first, uint32_t n_q,
                   const uint32_t *picks, uint32_t n_picks, uint32_t near, const uint32_t *skip,
                   uint32_t n_skip, double *out, double *lse)
{
    const kvw_opts *o = &r->opts;
    uint32_t d = o->head_dim, group = o->n_q_heads / o->n_kv_heads, n_far = 0;
    pair *keys = malloc((first + n_q + o->n_sink + n_picks) * sizeof(*keys));
    uint32_t n = list_keys(r, first + n_q, picks, n_picks, near, keys, &n_far);
    uint32_t far = o->far_position ? o->far_position : o->n_recent;
    for (uint32_t i = 0; i < n_q; i++) {
        for (uint32_t h = 0; h < o->n_q_heads; h++) {
            double q_far[512], q_near[512];
            sums s = {.max = -INFINITY};
            rotate(r, query(r, layer, first + i, h), far, q_far);
            rotate(r, query(r, layer, first + i, h), n - n_far - n_q + i, q_near);
            for (uint32_t j = 0; j < n - (n_q - 1 - i); j++)
                if (!skipped(skip, n_skip, keys[j].pos))
                    add_key(r, layer, h / group, j < n_far ? q_far : q_near, keys[j], j >= n_far,
                            &s);
            for (uint32_t x = 0; x < d; x++)
                out[((size_t)i * o->n_q_heads + h) * d + x] = s.z > 0 ? s.o[x] / s.z : 0;
            lse[(size_t)i * o->n_q_heads + h] = s.max + log(s.z);
        }
    }
    free(keys);
}

void oracle_check_out(const rig *r, const rig_step *step, const double *out, const double *lse)
{
    double tol = r->opts.dtype == KVK_F32 ? 2e-5 : r->opts.dtype == KVK_F16 ? 2e-3 : 1.2e-2;
    for (size_t i = 0; i < (size_t)step->n * rig_q_width(r); i++) {
        double got = rig_get(r->opts.dtype, step->out, i);
        if (!(fabs(got - out[i]) <= tol))
            fail_msg("layer %u, position %u on: out[%zu] is %.7g, wanted %.7g", step->layer,
                     step->first, i, got, out[i]);
    }
    for (size_t i = 0; i < (size_t)step->n * r->opts.n_q_heads; i++)
        if (!(fabs((double)step->lse[i] - lse[i]) <= 1e-4))
            fail_msg("lse[%zu] is %.7g, wanted %.7g", i, (double)step->lse[i], lse[i]);
}

void oracle_check_step(void *arg, const rig *r, const rig_step *step)
{
    const uint32_t *dims = arg, *picks = NULL;
    uint32_t n = 0, n_tokens = step->first + step->n, near = oracle_near(r, n_tokens, step->n);
    bool full = near <= r->opts.n_sink + r->opts.k;
    double *out = malloc((size_t)step->n * rig_q_width(r) * sizeof(double));
    double *lse = malloc((size_t)step->n * r->opts.n_q_heads * sizeof(double));
    assert_ok(kvw_last_picks(step->seq, step->layer, &picks, &n));
    if (full) {
        assert_int_equal(n, 0);
    } else {
        oracle_scores s =
            oracle_score(r, step->layer, step->first, step->n, r->opts.n_sink, near, *dims);
        oracle_check_picks(&s, r->opts.k, picks, n);
        oracle_scores_fini(&s);
    }
    oracle_attend(r, step->layer, step->first, step->n, full ? NULL : picks, n, near, NULL, 0, out,
                  lse);
    oracle_check_out(r, step, out, lse);
    free(out);
    free(lse);
}
