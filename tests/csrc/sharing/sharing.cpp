// What the calls of the native module (csrc/calls.h) do to memory that threads share, for ThreadSanitizer to watch
// (.ci/sanitizers). The threads are those that a forked process uses, csrc/cpu/parallel.h: the sanitizer does not know
// how OpenMP's synchronise. Items are handed out by the same code either way; how OpenMP begins and ends a region is
// not looked at.
//
//   sharing             every call, on every variant that runs here: results are the same bits on any number of
//   threads,
//                       and while others call with the same inputs; an exception comes out of parallel_for
//   sharing race        two items add to one number: ThreadSanitizer has to end the process
//   sharing overflow    an int overflows in a thread: UndefinedBehaviorSanitizer has to
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "calls.h"

using namespace cmdp;

namespace {

constexpr int kThreads = 4;
constexpr int64_t kListed = 3;

void demand(bool right, const std::string& what) {
  if (right) return;
  std::fprintf(stderr, "sharing: %s\n", what.c_str());
  std::exit(1);
}

template <class T>
uintptr_t at(const std::vector<T>& values) {
  return reinterpret_cast<uintptr_t>(values.data());
}

// Rows of logits, the second to last of them masked, its token none.
struct Batch {
  std::string dtype;
  int64_t rows, width;
  std::vector<uint16_t> student, teacher;  // two of them for a float
  std::vector<int64_t> tokens, ids;
  std::vector<uint8_t> mask;

  Batch(const std::string& dtype, int64_t rows, int64_t width) : dtype(dtype), rows(rows), width(width) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal(0, 3);
    for (auto* logits : {&student, &teacher}) {
      logits->reserve(rows * width * (dtype == "float32" ? 2 : 1));  // and no more
      for (int64_t i = 0; i < rows * width; ++i) {
        const auto bits = std::bit_cast<uint32_t>(normal(random));
        if (dtype == "float32") logits->push_back(static_cast<uint16_t>(bits));
        logits->push_back(static_cast<uint16_t>(bits >> 16));
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      const bool counts = row != rows - 2;
      mask.push_back(counts);
      tokens.push_back(counts ? row * 17 % width : -1);
      for (const int64_t id : {row, row + 100, width - 1}) ids.push_back(id);
    }
  }

  Matrix matrix(const std::vector<uint16_t>& logits) const {
    return make_matrix(at(logits), dtype, {rows}, {width}, width);
  }
};

// All that is computed of a batch, one array after another.
std::vector<double> computed(const Batch& batch, int threads) {
  const int64_t rows = batch.rows, width = batch.width;
  const Matrix student = batch.matrix(batch.student), teacher = batch.matrix(batch.teacher);
  const uintptr_t tokens = at(batch.tokens), mask = at(batch.mask), ids = at(batch.ids);
  std::vector<double> all;
  const auto keep = [&](const auto& values) { all.insert(all.end(), values.begin(), values.end()); };
  const auto array = [&](int64_t columns = 1, double value = 0) { return std::vector<double>(rows * columns, value); };

  std::vector<std::vector<double>> statistics(kStatistics, array());
  StatisticArgs places;
  for (int i = 0; i < kStatistics; ++i) places[i] = at(statistics[i]);
  auto saved = array(kSaved);
  calls::token_stats(student, teacher, tokens, mask, width, 0.7, places, true, at(saved), threads);
  for (const auto& statistic : statistics) keep(statistic);
  keep(saved);

  std::vector<uint16_t> written(batch.student.size());
  const Matrix out = batch.matrix(written);
  const auto upstream = array(1, 0.5);
  const uintptr_t given = at(upstream);
  calls::token_stats_backward(student, teacher, tokens, mask, width, 0.7, {given, given, given, given}, at(saved), out,
                              threads, 0);
  keep(written);

  auto value = array(), mean = array();
  calls::mixture(student, teacher, mask, width, 0.7, 0.5, 0.5, 0.5, at(saved), at(value), at(mean), threads);
  calls::mixture_backward(student, teacher, mask, width, 0.7, 0.5, 0.5, 0.5, at(saved), at(mean), given, out, threads);
  for (const auto* values : {&value, &mean}) keep(*values);
  keep(written);

  auto states = array(StoredState::kNumbers);
  const TokenState empty = TokenState::empty();
  for (int64_t row = 0; row < rows; ++row) std::memcpy(&states[row * StoredState::kNumbers], &empty, sizeof empty);
  calls::update_states(student, teacher, tokens, 5, 0.7, at(states), threads, mask);
  keep(states);

  auto fields = array(4);
  const TailFields nothing{-TokenState::infinity(), 0, 0, TokenState::infinity()};
  for (int64_t row = 0; row < rows; ++row) std::memcpy(&fields[row * 4], &nothing, sizeof nothing);
  auto listed = array(kListed), own = array();
  calls::update_tails(student, ids, kListed, tokens, mask, width, 0.7, 0, {at(fields), at(listed), at(own)}, threads);
  for (const auto* values : {&fields, &listed, &own}) keep(*values);
  const auto reference = array(1, 8), mass = array(1, 1);
  calls::tail_backward(student, ids, kListed, tokens, mask, width, 0.7, 0,
                       {at(reference), at(mass), given, given, given, at(listed)}, out, threads);
  keep(written);

  const int64_t sequences = 40, total = sequences * 500;
  std::vector<double> cost(total), limits(sequences, 2.0);
  for (int64_t i = 0; i < total; ++i) cost[i] = static_cast<double>(i % 13) / 1000;
  std::vector<std::vector<double>> trace(4, std::vector<double>(total));
  std::vector<uint8_t> violated(total);
  std::vector<int64_t> first(sequences);
  calls::budget_trace(at(cost), true, 0, 0, sequences, total, at(limits), {1.0, false, false},
                      {at(trace[0]), at(trace[1]), at(violated), at(first), at(trace[2])},
                      RewardArgs{"cmdp", false, 1, 0.1, 0.1, 1}, at(cost), at(trace[3]), threads);
  for (const auto& values : trace) keep(values);
  keep(violated), keep(first);
  return all;
}

bool same(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

void every_call(const std::string& variant) {
  // Few long rows are split among threads, many short ones are handed out several at a time.
  for (const Batch& batch : {Batch("float32", 2, 70001), Batch("bfloat16", 9, 20011), Batch("bfloat16", 300, 501)}) {
    const std::string what = variant + ", " + batch.dtype + ", " + std::to_string(batch.rows) + " rows";
    const std::vector<double> alone = computed(batch, 1);
    demand(same(alone, computed(batch, kThreads)), what + ": the number of threads changes the result");
    std::array<std::vector<double>, 2> results;
    std::vector<std::thread> callers;
    for (auto& result : results) callers.emplace_back([&] { result = computed(batch, 2); });
    for (std::thread& caller : callers) caller.join();
    for (const auto& result : results) demand(same(alone, result), what + ": another caller changes the result");
  }
}

// What a body throws is thrown by parallel_for, once, when all threads have ended.
void exceptions() {
  for (const int threads : {1, kThreads}) {
    std::atomic<int> begun{0};
    bool thrown = false;
    try {
      parallel_for(1000, threads, 1, [&](int64_t i) {
        ++begun;
        if (i % 10 == 9) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    demand(thrown, "an exception was lost");
    demand(begun < 1000, "items were handed out after an exception");
  }
}

// What a loop over rows could do wrong. Each thread has one item: it goes on when all have begun theirs.
void race() {
  int64_t total = 0;
  std::atomic<int> begun{0};
  parallel_for(kThreads, kThreads, 1, [&](int64_t i) {
    begun.fetch_add(1, std::memory_order_relaxed);
    while (begun.load(std::memory_order_relaxed) < kThreads) std::this_thread::yield();
    total += i;
  });
  std::printf("%ld\n", static_cast<long>(total));
}

void overflow() {
  std::vector<int> values(1000, std::numeric_limits<int>::max() - 998);
  parallel_for(1000, kThreads, 1, [&](int64_t i) { values[i] += static_cast<int>(i); });
  std::printf("%d\n", values[0]);
}

}  // namespace

int main(int count, char** words) {
  threading.own = true;
  const std::string word = count > 1 ? words[1] : "";
  if (word == "race") return race(), 0;
  if (word == "overflow") return overflow(), 0;
  exceptions();
  int tried = 0;
  for (const Variant& variant : variants()) {
    if (!variant.supported) continue;
    active_variant = variant.table;
    every_call(variant.table->name), ++tried;
  }
  std::printf("%d variants: the same bits on 1 and %d threads, and from 2 callers at once\n", tried, kThreads);
}
