// The schemas of the operators, one place for all devices. What each does: operators.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(llmloss, m) {
  m.def(
      "token_stats(Tensor input, Tensor target, Tensor? weight, Tensor? logit_scale, float scale, "
      "float softcap, int ignore_index, SymInt vocab_size, bool with_entropy, "
      "bool with_mean_log_prob, bool with_rank, SymInt classes=0) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "token_stats_backward(Tensor? grad_log_prob, Tensor? grad_lse, Tensor? grad_entropy, "
      "Tensor? grad_mean_log_prob, Tensor input, Tensor target, Tensor? weight, "
      "Tensor? logit_scale, float scale, float softcap, int ignore_index, SymInt vocab_size, "
      "Tensor entropy, Tensor state, bool with_grad_scale, SymInt classes=0) "
      "-> (Tensor, Tensor)");
  m.def(
      "token_stats_backward_(Tensor? grad_log_prob, Tensor? grad_lse, Tensor? grad_entropy, "
      "Tensor? grad_mean_log_prob, Tensor(a!) input, Tensor target, Tensor? weight, "
      "Tensor? logit_scale, float scale, float softcap, int ignore_index, SymInt vocab_size, "
      "Tensor entropy, Tensor state, bool with_grad_scale, SymInt classes=0) -> Tensor");
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, Tensor? token_weight, "
      "Tensor? num_items, Tensor? logit_scale, float scale, float softcap, int ignore_index, "
      "SymInt vocab_size, float label_smoothing, float z_loss, int reduction) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, "
      "Tensor? token_weight, Tensor? logit_scale, float scale, float softcap, int ignore_index, "
      "SymInt vocab_size, float label_smoothing, float z_loss, Tensor state, Tensor denominator, "
      "bool with_grad_scale) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_backward_(Tensor grad_loss, Tensor(a!) input, Tensor target, Tensor? weight, "
      "Tensor? token_weight, Tensor? logit_scale, float scale, float softcap, int ignore_index, "
      "SymInt vocab_size, float label_smoothing, float z_loss, Tensor state, Tensor denominator, "
      "bool with_grad_scale) -> Tensor");
  m.def(
      "cross_entropy_fused_(Tensor(a!) input, Tensor target, Tensor? weight, Tensor? token_weight, "
      "Tensor? num_items, Tensor? logit_scale, float scale, float softcap, int ignore_index, "
      "SymInt vocab_size, float label_smoothing, float z_loss, int reduction, "
      "bool with_grad_scale) -> (Tensor, Tensor)");
  m.def(
      "merge_shards(Tensor said, Tensor target, int ignore_index, int vocab_size) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("scale_(Tensor(a!) x, Tensor factor) -> ()");
  m.def("prefer_huge_pages_(Tensor(a!) x) -> ()");
  m.def("cpu_isa() -> int");
  m.def(
      "launch_plan(int rows, int vocab_size, int element_bytes, int multiprocessors, "
      "int shared_per_block, int shared_per_multiprocessor, int max_cluster) -> str");
}
