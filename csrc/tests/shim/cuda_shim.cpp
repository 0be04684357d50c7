#include "cuda_shim.h"

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../storage.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace mrvae::shim {
namespace {

constexpr std::size_t stack_bytes = 128 * 1024;
constexpr int lanes = 32;
constexpr std::size_t exchange_bytes = 64;

// ---- fibers: a stack each, and a switch between two ------------------------------------------------------------------

#if defined(__x86_64__)

// ucontext's swap asks the kernel for the signal mask, which takes 0.5 us; this saves what a call preserves, no more.
using Context = void*;
extern "C" void mrvae_shim_switch(void** from, void* to);
asm(R"(
.text
.globl mrvae_shim_switch
.hidden mrvae_shim_switch
.type mrvae_shim_switch, @function
mrvae_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mrvae_shim_switch, .-mrvae_shim_switch
)");

void switch_context(Context& from, Context& to) { mrvae_shim_switch(&from, to); }

void make_context(Context& context, unsigned char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + stack_bytes - 64);  // 16-byte aligned
  top[-1] = nullptr;  // the entry's return address: it never returns
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  context = top - 8;
}

#else

using Context = ucontext_t;

void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

void make_context(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

struct Copy {
  void* target;
  const void* source;
  int bytes;
};

enum class State { Ready, AtBarrier, AtWarpBarrier, Finished };

struct Fiber {
  Context context;
  std::unique_ptr<unsigned char[]> stack;
  Place place;
  State state;
  unsigned mask;         // of the lanes it waits for
  unsigned exchanges;    // so far
  std::deque<std::vector<Copy>> copies;
  std::vector<Copy> open;
};

struct Warp {
  // by parity of the exchange's number: a lane that is one ahead must not overwrite what others still read
  std::array<std::array<std::array<unsigned char, exchange_bytes>, lanes>, 2> brought;
  std::array<std::array<unsigned, lanes>, 2> number;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<std::uint64_t> shared;
  Context scheduler;
  Fiber* running = nullptr;
  const std::function<void()>* thread = nullptr;
  std::string error;
  bool any = false;      // barrier_or's result
  bool gathering = false;
};

std::mutex one_launch;
Machine machine;

int index_of(const Fiber& fiber) { return int(&fiber - machine.fibers.data()); }

void yield(State state) {
  Fiber& fiber = *machine.running;
  fiber.state = state;
  switch_context(fiber.context, machine.scheduler);
}

[[noreturn]] void fail(const std::string& what) {
  if (machine.error.empty()) machine.error = what;
  yield(State::Finished);
  std::abort();  // a finished fiber is not resumed
}

void entry() {
  try {
    (*machine.thread)();
    if (!machine.running->open.empty() || !machine.running->copies.empty()) {
      machine.error = "a thread ends with asynchronous copies that it did not wait for";
    }
  } catch (const std::exception& error) {
    machine.error = error.what();
  }
  yield(State::Finished);
}

// Lets those go on whose barrier is complete. False where nobody can.
bool release(std::size_t count) {
  bool all_wait = true, some_wait = false, released = false;
  for (std::size_t i = 0; i < count; ++i) {
    all_wait = all_wait && machine.fibers[i].state != State::AtWarpBarrier;
    some_wait = some_wait || machine.fibers[i].state == State::AtBarrier;
  }
  for (std::size_t first = 0; first < count; first += lanes) {
    const std::size_t last = std::min(count, first + lanes);
    for (std::size_t i = first; i < last; ++i) {
      Fiber& fiber = machine.fibers[i];
      if (fiber.state != State::AtWarpBarrier) continue;
      bool complete = true;
      for (std::size_t k = first; k < first + lanes; ++k) {
        if ((fiber.mask >> (k - first) & 1u) == 0) continue;
        complete = complete && k < last && machine.fibers[k].state == State::AtWarpBarrier &&
                   machine.fibers[k].mask == fiber.mask;
      }
      if (!complete) continue;
      const unsigned mask = fiber.mask;
      for (std::size_t k = first; k < last; ++k) {
        if (mask >> (k - first) & 1u) machine.fibers[k].state = State::Ready;
      }
      released = true;
    }
  }
  if (released || !all_wait || !some_wait) return released;
  for (std::size_t i = 0; i < count; ++i) {
    if (machine.fibers[i].state == State::AtBarrier) machine.fibers[i].state = State::Ready;
  }
  machine.gathering = false;
  return true;
}

void run_block(std::size_t count) {
  bool forward = true;
  for (;;) {
    bool ran = false;
    for (std::size_t k = 0; k < count; ++k) {
      Fiber& fiber = machine.fibers[forward ? k : count - 1 - k];
      if (fiber.state != State::Ready) continue;
      machine.running = &fiber;
      switch_context(machine.scheduler, fiber.context);
      ran = true;
      if (!machine.error.empty()) return;
    }
    forward = !forward;
    if (ran || release(count)) continue;
    const bool finished = std::all_of(machine.fibers.begin(), machine.fibers.begin() + std::ptrdiff_t(count),
                                      [](const Fiber& fiber) { return fiber.state == State::Finished; });
    if (!finished) machine.error = "threads of a block or warp wait for each other at different barriers";
    return;
  }
}

void check(dim3 grid, dim3 block, std::size_t shared) {
  const std::uint64_t threads = std::uint64_t(block.x) * block.y * block.z;
  const auto text = [](dim3 d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  if (threads == 0 || threads > 1024 || block.z > 64) {
    throw std::runtime_error("a block of " + text(block) + " threads; expected 1 to 1024, and at most 64 in z");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 2147483647u || grid.y > 65535u || grid.z > 65535u) {
    throw std::runtime_error("a grid of " + text(grid) + " blocks; expected 1 to 2147483647 in x, 1 to 65535 in y and z");
  }
  if (shared > most_shared) throw std::runtime_error(std::to_string(shared) + " bytes of shared memory; 232448 are there");
}

}  // namespace

const Place& place() { return machine.running->place; }

int lane() { return index_of(*machine.running) % lanes; }

void* dynamic_shared() { return machine.shared.data(); }

void run(const char* name, dim3 grid, dim3 block, std::size_t shared, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const auto failed = [&](const std::string& what) {
    machine.error.clear();
    throw std::runtime_error(std::string("the CUDA kernel ") + name + ": " + what);
  };
  try {
    check(grid, block, shared);
  } catch (const std::runtime_error& error) {
    failed(error.what());
  }
  const std::size_t count = std::size_t(block.x) * block.y * block.z;
  if (machine.fibers.size() < count) machine.fibers.resize(count);
  machine.warps.resize((count + lanes - 1) / lanes);
  machine.thread = &thread;
  for (std::uint64_t b = std::uint64_t(grid.x) * grid.y * grid.z; b-- > 0;) {
    machine.shared.assign(shared / 8 + 2, ~std::uint64_t(0));  // NaN: not set by anybody
    const dim3 at(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    for (Warp& warp : machine.warps) {
      for (auto& numbers : warp.number) numbers.fill(~0u);
    }
    for (std::size_t i = 0; i < count; ++i) {
      Fiber& fiber = machine.fibers[i];
      if (!fiber.stack) fiber.stack.reset(new unsigned char[stack_bytes]);
      make_context(fiber.context, fiber.stack.get(), entry);
      const dim3 in(unsigned(i % block.x), unsigned(i / block.x % block.y), unsigned(i / block.x / block.y));
      fiber.place = {in, at, grid, block};
      fiber.state = State::Ready;
      fiber.exchanges = 0;
      fiber.copies.clear();
      fiber.open.clear();
    }
    machine.gathering = false;
    run_block(count);
    if (!machine.error.empty()) failed(std::string(machine.error));
  }
}

void barrier() { yield(State::AtBarrier); }

bool barrier_or(bool value) {
  if (!machine.gathering) {
    machine.gathering = true;
    machine.any = false;
  }
  machine.any = machine.any || value;
  barrier();
  const bool result = machine.any;
  barrier();  // before the next one starts anew
  return result;
}

void warp_barrier(unsigned mask) {
  if ((mask >> lane() & 1u) == 0) fail("a lane waits with a mask that leaves it out");
  machine.running->mask = mask;
  yield(State::AtWarpBarrier);
}

static unsigned bring(unsigned mask, const void* mine, std::size_t bytes) {
  Fiber& fiber = *machine.running;
  Warp& warp = machine.warps[std::size_t(index_of(fiber) / lanes)];
  const unsigned number = fiber.exchanges++;
  std::memcpy(warp.brought[number % 2][std::size_t(lane())].data(), mine, bytes);
  warp.number[number % 2][std::size_t(lane())] = number;
  warp_barrier(mask);
  return number;
}

void exchange(unsigned mask, const void* mine, void* theirs, std::size_t bytes, int source) {
  const unsigned number = bring(mask, mine, bytes);
  const Warp& warp = machine.warps[std::size_t(index_of(*machine.running) / lanes)];
  if (source < 0 || source >= lanes || (mask >> source & 1u) == 0) {
    fail("a shuffle reads lane " + std::to_string(source) + ", which does not take part");
  }
  std::memcpy(theirs, warp.brought[number % 2][std::size_t(source)].data(), bytes);
}

const unsigned char* exchange_all(const void* mine, std::size_t bytes) {
  const unsigned number = bring(~0u, mine, bytes);
  return machine.warps[std::size_t(index_of(*machine.running) / lanes)].brought[number % 2][0].data();
}

unsigned ballot(unsigned mask, bool value) {
  const std::uint32_t mine = value;
  unsigned result = 0;
  const unsigned number = bring(mask, &mine, sizeof mine);
  const Warp& warp = machine.warps[std::size_t(index_of(*machine.running) / lanes)];
  for (int i = 0; i < lanes; ++i) {
    if ((mask >> i & 1u) && warp.brought[number % 2][std::size_t(i)][0]) result |= 1u << i;
  }
  return result;
}

// ---- tensor cores ----------------------------------------------------------------------------------------------------

namespace {

struct Operands {
  std::uint32_t a[4], b[2];
};

const Operands& of_lane(const unsigned char* brought, int lane) {
  return *reinterpret_cast<const Operands*>(brought + std::size_t(lane) * exchange_bytes);
}

template <class Convert>
void multiply16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], const Convert& convert) {
  Operands mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  const unsigned char* brought = exchange_all(&mine, sizeof mine);
  const int g = lane() / 4, t = lane() % 4;
  const auto half = [&](std::uint32_t word, int which) { return convert(std::uint16_t(word >> (16 * which))); };
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int owner = k % 8 / 2;
      const float left = half(of_lane(brought, row % 8 * 4 + owner).a[row / 8 + 2 * (k / 8)], k % 2);
      const float right = half(of_lane(brought, column * 4 + owner).b[k / 8], k % 2);
      sum += left * right;
    }
    d[i] += sum;
  }
}

}  // namespace

void multiply_bfloat16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  multiply16(d, a, b, [](std::uint16_t bits) { return load(BFloat16{bits}); });
}

void multiply_half(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  multiply16(d, a, b, [](std::uint16_t bits) { return load(Half{bits}); });
}

void multiply_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  Operands mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  const unsigned char* brought = exchange_all(&mine, sizeof mine);
  const int g = lane() / 4, t = lane() % 4;
  const auto cut = [](std::uint32_t bits) { return storage::as_float(bits & 0xffffe000u); };
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    float sum = 0;
    for (int k = 0; k < 8; ++k) {
      const float left = cut(of_lane(brought, row % 8 * 4 + k % 4).a[row / 8 + 2 * (k / 4)]);
      sum += left * cut(of_lane(brought, column * 4 + k % 4).b[k / 4]);
    }
    d[i] += sum;
  }
}

std::uint32_t to_tf32(float value) {
  const std::uint32_t bits = storage::as_bits(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;  // nearest, ties away from zero
}

static void load_tiles(std::uint32_t (&out)[4], const void* row, bool transposed) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) fail("ldmatrix reads a row that is not 16-byte aligned");
  const unsigned char* brought = exchange_all(&row, sizeof row);
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    std::uint16_t pair[2];
    for (int k = 0; k < 2; ++k) {
      const int r = transposed ? 2 * t + k : g, c = transposed ? g : 2 * t + k;
      const void* address;
      std::memcpy(&address, brought + std::size_t(8 * i + r) * exchange_bytes, sizeof address);
      std::memcpy(&pair[k], static_cast<const unsigned char*>(address) + 2 * c, 2);
    }
    out[i] = std::uint32_t(pair[0]) | std::uint32_t(pair[1]) << 16;
  }
  // nobody writes to what others still read
  warp_barrier(~0u);
}

void load_matrices(std::uint32_t (&out)[4], const void* row) { load_tiles(out, row, false); }
void load_matrices_transposed(std::uint32_t (&out)[4], const void* row) { load_tiles(out, row, true); }

void copy_async_bytes(void* target, const void* source, int bytes, bool valid) {
  if (reinterpret_cast<std::uintptr_t>(target) % unsigned(bytes) != 0 ||
      (valid && reinterpret_cast<std::uintptr_t>(source) % unsigned(bytes) != 0)) {
    fail("an asynchronous copy of " + std::to_string(bytes) + " bytes is not aligned to them");
  }
  machine.running->open.push_back({target, valid ? source : nullptr, bytes});
}

void copy_async_commit() {
  Fiber& fiber = *machine.running;
  fiber.copies.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void copy_async_wait_for(int pending) {
  auto& copies = machine.running->copies;
  for (; copies.size() > std::size_t(pending); copies.pop_front()) {
    for (const Copy& copy : copies.front()) {
      if (copy.source == nullptr) {
        std::memset(copy.target, 0, std::size_t(copy.bytes));
      } else {
        std::memcpy(copy.target, copy.source, std::size_t(copy.bytes));
      }
    }
  }
}

}  // namespace mrvae::shim
