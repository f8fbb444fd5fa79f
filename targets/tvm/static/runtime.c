// A model: parameters mapped, tensors at their places, kernels called one after the other.
#define _DEFAULT_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "gammac_model.h"
#include "tables.h"

#define PUBLIC __attribute__((visibility("default")))
#define TABLES (&gammac_model_tables)

enum { ALIGNMENT = 64, SAMPLES = 256 };  // targets/tvm/static/__init__.py samples alike

struct gammac_model {
  char* params;
  char* memory;  // as calloc gave it: caches, then the arena
  DLTensor* tensors;
  int64_t* sizes;
  gammac_pool* pool;
  int length;
};

// ---- parameters ----

// FNV-1a of blocks that lie evenly in the file: another model's differ, and few pages are read.
static uint64_t fingerprint(const char* bytes, size_t size) {
  const uint64_t blocks = (size + ALIGNMENT - 1) / ALIGNMENT;
  uint64_t hash = 0xcbf29ce484222325u;
  for (uint64_t i = 0; i < SAMPLES; ++i) {
    const size_t start = (size_t)(blocks * i / SAMPLES) * ALIGNMENT;
    for (size_t k = start; k < start + ALIGNMENT && k < size; ++k) {
      hash = (hash ^ (uint8_t)bytes[k]) * 0x100000001b3u;
    }
  }
  return hash;
}

static int map_params(gammac_model* model, const char* path) {
  const int file = open(path, O_RDONLY);
  struct stat status;
  if (file < 0) return GAMMAC_UNREADABLE;
  const int known = fstat(file, &status) == 0;
  const int fits = known && (uint64_t)status.st_size == TABLES->params_size;
  void* start = fits ? mmap(NULL, TABLES->params_size, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
  close(file);
  if (known && !fits) return GAMMAC_FOREIGN;
  if (start == MAP_FAILED) return GAMMAC_UNREADABLE;
  model->params = start;
#ifdef MADV_HUGEPAGE
  madvise(start, TABLES->params_size, MADV_HUGEPAGE);  // a system without large pages refuses, which is fine
#endif
  return fingerprint(start, TABLES->params_size) == TABLES->fingerprint ? GAMMAC_OK : GAMMAC_FOREIGN;
}

// ---- tensors ----

static int lay_out(gammac_model* model) {
  const size_t count = (size_t)TABLES->tensor_count;
  model->memory = calloc(TABLES->caches_size + TABLES->arena_size + ALIGNMENT, 1);
  model->tensors = calloc(count, sizeof(DLTensor));
  model->sizes = calloc(count * GAMMAC_DIMS, sizeof(int64_t));
  if (model->memory == NULL || model->tensors == NULL || model->sizes == NULL) return GAMMAC_NO_MEMORY;
  char* caches = model->memory + (ALIGNMENT - (uintptr_t)model->memory % ALIGNMENT) % ALIGNMENT;
  char* const places[GAMMAC_PLACES] = {model->params, caches, caches + TABLES->caches_size};
  for (size_t i = 0; i < count; ++i) {
    const gammac_tensor* from = &TABLES->tensors[i];
    DLTensor* to = &model->tensors[i];
    to->shape = memcpy(model->sizes + i * GAMMAC_DIMS, from->sizes, sizeof(from->sizes));
    to->data = places[from->place] + from->offset;
    to->device.device_type = kDLCPU;
    to->ndim = from->dims;
    to->dtype = (DLDataType){from->code, from->bits, 1};
  }
  return GAMMAC_OK;
}

PUBLIC int gammac_open(const char* path, int threads, gammac_model** model) {
  *model = NULL;
  if (!gammac_processor_fits(TABLES->features, TABLES->feature_count)) return GAMMAC_PROCESSOR;
  *model = calloc(1, sizeof(gammac_model));
  if (*model == NULL) return GAMMAC_NO_MEMORY;
  int code = map_params(*model, path);
  if (code == GAMMAC_OK) code = lay_out(*model);
  if (code == GAMMAC_OK) {
    (*model)->pool = gammac_pool_new(threads < 1 ? 1 : threads);
    if ((*model)->pool == NULL) code = GAMMAC_NO_MEMORY;
  }
  if (code != GAMMAC_OK) {
    gammac_close(*model);
    *model = NULL;
  }
  return code;
}

PUBLIC void gammac_close(gammac_model* model) {
  if (model == NULL) return;
  gammac_pool_free(model->pool);
  if (model->params != NULL) munmap(model->params, TABLES->params_size);
  free(model->memory);
  free(model->tensors);
  free(model->sizes);
  free(model);
}

// ---- runs ----

static int run_steps(gammac_model* model, const gammac_program* program) {
  gammac_pool_use(model->pool);
  for (int i = 0; i < program->count; ++i) {
    const gammac_step* step = &program->steps[i];
    TVMFFIAny arguments[GAMMAC_MOST_ARGUMENTS], result;
    memset(arguments, 0, step->count * sizeof(TVMFFIAny));
    memset(&result, 0, sizeof(result));
    for (uint32_t k = 0; k < step->count; ++k) {
      arguments[k].type_index = kTVMFFIDLTensorPtr;
      arguments[k].v_ptr = &model->tensors[TABLES->arguments[step->first + k]];
    }
    if (step->run(NULL, arguments, (int32_t)step->count, &result) != 0) return GAMMAC_KERNEL_FAILED;
  }
  return GAMMAC_OK;
}

static void set_rows(gammac_model* model, int rows) {
  for (int i = 0; i < TABLES->tensor_count; ++i) {
    if (TABLES->tensors[i].sizes[0] == 0) model->sizes[i * GAMMAC_DIMS] = rows;
  }
}

static int read_tokens(gammac_model* model, const int32_t* tokens, int count, const float** logits) {
  const gammac_program* program = count == 1 ? &TABLES->decode : &TABLES->prefill;
  int64_t* ids = model->tensors[program->ids].data;
  for (int i = 0; i < count; ++i) ids[i] = tokens[i];
  *(int64_t*)model->tensors[program->past].data = model->length;
  if (count > 1) set_rows(model, count);
  const int code = run_steps(model, program);
  if (code == GAMMAC_OK) model->length += count;
  *logits = model->tensors[program->logits].data;
  return code;
}

PUBLIC int gammac_prefill(gammac_model* model, const int32_t* tokens, int count, const float** logits) {
  if (count < 1) return GAMMAC_BAD_TOKEN;
  if (count > GAMMAC_CONTEXT - model->length) return GAMMAC_CONTEXT_FULL;
  for (int i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= GAMMAC_VOCAB_SIZE) return GAMMAC_BAD_TOKEN;
  }
  int code = GAMMAC_OK;
  for (int done = 0; done < count && code == GAMMAC_OK; done += TABLES->chunk) {
    const int left = count - done;
    code = read_tokens(model, tokens + done, left < TABLES->chunk ? left : TABLES->chunk, logits);
  }
  return code;
}

PUBLIC int gammac_decode(gammac_model* model, int32_t token, const float** logits) {
  return gammac_prefill(model, &token, 1, logits);
}

PUBLIC int gammac_length(const gammac_model* model) { return model->length; }

PUBLIC void gammac_reset(gammac_model* model) { model->length = 0; }

PUBLIC const char* gammac_message(int code) {
  static const char* const messages[] = {
      "no error",
      "the parameters can't be read",
      "the parameters are not those of this library: another size, or other bytes",
      "this processor lacks instructions that the library uses",
      "there is no memory, or no more threads",
      "the context is full",
      "there is no such token",
      "a kernel failed",
  };
  return code <= 0 && code > -(int)(sizeof(messages) / sizeof(messages[0])) ? messages[-code] : "unknown error";
}
