// What a partition takes in memory, found by loading and running it.
#pragma once

#include <cstdint>
#include <string>

#include "file_store.h"
#include "partition.h"

namespace movd {

constexpr size_t kMeasuringSlabBytes = 256 * 1024;  // no figure counts it

// In bytes, as PartitionRecord has them.
struct Footprint {
  uint64_t held_bytes;
  uint64_t program_bytes;
  uint64_t workspace_bytes;
  uint64_t planned_bytes;
};

// Loads and runs a partition twice in one workspace, with inputs of zeros and `folder` for its packed weights; the
// record's own figures do not matter. What the second instance adds is the program's, what the first one has taken
// beyond that is the workspace. Nothing else may run in this process meanwhile. Throws what loading and running throw.
Footprint Measure(const FileStore& files, const PartitionRecord& record, const std::string& folder);

}  // namespace movd
