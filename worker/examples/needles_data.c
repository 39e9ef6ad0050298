/*
 * needles_data.c: deterministic keys and values with planted needles. See needles_data.h.
 */
#include "needles_data.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    NOISE_LEN = 1 << 18,
    FIRST_SLOW_PAIR = 48, /* pairs 48..63 turn by less than 0.22 rad in 4,096 positions */
};

/*
 * Of a direction. With query_gain g and the attention scale s, a head's logit of its needle is
 * g s |u_h|^2, and the other 6,000 rows add up to about 9 + (g s |u_h|)^2 / 2: with |u_h|^2 >= 64
 * in each head that is 45 against 25.
 */
static const float needle_norm = 32.0f, head_norm_min = 8.0f;
static const float query_gain = 8.0f;

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static double uniform(uint64_t *state)
{
    *state = mix(*state);
    return ((double)(*state >> 11) + 0.5) / 9007199254740992.0;
}

static float gaussian(uint64_t *state)
{
    double radius = sqrt(-2.0 * log(uniform(state)));
    return (float)(radius * cos(6.283185307179586 * uniform(state)));
}

static uint16_t to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits += 0x7fffu + ((bits >> 16) & 1u);
    return (uint16_t)(bits >> 16);
}

static float from_bf16(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

static bool slow_dim(uint32_t dim)
{
    return dim % (ND_HEAD_DIM / 2) >= FIRST_SLOW_PAIR;
}

/* Gram-Schmidt over Gaussian vectors that live in the slow dimensions. */
static void make_basis(float *basis, uint64_t *state)
{
    for (uint32_t i = 0; i < ND_INDEX_DIMS; i++) {
        float *row = basis + (size_t)i * ND_KEY_DIM;
        for (uint32_t j = 0; j < ND_KEY_DIM; j++) {
            row[j] = slow_dim(j % ND_HEAD_DIM) ? gaussian(state) : 0.0f;
        }
        for (uint32_t p = 0; p < i; p++) {
            const float *other = basis + (size_t)p * ND_KEY_DIM;
            double dot = 0;
            for (uint32_t j = 0; j < ND_KEY_DIM; j++) {
                dot += (double)row[j] * other[j];
            }
            for (uint32_t j = 0; j < ND_KEY_DIM; j++) {
                row[j] -= (float)dot * other[j];
            }
        }
        double norm = 0;
        for (uint32_t j = 0; j < ND_KEY_DIM; j++) {
            norm += (double)row[j] * row[j];
        }
        for (uint32_t j = 0; j < ND_KEY_DIM; j++) {
            row[j] = (float)(row[j] / sqrt(norm));
        }
    }
}

/* One Gaussian mixture of the basis, of needle_norm; false where a head got too little of it. */
static bool draw_direction(const nd_data *data, float *direction, uint64_t *state)
{
    float weight[ND_INDEX_DIMS];
    double norm = 0, head_norm[ND_KV_HEADS] = {0};
    for (uint32_t i = 0; i < ND_INDEX_DIMS; i++) {
        weight[i] = gaussian(state);
        norm += (double)weight[i] * weight[i];
    }
    for (uint32_t j = 0; j < ND_KEY_DIM; j++) {
        double sum = 0;
        for (uint32_t i = 0; i < ND_INDEX_DIMS; i++) {
            sum += (double)weight[i] * data->basis[(size_t)i * ND_KEY_DIM + j];
        }
        direction[j] = (float)(needle_norm * sum / sqrt(norm));
        head_norm[j / ND_HEAD_DIM] += (double)direction[j] * direction[j];
    }
    for (uint32_t h = 0; h < ND_KV_HEADS; h++) {
        if (head_norm[h] < (double)head_norm_min * head_norm_min) {
            return false;
        }
    }
    return true;
}

kvc_status nd_init(nd_data *data, uint32_t n_layers, uint32_t n_tokens, uint32_t n_needles,
                   uint64_t seed)
{
    memset(data, 0, sizeof *data);
    uint32_t room = n_tokens > ND_SINK + ND_RECENT ? n_tokens - ND_SINK - ND_RECENT : 0;
    if (n_needles == 0 || n_needles > ND_MAX_NEEDLES || room / n_needles < 64) {
        return KVC_INVALID;
    }
    data->n_layers = n_layers;
    data->n_tokens = n_tokens;
    data->n_needles = n_needles;
    data->basis = calloc((size_t)ND_INDEX_DIMS * ND_KEY_DIM, sizeof(float));
    data->direction = calloc((size_t)n_needles * ND_KEY_DIM, sizeof(float));
    data->noise = calloc(NOISE_LEN + ND_KEY_DIM, sizeof(float));
    if (!data->basis || !data->direction || !data->noise) {
        nd_fini(data);
        return KVC_NO_MEMORY;
    }
    uint64_t state = mix(seed);
    make_basis(data->basis, &state);
    uint32_t stride = room / n_needles;
    for (uint32_t i = 0; i < n_needles; i++) {
        while (!draw_direction(data, data->direction + (size_t)i * ND_KEY_DIM, &state)) {
        }
        data->needle_at[i] = ND_SINK + i * stride + (uint32_t)(uniform(&state) * stride);
    }
    for (uint32_t i = 0; i < NOISE_LEN; i++) {
        data->noise[i] = from_bf16(to_bf16(gaussian(&state)));
    }
    memcpy(data->noise + NOISE_LEN, data->noise, ND_KEY_DIM * sizeof(float));
    return KVC_OK;
}

void nd_fini(nd_data *data)
{
    free(data->basis);
    free(data->direction);
    free(data->noise);
    memset(data, 0, sizeof *data);
}

static int needle_of(const nd_data *data, uint32_t token)
{
    for (uint32_t i = 0; i < data->n_needles; i++) {
        if (data->needle_at[i] == token) {
            return (int)i;
        }
    }
    return -1;
}

void nd_row(const nd_data *data, uint32_t layer, uint32_t token, uint16_t *k, uint16_t *v)
{
    uint64_t hash = mix(((uint64_t)layer << 32) | token);
    const float *k_noise = data->noise + (hash & (NOISE_LEN - 1));
    const float *v_noise = data->noise + ((hash >> 32) & (NOISE_LEN - 1));
    int needle = needle_of(data, token);
    const float *direction = needle < 0 ? NULL : data->direction + (size_t)needle * ND_KEY_DIM;
    for (uint32_t j = 0; j < ND_KEY_DIM; j++) {
        k[j] = to_bf16(direction ? k_noise[j] + direction[j] : k_noise[j]);
        v[j] = to_bf16(v_noise[j]);
    }
    /* The position, in base 256 (exact in bf16), makes every row different from every other. */
    for (uint32_t i = 0; i < 4; i++) {
        v[i] = to_bf16((float)((token >> (8 * i)) & 255u) / 256.0f);
    }
}

void nd_query(const nd_data *data, uint32_t needle, uint16_t *q)
{
    const float *direction = data->direction + (size_t)needle * ND_KEY_DIM;
    for (uint32_t h = 0; h < ND_Q_HEADS; h++) {
        uint32_t kv_head = h / (ND_Q_HEADS / ND_KV_HEADS);
        for (uint32_t j = 0; j < ND_HEAD_DIM; j++) {
            q[h * ND_HEAD_DIM + j] = to_bf16(query_gain * direction[kv_head * ND_HEAD_DIM + j]);
        }
    }
}

bool nd_answer_right(const nd_data *data, uint32_t layer, uint32_t needle, const uint16_t *out)
{
    uint16_t k[ND_KEY_DIM], v[ND_KEY_DIM];
    nd_row(data, layer, data->needle_at[needle], k, v);
    for (uint32_t h = 0; h < ND_Q_HEADS; h++) {
        const uint16_t *want = v + (h / (ND_Q_HEADS / ND_KV_HEADS)) * ND_HEAD_DIM;
        double dot = 0, norm_a = 0, norm_b = 0;
        for (uint32_t j = 0; j < ND_HEAD_DIM; j++) {
            double a = from_bf16(out[h * ND_HEAD_DIM + j]), b = from_bf16(want[j]);
            dot += a * b;
            norm_a += a * a;
            norm_b += b * b;
        }
        if (!(dot >= 0.9 * sqrt(norm_a * norm_b))) {
            return false;
        }
    }
    return true;
}

void nd_projection(const nd_data *data, float *out)
{
    for (uint32_t j = 0; j < ND_KEY_DIM; j++) {
        for (uint32_t i = 0; i < ND_INDEX_DIMS; i++) {
            out[(size_t)j * ND_INDEX_DIMS + i] = data->basis[(size_t)i * ND_KEY_DIM + j];
        }
    }
}
