// The Python side of the engine: numpy arrays in and out, the GIL released while files are checked and partitions run.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "engine.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using Input = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::c_contig, nb::device::cpu>;

void Run(movd::Engine& engine, const std::vector<std::pair<std::string, std::string>>& schedule,
         const std::map<std::string, Input>& inputs, const std::map<std::string, Output>& outputs,
         const nb::callable& after) {
  std::vector<movd::InstructionRecord> instructions;
  for (const auto& [op, partition] : schedule) {
    const movd::Op code = op == "load" ? movd::Op::kLoad : op == "run" ? movd::Op::kRun : movd::Op::kFree;
    instructions.push_back({code, partition});
  }
  std::map<std::string, movd::Buffer> input_buffers;
  for (const auto& [name, array] : inputs) {
    input_buffers[name] = {const_cast<void*>(array.data()), array.nbytes()};
  }
  std::map<std::string, movd::Buffer> output_buffers;
  for (const auto& [name, array] : outputs) output_buffers[name] = {array.data(), array.nbytes()};
  nb::gil_scoped_release release;
  engine.Run(instructions, input_buffers, output_buffers, [&](size_t index) {
    nb::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();  // Ctrl-C between two instructions
    after(index);
  });
}

}  // namespace

NB_MODULE(_engine, module) {
  nb::exception<movd::FileError>(module, "FileError");
  nb::exception<movd::PartitionError>(module, "PartitionError");
  nb::exception<movd::ScheduleError>(module, "ScheduleError");

  nb::class_<movd::FileRecord>(module, "FileRecord").def(nb::init<std::string, uint64_t, std::string>());
  nb::class_<movd::TensorRecord>(module, "TensorRecord")
      .def(nb::init<std::string, std::string, std::vector<int32_t>>());
  nb::class_<movd::ConstantRecord>(module, "ConstantRecord")
      .def(nb::init<std::string, uint64_t, uint64_t, std::string, std::vector<int32_t>>());
  nb::class_<movd::WeightsRecord>(module, "WeightsRecord")
      .def(nb::init<std::string, std::vector<movd::ConstantRecord>>());
  nb::class_<movd::PartitionRecord>(module, "PartitionRecord")
      .def(nb::init<std::string, std::string, std::vector<movd::WeightsRecord>, std::vector<movd::TensorRecord>,
                    std::vector<movd::TensorRecord>, uint64_t, uint64_t, uint64_t>());

  nb::class_<movd::Engine>(module, "Engine")
      .def("__init__",
           [](movd::Engine* self, const std::string& root, const std::vector<movd::FileRecord>& files,
              std::vector<movd::PartitionRecord> partitions) {
             nb::gil_scoped_release release;
             new (self) movd::Engine(movd::FileStore(root, files), std::move(partitions));
           })
      .def("read_file",
           [](const movd::Engine& engine, const std::string& path) {
             const movd::Mapping mapping = engine.files().Map(path);
             return nb::bytes(mapping.data(), mapping.size_bytes());
           })
      .def("run", &Run, "schedule"_a, "inputs"_a, "outputs"_a, "after"_a)
      .def_prop_ro("peak_bytes", &movd::Engine::peak_bytes);
}
