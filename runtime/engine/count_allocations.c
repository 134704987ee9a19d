// Counts the bytes that are allocated, by what was asked for: the heap's own figures depend on what was freed before,
// so that they differ from one process to the next. Replaces the whole of glibc's malloc, as its manual allows.
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

void* __libc_memalign(size_t alignment, size_t size);
void __libc_free(void* base);

struct Header {  // lies before each block
  size_t size;
  size_t offset;  // of the block from where glibc's begins
};

static uint64_t allocated_bytes;
static uint64_t peak_bytes;

// What glibc takes for a block: from 64 KiB on whole pages (the engine says so), and some bytes of its own.
static uint64_t TakenBytes(size_t size) {
  const uint64_t unit = size < 64 * 1024 ? 16 : 4096;
  return (size + 8 + unit - 1) / unit * unit;
}

static struct Header* HeaderOf(void* block) { return (struct Header*)block - 1; }

uint64_t movd_allocated_bytes(void) { return __atomic_load_n(&allocated_bytes, __ATOMIC_RELAXED); }

// The most that has been allocated since this was called last.
uint64_t movd_peak_bytes(void) { return __atomic_exchange_n(&peak_bytes, movd_allocated_bytes(), __ATOMIC_RELAXED); }

void* memalign(size_t alignment, size_t size) {
  if (alignment < sizeof(struct Header)) alignment = sizeof(struct Header);
  if (size > PTRDIFF_MAX - alignment) {
    errno = ENOMEM;
    return NULL;
  }
  char* base = __libc_memalign(alignment, size + alignment);
  if (base == NULL) return NULL;
  char* block = base + alignment;
  *HeaderOf(block) = (struct Header){size, alignment};
  const uint64_t now_bytes = __atomic_add_fetch(&allocated_bytes, TakenBytes(size), __ATOMIC_RELAXED);
  uint64_t most_bytes = __atomic_load_n(&peak_bytes, __ATOMIC_RELAXED);
  while (now_bytes > most_bytes &&
         !__atomic_compare_exchange_n(&peak_bytes, &most_bytes, now_bytes, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return block;
}

void free(void* block) {
  if (block == NULL) return;
  const struct Header header = *HeaderOf(block);
  __atomic_sub_fetch(&allocated_bytes, TakenBytes(header.size), __ATOMIC_RELAXED);
  __libc_free((char*)block - header.offset);
}

size_t malloc_usable_size(void* block) { return block == NULL ? 0 : HeaderOf(block)->size; }

void* malloc(size_t size) { return memalign(0, size); }

void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

void* valloc(size_t size) { return memalign((size_t)sysconf(_SC_PAGESIZE), size); }

int posix_memalign(void** block, size_t alignment, size_t size) {
  if (alignment % sizeof(void*) != 0 || (alignment & (alignment - 1)) != 0 || alignment == 0) return EINVAL;
  void* made = memalign(alignment, size);
  if (made == NULL) return ENOMEM;
  *block = made;
  return 0;
}

void* calloc(size_t count, size_t size) {
  if (size != 0 && count > PTRDIFF_MAX / size) {
    errno = ENOMEM;
    return NULL;
  }
  void* block = malloc(count * size);
  return block == NULL ? NULL : memset(block, 0, count * size);
}

void* realloc(void* block, size_t size) {
  if (block == NULL) return malloc(size);
  if (size == 0) {
    free(block);
    return NULL;
  }
  void* made = malloc(size);
  if (made == NULL) return NULL;
  const size_t before = HeaderOf(block)->size;
  memcpy(made, block, before < size ? before : size);
  free(block);
  return made;
}
