#include "loader.h"

#include <algorithm>
#include <utility>

namespace movd {

Loader::Loader(Load load, Books& books, Trace& trace)
    : load_(std::move(load)), books_(books), trace_(trace), thread_([this] { Work(); }) {}

Loader::~Loader() {
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    queue_.clear();
  }
  changed_.notify_all();
  thread_.join();
}

void Loader::Begin() {
  const std::lock_guard lock(mutex_);
  error_ = nullptr;
  cancelled_ = false;
}

void Loader::Plan(const std::vector<const PartitionRecord*>& upcoming, const Rules& rules) {
  std::vector<std::pair<std::string, Held>> freed;
  {
    const std::lock_guard lock(mutex_);
    rules_ = rules;
    queue_.clear();
    std::set<std::string> first;  // the transient partitions that may be there already
    for (const PartitionRecord* record : upcoming) {
      if (first.size() > rules.prefetch) break;
      if (rules.pinned.count(record->name) == 0) first.insert(record->name);
    }
    for (auto held = held_.begin(); held != held_.end();) {
      Held& one = held->second;
      const bool pinned = rules.pinned.count(held->first) > 0;
      const bool stays = pinned || one.state == State::kRunning || first.count(held->first) > 0;
      if (!stays && one.state == State::kReady) {
        freed.emplace_back(held->first, std::move(one));
        held = held_.erase(held);
        continue;
      }
      one.doomed = one.doomed || !stays;
      one.slot = !pinned;
      ++held;
    }
    std::set<std::string> there;
    for (const auto& [name, held] : held_) {
      if (!held.doomed && held.state != State::kRunning) there.insert(name);
      if (held.state == State::kRunning && rules.pinned.count(name) > 0) there.insert(name);
    }
    for (const PartitionRecord* record : upcoming) {
      const bool pinned = rules.pinned.count(record->name) > 0;
      if (there.count(record->name) > 0) {
        if (!pinned) there.erase(record->name);  // its first run frees it
        continue;
      }
      if (pinned) there.insert(record->name);
      queue_.push_back(record);
    }
  }
  changed_.notify_all();
  for (auto& [name, held] : freed) Free(name, std::move(held));
}

void Loader::Settle() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] {
    return std::none_of(held_.begin(), held_.end(), [](const auto& held) { return held.second.doomed; });
  });
}

LoadedPartition& Loader::Await(const PartitionRecord& record) {
  const double start_s = trace_.Now();
  std::unique_lock lock(mutex_);
  const auto ready = [&] {
    const auto found = held_.find(record.name);
    return found != held_.end() && found->second.state == State::kReady && !found->second.doomed;
  };
  const bool waited = !ready();
  changed_.wait(lock, [&] { return cancelled_ || error_ || ready(); });
  if (cancelled_) throw CancelledError("the run was cancelled");
  if (!ready()) std::rethrow_exception(error_);
  Held& held = held_.at(record.name);
  held.state = State::kRunning;
  if (waited) {
    trace_.Add({What::kWait, record.name, Lane::kExecution, start_s, trace_.Now() - start_s, 0, books_.held_bytes()});
  }
  return *held.loaded;
}

void Loader::Forget(const std::set<std::string>& members) {
  {
    const std::lock_guard lock(mutex_);
    if (members == rules_.members) return;
  }
  Clear();
  const std::lock_guard lock(mutex_);
  workspace_ = std::make_shared<Workspace>();
}

void Loader::Done(const PartitionRecord& record, bool drop_from_page_cache) {
  Held freed;
  {
    const std::lock_guard lock(mutex_);
    Held& held = held_.at(record.name);
    held.state = State::kReady;
    if (rules_.pinned.count(record.name) > 0) return;
    held.state = State::kRunning;  // it takes its place until its memory is free
    freed.loaded = std::move(held.loaded);
    freed.taken = std::move(held.taken);
  }
  Free(record.name, std::move(freed));
  {
    const std::lock_guard lock(mutex_);
    held_.erase(record.name);
    if (drop_from_page_cache) let_go_.push_back(record.name);
  }
  changed_.notify_all();
}

void Loader::Cancel() {
  {
    const std::lock_guard lock(mutex_);
    cancelled_ = true;
    queue_.clear();
  }
  changed_.notify_all();
}

void Loader::Clear() {
  std::map<std::string, Held> freed;
  std::map<std::string, std::unique_ptr<LoadedPartition>> forgotten;  // outlives the lock
  {
    std::unique_lock lock(mutex_);
    queue_.clear();
    let_go_.clear();
    changed_.wait(lock, [&] {
      return !dropping_ && std::none_of(held_.begin(), held_.end(),
                                        [](const auto& held) { return held.second.state == State::kLoading; });
    });
    freed = std::exchange(held_, {});
  }
  for (auto& [name, held] : freed) Free(name, std::move(held));
  const std::lock_guard lock(mutex_);
  forgotten.swap(dormant_);
  rules_.members.clear();
}

void Loader::Work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] {
      return stopped_ || !let_go_.empty() || (!queue_.empty() && !error_ && MayStart(*queue_.front()));
    });
    if (stopped_) return;
    if (!let_go_.empty()) {
      DropOne(lock);
      continue;
    }
    const PartitionRecord* record = queue_.front();
    queue_.pop_front();
    LoadOne(lock, *record);
  }
}

void Loader::DropOne(std::unique_lock<std::mutex>& lock) {
  const auto found = dormant_.find(let_go_.back());
  let_go_.pop_back();
  if (found == dormant_.end() || found->second == nullptr) return;  // gone, or loaded again
  const LoadedPartition& one = *found->second;
  dropping_ = true;
  lock.unlock();
  one.DropFromPageCache();
  lock.lock();
  dropping_ = false;
  changed_.notify_all();
}

void Loader::LoadOne(std::unique_lock<std::mutex>& lock, const PartitionRecord& record) {
  const bool pinned = rules_.pinned.count(record.name) > 0;
  Held& held = held_[record.name];  // stays where it is in the map
  held = Held{};
  held.slot = !pinned;
  std::unique_ptr<LoadedPartition> loaded = std::move(dormant_[record.name]);
  const std::shared_ptr<Workspace> workspace = workspace_;
  lock.unlock();
  std::unique_ptr<Taken> taken;
  std::exception_ptr error;
  const double start_s = trace_.Now();
  try {
    taken = std::make_unique<Taken>(books_, record.held_bytes, "loading " + record.name);
    load_(record, workspace, loaded);
  } catch (...) {
    error = std::current_exception();
    loaded.reset();
    taken.reset();
  }
  trace_.Add({What::kLoad, record.name, Lane::kLoader, start_s, trace_.Now() - start_s, record.held_bytes,
              books_.held_bytes()});
  lock.lock();
  if (error) {
    held_.erase(record.name);
    error_ = error;
    queue_.clear();
  } else {
    held.loaded = std::move(loaded);
    held.taken = std::move(taken);
    held.state = State::kReady;
    if (held.doomed) {
      Held freed = std::move(held);
      held.state = State::kLoading;  // it takes its place until its memory is free
      lock.unlock();
      Free(record.name, std::move(freed));
      lock.lock();
      held_.erase(record.name);
    }
  }
  changed_.notify_all();
}

bool Loader::MayStart(const PartitionRecord& record) const {
  if (held_.count(record.name) > 0) return false;  // its last run is not over
  if (rules_.pinned.count(record.name) > 0) return true;
  const auto transient = std::count_if(held_.begin(), held_.end(), [](const auto& held) { return held.second.slot; });
  if (rules_.waits.count(record.name) > 0) return transient == 0;
  return transient <= static_cast<ptrdiff_t>(rules_.prefetch);
}

void Loader::Free(const std::string& name, Held held) {
  const double start_s = trace_.Now();
  held.loaded->LetGo();
  {
    const std::lock_guard lock(mutex_);
    dormant_[name] = std::move(held.loaded);
  }
  held.taken.reset();
  trace_.Add({What::kFree, name, Lane::kExecution, start_s, trace_.Now() - start_s, 0, books_.held_bytes()});
}

}  // namespace movd
