// The files of a bundle: each is checked before anything parses it, and again for identity whenever it is mapped.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"

namespace movd {

struct FileRecord {
  std::string path;  // relative to the bundle
  uint64_t size_bytes;
  std::string sha256;
};

// Closes a descriptor on every way out.
class Descriptor {
 public:
  explicit Descriptor(int value = -1) : value_(value) {}
  Descriptor(Descriptor&& other) noexcept : value_(std::exchange(other.value_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  ~Descriptor();

  int get() const { return value_; }

 private:
  int value_;
};

// What tells that a file is still the one that was checked.
struct Identity {
  dev_t device;
  ino_t inode;
  off_t size_bytes;
  int64_t modified_ns;
  int64_t changed_ns;
  bool operator==(const Identity&) const = default;

  static Identity Of(int descriptor);  // all zeros if it cannot be told
};

// A read-only mapping of a whole file.
class Mapping {
 public:
  Mapping() = default;
  Mapping(std::string path, Descriptor descriptor);  // throws FileError
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  const uint8_t* data() const { return data_; }
  size_t size_bytes() const { return size_bytes_; }
  int descriptor() const { return descriptor_.get(); }
  const std::string& path() const { return path_; }

  // Throws FileError if the file has changed since it was mapped: what lies behind its end can no longer be read.
  void CheckUnchanged() const;

  // Lets go of the pages in memory; they come back from the file when they are read again.
  void LetGo() const;

  // Tells the system not to keep a part of the file in the page cache, as far as it does not lie in a page with others.
  void DropFromPageCache(uint64_t offset_bytes, uint64_t part_bytes) const;

 private:
  std::string path_;
  Descriptor descriptor_;
  Identity identity_{};
  const uint8_t* data_ = nullptr;
  size_t size_bytes_ = 0;
};

// Reads what the page cache lacks of mapped memory, and puts its pages into this process's tables: each would cost a fault
// at its first use otherwise. False where the system cannot, or where the file is shorter than it was.
bool Populate(const void* data, size_t size_bytes);

// Memory that somebody else has mapped from a file, as ExecuTorch does with packed weights.
class ForeignMappings {
 public:
  ForeignMappings() = default;

  // Finds the shared mappings of a file in this process; none where the system cannot tell.
  explicit ForeignMappings(const std::string& path);

  bool Populate() const;  // all of them; false if there are none

  // Lets go of their pages; they come back from the file when they are read again.
  void LetGo() const;

 private:
  std::vector<std::pair<void*, size_t>> ranges_;
};

// Reads a whole file through the slab into the page cache, but for what is there already; returns the bytes read. Each
// piece is given to `each`, if there is one, and then all are read. Throws FileError if the file is shorter than mapped.
uint64_t ReadThrough(const Mapping& mapping, std::vector<uint8_t>& slab,
                     const std::function<void(const uint8_t*, size_t)>& each = nullptr);

// Bytes of a mapped file that are not in the page cache; all where the system does not say.
uint64_t AbsentBytes(const Mapping& mapping);

// Opens a plain file below a folder, reached through no link; throws FileError that names it.
Descriptor OpenInside(const std::string& root, const std::string& path);

class FileStore {
 public:
  // Checks that every record's file is there, with the right size and digest. Throws FileError.
  FileStore(std::string root, const std::vector<FileRecord>& files, size_t slab_bytes);

  // Maps a checked file; throws FileError if it has been replaced or changed since.
  Mapping Map(const std::string& path) const;

 private:
  struct Checked {
    Identity identity;
    std::string sha256;
  };
  std::string root_;
  std::map<std::string, Checked> checked_;
};

}  // namespace movd
