#include "movd.h"

#include <stdlib.h>  // mkdtemp, which is POSIX

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "engine.h"

namespace {

// Callers in other languages lay structures out themselves.
static_assert(sizeof(movd_status) == 4 && sizeof(movd_mode) == 4 && sizeof(movd_pressure) == 4 &&
              sizeof(movd_dtype) == 4);

thread_local std::string last_error;

// A stage as the caller sees it: the arrays that movd_stage points to.
struct Stage {
  std::string name;
  std::string variant;
  std::vector<movd_tensor> inputs;
  std::vector<movd_tensor> outputs;
  uint64_t least_bytes;
};

movd_dtype DTypeOf(const std::string& name) {
  static const std::map<std::string, movd_dtype> types = {
      {"f32", MOVD_F32}, {"f16", MOVD_F16}, {"bf16", MOVD_BF16}, {"i64", MOVD_I64},
      {"i32", MOVD_I32}, {"i8", MOVD_I8},   {"u8", MOVD_U8},     {"bool", MOVD_BOOL}};
  return types.at(name);
}

std::vector<movd_tensor> Describe(const std::vector<movd::TensorRecord>& records) {
  std::vector<movd_tensor> tensors;
  for (const movd::TensorRecord& record : records) {
    tensors.push_back({record.name.c_str(), DTypeOf(record.dtype), static_cast<uint32_t>(record.shape.size()),
                       record.shape.data(), record.SizeBytes()});
  }
  return tensors;
}

// A folder that nobody else may write to, until this is destroyed.
class TemporaryFolder {
 public:
  TemporaryFolder() : path_((std::filesystem::temp_directory_path() / "movd-XXXXXX").string()) {
    if (mkdtemp(path_.data()) != nullptr) return;
    throw movd::FileError(path_ + ": cannot be made (" + std::strerror(errno) + "); give movd_options a packed_cache");
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

movd::Options OptionsOf(const movd_options& given, const std::string& packed_cache) {
  movd::Options options;
  options.packed_cache = packed_cache;
  switch (given.mode) {
    case MOVD_DYNAMIC: options.mode = movd::Mode::kDynamic; break;
    case MOVD_CONCURRENT: options.mode = movd::Mode::kConcurrent; break;
    case MOVD_SEQUENTIAL: options.mode = movd::Mode::kSequential; break;
    default: throw movd::InputError("mode " + std::to_string(given.mode) + " is none of movd_mode");
  }
  if (given.budget_bytes != 0) options.budget_bytes = given.budget_bytes;
  if (given.packed_cache_limit_bytes != 0) options.packed_cache_limit_bytes = given.packed_cache_limit_bytes;
  options.keeps_trace = given.keeps_trace;
  return options;
}

}  // namespace

struct movd_engine {
  movd_engine(const std::string& folder, const movd_options& options)
      : root(folder), keeps_trace(options.keeps_trace) {
    if (options.packed_cache == nullptr) own_cache.emplace();
    const std::string cache = own_cache ? own_cache->path() : options.packed_cache;
    opened.emplace(folder, OptionsOf(options, cache));
    for (const movd::VariantRecord& variant : engine().bundle().variants) {
      stages.push_back({variant.stage, variant.name, Describe(variant.inputs), Describe(variant.outputs),
                        variant.first_needs_bytes});
    }
  }

  movd::Engine& engine() { return *opened; }
  const movd::Engine& engine() const { return *opened; }

  const Stage& StageAt(uint32_t stage) const {
    if (stage < stages.size()) return stages[stage];
    throw movd::InputError("stage " + std::to_string(stage) + " does not exist; the bundle has " +
                           std::to_string(stages.size()));
  }

  const std::string root;
  const bool keeps_trace;
  std::optional<TemporaryFolder> own_cache;
  std::optional<movd::Engine> opened;  // uses the cache: destroyed before it
  std::vector<Stage> stages;
};

namespace {

movd_status Failed(movd_status status, const std::string& message) {
  last_error = message;
  return status;
}

// Runs the body of a function of the interface and makes a status of what it throws. `root` is the bundle's folder,
// which errors about its files begin with.
movd_status Guarded(const char* root, const std::function<void()>& body) {
  try {
    body();
    return MOVD_OK;
  } catch (const movd::InputError& error) {
    return Failed(MOVD_INPUT_ERROR, error.what());
  } catch (const movd::FileError& error) {
    return Failed(MOVD_FILE_ERROR, std::string(root) + ": " + error.what());
  } catch (const movd::PartitionError& error) {
    return Failed(MOVD_PARTITION_ERROR, error.what());
  } catch (const movd::BudgetError& error) {
    return Failed(MOVD_BUDGET_ERROR, std::string(error.what()) + "; raise the memory budget, or free memory");
  } catch (const movd::CancelledError& error) {
    return Failed(MOVD_CANCELLED, error.what());
  } catch (const std::bad_alloc&) {
    return Failed(MOVD_BUDGET_ERROR, "the system has no memory left");
  } catch (const std::exception& error) {
    return Failed(MOVD_INTERNAL_ERROR, error.what());
  } catch (...) {
    return Failed(MOVD_INTERNAL_ERROR, "an unknown error");
  }
}

void CheckGiven(const void* pointer, const char* name) {
  if (pointer == nullptr) throw movd::InputError(std::string(name) + " is NULL");
}

movd_status Guarded(const movd_engine* engine, const std::function<void()>& body) {
  return Guarded(engine == nullptr ? "" : engine->root.c_str(), [&] {
    CheckGiven(engine, "engine");
    body();
  });
}

// The caller's buffers by the names of the tensors that they are for.
template <typename Given>
std::map<std::string, movd::Buffer> BuffersOf(const Stage& stage, const char* kind,
                                              const std::vector<movd_tensor>& tensors, const Given* given,
                                              uint32_t count) {
  if (count != tensors.size()) {
    throw movd::InputError(stage.name + " (" + stage.variant + "): has " + std::to_string(tensors.size()) + " " + kind +
                           "s, not " + std::to_string(count));
  }
  std::map<std::string, movd::Buffer> buffers;
  for (uint32_t i = 0; i < count; ++i) {
    if (given == nullptr || given[i].data == nullptr) {
      throw movd::InputError(stage.name + " (" + stage.variant + "): " + kind + " " + tensors[i].name + " is NULL");
    }
    buffers[tensors[i].name] = {const_cast<void*>(static_cast<const void*>(given[i].data)), given[i].size_bytes};
  }
  return buffers;
}

void WriteFile(const char* path, const std::string& text) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "wb"), [](std::FILE* open) {
    return open == nullptr ? 0 : std::fclose(open);
  });
  const bool written = file != nullptr && std::fwrite(text.data(), 1, text.size(), file.get()) == text.size() &&
                       std::fflush(file.get()) == 0;
  if (!written) throw movd::FileError(std::string(path) + ": cannot be written (" + std::strerror(errno) + ")");
}

}  // namespace

uint32_t movd_version(void) { return MOVD_VERSION; }

const char* movd_error(void) { return last_error.c_str(); }

movd_status movd_open(const char* folder, const movd_options* options, movd_engine** engine) {
  return Guarded(folder == nullptr ? "" : folder, [&] {
    CheckGiven(folder, "folder");
    CheckGiven(engine, "engine");
    const movd_options defaults = {};
    *engine = std::make_unique<movd_engine>(folder, options == nullptr ? defaults : *options).release();
  });
}

void movd_close(movd_engine* engine) { delete engine; }

uint32_t movd_stage_count(const movd_engine* engine) {
  return engine == nullptr ? 0 : static_cast<uint32_t>(engine->stages.size());
}

movd_status movd_stage_info(const movd_engine* engine, uint32_t stage, movd_stage* info) {
  return Guarded(engine, [&] {
    CheckGiven(info, "info");
    const Stage& one = engine->StageAt(stage);
    *info = {one.name.c_str(),
             one.variant.c_str(),
             static_cast<uint32_t>(one.inputs.size()),
             static_cast<uint32_t>(one.outputs.size()),
             one.inputs.data(),
             one.outputs.data(),
             one.least_bytes};
  });
}

uint64_t movd_compiled_budget_bytes(const movd_engine* engine) {
  return engine == nullptr ? 0 : engine->engine().bundle().budget_bytes;
}

movd_status movd_run(movd_engine* engine, uint32_t stage, const movd_input* inputs, uint32_t input_count,
                     const movd_output* outputs, uint32_t output_count, uint32_t next) {
  return Guarded(engine, [&] {
    const Stage& one = engine->StageAt(stage);
    const std::string then = next == MOVD_NONE ? "" : engine->StageAt(next).variant;
    if (next != MOVD_NONE && engine->StageAt(next).name != one.name) {
      throw movd::InputError("next is a variant of " + engine->StageAt(next).name + "; it must be one of " + one.name);
    }
    engine->engine().Run(one.name, one.variant, BuffersOf(one, "input", one.inputs, inputs, input_count),
                       BuffersOf(one, "output", one.outputs, outputs, output_count), then, [](const std::string&) {});
  });
}

movd_status movd_set_budget(movd_engine* engine, uint64_t budget_bytes) {
  return Guarded(engine, [&] { engine->engine().SetBudget(budget_bytes == 0 ? movd::kMeasured : budget_bytes); });
}

movd_status movd_relieve(movd_engine* engine, movd_pressure pressure) {
  return Guarded(engine, [&] {
    switch (pressure) {
      case MOVD_PRESSURE_WARNING: return engine->engine().Relieve(movd::Pressure::kWarning);
      case MOVD_PRESSURE_CRITICAL: return engine->engine().Relieve(movd::Pressure::kCritical);
    }
    throw movd::InputError("pressure " + std::to_string(pressure) + " is none of movd_pressure");
  });
}

movd_status movd_cancel(movd_engine* engine) {
  return Guarded(engine, [&] { engine->engine().Cancel(); });
}

movd_status movd_release(movd_engine* engine) {
  return Guarded(engine, [&] { engine->engine().Release(); });
}

movd_status movd_last_report(const movd_engine* engine, uint32_t stage, movd_report* report) {
  return Guarded(engine, [&] {
    CheckGiven(report, "report");
    const movd::RunReport made = engine->engine().report(engine->StageAt(stage).name);
    *report = {made.wall_s,     made.load_s,     made.run_s,
               made.wait_s,     made.peak_bytes, made.read_bytes,
               static_cast<uint32_t>(made.pinned.size())};
  });
}

movd_status movd_trace(const movd_engine* engine, const char* path) {
  return Guarded(engine, [&] {
    CheckGiven(path, "path");
    if (!engine->keeps_trace) throw movd::InputError("the engine was opened without keeps_trace, so there is no trace");
    WriteFile(path, engine->engine().trace().ChromeJson());
  });
}
