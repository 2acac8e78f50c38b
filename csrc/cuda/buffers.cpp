#include "buffers.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "device_program.h"

namespace sparseflow::cuda {

template <class T>
std::vector<int32_t> place_buffers(const Program<T>& p, int32_t& rows) {
  const int n = static_cast<int>(p.buffers.size());
  // when a buffer is in use: in the body, and in keep followed by reverse; the others' numbers outlive a list
  std::vector<char> always(n, 0);
  struct Span {
    int first = -1, last = -1;
    bool meets(const Span& other) const { return first >= 0 && other.first >= 0 && first <= other.last && other.first <= last; }
  };
  std::vector<Span> span[2] = {std::vector<Span>(n), std::vector<Span>(n)};
  auto touch = [&](int which, int at, const Operand& o) {
    if (o.buffer < 0) return;
    Span& s = span[which][o.buffer];
    if (s.first < 0) s.first = at;
    s.last = at;
  };
  auto visit = [&](const Op& op, int which, int at) {
    for (const Operand* o : {&op.source, &op.target, &op.seed, &op.weight, &op.factor, &op.factor2, &op.addend, &op.kept, &op.slope_cotangent, &op.value})
      touch(which, at, *o);
    for (const auto& input : op.inputs) touch(which, at, input.rows);
    for (const Operand& output : op.outputs) touch(which, at, output);
    for (const Op::Total& total : op.totals) touch(which, at, total.target);
  };
  int at = 0;
  for (const Op& op : p.body) visit(op, 0, at++);
  at = 0;
  for (const Op& op : p.keep) visit(op, 1, at++);
  for (const Op& op : p.reverse) visit(op, 1, at++);
  auto outlives = [&](const Operand& o) {
    if (o.buffer >= 0) always[o.buffer] = 1;
  };
  for (const Op& op : p.prologue) {
    outlives(op.source), outlives(op.target), outlives(op.addend);
    for (const auto& input : op.inputs) outlives(input.rows);
    for (const Operand& output : op.outputs) outlives(output);
    for (const Op::Total& total : op.totals) outlives(total.target);
  }
  for (int id : {p.input, p.output, p.noise, p.ones, p.cotangent, p.trace_cotangent, p.state_cotangent, p.context, p.context_cotangent})
    if (id >= 0) always[id] = 1;

  auto size = [&](int id) { return int64_t(p.buffers[id].rows) * p.buffers[id].slots; };
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return size(a) > size(b); });
  std::vector<int32_t> place(n, 0);
  std::vector<int> placed;
  int64_t end = 0;
  for (int id : order) {
    std::vector<std::pair<int64_t, int64_t>> taken;
    for (int other : placed)
      if (always[id] || always[other] || span[0][id].meets(span[0][other]) || span[1][id].meets(span[1][other]))
        taken.emplace_back(place[other], place[other] + size(other));
    std::sort(taken.begin(), taken.end());
    int64_t first = 0;
    for (const auto& [from, to] : taken) {
      if (first + size(id) <= from) break;
      first = std::max(first, to);
    }
    place[id] = static_cast<int32_t>(first);
    end = std::max(end, first + size(id));
    placed.push_back(id);
  }
  if (end > (int64_t(1) << 31) / (kMaxTile * 8)) fail("the layers are too wide for a GPU's offsets");
  rows = static_cast<int32_t>(end);
  return place;
}

template std::vector<int32_t> place_buffers(const Program<float>&, int32_t&);
template std::vector<int32_t> place_buffers(const Program<double>&, int32_t&);

}  // namespace sparseflow::cuda
