#include "json.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <set>

namespace movd {
namespace {

constexpr int kDeepest = 32;  // arrays and objects within each other: a reader on a small stack survives any file

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

class Parser {
 public:
  Parser(const std::string& text, const std::string& name) : text_(text), name_(name) {}

  Json Whole() {
    Json value = Value(0);
    SkipSpace();
    if (at_ != text_.size()) Fail("nothing may follow the value");
    return value;
  }

 private:
  [[noreturn]] void Fail(const std::string& what) const {
    const auto here = text_.begin() + static_cast<ptrdiff_t>(at_);
    const auto line = 1 + std::count(text_.begin(), here, '\n');
    const size_t before = at_ == 0 ? std::string::npos : text_.rfind('\n', at_ - 1);
    const auto start = text_.begin() + static_cast<ptrdiff_t>(before == std::string::npos ? 0 : before + 1);
    const auto column = 1 + std::count_if(start, here, [](char c) { return (c & 0xC0) != 0x80; });  // in characters
    throw FileError(name_ + ": line " + std::to_string(line) + ", column " + std::to_string(column) + ": " + what);
  }

  // The character here, and 0 at the end; a 0 within the text is one that no rule takes.
  char Peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool Take(char c) {
    if (Peek() != c || at_ == text_.size()) return false;
    ++at_;
    return true;
  }

  void Expect(char c, const char* where) {
    if (!Take(c)) Fail(std::string("expected '") + c + "' " + where);
  }

  void SkipSpace() {
    while (Peek() == ' ' || Peek() == '\t' || Peek() == '\n' || Peek() == '\r') ++at_;
  }

  Json Value(int depth) {
    SkipSpace();
    Json value;
    const char c = Peek();
    if (c == '{' || c == '[') {
      if (depth == kDeepest) Fail("more than " + std::to_string(kDeepest) + " arrays and objects within each other");
      value = c == '{' ? Object(depth + 1) : Array(depth + 1);
    } else if (c == '"') {
      value.kind = Json::Kind::kString;
      value.text = String();
    } else if (c == '-' || IsDigit(c)) {
      value.kind = Json::Kind::kNumber;
      value.text = Number();
    } else if (Word("true") || Word("false")) {
      value.kind = Json::Kind::kBool;
      value.truth = c == 't';
    } else if (!Word("null")) {
      Fail("expected a value");
    }
    return value;
  }

  bool Word(const char* word) {
    if (text_.compare(at_, std::strlen(word), word) != 0) return false;
    at_ += std::strlen(word);
    return true;
  }

  Json Array(int depth) {
    Json array;
    array.kind = Json::Kind::kArray;
    ++at_;
    SkipSpace();
    if (Take(']')) return array;
    do {
      array.items.push_back(Value(depth));
      SkipSpace();
    } while (Take(','));
    Expect(']', "or ',' after an item");
    return array;
  }

  Json Object(int depth) {
    Json object;
    object.kind = Json::Kind::kObject;
    std::set<std::string> seen;
    ++at_;
    SkipSpace();
    if (Take('}')) return object;
    do {
      SkipSpace();
      if (Peek() != '"') Fail("expected a key");
      const size_t start = at_;
      object.keys.push_back(String());
      if (!seen.insert(object.keys.back()).second) {
        at_ = start;
        Fail("the key is there twice");
      }
      SkipSpace();
      Expect(':', "after a key");
      object.items.push_back(Value(depth));
      SkipSpace();
    } while (Take(','));
    Expect('}', "or ',' after a value");
    return object;
  }

  std::string Number() {
    const size_t start = at_;
    const auto digits = [&] {
      if (!IsDigit(Peek())) Fail("expected a digit");
      while (IsDigit(Peek())) ++at_;
    };
    Take('-');
    if (!Take('0')) digits();
    if (Take('.')) digits();
    if (Take('e') || Take('E')) {
      if (!Take('+')) Take('-');
      digits();
    }
    return text_.substr(start, at_ - start);
  }

  std::string String() {
    std::string out;
    ++at_;
    for (;;) {
      if (at_ == text_.size()) Fail("the text ends within a string");
      const auto c = static_cast<unsigned char>(text_[at_]);
      if (c < 0x20) Fail("a control character within a string");
      if (Take('"')) return out;
      if (c == '\\') {
        Escape(out);
      } else {
        const size_t length = Utf8Length();
        out.append(text_, at_, length);
        at_ += length;
      }
    }
  }

  void Escape(std::string& out) {
    static const std::string letters = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
    const size_t start = at_++;
    if (const size_t found = letters.find(Peek()); found != std::string::npos && at_ < text_.size()) {
      out += meanings[found];
      ++at_;
      return;
    }
    const auto fail = [&](const char* what) {
      at_ = start;
      Fail(what);
    };
    uint32_t code = 0;
    if (!Take('u') || !Hex(code)) fail("no escape of JSON");
    if (code >= 0xD800 && code < 0xDC00) {  // the first half of a pair
      uint32_t second = 0;
      const bool whole = Take('\\') && Take('u') && Hex(second) && second >= 0xDC00 && second < 0xE000;
      if (!whole) fail("half of a pair of escapes");
      code = 0x10000 + ((code - 0xD800) << 10) + (second - 0xDC00);
    } else if (code >= 0xDC00 && code < 0xE000) {
      fail("half of a pair of escapes");
    }
    const auto add = [&](uint32_t byte) { out += static_cast<char>(byte); };
    if (code < 0x80) {
      add(code);
      return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;  // bytes of six bits after the first
    add((more == 1 ? 0xC0 : more == 2 ? 0xE0 : 0xF0) | code >> (6 * more));
    for (int i = more - 1; i >= 0; --i) add(0x80 | (code >> (6 * i) & 0x3F));
  }

  bool Hex(uint32_t& code) {
    static const std::string digits = "0123456789abcdef0123456789ABCDEF";
    for (int i = 0; i < 4; ++i, ++at_) {
      const size_t digit = at_ < text_.size() ? digits.find(text_[at_]) : std::string::npos;
      if (digit == std::string::npos) return false;
      code = code << 4 | static_cast<uint32_t>(digit & 0xF);
    }
    return true;
  }

  // Bytes of the character here, by the table of well-formed sequences (Unicode, table 3-7).
  size_t Utf8Length() const {
    const auto byte = [&](size_t i) {
      return at_ + i < text_.size() ? static_cast<unsigned char>(text_[at_ + i]) : 0u;
    };
    const unsigned first = byte(0);
    if (first < 0x80) return 1;
    const size_t length = first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF5 ? 4 : 0;
    const unsigned least = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
    const unsigned most = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
    bool fits = length > 0 && byte(1) >= least && byte(1) <= most;
    for (size_t i = 2; i < length; ++i) fits = fits && (byte(i) & 0xC0) == 0x80;
    if (!fits) Fail("not UTF-8");
    return length;
  }

  const std::string& text_;
  const std::string& name_;
  size_t at_ = 0;
};

}  // namespace

Json ParseJson(const std::string& text, const std::string& name) { return Parser(text, name).Whole(); }

}  // namespace movd
