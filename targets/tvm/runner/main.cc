// gammac-run FOLDER [--new N] [--threads N] [--end ID]... ID...
// gammac-run FOLDER --logits [--threads N] ID...
//
// Continues a text of token ids with the likeliest tokens, an id a line, without Python. Or writes the logits
// behind each of the ids, f32 [ids, vocabulary] as bytes.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <thread>

#include "model.h"

namespace {

constexpr const char* kUsage = "gammac-run FOLDER [--logits] [--new N] [--threads N] [--end ID]... ID...";

struct Wish {
  std::string folder;
  int64_t count = 128;
  bool logits = false;
  int threads = static_cast<int>(std::thread::hardware_concurrency());
  std::set<int64_t> ends;
  std::vector<int64_t> tokens;
};

int64_t number(const char* text) {
  char* end = nullptr;
  const int64_t value = std::strtoll(text, &end, 10);
  if (*text == '\0' || *end != '\0' || value < 0) {
    throw gammac::Refusal{std::string(text) + " is no number\n  usage: " + kUsage};
  }
  return value;
}

Wish parse(int argc, char** argv) {
  Wish wish;
  for (int i = 1; i < argc; ++i) {
    const bool option = std::strncmp(argv[i], "--", 2) == 0;
    if (std::strcmp(argv[i], "--logits") == 0) {
      wish.logits = true;
      continue;
    }
    if (option && i + 1 == argc) throw gammac::Refusal{std::string(argv[i]) + " wants a number"};
    if (std::strcmp(argv[i], "--new") == 0) {
      wish.count = number(argv[++i]);
    } else if (std::strcmp(argv[i], "--threads") == 0) {
      wish.threads = static_cast<int>(number(argv[++i]));
    } else if (std::strcmp(argv[i], "--end") == 0) {
      wish.ends.insert(number(argv[++i]));
    } else if (option) {
      throw gammac::Refusal{std::string("there is no option ") + argv[i] + "\n  usage: " + kUsage};
    } else if (wish.folder.empty()) {
      wish.folder = argv[i];
    } else {
      wish.tokens.push_back(number(argv[i]));
    }
  }
  if (wish.tokens.empty()) throw gammac::Refusal{std::string("no tokens to continue\n  usage: ") + kUsage};
  wish.threads = wish.threads < 1 ? 1 : wish.threads;
  return wish;
}

void run(const Wish& wish) {
  gammac::Model model(wish.folder, wish.threads);
  if (wish.logits) {
    const std::vector<float> found = model.logits(wish.tokens);
    std::fwrite(found.data(), sizeof(float), found.size(), stdout);
    return;
  }
  std::vector<int64_t> tokens = wish.tokens;
  const int64_t room = model.context() - static_cast<int64_t>(tokens.size());
  const int64_t count = room > 0 && room < wish.count ? room : wish.count;
  for (int64_t i = 0; i < count; ++i) {
    tokens = {model.next(tokens)};
    if (wish.ends.count(tokens[0]) != 0) return;
    std::printf("%lld\n", static_cast<long long>(tokens[0]));
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
    return 0;
  } catch (const gammac::Refusal& refusal) {
    std::fprintf(stderr, "error: %s\n", refusal.message.c_str());
  } catch (const tvm::ffi::Error& error) {
    std::fprintf(stderr, "error: %s\n", std::string(error.message()).c_str());
  }
  return 1;
}
