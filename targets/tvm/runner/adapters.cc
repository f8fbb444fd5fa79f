#include "adapters.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <string_view>

namespace gammac {
namespace ffi = tvm::ffi;

namespace {

constexpr int64_t kPanel = 16;
constexpr std::string_view kPanels = ".floats";  // targets/tvm/names.py
constexpr const char* kMetadata = "__metadata__";

// A file of safetensors: the length of a header in eight bytes, the header in JSON, the tensors' bytes.
class TensorFile {
 public:
  explicit TensorFile(const std::string& path) : path_(path), bytes_(content_of(path)), header_(header()) {}

  // What gammac said of the file.
  Object said() const {
    const auto found = header_.object(kMetadata);
    const auto text = found ? found->find<ffi::String>("gammac") : std::nullopt;
    if (!text) throw Refusal{path_ + " is no file of adapters"};
    return Object(ffi::json::Parse(*text), path_);
  }

  int64_t count() const { return static_cast<int64_t>(header_.fields().size()) - 1; }

  void append(const std::string& key, Factor* factor) const {
    const auto entry = header_.object(key.c_str());
    if (!entry) throw Refusal{path_ + " lacks " + key};
    const auto shape = entry->get<ffi::json::Array>("shape"), place = entry->get<ffi::json::Array>("data_offsets");
    if (entry->get<ffi::String>("dtype") != "F32" || shape.size() != 2 || place.size() != 2) throw damaged();
    const int64_t rows = shape[0].cast<int64_t>(), columns = shape[1].cast<int64_t>();
    const int64_t start = place[0].cast<int64_t>(), end = place[1].cast<int64_t>();
    const int64_t size = static_cast<int64_t>(bytes_.size()) - data_;
    if (start < 0 || end > size || rows < 0 || columns < 0 || end - start != 4 * rows * columns) throw damaged();
    if (factor->rows != 0 && factor->columns != columns) throw damaged();
    const size_t before = factor->values.size();
    factor->values.resize(before + rows * columns);
    std::memcpy(factor->values.data() + before, bytes_.data() + data_ + start, end - start);
    factor->rows += rows;
    factor->columns = columns;
  }

 private:
  static std::string content_of(const std::string& path) {
    if (!std::ifstream(path)) throw Refusal{path + " can't be read"};
    return read_file(path);
  }

  Refusal damaged() const { return Refusal{path_ + " is damaged"}; }

  Object header() {
    uint64_t length = 0;
    for (size_t i = 0; i < 8 && i < bytes_.size(); ++i) {
      length |= static_cast<uint64_t>(static_cast<unsigned char>(bytes_[i])) << (8 * i);
    }
    if (bytes_.size() < 8 || length > bytes_.size() - 8) throw damaged();
    data_ = 8 + static_cast<int64_t>(length);
    ffi::String wrong;
    const ffi::Any parsed = ffi::json::Parse(bytes_.substr(8, length), &wrong);
    if (!wrong.empty()) throw damaged();
    return Object(parsed, path_);
  }

  std::string path_, bytes_;
  int64_t data_ = 0;
  Object header_;
};

std::vector<float> in_panels(const Factor& factor) {
  std::vector<float> packed((factor.rows + kPanel - 1) / kPanel * kPanel * factor.columns);
  for (int64_t row = 0; row < factor.rows; ++row) {
    for (int64_t column = 0; column < factor.columns; ++column) {
      packed[(row / kPanel * factor.columns + column) * kPanel + row % kPanel] =
          factor.values[row * factor.columns + column];
    }
  }
  return packed;
}

}  // namespace

Adapters::Adapters(const std::string& folder, const std::string& path) {
  const Object manifest = Object::in(folder + "/manifest.json");
  const std::string base = manifest.find<ffi::String>("adapter_base").value_or("");
  if (base.empty()) throw Refusal{"the artifact has no adapters that others could stand for"};
  const TensorFile file(path);
  if (file.said().get<ffi::String>("base") != base) {
    throw Refusal{path + " was trained on another base than the artifact's"};
  }
  int64_t wanted = 0;
  for (const auto& entry : manifest.get<ffi::json::Object>("adapters")) {
    Factor& factor = factors_[entry.first.cast<ffi::String>()];
    for (const ffi::Any& key : entry.second.cast<ffi::json::Array>()) {
      file.append(key.cast<ffi::String>(), &factor);
      ++wanted;
    }
  }
  if (wanted != file.count()) throw Refusal{path + " has weights that the artifact has not"};
}

std::optional<std::vector<float>> Adapters::in_place_of(const std::string& name,
                                                        const std::vector<int64_t>& shape) const {
  const bool panels = shape.size() == 3;
  const size_t stem = name.size() - std::min(name.size(), kPanels.size());
  const auto found = factors_.find(name.substr(stem) == kPanels ? name.substr(0, stem) : name);
  if (found == factors_.end()) return std::nullopt;
  const Factor& factor = found->second;
  const std::vector<int64_t> packed{(factor.rows + kPanel - 1) / kPanel, factor.columns, kPanel};
  const std::vector<int64_t> plain{factor.rows, factor.columns};
  if (shape != (panels ? packed : plain)) {
    throw Refusal{"the adapters have another rank than the artifact's: " + found->first};
  }
  return panels ? in_panels(factor) : factor.values;
}

}  // namespace gammac
