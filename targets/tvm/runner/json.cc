#include "json.h"

#include <fstream>
#include <sstream>
#include <utility>

namespace gammac {
namespace ffi = tvm::ffi;

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Refusal{path + " can't be read: give the folder that gammac compile wrote"};
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

Object::Object(const ffi::Any& value, std::string place) : place_(std::move(place)) {
  const std::optional<ffi::json::Object> map = value.try_cast<ffi::json::Object>();
  if (!map) throw Refusal{place_ + " holds no object"};
  map_ = *map;
}

Object Object::in(const std::string& path) {
  ffi::String wrong;
  const ffi::Any parsed = ffi::json::Parse(read_file(path), &wrong);
  if (!wrong.empty()) throw Refusal{path + " is damaged: " + std::string(wrong)};
  return Object(parsed, path);
}

std::optional<Object> Object::object(const char* name) const {
  const auto found = find<ffi::json::Object>(name);
  if (!found) return std::nullopt;
  return Object(*found, place_);
}

}  // namespace gammac
