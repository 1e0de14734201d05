// A SIMT executor: runs CUDA kernels on the CPU, block by block, one fiber per thread.
//
// What it proves: the kernel's logic. Fibers run in a seeded random order and switch only at
// collectives, warps drift apart as far as the barriers let them, blocks run in random order; a
// missing barrier therefore changes the result between seeds (see reproducible() in check.h).
// Shared arrays are separate heap allocations full of NaNs, so that AddressSanitizer sees an access
// out of bounds and arithmetic sees an uninitialised read; an asynchronous copy leaves NaNs until
// it is waited for. A barrier that some threads reach elsewhere, or not at all, throws.
//
// What it does not prove: the memory model (fences, volatile), occupancy, or anything about time.
// Blocks and grids are one-dimensional, warps are whole and collectives take the full mask.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace simt {

constexpr int kWarpSize = 32;
constexpr int kExchangeWords = 10;  // the widest collective: A, B and C fragments of an mma

struct Index {
  unsigned x;
};

// One slot per lane; a collective reads all of them after the last lane has arrived.
struct Exchange {
  uint32_t lane[kWarpSize][kExchangeWords];
};

inline unsigned seed = 1;  // of the schedule of the next launches
inline int multiprocessors = 3;

// Runs body once per thread. Throws std::runtime_error on what a GPU would refuse or hang on.
void run_grid(int64_t blocks, int threads, size_t dynamic_shared,
              const std::function<void()>& body);

// For kernels, through device.h.
inline Index thread_index, block_index, block_size, grid_size;
void* shared_array(size_t offset, size_t bytes, size_t align);
void block_barrier(const char* file, int line);
const Exchange& warp_exchange(const uint32_t* words, int count, const char* file, int line);
void async_copy_16(void* to, const void* from, bool in_range);
void async_commit();
void async_wait(int pending_groups);

}  // namespace simt
