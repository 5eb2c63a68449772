// How a thread passes the time until another process publishes something: it asks and yields its core, then sleeps on a futex.
//
// What it does not know: what is waited for.

#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace shm {

using i64 = int64_t;
using u32 = uint32_t;

inline i64 now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return i64(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// Not FUTEX_PRIVATE: sleepers and those who wake them are of several processes. It returns at once where `word` is no
// longer `seen`, at a wake-up, at a signal, and after `ns` unless that is negative.
inline void sleep_on(std::atomic<u32>& word, u32 seen, i64 ns) {
    timespec limit{time_t(ns / 1000000000), long(ns % 1000000000)};
    syscall(SYS_futex, reinterpret_cast<u32*>(&word), FUTEX_WAIT, seen, ns < 0 ? nullptr : &limit, nullptr, 0);
}

inline void wake(std::atomic<u32>& word) {
    syscall(SYS_futex, reinterpret_cast<u32*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// A waiter asks again and again for so long before it sleeps. In between it offers its core, which the awaited rank may
// need where ranks outnumber cores; where nobody wants the core, asking costs half a microsecond, as spinning would.
// Not for longer, since a rank that computes would share its core with one that only asks.
constexpr i64 AWAKE_NS = 50000;

}  // namespace shm
