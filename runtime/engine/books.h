// The books of memory: every byte that the engine holds is written down before it is taken.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

#include "errors.h"

namespace movd {

class Books {
 public:
  // Takes bytes for `what`; throws BudgetError, and takes nothing, if the limit would be exceeded.
  void Take(uint64_t bytes, const std::string& what) {
    const std::lock_guard lock(mutex_);
    if (held_bytes_ + bytes > limit_bytes_) {
      throw BudgetError(what + " needs " + std::to_string(bytes) + " bytes; with " + std::to_string(held_bytes_) +
                        " held that is more than the " + std::to_string(limit_bytes_) + " allowed");
    }
    held_bytes_ += bytes;
    peak_bytes_ = std::max(peak_bytes_, held_bytes_);
  }

  void Give(uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    held_bytes_ -= bytes;
  }

  void SetLimit(uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    limit_bytes_ = bytes;
  }

  void RaiseLimit(uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    limit_bytes_ = std::max(limit_bytes_, bytes);
  }

  // Starts a new peak at what is held now.
  void RestartPeak() {
    const std::lock_guard lock(mutex_);
    peak_bytes_ = held_bytes_;
  }

  uint64_t held_bytes() const {
    const std::lock_guard lock(mutex_);
    return held_bytes_;
  }

  uint64_t peak_bytes() const {
    const std::lock_guard lock(mutex_);
    return peak_bytes_;
  }

 private:
  mutable std::mutex mutex_;
  uint64_t held_bytes_ = 0;
  uint64_t peak_bytes_ = 0;
  uint64_t limit_bytes_ = UINT64_MAX;
};

// Bytes taken from the books for as long as this lives.
class Taken {
 public:
  Taken(Books& books, uint64_t bytes, const std::string& what) : books_(&books), bytes_(bytes) {
    books.Take(bytes, what);
  }
  Taken(Taken&& other) noexcept : books_(std::exchange(other.books_, nullptr)), bytes_(other.bytes_) {}
  Taken& operator=(Taken&& other) noexcept {
    std::swap(books_, other.books_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Taken() {
    if (books_ != nullptr) books_->Give(bytes_);
  }

  // Changes how much is taken; throws BudgetError, and changes nothing, if the limit would be exceeded.
  void Resize(uint64_t bytes, const std::string& what) {
    if (bytes > bytes_) books_->Take(bytes - bytes_, what);
    if (bytes < bytes_) books_->Give(bytes_ - bytes);
    bytes_ = bytes;
  }

 private:
  Books* books_;
  uint64_t bytes_;
};

}  // namespace movd
