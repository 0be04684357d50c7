// Batch norms with an affine a sample, in the passes that the norm makes anyway, on the CPU.
//
//   z = S x_hat + T,   x_hat = (x - mean) rstd,   S = g w,   T = g b + t;   g and t (N, C), w and b (C,)
//
// The backward pass keeps x, which a norm keeps in any case, and nothing else of its size:
//
//   dT = sum dz,   dS = rstd sum dz (x - mean)                            over the positions of a sample
//   dx = S rstd dz - rstd / M (sum_n S dT + rstd (x - mean) sum_n S dS)   M elements of each channel
//
// and dx = S rstd dz alone where the statistics are the running ones.
#pragma once

#include "ops.h"

namespace mrvae {

// w, b and t: what is not given is 1, 0 and 0. of_batch: the statistics are x's, and the running ones, where they are
// given, move towards them by `momentum`; otherwise they are the running ones. x, (N, C, ...), and all others are
// ordinary tensors of one dtype, float32 or float64. Differentiable once.
Tensor sample_batch_norm(const Tensor& x, const Tensor& gate, const OptionalTensor& shift, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& running_mean,
                         const OptionalTensor& running_variance, bool of_batch, double momentum, double eps);

}  // namespace mrvae
