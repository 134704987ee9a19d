// What both lanes did and when, for Perfetto or chrome://tracing and for the sums of a run.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace movd {

enum class Lane { kLoader = 1, kExecution = 2 };

enum class What { kLoad, kVerify, kRead, kPack, kInit, kRun, kWait, kFree };

struct Event {
  What what;
  std::string partition;
  Lane lane;
  double start_s;  // since the engine was made
  double duration_s;
  uint64_t bytes;  // read, or held; 0 where neither makes sense
  uint64_t held_bytes;  // by the books, at the end
};

// Sums over all events so far.
struct Totals {
  double load_s = 0;
  double run_s = 0;
  double wait_s = 0;
  uint64_t read_bytes = 0;
};

class Trace {
 public:
  // Keeps the events only if asked to: a long run makes many.
  explicit Trace(bool keeps_events) : keeps_events_(keeps_events) {}

  double Now() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

  void Add(Event event);

  Totals totals() const {
    const std::lock_guard lock(mutex_);
    return totals_;
  }

  // Chrome's trace format: one row for each lane, and a counter of the bytes held.
  std::string ChromeJson() const;

 private:
  using Clock = std::chrono::steady_clock;

  Clock::time_point start_ = Clock::now();
  const bool keeps_events_;
  mutable std::mutex mutex_;
  Totals totals_;
  std::vector<Event> events_;
};

}  // namespace movd
