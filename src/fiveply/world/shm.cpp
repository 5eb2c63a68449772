// Collectives and transfers between processes of one host, over one block of memory that all of them map.
//
// Notable:
// - A collective is cut into steps. In step k every rank publishes into its slot k % DEPTH, so a rank can be up to DEPTH
//   steps ahead of the slowest reader; counters never go back, and no slot is ever locked.
// - A large all-reduce shares the work: each rank reduces its part of every step and the others fetch it. A small one
//   has every rank reduce everything. Both fold in rank order, so all ranks hold the same bits, and so does the next run.
// - Each ordered pair of ranks has a ring for transfers, which move independently of collectives and of each other.
// - Nothing here blocks for long: operations are state machines under one lock, moved on by whoever waits, and by a
//   thread while nobody does. A rank that cannot move sleeps on its bell (a futex), which peers ring after they publish.
//
// What it does not know: how the memory came about, who is alive, time-outs, tensors. `shm.py` does.

#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace {

using i64 = int64_t;
using u32 = uint32_t;
constexpr int DEPTH = 4;

enum Kind : int32_t {
    ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST, REDUCE, GATHER, SCATTER, ALL_TO_ALL, BARRIER, SEND, RECEIVE
};
enum State : int32_t { PENDING, DONE, MISMATCH, CANCELLED };
enum Reduction : int32_t { SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR };
enum Dtype : int32_t { F32, F64, BF16, F16, I8, U8, I16, I32, I64 };

// What is in the shared block

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

// Reductions

struct Bf16 {
    uint16_t bits;
    operator float() const {
        u32 wide = u32(bits) << 16;
        float x;
        memcpy(&x, &wide, 4);
        return x;
    }
    static Bf16 from(float x) {  // to nearest, ties to even; a NaN stays one
        u32 wide;
        memcpy(&wide, &x, 4);
        u32 rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
        return {uint16_t(x != x ? 0x7fc0 : rounded)};
    }
};

struct F16bits {
    uint16_t bits;
    operator float() const {
        u32 magnitude = u32(bits & 0x7fff) << 13, sign = u32(bits & 0x8000) << 16;
        float x, scale = 0x1p112f;  // the product also normalises subnormal numbers
        memcpy(&x, &magnitude, 4);
        x *= scale;
        u32 wide;
        memcpy(&wide, &x, 4);
        wide = (magnitude >= 0x0f800000 ? (magnitude | 0x7f800000) : wide) | sign;
        memcpy(&x, &wide, 4);
        return x;
    }
    static F16bits from(float x) {
        u32 wide;
        memcpy(&wide, &x, 4);
        u32 sign = (wide >> 16) & 0x8000, magnitude = wide & 0x7fffffff;
        if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
        if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65,520 and above round to infinity
        if (magnitude < 0x38800000) {                                   // subnormal: let an addition round to 2^-24
            float small, half = 0.5f;
            memcpy(&small, &magnitude, 4);
            small += half;
            u32 shifted, base;
            memcpy(&shifted, &small, 4);
            memcpy(&base, &half, 4);
            return {uint16_t(sign | (shifted - base))};
        }
        u32 rounded = magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1);
        return {uint16_t(sign | (rounded >> 13))};
    }
};

template <class T> struct Wide { using type = T; };
template <> struct Wide<Bf16> { using type = float; };
template <> struct Wide<F16bits> { using type = float; };

template <class T, class A> T narrow(A x) {
    if constexpr (std::is_same_v<T, A>) return x;
    else return T::from(x);
}

// out[i] = in[0][i] . in[1][i] . ..., in this order; accumulated wide and rounded once. `out` may be one of `in`.
template <class T, class F> void fold(char* out, const std::vector<const char*>& in, i64 count, bool average, F f) {
    using A = typename Wide<T>::type;
    constexpr i64 BLOCK = 1024;
    A sums[BLOCK];
    const int n = int(in.size());
    for (i64 low = 0; low < count; low += BLOCK) {
        const i64 size = std::min(BLOCK, count - low);
        const T* first = reinterpret_cast<const T*>(in[0]) + low;
        if (n == 1) for (i64 i = 0; i < size; i++) sums[i] = A(first[i]);
        for (int q = 1; q < n; q++) {
            const T* next = reinterpret_cast<const T*>(in[q]) + low;
            if (q == 1) for (i64 i = 0; i < size; i++) sums[i] = f(A(first[i]), A(next[i]));
            else for (i64 i = 0; i < size; i++) sums[i] = f(sums[i], A(next[i]));
        }
        if (average) for (i64 i = 0; i < size; i++) sums[i] = A(sums[i] / A(n));
        T* to = reinterpret_cast<T*>(out) + low;
        for (i64 i = 0; i < size; i++) to[i] = narrow<T, A>(sums[i]);
    }
}

template <class T> void reduce_as(int reduction, char* out, const std::vector<const char*>& in, i64 bytes) {
    using A = typename Wide<T>::type;
    const i64 count = bytes / i64(sizeof(T));
    switch (reduction) {
        case SUM: case AVG: return fold<T>(out, in, count, reduction == AVG, [](A a, A b) { return A(a + b); });
        case PRODUCT: return fold<T>(out, in, count, false, [](A a, A b) { return A(a * b); });
        case MIN: return fold<T>(out, in, count, false, [](A a, A b) { return b < a ? b : a; });
        case MAX: return fold<T>(out, in, count, false, [](A a, A b) { return a < b ? b : a; });
    }
    if constexpr (std::is_integral_v<T>) switch (reduction) {
        case BAND: return fold<T>(out, in, count, false, [](A a, A b) { return A(a & b); });
        case BOR: return fold<T>(out, in, count, false, [](A a, A b) { return A(a | b); });
        case BXOR: return fold<T>(out, in, count, false, [](A a, A b) { return A(a ^ b); });
    }
}

void reduce(int dtype, int reduction, char* out, const std::vector<const char*>& in, i64 bytes) {
    switch (dtype) {
        case F32: return reduce_as<float>(reduction, out, in, bytes);
        case F64: return reduce_as<double>(reduction, out, in, bytes);
        case BF16: return reduce_as<Bf16>(reduction, out, in, bytes);
        case F16: return reduce_as<F16bits>(reduction, out, in, bytes);
        case I8: return reduce_as<int8_t>(reduction, out, in, bytes);
        case U8: return reduce_as<uint8_t>(reduction, out, in, bytes);
        case I16: return reduce_as<int16_t>(reduction, out, in, bytes);
        case I32: return reduce_as<int32_t>(reduction, out, in, bytes);
        case I64: return reduce_as<int64_t>(reduction, out, in, bytes);
    }
}

// What is this process's own

i64 padded(i64 bytes) { return (bytes + 63) & ~i64(63); }

void copy(char* to, const char* from, i64 bytes) {
    if (bytes > 0 && to != from) memcpy(to, from, size_t(bytes));
}

i64 now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return i64(t.tv_sec) * 1000000000 + t.tv_nsec;
}

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void sleep_on(std::atomic<u32>& word, u32 seen, i64 ns) {
    timespec limit{time_t(ns / 1000000000), long(ns % 1000000000)};
    syscall(SYS_futex, reinterpret_cast<u32*>(&word), FUTEX_WAIT, seen, ns < 0 ? nullptr : &limit, nullptr, 0);
}

void wake(std::atomic<u32>& word) { syscall(SYS_futex, reinterpret_cast<u32*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

struct Op {
    std::atomic<int32_t> state{PENDING};
    int32_t blamed = -1;  // group rank of the mismatch, and of a receive's source
    Header mine{}, theirs{};
    const char* in = nullptr;
    char* out = nullptr;
    std::vector<const char*> ins;  // part by part, where they don't follow each other
    std::vector<char*> outs;
    std::vector<i64> in_sizes, out_sizes;  // where parts differ
    bool shared = false;                   // an all-reduce in two phases
    i64 unit = 0, stride = 0, first = -1, written = 0, folded = 0, finished = 0;
    bool checked = false;
    i64 moved = 0;  // bytes of a transfer
    bool opened = false;
};

struct Group {
    int rank, n;
    i64 chunk, ring_bytes, small, length;
    i64 spin_ns;
    char* base;
    Member* members;
    Ring* rings;
    char *slots, *streams;
    std::mutex lock;
    std::deque<Op*> collectives, anyone;
    std::vector<std::deque<Op*>> sends, receives;
    std::vector<i64> sent, received;  // sequence numbers of transfers
    i64 sequence = 0, step = 0;
    std::atomic<i64> moves{0};
    std::atomic<int> drivers{0};
    std::atomic<u32> kick{0};
    std::atomic<bool> closing{false}, threaded{false};
    std::atomic<int> pending{0};
    std::thread thread;
    std::vector<const char*> sources;

    Member& me() { return members[rank]; }
    Ring& ring(int from, int to) { return rings[from * n + to]; }
    char* stream(int from, int to) { return streams + (i64(from) * (n - 1) + (to > from ? to - 1 : to)) * ring_bytes; }
    char* slot(int q, i64 step) { return slots + (q * DEPTH + step % DEPTH) * chunk; }

    void ring_bell(int q) {
        Member& m = members[q];
        if (m.sleepers.load(std::memory_order_relaxed)) {
            m.bell.fetch_add(1, std::memory_order_release);
            wake(m.bell);
        }
    }

    void finish(Op* op, State state) {
        pending.fetch_sub(1, std::memory_order_relaxed);
        op->state.store(state, std::memory_order_release);
    }

    // Collectives

    bool scattered(const Op& op) { return op.mine.kind == REDUCE_SCATTER || op.mine.kind == SCATTER || op.mine.kind == ALL_TO_ALL; }
    // Parts of an all-to-all differ in size, so each begins with its own.
    i64 lead(const Op& op) { return op.mine.kind == ALL_TO_ALL ? 64 : 0; }
    bool rooted(const Op& op) { return op.mine.kind == BROADCAST || op.mine.kind == SCATTER; }  // all read the root alone
    bool funnels(const Op& op) { return op.mine.kind == REDUCE || op.mine.kind == GATHER; }     // the root alone reads
    bool reads(const Op& op, int q) {
        if (q == rank) return false;
        return rooted(op) ? q == op.mine.root : !funnels(op) || rank == op.mine.root;
    }
    const char* in(const Op& op, int q) { return op.ins.empty() ? op.in + q * op.mine.bytes : op.ins[q]; }
    char* out(const Op& op, int q) { return op.outs.empty() ? op.out + q * op.mine.bytes : op.outs[q]; }
    i64 size_at(const std::vector<i64>& sizes, const Op& op, int q, i64 low) {
        return std::clamp(whole(sizes, op, q) - low, i64(0), op.unit);
    }
    i64 whole(const std::vector<i64>& sizes, const Op& op, int q) { return sizes.empty() ? op.mine.bytes : sizes[q]; }

    void begin(Op& op) {
        op.first = step;
        if (op.mine.kind == BARRIER) op.mine.bytes = 0;
        op.stride = scattered(op) ? chunk / n & ~i64(63) : 0;  // from one rank's part of a slot to the next
        op.unit = op.stride ? op.stride - lead(op) : chunk;
        op.shared = op.mine.kind == ALL_REDUCE && op.mine.bytes > small;
        i64 longest = op.mine.bytes;
        for (i64 size : op.in_sizes) longest = std::max(longest, size);
        op.mine.steps = std::max(i64(1), (longest + op.unit - 1) / op.unit);
    }

    bool may_write(const Op& op) {
        i64 least = op.first + op.written - DEPTH + 1;
        for (int q = 0; q < n; q++)
            if (members[q].done.value.load(std::memory_order_acquire) < least) return false;
        return true;
    }

    void write(Op& op) {
        const i64 at = op.first + op.written, low = op.written * op.unit;
        char* to = slot(rank, at);
        const int kind = op.mine.kind;
        if (scattered(op)) {
            for (int q = 0; q < n; q++)
                if (q != rank && (kind != SCATTER || rank == op.mine.root)) {
                    if (lead(op)) *reinterpret_cast<i64*>(to + q * op.stride) = whole(op.in_sizes, op, q);
                    copy(to + q * op.stride + lead(op), in(op, q) + low, size_at(op.in_sizes, op, q, low));
                }
        } else if (kind != BROADCAST || rank == op.mine.root) {
            bool unread = funnels(op) && rank == op.mine.root;
            if (!unread) copy(to, op.in + low, size_at({}, op, 0, low));
        }
        me().headers[at % DEPTH] = op.mine;
        me().wrote.value.store(at + 1, std::memory_order_release);
        op.written++;
    }

    bool arrived(const Op& op, i64 at) {
        for (int q = 0; q < n; q++)
            if (reads(op, q) && members[q].wrote.value.load(std::memory_order_acquire) <= at) return false;
        return true;
    }

    bool agreed(Op& op) {  // once, when the first step of all sources is there
        if (op.checked) return true;
        for (int q = 0; q < n; q++) {
            if (!reads(op, q)) continue;
            const Header& theirs = members[q].headers[op.first % DEPTH];
            bool same = op.mine.agrees(theirs) && op.mine.sequence == theirs.sequence;
            i64 bytes = theirs.bytes;
            if (same && op.mine.kind == ALL_TO_ALL) {
                bytes = *reinterpret_cast<i64*>(slot(q, op.first) + rank * op.stride);
                same = bytes == whole(op.out_sizes, op, q);
                op.mine.steps = std::max(op.mine.steps, theirs.steps);
            }
            if (!same) {
                op.blamed = q;
                op.theirs = theirs;
                op.theirs.bytes = bytes;
                return false;
            }
        }
        return op.checked = true;
    }

    void part(i64 bytes, int q, i64& low, i64& size) {
        i64 each = padded((bytes + n - 1) / n);
        low = std::min(q * each, bytes);
        size = std::min(each, bytes - low);
    }

    void fold_part(Op& op) {
        const i64 at = op.first + op.folded, bytes = size_at({}, op, 0, op.folded * op.unit);
        i64 low, size;
        part(bytes, rank, low, size);
        for (int q = 0; q < n; q++) sources[q] = slot(q, at) + low;
        reduce(op.mine.dtype, op.mine.reduction, slot(rank, at) + low, sources, size);  // nobody else reads this part of mine
        me().reduced.value.store(at + 1, std::memory_order_release);
        op.folded++;
    }

    bool folded_by_all(const Op& op) {
        for (int q = 0; q < n; q++)
            if (members[q].reduced.value.load(std::memory_order_acquire) <= op.first + op.finished) return false;
        return true;
    }

    void read(Op& op) {
        const i64 at = op.first + op.finished, low = op.finished * op.unit;
        const i64 bytes = size_at({}, op, 0, low);
        const int kind = op.mine.kind;
        const i64 mine = op.stride ? rank * op.stride + lead(op) : 0;  // my part of everyone's slot
        if (op.shared) {
            for (int q = 0; q < n; q++) {
                i64 from, size;
                part(bytes, q, from, size);
                copy(op.out + low + from, slot(q, at) + from, size);
            }
        } else if (kind == ALL_REDUCE || kind == REDUCE_SCATTER || (kind == REDUCE && rank == op.mine.root)) {
            for (int q = 0; q < n; q++)
                sources[q] = q != rank ? slot(q, at) + mine : in(op, kind == REDUCE_SCATTER ? q : 0) + low;
            reduce(op.mine.dtype, op.mine.reduction, op.out + low, sources, bytes);
        } else if (kind == ALL_GATHER || kind == ALL_TO_ALL || (kind == GATHER && rank == op.mine.root)) {
            for (int q = 0; q < n; q++) {
                const char* from = q != rank ? slot(q, at) + mine : (kind == ALL_TO_ALL ? in(op, q) : op.in) + low;
                copy(out(op, q) + low, from, size_at(op.out_sizes, op, q, low));
            }
        } else if (kind == SCATTER && rank == op.mine.root) {
            copy(op.out + low, in(op, rank) + low, bytes);
        } else if (rooted(op) && rank != op.mine.root) {
            copy(op.out + low, slot(op.mine.root, at) + mine, bytes);
        }
        me().done.value.store(at + 1, std::memory_order_release);
        op.finished++;
    }

    bool move_collective() {
        if (collectives.empty()) return false;
        Op& op = *collectives.front();
        if (op.first < 0) begin(op);
        bool moved = false;
        if (op.written < op.mine.steps && may_write(op)) write(op), moved = true;
        const i64 next = op.shared ? op.folded : op.finished;
        if (next < op.written && arrived(op, op.first + next)) {
            if (!agreed(op)) {
                collectives.pop_front();
                finish(&op, MISMATCH);
                return true;
            }
            op.shared ? fold_part(op) : read(op);
            moved = true;
        }
        if (op.shared && op.finished < op.folded && folded_by_all(op)) read(op), moved = true;
        if (op.finished == op.mine.steps) {
            step = op.first + op.mine.steps;
            collectives.pop_front();
            finish(&op, DONE);
        }
        return moved;
    }

    // Transfers

    void put(char* stream, i64 at, const char* from, i64 bytes) {
        i64 place = at % ring_bytes, straight = std::min(bytes, ring_bytes - place);
        copy(stream + place, from, straight);
        copy(stream, from + straight, bytes - straight);
    }
    void take(const char* stream, i64 at, char* to, i64 bytes) {
        i64 place = at % ring_bytes, straight = std::min(bytes, ring_bytes - place);
        copy(to, stream + place, straight);
        copy(to + straight, stream, bytes - straight);
    }

    bool move_send(int q) {
        if (sends[q].empty()) return false;
        Op& op = *sends[q].front();
        Ring& way = ring(rank, q);
        i64 head = way.head.value.load(std::memory_order_relaxed);
        const i64 start = head;
        i64 space = ring_bytes - (head - way.tail.value.load(std::memory_order_acquire));
        if (!op.opened && space >= i64(sizeof(Header))) {
            put(stream(rank, q), head, reinterpret_cast<const char*>(&op.mine), sizeof(Header));
            head += sizeof(Header), space -= sizeof(Header);
            op.opened = true;
        }
        i64 bytes = std::min({op.mine.bytes - op.moved, space, ring_bytes / 4 & ~i64(63)});  // the peer takes one part while this rank puts the next
        if (op.opened && bytes > 0) {
            put(stream(rank, q), head, op.in + op.moved, bytes);
            op.moved += bytes, head += padded(bytes);  // only the last part is no multiple of 64
        }
        if (op.opened && op.moved == op.mine.bytes) {
            sends[q].pop_front();
            finish(&op, DONE);
        }
        if (head == start) return false;
        way.head.value.store(head, std::memory_order_release);
        return true;
    }

    Op* receiver(int q, const Header& header) {  // the first that was posted for this sender and tag
        for (Op* op : receives[q])
            if (op->mine.reduction == header.reduction) return op;
        for (auto at = anyone.begin(); at != anyone.end(); ++at) {
            Op* op = *at;
            if (op->mine.reduction != header.reduction) continue;
            anyone.erase(at);
            receives[q].push_front(op);
            return op;
        }
        return nullptr;
    }

    bool move_receive(int q) {
        if (receives[q].empty() && anyone.empty()) return false;
        Ring& way = ring(q, rank);
        i64 tail = way.tail.value.load(std::memory_order_relaxed);
        i64 ready = way.head.value.load(std::memory_order_acquire) - tail;
        if (ready == 0) return false;
        Op* op = receives[q].empty() || !receives[q].front()->opened ? nullptr : receives[q].front();
        if (!op) {
            Header header;
            take(stream(q, rank), tail, reinterpret_cast<char*>(&header), sizeof(Header));
            if (!(op = receiver(q, header))) return false;
            auto at = std::find(receives[q].begin(), receives[q].end(), op);
            receives[q].erase(at);
            op->blamed = q;
            if (header.bytes != op->mine.bytes || header.dtype != op->mine.dtype) {
                op->theirs = header;
                finish(op, MISMATCH);
                return true;
            }
            receives[q].push_front(op);  // it takes the whole message before any other looks at the ring
            op->opened = true;
            tail += sizeof(Header), ready -= sizeof(Header);
        }
        i64 bytes = std::min(op->mine.bytes - op->moved, ready);
        take(stream(q, rank), tail, op->out + op->moved, bytes);
        op->moved += bytes;
        way.tail.value.store(tail + padded(bytes), std::memory_order_release);
        if (op->moved == op->mine.bytes) {
            receives[q].pop_front();
            finish(op, DONE);
        }
        return true;
    }

    // Progress

    bool move() {  // under the lock
        bool moved = move_collective(), any = moved;
        for (int q = 0; q < n; q++) {
            if (q == rank) continue;
            bool transferred = (!sends[q].empty() && move_send(q)) | move_receive(q);
            any |= transferred;
            if (!moved && transferred) {
                std::atomic_thread_fence(std::memory_order_seq_cst);
                ring_bell(q);
            }
        }
        if (moved) {
            // Pairs with the fence of a sleeper: either it sees what was published, or its being asleep is seen here.
            std::atomic_thread_fence(std::memory_order_seq_cst);
            for (int q = 0; q < n; q++)
                if (q != rank) ring_bell(q);
        }
        if (any) moves.fetch_add(1, std::memory_order_relaxed);
        return any;
    }

    // Move until `done()` or the time is up; spins for `spin` before it sleeps.
    template <class Done> void drive(Done done, i64 limit_ns, i64 spin) {
        const i64 until = now_ns() + limit_ns;
        i64 idle_since = 0;
        for (int round = 0;; round++) {
            u32 bell = me().bell.load(std::memory_order_acquire);
            bool moved;
            {
                std::lock_guard<std::mutex> hold(lock);
                moved = move();
            }
            if (done()) return;
            if (moved) { idle_since = 0; continue; }
            if (!idle_since || round % 16 == 0) {
                i64 now = now_ns();
                if (!idle_since) idle_since = now;
                if (now > until) return;
                if (now - idle_since >= spin) {
                    me().sleepers.fetch_add(1, std::memory_order_seq_cst);
                    std::atomic_thread_fence(std::memory_order_seq_cst);
                    {
                        std::lock_guard<std::mutex> hold(lock);
                        moved = move();
                    }
                    if (!moved && !done()) sleep_on(me().bell, bell, until - now);
                    me().sleepers.fetch_sub(1, std::memory_order_relaxed);
                    idle_since = 0;
                    if (done()) return;
                    continue;
                }
            }
            relax();
        }
    }

    void run_thread() {
        while (!closing.load()) {
            u32 seen = kick.load();
            if (pending.load() == 0 || drivers.load() > 0) {
                sleep_on(kick, seen, -1);
                continue;
            }
            drive([this] { return closing.load() || pending.load() == 0 || drivers.load() > 0; }, 1000000000, 0);
        }
    }

    void start_thread() {
        if (!threaded.exchange(true)) thread = std::thread([this] { run_thread(); });
        kick.fetch_add(1);
        wake(kick);
    }

    int wait(Op* op, i64 limit_ns) {
        drivers.fetch_add(1);
        drive([op] { return op->state.load(std::memory_order_acquire) != PENDING; }, limit_ns, spin_ns);
        const int state = op->state.load(std::memory_order_acquire);
        // Whoever is told PENDING comes back.
        if (drivers.fetch_sub(1) == 1 && state != PENDING && pending.load() > 0) start_thread();
        return state;
    }
};

}  // namespace

extern "C" {

struct Parts {  // arrays of a part a rank, each or none
    const char* const* ins;
    char* const* outs;
    const i64 *in_sizes, *out_sizes;
};

static i64 heads(int n) { return i64(sizeof(Member)) * n + i64(sizeof(Ring)) * n * n; }

i64 shm_size(int n, i64 chunk, i64 ring) { return heads(n) + i64(n) * DEPTH * chunk + i64(n) * (n - 1) * ring; }

// `chunk` and `ring`: bytes, multiples of 64 x n; `small`: of the largest all-reduce of one phase. All ranks give the same.
// A new block is all zeros, which is the right beginning for everything in it. Null where it can't be mapped.
Group* shm_open_group(int fd, int rank, int n, i64 chunk, i64 ring, i64 small, i64 spin_ns) {
    i64 length = shm_size(n, chunk, ring);
    void* base = mmap(nullptr, size_t(length), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) return nullptr;
    Group* g = new Group();
    g->rank = rank, g->n = n, g->chunk = chunk, g->ring_bytes = ring, g->small = small, g->length = length;
    g->spin_ns = spin_ns;
    g->base = static_cast<char*>(base);
    g->members = reinterpret_cast<Member*>(g->base);
    g->rings = reinterpret_cast<Ring*>(g->members + n);
    g->slots = g->base + heads(n);
    g->streams = g->slots + i64(n) * DEPTH * chunk;
    g->sends.resize(n), g->receives.resize(n), g->sent.resize(n), g->received.resize(n), g->sources.resize(n);
    return g;
}

// Begin an operation. `reduction` is the tag of a transfer, `root` its peer (-1: any). `bytes` of one part. With
// `limit_ns` the caller also waits so long; then an operation that is done is null. Otherwise a thread moves it on.
Op* shm_start(Group* g, int kind, int dtype, int reduction, int root, i64 bytes, const char* in, char* out, const Parts* parts,
              i64 limit_ns) {
    Op* op = new Op();
    op->mine = Header{0, bytes, 1, kind, dtype, reduction, root};
    op->in = in, op->out = out;
    if (parts) {
        if (parts->ins) op->ins.assign(parts->ins, parts->ins + g->n);
        if (parts->outs) op->outs.assign(parts->outs, parts->outs + g->n);
        if (parts->in_sizes) op->in_sizes.assign(parts->in_sizes, parts->in_sizes + g->n);
        if (parts->out_sizes) op->out_sizes.assign(parts->out_sizes, parts->out_sizes + g->n);
    }
    {
        std::lock_guard<std::mutex> hold(g->lock);
        g->pending.fetch_add(1);
        if (kind == SEND) {
            op->mine.sequence = g->sent[root]++;
            g->sends[root].push_back(op);
        } else if (kind == RECEIVE) {
            if (root >= 0) op->mine.sequence = g->received[root]++;
            (root < 0 ? g->anyone : g->receives[root]).push_back(op);
        } else {
            op->mine.sequence = g->sequence++;
            g->collectives.push_back(op);
        }
        if (!limit_ns) g->move();  // what is small is often done at once
    }
    if (limit_ns) {
        if (g->wait(op, limit_ns) == DONE) {
            delete op;
            return nullptr;
        }
    } else if (op->state.load() == PENDING) {
        g->drivers.load() ? g->ring_bell(g->rank) : g->start_thread();
    }
    return op;
}

int shm_wait(Group* g, Op* op, i64 limit_ns) { return g->wait(op, limit_ns); }
int shm_state(Op* op) { return op->state.load(std::memory_order_acquire); }
void shm_free(Op* op) { delete op; }
i64 shm_moves(Group* g) { return g->moves.load(); }

// What is known of an operation: sequence, and after a mismatch the peer and what it does instead; else a receive's source.
void shm_describe(Op* op, i64* values) {
    const Header& h = op->theirs;
    const i64 all[] = {op->mine.sequence, op->blamed, h.sequence, h.kind, h.dtype, h.reduction, h.root, h.bytes};
    std::copy(std::begin(all), std::end(all), values);
}

// waits[q] = 1 where rank q must do something before the operation can go on.
void shm_waits_for(Group* g, Op* op, unsigned char* waits) {
    std::lock_guard<std::mutex> hold(g->lock);
    std::fill(waits, waits + g->n, 0);
    if (op->state.load() != PENDING) return;
    if (op->mine.kind == SEND || op->mine.kind == RECEIVE) {
        for (int q = 0; q < g->n; q++) waits[q] = q != g->rank && (op->mine.root < 0 || q == op->mine.root);
        return;
    }
    Op& head = *g->collectives.front();
    const i64 next = head.first + (head.shared ? head.folded : head.finished);
    for (int q = 0; q < g->n; q++) {
        const Member& m = g->members[q];
        bool full = head.written < head.mine.steps && m.done.value.load() < head.first + head.written - DEPTH + 1;
        bool late = g->reads(head, q) && m.wrote.value.load() <= next;
        bool unfolded = head.shared && head.finished < head.folded && m.reduced.value.load() <= head.first + head.finished;
        waits[q] = q != g->rank && (full || late || unfolded);
    }
}

int shm_status(Group* g, int q) { return g->members[q].status.load(); }

// Say how this rank left, end its operations, which touch no memory after this returns.
void shm_leave(Group* g, int status) {
    {
        std::lock_guard<std::mutex> hold(g->lock);
        int32_t present = 0;
        g->me().status.compare_exchange_strong(present, status);
        auto cancel = [g](std::deque<Op*>& queue) {
            for (Op* op : queue) g->finish(op, CANCELLED);
            queue.clear();
        };
        cancel(g->collectives), cancel(g->anyone);
        for (int q = 0; q < g->n; q++) cancel(g->sends[q]), cancel(g->receives[q]);
    }
    g->closing.store(true);
    g->kick.fetch_add(1), wake(g->kick);
    g->me().bell.fetch_add(1), wake(g->me().bell);
    if (g->thread.joinable()) g->thread.join();
}

// After `shm_leave`, when no thread is inside.
void shm_close(Group* g) {
    munmap(g->base, size_t(g->length));
    delete g;
}

}  // extern "C"
