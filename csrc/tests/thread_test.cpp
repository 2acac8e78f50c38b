// The thread pool, and what is shared by means of it, meant to run under the thread sanitizer too (`make tsan`): loops of
// every size by every number of threads, helpers that come too late, several callers, forks.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "cpu/adjoint.h"
#include "cpu/cores.h"
#include "cpu/linear.h"
#include "cpu/solve.h"
#include "cpu/thread_pool.h"
#include "random_program.h"

using namespace sparseflow;
using namespace sparseflow::testing;

namespace {

struct Forced {
  Forced() { force_threads(true); }
  ~Forced() { force_threads(false); }
};

void test_loops(const std::string& name) {
  for (int threads : {1, 2, 4, 9}) {
    for (int count : {0, 1, 3, 1000}) {
      Cost cost;
      std::vector<int> visits(count, 0);
      std::vector<char> workers(threads, 0);
      parallel_for(count, threads, Work{cost, 1}, [&](int index, int worker) {
        ++visits[index];
        workers.at(worker) = 1;
        // nested in a parallel one: on the caller alone
        if (threads > 1 && count > 1) parallel_for(3, 4, Work{cost, 1}, [&](int, int inner) { visits[index] += inner; });
      });
      check(visits == std::vector<int>(count, 1), name + ": every index once");
    }
    Cost cost;
    const std::string message = thrown([&] {
      parallel_for(100, threads, Work{cost, 1}, [](int index, int) { if (index == 57) throw std::runtime_error("at 57"); });
    });
    check(message == "at 57", name + ": an exception of a body arrives");
    int sum = 0;
    parallel_for(1, threads, Work{cost, 1}, [&](int, int) { ++sum; });
    check(sum == 1, name + ": the pool goes on after an exception");
  }
}

// Loops follow one another at once, so that helpers are always late for some. What a loop uses dies with it: a helper that
// touched it afterwards would be seen here, and by the sanitizers.
void test_late_helpers() {
  const Forced forced;
  Cost cost;
  bool ok = true;
  for (int loop = 0; loop < 3000; ++loop) {
    const int count = 2 + loop % 5;
    auto seen = std::make_unique<std::vector<int>>(count, -1);
    parallel_for(count, 4, Work{cost, 1}, [&, mine = seen.get()](int index, int) { (*mine)[index] = loop + index; });
    for (int i = 0; i < count; ++i) ok = ok && (*seen)[i] == loop + i;
  }
  check(ok, "loops one after another keep apart");
}

// One piece waits until another thread has done all the others: the pool has a second thread, and shares the work.
void test_help_arrives() {
  const Forced forced;
  Cost cost;
  std::atomic<int> done{0};
  std::atomic<bool> waited_in_vain{false};
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<int> by_helpers{0};
  parallel_for(8, 2, Work{cost, 1}, [&](int, int worker) {
    if (worker > 0) by_helpers += std::this_thread::get_id() != caller;
    const auto begin = std::chrono::steady_clock::now();
    while (worker == 0 && done < 1 && !waited_in_vain)
      if (std::chrono::steady_clock::now() - begin > std::chrono::seconds(20)) waited_in_vain = true;
    ++done;
  });
  check(by_helpers > 0 && !waited_in_vain, "a helper takes pieces while the caller is at one");
}

// Neither small loops nor processes of one core get a second thread.
void test_small_loops_stay() {
  Cost cost;
  std::atomic<int> elsewhere{0};
  for (int loop = 0; loop < 2000; ++loop)
    parallel_for(4, 8, Work{cost, 1}, [&](int, int worker) { elsewhere += worker > 0; });
  check(elsewhere == 0, "loops of nothing run on the caller");
  check(threads_at_hand(1e-6, 0, 8) == 1, "a microsecond is for one thread");
  check(threads_at_hand(10.0, 0, 1024) <= usable_cores(), "no more threads than cores");
  // A helper whose core somebody else uses leaves it alone for up to half a second.
  const auto begin = std::chrono::steady_clock::now();
  while (usable_cores() > 1 && threads_at_hand(10.0, 0, 1024) == 1 && std::chrono::steady_clock::now() - begin < std::chrono::seconds(20))
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  if (usable_cores() > 1) check(threads_at_hand(10.0, 0, 1024) > 1, "ten seconds are for many");
}

void test_costs() {
  Cost cost;
  check(!cost.known(), "nothing is known at first");
  cost.learn(1.0);
  cost.learn(100.0);
  check(cost.seconds() < 1.2, "one disturbed measurement counts for little");
  for (int i = 0; i < 100; ++i) cost.learn(0.5);
  check(cost.seconds() < 0.51, "shorter ones are believed soon");
  for (int i = 0; i < 100; ++i) cost.learn(2.0);
  check(cost.seconds() > 1.9, "lasting change is followed");
}

void test_two_callers() {
  const Forced forced;
  Cost cost;
  std::atomic<int> sum{0};
  auto caller = [&] {
    for (int loop = 0; loop < 300; ++loop) parallel_for(7, 3, Work{cost, 1}, [&](int index, int) { sum += index; });
  };
  std::thread other(caller);
  caller();
  other.join();
  check(sum == 2 * 300 * 21, "two callers at a time");
}

// A field, its gradient and a layer, by one thread and by four, whoever does the work.
struct Field {
  Random random{5};
  Program<double> meaning = adjoint_program(random, 0);
  Program<float> plain = convert<float>(meaning);
  int batch = 700, dim = meaning.dim;
  std::vector<float> x = random_states<float>(random, batch * dim), grad = random_states<float>(random, 2 * batch * dim);
  std::unique_ptr<CompiledProgram<float>> field;
  std::unique_ptr<CompiledAdjoint<float>> adjoint;

  Field() {
    adjoint = std::make_unique<CompiledAdjoint<float>>(plain, *kernels().f32);
    plain.keep.clear(), plain.reverse.clear(), plain.sums.clear();
    plain.cotangent = plain.noise = -1, plain.divergence = false;
    plain.buffers[plain.input].slots = 1;
    field = std::make_unique<CompiledProgram<float>>(plain, *kernels().f32);
  }

  struct Result {
    std::vector<float> xs, grad_x;
    std::vector<double> values;
    bool operator==(const Result& o) const { return same(xs, o.xs) && same(grad_x, o.grad_x) && same(values, o.values); }
  };
  Result solve(int threads) {
    SolveInput<float> in;
    in.batch = batch, in.x = x.data();
    in.times = {0.0, 0.5};
    in.tableau = bosh3();
    in.rtol = in.atol = {1e-3};
    in.options.max_num_steps = 1000;
    in.record = in.record_stages = true;
    in.threads = threads;
    Result result;
    result.xs.resize(2 * batch * dim), result.grad_x.resize(batch * dim);
    const SolveOutput<float> out = field->solve(in, result.xs.data(), nullptr);
    if (out.status != "ok") throw std::runtime_error("a solve ended with " + out.status);
    SolveRecord<float> record;
    record.batch = batch, record.tableau = in.tableau, record.noise = x.data(), record.times = in.times;
    record.steps = out.steps, record.states = out.states.data(), record.derivatives = out.derivatives.data();
    record.kept = static_cast<int>(out.derivatives.size() / out.states.size());
    std::vector<float> grad_l(batch), no(2 * batch, 0.0f);
    result.values = adjoint->solve(record, threads, grad.data(), no.data(), result.grad_x.data(), grad_l.data()).matrices[0];
    return result;
  }
};

void test_bits() {
  Field one;
  const Field::Result wanted = one.solve(1);
  for (bool force : {false, true}) {
    force_threads(force);
    for (int repeat = 0; repeat < 3; ++repeat)
      for (int threads : {2, 3, 4}) check(one.solve(threads) == wanted, "bits by threads");
  }
  force_threads(false);

  const Matrix<double> m = random_matrix(one.random, 60, 50, 0.2);
  SparseLinear<float> layer(m.rows, m.cols, m.row_ptr, m.col, *kernels().f32);
  const std::vector<float> values(m.values.begin(), m.values.end()), x = random_states<float>(one.random, 1000 * 50), left = random_states<float>(one.random, 1000 * 60);
  std::vector<float> out(1000 * 60), sums(m.nnz());
  for (int threads : {1, 4}) {
    force_threads(threads > 1);
    std::vector<float> again(out.size()), more(sums.size());
    layer.multiply(false, values.data(), x.data(), 1000, nullptr, threads, again.data());
    layer.gradient(left.data(), x.data(), 1000, threads, more.data());
    if (threads == 1) out = again, sums = more;
    check(same(out, again) && same(sums, more), "bits of a layer by threads");
  }
  force_threads(false);
}

#if !defined(__SANITIZE_THREAD__)  // the thread sanitizer gives up in such a child
// Children made while another thread solves the same field solve it too, and find what it found.
void test_fork() {
  Field one;
  const Field::Result wanted = one.solve(2);
  std::atomic<bool> stop{false};
  std::thread other([&] {
    force_threads(true);
    while (!stop) one.solve(4);
  });
  int good = 0, children = 0;
  for (; children < 20; ++children) {
    std::this_thread::sleep_for(std::chrono::microseconds(100 * children));
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);  // a child that blocks dies
      _exit(one.solve(1) == wanted && one.solve(2) == wanted ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    good += WIFEXITED(status) && WEXITSTATUS(status) == 0;
  }
  stop = true;
  other.join();
  force_threads(false);
  check(good == children, std::to_string(children - good) + " of " + std::to_string(children) + " children blocked or failed");
  check(one.solve(2) == wanted, "the parent goes on");
}

// A child has what the thread that forked was holding.
void test_fork_of_holder() {
  ForkLock mine([] { _exit(3); }), other([] {}), free([] { _exit(4); });
  mine.lock();
  std::atomic<int> state{0};
  std::thread holder([&] {
    other.lock();
    state = 1;
    while (state != 2) std::this_thread::yield();
    other.unlock();
  });
  while (state != 1) std::this_thread::yield();
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    mine.lock(), mine.unlock(), mine.unlock();
    bool ok = other.try_lock() && free.try_lock();
    std::thread([&] { ok = ok && mine.try_lock() && !other.try_lock(); }).join();
    _exit(ok ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "locks in a child: " + std::to_string(status));
  check(!std::atomic<bool>(other.try_lock()), "the parent's lock stays held");
  state = 2;
  holder.join();
  mine.unlock();
}
#endif

}  // namespace

int main() {
  test_costs();
  test_loops("as it comes");
  {
    const Forced forced;
    test_loops("forced");
  }
  test_late_helpers();
  test_help_arrives();
  test_small_loops_stay();
  test_two_callers();
  test_bits();
  // Sanitizers bring an allocator of their own, whose locks a child may find held by a thread that it does not have.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
  test_fork();
  test_fork_of_holder();
#endif
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
