// The calls of the native module (csrc/calls.h), served to another process over a pipe: how the kernels of another
// architecture run, emulated, beside the Python of this one. tests/support/emulated.py is the other end.
//
// A request is a line, "REGIONS ADDRESS BYTES ... NAME ARGUMENTS ...\n", and the contents of those regions of the other
// process's memory one after another. Addresses among the arguments lie in a region, or are 0. The answer is a line,
// empty or an error, and the regions as the call left them. Where there are none, it is a line of text.
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "calls.h"
#include "cpu/machine.h"

using namespace cmdp;

namespace {

// A part of the other process's memory, and its copy here: as far from a multiple of 64 as the original.
class Region {
 public:
  Region(uintptr_t address, size_t bytes) : address_(address), bytes_(bytes), memory_(new char[bytes + 128]) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(memory_.get());
    copy_ = memory_.get() + (64 - first % 64) % 64 + address % 64;
  }
  char* copy() const { return copy_; }
  size_t bytes() const { return bytes_; }
  bool holds(uintptr_t address) const { return address >= address_ && address - address_ < bytes_; }
  uintptr_t translated(uintptr_t address) const { return reinterpret_cast<uintptr_t>(copy_) + (address - address_); }

 private:
  uintptr_t address_;
  size_t bytes_;
  std::unique_ptr<char[]> memory_;
  char* copy_;
};

struct Request {
  std::istringstream words;
  std::vector<Region> regions;
};

template <class T>
T take(Request& request);

template <class T>
struct Reader {
  static T from(Request& request) {
    T value;
    request.words >> value;
    return value;
  }
};

template <class T>
T take(Request& request) {
  return Reader<T>::from(request);
}

template <>
struct Reader<uintptr_t> {  // an address; numbers are int64_t
  static uintptr_t from(Request& request) {
    uintptr_t address;
    request.words >> address;
    for (const Region& region : request.regions) {
      if (region.holds(address)) return region.translated(address);
    }
    if (address != 0) throw std::out_of_range("an address lies in no region");
    return 0;
  }
};

template <>
struct Reader<double> {
  static double from(Request& request) { return std::strtod(take<std::string>(request).c_str(), nullptr); }
};

template <>
struct Reader<Matrix> {
  static Matrix from(Request& request) {
    const auto address = take<uintptr_t>(request);
    const auto dtype = take<std::string>(request);
    std::vector<int64_t> sizes(take<int64_t>(request)), strides(sizes.size());
    for (auto* numbers : {&sizes, &strides}) {
      for (int64_t& number : *numbers) number = take<int64_t>(request);
    }
    return make_matrix(address, dtype, sizes, strides, take<int64_t>(request));
  }
};

template <size_t count>
struct Reader<std::array<uintptr_t, count>> {
  static std::array<uintptr_t, count> from(Request& request) {
    std::array<uintptr_t, count> addresses;
    for (uintptr_t& address : addresses) address = take<uintptr_t>(request);
    return addresses;
  }
};

template <class... Fields>
struct Reader<std::tuple<Fields...>> {
  static std::tuple<Fields...> from(Request& request) { return {take<Fields>(request)...}; }  // from left to right
};

template <class T>
struct Reader<std::optional<T>> {
  static std::optional<T> from(Request& request) {
    if (!take<bool>(request)) return std::nullopt;
    return take<T>(request);
  }
};

template <>
struct Reader<std::variant<uintptr_t, double>> {
  static std::variant<uintptr_t, double> from(Request& request) {
    if (take<bool>(request)) return take<uintptr_t>(request);
    return take<double>(request);
  }
};

template <class... Parameters>
void call(void (*function)(Parameters...), Request& request) {
  const std::tuple<std::decay_t<Parameters>...> arguments{take<std::decay_t<Parameters>>(request)...};
  if (!request.words) throw std::invalid_argument("an argument is missing or no number");
  std::apply(function, arguments);
}

// Runs the request and returns what there is to say.
std::string serve(Request& request) {
  const auto name = take<std::string>(request);
  std::string text;
  if (name == "token_stats") {
    call(calls::token_stats, request);
  } else if (name == "token_stats_backward") {
    call(calls::token_stats_backward, request);
  } else if (name == "mixture") {
    call(calls::mixture, request);
  } else if (name == "mixture_backward") {
    call(calls::mixture_backward, request);
  } else if (name == "update_states") {
    call(calls::update_states, request);
  } else if (name == "update_tails") {
    call(calls::update_tails, request);
  } else if (name == "tail_backward") {
    call(calls::tail_backward, request);
  } else if (name == "budget_trace") {
    call(calls::budget_trace, request);
  } else if (name == "modified_reward") {
    call(calls::modified_reward, request);
  } else if (name == "set_variant") {
    active_variant = variant_named(take<std::string>(request));
  } else if (name == "variants") {
    for (const Variant& variant : variants())
      text += variant.table->name + std::string(variant.supported ? "+ " : "- ");
  } else if (name == "variant") {
    text = kernels().name;
  } else if (name == "cpu_features") {
    for (const std::string& feature : cpu_features()) text += feature + " ";
  } else {
    throw std::invalid_argument("there is no '" + name + "'");
  }
  return text;
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string line; std::getline(std::cin, line);) {
    Request request{std::istringstream(line), {}};
    const auto regions = take<int64_t>(request);
    for (int64_t i = 0; i < regions; ++i) {
      uintptr_t address;
      size_t bytes;
      request.words >> address >> bytes;
      request.regions.emplace_back(address, bytes);
    }
    for (const Region& region : request.regions) std::cin.read(region.copy(), static_cast<int64_t>(region.bytes()));
    std::string answer;
    try {
      answer = serve(request);
    } catch (const std::exception& error) {
      answer = "error: " + std::string(error.what());
    }
    std::cout << answer << '\n';
    for (const Region& region : request.regions) std::cout.write(region.copy(), static_cast<int64_t>(region.bytes()));
    std::cout.flush();
  }
}
