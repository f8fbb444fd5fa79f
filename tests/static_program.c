// A program with two models: what a refusal leaves as it was, and that models don't disturb each other.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gammac_model.h"

#define DEMAND(condition)                                            \
  do {                                                               \
    if (!(condition)) {                                              \
      fprintf(stderr, "line %d: not %s\n", __LINE__, #condition);    \
      exit(1);                                                       \
    }                                                                \
  } while (0)

static const size_t row = sizeof(float) * GAMMAC_VOCAB_SIZE;
static float kept[GAMMAC_VOCAB_SIZE];
static int32_t many[GAMMAC_CONTEXT + 1];

int main(int argc, char** argv) {
  const int32_t prompt[] = {3, 14, 15}, wrong[] = {3, GAMMAC_VOCAB_SIZE};
  const float* logits = NULL;
  gammac_model *one = NULL, *other = NULL;
  DEMAND(argc == 2);
  DEMAND(gammac_open(argv[1], 2, &one) == GAMMAC_OK);
  DEMAND(gammac_open(argv[1], 1, &other) == GAMMAC_OK);

  DEMAND(gammac_prefill(one, prompt, 3, &logits) == GAMMAC_OK);
  DEMAND(gammac_decode(one, 9, &logits) == GAMMAC_OK);
  memcpy(kept, logits, row);

  // a row of the same tokens with another model's between them
  gammac_reset(one);
  DEMAND(gammac_length(one) == 0);
  DEMAND(gammac_prefill(one, prompt, 3, &logits) == GAMMAC_OK);
  DEMAND(gammac_prefill(other, prompt, 2, &logits) == GAMMAC_OK);
  DEMAND(gammac_decode(other, 1, &logits) == GAMMAC_OK);
  DEMAND(memcmp(kept, logits, row) != 0);

  // refusals read nothing
  DEMAND(gammac_prefill(one, many, GAMMAC_CONTEXT - 2, &logits) == GAMMAC_CONTEXT_FULL);
  DEMAND(gammac_prefill(one, wrong, 2, &logits) == GAMMAC_BAD_TOKEN);
  DEMAND(gammac_prefill(one, prompt, 0, &logits) == GAMMAC_BAD_TOKEN);
  DEMAND(gammac_decode(one, -1, &logits) == GAMMAC_BAD_TOKEN);
  DEMAND(gammac_length(one) == 3);
  DEMAND(gammac_decode(one, 9, &logits) == GAMMAC_OK);
  DEMAND(memcmp(kept, logits, row) == 0);

  // the context can be filled to the last token
  DEMAND(gammac_prefill(one, many, GAMMAC_CONTEXT - 4, &logits) == GAMMAC_OK);
  DEMAND(gammac_length(one) == GAMMAC_CONTEXT);
  DEMAND(gammac_decode(one, 9, &logits) == GAMMAC_CONTEXT_FULL);

  DEMAND(strcmp(gammac_message(GAMMAC_OK), "no error") == 0);
  DEMAND(strcmp(gammac_message(GAMMAC_KERNEL_FAILED), "a kernel failed") == 0);
  DEMAND(strcmp(gammac_message(-99), "unknown error") == 0);
  gammac_close(one);
  gammac_close(other);
  gammac_close(NULL);
  return 0;
}
