// Which partitions share a file of packed weights.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "partition.h"

namespace movd {

// Variants of a stage read the same weights, so they can share what is packed of them. XNNPACK finds packed weights by
// key alone: partitions that have different data under one key are kept apart.
class PackedGroups {
 public:
  explicit PackedGroups(const std::map<std::string, PartitionRecord>& partitions);

  // The group of a partition; null if it has no weights.
  const PackedGroup* Of(const std::string& partition) const;

 private:
  std::vector<PackedGroup> groups_;
  std::map<std::string, size_t> group_of_;  // by partition
};

}  // namespace movd
