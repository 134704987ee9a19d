// SHA-256 (FIPS 180-4), so that the engine can check files without a crypto library.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace movd {

// A digest of bytes that come in pieces.
class Sha256 {
 public:
  void Add(const uint8_t* data, size_t size_bytes);

  // The digest of all that was added, as 64 lower-case hexadecimal digits; nothing can be added afterwards.
  std::string Hex();

 private:
  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> block_{};  // what has come of the next block
  uint64_t size_bytes_ = 0;
};

}  // namespace movd
