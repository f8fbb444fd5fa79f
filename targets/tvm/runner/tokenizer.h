// Byte-level byte-pair encoding out of an artifact's tokenizer.json: GPT-2, OPT, Llama 3, Qwen and their like.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "json.h"
#include "pieces.h"

namespace gammac {

class Tokenizer {
 public:
  // Throws Refusal for a folder without a tokenizer, and for a tokenizer of another kind.
  explicit Tokenizer(const std::string& folder);

  // Token ids of a text, special tokens in it and around it included.
  std::vector<int64_t> encode(const std::string& text) const;

  // The bytes of a token: nothing for special ones. A character may lie across several.
  const std::string& bytes_of(int64_t token) const;

  // Tokens that end a text.
  const std::set<int64_t>& ends() const { return ends_; }

 private:
  struct Merge {
    int64_t rank, made;
  };

  void read_model(const Object& model);
  void read_cuts(const Object& file);
  void read_added(const Object& file);
  void read_frame(const Object& file);
  void read_ends(const std::string& folder);
  void encode_plain(const std::string& text, std::vector<int64_t>& out) const;
  void encode_piece(const std::string& piece, std::vector<int64_t>& out) const;

  std::unordered_map<std::string, int64_t> ids_;
  std::unordered_map<int64_t, std::string> bytes_;
  std::unordered_map<uint64_t, Merge> merges_;
  std::map<std::string, int64_t> added_;
  std::vector<int64_t> before_, after_;
  std::set<int64_t> ends_;
  Cut cut_;
  bool digits_apart_ = false, whole_first_ = false, composed_ = false;
};

}  // namespace gammac
