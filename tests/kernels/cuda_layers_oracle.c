/* cuda_layers_oracle.c: see cuda_layers_oracle.h; straight from the formulas. */
#include "cuda_layers_oracle.h"

#include <math.h>
#include <stdlib.h>

static double embedding(const kvk_cuda_embed_args *a, size_t at, size_t t)
{
    uint32_t token = a->tokens[at];
    return token < a->vocab ? (double)a->table[(size_t)token * a->dim + t] : 0;
}

void oracle_embed(const kvk_cuda_embed_args *a)
{
    for (size_t i = 0; i < a->n; i++) {
        for (size_t t = 0; t < a->dim; t++) {
            size_t at = a->n_before + i;
            double sum = embedding(a, at, t);
            for (size_t j = 0; j < a->n_taps && j + 1 <= at; j++)
                sum += (double)a->taps[j * a->dim + t] * embedding(a, at - 1 - j, t);
            a->out[i * a->dim + t] = (float)sum;
        }
    }
}

void oracle_rms_norm(const kvk_cuda_rms_norm_args *a)
{
    for (size_t i = 0; i < a->n; i++) {
        const float *x = a->x + i * a->stride;
        double sum = 0;
        for (size_t t = 0; t < a->dim; t++)
            sum += (double)x[t] * (double)x[t];
        double r = 1 / sqrt(sum / a->dim + 1e-6);
        for (size_t t = 0; t < a->dim; t++)
            a->out[i * a->dim + t] = (float)((double)x[t] * r * (double)a->weight[t]);
    }
}

static double gelu(double x)
{
    return x / 2 * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

void oracle_linear(const kvk_cuda_linear_args *a)
{
    double *sum = malloc(a->n_out * sizeof(*sum));
    for (size_t i = 0; sum != NULL && i < a->n; i++) {
        float *out = a->out + i * a->n_out;
        for (size_t j = 0; j < a->n_out; j++)
            sum[j] = a->form == KVK_CUDA_ADD ? (double)out[j] : 0;
        for (size_t t = 0; t < a->n_in; t++) {
            double x = (double)a->in[i * a->n_in + t];
            for (size_t j = 0; j < a->n_out; j++)
                sum[j] += x * (double)a->weight[t * a->n_out + j];
        }
        for (size_t j = 0; j < a->n_out; j++)
            out[j] = (float)(a->form == KVK_CUDA_GELU ? gelu(sum[j]) : sum[j]);
    }
    free(sum);
}

void oracle_rotate(const kvk_cuda_rotate_args *a)
{
    size_t half = a->head_dim / 2;
    for (size_t i = 0; i < (size_t)a->n * a->n_heads * half; i++) {
        size_t row = i / half / a->n_heads, t = i % half;
        float *x = a->x + row * a->stride + i / half % a->n_heads * a->head_dim + t;
        double c = (double)a->cos[row % a->period * half + t];
        double s = (double)a->sin[row % a->period * half + t];
        double p = (double)x[0], q = (double)x[half];
        x[0] = (float)(p * c - q * s);
        x[half] = (float)(q * c + p * s);
    }
}

/* One query of one head over keys [first, end). */
static void attend_one(const kvk_cuda_local_attend_args *a, size_t i, size_t head, size_t first,
                       size_t end, double *w)
{
    size_t dim = a->head_dim, own = a->n_keys - a->n + i;
    const float *q = a->q + i * a->q_stride + head * dim;
    double most = -INFINITY, total = 0;
    for (size_t j = first; j < end; j++) {
        const float *k = a->k + j * a->kv_stride + head * dim;
        double x = 0;
        for (size_t t = 0; t < dim; t++)
            x += (double)q[t] * (double)k[t];
        x *= (double)a->scale;
        x -= a->window ? (double)a->slopes[head] * (double)(own - j) : 0;
        w[j - first] = x;
        most = x > most ? x : most;
    }
    for (size_t j = first; j < end; j++)
        total += w[j - first] = exp(w[j - first] - most);
    for (size_t t = 0; t < dim; t++) {
        double sum = 0;
        for (size_t j = first; j < end; j++)
            sum += w[j - first] * (double)a->v[j * a->kv_stride + head * dim + t];
        a->out[(i * a->n_heads + head) * dim + t] = (float)(sum / total);
    }
}

void oracle_local_attend(const kvk_cuda_local_attend_args *a)
{
    double *w = malloc(a->n_keys * sizeof(*w));
    for (size_t i = 0; w != NULL && i < a->n; i++) {
        size_t own = a->n_keys - a->n + i, begin = a->chunk ? i / a->chunk * a->chunk : 0;
        size_t first = !a->window ? begin : own + 1 > a->window ? own + 1 - a->window : 0;
        size_t end = a->window ? own + 1 : begin + a->chunk;
        for (size_t head = 0; head < a->n_heads; head++)
            attend_one(a, i, head, first, end, w);
    }
    free(w);
}
