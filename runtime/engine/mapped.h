// What ExecuTorch reads a program and its weights through: files that are mapped, without a copy.
#pragma once

#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/core/named_data_map.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "file_store.h"
#include "partition.h"

namespace movd {

using executorch::aten::ScalarType;
using executorch::runtime::Error;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::Result;
using executorch::runtime::Span;
using executorch::runtime::TensorLayout;

struct DType {
  ScalarType scalar_type;
  uint64_t item_bytes;
};

inline const std::map<std::string, DType>& DTypes() {
  static const std::map<std::string, DType> types = {
      {"f32", {ScalarType::Float, 4}}, {"f16", {ScalarType::Half, 2}}, {"bf16", {ScalarType::BFloat16, 2}},
      {"i64", {ScalarType::Long, 8}},  {"i32", {ScalarType::Int, 4}},  {"i8", {ScalarType::Char, 1}},
      {"u8", {ScalarType::Byte, 1}},   {"bool", {ScalarType::Bool, 1}}};
  return types;
}

inline std::vector<uint8_t> RowMajor(size_t rank) {
  std::vector<uint8_t> order(rank);
  std::iota(order.begin(), order.end(), uint8_t{0});
  return order;
}

// Gives ExecuTorch the bytes of a mapped program without a copy.
class MappedLoader final : public executorch::runtime::DataLoader {
 public:
  explicit MappedLoader(const Mapping& mapping) : mapping_(mapping) {}

  Result<FreeableBuffer> load(size_t offset, size_t size, const SegmentInfo&) const override {
    if (offset > mapping_.size_bytes() || size > mapping_.size_bytes() - offset) return Error::InvalidProgram;
    return FreeableBuffer(mapping_.data() + offset, size, nullptr);
  }

  Result<size_t> size() const override { return mapping_.size_bytes(); }

 private:
  const Mapping& mapping_;
};

// Gives ExecuTorch the tensors of the mapped weights files by key, as the manifest's tables place them.
class MappedWeights final : public executorch::runtime::NamedDataMap {
 public:
  void Add(Mapping mapping, const std::vector<ConstantRecord>& constants) {
    for (const ConstantRecord& constant : constants) {
      by_key_.emplace(constant.key, Entry{&constant, mappings_.size(), RowMajor(constant.shape.size())});
      keys_.push_back(&constant.key);
    }
    mappings_.push_back(std::move(mapping));
  }

  const std::vector<Mapping>& mappings() const { return mappings_; }

  Result<const TensorLayout> get_tensor_layout(std::string_view key) const override {
    const Entry* entry = Find(key);
    if (entry == nullptr) return Error::NotFound;
    const std::vector<int32_t>& shape = entry->constant->shape;
    return TensorLayout::create(Span<const int32_t>(shape.data(), shape.size()),
                                Span<const uint8_t>(entry->order.data(), entry->order.size()),
                                DTypes().at(entry->constant->dtype).scalar_type);
  }

  Result<FreeableBuffer> get_data(std::string_view key) const override {
    const Entry* entry = Find(key);
    if (entry == nullptr) return Error::NotFound;
    const ConstantRecord& constant = *entry->constant;
    const Mapping& mapping = mappings_[entry->mapping];
    if (constant.offset_bytes > mapping.size_bytes() ||
        constant.size_bytes > mapping.size_bytes() - constant.offset_bytes) {
      return Error::InvalidExternalData;
    }
    const uint8_t* data = mapping.data() + constant.offset_bytes;
    {
      const std::lock_guard lock(mutex_);
      kept_.emplace(data, constant.size_bytes);
    }
    return FreeableBuffer(data, constant.size_bytes,
                          [](void* self, void* freed, size_t) {
                            const auto& weights = *static_cast<const MappedWeights*>(self);
                            const std::lock_guard lock(weights.mutex_);
                            weights.kept_.erase(weights.kept_.find(static_cast<const uint8_t*>(freed)));
                          },
                          const_cast<MappedWeights*>(this));
  }

  // Bytes that ExecuTorch has asked for and not given back: what no delegate has packed.
  uint64_t kept_bytes() const {
    const std::lock_guard lock(mutex_);
    return std::accumulate(kept_.begin(), kept_.end(), uint64_t{0},
                           [](uint64_t sum, const auto& range) { return sum + range.second; });
  }

  // Reads those bytes, so that no run has to wait for the disk.
  void PopulateKept() const {
    const std::lock_guard lock(mutex_);
    for (const auto& [data, size_bytes] : kept_) Populate(data, size_bytes);
  }

  // Tells the system not to keep the files in the page cache, but for those bytes: they are few, and far apart.
  void DropFromPageCache() const {
    const std::lock_guard lock(mutex_);
    for (const Mapping& mapping : mappings_) {
      uint64_t from = 0;
      for (auto kept = kept_.lower_bound(mapping.data()); kept != kept_.end(); ++kept) {
        if (kept->first >= mapping.data() + mapping.size_bytes()) break;
        const auto offset = static_cast<uint64_t>(kept->first - mapping.data());
        if (offset > from) mapping.DropFromPageCache(from, offset - from);
        from = std::max<uint64_t>(from, offset + kept->second);
      }
      mapping.DropFromPageCache(from, mapping.size_bytes() - from);
    }
  }

  Error load_data_into(std::string_view key, void* buffer, size_t size) const override {
    Result<FreeableBuffer> data = get_data(key);
    if (!data.ok()) return data.error();
    if (size > data->size()) return Error::InvalidArgument;
    std::memcpy(buffer, data->data(), size);
    return Error::Ok;
  }

  Result<uint32_t> get_num_keys() const override { return static_cast<uint32_t>(keys_.size()); }

  Result<const char*> get_key(uint32_t index) const override {
    if (index >= keys_.size()) return Error::InvalidArgument;
    return keys_[index]->c_str();
  }

 private:
  struct Entry {
    const ConstantRecord* constant;
    size_t mapping;
    std::vector<uint8_t> order;
  };

  const Entry* Find(std::string_view key) const {
    const auto found = by_key_.find(std::string(key));
    return found == by_key_.end() ? nullptr : &found->second;
  }

  mutable std::mutex mutex_;  // over what is kept: another lane may give back
  mutable std::multimap<const uint8_t*, uint64_t> kept_;  // where it lies, and its bytes
  std::vector<Mapping> mappings_;
  std::vector<const std::string*> keys_;
  std::unordered_map<std::string, Entry> by_key_;
};

}  // namespace movd
