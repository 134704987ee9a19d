#include "packed_groups.h"

#include <algorithm>
#include <cstdint>
#include <utility>

namespace movd {
namespace {

using Place = std::pair<std::string, uint64_t>;  // file and offset
using Places = std::map<std::string, Place>;     // by key

bool Agree(const Places& some, const Places& others) {
  return std::all_of(others.begin(), others.end(), [&](const auto& entry) {
    const auto found = some.find(entry.first);
    return found == some.end() || found->second == entry.second;
  });
}

}  // namespace

PackedGroups::PackedGroups(const std::map<std::string, PartitionRecord>& partitions) {
  std::vector<Places> places;  // of each group
  for (const auto& [name, record] : partitions) {
    if (record.weights.empty()) continue;
    Places own;
    for (const WeightsRecord& file : record.weights) {
      for (const ConstantRecord& constant : file.constants) {
        if (constant.dtype == "u8") own[constant.key] = {file.path, constant.offset_bytes};  // others are not packed
      }
    }
    size_t group = 0;
    for (; group < groups_.size(); ++group) {
      if (groups_[group].partitions[0]->weights[0].path == record.weights[0].path && Agree(places[group], own)) break;
    }
    if (group == groups_.size()) {
      groups_.emplace_back();
      places.emplace_back();
    }
    groups_[group].partitions.push_back(&record);
    places[group].merge(own);
    group_of_[name] = group;
  }
  for (PackedGroup& group : groups_) {
    std::vector<std::string> parts;
    for (const PartitionRecord* record : group.partitions) {
      parts.push_back(record->program);
      for (const WeightsRecord& file : record->weights) parts.push_back(file.path);
    }
    group.key = PackedCache::KeyOf(parts);
  }
}

const PackedGroup* PackedGroups::Of(const std::string& partition) const {
  const auto found = group_of_.find(partition);
  return found == group_of_.end() ? nullptr : &groups_[found->second];
}

}  // namespace movd
