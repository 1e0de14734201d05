#include "executor.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kPoison = 0xFF;  // a NaN in every floating format

enum class State { kReady, kAtWarpCollective, kAtBlockBarrier, kExited };

using Copy = std::pair<void*, std::array<char, 16>>;  // what goes where

struct Site {  // of a collective
  const char* kind;
  const char* file;
  int line;
  bool operator==(const Site& o) const {
    return kind == o.kind && file == o.file && line == o.line;
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state;
  Site site;  // where it waits
  unsigned exchanges;
  std::deque<std::vector<Copy>> copies;  // groups of asynchronous copies, the last one still open
};

struct Warp {
  uint32_t ready;  // bit per lane
  int arrived;
  Exchange exchange[2];  // by parity: a lane two collectives ahead needs all to have left the first
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::map<size_t, std::vector<char>> shared;  // by offset
ucontext_t scheduler;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
const std::function<void()>* kernel;
size_t shared_limit;
int self, threads, at_block_barrier, exited;
std::mt19937 random_bits;
std::exception_ptr failure;  // of a fiber: exceptions do not cross stacks by themselves

// Back to the scheduler, until the collective at this place is complete.
void yield(State state, const Site& site) {
  Fiber& f = fibers[self];
  f.state = state;
  f.site = site;
  __sanitizer_start_switch_fiber(state == State::kExited ? nullptr : &f.fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
  swapcontext(&f.context, &scheduler);
  __sanitizer_finish_switch_fiber(fibers[self].fake_stack, &scheduler_stack,
                                  &scheduler_stack_bytes);
}

void thread_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  try {
    (*kernel)();
  } catch (...) {
    failure = std::current_exception();
  }
  yield(State::kExited, {"exit", "", 0});
}

void resume(int thread) {
  self = thread;
  thread_index.x = static_cast<unsigned>(thread);
  Fiber& f = fibers[thread];
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, f.stack.get(), kStackBytes);
  swapcontext(&scheduler, &f.context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

[[noreturn]] void report_divergence() {
  std::map<std::string, int> sites;
  for (const Fiber& f : fibers) {
    const std::string at = std::string(f.site.kind) + " " + f.site.file;
    ++sites[f.state == State::kExited ? "have exited"
                                      : "wait at " + at + ":" + std::to_string(f.site.line)];
  }
  std::string text = "divergent barrier in block " + std::to_string(block_index.x) + ":";
  for (const auto& [site, count] : sites)
    text += " " + std::to_string(count) + " threads " + site + ";";
  throw std::runtime_error(text);
}

// All of [first, first + count) have arrived; they must have done so at one place.
void release(int first, int count) {
  for (int t = first; t < first + count; ++t) {
    if (!(fibers[t].site == fibers[first].site)) report_divergence();
    fibers[t].state = State::kReady;
    warps[t / kWarpSize].ready |= 1u << t % kWarpSize;
  }
}

void start_block() {
  at_block_barrier = exited = 0;
  shared.clear();
  std::fill(warps.begin(), warps.end(), Warp{~0u, 0, {}});
  for (Fiber& f : fibers) {
    __asan_unpoison_memory_region(f.stack.get(), kStackBytes);
    f.state = State::kReady;
    f.exchanges = 0;
    f.copies.assign(1, {});
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, thread_main, 0);
  }
}

// Mostly the same warp again (seed 3: always, so it runs far ahead), any ready lane; -1 if none is.
int pick(int last_warp) {
  const int count = static_cast<int>(warps.size()), other = static_cast<int>(random_bits() % count);
  const int first = seed == 3 || random_bits() % 16 ? last_warp : other;
  for (int i = 0; i < count; ++i) {
    const int w = (first + i) % count;
    if (warps[w].ready == 0) continue;
    for (unsigned l = random_bits();; ++l) {
      const unsigned lane = l % kWarpSize;
      if (warps[w].ready >> lane & 1) return w * kWarpSize + static_cast<int>(lane);
    }
  }
  return -1;
}

void run_block() {
  start_block();
  for (int thread = pick(0); thread >= 0; thread = pick(thread / kWarpSize)) {
    Warp& warp = warps[thread / kWarpSize];
    resume(thread);
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    warp.ready &= ~(1u << thread % kWarpSize);
    const State state = fibers[thread].state;
    if (state == State::kExited) {
      ++exited;
    } else if (state == State::kAtWarpCollective && ++warp.arrived == kWarpSize) {
      warp.arrived = 0;
      release(thread / kWarpSize * kWarpSize, kWarpSize);
    } else if (state == State::kAtBlockBarrier && ++at_block_barrier == threads) {
      at_block_barrier = 0;
      release(0, threads);
    }
  }
  if (exited != threads) report_divergence();
}

}  // namespace

void run_grid(int64_t blocks, int threads_, size_t dynamic_shared,
              const std::function<void()>& body) {
  if (threads_ % kWarpSize != 0 || threads_ > 1024 || dynamic_shared > 227 << 10) {
    throw std::runtime_error("a block has whole warps, 1024 threads and 227 KB shared at most");
  }
  threads = threads_;
  block_size.x = static_cast<unsigned>(threads);
  grid_size.x = static_cast<unsigned>(blocks);
  shared_limit = dynamic_shared;
  kernel = &body;
  random_bits.seed(seed);
  fibers.resize(threads);
  warps.resize(threads / kWarpSize);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_bits);
  for (const unsigned block : order) {
    block_index.x = block;
    run_block();
  }
}

void* shared_array(size_t offset, size_t bytes, size_t align) {
  if (offset + bytes > shared_limit || offset % align != 0) {
    throw std::runtime_error("a shared array must lie aligned in the launch's shared memory");
  }
  for (const auto& [start, array] : shared) {
    if (start != offset && start < offset + bytes && offset < start + array.size()) {
      throw std::runtime_error("shared arrays overlap");
    }
  }
  std::vector<char>& array = shared[offset];
  if (array.empty()) array.assign(bytes, static_cast<char>(kPoison));
  return array.data();
}

void block_barrier(const char* file, int line) {
  yield(State::kAtBlockBarrier, {"__syncthreads", file, line});
}

const Exchange& warp_exchange(const uint32_t* words, int count, const char* file, int line) {
  Exchange& exchange = warps[self / kWarpSize].exchange[fibers[self].exchanges++ % 2];
  std::copy_n(words, count, exchange.lane[self % kWarpSize]);
  yield(State::kAtWarpCollective, {"warp collective", file, line});
  return exchange;
}

void async_copy_16(void* to, const void* from, bool in_range) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) {
    throw std::runtime_error("an asynchronous copy needs addresses aligned to 16 bytes");
  }
  Copy copy{to, {}};
  if (in_range) std::memcpy(copy.second.data(), from, 16);
  std::memset(to, kPoison, 16);
  fibers[self].copies.back().push_back(copy);
}

void async_commit() { fibers[self].copies.emplace_back(); }

void async_wait(int pending_groups) {
  auto& groups = fibers[self].copies;
  while (static_cast<int>(groups.size()) > pending_groups + 1) {
    for (const auto& [to, bytes] : groups.front()) std::memcpy(to, bytes.data(), 16);
    groups.pop_front();
  }
}

}  // namespace simt
