// What can go wrong, by kind: a caller may want to tell a bad bundle from too little memory.
#pragma once

#include <stdexcept>
#include <string>

namespace movd {

// A file is missing, damaged, foreign or not where it should be; the message names it.
struct FileError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Loading or running a partition failed; the message names it.
struct PartitionError : std::runtime_error {
  PartitionError(const std::string& partition, const std::string& what) : std::runtime_error(partition + ": " + what) {}
};

// What the caller gave does not fit: a stage, variant or tensor that the bundle has not, or a buffer of another size.
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Memory would be exceeded; nothing was allocated beyond it.
struct BudgetError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The run was stopped by Cancel.
struct CancelledError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace movd
