#include "file_store.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>

#include "sha256.h"

namespace movd {
namespace {

int64_t Nanoseconds(const timespec& time) { return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec; }

#ifdef __APPLE__
timespec Modified(const struct stat& status) { return status.st_mtimespec; }
timespec Changed(const struct stat& status) { return status.st_ctimespec; }
using Residence = char;
#else
timespec Modified(const struct stat& status) { return status.st_mtim; }
timespec Changed(const struct stat& status) { return status.st_ctim; }
using Residence = unsigned char;
#endif

// Which pages of a mapping are in memory; none where the system does not say.
std::vector<Residence> Resident(const Mapping& mapping, size_t page_bytes) {
  std::vector<Residence> pages((mapping.size_bytes() + page_bytes - 1) / page_bytes);
  if (mincore(const_cast<uint8_t*>(mapping.data()), mapping.size_bytes(), pages.data()) != 0) {
    std::fill(pages.begin(), pages.end(), Residence{0});
  }
  return pages;
}

}  // namespace

Descriptor::~Descriptor() {
  if (value_ >= 0) close(value_);
}

Identity Identity::Of(int descriptor) {
  struct stat status;
  if (fstat(descriptor, &status) != 0) return {};
  return {status.st_dev, status.st_ino, status.st_size, Nanoseconds(Modified(status)), Nanoseconds(Changed(status))};
}

Mapping::Mapping(std::string path, Descriptor descriptor)
    : path_(std::move(path)), descriptor_(std::move(descriptor)), identity_(Identity::Of(descriptor_.get())) {
  size_bytes_ = static_cast<size_t>(identity_.size_bytes);
  if (size_bytes_ == 0) return;
  void* data = mmap(nullptr, size_bytes_, PROT_READ, MAP_PRIVATE, descriptor_.get(), 0);
  if (data == MAP_FAILED) throw FileError(path_ + ": cannot be mapped (" + std::strerror(errno) + ")");
  data_ = static_cast<const uint8_t*>(data);
}

Mapping::Mapping(Mapping&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::move(other.descriptor_)),
      identity_(other.identity_),
      data_(std::exchange(other.data_, nullptr)),
      size_bytes_(std::exchange(other.size_bytes_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(descriptor_, other.descriptor_);
  std::swap(identity_, other.identity_);
  std::swap(data_, other.data_);
  std::swap(size_bytes_, other.size_bytes_);
  return *this;
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), size_bytes_);
}

void Mapping::CheckUnchanged() const {
  const Identity now = Identity::Of(descriptor_.get());
  // A file that was unlinked or linked elsewhere is whole all the same, so the time of change does not count here.
  if (now.size_bytes != identity_.size_bytes || now.modified_ns != identity_.modified_ns) {
    throw FileError(path_ + ": changed while the bundle was in use; start the run again");
  }
}

void Mapping::LetGo() const {
  if (data_ != nullptr) madvise(const_cast<uint8_t*>(data_), size_bytes_, MADV_DONTNEED);
}

void Mapping::DropFromPageCache(uint64_t offset_bytes, uint64_t part_bytes) const {
#ifdef POSIX_FADV_DONTNEED
  if (part_bytes == 0) return;  // which means: to the end
  posix_fadvise(descriptor_.get(), static_cast<off_t>(offset_bytes), static_cast<off_t>(part_bytes),
                POSIX_FADV_DONTNEED);
#endif
}

bool Populate(const void* data, size_t size_bytes) {
#ifdef MADV_POPULATE_READ
  const uintptr_t page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(data) / page_bytes * page_bytes;
  const uintptr_t last = reinterpret_cast<uintptr_t>(data) + size_bytes;
  return madvise(reinterpret_cast<void*>(first), last - first, MADV_POPULATE_READ) == 0;
#else
  return false;
#endif
}

uint64_t ReadThrough(const Mapping& mapping, std::vector<uint8_t>& slab,
                     const std::function<void(const uint8_t*, size_t)>& each) {
  const size_t page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const std::vector<Residence> resident = each ? std::vector<Residence>{} : Resident(mapping, page_bytes);
  uint64_t read_bytes = 0;
  for (size_t offset = 0; offset < mapping.size_bytes(); offset += slab.size()) {
    const size_t size_bytes = std::min(slab.size(), mapping.size_bytes() - offset);
    if (!each) {
      const auto first = resident.begin() + static_cast<ptrdiff_t>(offset / page_bytes);
      const auto last = resident.begin() + static_cast<ptrdiff_t>((offset + size_bytes + page_bytes - 1) / page_bytes);
      if (std::all_of(first, last, [](Residence page) { return (page & 1) != 0; })) continue;
    }
    for (size_t done = 0; done < size_bytes;) {
      const ssize_t got = pread(mapping.descriptor(), slab.data() + done, size_bytes - done,
                                static_cast<off_t>(offset + done));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) throw FileError(mapping.path() + ": cannot be read (" + std::strerror(errno) + ")");
      if (got == 0) throw FileError(mapping.path() + ": became shorter while the bundle was in use; start the run again");
      done += static_cast<size_t>(got);
    }
    read_bytes += size_bytes;
    if (each) each(slab.data(), size_bytes);
  }
  return read_bytes;
}

uint64_t AbsentBytes(const Mapping& mapping) {
  const size_t page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const std::vector<Residence> pages = Resident(mapping, page_bytes);
  const auto absent = std::count_if(pages.begin(), pages.end(), [](Residence page) { return (page & 1) == 0; });
  return static_cast<uint64_t>(absent) * page_bytes;
}

ForeignMappings::ForeignMappings(const std::string& path) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {  // FIRST-LAST r--s OFFSET DEVICE INODE PATH
    uintptr_t first = 0, last = 0;
    char access[5] = {};
    if (!line.ends_with(path) || std::sscanf(line.c_str(), "%zx-%zx %4s", &first, &last, access) != 3) continue;
    if (access[3] == 's') ranges_.emplace_back(reinterpret_cast<void*>(first), last - first);
  }
}

bool ForeignMappings::Populate() const {
  return !ranges_.empty() && std::all_of(ranges_.begin(), ranges_.end(), [](const auto& range) {
    return movd::Populate(range.first, range.second);
  });
}

void ForeignMappings::LetGo() const {
  for (const auto& [data, size_bytes] : ranges_) madvise(data, size_bytes, MADV_DONTNEED);
}

FileStore::FileStore(std::string root, const std::vector<FileRecord>& files, size_t slab_bytes)
    : root_(std::move(root)) {
  std::vector<uint8_t> slab(slab_bytes);
  for (const FileRecord& file : files) {
    Descriptor descriptor = OpenInside(root_, file.path);
    const Identity identity = Identity::Of(descriptor.get());
    if (static_cast<uint64_t>(identity.size_bytes) != file.size_bytes) {
      throw FileError(file.path + ": has " + std::to_string(identity.size_bytes) + " bytes instead of " +
                      std::to_string(file.size_bytes) + "; compile the bundle again");
    }
    const Mapping mapping(file.path, std::move(descriptor));
    Sha256 digest;
    ReadThrough(mapping, slab, [&](const uint8_t* data, size_t size_bytes) { digest.Add(data, size_bytes); });
    if (digest.Hex() != file.sha256) {
      throw FileError(file.path + ": is damaged (its SHA-256 is not the recorded one); compile the bundle again");
    }
    checked_[file.path] = {identity, file.sha256};
  }
}

Mapping FileStore::Map(const std::string& path) const {
  const auto found = checked_.find(path);
  if (found == checked_.end()) throw FileError(path + ": is not listed among the bundle's files");
  Descriptor descriptor = OpenInside(root_, path);
  Identity now = Identity::Of(descriptor.get());
  Mapping mapping(path, std::move(descriptor));
  const auto& [identity, sha256] = found->second;
  if (now == identity) return mapping;
  // A link to the file that is made or removed elsewhere (compiles share files with their cache) changes the time of
  // change alone. Writing in place changes it too, so such a file is read once more.
  now.changed_ns = identity.changed_ns;
  Sha256 digest;
  if (now == identity) digest.Add(mapping.data(), mapping.size_bytes());
  if (now != identity || digest.Hex() != sha256) {
    throw FileError(path + ": changed while the bundle was in use; start the run again");
  }
  return mapping;
}

// Every part of the path is opened on its own, so that no link can lead out of the folder.
Descriptor OpenInside(const std::string& root, const std::string& path) {
  Descriptor current(open(root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (current.get() < 0) throw FileError(std::string("cannot be opened as a folder (") + std::strerror(errno) + ")");
  std::istringstream parts(path);
  std::string part;
  while (std::getline(parts, part, '/')) {
    const bool last = parts.eof();
    const int flags = O_RDONLY | O_NOFOLLOW | O_CLOEXEC | (last ? O_NONBLOCK : O_DIRECTORY);
    Descriptor next(openat(current.get(), part.c_str(), flags));
    if (next.get() < 0) {
      if (errno == ENOENT) throw FileError(path + ": is missing; compile the bundle again");
      // Linux says ELOOP for a link and ENOTDIR for a link where a folder should be.
      if (errno == ELOOP || errno == ENOTDIR) {
        throw FileError(path + ": is a link or lies behind one; a bundle holds plain files only");
      }
      throw FileError(path + ": cannot be opened (" + std::strerror(errno) + ")");
    }
    current = std::move(next);
  }
  struct stat status;
  if (fstat(current.get(), &status) != 0 || !S_ISREG(status.st_mode)) {
    throw FileError(path + ": is not a plain file; compile the bundle again");
  }
  return current;
}

}  // namespace movd
