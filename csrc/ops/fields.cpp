// The names of what operators take and return in lists, for Python to read sizes from.
#include "../core/shards.h"
#include "arguments.h"
#include "library.h"

namespace llmloss::ops {
namespace {

std::string joined(std::span<const char* const> names) {
  std::string all;
  for (const char* name : names) all += (all.empty() ? "" : " ") + std::string(name);
  return all;
}

// Separated by blanks.
std::string fields(std::string of) {
  const std::span<const char* const> statistics(Stat::names), state(StateField::names);
  if (of == "statistics") return joined(statistics);
  if (of == "float_statistics") return joined(statistics.first(Stat::float_count));
  if (of == "state") return joined(state);
  if (of == "mean_denominator") return joined(MeanDenominator<double>::names);
  if (of == "shard") {
    return joined(statistics.first(Stat::float_count)) + " " + joined(state) + " " +
           joined(ShardField::names);
  }
  if (of == "logit_floats") return OptionNames::of<LogitOptions>().floats;
  if (of == "logit_ints") return OptionNames::of<LogitOptions>().ints;
  if (of == "loss_floats") return OptionNames::of<CrossEntropyOptions>().floats;
  if (of == "loss_ints") return OptionNames::of<CrossEntropyOptions>().ints;
  STD_TORCH_CHECK(false, "llmloss: there are no fields of '", of, "'");
  __builtin_unreachable();
}

}  // namespace

void register_fields(Library& m) { m.impl("fields", TORCH_BOX(&fields)); }

}  // namespace llmloss::ops
