// A copy of the numbers that an engine was packed with, to tell whether they are still the same.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <vector>

namespace py = pybind11;

namespace {

// Pieces of memory that the caller owns; addresses may differ from call to call, sizes may not.
class Snapshot {
 public:
  Snapshot(const std::vector<uintptr_t>& addresses, const std::vector<size_t>& bytes) : bytes_(bytes) {
    if (addresses.size() != bytes.size()) throw std::invalid_argument("Snapshot: as many addresses as sizes are needed");
    size_t total = 0;
    for (size_t size : bytes) total += size;
    kept_.reserve(total);
    for (size_t i = 0; i < bytes.size(); ++i) {
      const char* from = reinterpret_cast<const char*>(addresses[i]);
      kept_.insert(kept_.end(), from, from + bytes[i]);
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

}  // namespace

void bind_snapshot(py::module_& m) {
  py::class_<Snapshot>(m, "Snapshot", "A copy of pieces of memory that the caller has checked.")
      .def(py::init<const std::vector<uintptr_t>&, const std::vector<size_t>&>(), py::arg("addresses"), py::arg("bytes"))
      .def("same", &Snapshot::same, py::arg("addresses"), "whether these pieces, as large as then, hold what was copied");
}
