/* attend_support.c: see attend_support.h. */
#include "attend_support.h"

/* n rows of K then V, in a plain dtype or coded, at a stride. */
static char *make_rows(const float *x, const problem_shape *p, size_t stride)
{
    size_t width = (size_t)p->n_kv_heads * p->head_dim;
    size_t slice = kvk_slice_bytes(p->dtype, p->n_kv_heads, p->head_dim);
    kvk_rows in = {x, 2 * width * sizeof(float), KVK_F32};
    char *rows = NULL;

    if (!kvk_is_coded(p->dtype))
        return encode_rows(x, p->n_kv, 2 * width, stride, p->dtype);
    rows = get(p->n_kv ? (p->n_kv - 1) * stride + 2 * slice : 1);
    for (int side = 0; side < 2; side++, in.data = x + width)
        CALL(reference(), encode, in, p->n_kv, p->n_kv_heads, p->head_dim, p->dtype,
             rows + (size_t)side * slice, stride);
    return rows;
}

problem make_problem(support_random *random, const problem_shape *p)
{
    size_t width = (size_t)p->n_kv_heads * p->head_dim;
    size_t slice = kvk_slice_bytes(p->dtype, p->n_kv_heads, p->head_dim);
    size_t row = 2 * slice, n_out = (size_t)p->n_q * p->n_q_heads;
    char *data = make_rows(random_floats(random, 2 * width * p->n_kv), p, row + 2);
    const void **rows = get(p->n_kv * sizeof(*rows));
    int32_t *positions = get(p->n_kv * sizeof(*positions));
    double *freq = get(p->head_dim * sizeof(double));
    uint32_t *visible = get(p->n_q * sizeof(*visible));
    kvk_rope_params rope = {.theta = 10000};

    for (size_t j = 0; j < p->n_kv; j++) { /* scattered, some twice */
        rows[j] = data + support_below(random, p->n_kv) * (row + 2);
        positions[j] = (int32_t)j;
    }
    for (size_t i = 0; i < p->n_q; i++)
        visible[i] =
            p->n_kv > p->n_q - i ? (uint32_t)(p->n_kv - (p->n_q - 1 - i)) : (uint32_t)(i % 2);
    for (size_t i = 1; i < p->n_q; i++)
        visible[i] = visible[i] < visible[i - 1] ? visible[i - 1] : visible[i];
    if (p->head_dim % 2 == 0)
        assert_ok(kvk_rope_inv_freq(&rope, p->head_dim, freq));
    return (problem){{.q = random_floats(random, n_out * p->head_dim),
                      .n_q = p->n_q,
                      .n_q_heads = p->n_q_heads,
                      .n_kv_heads = p->n_kv_heads,
                      .head_dim = p->head_dim,
                      .rows = rows,
                      .n_kv = p->n_kv,
                      .k_off_bytes = 0,
                      .v_off_bytes = slice,
                      .dtype = p->dtype,
                      .k_positions = p->rope ? positions : NULL,
                      .inv_freq = p->rope ? freq : NULL,
                      .visible = p->causal ? visible : NULL,
                      .scale = 1 / sqrtf((float)p->head_dim),
                      .softcap = p->softcap,
                      .o = get_floats(n_out * p->head_dim),
                      .lse = get_floats(n_out)},
                     visible};
}

double slice_element(const kvk_attend_args *a, size_t row, size_t off_bytes, size_t head, size_t t)
{
    const char *slice = (const char *)a->rows[row] + off_bytes;
    size_t at = head * a->head_dim + t, scales = (size_t)a->n_kv_heads * a->head_dim;

    if (!kvk_is_coded(a->dtype))
        return (double)decoded(slice, a->dtype, at);
    return (double)decoded(slice, a->dtype, at) * (double)decoded(slice + scales, KVK_BF16, head);
}

double attend_bound(const kvk_attend_args *a, size_t query, size_t head)
{
    size_t d = a->head_dim, kv_head = head / (a->n_q_heads / a->n_kv_heads);
    size_t n = a->visible ? a->visible[query] : a->n_kv;
    const float *q = a->q + (query * a->n_q_heads + head) * d;
    double largest = 0;

    for (size_t j = 0; j < n; j++) { /* a rotation leaves |x| + |y| below sqrt(2) of it */
        double sum = 0;
        for (size_t t = 0; t < d; t++)
            sum += fabs((double)q[t]) * fabs(slice_element(a, j, a->k_off_bytes, kv_head, t));
        for (size_t t = 0; a->inv_freq && t < d; t++)
            sum += fabs((double)q[t]) *
                   fabs(slice_element(a, j, a->k_off_bytes, kv_head, (t + d / 2) % d));
        largest = fmax(largest, sum);
    }
    return (double)(d + 12) * 0x1p-24 * (double)a->scale * largest +
           0x1p-20 * (1 + log2((double)n + 1));
}

static double largest_value(const kvk_attend_args *a, size_t query, size_t head)
{
    size_t d = a->head_dim, kv_head = head / (a->n_q_heads / a->n_kv_heads);
    size_t n = a->visible ? a->visible[query] : a->n_kv;
    double largest = 0;

    for (size_t j = 0; j < n * d; j++)
        largest = fmax(largest, fabs(slice_element(a, j / d, a->v_off_bytes, kv_head, j % d)));
    return largest;
}

void compare_attend(const subject *s, const kvk_attend_args *a, const float *o, const float *lse,
                    const float *want_o, const float *want_lse)
{
    size_t d = a->head_dim;

    for (size_t r = 0; r < (size_t)a->n_q * a->n_q_heads; r++) {
        size_t query = r / a->n_q_heads, head = r % a->n_q_heads;
        double bound = attend_bound(a, query, head);
        double values = largest_value(a, query, head);
        assert_near(s, "lse", r, (double)lse[r], (double)want_lse[r], 2 * bound);
        for (size_t t = 0; t < d; t++)
            assert_near(s, "o", r * d + t, (double)o[r * d + t], (double)want_o[r * d + t],
                        2 * bound * values);
    }
}
