// The files of a bundle: each is checked before anything parses it, and again for identity whenever it is mapped.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace movd {

// A file is missing, damaged, foreign or not where it should be; the message names it.
struct FileError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct FileRecord {
  std::string path;  // relative to the bundle
  uint64_t size_bytes;
  std::string sha256;
};

// A read-only mapping of a whole file.
class Mapping {
 public:
  Mapping() = default;
  Mapping(const uint8_t* data, size_t size_bytes) : data_(data), size_bytes_(size_bytes) {}
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  const uint8_t* data() const { return data_; }
  size_t size_bytes() const { return size_bytes_; }

 private:
  const uint8_t* data_ = nullptr;
  size_t size_bytes_ = 0;
};

class FileStore {
 public:
  // Checks every record: a plain file reached through no link, of the right size and digest. Throws FileError.
  FileStore(std::string root, const std::vector<FileRecord>& files);

  // Maps a checked file; throws FileError if it has been replaced or changed since.
  Mapping Map(const std::string& path) const;

 private:
  struct Identity {
    dev_t device;
    ino_t inode;
    off_t size_bytes;
    timespec modified;
    timespec changed;
  };

  int Open(const std::string& path) const;
  Mapping MapDescriptor(const std::string& path, int descriptor, size_t size_bytes) const;

  std::string root_;
  std::map<std::string, Identity> checked_;
};

}  // namespace movd
