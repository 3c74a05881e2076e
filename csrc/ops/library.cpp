// The schemas of the operators, for all devices, and who implements them. operators.h documents
// each operator.
//
// `floats` and `ints` hold the options: first those of the logits, then those of the loss
// (arguments.h). Lists of statistics are in the order of Stat (csrc/core/statistics.h). `fields`
// returns the names of all of these.
#include "library.h"

// The operators are torch.ops.<this>. Two libraries in one process need two names: a kernel
// repository (tools/kernel_repo.py) defines one of its own.
#ifndef LLMLOSS_NAMESPACE
#define LLMLOSS_NAMESPACE llmloss
#endif

STABLE_TORCH_LIBRARY(LLMLOSS_NAMESPACE, m) {
  m.def(
      "token_stats(Tensor input, Tensor target, Tensor? weight, Tensor? logit_scale, "
      "float[] floats, SymInt[] ints, int wanted) -> Tensor[]");
  m.def(
      "token_stats_backward(Tensor?[] grads, Tensor input, Tensor target, Tensor? weight, "
      "Tensor? logit_scale, float[] floats, SymInt[] ints, Tensor[] stats, Tensor state, "
      "bool with_grad_scale) -> (Tensor, Tensor)");
  m.def(
      "token_stats_backward_(Tensor?[] grads, Tensor(a!) input, Tensor target, Tensor? weight, "
      "Tensor? logit_scale, float[] floats, SymInt[] ints, Tensor[] stats, Tensor state, "
      "bool with_grad_scale) -> Tensor");
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, Tensor? token_weight, "
      "Tensor? num_items, Tensor? logit_scale, float[] floats, SymInt[] ints) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, "
      "Tensor? token_weight, Tensor? logit_scale, float[] floats, SymInt[] ints, Tensor state, "
      "Tensor denominator, bool with_grad_scale) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_backward_(Tensor grad_loss, Tensor(a!) input, Tensor target, Tensor? weight, "
      "Tensor? token_weight, Tensor? logit_scale, float[] floats, SymInt[] ints, Tensor state, "
      "Tensor denominator, bool with_grad_scale) -> Tensor");
  m.def(
      "cross_entropy_fused_(Tensor(a!) input, Tensor target, Tensor? weight, Tensor? token_weight, "
      "Tensor? num_items, Tensor? logit_scale, float[] floats, SymInt[] ints, "
      "bool with_grad_scale) -> (Tensor, Tensor)");
  m.def(
      "merge_shards(Tensor shard_stats, Tensor target, int ignore_index, int vocab_size) "
      "-> Tensor[]");
  m.def("scale_(Tensor(a!) x, Tensor factor) -> ()");
  m.def("prefer_huge_pages_(Tensor(a!) x) -> ()");
  m.def("fields(str of) -> str");
  m.def("cpu_isa() -> int");
  m.def(
      "launch_plan(int rows, int vocab_size, int element_bytes, int multiprocessors, "
      "int shared_per_block, int shared_per_multiprocessor, int max_cluster) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(LLMLOSS_NAMESPACE, CPU, m) { llmloss::ops::register_cpu(m); }

#if LLMLOSS_CUDA
STABLE_TORCH_LIBRARY_IMPL(LLMLOSS_NAMESPACE, CUDA, m) { llmloss::ops::register_cuda(m); }
#endif

STABLE_TORCH_LIBRARY_IMPL(LLMLOSS_NAMESPACE, CompositeExplicitAutograd, m) {
  llmloss::ops::register_cpu_isa(m);
  llmloss::ops::register_fields(m);
  llmloss::ops::register_launch_plan(m);
}
