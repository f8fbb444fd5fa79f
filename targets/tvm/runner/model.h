// A TVM artifact: its code, its parameters (mapped, not read) and a cache of keys and values.
#pragma once

#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "adapters.h"
#include "json.h"

namespace gammac {

class Model {
 public:
  // `adapters` is a file that stands for the artifact's, or empty. Throws Refusal for a folder that is no
  // artifact, or one for another processor, TVM or ABI, and for adapters that don't fit it.
  Model(const std::string& folder, int threads, const std::string& adapters);

  int64_t context() const { return context_; }

  // Reads tokens behind those read so far; the likeliest next one.
  int64_t next(const std::vector<int64_t>& tokens);

  // Reads tokens; the logits behind each of them, [tokens, vocabulary].
  std::vector<float> logits(const std::vector<int64_t>& tokens);

 private:
  tvm::ffi::Tensor read(const tvm::ffi::Function& function, const std::vector<int64_t>& tokens);
  void map_params(const std::string& path, const tvm::ffi::Array<tvm::ffi::Any>& entries,
                  const std::optional<Adapters>& adapters);

  // the functions come from the library: it is freed last
  tvm::ffi::Optional<tvm::ffi::Module> library_, machine_;
  tvm::ffi::Optional<tvm::ffi::Function> prefill_, decode_, logits_;
  tvm::ffi::Array<tvm::ffi::Tensor> params_, caches_;
  int64_t context_ = 0, length_ = 0;
};

}  // namespace gammac
