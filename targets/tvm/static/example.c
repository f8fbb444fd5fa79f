// example model.params [--threads N] [--new N] ID...
// example model.params [--threads N] --logits ID...
//
// Continues token ids with the likeliest ones, an id a line. --logits reads the ids one by one instead, and
// writes what is behind each of them, then what a prefill of all of them gives: f32 [ids + 1, vocabulary] as bytes.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gammac_model.h"

static void demand(int code) {
  if (code == GAMMAC_OK) return;
  fprintf(stderr, "error: %s\n", gammac_message(code));
  exit(1);
}

static int likeliest(const float* logits) {
  int best = 0;
  for (int i = 1; i < GAMMAC_VOCAB_SIZE; ++i) {
    if (logits[i] > logits[best]) best = i;
  }
  return best;
}

static void generate(gammac_model* model, const int32_t* tokens, int count, int wanted) {
  const float* logits;
  demand(gammac_prefill(model, tokens, count, &logits));
  for (int i = 0; i < wanted; ++i) {
    const int token = likeliest(logits);
    printf("%d\n", token);
    if (i + 1 < wanted) demand(gammac_decode(model, token, &logits));
  }
}

static void write_logits(gammac_model* model, const int32_t* tokens, int count) {
  const float* logits;
  for (int i = 0; i < count; ++i) {
    demand(gammac_decode(model, tokens[i], &logits));
    fwrite(logits, sizeof(float), GAMMAC_VOCAB_SIZE, stdout);
  }
  gammac_reset(model);
  demand(gammac_prefill(model, tokens, count, &logits));
  fwrite(logits, sizeof(float), GAMMAC_VOCAB_SIZE, stdout);
}

int main(int argc, char** argv) {
  int count = 0, wanted = 16, threads = 1, bytes = 0, wrong = 0;
  int32_t* tokens = calloc((size_t)argc, sizeof(int32_t));
  gammac_model* model;
  if (tokens == NULL) demand(GAMMAC_NO_MEMORY);
  for (int i = 2; i < argc; ++i) {
    const int more = i + 1 < argc;
    if (strcmp(argv[i], "--logits") == 0) {
      bytes = 1;
    } else if (strcmp(argv[i], "--threads") == 0 && more) {
      threads = atoi(argv[++i]);
    } else if (strcmp(argv[i], "--new") == 0 && more) {
      wanted = atoi(argv[++i]);
    } else {
      wrong |= strncmp(argv[i], "--", 2) == 0;
      tokens[count++] = atoi(argv[i]);
    }
  }
  if (count == 0 || wrong) {
    fprintf(stderr, "usage: %s model.params [--threads N] [--new N | --logits] ID...\n", argv[0]);
    return 1;
  }
  demand(gammac_open(argv[1], threads, &model));
  if (bytes) {
    write_logits(model, tokens, count);
  } else {
    generate(model, tokens, count, wanted);
  }
  gammac_close(model);
  free(tokens);
  return 0;
}
