// Runs the stages of a bundle: partitions load on one lane while others run on the other, within a memory budget.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "books.h"
#include "bundle.h"
#include "file_store.h"
#include "loader.h"
#include "packed_cache.h"
#include "packed_groups.h"
#include "partition.h"
#include "trace.h"

namespace movd {

enum class Mode {
  kSequential,  // a partition is loaded when the one before has been freed
  kConcurrent,  // the next one loads while one runs
  kDynamic,  // and as many stay loaded as the memory allows
};

// The budget that leaves it to what the system has.
constexpr uint64_t kMeasured = UINT64_MAX;

struct Options {
  Mode mode = Mode::kDynamic;
  uint64_t budget_bytes = kMeasured;
  std::string packed_cache;  // the folder for packed weights
  uint64_t packed_cache_limit_bytes = UINT64_MAX;
  bool keeps_trace = false;
};

// How much memory is short: the system may ask for some of it back, or for all that can be given.
enum class Pressure { kWarning = 1, kCritical = 2 };

struct Buffer {
  void* data;
  uint64_t size_bytes;
};

// What the last run of a stage did. Loads for the next run that happened meanwhile are counted here.
struct RunReport {
  double wall_s = 0;
  double load_s = 0;
  double run_s = 0;
  double wait_s = 0;
  uint64_t peak_bytes = 0;
  uint64_t read_bytes = 0;
  std::vector<std::string> pinned;
};

class Engine {
 public:
  // Opens the bundle in a folder and checks every file of it; throws FileError.
  Engine(const std::string& root, const Options& options);

  // Runs a variant of a stage on the caller's buffers, one for each of its inputs and outputs, by name. `next` is the
  // variant of the same stage that will run next, empty if none will: its first partitions load while the last of this
  // one run. `after` is called after each partition and may throw, which stops the run. What an error ends leaves
  // nothing loaded. Throws InputError, FileError, PartitionError, BudgetError or CancelledError.
  void Run(const std::string& stage, const std::string& variant, const std::map<std::string, Buffer>& inputs,
           const std::map<std::string, Buffer>& outputs, const std::string& next,
           const std::function<void(const std::string&)>& after);

  // Runs one partition alone, on the caller's buffers for each of its inputs and outputs, by name: to check it by
  // itself. Throws as Run does.
  void RunPartition(const std::string& name, const std::map<std::string, Buffer>& inputs,
                    const std::map<std::string, Buffer>& outputs);

  // The memory for everything that the engine holds; counts from the next run on.
  void SetBudget(uint64_t bytes);

  // Frees partitions that stay loaded: half of their bytes or all, at once or after the partition that runs now. Each
  // later run takes back one level of residency at most.
  void Relieve(Pressure level);

  // Makes the run in progress end with CancelledError after the partition that runs now. Without one it does nothing.
  void Cancel();

  // Frees everything that is loaded.
  void Release();

  RunReport report(const std::string& stage) const;
  const BundleRecord& bundle() const { return bundle_; }
  const FileStore& files() const { return files_; }
  const Trace& trace() const { return trace_; }
  uint64_t peak_bytes() const { return peak_bytes_; }  // of all runs

 private:
  const VariantRecord& VariantOf(const std::string& stage, const std::string& variant) const;
  const PartitionRecord& PartitionOf(const std::string& name) const { return bundle_.partitions.at(name); }
  void RunVariant(const VariantRecord& variant, const std::map<std::string, Buffer>& inputs,
                  const std::map<std::string, Buffer>& outputs, bool again,
                  const std::function<void(const std::string&)>& after);
  bool IsPacked(const VariantRecord& variant);
  size_t Choose(const VariantRecord& variant);
  uint64_t LastingBytes(const VariantRecord& variant) const;
  uint64_t GrowingBytes(const VariantRecord& variant, size_t place) const;
  void Plan(const VariantRecord& variant, std::vector<std::string> upcoming);
  void RelieveIdle();
  void Clear();
  void Grow(const VariantRecord& variant);
  void Load(const PartitionRecord& record, const std::shared_ptr<Workspace>& workspace,
            std::unique_ptr<LoadedPartition>& loaded);
  void Execute(const VariantRecord& variant, const std::map<std::string, Buffer>& inputs,
               const std::map<std::string, Buffer>& outputs, bool again,
               const std::function<void(const std::string&)>& after);

  const BundleRecord bundle_;
  const std::map<std::string, VariantRecord> alone_;  // each partition as the only one of a stage of its name
  const FileStore files_;
  PackedCache packed_cache_;
  const PackedGroups packed_groups_;
  const Mode mode_;
  std::atomic<uint64_t> budget_bytes_;  // as it was last set
  uint64_t run_budget_bytes_ = UINT64_MAX;  // of the run in progress, or the last one; only whoever has run_mutex_
  std::atomic<bool> relieve_ = false;  // pressure that has not been acted on
  std::atomic<bool> running_ = false;
  std::vector<uint8_t> slab_;  // this and the next one are the loader's
  PlannedMemory planned_;
  Books books_;
  Trace trace_;
  std::atomic<uint64_t> peak_bytes_ = 0;
  std::mutex run_mutex_;  // one run at a time
  mutable std::mutex plan_mutex_;  // over the next three
  const VariantRecord* variant_ = nullptr;  // that runs, or ran last
  size_t row_ = 0;  // of its residency
  uint64_t ceiling_bytes_ = UINT64_MAX;  // rows that need more are out of reach since pressure
  Rules rules_;  // of that row; only whoever has run_mutex_ uses it and what follows
  bool drops_from_page_cache_ = false;
  const VariantRecord* planned_for_ = nullptr;
  const VariantRecord* has_run_ = nullptr;  // since it was planned for
  std::unique_ptr<Taken> lasting_;  // what is held as long as that variant runs
  mutable std::mutex reports_mutex_;
  std::map<std::string, RunReport> reports_;
  std::unique_ptr<Loader> loader_;  // its thread uses what is above: destroyed first
};

}  // namespace movd
