#include "engine.h"

#include <algorithm>
#include <utility>

#include "memory.h"

namespace movd {
namespace {

// The part of the memory that is left which no level but the first counts on: others take some while a stage runs.
constexpr double kSafety = 0.05;

// Checks that there is one buffer of the right size for each tensor, and no other.
void CheckBuffers(const VariantRecord& variant, const char* kind, const std::vector<TensorRecord>& tensors,
                  const std::map<std::string, Buffer>& buffers) {
  const std::string where = variant.stage + " (" + variant.name + "): " + kind + " ";
  for (const TensorRecord& tensor : tensors) {
    const auto buffer = buffers.find(tensor.name);
    if (buffer == buffers.end()) throw InputError(where + tensor.name + " is missing");
    if (buffer->second.size_bytes != tensor.SizeBytes()) {
      throw InputError(where + tensor.name + " has " + std::to_string(buffer->second.size_bytes) +
                       " bytes; it takes " + std::to_string(tensor.SizeBytes()));
    }
  }
  for (const auto& [name, buffer] : buffers) {
    const auto known = [&](const TensorRecord& tensor) { return tensor.name == name; };
    if (std::none_of(tensors.begin(), tensors.end(), known)) throw InputError(where + name + " is none of this stage");
  }
}

// A stage that is nothing but one partition, and carries its name.
VariantRecord Alone(const PartitionRecord& record, uint64_t slab_bytes) {
  uint64_t others_bytes = slab_bytes + record.program_bytes + record.workspace_bytes + record.planned_bytes;
  for (const TensorRecord& tensor : record.inputs) others_bytes += tensor.SizeBytes();
  for (const TensorRecord& tensor : record.outputs) others_bytes += tensor.SizeBytes();
  return {record.name,   "alone",
          record.inputs, record.outputs,
          {record.name}, {{others_bytes + record.held_bytes, 0, {}, {}}},
          others_bytes + std::max(record.held_bytes, record.load_bytes)};
}

std::map<std::string, VariantRecord> AllAlone(const BundleRecord& bundle) {
  std::map<std::string, VariantRecord> alone;
  for (const auto& [name, record] : bundle.partitions) alone.emplace(name, Alone(record, bundle.slab_bytes));
  return alone;
}

}  // namespace

Engine::Engine(const std::string& root, const Options& options)
    : bundle_(ReadBundle(root)),
      alone_(AllAlone(bundle_)),
      files_(root, bundle_.files, bundle_.slab_bytes),
      packed_cache_(options.packed_cache, options.packed_cache_limit_bytes),
      packed_groups_(bundle_.partitions),
      mode_(options.mode),
      budget_bytes_(options.budget_bytes),
      slab_(bundle_.slab_bytes),
      trace_(options.keeps_trace) {
  books_.Take(bundle_.slab_bytes, "the slab");
  loader_ = std::make_unique<Loader>(
      [this](const PartitionRecord& record, const std::shared_ptr<Workspace>& workspace,
             std::unique_ptr<LoadedPartition>& loaded) { Load(record, workspace, loaded); },
      books_, trace_);
}

const VariantRecord& Engine::VariantOf(const std::string& stage, const std::string& variant) const {
  for (const VariantRecord& one : bundle_.variants) {
    if (one.stage == stage && one.name == variant) return one;
  }
  throw InputError(stage + ": is no stage of this bundle with a variant " + variant);
}

bool Engine::IsPacked(const VariantRecord& variant) {
  return std::all_of(variant.order.begin(), variant.order.end(), [&](const std::string& name) {
    const PackedGroup* group = packed_groups_.Of(name);
    return group == nullptr || packed_cache_.Has(group->key);
  });
}

// The row of residency to run by: the last one that fits what is left of the memory, as far as the mode allows. A first
// run lets the workspace grow, and does nothing beside while weights are still to be packed.
size_t Engine::Choose(const VariantRecord& variant) {
  const std::vector<ResidencyRecord>& rows = variant.residency;
  uint64_t allowed_bytes = run_budget_bytes_, had_bytes = run_budget_bytes_;
  if (const uint64_t left_bytes = AvailableBytes(); left_bytes != UINT64_MAX) {
    const auto safe_bytes = static_cast<uint64_t>(static_cast<double>(left_bytes) * (1 - kSafety));
    allowed_bytes = std::min(allowed_bytes, books_.held_bytes() + safe_bytes);
    had_bytes = std::min(had_bytes, books_.held_bytes() + left_bytes);
  }
  const bool first = has_run_ != &variant;
  const bool packs = first && !IsPacked(variant);
  uint64_t growing_bytes = 0;
  for (size_t i = 0; i < variant.order.size() && first; ++i) {
    growing_bytes = std::max(growing_bytes, GrowingBytes(variant, i));
  }
  // Packing takes more than a first run without it, which needs no more than the largest growth at the worst moment.
  const uint64_t first_bytes = std::min(variant.first_needs_bytes, rows[0].needs_bytes + growing_bytes);
  const uint64_t least_bytes = packs ? variant.first_needs_bytes : first ? first_bytes : rows[0].needs_bytes;
  if (least_bytes > had_bytes) {
    const std::string budget =
        run_budget_bytes_ == kMeasured ? "what the system has" : std::to_string(run_budget_bytes_);
    throw BudgetError(variant.stage + " needs " + std::to_string(least_bytes) + " bytes at least; the budget is " +
                      budget + ", and " + std::to_string(had_bytes) + " of it can be had now");
  }
  size_t best = 0;
  for (size_t i = 1; i < rows.size() && mode_ != Mode::kSequential && !packs; ++i) {
    const bool fits = rows[i].needs_bytes + growing_bytes <= allowed_bytes && rows[i].needs_bytes <= ceiling_bytes_;
    if (fits && (mode_ == Mode::kDynamic || rows[i].pinned.empty())) best = i;
  }
  return best;
}

void Engine::Plan(const VariantRecord& variant, std::vector<std::string> upcoming) {
  std::vector<const PartitionRecord*> records;
  for (const std::string& name : upcoming) records.push_back(&PartitionOf(name));
  Rules& rules = rules_;
  {
    const std::lock_guard lock(plan_mutex_);
    variant_ = &variant;
    row_ = Choose(variant);
    const ResidencyRecord& row = variant.residency[row_];
    rules.members = {variant.order.begin(), variant.order.end()};
    rules.pinned = {row.pinned.begin(), row.pinned.end()};
    rules.waits = {row.waits.begin(), row.waits.end()};
    rules.prefetch = row.prefetch;
  }
  // Transient partitions come round in a cycle. Where the page cache cannot hold them all, it would drop each just
  // before it is read again, and pinned ones with them.
  uint64_t transient_bytes = 0;
  for (const std::string& name : variant.order) {
    if (rules.pinned.count(name) == 0) transient_bytes += PartitionOf(name).held_bytes;
  }
  drops_from_page_cache_ = transient_bytes > AvailableBytes();
  if (planned_for_ != &variant) {
    loader_->Forget(rules.members);
    planned_.Clear();
    lasting_.reset();
    lasting_ = std::make_unique<Taken>(books_, LastingBytes(variant), "programs of " + variant.stage);
    has_run_ = nullptr;
    planned_for_ = &variant;
  }
  loader_->Plan(records, rules);
}

// What is held as long as a variant runs: its programs, the workspace and the memory that programs plan.
uint64_t Engine::LastingBytes(const VariantRecord& variant) const {
  uint64_t programs_bytes = 0, planned_bytes = 0, workspace_bytes = 0;
  for (const std::string& name : variant.order) {
    const PartitionRecord& record = PartitionOf(name);
    programs_bytes += record.program_bytes;
    planned_bytes = std::max(planned_bytes, record.planned_bytes);
    workspace_bytes = std::max(workspace_bytes, record.workspace_bytes);
  }
  return programs_bytes + planned_bytes + workspace_bytes;
}

// What the workspace holds beyond its largest size when it grows for a partition, in a first run: the one before is
// there until the new one is.
uint64_t Engine::GrowingBytes(const VariantRecord& variant, size_t place) const {
  uint64_t before_bytes = 0, largest_bytes = 0;
  for (size_t i = 0; i < variant.order.size(); ++i) {
    const uint64_t workspace_bytes = PartitionOf(variant.order[i]).workspace_bytes;
    if (i < place) before_bytes = std::max(before_bytes, workspace_bytes);
    largest_bytes = std::max(largest_bytes, workspace_bytes);
  }
  const uint64_t next_bytes = PartitionOf(variant.order[place]).workspace_bytes;
  const uint64_t both_bytes = before_bytes + next_bytes;
  return next_bytes > before_bytes && both_bytes > largest_bytes ? both_bytes - largest_bytes : 0;
}

void Engine::Load(const PartitionRecord& record, const std::shared_ptr<Workspace>& workspace,
                  std::unique_ptr<LoadedPartition>& loaded) {
  const LoadContext context{files_, packed_cache_, packed_groups_.Of(record.name), slab_, planned_, trace_, books_};
  if (loaded != nullptr) {
    loaded->Fetch(context);
  } else {
    loaded = std::make_unique<LoadedPartition>(record, workspace, context);
  }
}

void Engine::Run(const std::string& stage, const std::string& variant, const std::map<std::string, Buffer>& inputs,
                 const std::map<std::string, Buffer>& outputs, const std::string& next,
                 const std::function<void(const std::string&)>& after) {
  RunVariant(VariantOf(stage, variant), inputs, outputs, next == variant, after);
}

void Engine::RunPartition(const std::string& name, const std::map<std::string, Buffer>& inputs,
                          const std::map<std::string, Buffer>& outputs) {
  const auto one = alone_.find(name);
  if (one == alone_.end()) throw InputError(name + ": is no partition of this bundle");
  RunVariant(one->second, inputs, outputs, false, [](const std::string&) {});
}

void Engine::RunVariant(const VariantRecord& one, const std::map<std::string, Buffer>& inputs,
                        const std::map<std::string, Buffer>& outputs, bool again,
                        const std::function<void(const std::string&)>& after) {
  std::unique_lock lock(run_mutex_);
  CheckBuffers(one, "input", one.inputs, inputs);
  CheckBuffers(one, "output", one.outputs, outputs);
  const Totals before = trace_.totals();
  const double start_s = trace_.Now();
  loader_->Begin();
  running_ = true;
  try {
    // What a stage held does not help the next one, and would count as memory that is taken.
    if (variant_ != nullptr && variant_->stage != one.stage) Clear();
    run_budget_bytes_ = budget_bytes_;  // once: it may be set again meanwhile, and counts from the next run on
    books_.RaiseLimit(run_budget_bytes_);
    Grow(one);
    Execute(one, inputs, outputs, again, after);
    has_run_ = &one;
  } catch (...) {
    running_ = false;
    Clear();
    throw;
  }
  running_ = false;
  peak_bytes_ = std::max<uint64_t>(peak_bytes_, books_.peak_bytes());
  const Totals totals = trace_.totals();
  RunReport report{trace_.Now() - start_s, totals.load_s - before.load_s, totals.run_s - before.run_s,
                   totals.wait_s - before.wait_s, books_.peak_bytes(), totals.read_bytes - before.read_bytes,
                   one.residency[row_].pinned};
  {
    const std::lock_guard reports_lock(reports_mutex_);
    reports_[one.stage] = std::move(report);
  }
  lock.unlock();
  RelieveIdle();  // what came while this was about to end
}

void Engine::Execute(const VariantRecord& variant, const std::map<std::string, Buffer>& inputs,
                     const std::map<std::string, Buffer>& outputs, bool again,
                     const std::function<void(const std::string&)>& after) {
  std::map<std::string, size_t> last_read;
  for (size_t i = 0; i < variant.order.size(); ++i) {
    for (const TensorRecord& tensor : PartitionOf(variant.order[i]).inputs) last_read[tensor.name] = i;
  }
  struct Made {
    std::unique_ptr<uint8_t[]> data;
    Taken taken;
  };
  std::map<std::string, Made> tensors;
  std::vector<Taken> callers;
  const auto upcoming = [&](size_t from) {
    std::vector<std::string> names(variant.order.begin() + static_cast<ptrdiff_t>(from), variant.order.end());
    if (again) names.insert(names.end(), variant.order.begin(), variant.order.end());
    return names;
  };
  relieve_ = false;
  Plan(variant, upcoming(0));
  loader_->Settle();  // under the limit of before: what the run before left loading may be beyond the new one
  books_.SetLimit(run_budget_bytes_);
  peak_bytes_ = std::max<uint64_t>(peak_bytes_, books_.peak_bytes());
  books_.RestartPeak();
  for (const auto& [name, buffer] : inputs) callers.emplace_back(books_, buffer.size_bytes, "input " + name);
  for (size_t i = 0; i < variant.order.size(); ++i) {
    if (relieve_.exchange(false)) Plan(variant, upcoming(i));
    const PartitionRecord& record = PartitionOf(variant.order[i]);
    std::vector<const void*> sources;
    for (const TensorRecord& tensor : record.inputs) {
      if (const auto input = inputs.find(tensor.name); input != inputs.end()) {
        sources.push_back(input->second.data);
      } else if (const auto made = tensors.find(tensor.name); made != tensors.end()) {
        sources.push_back(made->second.data.get());
      } else {
        sources.push_back(outputs.at(tensor.name).data);
      }
    }
    LoadedPartition& partition = loader_->Await(record);
    const uint64_t growing_bytes = has_run_ == &variant ? 0 : GrowingBytes(variant, i);
    std::optional<Taken> growing(std::in_place, books_, growing_bytes, "the workspace of " + record.name);
    std::vector<void*> targets;
    for (const TensorRecord& tensor : record.outputs) {
      Taken taken(books_, tensor.SizeBytes(), "tensor " + tensor.name);
      if (const auto output = outputs.find(tensor.name); output != outputs.end()) {
        targets.push_back(output->second.data);
        callers.push_back(std::move(taken));
      } else {
        Made made{std::make_unique_for_overwrite<uint8_t[]>(tensor.SizeBytes()), std::move(taken)};
        targets.push_back(made.data.get());
        tensors.insert_or_assign(tensor.name, std::move(made));
      }
    }
    const double start_s = trace_.Now();
    partition.Run(sources, targets);
    trace_.Add({What::kRun, record.name, Lane::kExecution, start_s, trace_.Now() - start_s, 0,
                books_.held_bytes()});
    growing.reset();  // before the loader may take more
    for (const TensorRecord& tensor : record.inputs) {
      if (last_read[tensor.name] == i) tensors.erase(tensor.name);
    }
    loader_->Done(record, drops_from_page_cache_);
    after(record.name);
  }
}

void Engine::SetBudget(uint64_t bytes) { budget_bytes_ = bytes; }

void Engine::Relieve(Pressure level) {
  {
    const std::lock_guard lock(plan_mutex_);
    if (variant_ == nullptr) return;
    const std::vector<ResidencyRecord>& rows = variant_->residency;
    const auto pinned_bytes = [&](size_t row) {
      uint64_t sum_bytes = 0;
      for (const std::string& name : rows[row].pinned) sum_bytes += PartitionOf(name).held_bytes;
      return sum_bytes;
    };
    size_t keep = 0;
    for (size_t i = 1; i < row_ && level == Pressure::kWarning; ++i) {
      if (2 * pinned_bytes(i) <= pinned_bytes(row_)) keep = i;
    }
    ceiling_bytes_ = rows[keep].needs_bytes;
  }
  relieve_ = true;
  RelieveIdle();
}

// Acts on pressure where no run does: a run that is in progress sees it after the partition that runs now.
void Engine::RelieveIdle() {
  while (relieve_ && run_mutex_.try_lock()) {
    const std::lock_guard lock(run_mutex_, std::adopt_lock);
    if (relieve_.exchange(false) && planned_for_ != nullptr) Plan(*variant_, {});
  }
}

// Takes back one level of what pressure took.
void Engine::Grow(const VariantRecord& variant) {
  const std::lock_guard lock(plan_mutex_);
  const auto above = std::find_if(variant.residency.begin(), variant.residency.end(),
                                  [&](const ResidencyRecord& row) { return row.needs_bytes > ceiling_bytes_; });
  ceiling_bytes_ = above == variant.residency.end() ? UINT64_MAX : above->needs_bytes;
}

void Engine::Cancel() {
  if (running_) loader_->Cancel();
}

void Engine::Release() {
  const std::lock_guard lock(run_mutex_);
  Clear();
}

void Engine::Clear() {
  loader_->Clear();
  planned_.Clear();
  lasting_.reset();
  planned_for_ = nullptr;
  has_run_ = nullptr;
  ReturnFreed();
}

RunReport Engine::report(const std::string& stage) const {
  const std::lock_guard lock(reports_mutex_);
  const auto found = reports_.find(stage);
  if (found == reports_.end()) throw InputError(stage + ": has not run yet");
  return found->second;
}

}  // namespace movd
