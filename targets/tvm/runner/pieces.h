// How byte-level tokenizers cut a text before they merge bytes: by letters, digits, spaces and the rest.
#pragma once

#include <string>
#include <vector>

namespace gammac {

// The two cuts in use, which are regular expressions in tokenizer.json.
struct Cut {
  // of cl100k and its like (Llama 3, Qwen): a sign goes with the letters behind it, ends of lines apart
  bool modern = false;
  // digits that may stand in one piece; 0: any number
  int digits = 0;
};

// Characters of a UTF-8 text: where each begins, and one more for the end. Throws Refusal for other bytes.
struct Characters {
  explicit Characters(const std::string& text);
  std::vector<char32_t> values;
  std::vector<size_t> starts;
};

// Whether a text is certainly its own normal form C: no character in it could join one before it.
bool surely_composed(const std::string& text);

// Each digit becomes a piece of its own.
std::vector<std::string> cut_digits(const std::string& text);

// The pieces of a text; joined they are the text.
std::vector<std::string> cut(const std::string& text, const Cut& how);

}  // namespace gammac
