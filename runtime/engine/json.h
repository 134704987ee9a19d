// A strict reader of JSON (RFC 8259): just that grammar, in UTF-8, with nothing after the value.
#pragma once

#include <string>
#include <vector>

#include "errors.h"

namespace movd {

struct Json {
  enum class Kind { kNull, kBool, kNumber, kString, kArray, kObject };

  Kind kind = Kind::kNull;
  bool truth = false;
  std::string text;               // a string's content in UTF-8, or a number as it is written
  std::vector<Json> items;        // of an array; of an object, the values
  std::vector<std::string> keys;  // of an object, as many as items; no two are equal
};

// Reads the text of a file called `name`; throws FileError that says the line and column of what is wrong.
Json ParseJson(const std::string& text, const std::string& name);

}  // namespace movd
