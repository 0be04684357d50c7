// The gates and folds of a model's plan in one call; see gated_fold.cpp.
#pragma once

#include <ATen/core/ivalue.h>

#include "ops.h"

namespace mrvae {

// all gates, the folded weights, and the folded biases, none where a layer has neither bias nor shift
using GatedFolded = std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<OptionalTensor>>;

// A plan, made once for many steps, whose nodes keep it.
struct GatedFold : torch::CustomClassHolder {
  using Numbers = std::vector<std::int64_t>;
  const Numbers sizes, kinds;               // of the gates' slices
  const Numbers gate_at, shift_at, groups;  // by folded layer: its slices (-1 for no shift); as in fold

  // ValueError unless there is one of each a layer, and every slice is there.
  GatedFold(Numbers sizes, Numbers kinds, Numbers gate_at, Numbers shift_at, Numbers groups);
  GatedFolded run(const Tensor& weight, const Tensor& bias, const Tensor& eta, const std::vector<Tensor>& weights,
                  const std::vector<OptionalTensor>& biases) const;
};

}  // namespace mrvae
