#include "engine.h"

#include <algorithm>
#include <utility>

namespace movd {

Engine::Engine(FileStore files, std::vector<PartitionRecord> partitions) : files_(std::move(files)) {
  for (PartitionRecord& record : partitions) partitions_.emplace(record.name, std::move(record));
}

void Engine::Run(const std::vector<InstructionRecord>& schedule, const std::map<std::string, Buffer>& inputs,
                 const std::map<std::string, Buffer>& outputs, const std::function<void(size_t)>& after) {
  const auto record_of = [&](const InstructionRecord& instruction) -> const PartitionRecord& {
    const auto found = partitions_.find(instruction.partition);
    if (found == partitions_.end()) throw ScheduleError(instruction.partition + ": is no partition of this bundle");
    return found->second;
  };
  std::map<std::string, size_t> last_read;
  for (size_t i = 0; i < schedule.size(); ++i) {
    if (schedule[i].op != Op::kRun) continue;
    for (const TensorRecord& tensor : record_of(schedule[i]).inputs) last_read[tensor.name] = i;
  }

  std::map<std::string, std::unique_ptr<LoadedPartition>> loaded;
  std::map<std::string, std::unique_ptr<uint8_t[]>> tensors;
  uint64_t held_bytes = 0;
  for (const auto& [name, buffer] : inputs) held_bytes += buffer.size_bytes;
  peak_bytes_ = held_bytes;
  const auto note = [&](uint64_t extra_bytes) { peak_bytes_ = std::max(peak_bytes_, held_bytes + extra_bytes); };

  for (size_t i = 0; i < schedule.size(); ++i) {
    const PartitionRecord& record = record_of(schedule[i]);
    if (schedule[i].op == Op::kLoad) {
      note(record.load_bytes);
      loaded[record.name] = std::make_unique<LoadedPartition>(files_, record);
      held_bytes += record.held_bytes;
    } else if (schedule[i].op == Op::kFree) {
      if (loaded.erase(record.name) > 0) held_bytes -= record.held_bytes;
    } else {
      const auto partition = loaded.find(record.name);
      if (partition == loaded.end()) throw ScheduleError(record.name + ": is run before it is loaded");
      std::vector<const void*> sources;
      for (const TensorRecord& tensor : record.inputs) {
        const auto input = inputs.find(tensor.name);
        const auto made = tensors.find(tensor.name);
        if (input != inputs.end()) {
          if (input->second.size_bytes != tensor.SizeBytes()) {
            throw ScheduleError(record.name + ": input " + tensor.name + " has the wrong size");
          }
          sources.push_back(input->second.data);
        } else if (made != tensors.end()) {
          sources.push_back(made->second.get());
        } else if (outputs.count(tensor.name) > 0) {
          sources.push_back(outputs.at(tensor.name).data);
        } else {
          throw ScheduleError(record.name + ": tensor " + tensor.name + " does not exist when it is read");
        }
      }
      std::vector<void*> targets;
      for (const TensorRecord& tensor : record.outputs) {
        const auto output = outputs.find(tensor.name);
        if (output != outputs.end() && output->second.size_bytes == tensor.SizeBytes()) {
          targets.push_back(output->second.data);
        } else {
          auto& buffer = tensors[tensor.name] = std::make_unique<uint8_t[]>(tensor.SizeBytes());
          targets.push_back(buffer.get());
        }
        held_bytes += tensor.SizeBytes();
      }
      note(record.working_bytes);
      partition->second->Run(sources, targets);
      for (const TensorRecord& tensor : record.inputs) {
        if (last_read[tensor.name] == i && tensors.erase(tensor.name) > 0) held_bytes -= tensor.SizeBytes();
      }
    }
    after(i);
  }
}

}  // namespace movd
