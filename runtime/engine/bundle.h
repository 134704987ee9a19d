// A bundle's manifest as the engine's records: read once, checked whole, and trusted from then on (docs/bundle.md).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "file_store.h"
#include "partition.h"

namespace movd {

// One level of memory, and how a variant runs within it.
struct ResidencyRecord {
  uint64_t needs_bytes;
  uint32_t prefetch;
  std::vector<std::string> pinned;
  std::vector<std::string> waits;
};

struct VariantRecord {
  std::string stage;
  std::string name;
  std::vector<TensorRecord> inputs;
  std::vector<TensorRecord> outputs;
  std::vector<std::string> order;
  std::vector<ResidencyRecord> residency;  // from the least memory to the most
  uint64_t first_needs_bytes;            // of a first run by the first row
};

struct BundleRecord {
  std::string root;
  uint64_t budget_bytes;  // that it was compiled for
  uint64_t slab_bytes;
  std::vector<FileRecord> files;
  std::map<std::string, PartitionRecord> partitions;  // by name
  std::vector<VariantRecord> variants;  // of all stages, in the order of the manifest
};

// Reads the manifest in a folder, after its seal. Throws FileError that names what is missing, damaged or foreign, and
// the place in the manifest. What it returns is consistent: every name leads somewhere, every tensor is made before it
// is read and is the same to all that name it, and every constant lies within its file. The files are not opened.
BundleRecord ReadBundle(const std::string& root);

}  // namespace movd
