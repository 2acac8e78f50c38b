#include "cores.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace sparseflow {
namespace {

constexpr double kNoQuota = std::numeric_limits<double>::infinity();

// Cores' worth of time that one folder of a control group grants, by version 2 of the interface or version 1.
double quota_of(const std::string& folder) {
  std::string quota;
  double period = 0;
  if (std::ifstream(folder + "/cpu.max") >> quota >> period && quota != "max" && period > 0) return std::atof(quota.c_str()) / period;
  double micros = -1;
  if (std::ifstream(folder + "/cpu.cfs_quota_us") >> micros && std::ifstream(folder + "/cpu.cfs_period_us") >> period && micros > 0 && period > 0)
    return micros / period;
  return kNoQuota;
}

// The least quota from the process's own group up to the root. Within a container the group's path may be the host's, and
// its folder not there: then the root of what is mounted counts.
double cgroup_quota() {
  double least = kNoQuota;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // number:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1), mount = "/sys/fs/cgroup";
    if (!controllers.empty()) {
      std::istringstream names(controllers);
      bool of_cpu = false;
      for (std::string name; std::getline(names, name, ',');) of_cpu = of_cpu || name == "cpu";
      if (!of_cpu) continue;
      mount += "/cpu";
    }
    for (;; path.erase(path.rfind('/'))) {
      least = std::min(least, quota_of(mount + path));
      if (path.rfind('/') == std::string::npos) break;
    }
  }
  return least;
}

int scheduled_on() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

int usable_cores() {
  static const double quota = cgroup_quota();
  const int cores = scheduled_on();
  return std::max(1, quota < cores ? static_cast<int>(std::ceil(quota)) : cores);
}

}  // namespace sparseflow
