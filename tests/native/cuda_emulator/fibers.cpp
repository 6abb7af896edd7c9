// The scheduler: a fiber for each thread, of which one runs until it has to wait for others.
#include "fibers.h"

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>

#include "order.h"
#include "stacks.h"

namespace emulator {

struct Fiber {
  Thread thread{};
  void* stack = nullptr;
  void* place = nullptr;  // its stack pointer while another runs; null: it begins with a fresh stack
  bool started = false;   // its thread has begun, and not come to its end
  const std::function<bool()>* condition = nullptr;  // what it waits for, if anything
};

Thread* current = nullptr;

namespace {

void* scheduler = nullptr;  // its place while a fiber runs
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> ready, asking;
std::vector<std::function<void()>> events;
const std::function<void()>* task = nullptr;

void release_all(Meeting& m) {
  for (Thread* t : m.waiting) ready.push_back(t->fiber);
  m.waiting.clear();
  m.arrived = 0;
}

void leave() { switch_stacks(&current->fiber->place, scheduler); }  // returns when this fiber is drawn again

void complete(Meeting& m) {
  if (m.arrived > 0 && m.arrived >= m.expected) release_all(m);
}

// A thread that has returned counts no longer for the barriers of its block and cluster. (A warp's exchange does miss
// it: that is an error of the kernel.)
void finish() {
  Block& b = *current->block;
  --b.live;
  b.all.expected = b.live;
  --b.cluster->all.expected;
  complete(b.all);
  complete(b.cluster->all);
}

void body() {
  for (;;) {
    (*task)();
    if (launch.early && !current->waited) fail("ends without a wait for the kernel before");
    finish();
    current->fiber->started = false;
    leave();
  }
}

void resume(Fiber* f) {
  current = &f->thread;
  if (!f->place) f->place = fresh_stack(f->stack, body);
  f->started = true;
  switch_stacks(&scheduler, f->place);
}

[[noreturn]] void deadlock() {
  std::map<std::string, std::pair<int, std::string>> waiting;
  for (const auto& f : fibers)
    if (f->started) {
      auto& group = waiting[f->thread.doing ? f->thread.doing : "?"];
      if (group.first++ == 0) group.second = name_of(f->thread);
    }
  std::string text = "deadlock:";
  for (const auto& [what, group] : waiting)
    text += " " + std::to_string(group.first) + " threads wait in " + what + " (first: " + group.second + ");";
  current = nullptr;
  fail(text);
}

// The next fiber or event, as a number: a laggard seldom while others can go on.
size_t draw(const Laggards& laggards) {
  size_t at = 0;
  for (int draws = 0; draws < 8; ++draws) {
    at = random_number() % (ready.size() + events.size());
    if (at >= ready.size() || !laggards.have(ready[at]->thread)) break;
  }
  return at;
}

Fiber* fiber(size_t at) {
  while (fibers.size() <= at) {
    auto f = std::make_unique<Fiber>();
    f->stack = make_stack();
    fibers.push_back(std::move(f));
  }
  return fibers[at].get();
}

}  // namespace

std::string name_of(const Thread& t) {
  char text[200];
  snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u)", t.block->index.x, t.block->index.y,
           t.block->index.z, t.index.x, t.index.y, t.index.z);
  return text;
}

void add_thread(size_t at, uint3 index, int number, Block* block) {
  Fiber* const f = fiber(at);
  f->thread = {index, number, block, f, "start"};
  ready.push_back(f);
}

void run_fibers(const std::function<void()>& kernel) {
  task = &kernel;
  const uint64_t chance = random_number();
  const Laggards laggards(chance, ready[random_number() % ready.size()]->thread);
  while (!ready.empty() || !events.empty()) {
    size_t at = draw(laggards);
    if (at < ready.size()) {
      Fiber* const f = ready[at];
      ready[at] = ready.back();
      ready.pop_back();
      current = &f->thread;
      if (f->condition && !(*f->condition)()) {
        asking.push_back(f);
        continue;
      }
      resume(f);
      continue;
    }
    at -= ready.size();
    const auto event = std::move(events[at]);
    events.erase(events.begin() + at);
    current = nullptr;
    event();
  }
  for (const auto& f : fibers)
    if (f->started) deadlock();
}

void forget_fibers() {
  for (const auto& f : fibers) {
    if (f->started) f->place = nullptr;
    f->started = false;
    f->condition = nullptr;
  }
  ready.clear();
  asking.clear();
  events.clear();
}

void meet(Meeting& m, const char* what) {
  current->doing = what;
  if (m.arrived == 0) m.what = what;
  if (m.what != what && std::strcmp(m.what, what) != 0)
    fail(std::string("threads meet in ") + m.what + " and in " + what);
  ++m.arrived;
  m.waiting.push_back(current);
  complete(m);
  leave();
}

void wait_until(const std::function<bool()>& is_ready, const char* what) {
  current->doing = what;
  if (is_ready()) return;
  Fiber* const self = current->fiber;
  self->condition = &is_ready;  // the scheduler asks, and comes back when it holds
  asking.push_back(self);
  leave();
  self->condition = nullptr;
}

void change() {
  ready.insert(ready.end(), asking.begin(), asking.end());
  asking.clear();
}

void later(std::function<void()> event) { events.push_back(std::move(event)); }
Warp& warp() { return current->block->warps[current->number / 32]; }
void meet_warp(const char* what) { meet(warp().meeting, what); }

}  // namespace emulator
