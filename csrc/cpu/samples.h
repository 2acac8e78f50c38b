// Products of a layer by itself, over memory of the user: between his order, samples outermost, and a tile's, samples
// innermost; and what is packed for the batches that come.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

namespace sparseflow {

// Square blocks of 16-byte vectors.
template <class T>
struct Small;
template <>
struct Small<float> {
  typedef float V __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static inline void transpose(V* x) {
    const V a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5), b = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
    const V c = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5), d = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
    x[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5), x[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    x[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5), x[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
  }
};
template <>
struct Small<double> {
  typedef double V __attribute__((vector_size(16)));
  static constexpr int kLanes = 2;
  static inline void transpose(V* x) {
    const V a = __builtin_shufflevector(x[0], x[1], 0, 2), b = __builtin_shufflevector(x[0], x[1], 1, 3);
    x[0] = a, x[1] = b;
  }
};

// What was made for `key`, or is made now; the `most` used last are kept.
template <class Key, class P, class Make>
P& recent(std::vector<std::pair<Key, std::unique_ptr<P>>>& kept, const Key& key, size_t most, Make make) {
  auto found = std::find_if(kept.begin(), kept.end(), [&](const auto& one) { return one.first == key; });
  if (found == kept.end()) {
    std::unique_ptr<P> made = make();
    if (kept.size() == most) kept.erase(kept.begin());
    kept.emplace_back(key, std::move(made));
  } else {
    std::rotate(found, found + 1, kept.end());
  }
  return *kept.back().second;
}

}  // namespace sparseflow
