// The part of ONNX Runtime's C ABI that a custom operator needs, by slot number.
// The function table is append-only, so a slot never changes meaning: this header needs no copy of
// onnxruntime_c_api.h and the library loads in any ONNX Runtime of API version 17 (1.17) or later.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtValue;
struct OrtShape;  // OrtTensorTypeAndShapeInfo
struct OrtCustomOp;

struct OrtApi {
  void* slot[275];
};

struct OrtApiBase {
  const OrtApi* (*get_api)(uint32_t version);
  const char* (*version_string)();
};

// Field order is the ABI. Every hook up to the last one is present, since ONNX Runtime reads them by
// `version`; those left null are optional there.
struct OrtCustomOp {
  uint32_t version;
  void* (*create_kernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*name)(const OrtCustomOp*);
  const char* (*execution_provider)(const OrtCustomOp*);
  int (*input_type)(const OrtCustomOp*, size_t);
  size_t (*input_count)(const OrtCustomOp*);
  int (*output_type)(const OrtCustomOp*, size_t);
  size_t (*output_count)(const OrtCustomOp*);
  void (*compute)(void*, OrtKernelContext*);
  void (*destroy)(void*);
  int (*input_kind)(const OrtCustomOp*, size_t);
  int (*output_kind)(const OrtCustomOp*, size_t);
  int (*input_memory)(const OrtCustomOp*, size_t);
  int (*variadic_input_min)(const OrtCustomOp*);
  int (*variadic_input_same)(const OrtCustomOp*);
  int (*variadic_output_min)(const OrtCustomOp*);
  int (*variadic_output_same)(const OrtCustomOp*);
  OrtStatus* (*create_kernel_v2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*compute_v2)(void*, OrtKernelContext*);
  void* infer_shape;
  int (*start_version)(const OrtCustomOp*);
  int (*end_version)(const OrtCustomOp*);
  void* unused[4];  // in-place and alias hooks
};

}  // extern "C"

namespace ort {

constexpr uint32_t kApiVersion = 17;
constexpr int kFloat = 1, kUint8 = 2, kFloat16 = 10;  // ONNXTensorElementDataType
constexpr int kInvalidArgument = 2;  // OrtErrorCode

// The typed face of the table: one member per slot in use.
class Api {
 public:
  explicit Api(const OrtApi* table) : table_(table) {}

  OrtStatus* error(const char* message) const {
    return at<OrtStatus* (*)(int, const char*)>(0)(kInvalidArgument, message);
  }
  OrtStatus* create_domain(const char* name, OrtCustomOpDomain** out) const {
    return at<OrtStatus* (*)(const char*, OrtCustomOpDomain**)>(26)(name, out);
  }
  OrtStatus* add_op(OrtCustomOpDomain* domain, const OrtCustomOp* op) const {
    return at<OrtStatus* (*)(OrtCustomOpDomain*, const OrtCustomOp*)>(27)(domain, op);
  }
  OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return at<OrtStatus* (*)(OrtSessionOptions*, OrtCustomOpDomain*)>(28)(options, domain);
  }
  OrtStatus* data(const OrtValue* value, void** out) const {
    return at<OrtStatus* (*)(OrtValue*, void**)>(51)(const_cast<OrtValue*>(value), out);
  }
  OrtStatus* rank(const OrtShape* shape, size_t* out) const {
    return at<OrtStatus* (*)(const OrtShape*, size_t*)>(61)(shape, out);
  }
  OrtStatus* dimensions(const OrtShape* shape, int64_t* out, size_t count) const {
    return at<OrtStatus* (*)(const OrtShape*, int64_t*, size_t)>(62)(shape, out, count);
  }
  OrtStatus* shape(const OrtValue* value, OrtShape** out) const {
    return at<OrtStatus* (*)(const OrtValue*, OrtShape**)>(65)(value, out);
  }
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, int64_t* out) const {
    return at<OrtStatus* (*)(const OrtKernelInfo*, const char*, int64_t*)>(86)(info, name, out);
  }
  OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** out) const {
    return at<OrtStatus* (*)(const OrtKernelContext*, size_t, const OrtValue**)>(90)(context, index, out);
  }
  OrtStatus* output(OrtKernelContext* context, const int64_t* dims, size_t rank, OrtValue** out) const {
    return at<OrtStatus* (*)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(91)(
        context, 0, dims, rank, out);
  }
  void release_shape(OrtShape* shape) const { at<void (*)(OrtShape*)>(99)(shape); }
  OrtStatus* parallel_for(const OrtKernelContext* context, void (*body)(void*, size_t), size_t total,
                          void* user) const {
    using Call = OrtStatus* (*)(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*);
    return at<Call>(274)(context, body, total, 0, user);
  }

 private:
  template <class F>
  F at(int slot) const {
    return reinterpret_cast<F>(table_->slot[slot]);
  }
  const OrtApi* table_;
};

}  // namespace ort
