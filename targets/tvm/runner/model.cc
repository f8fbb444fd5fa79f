#include "model.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#ifdef __aarch64__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>

namespace gammac {
namespace ffi = tvm::ffi;

namespace {

constexpr int64_t kAbi = 1;  // targets/tvm/description.py
constexpr size_t kAlignment = 64;
constexpr DLDevice kCpu{kDLCPU, 0};
constexpr DLDataType kFloat{kDLFloat, 32, 1}, kInteger{kDLInt, 64, 1};
constexpr int kNaiveAllocator = 1, kBigCores = 1;

// Zeros that the system gives pages for only when they are written.
struct Zeros {
  size_t size = 0;
  void AllocData(DLTensor* tensor) {
    size = (ffi::GetDataSize(*tensor) + kAlignment - 1) / kAlignment * kAlignment;
    tensor->data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (tensor->data == MAP_FAILED) throw Refusal{"there is no memory for the cache"};
  }
  void FreeData(DLTensor* tensor) { munmap(tensor->data, size); }
};

// A part of a mapped file, which stays mapped as long as the process lives.
struct Mapped {
  void* data;
  void AllocData(DLTensor* tensor) { tensor->data = data; }
  void FreeData(DLTensor*) {}
};

ffi::Tensor zeros(const std::vector<int64_t>& shape, DLDataType type) {
  return ffi::Tensor::FromNDAlloc(Zeros{}, ffi::ShapeView(shape.data(), shape.size()), type, kCpu);
}

std::vector<int64_t> sizes_of(const ffi::json::Array& list) {
  std::vector<int64_t> sizes;
  for (const ffi::Any& size : list) sizes.push_back(size.cast<int64_t>());
  return sizes;
}

#ifdef __aarch64__
// Not from /proc/cpuinfo: under an emulator that is the host's.
std::set<std::string> processor_flags() {
  std::set<std::string> flags;
  if (getauxval(AT_HWCAP) & HWCAP_ASIMD) flags.insert("asimd");
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) flags.insert("asimddp");
  if (getauxval(AT_HWCAP2) & HWCAP2_I8MM) flags.insert("i8mm");
  return flags;
}
#else
std::set<std::string> processor_flags() {
  std::ifstream file("/proc/cpuinfo");
  std::string line, flag;
  while (std::getline(file, line)) {
    if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
    std::stringstream words(line.substr(line.find(':') + 1));
    std::set<std::string> flags;
    while (words >> flag) flags.insert(flag);
    return flags;
  }
  return {};
}
#endif

void demand_processor(const Object& about) {
  utsname here{};
  uname(&here);
  const std::string arch = about.get<ffi::String>("arch");
  if (arch != here.machine) throw Refusal{"the artifact is for " + arch + ", this is " + here.machine};
  if (!about.find<ffi::json::Array>("gpus").value_or(ffi::json::Array()).empty()) {
    throw Refusal{"the artifact is for GPUs, this runner is not: gammac run runs it"};
  }
  const std::set<std::string> flags = processor_flags();
  for (const ffi::Any& wanted : about.get<ffi::json::Array>("cpu_flags")) {
    const std::string flag = wanted.cast<ffi::String>();
    if (!flags.empty() && flags.count(flag) == 0) throw Refusal{"this processor lacks " + flag};
  }
}

void demand_version(const Object& about) {
  const int64_t abi = about.get<int64_t>("abi");
  if (abi != kAbi) {
    throw Refusal{"its ABI is " + std::to_string(abi) + ", this runner's is " + std::to_string(kAbi)};
  }
  const std::string built = about.get<ffi::String>("tvm");
  if (built != GAMMAC_TVM) throw Refusal{"built by TVM " + built + ", this runner has " GAMMAC_TVM};
}

void start_threads(int threads) {
  // NOTE read when the threads are made: otherwise TVM takes half the cores and pins threads to them
  setenv("TVM_NUM_THREADS", std::to_string(threads).c_str(), 1);
  setenv("TVM_BIND_THREADS", "0", 0);
  ffi::Function::GetGlobalRequired("runtime.config_threadpool")(kBigCores, threads);
}

}  // namespace

Model::Model(const std::string& folder, int threads, const std::string& adapters) {
  const Object about = Object::in(folder + "/model.json");
  demand_version(about);
  demand_processor(about);
  start_threads(threads);
  context_ = about.get<int64_t>("context");
  std::optional<Adapters> others;
  if (!adapters.empty()) others.emplace(folder, adapters);
  map_params(folder + "/model.params", about.get<ffi::json::Array>("params"), others);
  for (const ffi::Any& shape : about.get<ffi::json::Array>("caches")) {
    caches_.push_back(zeros(sizes_of(shape.cast<ffi::json::Array>()), kFloat));
  }
  char* absolute = realpath((folder + "/model.so").c_str(), nullptr);
  if (absolute == nullptr) throw Refusal{folder + " has no model.so"};
  library_ = ffi::Module::LoadFromFile(absolute);
  free(absolute);
  const ffi::Module library = library_.value();
  machine_ = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  const ffi::Module machine = machine_.value();
  machine->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, kNaiveAllocator);
  prefill_ = machine->GetFunction("prefill");
  decode_ = machine->GetFunction("decode");
  logits_ = machine->GetFunction("logits");
}

void Model::map_params(const std::string& path, const ffi::Array<ffi::Any>& entries,
                       const std::optional<Adapters>& adapters) {
  const int file = open(path.c_str(), O_RDONLY);
  struct stat status {};
  if (file < 0 || fstat(file, &status) != 0) throw Refusal{path + " can't be read"};
  const int64_t size = status.st_size;
  char* start = static_cast<char*>(mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0));
  close(file);
  if (start == MAP_FAILED) throw Refusal{path + " can't be mapped"};
#ifdef MADV_HUGEPAGE
  madvise(start, size, MADV_HUGEPAGE);  // as params.py does; a system without large pages refuses, which is fine
#endif
  for (const ffi::Any& entry : entries) {
    const Object fields(entry, "a parameter");
    const std::vector<int64_t> shape = sizes_of(fields.get<ffi::json::Array>("shape"));
    const DLDataType type = ffi::StringToDLDataType(fields.get<ffi::String>("dtype"));
    const int64_t offset = fields.get<int64_t>("offset");
    int64_t bytes = (type.bits + 7) / 8;
    for (int64_t one : shape) bytes *= one;
    if (offset < 0 || offset % kAlignment != 0 || bytes > size - offset) throw Refusal{path + " is too short"};
    const std::string name = fields.get<ffi::String>("name");
    if (const auto factor = adapters ? adapters->in_place_of(name, shape) : std::nullopt) {
      params_.push_back(zeros(shape, kFloat));
      std::copy(factor->begin(), factor->end(), static_cast<float*>(params_.back().data_ptr()));
      continue;
    }
    params_.push_back(ffi::Tensor::FromNDAlloc(Mapped{start + offset},
                                               ffi::ShapeView(shape.data(), shape.size()), type, kCpu));
  }
}

ffi::Tensor Model::read(const ffi::Function& function, const std::vector<int64_t>& tokens) {
  const int64_t count = static_cast<int64_t>(tokens.size());
  if (length_ + count > context_) {
    throw Refusal{"the context is full: the artifact takes " + std::to_string(context_) + " tokens"};
  }
  ffi::Tensor ids = zeros({count, 1}, kInteger), past = zeros({1}, kInteger);
  std::copy(tokens.begin(), tokens.end(), static_cast<int64_t*>(ids.data_ptr()));
  *static_cast<int64_t*>(past.data_ptr()) = length_;
  length_ += count;
  return function(ids, past, caches_, params_).cast<ffi::Tensor>();
}

int64_t Model::next(const std::vector<int64_t>& tokens) {
  const ffi::Tensor row = read(tokens.size() == 1 ? decode_.value() : prefill_.value(), tokens);
  const float* first = static_cast<const float*>(row.data_ptr());
  return std::max_element(first, first + row.size(1)) - first;
}

std::vector<float> Model::logits(const std::vector<int64_t>& tokens) {
  const ffi::Tensor rows = read(logits_.value(), tokens);
  const float* first = static_cast<const float*>(rows.data_ptr());
  return std::vector<float>(first, first + rows.size(0) * rows.size(1));
}

}  // namespace gammac
