// The memory that all ranks of a group map: who holds what where, and the bells by which sleepers are woken.
//
//     Member x n | Ring x n x n | slots: n x DEPTH x chunk bytes | streams: n x (n - 1) x ring_bytes
//
// Notable: every counter has one writer and never goes back, so nothing is ever locked and no state is ever reset.
// What a counter announces is written before it (release) and read after it (acquire), which is what makes it safe on
// processors that reorder stores. All zeros, as a new block is, is the right beginning for everything in it.
//
// What it does not know: operations, and what the bytes mean.

#pragma once

#include <cstring>
#include <new>

#include "waiting.hpp"

namespace shm {

constexpr int DEPTH = 4;  // slots a rank

enum Kind : int32_t {
    ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST, REDUCE, GATHER, SCATTER, ALL_TO_ALL, BARRIER, SEND, RECEIVE
};

struct alignas(64) Header {  // what a rank says that it is doing
    i64 sequence, bytes, steps;
    int32_t kind, dtype, reduction, root;
    bool agrees(const Header& other) const {
        bool sized = kind == ALL_TO_ALL || bytes == other.bytes;  // there each pair has a size of its own
        return kind == other.kind && sized && dtype == other.dtype && reduction == other.reduction && root == other.root;
    }
};

struct alignas(128) Counter {  // a cache line of its own, and its neighbour, which some processors fetch along
    std::atomic<i64> value;
};

struct Member {
    Counter wrote, reduced, done;  // steps that this rank has published, reduced its part of, needs no more of others
    alignas(128) std::atomic<u32> bell;
    std::atomic<u32> sleepers;
    std::atomic<int32_t> status;  // 0 present, else as `shm.py` says
    Header headers[DEPTH];
};

struct Ring {  // bytes that the sender has put in and the receiver has taken out, ever
    Counter head, tail;
};

static_assert(std::atomic<i64>::is_always_lock_free && std::atomic<u32>::is_always_lock_free);

struct Block {
    int rank, n;
    i64 chunk, ring_bytes;
    char* base;
    Member* members = reinterpret_cast<Member*>(base);
    Ring* rings = reinterpret_cast<Ring*>(members + n);
    char* slots = base + heads(n);
    char* streams = slots + i64(n) * DEPTH * chunk;

    static i64 heads(int n) { return i64(sizeof(Member)) * n + i64(sizeof(Ring)) * n * n; }
    static i64 size(int n, i64 chunk, i64 ring) { return heads(n) + i64(n) * DEPTH * chunk + i64(n) * (n - 1) * ring; }
    i64 length() const { return size(n, chunk, ring_bytes); }

    Member& me() { return members[rank]; }
    Ring& ring(int from, int to) { return rings[from * n + to]; }
    char* stream(int from, int to) { return streams + (i64(from) * (n - 1) + (to > from ? to - 1 : to)) * ring_bytes; }
    char* slot(int q, i64 step) { return slots + (q * DEPTH + step % DEPTH) * chunk; }

    // After publishing, and a sequentially consistent fence, which pairs with that of a sleeper: either it sees what was
    // published, or its being asleep is seen here.
    void ring_bell(int q) {
        Member& m = members[q];
        if (m.sleepers.load(std::memory_order_relaxed)) {
            m.bell.fetch_add(1, std::memory_order_release);
            wake(m.bell);
        }
    }
};

inline i64 padded(i64 bytes) { return (bytes + 63) & ~i64(63); }

inline void copy(char* to, const char* from, i64 bytes) {
    if (bytes > 0 && to != from) memcpy(to, from, size_t(bytes));
}

}  // namespace shm
