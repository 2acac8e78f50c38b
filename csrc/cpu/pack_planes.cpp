// Convolutions made ready for one tile width: the grids of pixels that read alike, the band of the source that a few of
// their rows need, and a step for every entry.
#include <algorithm>
#include <limits>
#include <numeric>

#include "pack.h"

namespace sparseflow {
namespace {

constexpr int64_t kBandBytes = 384 << 10;  // of a band, if it can be: then all of it stays in a second-level cache
constexpr int kRowsPerOverlap = 4;  // rows of a band for every row that two bands have in common, at least

int divided_up(int a, int b) { return (a + b - 1) / b; }
int remainder(int a, int b) { return (a % b + b) % b; }

// One axis. A target position of grid g is g + m * step (forward: g = 0, step = 1), and reads through the tap i, which
// belongs to one grid, the source at stride * m + offset.
struct Axis {
  struct Tap {
    int grid, offset;
  };
  std::vector<Tap> taps;
  std::vector<int> sizes;  // of the grids
  int grids, step, stride, first, reach;  // offsets lie from `first` to `first` + `reach`

  Axis(const Window& w, int axis, bool transposed) {
    const int s = w.stride[axis], positions = transposed ? w.source[axis] : w.target[axis];
    grids = step = transposed ? s : 1;
    stride = transposed ? 1 : s;
    for (int g = 0; g < grids; ++g) sizes.push_back(std::max(0, divided_up(positions - g, step)));
    for (int i = 0; i < w.kernel[axis]; ++i) {
      const int from = i * w.dilation[axis] - w.padding[axis], grid = remainder(from, s);
      taps.push_back(transposed ? Tap{grid, (grid - from) / s} : Tap{0, from});
    }
    const auto [low, high] = std::minmax_element(taps.begin(), taps.end(), [](const Tap& a, const Tap& b) { return a.offset < b.offset; });
    first = low->offset, reach = high->offset - low->offset;
  }
};

struct Entry {
  int32_t target, source, tap, number;
};

}  // namespace

template <class T>
void pack_planes(PackedOp<T>& out, const Op& op, const Program<T>& program, Packed<T>& packed, const Kernels<T>& kernels) {
  const Matrix<T>& matrix = program.matrices[op.matrix];
  const Window& w = matrix.window;
  const bool transposed = op.transposed;
  const Axis down(w, 0, transposed), along(w, 1, transposed);
  const int* const source = transposed ? w.target : w.source;
  const int* const target = transposed ? w.source : w.target;
  Planes& p = out.planes;
  p.source_height = source[0], p.source_width = source[1];
  p.source_planes = transposed ? matrix.pattern_rows() : matrix.cols / w.source_area();
  p.target_planes = transposed ? matrix.cols / w.source_area() : matrix.pattern_rows();
  p.target_area = target[0] * target[1];
  p.stride_y = down.stride, p.stride_x = along.stride;
  p.reach = down.reach;
  p.first_y = down.first, p.first_x = along.first;
  const int rows = *std::max_element(down.sizes.begin(), down.sizes.end()), columns = *std::max_element(along.sizes.begin(), along.sizes.end());
  p.band_columns = columns - 1 + divided_up(along.reach + 1, along.stride);
  const int64_t pixel = int64_t(packed.width) * int64_t(sizeof(T)) * (op.tangent() ? 2 : 1);
  const int64_t line = int64_t(p.source_planes) * along.stride * p.band_columns * pixel;
  auto lines = [&](int64_t of) { return down.stride * (of - 1) + down.reach + 1; };
  const int64_t fit = (kBandBytes / std::max<int64_t>(1, line) - down.reach - 1) / down.stride + 1;
  const int64_t wanted = std::max<int64_t>(fit, int64_t(kRowsPerOverlap) * down.reach / down.stride);
  const int64_t reached = ((int64_t(1) << 31) / std::max<int64_t>(1, line) - down.reach - 1) / down.stride + 1;  // by offsets
  const int most = static_cast<int>(std::clamp<int64_t>(std::min(wanted, reached), 1, std::max(1, rows)));
  p.band = divided_up(std::max(1, rows), divided_up(std::max(1, rows), most));
  if (lines(p.band) * line > std::numeric_limits<uint32_t>::max()) fail("a convolution's rows are too long for 32-bit offsets");
  p.band_rows = static_cast<int32_t>(lines(p.band));
  out.band_bytes = p.band_rows * line;
  for (int gy = 0; gy < down.grids; ++gy)
    for (int gx = 0; gx < along.grids; ++gx)
      out.grids.push_back({along.sizes[gx] > 0 ? down.sizes[gy] : 0, along.sizes[gx], gy * target[1] + gx, down.step * target[1], along.step});
  p.grids = out.grids.data();

  std::vector<Entry> entries;
  for (int o = 0; o < matrix.pattern_rows(); ++o)
    for (int e = matrix.row_ptr[o]; e < matrix.row_ptr[o + 1]; ++e) {
      const int channel = matrix.col[e] / w.taps(), tap = matrix.col[e] % w.taps();
      entries.push_back(transposed ? Entry{channel, o, tap, e} : Entry{o, channel, tap, e});
    }
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.target < b.target; });
  worked(64 * int64_t(entries.size()));
  const bool gradient = op.kind == OpKind::kGradient;
  out.places.resize(gradient ? 0 : entries.size());
  const size_t bytes = step_bytes<T>(1);
  for (size_t g = 0; g < out.grids.size(); ++g) {
    std::vector<int32_t> counts(p.target_planes, 0);
    auto inside = [&](const Entry& e) {
      return size_t(down.taps[e.tap / w.kernel[1]].grid) * along.grids + along.taps[e.tap % w.kernel[1]].grid == g;
    };
    const auto own = static_cast<size_t>(std::count_if(entries.begin(), entries.end(), inside));
    Aligned<char> steps(own * bytes);
    char* step = steps.get();
    for (const Entry& e : entries) {
      if (!inside(e)) continue;
      const int y = down.taps[e.tap / w.kernel[1]].offset - down.first, x = along.taps[e.tap % w.kernel[1]].offset - along.first;
      const int64_t at = ((int64_t(e.source) * p.band_rows + y) * along.stride + x % along.stride) * p.band_columns + x / along.stride;
      *reinterpret_cast<uint32_t*>(step + sizeof(T)) = static_cast<uint32_t>(at * pixel);
      if (!gradient) out.places[e.number] = {static_cast<uint32_t>(g), static_cast<uint32_t>(step - steps.get())};
      ++counts[e.target];
      step += bytes;
    }
    out.blocks.push_back({steps.get(), nullptr, nullptr, p.target_planes, false});
    out.streams.push_back(std::move(steps));
    out.counts.push_back(std::move(counts));
  }
  for (size_t g = 0; g < out.grids.size(); ++g) out.blocks[g].counts = out.counts[g].data();
  out.work = int64_t(matrix.nnz()) * w.target_area() * packed.width * (op.tangent() ? 2 : 1) + 1;
  packed.scratch_bytes = std::max<ptrdiff_t>(packed.scratch_bytes, out.band_bytes);
  if (!gradient) return;
  out.plane_gradient = kernels.plane_gradient[op.carries][packed.width_index];
  if (out.plane_gradient == nullptr) fail("this tile width has no gradient kernels");
  packed.scratch_bytes = std::max<ptrdiff_t>(packed.scratch_bytes, out.band_bytes + int64_t(matrix.nnz()) * kernels.lanes * int64_t(sizeof(T)));
  const ptrdiff_t slot_bytes = ptrdiff_t(packed.width) * ptrdiff_t(sizeof(T));
  auto place = [&](const Operand& o, ptrdiff_t& offset, ptrdiff_t& stride) {
    stride = packed.row_bytes(program.buffers[o.buffer]);
    offset = packed.buffer_offset[o.buffer] + o.row * stride + o.slot * slot_bytes;
  };
  place(op.source, out.source, out.args.source_stride);
  place(op.factor, out.factor, out.args.factor_stride);
  out.entry.resize(entries.size());
  std::iota(out.entry.begin(), out.entry.end(), 0);
  size_t& sums = program.sums[op.sum].each_stage ? packed.stage_sums : packed.lasting_sums;
  out.sums = sums;
  sums += (out.entry.size() + kernels.lanes - 1) / kernels.lanes * kernels.lanes;  // others add whole vectors behind these
}

template <class T>
void run_plane_gradient(const PackedOp<T>& op, const Packed<T>& packed, char* workspace, T* sums) {
  op.plane_gradient({&op.planes, op.streams[0].get(), op.counts[0].data(), workspace + op.factor, workspace + op.source, op.args.factor_stride,
                     op.args.source_stride, workspace + packed.scratch_offset, op.band_bytes, static_cast<int32_t>(op.entry.size()), sums});
}

#define X(T)                                                                                                    \
  template void pack_planes(PackedOp<T>&, const Op&, const Program<T>&, Packed<T>&, const Kernels<T>&);         \
  template void run_plane_gradient(const PackedOp<T>&, const Packed<T>&, char*, T*);
X(float) X(double)
#undef X

}  // namespace sparseflow
