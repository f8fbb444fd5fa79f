// The ONNX Runtime side of gammac::MatMulAnyBits: attributes and sizes are checked here, so that no kernel
// reads out of bounds, and the work is cut into tasks. Errors return as OrtStatus; nothing throws.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "any_bits.h"
#include "ort_abi.h"

using namespace any_bits;

namespace {

#define RETURN_IF(expression)                          \
  do {                                                 \
    if (OrtStatus* failed = (expression)) return failed; \
  } while (0)

constexpr size_t kTaskBytes = 48 << 10;     // packed weights of one task when few rows are multiplied
constexpr size_t kSerialWork = 192 << 10;   // weights x rows below which waking threads costs more
constexpr size_t kManyRows = 32;            // from here the activations are quantised in parallel
constexpr int64_t kLargest = int64_t{1} << 31;  // of N and K: keeps every size product in range

// The two names the kernel goes by; what ONNX Runtime holds on to must outlive every session.
OrtCustomOp g_symmetric, g_with_zeros;

bool has_zeros(const OrtCustomOp* op) { return op == &g_with_zeros; }

struct Kernel {
  ort::Api api;
  Shape shape{};
  const Isa* isa;
};

OrtStatus* invalid(const ort::Api& api, const char* what, int64_t found, int64_t expected) {
  char message[200];
  snprintf(message, sizeof message, "gammac::MatMulAnyBits: %s is %lld, expected %lld", what,
           static_cast<long long>(found), static_cast<long long>(expected));
  return api.error(message);
}

OrtStatus* outside(const ort::Api& api, const char* what, int64_t found, const char* allowed) {
  char message[200];
  snprintf(message, sizeof message, "gammac::MatMulAnyBits: %s is %lld, allowed: %s", what,
           static_cast<long long>(found), allowed);
  return api.error(message);
}

OrtStatus* read_shape(const ort::Api& api, const OrtKernelInfo* info, bool asymmetric, Shape* s) {
  int64_t n, k, bits, group;
  RETURN_IF(api.attribute(info, "N", &n));
  RETURN_IF(api.attribute(info, "K", &k));
  RETURN_IF(api.attribute(info, "bits", &bits));
  RETURN_IF(api.attribute(info, "group", &group));
  if (n < 1 || n > kLargest) return outside(api, "attribute N", n, "1 to 2^31");
  if (k < 1 || k > kLargest) return outside(api, "attribute K", k, "1 to 2^31");
  if (bits < 1 || bits > 8) return outside(api, "attribute bits", bits, "1 to 8");
  if (group < 1 || (group % 32 && group != k)) return outside(api, "attribute group", group, "K or a multiple of 32");
  s->n = static_cast<size_t>(n);
  s->k = static_cast<size_t>(k);
  s->bits = static_cast<int>(bits);
  s->group = static_cast<size_t>(group);
  s->asymmetric = asymmetric;
  s->strips = (s->n + kStrip - 1) / kStrip;
  s->chunks = (s->k + kChunk - 1) / kChunk;
  s->groups = group >= k ? 1 : (s->k + s->group - 1) / s->group;
  s->block = s->groups == 1 || s->group % kChunk == 0 ? kChunk : 32;
  s->blocks = s->chunks * (kChunk / s->block);
  s->blocks_per_group = s->groups == 1 ? SIZE_MAX : s->group / s->block;
  return nullptr;
}

// The instruction set that GAMMAC_ISA names, or the best this processor has.
OrtStatus* choose_isa(const ort::Api& api, const Isa** out) {
  static const Isa* const known[] = {
#if defined(__x86_64__)
      &kAvx512, &kAvx2,
#endif
      &kPortable};
  const char* wanted = getenv("GAMMAC_ISA");
  for (const Isa* isa : known) {
    if (wanted && *wanted && strcmp(wanted, isa->name) != 0) continue;
    if (!isa->supported()) continue;
    *out = isa;
    return nullptr;
  }
  return api.error("gammac::MatMulAnyBits: GAMMAC_ISA names no instruction set that this processor has");
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi* table, const OrtKernelInfo* info, void** out) {
  const ort::Api api(table);
  Shape shape{};
  const Isa* isa = nullptr;
  RETURN_IF(read_shape(api, info, has_zeros(op), &shape));
  RETURN_IF(choose_isa(api, &isa));
  auto* kernel = static_cast<Kernel*>(malloc(sizeof(Kernel)));
  if (!kernel) return api.error("gammac::MatMulAnyBits: out of memory");
  *kernel = Kernel{api, shape, isa};
  *out = kernel;
  return nullptr;
}

void destroy(void* kernel) { free(kernel); }

constexpr size_t kMaxRank = 16;

struct Dims {
  int64_t size[kMaxRank];
  size_t rank;
  int64_t count() const {
    int64_t total = 1;
    for (size_t i = 0; i < rank; i++) total *= size[i];
    return total;
  }
};

OrtStatus* read_dims(const ort::Api& api, const OrtValue* value, Dims* out) {
  OrtShape* shape = nullptr;
  RETURN_IF(api.shape(value, &shape));
  OrtStatus* failed = api.rank(shape, &out->rank);
  const int64_t rank = static_cast<int64_t>(out->rank);
  if (!failed && out->rank > kMaxRank) failed = outside(api, "the rank of an input", rank, "up to 16");
  if (!failed) failed = api.dimensions(shape, out->size, out->rank);
  api.release_shape(shape);
  return failed;
}

OrtStatus* read_input(const ort::Api& api, OrtKernelContext* context, size_t index, const char* what, Dims* dims,
                      const void** data) {
  const OrtValue* value = nullptr;
  RETURN_IF(api.input(context, index, &value));
  if (!value) return outside(api, what, 0, "an input that is present");
  RETURN_IF(read_dims(api, value, dims));
  void* found = nullptr;
  RETURN_IF(api.data(value, &found));
  *data = found;
  return nullptr;
}

// An input of weights: its number of elements follows from the attributes.
OrtStatus* read_weights(const ort::Api& api, OrtKernelContext* context, size_t index, const char* what, size_t expected,
                        const void** data) {
  Dims dims;
  RETURN_IF(read_input(api, context, index, what, &dims, data));
  const int64_t wanted = static_cast<int64_t>(expected);
  return dims.count() == wanted ? nullptr : invalid(api, what, dims.count(), wanted);
}

OrtStatus* read_operands(const Kernel& kernel, OrtKernelContext* context, Call* c, Dims* dims) {
  const ort::Api& api = kernel.api;
  const Shape& s = kernel.shape;
  const void *x = nullptr, *codes = nullptr, *scales = nullptr, *zeros = nullptr;
  RETURN_IF(read_input(api, context, 0, "input x", dims, &x));
  if (dims->rank == 0) return outside(api, "the rank of input x", 0, "1 or more");
  const int64_t last = dims->size[dims->rank - 1], k = static_cast<int64_t>(s.k);
  if (last != k) return invalid(api, "the last dimension of input x", last, k);
  RETURN_IF(read_weights(api, context, 1, "the size of input codes", s.codes_bytes(), &codes));
  RETURN_IF(read_weights(api, context, 2, "the size of input scales", s.scales_count(), &scales));
  if (s.asymmetric) RETURN_IF(read_weights(api, context, 3, "the size of input zeros", s.zeros_bytes(), &zeros));
  c->shape = s;
  c->x = static_cast<const float*>(x);
  c->codes = static_cast<const uint8_t*>(codes);
  c->scales = static_cast<const uint16_t*>(scales);
  c->zeros = static_cast<const uint8_t*>(zeros);
  c->m = static_cast<size_t>(dims->count() / k);
  return nullptr;
}

// How a call is cut: `strips` weight rows / 4 by `rows` activation rows, weights innermost.
struct Plan {
  const Call* call;
  const Isa* isa;
  size_t strips, rows, tasks_across;
};

void multiply_task(void* user, size_t task) {
  const Plan& plan = *static_cast<const Plan*>(user);
  const Call& c = *plan.call;
  const size_t first = task % plan.tasks_across * plan.strips, row = task / plan.tasks_across * plan.rows;
  const size_t last = first + plan.strips, end = row + plan.rows;
  plan.isa->run(c, first, last < c.shape.strips ? last : c.shape.strips, row, end < c.m ? end : c.m);
}

void quantize_task(void* user, size_t task) {
  const Plan& plan = *static_cast<const Plan*>(user);
  const size_t row = task * kManyRows, end = row + kManyRows, m = plan.call->m;
  plan.isa->quantize(*plan.call, row, end < m ? end : m);
}

OrtStatus* multiply(const Kernel& kernel, OrtKernelContext* context, const Call& c) {
  const Shape& s = c.shape;
  const Isa& isa = *kernel.isa;
  Plan plan{&c, &isa, s.strips, c.m < isa.rows ? c.m : isa.rows, 1};
  if (c.m < kManyRows) {
    isa.quantize(c, 0, c.m);
  } else {
    RETURN_IF(kernel.api.parallel_for(context, quantize_task, (c.m + kManyRows - 1) / kManyRows, &plan));
  }
  if (s.n * s.k * c.m > kSerialWork) {
    // Weights of a fixed size per task, less when many rows make each of them long.
    const size_t tiles = kTaskBytes / (s.chunks * s.chunk_bytes() * isa.tile * (1 + plan.rows / 8)) + 1;
    plan.strips = tiles * isa.tile;
    plan.tasks_across = (s.strips + plan.strips - 1) / plan.strips;
  }
  const size_t tasks = plan.tasks_across * ((c.m + plan.rows - 1) / plan.rows);
  if (tasks == 1) {
    multiply_task(&plan, 0);
    return nullptr;
  }
  return kernel.api.parallel_for(context, multiply_task, tasks, &plan);
}

OrtStatus* compute(void* state, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  const Shape& s = kernel.shape;
  Call c{};
  Dims dims;
  RETURN_IF(read_operands(kernel, context, &c, &dims));
  dims.size[dims.rank - 1] = static_cast<int64_t>(s.n);
  OrtValue* y = nullptr;
  void* data = nullptr;
  RETURN_IF(kernel.api.output(context, dims.size, dims.rank, &y));
  RETURN_IF(kernel.api.data(y, &data));
  if (c.m == 0) return nullptr;
  const size_t q_bytes = s.chunks * kChunk * c.m, block_bytes = s.blocks * c.m * 4;
  auto* scratch = static_cast<uint8_t*>(malloc(q_bytes + 2 * block_bytes + 64));
  if (!scratch) return kernel.api.error("gammac::MatMulAnyBits: out of memory");
  uint8_t* aligned = scratch + (64 - reinterpret_cast<uintptr_t>(scratch) % 64);
  c.y = static_cast<float*>(data);
  c.q = reinterpret_cast<int8_t*>(aligned);
  c.x_scale = reinterpret_cast<float*>(aligned + q_bytes);
  c.negative = reinterpret_cast<int32_t*>(aligned + q_bytes + block_bytes);
  OrtStatus* failed = multiply(kernel, context, c);
  free(scratch);
  return failed;
}

const char* name(const OrtCustomOp* op) { return has_zeros(op) ? "MatMulAnyBitsZeros" : "MatMulAnyBits"; }
const char* provider(const OrtCustomOp*) { return "CPUExecutionProvider"; }
size_t input_count(const OrtCustomOp* op) { return has_zeros(op) ? 4 : 3; }
size_t output_count(const OrtCustomOp*) { return 1; }
int input_type(const OrtCustomOp*, size_t i) { return i == 0 ? ort::kFloat : i == 2 ? ort::kFloat16 : ort::kUint8; }
int output_type(const OrtCustomOp*, size_t) { return ort::kFloat; }
int required(const OrtCustomOp*, size_t) { return 0; }
int default_memory(const OrtCustomOp*, size_t) { return 0; }
int none(const OrtCustomOp*) { return 0; }
int start_version(const OrtCustomOp*) { return 1; }
int end_version(const OrtCustomOp*) { return INT32_MAX; }

void describe(OrtCustomOp* op) {
  op->version = ort::kApiVersion;
  op->name = name;
  op->execution_provider = provider;
  op->input_type = input_type;
  op->input_count = input_count;
  op->output_type = output_type;
  op->output_count = output_count;
  op->destroy = destroy;
  op->input_kind = op->output_kind = required;
  op->input_memory = default_memory;
  op->variadic_input_min = op->variadic_input_same = none;
  op->variadic_output_min = op->variadic_output_same = none;
  op->create_kernel_v2 = create;
  op->compute_v2 = compute;
  op->start_version = start_version;
  op->end_version = end_version;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* table = base->get_api(ort::kApiVersion);
  if (!table) return nullptr;  // older than 1.17: the model's own function serves instead
  const ort::Api api(table);
  static OrtCustomOpDomain* domain = nullptr;  // sessions keep pointers to it: made once, never released
  if (!domain) {
    describe(&g_symmetric);
    describe(&g_with_zeros);
    OrtCustomOpDomain* made = nullptr;
    RETURN_IF(api.create_domain("gammac", &made));
    RETURN_IF(api.add_op(made, &g_symmetric));
    RETURN_IF(api.add_op(made, &g_with_zeros));
    domain = made;
  }
  return api.add_domain(options, domain);
}
