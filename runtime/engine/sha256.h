// SHA-256 (FIPS 180-4), so that the engine can check files without a crypto library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace movd {

// The digest of size_bytes bytes as 64 lower-case hexadecimal digits.
std::string Sha256Hex(const uint8_t* data, size_t size_bytes);

}  // namespace movd
