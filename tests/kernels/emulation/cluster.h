// The blocks of one cluster of a GPU on a CPU: every GPU thread is a fiber.
//
// Where the GPU leaves an order open, dice decide: which thread runs next, when an asynchronous copy moves
// its bytes (between its start and the wait for it), when a sent value arrives. One warp is slow: it runs
// when all others wait. One value in eight is late: it arrives when no thread can run. A missing barrier or
// wait shows as wrong numbers for some seeds. These end the run with a message: a deadlock, a misaligned
// access, a value sent to a block that has left or whose barrier is not set up, more bytes than a barrier
// expects, a collective that a warp's lanes reach in different places.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulation {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kPage = 4096;

inline void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

struct Copy {
  char* to;
  const void* from;

  void run() const { std::memcpy(to, from, 16); }
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool is_started = false;
  bool is_done = false;
  int block = 0;
  int thread = 0;
  std::vector<Copy> open_group;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

// Threads that wait for each other.
struct Meeting {
  int size = 0;
  const void* place = nullptr;  // what the threads are doing here
  std::vector<Fiber*> waiting;
};

// What is in the 8 bytes of a gpu::Barrier.
struct BarrierState {
  int32_t missing_bytes;
  uint8_t is_set_up;
  uint8_t is_expecting;
  uint16_t round;
};
static_assert(sizeof(BarrierState) == 8, "the kernel leaves 8 bytes for a barrier");

struct Message {
  int block;
  float* to;
  float value;
  BarrierState* barrier;
};

// Memory whose last byte is the last of a page that may be read; what comes after traps.
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes) : size_((bytes + kPage - 1) / kPage * kPage + kPage) {
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    require(base_ != MAP_FAILED, "mmap failed");
    mprotect(base_ + size_ - kPage, kPage, PROT_NONE);
    data_ = base_ + size_ - kPage - bytes;
    std::memset(data_, 0xff, bytes);  // NaN
  }
  GuardedMemory(const GuardedMemory&) = delete;
  ~GuardedMemory() { munmap(base_, size_); }
  char* data() const { return data_; }

 private:
  size_t size_;
  char* base_;
  char* data_;
};

class Cluster {
 public:
  Cluster(int blocks, int threads, size_t shared_bytes, int first_block, int block_count, uint32_t seed)
      : threads(threads), first_block(first_block), block_count(block_count), dice(seed), warps(blocks * threads / 32),
        whole_blocks(blocks), fibers(blocks * threads), alive(blocks, threads) {
    for (int i = 0; i < blocks; ++i) shared.push_back(std::make_unique<GuardedMemory>(shared_bytes));
    for (Meeting& warp : warps) warp.size = 32;
    for (Meeting& block : whole_blocks) block.size = threads;
    everyone.size = blocks * threads;
    stacks = static_cast<char*>(mmap(nullptr, fibers.size() * kStackBytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    require(stacks != MAP_FAILED, "mmap failed");
  }
  ~Cluster() { munmap(stacks, fibers.size() * kStackBytes); }

  void run(const std::function<void()>& kernel);
  void suspend();  // of the running thread, until something puts it back into `ready`

  void meet(Meeting& meeting, const void* place) {
    require(meeting.waiting.empty() || meeting.place == place, "threads meet in different places");
    meeting.place = place;
    meeting.waiting.push_back(running);
    if (static_cast<int>(meeting.waiting.size()) < meeting.size) return suspend();
    for (Fiber* fiber : meeting.waiting) {
      if (fiber != running) wake(fiber);
    }
    meeting.waiting.clear();
  }

  void wake(Fiber* fiber) { (warp_of(*fiber) == slow_warp ? ready_slow : ready).push_back(fiber); }

  void send(const Message& message) { (dice() % 8 == 0 ? late_messages : messages).push_back(message); }

  void deliver(const Message& message) {
    require(alive[message.block] > 0, "a value was sent to a block that has left");
    require(message.barrier->is_set_up, "a value was sent to a barrier that is not set up");
    *message.to = message.value;
    message.barrier->missing_bytes -= sizeof(float);
    finish_round(message.barrier);
  }

  void finish_round(BarrierState* barrier) {
    if (!barrier->is_expecting || barrier->missing_bytes > 0) return;
    require(barrier->missing_bytes == 0, "more bytes were sent than a barrier expects");
    barrier->is_expecting = 0;
    ++barrier->round;
    for (Fiber* fiber : round_waiters) wake(fiber);  // they look again
    round_waiters.clear();
  }

  int warp_of(const Fiber& fiber) const { return (fiber.block * threads + fiber.thread) / 32; }
  Meeting& own_warp() { return warps[warp_of(*running)]; }

  const int threads;
  const int first_block;
  const int block_count;
  std::mt19937 dice;
  std::vector<std::unique_ptr<GuardedMemory>> shared;
  std::vector<Meeting> warps;
  std::vector<Meeting> whole_blocks;
  Meeting everyone;
  std::vector<Fiber> fibers;
  std::vector<int> alive;  // threads of each block
  std::vector<float> exchanged = std::vector<float>(fibers.size());
  std::vector<Message> messages;
  std::vector<Message> late_messages;
  std::vector<Fiber*> round_waiters;
  std::vector<Fiber*> ready;
  std::vector<Fiber*> ready_slow;
  int slow_warp = 0;
  Fiber* running = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::string error;

 private:
  static void enter();
  void create(int index);
  bool step();
  void resume(Fiber& fiber);

  template <class T>
  T take_any(std::vector<T>& from) {
    std::swap(from[dice() % from.size()], from.back());
    const T taken = from.back();
    from.pop_back();
    return taken;
  }

  char* stacks;
  ucontext_t main_context;
  jmp_buf main_resume;
};

inline Cluster* current = nullptr;

inline void Cluster::enter() {
  Cluster& cluster = *current;
  try {
    (*cluster.kernel)();
  } catch (const std::exception& problem) {  // exceptions do not cross fibers
    cluster.error = problem.what();
  }
  cluster.running->is_done = true;
  --cluster.alive[cluster.running->block];
  _longjmp(cluster.main_resume, 1);
}

// _setjmp rather than swapcontext, which asks the kernel for the signal mask every time.
inline void Cluster::resume(Fiber& fiber) {
  running = &fiber;
  if (_setjmp(main_resume) != 0) return;
  if (fiber.is_started) _longjmp(fiber.resume, 1);
  fiber.is_started = true;
  setcontext(&fiber.start);
}

inline void Cluster::suspend() {
  if (_setjmp(running->resume) == 0) _longjmp(main_resume, 1);
}

inline void Cluster::create(int index) {
  Fiber& fiber = fibers[index];
  fiber.block = index / threads;
  fiber.thread = index % threads;
  getcontext(&fiber.start);
  fiber.start.uc_stack = {stacks + index * kStackBytes, 0, kStackBytes};
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, &Cluster::enter, 0);
  wake(&fiber);
}

// Lets one thing happen, if there is one that can.
inline bool Cluster::step() {
  if (!messages.empty() && (ready.empty() || dice() % 4 == 0)) {
    deliver(take_any(messages));
  } else if (!ready.empty()) {
    resume(*take_any(ready));
  } else if (!late_messages.empty() && (ready_slow.empty() || dice() % 64 == 0)) {
    deliver(take_any(late_messages));
  } else if (!ready_slow.empty()) {
    resume(*take_any(ready_slow));
  } else {
    return false;
  }
  return true;
}

inline void Cluster::run(const std::function<void()>& body) {
  current = this;
  kernel = &body;
  slow_warp = static_cast<int>(dice() % warps.size());
  for (size_t i = 0; i < fibers.size(); ++i) create(static_cast<int>(i));
  while (error.empty() && step()) {
  }
  require(error.empty(), error.c_str());
  for (const Fiber& fiber : fibers) require(fiber.is_done, "deadlock");
}

}  // namespace emulation
