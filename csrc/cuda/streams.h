// The streams of weights that a block reads: the rows of a matrix in pieces of memory, its chunks.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "../calls.h"
#include "../validate.h"
#include "device_program.h"

namespace sparseflow::cuda {

inline size_t aligned(size_t n, size_t to = 16) { return (n + to - 1) / to * to; }

template <class T>
class Streams {
 public:
  explicit Streams(size_t chunk_bytes) : chunk_bytes_(chunk_bytes) {}

  struct Pending {  // a number of a matrix, and its place among those of a chunk
    int matrix, chunk;
    int64_t place, entry;
  };
  std::vector<Chunk> chunks;
  std::vector<std::vector<char>> blobs;  // what each of them holds
  std::vector<Pending> pending;
  int32_t largest = 0, slabs = 0;

  // All columns of some rows where they fit into a chunk; else slabs, few columns of as many rows as a block has threads for.
  void add_dense(int matrix, const std::vector<T>& values, const Entries& m) {
    const int groups = (m.rows + kQuad - 1) / kQuad;
    auto bytes = [](int n, int columns) { return aligned(n * sizeof(RowHead)) + size_t(n) * columns * kQuad * sizeof(T); };
    const bool in_slabs = bytes(groups, m.cols) > chunk_bytes_;
    const int at_once = in_slabs ? std::min(groups, kSlabGroups) : groups;
    const int columns = in_slabs ? std::max<int>(1, static_cast<int>((chunk_bytes_ - aligned(at_once * sizeof(RowHead))) / (at_once * kQuad * sizeof(T)))) : m.cols;
    if (in_slabs) slabs = 1;
    for (int begin = 0; begin < groups; begin += at_once) {
      const int n = std::min(at_once, groups - begin);
      const size_t heads = aligned(n * sizeof(RowHead));
      for (int first = 0; first < m.cols; first += columns) {
        const int width = std::min(columns, m.cols - first);
        std::vector<char> blob(bytes(n, width), 0);
        for (int g = 0; g < n; ++g) {
          uint16_t rows[kQuad];
          for (int r = 0; r < kQuad; ++r) {
            const int row = (begin + g) * kQuad + r;
            rows[r] = static_cast<uint16_t>(row < m.rows ? row : kNoRow);
            if (row >= m.rows) continue;
            const auto column = m.col.begin();
            const int from = static_cast<int>(std::lower_bound(column + m.row_ptr[row], column + m.row_ptr[row + 1], first) - column);
            for (int k = from; k < m.row_ptr[row + 1] && m.col[k] < first + width; ++k) {
              const int64_t place = (int64_t(g) * width + m.col[k] - first) * kQuad + r;
              std::memcpy(blob.data() + heads + place * sizeof(T), &values[m.entry[k]], sizeof(T));
              pending.push_back({matrix, static_cast<int>(chunks.size()), int64_t(heads / sizeof(T)) + place, m.entry[k]});
            }
          }
          std::memcpy(blob.data() + g * sizeof(RowHead), rows, sizeof(RowHead));
        }
        add_chunk(std::move(blob), n, n * width, -1);
        chunks.back().first_column = first;
        chunks.back().columns = width;
        chunks.back().last = first + width == m.cols;
      }
    }
  }

  void add_chunk(std::vector<char> blob, int rows, int quads, int32_t values) {
    Chunk chunk{};
    chunk.bytes = static_cast<int32_t>(blob.size());
    chunk.rows = rows, chunk.quads = quads, chunk.last = 1;
    chunks.push_back(chunk);
    indirect_.push_back(values);
    largest = std::max(largest, static_cast<int32_t>(blob.size()));
    blobs.push_back(std::move(blob));
  }

  // The entries of a row in the order they are stored. Neighbouring quads are read by neighbouring parts of a row at once,
  // their k-th entries together: eight rows of four samples, four of eight or two of sixteen are 128 bytes, one cycle's
  // worth, if they begin in different banks. So the k-th entries of eight quads come from columns that differ modulo eight,
  // or at least modulo four, as far as the row has them.
  static std::vector<int> spread_over_banks(const Entries& m, int row) {
    constexpr int kBanks = 8;
    std::vector<int> waiting[kBanks];
    for (int e = m.row_ptr[row + 1] - 1; e >= m.row_ptr[row]; --e) waiting[m.col[e] % kBanks].push_back(e);
    const int n = m.row_ptr[row + 1] - m.row_ptr[row], quads = (n + kQuad - 1) / kQuad;
    std::vector<int> order(size_t(quads) * kQuad, -1);
    auto fullest = [&](int first, int step) {
      int best = -1;
      for (int b = first; b < kBanks; b += step)
        if (!waiting[b].empty() && (best < 0 || waiting[b].size() > waiting[best].size())) best = b;
      return best;
    };
    int left = n;
    for (int block = 0; block < quads; block += kBanks) {
      const int here = std::min(kBanks, quads - block);
      for (int k = 0; k < kQuad; ++k)
        for (int q = 0; q < here && left > 0; ++q, --left) {
          int bank = waiting[q].empty() ? -1 : q;
          if (bank < 0) bank = fullest(q % 4, 4);
          if (bank < 0) bank = fullest(0, 1);
          order[size_t(block + q) * kQuad + k] = waiting[bank].back();
          waiting[bank].pop_back();
        }
    }
    return order;  // -1: nothing, in the last block
  }

  void add(int matrix, const std::vector<T>& values, const Entries& m, int32_t dynamic) {
    const bool indirect = dynamic >= 0;
    const size_t weight = indirect ? sizeof(uint32_t) : sizeof(T);
    auto quads = [&](int row) { return (m.row_ptr[row + 1] - m.row_ptr[row] + kQuad - 1) / kQuad; };
    std::vector<int> order(m.rows);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return quads(a) > quads(b); });
    for (size_t begin = 0; begin < order.size();) {
      size_t end = begin, total = 0;
      auto bytes = [&](size_t rows, size_t n) { return aligned(rows * sizeof(RowHead)) + n * kQuad * weight + aligned(n * kQuad * sizeof(uint16_t)); };
      while (end < order.size() && (end == begin || bytes(end + 1 - begin, total + quads(order[end])) <= chunk_bytes_)) total += quads(order[end++]);
      std::vector<char> blob(bytes(end - begin, total), 0);
      RowHead* const heads = reinterpret_cast<RowHead*>(blob.data());
      char* const weights = blob.data() + aligned((end - begin) * sizeof(RowHead));
      uint16_t* const cols = reinterpret_cast<uint16_t*>(weights + total * kQuad * weight);
      uint32_t at = 0;
      for (size_t r = begin; r < end; ++r) {
        const int row = order[r];
        heads[r - begin] = {uint32_t(row) | uint32_t(quads(row)) << 16, at};
        const std::vector<int> order_in_row = spread_over_banks(m, row);
        worked(64 * int64_t(order_in_row.size() + 1));
        for (int k = 0; k < quads(row) * kQuad; ++k) {
          // filled up with columns of the row's own: their activations are what the sum depends on anyway
          const bool real = order_in_row[k] >= 0;
          const int first_of_quad = order_in_row[k / kQuad * kQuad], e = real ? order_in_row[k] : first_of_quad >= 0 ? first_of_quad : order_in_row[0];
          cols[size_t(at) * kQuad + k] = static_cast<uint16_t>(m.col[e]);
          if (indirect) {
            // the last dynamic value is zero, for those that fill up
            const uint32_t number = real ? uint32_t(m.entry[e]) : kFillUp;
            std::memcpy(weights + (size_t(at) * kQuad + k) * weight, &number, weight);
          } else if (real) {
            const T value = values[m.entry[e]];
            std::memcpy(weights + (size_t(at) * kQuad + k) * weight, &value, weight);
            pending.push_back({matrix, static_cast<int>(chunks.size()), int64_t(weights - blob.data()) / int64_t(weight) + int64_t(at) * kQuad + k, m.entry[e]});
          }
        }
        at += quads(row);
      }
      if (quads(order[begin]) > 0xffff) fail("a row of a layer has more than 262140 weights");
      add_chunk(std::move(blob), static_cast<int>(end - begin), static_cast<int>(total), dynamic);
      begin = end;
    }
  }

  // The last dynamic value is zero, for those that fill up rows.
  void fill_up_with(int32_t zero) {
    for (size_t c = 0; c < blobs.size(); ++c) {
      if (indirect_[c] < 0) continue;
      const Chunk& chunk = chunks[c];
      char* const at = blobs[c].data() + aligned(chunk.rows * sizeof(RowHead));
      for (int k = 0; k < chunk.quads * kQuad; ++k) {
        uint32_t number;
        std::memcpy(&number, at + k * sizeof number, sizeof number);
        if (number == kFillUp) number = uint32_t(zero - indirect_[c]);
        std::memcpy(at + k * sizeof number, &number, sizeof number);
      }
    }
  }

 private:
  static constexpr uint32_t kFillUp = 0xffffffffu;
  const size_t chunk_bytes_;
  std::vector<int32_t> indirect_;  // by chunk: the first of the dynamic values its indices count from; -1: none
};

}  // namespace sparseflow::cuda
