// gammac-run FOLDER --prompt TEXT [--new N] [--threads N] [--end ID]... [--adapters FILE]
// gammac-run FOLDER --tokenize TEXT
// gammac-run FOLDER ID... [--new N] [--threads N] [--end ID]...
// gammac-run FOLDER --logits [--threads N] ID...
//
// Continues a text with the likeliest tokens, without Python; or token ids, an id a line. --tokenize prints the
// ids of a text, --logits writes what is behind each of the ids, f32 [ids, vocabulary] as bytes. --adapters FILE
// takes a file's adapters in place of the artifact's.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <set>
#include <stdexcept>
#include <thread>

#include "model.h"
#include "tokenizer.h"

namespace {

constexpr const char* kUsage =
    "gammac-run FOLDER (--prompt TEXT | --tokenize TEXT | [--logits] ID...) [--new N] [--threads N] [--end ID]... "
    "[--adapters FILE]";

struct Wish {
  std::string folder, adapters;
  std::optional<std::string> prompt;
  int64_t count = 128;
  bool logits = false;
  int threads = static_cast<int>(std::thread::hardware_concurrency());
  bool tokenize = false;
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
    if (option && i + 1 == argc) throw gammac::Refusal{std::string(argv[i]) + " wants a value"};
    if (std::strcmp(argv[i], "--prompt") == 0 || std::strcmp(argv[i], "--tokenize") == 0) {
      wish.tokenize = std::strcmp(argv[i], "--tokenize") == 0;
      wish.prompt = argv[++i];
    } else if (std::strcmp(argv[i], "--new") == 0) {
      wish.count = number(argv[++i]);
    } else if (std::strcmp(argv[i], "--adapters") == 0) {
      wish.adapters = argv[++i];
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
  if (wish.tokens.empty() != wish.prompt.has_value()) {
    throw gammac::Refusal{std::string("give either --prompt or token ids to continue\n  usage: ") + kUsage};
  }
  wish.threads = wish.threads < 1 ? 1 : wish.threads;
  return wish;
}

void run(Wish wish) {
  std::optional<gammac::Tokenizer> tokenizer;
  if (wish.prompt) {
    tokenizer.emplace(wish.folder);
    wish.tokens = tokenizer->encode(*wish.prompt);
    wish.ends.insert(tokenizer->ends().begin(), tokenizer->ends().end());
    if (wish.tokenize) {
      for (const int64_t token : wish.tokens) std::printf("%lld\n", static_cast<long long>(token));
      return;
    }
    if (wish.tokens.empty()) throw gammac::Refusal{"the prompt is empty"};
  }
  gammac::Model model(wish.folder, wish.threads, wish.adapters);
  if (wish.logits) {
    const std::vector<float> found = model.logits(wish.tokens);
    std::fwrite(found.data(), sizeof(float), found.size(), stdout);
    return;
  }
  const int64_t room = model.context() - static_cast<int64_t>(wish.tokens.size());
  const int64_t count = room > 0 && room < wish.count ? room : wish.count;
  for (int64_t i = 0; i < count; ++i) {
    wish.tokens = {model.next(wish.tokens)};
    const int64_t token = wish.tokens[0];
    if (wish.ends.count(token) != 0) break;
    const std::string& text = tokenizer ? tokenizer->bytes_of(token) : std::to_string(token) + "\n";
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  }
  if (tokenizer) std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
    return 0;
  } catch (const gammac::Refusal& refusal) {
    std::fprintf(stderr, "error: %s\n", refusal.message.c_str());
  } catch (const std::out_of_range&) {
    std::fprintf(stderr, "error: tokenizer.json is damaged: it names a token that it lacks\n");
  } catch (const tvm::ffi::Error& error) {
    std::fprintf(stderr, "error: %s\n", std::string(error.message()).c_str());
  }
  return 1;
}
