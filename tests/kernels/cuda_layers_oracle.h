/*
 * cuda_layers_oracle.h: the ops of kvk/cuda_layers.h in double, on host memory: what the device is
 * held to, and what a fake device does. Arguments are those of the ops, which are right.
 */
#ifndef CUDA_LAYERS_ORACLE_H
#define CUDA_LAYERS_ORACLE_H

#include "kvk/cuda_layers.h"

void oracle_embed(const kvk_cuda_embed_args *a);
void oracle_rms_norm(const kvk_cuda_rms_norm_args *a);
void oracle_linear(const kvk_cuda_linear_args *a);
void oracle_rotate(const kvk_cuda_rotate_args *a);
void oracle_local_attend(const kvk_cuda_local_attend_args *a);

#endif
