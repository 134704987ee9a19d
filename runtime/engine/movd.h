/* movd: the engine that runs a bundle within a memory budget, for C, Swift (module map), Kotlin (JNI) and others.
 *
 * Plain C99 on the outside; no exception leaves it. The library keeps nothing of the caller's but what a running
 * movd_run uses. docs/embedding.md shows how to build and call it.
 *
 * Threads: every function may be called from any thread at any time, as long as the engine is not being closed.
 * Calls of movd_run and movd_release on one engine wait for each other; all others return at once, or after the
 * partition that is being freed. Engines are independent of each other.
 *
 * Errors: a function that can fail returns a movd_status, and writes through its pointers only if that is MOVD_OK.
 * movd_error() then says what is wrong, where, and what to do.
 *
 * Strings are UTF-8 and end with a zero. What the library gives belongs to it.
 */
#ifndef MOVD_H
#define MOVD_H

#include <stdbool.h>
#include <stdint.h>

#if defined(__GNUC__)
#define MOVD_API __attribute__((visibility("default")))
#else
#define MOVD_API
#endif

#if defined(__clang__)
#define MOVD_NONNULL _Nonnull
#define MOVD_NULLABLE _Nullable
#pragma clang assume_nonnull begin
#else
#define MOVD_NONNULL
#define MOVD_NULLABLE
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this interface; a library of another version must not be called beyond movd_version(). */
#define MOVD_VERSION 1

/* No stage, where one may be named. */
#define MOVD_NONE UINT32_MAX

typedef enum movd_status {
  MOVD_OK = 0,
  MOVD_INPUT_ERROR = 1,     /* an argument of the call does not fit the bundle or this header */
  MOVD_FILE_ERROR = 2,      /* a file is missing, damaged, foreign, or cannot be written */
  MOVD_PARTITION_ERROR = 3, /* a partition cannot be loaded or run */
  MOVD_BUDGET_ERROR = 4,    /* the budget, or the memory that is left, does not hold what the stage needs at least */
  MOVD_CANCELLED = 5,       /* movd_cancel stopped the run */
  MOVD_INTERNAL_ERROR = 6   /* an error of the library itself */
} movd_status;

typedef enum movd_mode {
  MOVD_DYNAMIC = 0,    /* as many partitions stay loaded as the memory allows, others load while one runs */
  MOVD_CONCURRENT = 1, /* none stays loaded; the next one loads while one runs */
  MOVD_SEQUENTIAL = 2  /* each is loaded when the one before has been freed */
} movd_mode;

typedef enum movd_pressure {
  MOVD_PRESSURE_WARNING = 1, /* free half of the bytes that stay loaded */
  MOVD_PRESSURE_CRITICAL = 2 /* free all that can be freed */
} movd_pressure;

typedef enum movd_dtype {
  MOVD_F32 = 0,
  MOVD_F16 = 1,
  MOVD_BF16 = 2,
  MOVD_I64 = 3,
  MOVD_I32 = 4,
  MOVD_I8 = 5,
  MOVD_U8 = 6,
  MOVD_BOOL = 7 /* one byte, 0 or 1 */
} movd_dtype;

/* An open bundle. */
typedef struct movd_engine movd_engine;

/* How to open a bundle; all zeros are the defaults. */
typedef struct movd_options {
  movd_mode mode;
  uint64_t budget_bytes;                   /* for all that the engine holds; 0 is what the system has, measured */
  const char* MOVD_NULLABLE packed_cache;  /* folder that keeps packed weights; NULL is one that movd_close deletes */
  uint64_t packed_cache_limit_bytes;       /* the least recently used files beyond it are deleted; 0 is no limit */
  bool keeps_trace;                        /* whether movd_trace has anything to write; costs memory in a long run */
} movd_options;

/* A tensor of a stage: contiguous, row-major, little-endian. */
typedef struct movd_tensor {
  const char* name;
  movd_dtype dtype;
  uint32_t rank;
  const int32_t* shape; /* [rank] */
  uint64_t size_bytes;
} movd_tensor;

/* One variant of one stage, the unit that runs. What it points to lives as long as the engine. */
typedef struct movd_stage {
  const char* name;    /* as in "denoiser" */
  const char* variant; /* as in "plain" */
  uint32_t input_count;
  uint32_t output_count;
  const movd_tensor* inputs;  /* [input_count] */
  const movd_tensor* outputs; /* [output_count] */
  uint64_t least_bytes;       /* the smallest budget that it runs in, its weights packed or not */
} movd_stage;

/* A buffer of the caller's to read from. */
typedef struct movd_input {
  const void* data;
  uint64_t size_bytes;
} movd_input;

/* A buffer of the caller's to write to. */
typedef struct movd_output {
  void* data;
  uint64_t size_bytes;
} movd_output;

/* What a run did. Loads for the next run that happened meanwhile are counted here. */
typedef struct movd_report {
  double wall_s;
  double load_s; /* the loader lane was busy */
  double run_s;  /* the execution lane was busy */
  double wait_s; /* the execution lane waited for a load */
  uint64_t peak_bytes;
  uint64_t read_bytes;
  uint32_t pinned; /* partitions that stay loaded */
} movd_report;

/* The version of the library: MOVD_VERSION of the header that it was built with. */
MOVD_API uint32_t movd_version(void);

/* What went wrong in the last call on this thread that failed; empty before that. Lives until the next one fails. */
MOVD_API const char* movd_error(void);

/* Opens the bundle in a folder, after checking the SHA-256 of every file in it: seconds for each gigabyte. `options`
 * NULL are the defaults. The engine has a thread of its own until movd_close. */
MOVD_API movd_status movd_open(const char* folder, const movd_options* MOVD_NULLABLE options,
                               movd_engine* MOVD_NULLABLE* MOVD_NONNULL engine);

/* Frees the engine and all that is loaded, after the load in progress. No other call on it may be in progress or
 * follow. NULL does nothing. */
MOVD_API void movd_close(movd_engine* MOVD_NULLABLE engine);

/* The number of stages, each variant counted, which are numbered from 0. */
MOVD_API uint32_t movd_stage_count(const movd_engine* engine);

/* Describes a stage. */
MOVD_API movd_status movd_stage_info(const movd_engine* engine, uint32_t stage, movd_stage* info);

/* The memory budget that the bundle was compiled for. */
MOVD_API uint64_t movd_compiled_budget_bytes(const movd_engine* engine);

/* Runs a stage on the caller's buffers, in the order of its inputs and outputs; blocks until it has ended. No two
 * buffers may overlap. `next` is the variant of the same stage that will run next, or MOVD_NONE: its first partitions
 * load while the last of this one run. After an error nothing stays loaded, and the outputs hold anything. */
MOVD_API movd_status movd_run(movd_engine* engine, uint32_t stage, const movd_input* MOVD_NULLABLE inputs,
                              uint32_t input_count, const movd_output* MOVD_NULLABLE outputs, uint32_t output_count,
                              uint32_t next);

/* Gives the engine another memory budget, from the next run on; 0 is what the system has, measured. */
MOVD_API movd_status movd_set_budget(movd_engine* engine, uint64_t budget_bytes);

/* Frees partitions that stay loaded, at once or after the partition that runs now; the run in progress goes on. Each
 * later run takes back a little of it. For memory warnings of the system. */
MOVD_API movd_status movd_relieve(movd_engine* engine, movd_pressure pressure);

/* Makes the run in progress return MOVD_CANCELLED after the partition that runs now; without one it does nothing. */
MOVD_API movd_status movd_cancel(movd_engine* engine);

/* Frees all that is loaded, after the run in progress. */
MOVD_API movd_status movd_release(movd_engine* engine);

/* What the last run of a stage, of any variant, did. */
MOVD_API movd_status movd_last_report(const movd_engine* engine, uint32_t stage, movd_report* report);

/* Writes what both lanes did so far to a file, as JSON that Perfetto and chrome://tracing show. */
MOVD_API movd_status movd_trace(const movd_engine* engine, const char* path);

#ifdef __cplusplus
}
#endif

#if defined(__clang__)
#pragma clang assume_nonnull end
#endif

#endif /* MOVD_H */
