// Runs CUDA C++ kernels on the host, one block after another. Each CUDA thread is a fiber that gives way at
// __syncthreads, so a missing barrier shows as a wrong result; with CUDA_HOST_THREADS it is a std::thread,
// for ThreadSanitizer to watch.
//
// A kernel's shared memory is dynamic: `extern __shared__ double shared[];` finds an array of the driver.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim, blockIdx;

#ifdef CUDA_HOST_THREADS
#include <barrier>
#include <thread>

inline thread_local dim3 threadIdx;

namespace cuda_host {

inline std::barrier<>* barrier;

inline bool run_block(unsigned threads, const std::function<void()>& kernel) {
  std::barrier<> all(threads);
  barrier = &all;
  std::vector<std::thread> team;
  for (unsigned i = 0; i < threads; ++i) {
    team.emplace_back([&kernel, i] {
      threadIdx = i;
      kernel();
    });
  }
  for (std::thread& thread : team) thread.join();
  return true;
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::barrier->arrive_and_wait(); }

#else
#include <ucontext.h>

inline dim3 threadIdx;

namespace cuda_host {

constexpr size_t STACK_BYTES = 64 << 10;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK_BYTES);
  bool done = false;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline const std::function<void()>* body;

inline void enter() {
  (*body)();
  fibers[threadIdx.x].done = true;
}

// every fiber runs up to its next barrier in turn; they must all end in the same round. The turns are
// shuffled: in a fixed order a thread that lacks a barrier may happen to find all it reads already written.
inline bool run_block(unsigned threads, const std::function<void()>& kernel) {
  body = &kernel;
  fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<unsigned> turns(threads);
  std::iota(turns.begin(), turns.end(), 0u);
  std::minstd_rand random;
  for (unsigned done = 0; done < threads;) {
    if (done) return false;
    std::shuffle(turns.begin(), turns.end(), random);
    for (const unsigned i : turns) {
      threadIdx = i;
      swapcontext(&scheduler, &fibers[i].context);
      done += fibers[i].done;
    }
  }
  return true;
}

}  // namespace cuda_host

inline void __syncthreads() {
  swapcontext(&cuda_host::fibers[threadIdx.x].context, &cuda_host::scheduler);
}
#endif

namespace cuda_host {

// false if some thread of a block ended while others waited at a barrier.
inline bool launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        if (!run_block(block.x, kernel)) return false;
      }
    }
  }
  return true;
}

}  // namespace cuda_host
