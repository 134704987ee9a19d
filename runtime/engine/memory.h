// How much memory this process may still take, as the system says at this moment.
#pragma once

#include <cstdint>

namespace movd {

// The least of what the system has left and what the control groups (v1 or v2) of this process leave it, page cache
// that can be dropped counted as free. UINT64_MAX where nothing says so.
uint64_t AvailableBytes();

// Gives back to the system what was freed and the allocator keeps in case it is asked again.
void ReturnFreed();

}  // namespace movd
