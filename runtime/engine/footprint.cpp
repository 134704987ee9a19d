#include "footprint.h"

#ifdef __APPLE__
#include <malloc/malloc.h>
#endif

#include <algorithm>
#include <memory>
#include <vector>

#ifndef __APPLE__
extern "C" uint64_t movd_allocated_bytes(void)
    __attribute__((weak, visibility("default")));  // count_allocations.c, if it was preloaded
#endif

namespace movd {
namespace {

// Bytes that are allocated in this process.
uint64_t AllocatedBytes() {
#ifdef __APPLE__
  malloc_statistics_t all;
  malloc_zone_statistics(nullptr, &all);
  return all.size_in_use;
#else
  if (movd_allocated_bytes == nullptr) throw InputError("preload libdry_run.so to measure what a program takes");
  return movd_allocated_bytes();
#endif
}

// One instance of the partition, and what it has added to what is allocated, once loaded and once it has run.
struct Instance {
  std::unique_ptr<LoadedPartition> loaded;
  uint64_t added_bytes = 0;
};

}  // namespace

Footprint Measure(const FileStore& files, const PartitionRecord& record, const std::string& folder) {
  PackedCache packed_cache(folder, UINT64_MAX);
  const PackedGroup group{PackedCache::KeyOf({record.program}), {&record}};
  std::vector<uint8_t> slab(kMeasuringSlabBytes);
  PlannedMemory planned;
  Trace trace(false);
  Books books;
  const LoadContext context{files, packed_cache, record.weights.empty() ? nullptr : &group, slab, planned, trace, books};
  std::vector<std::vector<uint8_t>> buffers;
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  for (const TensorRecord& tensor : record.inputs) inputs.push_back(buffers.emplace_back(tensor.SizeBytes()).data());
  for (const TensorRecord& tensor : record.outputs) outputs.push_back(buffers.emplace_back(tensor.SizeBytes()).data());
  const auto make = [&](const std::shared_ptr<Workspace>& workspace) {
    const uint64_t before_bytes = AllocatedBytes();
    Instance instance{std::make_unique<LoadedPartition>(record, workspace, context)};
    instance.loaded->Run(inputs, outputs);
    instance.added_bytes = AllocatedBytes() - before_bytes;
    return instance;
  };
  make(std::make_shared<Workspace>());  // packs the weights, and fills what ExecuTorch makes once; plans its memory
  const auto workspace = std::make_shared<Workspace>();
  const Instance first = make(workspace);
  const Instance second = make(workspace);
  uint64_t read_bytes = 0;
  const auto packed = packed_cache.Find(group.key, slab, read_bytes);
  const uint64_t packed_bytes = packed ? packed->size_bytes() : 0;
  const uint64_t temporary_bytes = second.loaded->temporary_bytes();
  const uint64_t workspace_bytes = std::max(first.added_bytes, second.added_bytes) - second.added_bytes;
  return {packed_bytes + second.loaded->unpacked_bytes() + temporary_bytes,
          second.added_bytes + files.Map(record.program).size_bytes(), workspace_bytes, planned.size_bytes()};
}

}  // namespace movd
