// The Python side of the engine: numpy arrays in and out, the GIL released while files are checked and partitions run.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "engine.h"
#include "footprint.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using Input = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::c_contig, nb::device::cpu>;

std::map<std::string, movd::Buffer> Buffers(const std::map<std::string, Input>& arrays) {
  std::map<std::string, movd::Buffer> buffers;
  for (const auto& [name, array] : arrays) buffers[name] = {const_cast<void*>(array.data()), array.nbytes()};
  return buffers;
}

std::map<std::string, movd::Buffer> Buffers(const std::map<std::string, Output>& arrays) {
  std::map<std::string, movd::Buffer> buffers;
  for (const auto& [name, array] : arrays) buffers[name] = {array.data(), array.nbytes()};
  return buffers;
}

void Run(movd::Engine& engine, const std::string& stage, const std::string& variant,
         const std::map<std::string, Input>& inputs, const std::map<std::string, Output>& outputs,
         const std::string& next) {
  const auto input_buffers = Buffers(inputs), output_buffers = Buffers(outputs);
  nb::gil_scoped_release release;
  engine.Run(stage, variant, input_buffers, output_buffers, next, [](const std::string&) {
    nb::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();  // Ctrl-C between two partitions
  });
}

void RunPartition(movd::Engine& engine, const std::string& name, const std::map<std::string, Input>& inputs,
                  const std::map<std::string, Output>& outputs) {
  const auto input_buffers = Buffers(inputs), output_buffers = Buffers(outputs);
  nb::gil_scoped_release release;
  engine.RunPartition(name, input_buffers, output_buffers);
}

using Tensor = std::tuple<std::string, std::string, std::vector<int32_t>>;  // as TensorRecord
using Constant = std::tuple<std::string, uint64_t, uint64_t, std::string, std::vector<int32_t>>;  // as ConstantRecord

// What a program of no bundle takes in memory; `weights` is the file of its constants, empty if it has none.
movd::Footprint Measure(const std::string& root,
                        const std::vector<std::tuple<std::string, uint64_t, std::string>>& files,
                        const std::string& program, const std::string& weights, const std::vector<Constant>& constants,
                        const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs,
                        const std::string& packed_cache) {
  std::vector<movd::FileRecord> file_records;
  for (const auto& file : files) file_records.push_back(std::make_from_tuple<movd::FileRecord>(file));
  movd::PartitionRecord record{"program", program, "forward", {}, {}, {}, 0, 0, 0, 0, 0};
  if (!weights.empty()) {
    record.weights.push_back({weights, {}});
    for (const Constant& one : constants) {
      record.weights[0].constants.push_back(std::make_from_tuple<movd::ConstantRecord>(one));
    }
  }
  for (const Tensor& one : inputs) record.inputs.push_back(std::make_from_tuple<movd::TensorRecord>(one));
  for (const Tensor& one : outputs) record.outputs.push_back(std::make_from_tuple<movd::TensorRecord>(one));
  return movd::Measure(movd::FileStore(root, file_records, movd::kMeasuringSlabBytes), record, packed_cache);
}

}  // namespace

NB_MODULE(_engine, module) {
  nb::exception<movd::FileError>(module, "FileError");
  nb::exception<movd::PartitionError>(module, "PartitionError");
  nb::exception<movd::InputError>(module, "InputError");
  nb::exception<movd::BudgetError>(module, "BudgetError");
  nb::exception<movd::CancelledError>(module, "CancelledError");

  nb::class_<movd::Footprint>(module, "Footprint")
      .def_ro("held_bytes", &movd::Footprint::held_bytes)
      .def_ro("program_bytes", &movd::Footprint::program_bytes)
      .def_ro("workspace_bytes", &movd::Footprint::workspace_bytes)
      .def_ro("planned_bytes", &movd::Footprint::planned_bytes);
  module.def("measure", &Measure, "root"_a, "files"_a, "program"_a, "weights"_a, "constants"_a, "inputs"_a, "outputs"_a,
             "packed_cache"_a);

  nb::class_<movd::RunReport>(module, "RunReport")
      .def_ro("wall_s", &movd::RunReport::wall_s)
      .def_ro("load_s", &movd::RunReport::load_s)
      .def_ro("run_s", &movd::RunReport::run_s)
      .def_ro("wait_s", &movd::RunReport::wait_s)
      .def_ro("peak_bytes", &movd::RunReport::peak_bytes)
      .def_ro("read_bytes", &movd::RunReport::read_bytes)
      .def_ro("pinned", &movd::RunReport::pinned);
  nb::enum_<movd::Mode>(module, "Mode")
      .value("sequential", movd::Mode::kSequential)
      .value("concurrent", movd::Mode::kConcurrent)
      .value("dynamic", movd::Mode::kDynamic);
  nb::enum_<movd::Pressure>(module, "Pressure")
      .value("warning", movd::Pressure::kWarning)
      .value("critical", movd::Pressure::kCritical);
  nb::class_<movd::Options>(module, "Options")
      .def(nb::init<movd::Mode, uint64_t, std::string, uint64_t, bool>(), "mode"_a, "budget_bytes"_a,
           "packed_cache"_a, "packed_cache_limit_bytes"_a, "keeps_trace"_a);

  nb::class_<movd::Engine>(module, "Engine")
      .def("__init__",
           [](movd::Engine* self, const std::string& root, const movd::Options& options) {
             nb::gil_scoped_release release;
             new (self) movd::Engine(root, options);
           })
      .def("read_file",
           [](const movd::Engine& engine, const std::string& path) {
             const movd::Mapping mapping = engine.files().Map(path);
             return nb::bytes(mapping.data(), mapping.size_bytes());
           })
      .def("run", &Run, "stage"_a, "variant"_a, "inputs"_a, "outputs"_a, "next"_a)
      .def("run_partition", &RunPartition, "name"_a, "inputs"_a, "outputs"_a)
      .def("set_budget", &movd::Engine::SetBudget)
      .def("relieve", &movd::Engine::Relieve, nb::call_guard<nb::gil_scoped_release>())
      .def("cancel", &movd::Engine::Cancel, nb::call_guard<nb::gil_scoped_release>())
      .def("release", &movd::Engine::Release, nb::call_guard<nb::gil_scoped_release>())
      .def("report", &movd::Engine::report)
      .def("trace", [](const movd::Engine& engine) { return engine.trace().ChromeJson(); })
      .def_prop_ro("peak_bytes", &movd::Engine::peak_bytes);
}
