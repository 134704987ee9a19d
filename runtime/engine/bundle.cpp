#include "bundle.h"

#include <algorithm>
#include <charconv>
#include <initializer_list>
#include <limits>
#include <set>
#include <string_view>
#include <utility>

#include "json.h"
#include "sha256.h"

namespace movd {
namespace {

constexpr const char* kManifest = "bundle.json";
constexpr const char* kSeal = "bundle.sha256";
constexpr uint64_t kFormatVersion = 1;
constexpr uint64_t kLeastSlabBytes = 4096;
constexpr size_t kDigestDigits = 64;
// Sums of a few sizes, and products with a few counts, fit 64 bits.
constexpr uint64_t kMostBytes = uint64_t{1} << 48;

// A value of the manifest, and the way to it, which errors name: stages[0].variants.plain.order[2].
class Value {
 public:
  Value(const Json& json, std::string path) : json_(json), path_(std::move(path)) {}

  const std::string& path() const { return path_; }

  [[noreturn]] void Fail(const std::string& what) const {
    std::string message = path_.empty() ? what : path_ + ": " + what;
    for (char& c : message) {
      if ((c & 0xE0) == 0) c = '?';  // a control character, of a name in the manifest
    }
    throw FileError(std::string(kManifest) + ": " + message + "; compile the bundle again");
  }

  // Checks that this is an object with all of `keys`, and no other but those of `defaulted`.
  void CheckKeys(std::initializer_list<std::string_view> keys,
                 std::initializer_list<std::string_view> defaulted = {}) const {
    CheckKind(Json::Kind::kObject, "an object");
    const auto has = [](const auto& some, std::string_view key) {
      return std::find(some.begin(), some.end(), key) != some.end();
    };
    for (std::string_view key : keys) {
      if (!has(json_.keys, key)) Fail("has no \"" + std::string(key) + "\"");
    }
    for (const std::string& key : json_.keys) {
      if (!has(keys, key) && !has(defaulted, key)) Fail("has a key that this format does not know: \"" + key + "\"");
    }
  }

  Value At(const std::string& key) const {
    CheckKind(Json::Kind::kObject, "an object");
    const auto found = std::find(json_.keys.begin(), json_.keys.end(), key);
    if (found == json_.keys.end()) Fail("has no \"" + key + "\"");
    return {json_.items[static_cast<size_t>(found - json_.keys.begin())], path_.empty() ? key : path_ + "." + key};
  }

  std::vector<std::pair<std::string, Value>> Members() const {
    CheckKind(Json::Kind::kObject, "an object");
    std::vector<std::pair<std::string, Value>> members;
    for (const std::string& key : json_.keys) members.emplace_back(key, At(key));
    return members;
  }

  // What `read` makes of each item of an array.
  template <typename Read>
  auto Items(Read read) const {
    CheckKind(Json::Kind::kArray, "an array");
    std::vector<decltype(read(*this))> made;
    for (size_t i = 0; i < json_.items.size(); ++i) {
      made.push_back(read(Value(json_.items[i], path_ + "[" + std::to_string(i) + "]")));
    }
    return made;
  }

  uint64_t Number(uint64_t least, uint64_t most) const {
    CheckKind(Json::Kind::kNumber, "a number");
    const char* end = json_.text.data() + json_.text.size();
    uint64_t number = 0;
    const auto [last, error] = std::from_chars(json_.text.data(), end, number);
    if (error != std::errc() || last != end || number < least || number > most) {
      Fail("is " + json_.text + ", not a whole number from " + std::to_string(least) + " to " + std::to_string(most));
    }
    return number;
  }

  uint64_t Bytes() const { return Number(0, kMostBytes); }

  const std::string& Text() const {
    CheckKind(Json::Kind::kString, "a string");
    return json_.text;
  }

  // A path that stays inside the bundle.
  std::string Path() const {
    const std::string& path = Text();
    bool plain = std::all_of(path.begin(), path.end(), [](char c) { return c != '\\' && (c & 0xE0) != 0; });
    for (size_t start = 0; start <= path.size();) {
      const size_t end = std::min(path.find('/', start), path.size());
      const std::string part = path.substr(start, end - start);
      plain = plain && !part.empty() && part != "." && part != "..";
      start = end + 1;
    }
    if (!plain) Fail("\"" + path + "\" is not a plain path inside the bundle");
    return path;
  }

 private:
  void CheckKind(Json::Kind kind, const char* name) const {
    if (json_.kind != kind) Fail(std::string("is not ") + name);
  }

  const Json& json_;
  std::string path_;
};

std::string ReadPlainFile(const std::string& root, const char* name) {
  const Mapping mapping(name, OpenInside(root, name));
  return std::string(reinterpret_cast<const char*>(mapping.data()), mapping.size_bytes());
}

bool HoldsOnly(const std::string& text, std::string_view characters) {
  return !text.empty() && text.find_first_not_of(characters) == std::string::npos;
}

std::vector<int32_t> ReadShape(const Value& value) {
  return value.Items([](const Value& length) {
    return static_cast<int32_t>(length.Number(0, std::numeric_limits<int32_t>::max()));
  });
}

// A dtype and shape, and the bytes of a tensor of them.
uint64_t ReadLayout(const Value& value, std::string& dtype, std::vector<int32_t>& shape) {
  dtype = value.At("dtype").Text();
  uint64_t size_bytes = ItemBytes(dtype);
  if (size_bytes == 0) value.At("dtype").Fail("\"" + dtype + "\" is no dtype of this format");
  shape = ReadShape(value.At("shape"));
  for (int32_t length : shape) {
    if (__builtin_mul_overflow(size_bytes, static_cast<uint64_t>(length), &size_bytes) || size_bytes > kMostBytes) {
      value.At("shape").Fail("has too many items");
    }
  }
  return size_bytes;
}

FileRecord ReadFile(const Value& value) {
  value.CheckKeys({"path", "size_bytes", "sha256"});
  FileRecord file{value.At("path").Path(), value.At("size_bytes").Bytes(), value.At("sha256").Text()};
  if (file.sha256.size() != kDigestDigits || !HoldsOnly(file.sha256, "0123456789abcdef")) {
    value.At("sha256").Fail("is not 64 lower-case hexadecimal digits");
  }
  return file;
}

ConstantRecord ReadConstant(const Value& value, uint64_t file_bytes) {
  value.CheckKeys({"key", "offset_bytes", "size_bytes", "dtype", "shape"});
  ConstantRecord constant{
      value.At("key").Text(), value.At("offset_bytes").Bytes(), value.At("size_bytes").Bytes(), {}, {}};
  const uint64_t size_bytes = ReadLayout(value, constant.dtype, constant.shape);
  if (size_bytes != constant.size_bytes) value.Fail("has another size than its dtype and shape");
  if (constant.offset_bytes + constant.size_bytes > file_bytes) value.Fail("does not lie within its file");
  return constant;
}

TensorRecord ReadTensor(const Value& value) {
  value.CheckKeys({"name", "dtype", "shape"});
  TensorRecord tensor{value.At("name").Text(), {}, {}};
  ReadLayout(value, tensor.dtype, tensor.shape);
  return tensor;
}

ResidencyRecord ReadLevel(const Value& value, const std::vector<std::string>& order) {
  value.CheckKeys({"needs_bytes", "prefetch", "pinned", "waits"});
  const auto names = [&](const char* key) {
    return value.At(key).Items([&](const Value& name) {
      if (std::find(order.begin(), order.end(), name.Text()) == order.end()) {
        name.Fail("\"" + name.Text() + "\" is no partition of this variant");
      }
      return name.Text();
    });
  };
  const auto prefetch = static_cast<uint32_t>(value.At("prefetch").Number(0, std::numeric_limits<uint16_t>::max()));
  return {value.At("needs_bytes").Bytes(), prefetch, names("pinned"), names("waits")};
}

bool Same(const TensorRecord& one, const TensorRecord& other) {
  return one.dtype == other.dtype && one.shape == other.shape;
}

// Checks that each tensor is made once, before it is read, and is the same to whoever makes and reads it.
void CheckTensors(const Value& value, const VariantRecord& variant,
                  const std::map<std::string, PartitionRecord>& partitions) {
  std::map<std::string, const TensorRecord*> there;
  const auto make = [&](const TensorRecord& tensor) {
    if (!there.emplace(tensor.name, &tensor).second) value.Fail("tensor \"" + tensor.name + "\" is made twice");
  };
  const auto read = [&](const TensorRecord& tensor, const std::string& reader) {
    const auto found = there.find(tensor.name);
    if (found == there.end()) value.Fail("tensor \"" + tensor.name + "\" is not there when " + reader + " reads it");
    if (!Same(*found->second, tensor)) value.Fail("tensor \"" + tensor.name + "\" is another one to " + reader);
  };
  for (const TensorRecord& tensor : variant.inputs) make(tensor);
  for (const std::string& name : variant.order) {
    const PartitionRecord& partition = partitions.at(name);
    for (const TensorRecord& tensor : partition.inputs) read(tensor, name);
    for (const TensorRecord& tensor : partition.outputs) make(tensor);
  }
  for (const TensorRecord& tensor : variant.inputs) there.erase(tensor.name);
  for (const TensorRecord& tensor : variant.outputs) read(tensor, "the caller");
}

// The parts of the manifest that the engine needs, in an order in which each finds what it names.
class Manifest {
 public:
  BundleRecord Read(const Value& value, const std::string& root) {
    const uint64_t version = value.At("format_version").Number(0, std::numeric_limits<uint32_t>::max());
    if (version != kFormatVersion) {
      value.At("format_version").Fail("is " + std::to_string(version) + ", and this movdc reads " +
                                      std::to_string(kFormatVersion));
    }
    value.CheckKeys(
        {"format_version", "family", "target", "device", "budget_bytes", "peak_bytes", "slab_bytes", "video", "prompt",
         "sampler", "decode", "stages", "partitions", "weights", "files", "spec", "pipeline", "versions"},
        {"quantization", "expected"});
    for (FileRecord& file : value.At("files").Items(ReadFile)) {
      if (files_.count(file.path) > 0) value.At("files").Fail("\"" + file.path + "\" is there twice");
      files_.emplace(file.path, std::move(file));
    }
    for (WeightsRecord& file : value.At("weights").Items([&](const Value& one) { return ReadWeights(one); })) {
      weights_[file.path] = std::move(file);
    }
    const auto read_partition = [&](const Value& one) { return ReadPartition(one); };
    for (PartitionRecord& partition : value.At("partitions").Items(read_partition)) {
      if (partitions_.count(partition.name) > 0) {
        value.At("partitions").Fail("\"" + partition.name + "\" is there twice");
      }
      partitions_.emplace(partition.name, std::move(partition));
    }
    for (const auto& variants : value.At("stages").Items([&](const Value& one) { return ReadStage(one); })) {
      for (const VariantRecord& variant : variants) variants_.push_back(variant);
    }
    const uint64_t slab_bytes = value.At("slab_bytes").Number(kLeastSlabBytes, kMostBytes);
    BundleRecord bundle{
        root, value.At("budget_bytes").Bytes(), slab_bytes, {}, std::move(partitions_), std::move(variants_)};
    for (const auto& [path, file] : files_) bundle.files.push_back(file);
    return bundle;
  }

 private:
  template <typename Record>
  static const Record& Find(const std::map<std::string, Record>& records, const Value& name, const char* what) {
    const auto found = records.find(name.Text());
    if (found == records.end()) name.Fail("\"" + name.Text() + "\" is none of " + what);
    return found->second;
  }

  WeightsRecord ReadWeights(const Value& value) const {
    value.CheckKeys({"path", "constants"});
    const FileRecord& file = Find(files_, value.At("path"), "the files");
    const auto read = [&](const Value& one) { return ReadConstant(one, file.size_bytes); };
    return {file.path, value.At("constants").Items(read)};
  }

  PartitionRecord ReadPartition(const Value& value) const {
    value.CheckKeys({"name", "program", "method", "weights", "inputs", "outputs", "weight_bytes", "held_bytes",
                     "load_bytes", "program_bytes", "workspace_bytes", "planned_bytes", "flops"},
                    {"int8_flops", "delegated_nodes", "fallback"});
    const std::string& name = value.At("name").Text();
    if (!HoldsOnly(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")) {
      value.At("name").Fail("is not made of letters, digits, '.', '_' and '-'");
    }
    return {name,
            Find(files_, value.At("program"), "the files").path,
            value.At("method").Text(),
            value.At("weights").Items([&](const Value& path) { return Find(weights_, path, "the weights"); }),
            value.At("inputs").Items(ReadTensor),
            value.At("outputs").Items(ReadTensor),
            value.At("held_bytes").Bytes(),
            value.At("load_bytes").Bytes(),
            value.At("program_bytes").Bytes(),
            value.At("workspace_bytes").Bytes(),
            value.At("planned_bytes").Bytes()};
  }

  std::vector<VariantRecord> ReadStage(const Value& value) {
    value.CheckKeys({"name", "cadence", "variants"});
    const std::string& name = value.At("name").Text();
    if (!stages_.insert(name).second) value.At("name").Fail("\"" + name + "\" is there twice");
    std::vector<VariantRecord> variants;
    for (const auto& [variant, its] : value.At("variants").Members()) {
      variants.push_back(ReadVariant(its, name, variant));
    }
    return variants;
  }

  VariantRecord ReadVariant(const Value& value, const std::string& stage, const std::string& name) const {
    value.CheckKeys({"inputs", "outputs", "order", "residency", "first_needs_bytes", "certificate", "peak_bytes"});
    VariantRecord variant{
        stage, name, value.At("inputs").Items(ReadTensor), value.At("outputs").Items(ReadTensor), {}, {},
        value.At("first_needs_bytes").Bytes()};
    const auto partition = [&](const Value& one) { return Find(partitions_, one, "the partitions").name; };
    variant.order = value.At("order").Items(partition);
    CheckTensors(value, variant, partitions_);
    variant.residency = value.At("residency").Items([&](const Value& one) { return ReadLevel(one, variant.order); });
    const std::vector<ResidencyRecord>& levels = variant.residency;
    if (levels.empty() || !levels[0].pinned.empty()) value.At("residency").Fail("has no first level that pins nothing");
    const auto less = [](const ResidencyRecord& a, const ResidencyRecord& b) { return a.needs_bytes < b.needs_bytes; };
    if (!std::is_sorted(levels.begin(), levels.end(), less)) {
      value.At("residency").Fail("does not go from the least memory to the most");
    }
    return variant;
  }

  std::map<std::string, FileRecord> files_;
  std::map<std::string, WeightsRecord> weights_;
  std::map<std::string, PartitionRecord> partitions_;
  std::set<std::string> stages_;
  std::vector<VariantRecord> variants_;
};

}  // namespace

BundleRecord ReadBundle(const std::string& root) {
  const std::string seal = ReadPlainFile(root, kSeal);
  const std::string text = ReadPlainFile(root, kManifest);
  Sha256 digest;
  digest.Add(reinterpret_cast<const uint8_t*>(text.data()), text.size());
  if (seal != digest.Hex() + "  " + kManifest + "\n") {
    throw FileError(std::string(kManifest) + ": does not match " + kSeal + "; compile the bundle again");
  }
  const Json json = ParseJson(text, kManifest);
  return Manifest().Read(Value(json, ""), root);
}

}  // namespace movd
