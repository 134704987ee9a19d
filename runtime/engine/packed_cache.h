// Weights as XNNPACK packs them, kept in files that later loads map instead of packing again.
//
// A file is named after what it was made from (weights, programs, processor) and after its own content, is written
// under another name and renamed, and is checked once in every process. Any file may be deleted at any time.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "file_store.h"

namespace movd {

class PackedCache {
 public:
  // Opens or makes the folder, whose path must be short enough for ExecuTorch, and deletes files that were not used for longest until at most limit_bytes are left.
  PackedCache(std::string folder, uint64_t limit_bytes);

  // The file for a key, checked and mapped; nothing if there is none, or if it was damaged and is now deleted. Adds to
  // read_bytes what checking read.
  std::optional<Mapping> Find(const std::string& key, std::vector<uint8_t>& slab, uint64_t& read_bytes);

  // Makes the file for a key: `pack` gets the path that it has to fill. Says whether it put anything there.
  bool Make(const std::string& key, const std::function<void(const std::string& path)>& pack,
            std::vector<uint8_t>& slab);

  // Whether there is a file for a key, or nothing to put into one.
  bool Has(const std::string& key);

  // A key for this processor and everything in `parts`.
  static std::string KeyOf(const std::vector<std::string>& parts);

 private:
  void Trim() const;

  std::string folder_;
  uint64_t limit_bytes_;
  std::map<std::string, Identity> checked_;  // by file name; the loader's
  std::mutex mutex_;  // over what follows
  std::set<std::string> there_;  // keys that have a file, as far as known, or need none
};

}  // namespace movd
