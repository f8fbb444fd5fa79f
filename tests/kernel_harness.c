// Calls one compiled kernel, without TVM: NAME [code:bits:AxBxC:file]...; files behind a = are written.
// KERNELS lists the kernels, as X(name) X(other).
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

#define X(name) extern int __tvm_ffi_##name(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
KERNELS
#undef X

typedef int (*Kernel)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
static const struct {
  const char* name;
  Kernel run;
} kernels[] = {
#define X(name) {#name, __tvm_ffi_##name},
    KERNELS
#undef X
};

typedef struct {
  void* sync;
  int32_t count;
} Group;

// what compiled code expects of a runtime: threads, scratch memory, and a place for errors
static int launch(int (*task)(int, Group*, void*), void* data, int count) {
  Group group = {NULL, count > 0 ? count : 3};
  for (int i = 0; i < group.count; ++i) {
    if (task(i, &group, data) != 0) return -1;
  }
  return 0;
}

static void* workspace(int type, int id, uint64_t size, int code, int bits) {
  (void)type, (void)id, (void)code, (void)bits;
  return aligned_alloc(64, (size + 63) / 64 * 64);
}

static int release(int type, int id, void* data) {
  (void)type, (void)id;
  free(data);
  return 0;
}

extern void *__TVMBackendParallelLaunch, *__TVMBackendAllocWorkspace, *__TVMBackendFreeWorkspace;
#pragma weak __TVMBackendParallelLaunch
#pragma weak __TVMBackendAllocWorkspace
#pragma weak __TVMBackendFreeWorkspace

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; ++i) fputs(parts[i] ? parts[i] : "", stderr);
  fputs("\n", stderr);
}

static size_t size_of(const DLTensor* tensor) {
  size_t size = tensor->dtype.bits / 8;
  for (int i = 0; i < tensor->ndim; ++i) size *= (size_t)tensor->shape[i];
  return size;
}

static void fail(const char* what, const char* which) {
  fprintf(stderr, "%s %s\n", what, which);
  exit(2);
}

static const char* read_operand(char* text, DLTensor* tensor, int64_t* shape) {
  memset(tensor, 0, sizeof(*tensor));
  tensor->device.device_type = kDLCPU;
  tensor->dtype.code = (uint8_t)atoi(strtok(text, ":"));
  tensor->dtype.bits = (uint8_t)atoi(strtok(NULL, ":"));
  tensor->dtype.lanes = 1;
  tensor->shape = shape;
  char *sizes = strtok(NULL, ":"), *path = strtok(NULL, ":");
  for (char* end = sizes - 1; end < path - 1; ++tensor->ndim) shape[tensor->ndim] = strtol(end + 1, &end, 10);
  const size_t size = size_of(tensor);
  // a kernel asks for bytes ahead of those that it uses
  tensor->data = aligned_alloc(64, (size + 8192) / 64 * 64);
  FILE* file = fopen(path, "rb");
  if (file == NULL || fread(tensor->data, 1, size, file) != size) fail("can't read", path);
  fclose(file);
  return path;
}

int main(int argc, char** argv) {
  static DLTensor tensors[16];
  static int64_t shapes[16][4];
  static TVMFFIAny arguments[16];
  const char* paths[16];
  const int count = argc - 2;
  if (&__TVMBackendParallelLaunch != NULL) __TVMBackendParallelLaunch = (void*)launch;
  if (&__TVMBackendAllocWorkspace != NULL) __TVMBackendAllocWorkspace = (void*)workspace;
  if (&__TVMBackendFreeWorkspace != NULL) __TVMBackendFreeWorkspace = (void*)release;
  for (int i = 0; i < count; ++i) {
    const int written = argv[i + 2][0] == '=';
    const char* path = read_operand(argv[i + 2] + written, &tensors[i], shapes[i]);
    paths[i] = written ? path : NULL;
    arguments[i].type_index = kTVMFFIDLTensorPtr;
    arguments[i].v_ptr = &tensors[i];
  }
  for (size_t i = 0; i < sizeof(kernels) / sizeof(kernels[0]); ++i) {
    if (strcmp(kernels[i].name, argv[1]) != 0) continue;
    TVMFFIAny result;
    memset(&result, 0, sizeof(result));
    if (kernels[i].run(NULL, arguments, count, &result) != 0) return 1;
    for (int k = 0; k < count; ++k) {
      FILE* file = paths[k] ? fopen(paths[k], "wb") : NULL;
      if (file == NULL) continue;
      fwrite(tensors[k].data, 1, size_of(&tensors[k]), file);
      fclose(file);
    }
    return 0;
  }
  fail("no kernel", argv[1]);
}
