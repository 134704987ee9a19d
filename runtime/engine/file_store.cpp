#include "file_store.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <sstream>
#include <utility>

#include "sha256.h"

namespace movd {
namespace {

// Closes a descriptor on every way out.
struct Descriptor {
  int value;
  ~Descriptor() {
    if (value >= 0) close(value);
  }
};

bool Same(const timespec& a, const timespec& b) { return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec; }

#ifdef __APPLE__
timespec Modified(const struct stat& status) { return status.st_mtimespec; }
timespec Changed(const struct stat& status) { return status.st_ctimespec; }
#else
timespec Modified(const struct stat& status) { return status.st_mtim; }
timespec Changed(const struct stat& status) { return status.st_ctim; }
#endif

}  // namespace

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_bytes_(std::exchange(other.size_bytes_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_bytes_, other.size_bytes_);
  return *this;
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), size_bytes_);
}

FileStore::FileStore(std::string root, const std::vector<FileRecord>& files) : root_(std::move(root)) {
  for (const FileRecord& file : files) {
    Descriptor descriptor{Open(file.path)};
    struct stat status;
    if (fstat(descriptor.value, &status) != 0 || !S_ISREG(status.st_mode)) {
      throw FileError(file.path + ": is not a plain file; compile the bundle again");
    }
    if (static_cast<uint64_t>(status.st_size) != file.size_bytes) {
      throw FileError(file.path + ": has " + std::to_string(status.st_size) + " bytes instead of " +
                      std::to_string(file.size_bytes) + "; compile the bundle again");
    }
    const Mapping mapping = MapDescriptor(file.path, descriptor.value, file.size_bytes);
    if (Sha256Hex(mapping.data(), mapping.size_bytes()) != file.sha256) {
      throw FileError(file.path + ": is damaged (its SHA-256 is not the recorded one); compile the bundle again");
    }
    checked_[file.path] = {status.st_dev, status.st_ino, status.st_size, Modified(status), Changed(status)};
  }
}

Mapping FileStore::Map(const std::string& path) const {
  const auto found = checked_.find(path);
  if (found == checked_.end()) throw FileError(path + ": is not listed among the bundle's files");
  Descriptor descriptor{Open(path)};
  struct stat status;
  const Identity& identity = found->second;
  if (fstat(descriptor.value, &status) != 0 || status.st_dev != identity.device || status.st_ino != identity.inode ||
      status.st_size != identity.size_bytes || !Same(Modified(status), identity.modified) ||
      !Same(Changed(status), identity.changed)) {
    throw FileError(path + ": changed while the bundle was in use; start the run again");
  }
  return MapDescriptor(path, descriptor.value, static_cast<size_t>(identity.size_bytes));
}

// Opens one component after the other and follows no link, so that nothing outside the bundle can be read.
int FileStore::Open(const std::string& path) const {
  Descriptor current{open(root_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  if (current.value < 0) throw FileError(root_ + ": cannot be opened (" + std::strerror(errno) + ")");
  std::istringstream parts(path);
  std::string part;
  while (std::getline(parts, part, '/')) {
    const bool last = parts.eof();
    const int flags = O_RDONLY | O_NOFOLLOW | O_CLOEXEC | (last ? O_NONBLOCK : O_DIRECTORY);
    const int next = openat(current.value, part.c_str(), flags);
    if (next < 0) {
      if (errno == ENOENT) throw FileError(path + ": is missing; compile the bundle again");
      // Linux says ELOOP for a link and ENOTDIR for a link where a folder should be.
      if (errno == ELOOP || errno == ENOTDIR) {
        throw FileError(path + ": is a link or lies behind one; a bundle holds plain files only");
      }
      throw FileError(path + ": cannot be opened (" + std::strerror(errno) + ")");
    }
    close(std::exchange(current.value, next));
  }
  return std::exchange(current.value, -1);
}

Mapping FileStore::MapDescriptor(const std::string& path, int descriptor, size_t size_bytes) const {
  if (size_bytes == 0) return Mapping();
  void* data = mmap(nullptr, size_bytes, PROT_READ, MAP_PRIVATE, descriptor, 0);
  if (data == MAP_FAILED) throw FileError(path + ": cannot be mapped (" + std::strerror(errno) + ")");
  return Mapping(static_cast<const uint8_t*>(data), size_bytes);
}

}  // namespace movd
