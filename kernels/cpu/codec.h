/*
 * codec.h: the scale of a coded head, which quantize and encode share.
 */
#ifndef KVKI_CODEC_H
#define KVKI_CODEC_H

#include "elem.h"

/* The least bf16 that is not below max / largest: the double quotient is off by less than the
 * distance from an inexact one to the next bf16. */
static inline uint16_t kvki_scale_bits(float max, double largest)
{
    double exact = (double)max / largest;
    float near = (float)exact;
    uint32_t bits = kvki_bits_of_f32(near);

    if ((bits & 0xffffu) != 0 || (double)near < exact)
        bits = (bits & 0xffff0000u) + 0x10000u;
    return (uint16_t)(bits >> 16);
}

#endif
