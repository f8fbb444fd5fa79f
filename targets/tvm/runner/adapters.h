// Adapters in place of those that an artifact was compiled with, from a file as gammac finetune writes it.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "json.h"

namespace gammac {

// Rows of floats.
struct Factor {
  int64_t rows = 0, columns = 0;
  std::vector<float> values;
};

class Adapters {
 public:
  // Throws Refusal for a file that is damaged, was trained on another base, or has other weights, and for an
  // artifact that has no adapters.
  Adapters(const std::string& folder, const std::string& path);

  // What stands for a parameter: row after row, or in panels of 16 rows (targets/tvm/panels.py). Nothing for
  // parameters that are no factors. Throws Refusal for a factor of another rank.
  std::optional<std::vector<float>> in_place_of(const std::string& name, const std::vector<int64_t>& shape) const;

 private:
  std::map<std::string, Factor> factors_;
};

}  // namespace gammac
