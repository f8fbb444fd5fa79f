#include "tokenizer.h"

#include <utility>

namespace gammac {
namespace ffi = tvm::ffi;
using ffi::json::Array;

namespace {

// The regular expressions of modern cuts, as tokenizer.json spells them; they differ in their digits.
constexpr const char* kModernHead = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}";
constexpr const char* kModernTail =
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

[[noreturn]] void refuse(const std::string& why) {
  throw Refusal{"this runner can't read the model's tokenizer (" + why + "): give token ids instead of --prompt"};
}

std::string text_of(const std::optional<ffi::String>& found) { return found ? std::string(*found) : ""; }

// A byte stands in tokenizer.json as itself if it can be printed, else as the next free character from 256.
std::unordered_map<char32_t, char> bytes_of_characters() {
  std::unordered_map<char32_t, char> bytes;
  char32_t next = 256;
  for (int b = 0; b < 256; ++b) {
    const bool printed = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    bytes[printed ? static_cast<char32_t>(b) : next++] = static_cast<char>(b);
  }
  return bytes;
}

std::string as_bytes(const std::string& spelled) {
  static const std::unordered_map<char32_t, char> table = bytes_of_characters();
  std::string bytes;
  for (const char32_t c : Characters(spelled).values) {
    const auto found = table.find(c);
    // the spelling of an added token, which is no bytes' spelling
    if (found == table.end()) return spelled;
    bytes += found->second;
  }
  return bytes;
}

uint64_t pair_of(int64_t a, int64_t b) { return static_cast<uint64_t>(a) << 32 | static_cast<uint64_t>(b); }

std::pair<std::string, std::string> halves_of(const ffi::Any& merge) {
  if (const auto pair = merge.try_cast<Array>()) {
    return {(*pair)[0].cast<ffi::String>(), (*pair)[1].cast<ffi::String>()};
  }
  const std::string text = merge.cast<ffi::String>();
  const size_t space = text.find(' ');
  return {text.substr(0, space), text.substr(space + 1)};
}

}  // namespace

Tokenizer::Tokenizer(const std::string& folder) {
  const Object file = Object::in(folder + "/tokenizer.json");
  if (file.object("normalizer")) {
    const std::string kind = text_of(file.object("normalizer")->find<ffi::String>("type"));
    if (kind != "NFC") refuse("its normalizer is " + kind);
    composed_ = true;
  }
  read_model(file.object("model").value_or(file));
  read_cuts(file);
  read_added(file);
  read_frame(file);
  read_ends(folder);
}

void Tokenizer::read_model(const Object& model) {
  const std::string kind = text_of(model.find<ffi::String>("type"));
  if (kind != "BPE") refuse("its model is " + (kind.empty() ? "unknown" : kind));
  if (model.find<bool>("byte_fallback").value_or(false)) refuse("it falls back to bytes");
  whole_first_ = model.find<bool>("ignore_merges").value_or(false);
  for (const auto& [spelled, id] : model.get<ffi::json::Object>("vocab")) {
    std::string bytes = as_bytes(spelled.cast<ffi::String>());
    bytes_[id.cast<int64_t>()] = bytes;
    ids_[std::move(bytes)] = id.cast<int64_t>();
  }
  int64_t rank = 0;
  for (const ffi::Any& merge : model.get<Array>("merges")) {
    const auto [left, right] = halves_of(merge);
    const std::string a = as_bytes(left), b = as_bytes(right);
    merges_[pair_of(ids_.at(a), ids_.at(b))] = {rank++, ids_.at(a + b)};
  }
}

void Tokenizer::read_cuts(const Object& file) {
  const auto first = file.object("pre_tokenizer");
  if (!first) refuse("it does not cut texts");
  Array steps;
  if (text_of(first->find<ffi::String>("type")) == "Sequence") {
    steps = first->get<Array>("pretokenizers");
  } else {
    steps.push_back(first->fields());
  }
  bool byte_level = false;
  for (const ffi::Any& one : steps) {
    const Object step(one, "pre_tokenizer");
    const std::string kind = text_of(step.find<ffi::String>("type"));
    if (kind == "ByteLevel") {
      if (step.find<bool>("add_prefix_space").value_or(false)) refuse("it adds a space");
      byte_level = true;
    } else if (kind == "Digits" && step.find<bool>("individual_digits").value_or(false)) {
      digits_apart_ = true;
    } else if (kind == "Split" && step.object("pattern")) {
      const std::string pattern = text_of(step.object("pattern")->find<ffi::String>("Regex"));
      const bool one_digit = pattern == std::string(kModernHead) + kModernTail;
      if (!one_digit && pattern != std::string(kModernHead) + "{1,3}" + kModernTail) refuse("it cuts by " + pattern);
      cut_ = {true, one_digit ? 1 : 3};
    } else {
      refuse("it cuts by " + kind);
    }
  }
  if (!byte_level) refuse("its characters are no bytes");
}

void Tokenizer::read_added(const Object& file) {
  for (const ffi::Any& one : file.find<Array>("added_tokens").value_or(Array())) {
    const Object token(one, "added_tokens");
    for (const char* strips : {"lstrip", "rstrip", "single_word"}) {
      if (token.find<bool>(strips).value_or(false)) refuse(std::string("a token has ") + strips);
    }
    const std::string content = token.get<ffi::String>("content");
    const int64_t id = token.get<int64_t>("id");
    added_[content] = id;
    bytes_[id] = token.find<bool>("special").value_or(false) ? "" : content;
  }
}

void Tokenizer::read_frame(const Object& file) {
  const auto last = file.object("post_processor");
  if (!last) return;
  Array steps;
  if (text_of(last->find<ffi::String>("type")) == "Sequence") {
    steps = last->get<Array>("processors");
  } else {
    steps.push_back(last->fields());
  }
  for (const ffi::Any& one : steps) {
    const Object step(one, "post_processor");
    bool behind = false;
    for (const ffi::Any& part : step.find<Array>("single").value_or(Array())) {
      const auto special = Object(part, "post_processor").object("SpecialToken");
      if (special) {
        (behind ? after_ : before_).push_back(added_.at(special->get<ffi::String>("id")));
      } else {
        behind = true;
      }
    }
  }
}

void Tokenizer::read_ends(const std::string& folder) {
  try {
    const Object config = Object::in(folder + "/generation_config.json");
    if (const auto one = config.find<int64_t>("eos_token_id")) ends_.insert(*one);
    for (const ffi::Any& id : config.find<Array>("eos_token_id").value_or(Array())) ends_.insert(id.cast<int64_t>());
  } catch (const Refusal&) {
    // a model may lack the file; then only --end ends its texts
  }
}

std::vector<int64_t> Tokenizer::encode(const std::string& text) const {
  std::vector<int64_t> tokens = before_;
  size_t plain = 0;
  for (size_t at = 0; at < text.size();) {
    const std::pair<const std::string, int64_t>* longest = nullptr;
    for (const auto& added : added_) {
      const bool here = !added.first.empty() && text.compare(at, added.first.size(), added.first) == 0;
      if (here && (longest == nullptr || added.first.size() > longest->first.size())) longest = &added;
    }
    if (longest == nullptr) {
      ++at;
      continue;
    }
    encode_plain(text.substr(plain, at - plain), tokens);
    tokens.push_back(longest->second);
    plain = at += longest->first.size();
  }
  encode_plain(text.substr(plain), tokens);
  tokens.insert(tokens.end(), after_.begin(), after_.end());
  return tokens;
}

void Tokenizer::encode_plain(const std::string& text, std::vector<int64_t>& out) const {
  if (composed_ && !surely_composed(text)) {
    throw Refusal{"the prompt may not be in Unicode's normal form C, which the model wants: give token ids"};
  }
  for (const std::string& part : digits_apart_ ? cut_digits(text) : std::vector<std::string>{text}) {
    for (const std::string& piece : cut(part, cut_)) encode_piece(piece, out);
  }
}

void Tokenizer::encode_piece(const std::string& piece, std::vector<int64_t>& out) const {
  if (const auto whole = ids_.find(piece); whole_first_ && whole != ids_.end()) {
    out.push_back(whole->second);
    return;
  }
  std::vector<int64_t> parts;
  for (const char byte : piece) parts.push_back(ids_.at(std::string(1, byte)));
  for (;;) {
    const Merge* best = nullptr;
    size_t where = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      const auto found = merges_.find(pair_of(parts[i], parts[i + 1]));
      if (found != merges_.end() && (best == nullptr || found->second.rank < best->rank)) {
        best = &found->second;
        where = i;
      }
    }
    if (best == nullptr) break;
    parts[where] = best->made;
    parts.erase(parts.begin() + where + 1);
  }
  out.insert(out.end(), parts.begin(), parts.end());
}

const std::string& Tokenizer::bytes_of(int64_t token) const {
  static const std::string nothing;
  const auto found = bytes_.find(token);
  return found == bytes_.end() ? nothing : found->second;
}

}  // namespace gammac
