// Converts torch tensors to the plain structs of csrc/core, and checks shapes, dtypes and devices,
// for every device alike. llmloss_ext.functional checks what users pass, with friendlier messages;
// the checks here keep a direct call of an operator from reading or writing out of bounds.
#pragma once

#include "torch_compat.h"  // before torch's

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "../core/loss_rows.h"
#include "../core/params.h"

namespace llmloss::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <typename T>
inline constexpr ScalarType scalar_type_of = ScalarType::Float;
template <>
inline constexpr ScalarType scalar_type_of<double> = ScalarType::Double;

inline bool is_integer(ScalarType type) {
  return type == ScalarType::Long || type == ScalarType::Int;
}

// Calls body.template operator()<T>() with the storage type of the logits.
template <typename Body>
auto dispatch(const Tensor& input, const Body& body) {
  switch (input.scalar_type()) {
    case ScalarType::Float:
      return body.template operator()<float>();
    case ScalarType::Double:
      return body.template operator()<double>();
    case ScalarType::BFloat16:
      return body.template operator()<BFloat16>();
    case ScalarType::Half:
      return body.template operator()<Half>();
    default:
      STD_TORCH_CHECK(false, "llmloss: input must be float32, bfloat16, float16 or float64");
  }
  __builtin_unreachable();
}

// Contiguous and of the arithmetic type. Only for tensors with one number per row or per column.
template <typename Real>
Tensor as_real(const Tensor& t) {
  const Tensor converted =
      t.scalar_type() == scalar_type_of<Real> ? t : torch::stable::to(t, scalar_type_of<Real>);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

template <typename Real>
MaybeTensor as_real(const MaybeTensor& t) {
  return t.has_value() ? MaybeTensor(as_real<Real>(*t)) : std::nullopt;
}

template <typename Real>
const Real* pointer(const MaybeTensor& t) {
  return t.has_value() && t->numel() > 0 ? static_cast<const Real*>(t->data_ptr()) : nullptr;
}

// The denominator that an operator returned; without elements: 1.
template <typename Real>
MeanDenominator<Real> mean_of(const Tensor& denominator) {
  return {pointer<Real>(denominator)};
}

// An uninitialised contiguous tensor on the device of `like`. Calling the C function avoids the
// dispatcher's boxing, which matters in a small call that creates several tensors.
inline Tensor new_tensor(const Tensor& like, std::span<const int64_t> sizes, ScalarType type) {
  int64_t strides[8];
  STD_TORCH_CHECK(sizes.size() <= std::size(strides), "llmloss: too many dimensions");
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
      like.get_device_index(), &handle));
  return Tensor(handle);
}

template <typename Real>
Tensor new_real(const Tensor& like, std::span<const int64_t> sizes) {
  return new_tensor(like, sizes, scalar_type_of<Real>);
}

template <typename Real>
Tensor new_real(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return new_real<Real>(like, std::span(sizes.begin(), sizes.size()));
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline std::span<const int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.data(), sizes.size()};
}

// Rows of a (rows, columns) or (outer, inner, columns) tensor whose columns are adjacent.
inline RowLayout layout_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 || t.dim() == 3, "llmloss: expected 2 or 3 dimensions, got ",
                  t.dim());
  STD_TORCH_CHECK(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1,
                  "llmloss: the columns of a row must be adjacent in memory");
  if (t.dim() == 2) return {std::max<int64_t>(t.size(0), 1), 0, t.stride(0)};
  return {std::max<int64_t>(t.size(1), 1), t.stride(0), t.stride(1)};
}

// Whether two rows share memory, in which case the tensor cannot be written in place.
inline bool rows_overlap(const Tensor& t) {
  const int64_t columns = t.size(t.dim() - 1);
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
  for (int64_t dim = 0; dim + 1 < t.dim(); ++dim) {
    if (t.size(dim) > 1) axes.emplace_back(t.stride(dim), t.size(dim));
  }
  std::sort(axes.begin(), axes.end());
  int64_t extent = columns;
  for (const auto& [stride, size] : axes) {
    if (stride < extent) return true;
    extent += (size - 1) * stride;
  }
  return false;
}

inline void check_device(const Tensor& t, const Tensor& input, const char* name) {
  STD_TORCH_CHECK(t.device() == input.device(), "llmloss: ", name,
                  " must be on the input's device");
}

// An operator takes its options packed in two lists, so that a new option changes no schema. In
// `each`, the structs below name their options in the order of the lists. The operator `fields`
// returns the names to Python.
using Floats = std::vector<double>;
using Ints = std::vector<int64_t>;

struct LogitOptions {
  double scale = 1;
  double softcap = 0;  // 0: none
  int64_t ignore_index = -100;
  int64_t vocab_size = 0;
  int64_t classes = 0;  // if not 0, the columns are a shard of a vocabulary of this size

  template <typename Visit>
  void each(Visit& visit) {
    visit("scale", scale);
    visit("softcap", softcap);
    visit("ignore_index", ignore_index);
    visit("vocab_size", vocab_size);
    visit("classes", classes);
  }
};

struct CrossEntropyOptions {
  LossOptions<double> loss;
  int64_t reduction = 0;

  template <typename Visit>
  void each(Visit& visit) {
    visit("label_smoothing", loss.label_smoothing);
    visit("z_loss", loss.z_loss);
    visit("focal_gamma", loss.focal_gamma);
    visit("reduction", reduction);
  }

  template <typename Real>
  LossOptions<Real> checked(bool probability_targets) const {
    STD_TORCH_CHECK(loss.focal_gamma >= 0, "llmloss: focal_gamma must not be negative, got ",
                    loss.focal_gamma);
    STD_TORCH_CHECK(loss.focal_gamma == 0 || !probability_targets,
                    "llmloss: focal_gamma needs class indices as targets");
    LossOptions<Real> options = loss.as<Real>();
    options.probability_targets = probability_targets;
    return options;
  }
};

// The names of the options of some structs, separated by blanks.
struct OptionNames {
  void operator()(const char* name, const double&) { append(floats, name); }
  void operator()(const char* name, const int64_t&) { append(ints, name); }

  template <typename... Options>
  static OptionNames of() {
    OptionNames names;
    (Options().each(names), ...);
    return names;
  }

  std::string floats, ints;

 private:
  static void append(std::string& names, const char* name) {
    names += (names.empty() ? "" : " ") + std::string(name);
  }
};

// Reads the options of some structs from `floats` and `ints`, which hold those of the first struct,
// then those of the next.
class OptionReader {
 public:
  template <typename... Options>
  static void read(const Floats& floats, const Ints& ints, Options&... options) {
    OptionReader reader(floats, ints);
    (options.each(reader), ...);
    STD_TORCH_CHECK(reader.float_count_ == floats.size() && reader.int_count_ == ints.size(),
                    "llmloss: expected floats [", OptionNames::of<Options...>().floats,
                    "] and ints [", OptionNames::of<Options...>().ints, "], got ", floats.size(),
                    " and ", ints.size(), " numbers");
  }

  void operator()(const char*, double& option) { next(floats_, float_count_, option); }
  void operator()(const char*, int64_t& option) { next(ints_, int_count_, option); }

 private:
  OptionReader(const Floats& floats, const Ints& ints) : floats_(floats), ints_(ints) {}

  template <typename Number>
  static void next(const std::vector<Number>& numbers, size_t& count, Number& option) {
    if (count < numbers.size()) option = numbers[count];
    ++count;
  }

  const Floats& floats_;
  const Ints& ints_;
  size_t float_count_ = 0, int_count_ = 0;
};

// The arguments of every operator that concern the logits, besides input and target.
struct LogitArguments {
  MaybeTensor weight;       // (columns), class weights
  MaybeTensor logit_scale;  // 0-d; replaces scale
  LogitOptions options;
};

struct LossArguments {
  MaybeTensor token_weight;  // one per row
  MaybeTensor num_items;  // replaces the mean's denominator; a second number: the z-loss's factor
  CrossEntropyOptions options;

  Reduction reduction() const { return Reduction(options.reduction); }
};

// The checked tensors of one call. It owns those that had to be converted.
template <typename T>
struct Problem {
  using Real = real_t<T>;

  Problem(const Tensor& input, const Tensor& target, const LogitArguments& arguments,
          double label_smoothing = 0.0)
      : input(input),
        target(target.is_contiguous() || !is_integer(target.scalar_type())
                   ? target
                   : torch::stable::contiguous(target)),
        weight(as_real<Real>(arguments.weight)),
        logit_scale(as_real<Real>(arguments.logit_scale)) {
    const LogitOptions& logits = arguments.options;
    const int64_t columns = input.size(input.dim() - 1);
    rows.layout = layout_of(input);
    rows.logits = static_cast<const T*>(input.data_ptr());
    rows.columns = columns;
    rows.rows = columns == 0 ? 0 : input.numel() / columns;
    rows.vocab_size = logits.vocab_size;
    STD_TORCH_CHECK(logits.vocab_size >= 1 && logits.vocab_size <= columns,
                    "llmloss: vocab_size must be in [1, ", columns, "], got ", logits.vocab_size);
    rows.transform = {Real(logits.scale), Real(logits.softcap), pointer<Real>(logit_scale)};
    check_device(this->target, input, "target");
    if (weight.has_value()) {
      check_device(*weight, input, "weight");
      STD_TORCH_CHECK(weight->numel() == columns, "llmloss: weight must have one number per class");
    }
    if (logit_scale.has_value()) {
      check_device(*logit_scale, input, "logit_scale");
      STD_TORCH_CHECK(logit_scale->numel() == 1, "llmloss: logit_scale must hold one number");
    }
    rows.weights.class_weight = pointer<Real>(weight);
    const int64_t classes = logits.classes != 0 ? logits.classes : logits.vocab_size;
    rows.weights.beta = Real(1.0 / double(classes));
    if (is_integer(this->target.scalar_type())) {
      STD_TORCH_CHECK(this->target.numel() == rows.rows, "llmloss: expected ", rows.rows,
                      " targets, got ", this->target.numel());
      rows.targets = {this->target.data_ptr(), this->target.scalar_type() == ScalarType::Long,
                      logits.ignore_index, logits.classes != 0};
      // Without rows data_ptr may be null, which would mean probability targets.
      if (rows.targets.data == nullptr) rows.targets.data = this;
    } else {
      STD_TORCH_CHECK(this->target.scalar_type() == input.scalar_type() &&
                          std::ranges::equal(sizes_of(this->target), sizes_of(input)),
                      "llmloss: probability targets must have the input's shape and dtype");
      rows.weights.probabilities = static_cast<const T*>(this->target.data_ptr());
      rows.weights.rows = layout_of(this->target);
      rows.weights.alpha = Real(1.0 - label_smoothing);
      rows.weights.beta = Real(label_smoothing / double(logits.vocab_size));
    }
  }

  bool has_indices() const { return rows.targets.are_indices(); }

  // The shape of a tensor with one number per row.
  std::span<const int64_t> row_shape() const {
    const auto sizes = sizes_of(input);
    return sizes.first(sizes.size() - 1);
  }

  Tensor input;
  Tensor target;
  MaybeTensor weight;
  MaybeTensor logit_scale;
  RowInputs<T> rows;
};

// The state that forward saves for backward, (fields, tokens). Further rows may hold statistics
// that the loss reads.
template <typename Real>
StateFields<Real*> state_rows(const Tensor& state) {
  StateFields<Real*> rows;
  for (int field = 0; field < StateField::count; ++field) {
    rows[field] = data<Real>(state) + field * state.size(1);
  }
  return rows;
}

// Checks the state that a caller passes to backward: at least `fields` rows.
template <typename Real>
const Tensor& checked_state(const Tensor& state, const Tensor& input, int64_t fields,
                            int64_t rows) {
  check_device(state, input, "state");
  STD_TORCH_CHECK(state.scalar_type() == scalar_type_of<Real> && state.dim() == 2 &&
                      state.size(0) >= fields && state.size(1) == rows && state.is_contiguous(),
                  "llmloss: state must be what forward returned");
  return state;
}

}  // namespace llmloss::ops
