#include "memory.h"

#ifdef __APPLE__
#include <os/proc.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>

namespace movd {
namespace {

std::optional<uint64_t> ReadNumber(const std::string& path) {
  std::ifstream file(path);
  uint64_t number = 0;
  if (file >> number) return number;
  return std::nullopt;  // "max", or there is no such file
}

// The number behind a name in a file of "name number" lines; 0 without one.
uint64_t Lookup(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  std::string key;
  for (uint64_t value = 0; file >> key >> value;) {
    if (key == name) return value;
  }
  return 0;
}

// What one group leaves: its limit less what cannot be dropped.
uint64_t GroupLeaves(const std::string& folder, const char* limit_file, const char* usage_file, const char* prefix) {
  const auto limit = ReadNumber(folder + limit_file);
  const auto usage = ReadNumber(folder + usage_file);
  if (!limit || !usage) return UINT64_MAX;
  const std::string stat = folder + "/memory.stat";
  const std::string total = prefix;
  const uint64_t cache = Lookup(stat, total + "inactive_file") + Lookup(stat, total + "active_file");
  const uint64_t firm = *usage - std::min(cache, *usage);
  return *limit - std::min(firm, *limit);
}

// The group of this process and those above it, each of which may limit it.
uint64_t GroupsLeave(const std::string& mount, std::string group, const char* limit, const char* usage,
                     const char* prefix) {
  uint64_t least = UINT64_MAX;
  for (;;) {
    least = std::min(least, GroupLeaves(mount + group, limit, usage, prefix));
    const size_t slash = group.rfind('/');
    if (group.empty() || slash == std::string::npos) return least;
    group.resize(slash);
  }
}

}  // namespace

#ifdef __APPLE__

uint64_t AvailableBytes() { return os_proc_available_memory(); }

#else

uint64_t AvailableBytes() {
  uint64_t least = UINT64_MAX;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);) {
    std::istringstream words(line);
    std::string key;
    uint64_t kibibytes = 0;
    if (words >> key >> kibibytes && key == "MemAvailable:") least = kibibytes * 1024;
  }
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // ID:CONTROLLERS:PATH
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string group = line.substr(second + 1);
    if (group == "/") group.clear();
    if (controllers == "memory") {
      least = std::min(least, GroupsLeave("/sys/fs/cgroup/memory", group, "/memory.limit_in_bytes",
                                          "/memory.usage_in_bytes", "total_"));
    } else if (controllers.empty()) {
      least = std::min(least, GroupsLeave("/sys/fs/cgroup", group, "/memory.max", "/memory.current", ""));
    }
  }
  return least;
}

#endif

void ReturnFreed() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

}  // namespace movd
