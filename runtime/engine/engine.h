// Replays a stage's schedule: load, run and free partitions, one after the other, and keeps the books of memory.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "file_store.h"
#include "partition.h"

namespace movd {

// A schedule or an input that does not fit the partitions it names.
struct ScheduleError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Op { kLoad, kRun, kFree };

struct InstructionRecord {
  Op op;
  std::string partition;
};

struct Buffer {
  void* data;
  uint64_t size_bytes;
};

class Engine {
 public:
  Engine(FileStore files, std::vector<PartitionRecord> partitions);

  // Runs a schedule. `inputs` and `outputs` are the caller's buffers by tensor name; a tensor between partitions lives
  // from the run that makes it to the last run that reads it. `after` is called after each instruction and may throw,
  // which stops the run. Whatever ends the run, nothing stays loaded.
  void Run(const std::vector<InstructionRecord>& schedule, const std::map<std::string, Buffer>& inputs,
           const std::map<std::string, Buffer>& outputs, const std::function<void(size_t)>& after);

  const FileStore& files() const { return files_; }

  // The most bytes that the last run held by the books: partitions, tensors and scratch.
  uint64_t peak_bytes() const { return peak_bytes_; }

 private:
  FileStore files_;
  std::map<std::string, PartitionRecord> partitions_;
  uint64_t peak_bytes_ = 0;
};

}  // namespace movd
