// The products of the fused operators, on tensor cores: raw pointers, sizes and strides, no tensors.
//
//   convolve          y[n, p, q, o] = epilogue( sum over r, s, i of prologue(x[n, h, w, i]) weight[o, i, r, s] )
//     plain           h = p stride - padding + r dilation                    conv2d; conv_transpose2d's input gradient
//     transposed      h = (p + padding - r dilation) / stride, where whole   conv_transpose2d; conv2d's input gradient
//   weight_gradient   parts[split, i, (r, s), j] = sum over n, p, q of prologue(a)[n, i, p, q] b[n, j, h, w], b like x
//   finish            adds the parts: dW = g dW', dg = <dW', W> + b sum s, db = g sum s, dt = sum s
//
// A linear layer is the convolution of a 1 x 1 image with one tap. The prologue multiplies a gradient by the slope
// of the activation, and for dx by its channel's gate, on its way to the product; the epilogue is act(g (u + b) +
// t).
#pragma once

#include <cstdint>

#include "../gate.h"

namespace mrvae::cuda {

// How products are taken: 16-bit operands, float32 operands rounded to TF32, float32 ones as they are. Sums are
// float32.
enum class Numbers { BFloat16, Half, Tf32, Float };

// The type of a parameter's elements.
enum class Parameter : int { Float, BFloat16, Half, Double };

// A tensor by its address and its strides in elements; of a weight, n is that of the product's columns, c of what is
// summed.
struct View {
  const void* data = nullptr;
  std::int64_t n = 0, c = 0, h = 0, w = 0;
};

struct Pair {
  int h, w;
};

struct Convolution {
  Numbers numbers;
  bool transposed;
  int samples, groups, channels, columns;  // channels of x and of y, in a group
  Pair in, out, kernel, stride, padding, dilation;
  View x, saved, weight, y, kept;          // saved and kept may be null; kept has y's strides
  std::int64_t weight_group;               // from one group's weight to the next's
  const float* prologue_gate;              // (groups channels,) or null
  const void* bias;                        // (groups columns,) or null
  Parameter bias_type;
  const float *gate, *shift;               // (groups columns,), or a row a sample; gate null: no epilogue
  bool per_sample, keep_product;           // kept: u, or z
  int rows_per_gate;                       // samples of x that share a row of the gate
  Activation activation;                   // of the epilogue, or with `saved` of the prologue
};

struct WeightGradient {
  Numbers numbers;
  bool slope_of_a;                         // saved belongs to a, or to b
  int samples, groups, a_channels, b_channels;  // in a group
  Pair a_size, b_size, kernel, stride, padding, dilation;
  View a, b, saved;
  Activation activation;
  float* parts;                            // (splits, groups a_channels, taps, b_channels)
  float* sums;                             // (splits, groups a_channels), of prologue(a), or null
  int splits, chunk;                       // positions of a part
};

// Sums of act'(saved) grad over all but the channels, in parts (splits, channels).
struct ChannelSums {
  Parameter type;
  int samples, channels;
  Pair size;
  View grad, saved;
  Activation activation;
  float* parts;
  int splits;
};

struct Finish {
  int splits, sum_splits;
  const float *parts, *sums;               // null where there are none
  int rows, columns, taps;                 // of a part: rows (all groups), taps, columns (of a group)
  int groups;                              // 0: gates belong to the rows; else transposed, to the columns of each group
  Parameter type, bias_type;               // of weight and of bias
  const void *weight, *bias;
  const float* gate;                       // null: 1
  std::int64_t weight_row, weight_column, weight_r, weight_s;
  int kernel_width;
  void *grad_weight, *grad_bias;           // null where not wanted
  std::int64_t grad_row, grad_column, grad_r, grad_s;
  float *grad_gate, *grad_shift;
};

// All of them launch on the stream, and throw std::runtime_error where a launch fails. `processors` of the device,
// by which tiles and parts are chosen.
void convolve(const Convolution& what, int processors, void* stream);
// Sets splits and chunk.
void plan_parts(WeightGradient& what, int processors);
void weight_gradient(const WeightGradient& what, int processors, void* stream);
int sum_splits(const ChannelSums& what, int processors);
void channel_sums(const ChannelSums& what, void* stream);
void finish(const Finish& what, void* stream);

}  // namespace mrvae::cuda
