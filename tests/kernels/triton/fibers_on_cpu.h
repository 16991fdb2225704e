// Blocks whose threads are fibers, of which one runs at a time, and a seeded draw says which: one seed is one interleaving.
//
// A fiber runs until it waits for an event or pauses. Some warps are drawn much less often than others, for a while, and
// copies under way (Block::later) are done sooner or later. What is wrong ends the block with a message: `fail`, or that all
// fibers wait, with how many for what.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

__thread Dim threadIdx, blockIdx, blockDim, gridDim;
static thread_local u32 rank, first_block;  // of the running fiber's block in its cluster, and the cluster's first

constexpr int STACK = 128 << 10, WARP = 32;
constexpr u64 STEPS = 100'000'000;  // of a block: beyond, it goes round and round

struct Fiber {
  ucontext_t start;
  jmp_buf left;
  bool started = false, over = false;
  const void* event = nullptr;  // that it waits for
  std::string (*told)(const void*, u32) = nullptr;
  u32 detail = 0;
};

struct Meeting {  // of a warp, a block, its first threads, or a cluster
  int here = 0, size = WARP;
  u32 values[WARP];
  u32 results[WARP];
};

struct Block {  // or a cluster of them, whose threads are counted on
  std::vector<Fiber> fibers;
  std::vector<int> ready;
  std::vector<std::function<void()>> later;
  std::vector<Meeting> warps, blocks, firsts;
  Meeting all;  // of a cluster
  std::function<void()> body;
  jmp_buf scheduler;
  std::string error;
  int running = -1;
  u64 seed = 0, random = 0, steps = 0;
  u32 late = ~0u, slow = 0, lateness = 0;  // the block that begins late; warps that hold back; steps before a copy is done
};
static thread_local Block* block;
static thread_local std::unique_ptr<char[]> stacks;

static u64 mixed(u64 z) {  // splitmix64
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

static u32 draw(u32 n) { return (mixed(block->random += 0x9e3779b97f4a7c15) >> 32) % n; }

static void fail(const std::string& what) {  // does not return to a fiber
  if (block->error.empty()) block->error = what;
  if (block->running >= 0) _longjmp(block->scheduler, 1);
}

__attribute__((noinline)) static void leave() {  // to the scheduler, until it is this fiber's turn
  if (!_setjmp(block->fibers[block->running].left)) _longjmp(block->scheduler, 1);
}

__attribute__((noinline)) static void resume(int number) {
  Fiber& fiber = block->fibers[number];
  block->running = number;
  threadIdx = {(u32)number % blockDim.x, 0, 0};
  rank = number / blockDim.x;
  blockIdx.x = first_block + rank;
  if (!_setjmp(block->scheduler)) {
    if (fiber.started) _longjmp(fiber.left, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  block->running = -1;
}

static void fiber_main() {
  block->body();
  block->fibers[block->running].over = true;
  _longjmp(block->scheduler, 1);
}

static void wait_for(const void* event, std::string (*told)(const void*, u32), u32 detail = 0) {
  Fiber& fiber = block->fibers[block->running];
  fiber.event = event, fiber.told = told, fiber.detail = detail;
  leave();
}

static void happen(const void* event) {
  for (size_t i = 0; i < block->fibers.size(); i++)
    if (block->fibers[i].event == event) block->fibers[i].event = nullptr, block->ready.push_back(i);
}

static void pause_at_times() {  // others may go on between any two operations on barriers and copies
  if (draw(4)) return;
  block->ready.push_back(block->running);
  leave();
}

// All of a meeting wait for the last, who does what is to be done.
template <typename F>
static void meet(Meeting& meeting, F&& once_all_are_here) {
  if (++meeting.here == meeting.size) {
    meeting.here = 0;
    once_all_are_here();
    happen(&meeting);
    pause_at_times();
  } else {
    wait_for(&meeting, [](const void* m, u32) {
      const Meeting& meeting = *(const Meeting*)m;
      return "the others of " + std::to_string(meeting.size) + " threads, " + std::to_string(meeting.here) + " are here";
    });
  }
}

static Meeting& warp() { return block->warps[block->running / WARP]; }

// Each lane gives a value; results[lane] = of(values, lane).
template <typename F>
static u32 exchanged(u32 value, F&& of) {
  Meeting& m = warp();
  int lane = threadIdx.x % WARP;
  m.values[lane] = value;
  meet(m, [&] {
    for (int i = 0; i < WARP; i++) m.results[i] = of(m.values, i);
  });
  return m.results[lane];
}

static int next_fiber() {  // slow warps mostly stay where they are
  auto& ready = block->ready;
  if (block->steps % 256 == 0) block->slow = draw(1u << 24) & draw(1u << 24);
  u32 at = draw(ready.size());
  for (int i = 0; i < 6 && block->slow >> ready[at] / WARP & 1; i++) at = draw(ready.size());
  if (block->steps < 20'000)  // one of a cluster's blocks begins late
    for (int i = 0; i < 100 && ready[at] / blockDim.x == block->late; i++) at = draw(ready.size());
  int number = ready[at];
  ready[at] = ready.back();
  ready.pop_back();
  return number;
}

static std::string all_wait() {
  std::map<std::string, int> waiting;
  for (const Fiber& fiber : block->fibers)
    if (!fiber.over) waiting[fiber.told(fiber.event, fiber.detail)]++;
  std::string text = "deadlock:";
  for (const auto& [what, threads] : waiting) text += " " + std::to_string(threads) + " threads wait for " + what + ";";
  return text;
}

// The message of what is wrong, "" where nothing is.
static std::string run_cluster(int blocks, u64 seed, std::function<void()> body, void (*check)()) {
  int threads = blocks * blockDim.x;
  Block made;
  block = &made;
  made.seed = made.random = mixed(seed + 1), made.body = std::move(body);
  if (blocks > 1) made.late = draw(blocks);
  made.lateness = draw(2) ? 2 << draw(6) : 1u << 31;
  made.fibers.resize(threads), made.warps.resize(threads / WARP), made.blocks.resize(blocks), made.firsts.resize(blocks), made.all.size = threads;
  for (Meeting& meeting : made.blocks) meeting.size = blockDim.x;
  if (!stacks) stacks.reset(new char[(size_t)2048 * STACK]);
  for (int i = 0; i < threads; i++) {
    ucontext_t& start = made.fibers[i].start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks.get() + (size_t)i * STACK, start.uc_stack.ss_size = STACK;
    makecontext(&start, fiber_main, 0);
    made.ready.push_back(i);
  }
  auto& later = made.later;
  while (made.error.empty() && (!made.ready.empty() || !later.empty())) {
    if (++made.steps > STEPS) fail("no end");
    if (!later.empty() && (made.ready.empty() || draw(made.lateness) == 0)) {
      std::swap(later[draw(later.size())], later.back());
      auto done = std::move(later.back());
      later.pop_back();
      done();
    } else {
      resume(next_fiber());
    }
  }
  for (const Fiber& fiber : made.fibers)
    if (!fiber.over && made.error.empty()) fail(all_wait());
  if (made.error.empty()) check();
  return made.error;
}
