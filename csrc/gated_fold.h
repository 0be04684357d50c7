// The gates and folds of a model's plan in one call; see gated_fold.cpp.
#pragma once

#include "node.h"
#include "ops.h"
#include "sample_gates.h"

namespace mrvae {

struct StepGates;

// A plan, made once for many steps, whose nodes keep it.
struct GatedFold : torch::CustomClassHolder {
  using Numbers = std::vector<std::int64_t>;
  const Numbers sizes, kinds;               // of the gates' slices
  const Numbers gate_at, shift_at, groups;  // by folded layer: its slices (-1 for no shift); as in fold

  // ValueError unless there is one of each a layer, and every slice is there.
  GatedFold(Numbers sizes, Numbers kinds, Numbers gate_at, Numbers shift_at, Numbers groups);
  c10::intrusive_ptr<StepGates> run(const Tensor& weight, const Tensor& bias, const Tensor& eta,
                                    const std::vector<Tensor>& weights, const std::vector<OptionalTensor>& biases) const;
};

// All gates of a model at one beta, and what was folded by them: what a call of the model computes first.
//
// A layer of ours takes a gate's values and sends the gradient straight to the node of all gates; for others there is
// the gate as a tensor with a history.
struct StepGates : torch::CustomClassHolder {
  c10::intrusive_ptr<const GatedFold> plan;
  NodePointer node;                    // takes gradient i for slice i; without it the values have histories of their own
  bool gated = false;                  // the gates' weight, bias or eta gets a gradient by the node
  std::vector<Tensor> weights;         // folded
  std::vector<OptionalTensor> biases;  // folded; none where a layer has neither bias nor shift

  std::shared_ptr<const GateSource> source;  // with it the values are made when they are asked for
  std::vector<SampleGates> made;             // the slices, for layers that make them themselves
  mutable std::vector<Tensor> values;        // of the slices: see value()

  // May be asked of one thread at a time, as a network may be called.
  const Tensor& value(std::size_t slice) const;
  Gate kind(std::size_t slice) const { return Gate(plan->kinds.at(slice)); }
  Edge edge(std::size_t slice) const { return node ? Edge(node, std::uint32_t(slice)) : gradient_edge(values[slice]); }
  // Where the sums of a slice of `made` go.
  Edge sums_edge(std::size_t slice) const { return Edge(node, std::uint32_t(values.size() + slice)); }
  Tensor variable(std::int64_t slice) const;
};

}  // namespace mrvae
