// Collectives and transfers between processes of one host, over one block of memory that all of them map: one rank's end,
// and the C functions by which `shm.py` uses it.
//
// Notable: nothing here blocks for long. Operations are state machines under one lock, moved on by whoever waits for one,
// and by a thread while nobody does. A rank that cannot move sleeps on its bell, which peers ring after they publish.
//
// What it does not know: how the memory came about, who is alive, time-outs, tensors. `shm.py` does.

#include <sys/mman.h>

#include <mutex>
#include <thread>

#include "collectives.hpp"
#include "transfers.hpp"

namespace shm {

struct Group {
    Block block;
    Pending pending;
    Collectives collectives;
    Transfers transfers;
    std::mutex lock;
    std::atomic<i64> moves{0};
    std::atomic<int> drivers{0};  // threads that wait for an operation, and move all of them on meanwhile
    std::atomic<u32> kick{0};     // wakes this process's own thread
    std::atomic<bool> closing{false}, threaded{false};
    std::thread thread;

    Group(Block given, i64 small) : block(given), collectives(block, pending, small), transfers(block, pending) {}

    bool move() {  // under the lock
        const bool collective = collectives.move();
        bool any = collective;
        for (int q = 0; q < block.n; q++) {
            if (q == block.rank) continue;
            const bool transferred = transfers.move(q);
            any |= transferred;
            if (transferred && !collective) {
                std::atomic_thread_fence(std::memory_order_seq_cst);
                block.ring_bell(q);
            }
        }
        if (collective) {
            std::atomic_thread_fence(std::memory_order_seq_cst);
            for (int q = 0; q < block.n; q++)
                if (q != block.rank) block.ring_bell(q);
        }
        if (any) moves.fetch_add(1, std::memory_order_relaxed);
        return any;
    }

    bool move_locked() {
        std::lock_guard<std::mutex> hold(lock);
        return move();
    }

    // Move until `done()` or the time is up; sleep after `awake_ns` without progress.
    template <class Done> void drive(Done done, i64 limit_ns, i64 awake_ns) {
        const i64 until = now_ns() + limit_ns;
        for (i64 idle_since = 0;;) {
            const u32 bell = block.me().bell.load(std::memory_order_acquire);
            const bool moved = move_locked();
            if (done()) return;
            if (moved) {
                idle_since = 0;
                continue;
            }
            const i64 now = now_ns();
            if (now > until) return;
            if (!idle_since) idle_since = now;
            if (now - idle_since < awake_ns) {
                sched_yield();
                continue;
            }
            block.me().sleepers.fetch_add(1, std::memory_order_seq_cst);
            std::atomic_thread_fence(std::memory_order_seq_cst);  // see Block::ring_bell
            if (!move_locked() && !done()) sleep_on(block.me().bell, bell, until - now);
            block.me().sleepers.fetch_sub(1, std::memory_order_relaxed);
            if (done()) return;
            idle_since = 0;
        }
    }

    void run_thread() {
        while (!closing.load()) {
            const u32 seen = kick.load();
            if (pending.count.load() == 0 || drivers.load() > 0) {
                sleep_on(kick, seen, -1);
                continue;
            }
            const auto relieved = [this] { return closing.load() || pending.count.load() == 0 || drivers.load() > 0; };
            drive(relieved, 1000000000, 0);  // it would take its core from whoever computes
        }
    }

    void start_thread() {
        if (!threaded.exchange(true)) thread = std::thread([this] { run_thread(); });
        kick.fetch_add(1);
        wake(kick);
    }

    void start(Op* op) {
        pending.count.fetch_add(1);
        if (op->mine.kind == SEND || op->mine.kind == RECEIVE) transfers.add(op);
        else collectives.add(op);
    }

    // Start it, and have the thread see to it unless that is done at once.
    void start_alone(Op* op) {
        {
            std::lock_guard<std::mutex> hold(lock);
            start(op);
            move();
        }
        if (op->state.load() == PENDING) drivers.load() ? block.ring_bell(block.rank) : start_thread();
    }

    int wait(Op* op, i64 limit_ns) {
        drivers.fetch_add(1);
        drive([op] { return op->state.load(std::memory_order_acquire) != PENDING; }, limit_ns, AWAKE_NS);
        const int state = op->state.load(std::memory_order_acquire);
        // Whoever is told PENDING comes back.
        if (drivers.fetch_sub(1) == 1 && state != PENDING && pending.count.load() > 0) start_thread();
        return state;
    }

    void waits_for(Op* op, unsigned char* waits) {
        std::lock_guard<std::mutex> hold(lock);
        const bool ended = op->state.load() != PENDING, transfer = op->mine.kind == SEND || op->mine.kind == RECEIVE;
        for (int q = 0; q < block.n; q++) {
            const bool peer = q != block.rank && (op->mine.root < 0 || q == op->mine.root);
            waits[q] = !ended && (transfer ? peer : collectives.waits_for(q));
        }
    }

    void leave(int status) {
        {
            std::lock_guard<std::mutex> hold(lock);
            int32_t present = 0;
            block.me().status.compare_exchange_strong(present, status);
            collectives.cancel();
            transfers.cancel();
        }
        closing.store(true);
        kick.fetch_add(1), wake(kick);
        block.me().bell.fetch_add(1), wake(block.me().bell);
        if (thread.joinable()) thread.join();
    }
};

}  // namespace shm

extern "C" {

using namespace shm;

struct Parts {  // arrays of a part a rank, each or none
    const char* const* ins;
    char* const* outs;
    const i64 *in_sizes, *out_sizes;
};

i64 shm_size(int n, i64 chunk, i64 ring) { return Block::size(n, chunk, ring); }

// `chunk` and `ring`: bytes, multiples of 64 x n; `small`: of the largest all-reduce of one phase. All ranks give the same.
// Null where the block can't be mapped.
Group* shm_open_group(int fd, int rank, int n, i64 chunk, i64 ring, i64 small) {
    void* base = mmap(nullptr, size_t(Block::size(n, chunk, ring)), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) return nullptr;
    return new Group(Block{rank, n, chunk, ring, static_cast<char*>(base)}, small);
}

// Begin an operation. `reduction` is the tag of a transfer, `root` its peer (-1: any). `bytes` of one part. With
// `limit_ns` the caller also waits so long; then an operation that is done is null. Otherwise a thread moves it on.
Op* shm_start(Group* g, int kind, int dtype, int reduction, int root, i64 bytes, const char* in, char* out, const Parts* parts,
              i64 limit_ns) {
    Op* op = new Op();
    op->mine = Header{0, bytes, 1, kind, dtype, reduction, root};
    op->in = in, op->out = out;
    const int n = g->block.n;
    if (parts) {
        if (parts->ins) op->ins.assign(parts->ins, parts->ins + n);
        if (parts->outs) op->outs.assign(parts->outs, parts->outs + n);
        if (parts->in_sizes) op->in_sizes.assign(parts->in_sizes, parts->in_sizes + n);
        if (parts->out_sizes) op->out_sizes.assign(parts->out_sizes, parts->out_sizes + n);
    }
    if (!limit_ns) {
        g->start_alone(op);
        return op;
    }
    {
        std::lock_guard<std::mutex> hold(g->lock);
        g->start(op);
    }
    if (g->wait(op, limit_ns) != DONE) return op;
    delete op;
    return nullptr;
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
void shm_waits_for(Group* g, Op* op, unsigned char* waits) { g->waits_for(op, waits); }

int shm_status(Group* g, int q) { return g->block.members[q].status.load(); }

// Say how this rank left, end its operations, which touch no memory after this returns.
void shm_leave(Group* g, int status) { g->leave(status); }

// After `shm_leave`, when no thread is inside.
void shm_close(Group* g) {
    munmap(g->block.base, size_t(g->block.length()));
    delete g;
}

}  // extern "C"
