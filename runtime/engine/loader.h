// The loader lane: a thread that loads partitions in order, ahead of the execution lane, and what is loaded.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "books.h"
#include "partition.h"
#include "trace.h"

namespace movd {

// What stays loaded, and how far loading may run ahead (docs/bundle.md, residency).
struct Rules {
  std::set<std::string> members;  // the partitions of the variant that runs
  std::set<std::string> pinned;
  std::set<std::string> waits;
  uint32_t prefetch = 0;
};

class Loader {
 public:
  // Loads a partition for the first time, or brings back the weights of one that was loaded before.
  using Load = std::function<void(const PartitionRecord&, const std::shared_ptr<Workspace>&,
                                  std::unique_ptr<LoadedPartition>&)>;

  Loader(Load load, Books& books, Trace& trace);
  ~Loader();  // waits for the load in progress, and frees everything

  // A run begins: forgets what was cancelled and what went wrong before.
  void Begin();

  // Goes on by these rules: `upcoming` are the runs to come, in order. What is loaded and neither stays nor comes first
  // is freed before this returns, or as soon as it has loaded.
  void Plan(const std::vector<const PartitionRecord*>& upcoming, const Rules& rules);

  // Waits until nothing is loading that is to be freed at once.
  void Settle();

  // Another variant begins, of these partitions: what is loaded of the one before goes, programs and workspace included.
  void Forget(const std::set<std::string>& members);

  // Waits until a partition is loaded and marks it as running; rethrows what went wrong while loading.
  LoadedPartition& Await(const PartitionRecord& record);

  // The run is over: frees the partition unless it stays. The loader drops it from the page cache, if that is asked
  // for: the kernel takes long over it, and the next run does not wait.
  void Done(const PartitionRecord& record, bool drop_from_page_cache);

  // Makes Await throw CancelledError until the next Begin.
  void Cancel();

  // Frees everything, after the load in progress; nothing is planned any more.
  void Clear();

 private:
  enum class State { kLoading, kReady, kRunning };

  struct Held {
    State state = State::kLoading;
    bool doomed = false;  // to be freed as soon as it has loaded
    bool slot = false;  // whether it takes one of the 1 + prefetch places of transient partitions
    std::unique_ptr<LoadedPartition> loaded;
    std::unique_ptr<Taken> taken;
  };

  void Work();
  void DropOne(std::unique_lock<std::mutex>& lock);
  void LoadOne(std::unique_lock<std::mutex>& lock, const PartitionRecord& record);
  bool MayStart(const PartitionRecord& record) const;
  void Free(const std::string& name, Held held);

  const Load load_;
  Books& books_;
  Trace& trace_;

  std::mutex mutex_;  // over all that follows; never held while something loads, runs or is freed
  std::condition_variable changed_;
  std::map<std::string, Held> held_;
  std::deque<const PartitionRecord*> queue_;
  Rules rules_;
  std::exception_ptr error_;
  bool cancelled_ = false;
  bool stopped_ = false;
  // Partitions of the variant that were loaded and freed: their programs stay initialised, for it costs little memory
  // and much time, and their workspace with them.
  std::map<std::string, std::unique_ptr<LoadedPartition>> dormant_;
  std::vector<std::string> let_go_;  // of those, what is still to go from the page cache
  bool dropping_ = false;  // one of them, right now
  std::shared_ptr<Workspace> workspace_;
  std::thread thread_;
};

}  // namespace movd
