#include "partition.h"

#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/core/named_data_map.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <unordered_map>

namespace movd {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::TensorImpl;
using executorch::runtime::Error;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::Result;
using executorch::runtime::Span;
using executorch::runtime::TensorLayout;

struct DType {
  ScalarType scalar_type;
  uint64_t item_bytes;
};

const std::map<std::string, DType>& DTypes() {
  static const std::map<std::string, DType> types = {
      {"f32", {ScalarType::Float, 4}}, {"f16", {ScalarType::Half, 2}}, {"bf16", {ScalarType::BFloat16, 2}},
      {"i64", {ScalarType::Long, 8}},  {"i32", {ScalarType::Int, 4}},  {"i8", {ScalarType::Char, 1}},
      {"u8", {ScalarType::Byte, 1}},   {"bool", {ScalarType::Bool, 1}}};
  return types;
}

std::vector<uint8_t> RowMajor(size_t rank) {
  std::vector<uint8_t> order(rank);
  std::iota(order.begin(), order.end(), uint8_t{0});
  return order;
}

// Gives ExecuTorch the bytes of a mapped program without a copy.
class MappedLoader final : public executorch::runtime::DataLoader {
 public:
  explicit MappedLoader(const Mapping& mapping) : mapping_(mapping) {}

  Result<FreeableBuffer> load(size_t offset, size_t size, const SegmentInfo&) const override {
    if (offset > mapping_.size_bytes() || size > mapping_.size_bytes() - offset) return Error::InvalidProgram;
    return FreeableBuffer(mapping_.data() + offset, size, nullptr);
  }

  Result<size_t> size() const override { return mapping_.size_bytes(); }

 private:
  const Mapping& mapping_;
};

// Gives ExecuTorch the tensors of the mapped weights files by key, as the manifest's tables place them.
class MappedWeights final : public executorch::runtime::NamedDataMap {
 public:
  void Add(Mapping mapping, const std::vector<ConstantRecord>& constants) {
    for (const ConstantRecord& constant : constants) {
      by_key_.emplace(constant.key, Entry{&constant, mappings_.size(), RowMajor(constant.shape.size())});
      keys_.push_back(&constant.key);
    }
    mappings_.push_back(std::move(mapping));
  }

  Result<const TensorLayout> get_tensor_layout(std::string_view key) const override {
    const Entry* entry = Find(key);
    if (entry == nullptr) return Error::NotFound;
    const std::vector<int32_t>& shape = entry->constant->shape;
    return TensorLayout::create(Span<const int32_t>(shape.data(), shape.size()),
                                Span<const uint8_t>(entry->order.data(), entry->order.size()),
                                DTypes().at(entry->constant->dtype).scalar_type);
  }

  Result<FreeableBuffer> get_data(std::string_view key) const override {
    const Entry* entry = Find(key);
    if (entry == nullptr) return Error::NotFound;
    const ConstantRecord& constant = *entry->constant;
    const Mapping& mapping = mappings_[entry->mapping];
    if (constant.offset_bytes > mapping.size_bytes() ||
        constant.size_bytes > mapping.size_bytes() - constant.offset_bytes) {
      return Error::InvalidExternalData;
    }
    return FreeableBuffer(mapping.data() + constant.offset_bytes, constant.size_bytes, nullptr);
  }

  Error load_data_into(std::string_view key, void* buffer, size_t size) const override {
    Result<FreeableBuffer> data = get_data(key);
    if (!data.ok()) return data.error();
    if (size > data->size()) return Error::InvalidArgument;
    std::memcpy(buffer, data->data(), size);
    return Error::Ok;
  }

  Result<uint32_t> get_num_keys() const override { return static_cast<uint32_t>(keys_.size()); }

  Result<const char*> get_key(uint32_t index) const override {
    if (index >= keys_.size()) return Error::InvalidArgument;
    return keys_[index]->c_str();
  }

 private:
  struct Entry {
    const ConstantRecord* constant;
    size_t mapping;
    std::vector<uint8_t> order;
  };

  const Entry* Find(std::string_view key) const {
    const auto found = by_key_.find(std::string(key));
    return found == by_key_.end() ? nullptr : &found->second;
  }

  std::vector<Mapping> mappings_;
  std::vector<const std::string*> keys_;
  std::unordered_map<std::string, Entry> by_key_;
};

// Memory for a method's own structures: any number of blocks, released together with the method.
class BlockAllocator final : public executorch::runtime::MemoryAllocator {
 public:
  BlockAllocator() : MemoryAllocator(0, nullptr) {}

  void* allocate(size_t size, size_t alignment = kDefaultAlignment) override {
    blocks_.push_back(std::make_unique<uint8_t[]>(size + alignment));
    const auto address = reinterpret_cast<uintptr_t>(blocks_.back().get());
    return reinterpret_cast<void*>((address + alignment - 1) / alignment * alignment);
  }

 private:
  std::vector<std::unique_ptr<uint8_t[]>> blocks_;
};

}  // namespace

uint64_t TensorRecord::SizeBytes() const {
  uint64_t size_bytes = DTypes().at(dtype).item_bytes;
  for (int32_t length : shape) size_bytes *= static_cast<uint64_t>(length);
  return size_bytes;
}

struct LoadedPartition::State {
  explicit State(const PartitionRecord& partition) : record(partition) {}

  [[noreturn]] void Fail(const std::string& message) const { throw PartitionError(record.name, message); }

  void Check(const std::string& doing, Error error) const {
    if (error != Error::Ok) Fail(doing + " failed (ExecuTorch: " + executorch::runtime::to_string(error) + ")");
  }

  // The program must take and return just what the manifest says: its buffers are sized by the manifest.
  void CheckTensor(const char* kind, size_t index, const TensorRecord& wanted,
                   Result<executorch::runtime::TensorInfo> found) const {
    Check(std::string("reading ") + kind + " " + std::to_string(index), found.error());
    const auto sizes = found->sizes();
    if (found->scalar_type() != DTypes().at(wanted.dtype).scalar_type ||
        !std::equal(sizes.begin(), sizes.end(), wanted.shape.begin(), wanted.shape.end())) {
      Fail(std::string(kind) + " " + std::to_string(index) + " of the program is not " + wanted.name +
           " as the manifest describes it");
    }
  }

  // Destroyed from the last to the first: the method before the memory and the files it points into.
  const PartitionRecord& record;
  Mapping program_file;
  std::unique_ptr<MappedLoader> loader;
  MappedWeights weights;
  std::optional<executorch::runtime::Program> program;
  std::vector<std::unique_ptr<uint8_t[]>> planned;
  std::vector<Span<uint8_t>> planned_spans;
  std::unique_ptr<executorch::runtime::HierarchicalAllocator> planned_memory;
  BlockAllocator method_memory;
  BlockAllocator run_memory;
  std::unique_ptr<executorch::runtime::MemoryManager> memory;
  std::optional<executorch::runtime::Method> method;
  std::vector<std::vector<uint8_t>> orders;
  std::vector<std::vector<int32_t>> shapes;
  std::vector<std::unique_ptr<TensorImpl>> tensors;
};

LoadedPartition::LoadedPartition(const FileStore& files, const PartitionRecord& record)
    : state_(std::make_unique<State>(record)) {
  static std::once_flag once;
  std::call_once(once, executorch::runtime::runtime_init);
  State& state = *state_;
  state.program_file = files.Map(record.program);
  state.loader = std::make_unique<MappedLoader>(state.program_file);
  for (const WeightsRecord& weights : record.weights) state.weights.Add(files.Map(weights.path), weights.constants);
  auto program = executorch::runtime::Program::load(
      state.loader.get(), executorch::runtime::Program::Verification::InternalConsistency);
  state.Check("loading the program", program.error());
  state.program.emplace(std::move(*program));

  auto meta = state.program->method_meta("forward");
  state.Check("reading the program", meta.error());
  if (meta->num_inputs() != record.inputs.size() || meta->num_outputs() != record.outputs.size()) {
    state.Fail("the program takes " + std::to_string(meta->num_inputs()) + " tensors and returns " +
               std::to_string(meta->num_outputs()) + ", which is not what the manifest says");
  }
  for (size_t i = 0; i < record.inputs.size(); ++i) {
    state.CheckTensor("input", i, record.inputs[i], meta->input_tensor_meta(i));
  }
  for (size_t i = 0; i < record.outputs.size(); ++i) {
    state.CheckTensor("output", i, record.outputs[i], meta->output_tensor_meta(i));
  }

  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    auto size_bytes = meta->memory_planned_buffer_size(i);
    state.Check("planning memory", size_bytes.error());
    state.planned.push_back(std::make_unique<uint8_t[]>(*size_bytes));
    state.planned_spans.emplace_back(state.planned.back().get(), static_cast<size_t>(*size_bytes));
  }
  state.planned_memory = std::make_unique<executorch::runtime::HierarchicalAllocator>(
      Span<Span<uint8_t>>(state.planned_spans.data(), state.planned_spans.size()));
  state.memory = std::make_unique<executorch::runtime::MemoryManager>(&state.method_memory, state.planned_memory.get(),
                                                                      &state.run_memory);
  auto method = state.program->load_method("forward", state.memory.get(), nullptr, &state.weights);
  state.Check("initialising the program", method.error());
  state.method.emplace(std::move(*method));
}

LoadedPartition::~LoadedPartition() = default;

void LoadedPartition::Run(const std::vector<const void*>& inputs, const std::vector<void*>& outputs) {
  State& state = *state_;
  const PartitionRecord& record = state.record;
  state.tensors.clear();
  state.shapes.clear();
  state.orders.clear();
  for (size_t i = 0; i < inputs.size(); ++i) {
    const TensorRecord& tensor = record.inputs[i];
    state.shapes.push_back(tensor.shape);
    state.orders.push_back(RowMajor(tensor.shape.size()));
    state.tensors.push_back(std::make_unique<TensorImpl>(
        DTypes().at(tensor.dtype).scalar_type, static_cast<ssize_t>(tensor.shape.size()), state.shapes.back().data(),
        const_cast<void*>(inputs[i]), state.orders.back().data()));
    const executorch::runtime::EValue value{executorch::aten::Tensor(state.tensors.back().get())};
    state.Check("setting input " + tensor.name, state.method->set_input(value, i));
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    const TensorRecord& tensor = record.outputs[i];
    state.Check("setting output " + tensor.name,
                state.method->set_output_data_ptr(outputs[i], tensor.SizeBytes(), i));
  }
  state.Check("running", state.method->execute());
}

}  // namespace movd
