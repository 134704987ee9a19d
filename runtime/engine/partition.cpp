#include "partition.h"

#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <mutex>
#include <optional>

#include "mapped.h"

namespace movd {
namespace {

using executorch::aten::TensorImpl;

constexpr size_t kAlignment = 64;

using Block = std::shared_ptr<uint8_t>;

Block NewBlock(size_t size_bytes) {
  return Block(static_cast<uint8_t*>(::operator new(size_bytes, std::align_val_t{kAlignment})),
               [](uint8_t* block) { ::operator delete(block, std::align_val_t{kAlignment}); });
}

// Memory for a method's own structures: any number of blocks, which whoever holds `blocks` releases. ExecuTorch's XNNPACK
// backend takes its address for the identity of a program, and gives programs of one identity one workspace.
class BlockAllocator final : public executorch::runtime::MemoryAllocator {
 public:
  BlockAllocator() : MemoryAllocator(0, nullptr) {}

  void* allocate(size_t size, size_t alignment = kDefaultAlignment) override {
    if (alignment > kAlignment) return nullptr;
    blocks->push_back(NewBlock(size));
    size_bytes += size;
    return blocks->back().get();
  }

  std::vector<Block>* blocks = nullptr;
  uint64_t size_bytes = 0;  // of all blocks so far
};

thread_local std::string last_log;  // the last that ExecuTorch had to say on this thread

void KeepLog(et_timestamp_t, et_pal_log_level_t, const char*, const char*, size_t, const char* message, size_t length) {
  last_log.assign(message, length);
}

void StartRuntime() {
  static std::once_flag once;
  std::call_once(once, [] {
    // What went wrong is said in the error; the rest of the log is nothing to a user. register_pal would do, but it
    // logs a line about the implementation that the Python wheel has registered before.
    const_cast<executorch::runtime::PalImpl*>(executorch::runtime::get_pal_impl())->emit_log_message = KeepLog;
    executorch::runtime::runtime_init();
#ifdef __GLIBC__
    // Buffers go back to the system when they are freed. By default glibc raises the size from which they do with each
    // that is freed, and keeps tens of megabytes that two threads have left in each other's arenas.
    mallopt(M_MMAP_THRESHOLD, 64 * 1024);
#endif
  });
}

}  // namespace

uint64_t ItemBytes(const std::string& dtype) {
  const auto found = DTypes().find(dtype);
  return found == DTypes().end() ? 0 : found->second.item_bytes;
}

uint64_t TensorRecord::SizeBytes() const {
  uint64_t size_bytes = ItemBytes(dtype);
  for (int32_t length : shape) size_bytes *= static_cast<uint64_t>(length);
  return size_bytes;
}

std::shared_ptr<uint8_t> PlannedMemory::BlockFor(size_t place, size_t size_bytes) {
  if (blocks_.size() <= place) blocks_.resize(place + 1);
  if (blocks_[place].size_bytes < size_bytes) blocks_[place] = {NewBlock(size_bytes), size_bytes};
  return blocks_[place].data;
}

struct Workspace::State {
  BlockAllocator allocator;
};

Workspace::Workspace() : state_(std::make_unique<State>()) {}

Workspace::~Workspace() = default;

struct LoadedPartition::State {
  explicit State(const PartitionRecord& partition) : record(partition) {}

  [[noreturn]] void Fail(const std::string& message) const { throw PartitionError(record.name, message); }

  void Check(const std::string& doing, Error error) const {
    if (error == Error::Ok) return;
    const std::string reason = last_log.empty() ? "" : ", " + last_log;
    Fail(doing + " failed (ExecuTorch: " + executorch::runtime::to_string(error) + reason + ")");
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

  void MapFiles(const FileStore& files) {
    program_file = files.Map(record.program);
    loader = std::make_unique<MappedLoader>(program_file);
    for (const WeightsRecord& file : record.weights) weights.Add(files.Map(file.path), file.constants);
  }

  void LoadProgram(PlannedMemory& planned) {
    auto loaded = executorch::runtime::Program::load(loader.get(),
                                                     executorch::runtime::Program::Verification::InternalConsistency);
    Check("loading the program", loaded.error());
    program.emplace(std::move(*loaded));
    auto meta = program->method_meta(record.method.c_str());
    Check("reading the program", meta.error());
    if (meta->num_inputs() != record.inputs.size() || meta->num_outputs() != record.outputs.size()) {
      Fail("the program takes " + std::to_string(meta->num_inputs()) + " tensors and returns " +
           std::to_string(meta->num_outputs()) + ", which is not what the manifest says");
    }
    for (size_t i = 0; i < record.inputs.size(); ++i) {
      CheckTensor("input", i, record.inputs[i], meta->input_tensor_meta(i));
    }
    for (size_t i = 0; i < record.outputs.size(); ++i) {
      CheckTensor("output", i, record.outputs[i], meta->output_tensor_meta(i));
    }
    for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
      auto size_bytes = meta->memory_planned_buffer_size(i);
      Check("planning memory", size_bytes.error());
      blocks.push_back(planned.BlockFor(i, static_cast<size_t>(*size_bytes)));
      planned_spans.emplace_back(blocks.back().get(), static_cast<size_t>(*size_bytes));
    }
    planned_memory = std::make_unique<executorch::runtime::HierarchicalAllocator>(
        Span<Span<uint8_t>>(planned_spans.data(), planned_spans.size()));
    run_memory.blocks = &run_blocks;
    memory = std::make_unique<executorch::runtime::MemoryManager>(&workspace->state_->allocator, planned_memory.get(),
                                                                  &run_memory);
  }

  // The part of loading that a trace shows as one event.
  static void Add(const LoadContext& context, const PartitionRecord& record, What what, double start_s,
                  uint64_t bytes = 0) {
    context.trace.Add({what, record.name, Lane::kLoader, start_s, context.trace.Now() - start_s, bytes,
                       context.books.held_bytes()});
  }

  void FindPacked(const LoadContext& context) {
    const double start_s = context.trace.Now();
    uint64_t read_bytes = 0;
    packed = context.packed_cache.Find(context.packed->key, context.slab, read_bytes);
    if (read_bytes > 0) Add(context, record, What::kVerify, start_s, read_bytes);
  }

  // Puts the weights of all that share them into one file, all there at once: it is complete with the last.
  void Pack(const LoadContext& context) {
    const Taken taken(context.books, record.load_bytes - record.held_bytes, "packing " + record.name);
    const double start_s = context.trace.Now();
    const auto pack = [&](const std::string& path) {
      std::vector<std::unique_ptr<LoadedPartition>> sharers;
      for (const PartitionRecord* sharer : context.packed->partitions) {
        sharers.emplace_back(new LoadedPartition(*sharer, path, context));
      }
    };
    if (context.packed_cache.Make(context.packed->key, pack, context.slab)) FindPacked(context);
    Add(context, record, What::kPack, start_s);
  }

  void Read(const LoadContext& context) const {
    const double start_s = context.trace.Now();
    uint64_t read_bytes = packed ? ReadThrough(*packed, context.slab) : 0;
    for (size_t i = 0; i < weights.mappings().size() && !packed; ++i) {
      read_bytes += ReadThrough(weights.mappings()[i], context.slab);
    }
    Add(context, record, What::kRead, start_s, read_bytes);
  }

  void CheckUnchanged() const {
    program_file.CheckUnchanged();
    for (const Mapping& mapping : weights.mappings()) mapping.CheckUnchanged();
    if (packed) packed->CheckUnchanged();
  }

  // Initialises the method; packed weights come from, or go to, the file at `packed_path` unless that is empty.
  void LoadMethod(const std::string& packed_path) {
    executorch::runtime::BackendOptions<3> options;
    options.set_option("workspace_sharing_mode", 1);  // one for each program, of which Workspace makes more
    options.set_option("weight_cache_enabled", !packed_path.empty());
    if (!packed_path.empty()) options.set_option("packed_cache_path", packed_path.c_str());
    executorch::runtime::LoadBackendOptionsMap backends;
    Check("setting options", backends.set_options("XnnpackBackend", options.view()));
    workspace->state_->allocator.blocks = &blocks;
    auto loaded = program->load_method(record.method.c_str(), memory.get(), nullptr, &weights, &backends);
    workspace->state_->allocator.blocks = nullptr;
    Check("initialising the program", loaded.error());
    method.emplace(std::move(*loaded));
  }

  // Destroyed from the last to the first: the method before the memory and the files it points into.
  const PartitionRecord& record;
  std::shared_ptr<Workspace> workspace;
  Mapping program_file;
  std::unique_ptr<MappedLoader> loader;
  MappedWeights weights;
  std::optional<Mapping> packed;
  ForeignMappings packed_in_use;  // by XNNPACK
  std::optional<executorch::runtime::Program> program;
  std::vector<Block> blocks;
  std::vector<Block> run_blocks;
  std::vector<Span<uint8_t>> planned_spans;
  std::unique_ptr<executorch::runtime::HierarchicalAllocator> planned_memory;
  BlockAllocator run_memory;
  std::unique_ptr<executorch::runtime::MemoryManager> memory;
  std::optional<executorch::runtime::Method> method;
  std::vector<std::vector<uint8_t>> orders;
  std::vector<std::vector<int32_t>> shapes;
  std::vector<std::unique_ptr<TensorImpl>> tensors;
};

LoadedPartition::LoadedPartition(const PartitionRecord& record, std::shared_ptr<Workspace> workspace,
                                 const LoadContext& context)
    : state_(std::make_unique<State>(record)) {
  StartRuntime();
  last_log.clear();
  State& state = *state_;
  state.workspace = std::move(workspace);
  state.MapFiles(context.files);
  state.LoadProgram(context.planned);
  if (context.packed != nullptr) state.FindPacked(context);
  if (context.packed != nullptr && !state.packed) state.Pack(context);
  state.Read(context);
  const double start_s = context.trace.Now();
  state.LoadMethod(state.packed ? state.packed->path() : "");
  for (const Mapping& mapping : state.weights.mappings()) mapping.LetGo();
  if (state.packed) state.packed_in_use = ForeignMappings(state.packed->path());
  state.packed_in_use.Populate();
  state.weights.PopulateKept();
  State::Add(context, record, What::kInit, start_s);
}

LoadedPartition::LoadedPartition(const PartitionRecord& record, const std::string& packed_path,
                                 const LoadContext& context)
    : state_(std::make_unique<State>(record)) {
  state_->workspace = std::make_shared<Workspace>();
  state_->MapFiles(context.files);
  state_->LoadProgram(context.planned);
  state_->LoadMethod(packed_path);
}

LoadedPartition::~LoadedPartition() = default;

void LoadedPartition::LetGo() const {
  state_->packed_in_use.LetGo();
  for (const Mapping& mapping : state_->weights.mappings()) mapping.LetGo();
}

void LoadedPartition::DropFromPageCache() const {
  if (state_->packed) state_->packed->DropFromPageCache(0, state_->packed->size_bytes());
  state_->weights.DropFromPageCache();
}

void LoadedPartition::Fetch(const LoadContext& context) const {
  const State& state = *state_;
  state.CheckUnchanged();
  const double start_s = context.trace.Now();
  const uint64_t read_bytes = state.packed ? AbsentBytes(*state.packed) : 0;
  if (state.packed_in_use.Populate()) {  // half the processor's time of reading through the slab
    State::Add(context, state.record, What::kRead, start_s, read_bytes);
  } else {
    state.Read(context);
  }
  state.weights.PopulateKept();
}

uint64_t LoadedPartition::unpacked_bytes() const { return state_->weights.kept_bytes(); }

uint64_t LoadedPartition::temporary_bytes() const { return state_->run_memory.size_bytes; }

void LoadedPartition::Run(const std::vector<const void*>& inputs, const std::vector<void*>& outputs) {
  State& state = *state_;
  const PartitionRecord& record = state.record;
  last_log.clear();
  state.CheckUnchanged();
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
  state.run_memory.size_bytes = 0;
  const Error error = state.method->execute();
  state.run_blocks.clear();
  state.Check("running", error);
}

}  // namespace movd
