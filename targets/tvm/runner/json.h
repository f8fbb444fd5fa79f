// JSON files of an artifact, and the one kind of error that a user sees.
#pragma once

#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/tvm_ffi.h>

#include <optional>
#include <string>

namespace gammac {

// A mistake of the user's, or an artifact that does not fit here: the message is all they need.
struct Refusal {
  std::string message;
};

// Throws Refusal when the file can't be read.
std::string read_file(const std::string& path);

// An object's fields by name. `place` is what messages call the file.
class Object {
 public:
  Object(const tvm::ffi::Any& value, std::string place);
  // The object that a file holds. Throws Refusal when it can't be read or is damaged.
  static Object in(const std::string& path);

  // A field of another type ends in TVM's own error, which says what was expected.
  template <typename T>
  T get(const char* name) const {
    const std::optional<T> found = find<T>(name);
    if (!found) throw Refusal{place_ + " has no " + name};
    return *found;
  }

  // Nothing where the field is missing, null, or of another type.
  template <typename T>
  std::optional<T> find(const char* name) const {
    auto found = map_.find(tvm::ffi::String(name));
    if (found == map_.end()) return std::nullopt;
    return (*found).second.template try_cast<T>();
  }

  std::optional<Object> object(const char* name) const;
  const tvm::ffi::json::Object& fields() const { return map_; }

 private:
  tvm::ffi::json::Object map_;
  std::string place_;
};

}  // namespace gammac
