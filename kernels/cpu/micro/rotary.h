/*
 * rotary.h: angles and rotations. Sine and cosine are computed in double, reduced by multiples of
 * pi/2 in four parts (exact products up to 2^30 quarter turns), by Taylor series on [-pi/4, pi/4]
 * (truncation below 2^-60), without branches, so that the compiler vectorises over frequencies and
 * every isa gives the same bits. Angles beyond ANGLE_MAX go to libm.
 */
#ifndef KVKI_ROTARY_H
#define KVKI_ROTARY_H

#include <math.h>

#include "vec.h"

#define ANGLE_MAX     1e9
#define TWO_OVER_PI   0.63661977236758134308
/* pi/2 in parts of 22 bits, so that a part times a 30-bit count of quarter turns is exact. */
#define HALF_PI_PART1 0x1.921fb0p+0
#define HALF_PI_PART2 0x1.5110b0p-22
#define HALF_PI_PART3 0x1.184698p-44
#define HALF_PI_PART4 0x1.3198a2e037073p-69

KVKI_INLINE void sincos_one(double angle, double *sin_p, double *cos_p)
{
    const double magic = 0x1.8p52;
    double shifted = angle * TWO_OVER_PI + magic;
    double turns = shifted - magic;
    double r = (angle - turns * HALF_PI_PART1) - turns * HALF_PI_PART2;
    r = (r - turns * HALF_PI_PART3) - turns * HALF_PI_PART4;
    double r2 = r * r;
    double s, c;
    int64_t quarter;

    s = 1.0 / 355687428096000.0;
    s = s * r2 - 1.0 / 1307674368000.0;
    s = s * r2 + 1.0 / 6227020800.0;
    s = s * r2 - 1.0 / 39916800.0;
    s = s * r2 + 1.0 / 362880.0;
    s = s * r2 - 1.0 / 5040.0;
    s = s * r2 + 1.0 / 120.0;
    s = s * r2 - 1.0 / 6.0;
    s = s * r2 * r + r;
    c = 1.0 / 20922789888000.0;
    c = c * r2 - 1.0 / 87178291200.0;
    c = c * r2 + 1.0 / 479001600.0;
    c = c * r2 - 1.0 / 3628800.0;
    c = c * r2 + 1.0 / 40320.0;
    c = c * r2 - 1.0 / 720.0;
    c = c * r2 + 1.0 / 24.0;
    c = c * r2 - 0.5;
    c = c * r2 + 1.0;
    memcpy(&quarter, &shifted, sizeof(quarter));
    double sine = quarter & 1 ? c : s;
    double cosine = quarter & 1 ? s : c;
    *sin_p = quarter & 2 ? -sine : sine;
    *cos_p = (quarter + 1) & 2 ? -cosine : cosine;
}

static void rotary_angles(double position, const double *inv_freq, uint32_t half, float *cosine,
                          float *sine)
{
    double largest = 0;

    for (uint32_t i = 0; i < half; i++) {
        double angle = fabs(position * inv_freq[i]);
        largest = angle > largest ? angle : largest;
    }
    if (largest > ANGLE_MAX) {
        for (uint32_t i = 0; i < half; i++) {
            cosine[i] = (float)cos(position * inv_freq[i]);
            sine[i] = (float)sin(position * inv_freq[i]);
        }
        return;
    }
    for (uint32_t i = 0; i < half; i++) {
        double s, c;
        sincos_one(position * inv_freq[i], &s, &c);
        sine[i] = (float)s;
        cosine[i] = (float)c;
    }
}

/* Loads stand before stores, so out may be x. */
static void rotary_rotate(const float *x, const float *cosine, const float *sine, uint32_t half,
                          float *out)
{
    uint32_t i = 0;

    for (; i + VF_LANES <= half; i += VF_LANES) {
        vf a = vf_load(x + i), b = vf_load(x + half + i);
        vf c = vf_load(cosine + i), s = vf_load(sine + i);
        vf_store(out + i, vf_sub(vf_mul(a, c), vf_mul(b, s)));
        vf_store(out + half + i, vf_add(vf_mul(b, c), vf_mul(a, s)));
    }
    for (; i < half; i++) {
        float a = x[i], b = x[half + i];
        out[i] = a * cosine[i] - b * sine[i];
        out[half + i] = b * cosine[i] + a * sine[i];
    }
}

#endif
