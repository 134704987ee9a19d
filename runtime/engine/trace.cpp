#include "trace.h"

#include <cstdio>

namespace movd {
namespace {

const char* NameOf(What what) {
  switch (what) {
    case What::kLoad: return "load";
    case What::kVerify: return "verify";
    case What::kRead: return "read";
    case What::kPack: return "pack";
    case What::kInit: return "init";
    case What::kRun: return "run";
    case What::kWait: return "wait";
    case What::kFree: return "free";
  }
  return "";
}

}  // namespace

void Trace::Add(Event event) {
  const std::lock_guard lock(mutex_);
  if (event.what == What::kLoad) totals_.load_s += event.duration_s;
  if (event.what == What::kRun) totals_.run_s += event.duration_s;
  if (event.what == What::kWait) totals_.wait_s += event.duration_s;
  if (event.what == What::kRead || event.what == What::kVerify) totals_.read_bytes += event.bytes;
  if (keeps_events_) events_.push_back(std::move(event));
}

std::string Trace::ChromeJson() const {
  std::string json =
      "{\"traceEvents\":[\n"
      "{\"ph\":\"M\",\"pid\":1,\"name\":\"process_name\",\"args\":{\"name\":\"movdc\"}},\n"
      "{\"ph\":\"M\",\"pid\":1,\"tid\":1,\"name\":\"thread_name\",\"args\":{\"name\":\"loader\"}},\n"
      "{\"ph\":\"M\",\"pid\":1,\"tid\":2,\"name\":\"thread_name\",\"args\":{\"name\":\"execution\"}}";
  char line[512];
  const std::lock_guard lock(mutex_);
  for (const Event& event : events_) {
    // Names of partitions come from a checked manifest, and are cut rather than trusted to be short.
    std::snprintf(line, sizeof(line),
                  ",\n{\"ph\":\"X\",\"pid\":1,\"tid\":%d,\"cat\":\"%s\",\"name\":\"%s %.200s\",\"ts\":%.1f,"
                  "\"dur\":%.1f,\"args\":{\"bytes\":%llu}}",
                  static_cast<int>(event.lane), NameOf(event.what), NameOf(event.what), event.partition.c_str(),
                  event.start_s * 1e6, event.duration_s * 1e6, static_cast<unsigned long long>(event.bytes));
    json += line;
    std::snprintf(line, sizeof(line),
                  ",\n{\"ph\":\"C\",\"pid\":1,\"name\":\"held bytes\",\"ts\":%.1f,\"args\":{\"bytes\":%llu}}",
                  (event.start_s + event.duration_s) * 1e6, static_cast<unsigned long long>(event.held_bytes));
    json += line;
  }
  return json + "\n]}\n";
}

}  // namespace movd
