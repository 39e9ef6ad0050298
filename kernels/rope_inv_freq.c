/*
 * rope_inv_freq.c: the frequencies of rotary embeddings.
 *
 * Plain: inv_freq[i] = theta^(-2i/head_dim). Llama-3 scaling stretches the slow frequencies by
 * `factor`, leaves the fast ones, and goes smoothly from one to the other between the wavelengths
 * original_max / high_freq_factor and original_max / low_freq_factor. All in double.
 */
#include <math.h>
#include <stdbool.h>
#include <stddef.h>

#include "kvk/compute.h"

#define TWO_PI 6.283185307179586476925286766559

static bool params_ok(const kvk_rope_params *p)
{
    if (!(p->theta > 0) || !isfinite(p->theta) || p->type > 1)
        return false;
    if (p->type == 0)
        return true;
    return isfinite(p->factor) && p->factor >= 1 && p->low_freq_factor > 0 &&
           isfinite(p->high_freq_factor) && p->high_freq_factor > p->low_freq_factor &&
           p->original_max_position > 0;
}

static double scale_llama3(const kvk_rope_params *p, double freq)
{
    double wavelength = TWO_PI / freq;
    double turns = p->original_max_position / wavelength; /* within the trained length */
    double smooth = 0;

    if (turns > p->high_freq_factor)
        return freq;
    if (turns < p->low_freq_factor)
        return freq / p->factor;
    smooth = (turns - p->low_freq_factor) / (p->high_freq_factor - p->low_freq_factor);
    return (1 - smooth) * (freq / p->factor) + smooth * freq;
}

kvc_status kvk_rope_inv_freq(const kvk_rope_params *params, uint32_t head_dim, double *inv_freq)
{
    if (!params || !inv_freq || head_dim == 0 || head_dim % 2 != 0 || !params_ok(params))
        return KVC_INVALID;
    for (uint32_t i = 0; i < head_dim / 2; i++) {
        double freq = pow(params->theta, -2.0 * i / head_dim);
        inv_freq[i] = params->type == 1 ? scale_llama3(params, freq) : freq;
    }
    return KVC_OK;
}
