// One partition in memory: its program, its weights and what ExecuTorch made of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "books.h"
#include "errors.h"
#include "file_store.h"
#include "packed_cache.h"
#include "trace.h"

namespace movd {

// The bytes of one item; 0 for a dtype that is none of the format's.
uint64_t ItemBytes(const std::string& dtype);

struct TensorRecord {
  std::string name;
  std::string dtype;  // as in bundle.json: f32, i64, ...
  std::vector<int32_t> shape;
  uint64_t SizeBytes() const;
};

struct ConstantRecord {
  std::string key;
  uint64_t offset_bytes;
  uint64_t size_bytes;
  std::string dtype;
  std::vector<int32_t> shape;
};

struct WeightsRecord {
  std::string path;
  std::vector<ConstantRecord> constants;
};

struct PartitionRecord {
  std::string name;
  std::string program;
  std::string method;  // of the program
  std::vector<WeightsRecord> weights;
  std::vector<TensorRecord> inputs;
  std::vector<TensorRecord> outputs;
  uint64_t held_bytes;  // by its weights while it is loaded
  uint64_t load_bytes;  // while its weights are packed
  uint64_t program_bytes;  // by the program, loaded or not
  uint64_t workspace_bytes;
  uint64_t planned_bytes;
};

// The memory that programs plan for what they compute on the way. One program runs at a time, so that all share it: it
// grows to what the largest needs.
class PlannedMemory {
 public:
  // The block at a place of a program's plan, at least so large. Whoever uses it keeps it, too.
  std::shared_ptr<uint8_t> BlockFor(size_t place, size_t size_bytes);

  uint64_t size_bytes() const {
    uint64_t sum_bytes = 0;
    for (const Block& block : blocks_) sum_bytes += block.size_bytes;
    return sum_bytes;
  }

  // Lets go of it; what is loaded keeps its part.
  void Clear() { blocks_.clear(); }

 private:
  struct Block {
    std::shared_ptr<uint8_t> data;
    size_t size_bytes = 0;
  };

  std::vector<Block> blocks_;
};

// What XNNPACK uses while it runs, for programs that run one after the other: it grows to what the largest needs, and
// is there as long as one of them is. XNNPACK locks it while one runs in it, and while one initialises for it.
class Workspace {
 public:
  Workspace();
  ~Workspace();

 private:
  friend class LoadedPartition;
  struct State;
  std::unique_ptr<State> state_;
};

// Partitions that share a file of packed weights: they read the same weights, and no two data under one key.
struct PackedGroup {
  std::string key;
  std::vector<const PartitionRecord*> partitions;
};

// What loading needs beside the partition: `packed` is null if it has no weights.
struct LoadContext {
  const FileStore& files;
  PackedCache& packed_cache;
  const PackedGroup* packed;
  std::vector<uint8_t>& slab;
  PlannedMemory& planned;
  Trace& trace;
  Books& books;
};

class LoadedPartition {
 public:
  // Reads the weights, packing them if that is still to do, and initialises the method. Throws FileError,
  // PartitionError, or BudgetError if packing needs more than may be taken.
  LoadedPartition(const PartitionRecord& record, std::shared_ptr<Workspace> workspace, const LoadContext& context);
  ~LoadedPartition();

  // Lets go of the weights; the program stays.
  void LetGo() const;

  // Tells the system not to keep weights that were let go, for they come round too late to be found there.
  void DropFromPageCache() const;

  // Brings the weights back; throws FileError if a file has changed.
  void Fetch(const LoadContext& context) const;

  // Runs on contiguous buffers in the order of the record's inputs and outputs; throws PartitionError, or FileError if
  // a file that it still reads from has changed.
  void Run(const std::vector<const void*>& inputs, const std::vector<void*>& outputs);

  // Bytes of weights that it reads from the bundle's files as they are, because nothing packs them.
  uint64_t unpacked_bytes() const;

  // Bytes that kernels took for themselves in the last run, and gave back.
  uint64_t temporary_bytes() const;

 private:
  struct State;

  // Initialises the method only to pack its weights into a new file.
  LoadedPartition(const PartitionRecord& record, const std::string& packed_path, const LoadContext& context);

  std::unique_ptr<State> state_;
};

}  // namespace movd
