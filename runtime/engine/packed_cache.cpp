#include "packed_cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "sha256.h"

namespace movd {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSuffix = ".packed";
constexpr const char* kUnfinished = ".unfinished";
constexpr size_t kDigits = 32;  // of the digests in a name
constexpr size_t kLongestFolder = 160;  // ExecuTorch cuts the path of a file to 255 characters

std::string DigestOf(const Mapping& mapping, std::vector<uint8_t>& slab) {
  Sha256 digest;
  ReadThrough(mapping, slab, [&](const uint8_t* data, size_t size_bytes) { digest.Add(data, size_bytes); });
  return digest.Hex().substr(0, kDigits);
}

// What decides the layout of packed weights beside the weights: the instructions that the processor has.
std::string Processor() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("flags") || line.starts_with("Features")) return line;
  }
  return "unknown";
}

}  // namespace

std::string PackedCache::KeyOf(const std::vector<std::string>& parts) {
  Sha256 digest;
  const auto add = [&](const std::string& text) {
    digest.Add(reinterpret_cast<const uint8_t*>(text.data()), text.size());
    digest.Add(reinterpret_cast<const uint8_t*>("\n"), 1);
  };
  add(Processor());
  for (const std::string& part : parts) add(part);
  return digest.Hex().substr(0, kDigits);
}

PackedCache::PackedCache(std::string folder, uint64_t limit_bytes)
    : folder_(std::move(folder)), limit_bytes_(limit_bytes) {
  std::error_code error;
  fs::create_directories(folder_, error);
  if (folder_.size() > kLongestFolder) {
    throw FileError(folder_ + ": the path is too long for packed weights; choose one of at most " +
                    std::to_string(kLongestFolder) + " characters");
  }
  if (error) throw FileError(folder_ + ": cannot be made a folder for packed weights (" + error.message() + ")");
  for (const fs::directory_entry& entry : fs::directory_iterator(folder_, error)) {
    if (entry.path().extension() != kUnfinished) continue;
    // Left by a process that was stopped, unless somebody holds its lock.
    const Descriptor descriptor(open(entry.path().c_str(), O_RDONLY | O_CLOEXEC));
    if (descriptor.get() >= 0 && flock(descriptor.get(), LOCK_EX | LOCK_NB) == 0) fs::remove(entry.path(), error);
  }
  Trim();
}

std::optional<Mapping> PackedCache::Find(const std::string& key, std::vector<uint8_t>& slab, uint64_t& read_bytes) {
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder_, error)) {
    const std::string name = entry.path().filename();
    if (!name.starts_with(key) || entry.path().extension() != kSuffix) continue;
    Descriptor descriptor(open(entry.path().c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC));
    if (descriptor.get() < 0) continue;
    const Identity identity = Identity::Of(descriptor.get());
    Mapping mapping(entry.path(), std::move(descriptor));
    const auto checked = checked_.find(name);
    const bool known = checked != checked_.end() && checked->second == identity;
    if (!known) read_bytes += mapping.size_bytes();
    if (!known && name != key + "-" + DigestOf(mapping, slab) + kSuffix) {
      fs::remove(entry.path(), error);
      const std::lock_guard lock(mutex_);
      there_.erase(key);
      continue;
    }
    if (!known) {
      const timespec times[2] = {{0, UTIME_NOW}, {0, UTIME_OMIT}};  // the time of access tells Trim what was used last
      futimens(mapping.descriptor(), times);
      checked_[name] = Identity::Of(mapping.descriptor());
    }
    return mapping;
  }
  return std::nullopt;
}

bool PackedCache::Make(const std::string& key, const std::function<void(const std::string& path)>& pack,
                       std::vector<uint8_t>& slab) {
  static std::atomic<uint64_t> counter = 0;
  const fs::path path = fs::path(folder_) / (key + "-" + std::to_string(getpid()) + "-" + std::to_string(counter++) +
                                             kUnfinished);
  std::error_code error;
  try {
    pack(path);
  } catch (...) {
    fs::remove(path, error);
    throw;
  }
  if (!fs::exists(path, error) || fs::file_size(path, error) == 0) {
    fs::remove(path, error);
    const std::lock_guard lock(mutex_);
    there_.insert(key);
    return false;
  }
  std::string digest;
  {
    const Mapping mapping(path, Descriptor(open(path.c_str(), O_RDONLY | O_CLOEXEC)));
    // Pages that are not on the disk yet count as memory that cannot be had back.
    if (fsync(mapping.descriptor()) != 0) {
      throw FileError(path.string() + ": packed weights cannot be written (" + std::strerror(errno) + ")");
    }
    digest = DigestOf(mapping, slab);
  }
  fs::rename(path, fs::path(folder_) / (key + "-" + digest + kSuffix), error);
  if (error) throw FileError(folder_ + ": packed weights cannot be kept there (" + error.message() + ")");
  Trim();
  const std::lock_guard lock(mutex_);
  there_.insert(key);
  return true;
}

bool PackedCache::Has(const std::string& key) {
  const std::lock_guard lock(mutex_);
  if (there_.count(key) > 0) return true;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder_, error)) {
    if (!entry.path().filename().string().starts_with(key) || entry.path().extension() != kSuffix) continue;
    there_.insert(key);
    return true;
  }
  return false;
}

void PackedCache::Trim() const {
  struct Kept {
    int64_t used_s;
    uint64_t size_bytes;
    fs::path path;
  };
  std::error_code error;
  std::vector<Kept> files;
  uint64_t total_bytes = 0;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder_, error)) {
    if (entry.path().extension() != kSuffix) continue;
    struct stat status;
    if (stat(entry.path().c_str(), &status) != 0) continue;
    files.push_back({status.st_atime, static_cast<uint64_t>(status.st_size), entry.path()});
    total_bytes += files.back().size_bytes;
  }
  std::sort(files.begin(), files.end(), [](const Kept& a, const Kept& b) { return a.used_s < b.used_s; });
  for (const Kept& file : files) {
    if (total_bytes <= limit_bytes_) return;
    fs::remove(file.path, error);
    total_bytes -= file.size_bytes;
  }
}

}  // namespace movd
