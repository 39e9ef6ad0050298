/*
 * gca_math.c: the element-wise parts of the decoder. Sums run in eight chains, so that they become
 * vectors without giving the compiler leave to reorder anything: the same bits in every build.
 */
#include <math.h>
#include <string.h>

#include "gca_internal.h"

enum { LANES = 8 };

/* exp(x) for x <= 0 to about 2^-22, relative; 2^n by the exponent's bits. */
static inline float exp_low(float x)
{
    x = x > -87.0f ? x : -87.0f;
    int n = (int)(x * 1.44269504f - 0.5f);
    float r = x - (float)n * 0.693359375f + (float)n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int bits = (n + 127) * (1 << 23);
    float two_n;
    memcpy(&two_n, &bits, sizeof(two_n));
    return p * two_n;
}

static float sum_lanes(const float s[LANES])
{
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

void gca_rms_norm(const float *x, const float *weight, size_t n, size_t h, float *out)
{
    for (size_t i = 0; i < n; i++, x += h, out += h) {
        float s[LANES] = {0};
        for (size_t j = 0; j < h; j += LANES) { /* h is a multiple of 16: landmarks are */
            for (size_t l = 0; l < LANES; l++)
                s[l] += x[j + l] * x[j + l];
        }
        float r = 1.0f / sqrtf(sum_lanes(s) / (float)h + 1e-6f);
        for (size_t j = 0; j < h; j++)
            out[j] = x[j] * r * weight[j];
    }
}

void gca_softmax(float *s, size_t n, size_t first, size_t end, float scale, float slope)
{
    size_t count = end - first, whole = count / LANES * LANES;
    float max[LANES], sum[LANES] = {0}, *x = s + first;
    for (size_t j = 0; j < count; j++)
        x[j] = x[j] * scale + slope * (float)(int)j;
    for (size_t l = 0; l < LANES; l++)
        max[l] = x[0];
    for (size_t j = 0; j < whole; j += LANES) {
        for (size_t l = 0; l < LANES; l++)
            max[l] = x[j + l] > max[l] ? x[j + l] : max[l];
    }
    float top = max[0];
    for (size_t l = 1; l < LANES; l++)
        top = max[l] > top ? max[l] : top;
    for (size_t j = whole; j < count; j++)
        top = x[j] > top ? x[j] : top;
    for (size_t j = 0; j < count; j++)
        x[j] = exp_low(x[j] - top);
    for (size_t j = 0; j < whole; j += LANES) {
        for (size_t l = 0; l < LANES; l++)
            sum[l] += x[j + l];
    }
    float total = sum_lanes(sum);
    for (size_t j = whole; j < count; j++)
        total += x[j];
    float share = 1.0f / total;
    for (size_t j = 0; j < count; j++)
        x[j] *= share;
    memset(s, 0, first * sizeof(*s));
    memset(s + end, 0, (n - end) * sizeof(*s));
}

/* x * sigmoid(2 z), which is x / 2 * (1 + tanh(z)). */
void gca_gelu(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float u = x[i], y = 1.5957691216f * (u + 0.044715f * u * u * u);
        float e = exp_low(y > 0 ? -y : y), up = 1.0f / (1.0f + e);
        x[i] = u * (y > 0 ? up : 1.0f - up);
    }
}

void gca_add(float *restrict x, const float *restrict y, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] += y[i];
}

void gca_add_scaled(float *restrict x, const float *restrict a, const float *restrict y, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] += a[i] * y[i];
}

float gca_slope(uint32_t head, uint32_t heads)
{
    return exp2f(-8.0f * (float)(head + 1) / (float)heads);
}
