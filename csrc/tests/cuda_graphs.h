// Graph programs on the CUDA kernels over the host shim.
#pragma once

#include "cuda_case.h"

namespace {

// Graph programs at times of the samples' own, where they know a time, against the interpreter of random_graph.h.
template <class T>
void test_graph(Random& random, const Program<double>& p, const std::string& name) {
  constexpr double bound = sizeof(T) == 8 ? 1e-8 : 2e-3;
  const int out = p.out_rows(), given = p.context_rows();
  const size_t pieces[] = {64, 300, cuda::kUncut};
  const Loaded<T> on(cuda::make_image(convert<T>(p), pieces[pick(random, 0, 2)], chance(random, 0.5) ? 0.3 : 2.0));
  auto all = ways(random, on.image, p.adjoint(), false, 100, 4);
  check(!all.empty(), name + ": some shape fits");
  std::shuffle(all.begin(), all.end(), random);
  for (size_t i = 0; i < std::min<size_t>(all.size(), 2); ++i) {
    const int tile = all[i].shape.tile, sizes[] = {1, tile + 1, 3 * tile}, batch = std::min(sizes[pick(random, 0, 2)], 70);
    const cuda::Plan plan = plan_of(on.image, all[i], batch, 1, p.adjoint(), false);
    const std::string what = name + " " + name_of(plan) + " batch " + std::to_string(batch);
    const std::vector<T> x = random_states<T>(random, batch * p.dim), context = random_states<T>(random, batch * given), grad = random_states<T>(random, batch * out);
    GraphInterpreter interpreter(p, {});
    std::vector<double> f, trace, of_x, of_time, of_context;
    for (int s = 0; s < batch; ++s) {
      interpreter.begin(std::vector<double>(x.begin() + s * p.dim, x.begin() + (s + 1) * p.dim).data(), std::vector<double>(context.begin() + s * given, context.begin() + (s + 1) * given).data());
      interpreter.run(p.adjoint() ? p.keep : p.body);
      const auto& memory = interpreter.memory[0];
      trace.push_back(interpreter.trace);
      f.insert(f.end(), memory[p.output].begin(), memory[p.output].begin() + out);
      if (!p.adjoint()) continue;
      for (int c = 0; c < out; ++c) interpreter.memory[0][p.cotangent][c] = grad[s * out + c];
      interpreter.run(p.reverse);
      of_x.insert(of_x.end(), memory[p.state_cotangent].begin(), memory[p.state_cotangent].begin() + out);
      if (p.dim > out) of_time.push_back(memory[p.state_cotangent][out]);
      if (given > 0) of_context.insert(of_context.end(), memory[p.context_cotangent].begin(), memory[p.context_cotangent].end());
    }
    const Memory<T> at_x(x), at_context(context), at_grad(grad);
    const int blocks = std::min(plan.tiles, 2);
    const Memory<char> global(size_t(blocks) * plan.block.global_bytes);
    std::vector<T> first;
    for (int seed : {0, 3}) {
      order_of_threads(seed);
      if (!p.adjoint()) {
        const Memory<T> to(batch * out), to_trace(batch);
        cuda::SolveParams<T> q;
        q.program = on.program, q.plan = plan.block, q.batch = batch, q.tiles = plan.tiles;
        q.x = at_x.data(), q.context = at_context.data(), q.global = global.data();
        q.evaluate = true, q.own_times = p.dim > out;
        q.f = to.data(), q.f_trace = p.divergence ? to_trace.data() : nullptr;
        cuda::launch_solve<T>(q, instance_of(plan), {0, blocks, nullptr, false});
        check(close(to.vector(), f, bound), what + ": evaluation");
        if (p.divergence) check(close(to_trace.vector(), trace, 10 * bound), what + ": trace");
        if (seed == 0) first = to.vector();
        check(same(first, to.vector()), what + ": bits");
        continue;
      }
      const size_t of_block = on.program.lasting_sums + on.program.totals;
      const Memory<T> to_x(batch * out), to_times(batch);
      Memory<T> to_context(batch * given), sums(blocks * of_block), stage_sums(size_t(blocks) * on.program.stage_sums);
      to_context.clear(), sums.clear(), stage_sums.clear();
      cuda::AdjointParams<T> q;
      q.program = on.program, q.plan = plan.block, q.batch = batch, q.tiles = plan.tiles;
      q.x = at_x.data(), q.context = at_context.data(), q.grad_context = to_context.data(), q.global = global.data();
      q.sums = sums.data(), q.stage_sums = stage_sums.data();
      q.evaluate = true, q.own_times = p.dim > out, q.grad_times = to_times.data();
      q.tableau = {};
      q.tableau.stages = 1;
      q.grad_f = at_grad.data(), q.grad_x = to_x.data();
      cuda::launch_adjoint<T>(q, instance_of(plan), {0, blocks, nullptr, false});
      check(close(to_x.vector(), of_x, bound), what + ": gradient of x");
      check(close(to_context.vector(), of_context, bound), what + ": gradient of the context");
      if (p.dim > out) check(close(to_times.vector(), of_time, bound), what + ": gradient of the times");
      auto part = [&](const typename cuda::Image<T>::Range& range) {
        std::vector<T> found(range.first < 0 ? 0 : range.size);
        for (size_t k = 0; k < found.size(); ++k)
          for (int b = 0; b < blocks; ++b) found[k] += sums.data()[b * of_block + range.first + k];
        return found;
      };
      for (size_t m = 0; m < p.matrices.size(); ++m)
        if (p.matrices[m].sum >= 0) check(close(part(on.image.matrix_gradients[m]), interpreter.sums[p.matrices[m].sum], 10 * bound), what + ": gradient of a matrix");
      for (size_t v = 0; v < p.vectors.size(); ++v)
        if (p.vectors[v].sum >= 0) check(close(part(on.image.vector_gradients[v]), interpreter.sums[p.vectors[v].sum], 10 * bound), what + ": gradient of a row vector");
      if (seed == 0) first = to_x.vector();
      check(same(first, to_x.vector()), what + ": bits");
    }
  }
}

// Runs what a GPU's program may be; what only the CPU's engine runs is refused in words, and never misread.
void test_graphs(Random& random, int trials) {
  int ran = 0;
  for (int trial = 0; trial < trials; ++trial) {
    const Program<double> p = graph_program(random, trial % 2);
    const int more = p.dim - p.out_rows();
    const std::string message = thrown([&] { cuda::make_image(p, cuda::kUncut, 2.0); });
    if (p.time_rows > 0 || (more != 0 && more != 1) || (p.adjoint() && !p.prologue.empty())) {
      check(message.find("runs on the CPU only") != std::string::npos, "a graph is refused, not: " + message);
      continue;
    }
    if (message.find("registers") != std::string::npos) continue;  // which writers of programs know
    check(message.empty(), "a graph is laid out, not: " + message);
    ++ran;
    const std::string name = "graph " + std::to_string(trial);
    test_graph<float>(random, p, name + " float32");
    test_graph<double>(random, p, name + " float64");
  }
  check(ran >= trials / 20, std::to_string(ran) + " graphs ran");
}

}  // namespace
