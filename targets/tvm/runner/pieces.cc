#include "pieces.h"

#include <algorithm>
#include <cstring>

#include "json.h"

namespace gammac {
namespace {

struct Range {
  char32_t first, last;
};

// kLetters, kNumbers, kMarks, kUncomposed: sorted ranges, made by build_runner; see unicode.py
#include "unicode.inc"

template <size_t N>
bool within(const Range (&ranges)[N], char32_t c) {
  const Range* end = ranges + N;
  const Range* found = std::lower_bound(ranges, end, c, [](const Range& r, char32_t v) { return r.last < v; });
  return found != end && found->first <= c;
}

bool is_letter(char32_t c) { return within(kLetters, c); }
bool is_number(char32_t c) { return within(kNumbers, c); }
bool is_line_end(char32_t c) { return c == '\r' || c == '\n'; }

// Unicode's White_Space
bool is_space(char32_t c) {
  return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_other(char32_t c) { return !is_space(c) && !is_letter(c) && !is_number(c); }

class Cutter {
 public:
  Cutter(const std::vector<char32_t>& text, const Cut& how) : text_(text), how_(how) {}

  // Where the piece that begins at `at` ends. The alternatives are tried in their order.
  size_t end_of_piece(size_t at) const {
    if (const size_t end = contraction(at); end > at) return end;
    if (const size_t end = how_.modern ? modern_word(at) : run(after_space(at), is_letter); end > at) return end;
    if (const size_t end = numbers(at); end > at) return end;
    if (size_t end = run(after_space(at), is_other); end > at) {
      while (how_.modern && end < text_.size() && is_line_end(text_[end])) ++end;
      return end;
    }
    return spaces(at);
  }

 private:
  // One space before a run belongs to it.
  size_t after_space(size_t at) const { return text_[at] == ' ' ? at + 1 : at; }

  // The end of a run of one kind that begins at `at`; 0 where there is none.
  template <typename Kind>
  size_t run(size_t at, Kind kind) const {
    size_t end = at;
    while (end < text_.size() && kind(text_[end])) ++end;
    return end == at ? 0 : end;
  }

  size_t contraction(size_t at) const {
    if (text_[at] != '\'') return 0;
    for (const char* ending : {"s", "t", "re", "ve", "m", "ll", "d"}) {
      const size_t length = std::strlen(ending);
      if (at + length >= text_.size()) continue;
      bool same = true;
      for (size_t i = 0; i < length; ++i) {
        const char32_t c = text_[at + 1 + i];
        const char32_t lower = how_.modern && c >= 'A' && c <= 'Z' ? c + 32 : c;
        same = same && lower == static_cast<char32_t>(ending[i]);
      }
      if (same) return at + 1 + length;
    }
    return 0;
  }

  // Letters, with one sign or space before them.
  size_t modern_word(size_t at) const {
    const char32_t c = text_[at];
    const bool lead = !is_line_end(c) && !is_letter(c) && !is_number(c);
    return run(lead ? at + 1 : at, is_letter);
  }

  size_t numbers(size_t at) const {
    const size_t end = run(how_.modern ? at : after_space(at), is_number);
    return how_.digits > 0 && end > at ? std::min(end, at + how_.digits) : end;
  }

  // White space; the last of it is left to the word behind, and modern cuts end it behind the ends of lines.
  size_t spaces(size_t at) const {
    const size_t end = run(at, is_space);
    if (how_.modern) {
      for (size_t i = end; i > at; --i) {
        if (is_line_end(text_[i - 1])) return i;
      }
    }
    return end == text_.size() || end == at + 1 ? end : end - 1;
  }

  const std::vector<char32_t>& text_;
  const Cut& how_;
};

}  // namespace

Characters::Characters(const std::string& text) {
  for (size_t at = 0; at < text.size();) {
    const unsigned char lead = text[at];
    const size_t length = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    char32_t value = length == 1 ? lead : lead & (0x7F >> length);
    bool right = (lead < 0x80 || (lead >= 0xC2 && lead < 0xF5)) && at + length <= text.size();
    for (size_t i = 1; right && i < length; ++i) {
      const unsigned char next = text[at + i];
      right = (next & 0xC0) == 0x80;
      value = value << 6 | (next & 0x3F);
    }
    if (!right) throw Refusal{"the prompt is not UTF-8"};
    values.push_back(value);
    starts.push_back(at);
    at += length;
  }
  starts.push_back(text.size());
}

bool surely_composed(const std::string& text) {
  bool mark = false;
  for (const char32_t c : Characters(text).values) {
    const bool before = mark;
    mark = within(kMarks, c);
    // two marks in a row may stand in the wrong order
    if (within(kUncomposed, c) || (before && mark)) return false;
  }
  return true;
}

std::vector<std::string> cut_digits(const std::string& text) {
  const Characters characters(text);
  std::vector<std::string> pieces;
  bool open = false;
  for (size_t i = 0; i < characters.values.size(); ++i) {
    const std::string one = text.substr(characters.starts[i], characters.starts[i + 1] - characters.starts[i]);
    const bool digit = is_number(characters.values[i]);
    if (open && !digit) {
      pieces.back() += one;
    } else {
      pieces.push_back(one);
    }
    open = !digit;
  }
  return pieces;
}

std::vector<std::string> cut(const std::string& text, const Cut& how) {
  const Characters characters(text);
  const Cutter cutter(characters.values, how);
  std::vector<std::string> pieces;
  for (size_t at = 0; at < characters.values.size();) {
    const size_t end = cutter.end_of_piece(at);
    pieces.push_back(text.substr(characters.starts[at], characters.starts[end] - characters.starts[at]));
    at = end;
  }
  return pieces;
}

}  // namespace gammac
