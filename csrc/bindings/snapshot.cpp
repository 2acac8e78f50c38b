// What a field's numbers were when it was packed: a copy of them, to tell whether they are still the same, and which of
// them were zero.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace py = pybind11;

namespace {

// Pieces of memory that the caller owns; addresses may differ from call to call, sizes may not.
class Snapshot {
 public:
  Snapshot(const std::vector<uintptr_t>& addresses, const std::vector<size_t>& bytes) : bytes_(bytes) {
    size_t total = 0;
    for (size_t size : bytes) total += size;
    kept_.resize(total);
    take(addresses);
  }

  void take(const std::vector<uintptr_t>& addresses) {
    if (addresses.size() != bytes_.size()) throw std::invalid_argument("Snapshot: as many addresses as sizes are needed");
    char* kept = kept_.data();
    for (size_t i = 0; i < bytes_.size(); kept += bytes_[i++]) {
      if (bytes_[i]) std::memcpy(kept, reinterpret_cast<const char*>(addresses[i]), bytes_[i]);
    }
  }

  bool same(const std::vector<uintptr_t>& addresses) const {
    if (addresses.size() != bytes_.size()) return false;
    const char* kept = kept_.data();
    for (size_t i = 0; i < addresses.size(); kept += bytes_[i++]) {
      if (bytes_[i] && std::memcmp(reinterpret_cast<const char*>(addresses[i]), kept, bytes_[i]) != 0) return false;
    }
    return true;
  }

 private:
  std::vector<size_t> bytes_;
  std::vector<char> kept_;
};

// Floating point numbers, as their bits: which of them are zero, of either sign.
template <class Bits>
class Zeros {
 public:
  Zeros(uintptr_t address, size_t count) : mask_(count) {
    const Bits* const x = reinterpret_cast<const Bits*>(address);
    for (size_t i = 0; i < count; ++i) mask_[i] = (x[i] & kButSign) == 0 ? kButSign : 0;
  }
  bool still(uintptr_t address) const {
    constexpr size_t kBlock = 4096;
    const Bits* const x = reinterpret_cast<const Bits*>(address);
    for (size_t first = 0; first < mask_.size(); first += kBlock) {
      const size_t last = std::min(mask_.size(), first + kBlock);
      Bits found = 0;
      for (size_t i = first; i < last; ++i) found |= x[i] & mask_[i];
      if (found) return false;
    }
    return true;
  }

 private:
  static constexpr Bits kButSign = static_cast<Bits>(~Bits(0)) >> 1;
  std::vector<Bits> mask_;
};

template <class Bits>
void bind_zeros(py::module_& m, const char* name) {
  py::class_<Zeros<Bits>>(m, name, "Which of some numbers, contiguous in memory that the caller has checked, are zero.")
      .def(py::init<uintptr_t, size_t>(), py::arg("address"), py::arg("count"))
      .def("still", &Zeros<Bits>::still, py::arg("address"), "whether those are zero in as many numbers here");
}

}  // namespace

void bind_snapshot(py::module_& m) {
  py::class_<Snapshot>(m, "Snapshot", "A copy of pieces of memory that the caller has checked.")
      .def(py::init<const std::vector<uintptr_t>&, const std::vector<size_t>&>(), py::arg("addresses"), py::arg("bytes"))
      .def("take", &Snapshot::take, py::arg("addresses"), "copies these pieces, as large as then, in the place of what was copied")
      .def("same", &Snapshot::same, py::arg("addresses"), "whether these pieces, as large as then, hold what was copied");
  bind_zeros<uint32_t>(m, "ZerosF32");
  bind_zeros<uint64_t>(m, "ZerosF64");
}
