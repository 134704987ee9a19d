// One partition in memory: its program, its weights and what ExecuTorch made of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "file_store.h"

namespace movd {

// Loading or running a partition failed; `partition` names it.
struct PartitionError : std::runtime_error {
  PartitionError(std::string partition_name, const std::string& what)
      : std::runtime_error(partition_name + ": " + what), partition(std::move(partition_name)) {}
  std::string partition;
};

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
  std::vector<WeightsRecord> weights;
  std::vector<TensorRecord> inputs;
  std::vector<TensorRecord> outputs;
  uint64_t held_bytes;
  uint64_t load_bytes;
  uint64_t working_bytes;
};

class LoadedPartition {
 public:
  // Maps the files and initialises the method; throws FileError or PartitionError.
  LoadedPartition(const FileStore& files, const PartitionRecord& record);
  ~LoadedPartition();

  // Runs on contiguous buffers in the order of the record's inputs and outputs; throws PartitionError.
  void Run(const std::vector<const void*>& inputs, const std::vector<void*>& outputs);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace movd
