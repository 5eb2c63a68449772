// Collectives in their order, one at a time: the state machine of the first, which `move` takes as far as peers allow.
//
// Notable:
// - A collective is cut into steps. In step k every rank publishes into its slot k % DEPTH, so a rank can be up to DEPTH
//   steps ahead of the slowest reader.
// - A large all-reduce shares the work: each rank reduces its part of every step and the others fetch it. A small one
//   has every rank reduce everything.
//
// What it does not know: threads and locks (its caller holds one), time.

#pragma once

#include <algorithm>
#include <deque>

#include "operation.hpp"
#include "reductions.hpp"

namespace shm {

class Collectives {
   public:
    // `small`: bytes of the largest all-reduce of one phase.
    Collectives(Block& block, Pending& pending, i64 small)
        : b(block), n(block.n), rank(block.rank), small(small), pending(pending), sources(block.n) {}

    void add(Op* op) {
        op->mine.sequence = sequence++;
        queue.push_back(op);
    }

    bool move() {
        if (queue.empty()) return false;
        Op& op = *queue.front();
        if (op.first < 0) begin(op);
        bool moved = false;
        if (op.written < op.mine.steps && may_write(op)) write(op), moved = true;
        const i64 next = op.shared ? op.folded : op.finished;
        if (next < op.written && arrived(op, op.first + next)) {
            if (!agreed(op)) {
                queue.pop_front();
                pending.end(&op, MISMATCH);
                return true;
            }
            op.shared ? fold_part(op) : read(op);
            moved = true;
        }
        if (op.shared && op.finished < op.folded && folded_by_all(op)) read(op), moved = true;
        if (op.finished == op.mine.steps) {
            step = op.first + op.mine.steps;
            queue.pop_front();
            pending.end(&op, DONE);
        }
        return moved;
    }

    // Whether rank q must do something before the first operation, which all others wait for, can go on.
    bool waits_for(int q) const {
        if (queue.empty() || q == rank) return false;
        const Op& op = *queue.front();
        const Member& m = b.members[q];
        bool full = op.written < op.mine.steps && m.done.value.load() < op.first + op.written - DEPTH + 1;
        bool late = reads(op, q) && m.wrote.value.load() <= op.first + (op.shared ? op.folded : op.finished);
        bool unfolded = op.shared && op.finished < op.folded && m.reduced.value.load() <= op.first + op.finished;
        return full || late || unfolded;
    }

    void cancel() {
        for (Op* op : queue) pending.end(op, CANCELLED);
        queue.clear();
    }

   private:
    Block& b;
    const int n, rank;
    const i64 small;
    Pending& pending;
    std::deque<Op*> queue;
    i64 sequence = 0, step = 0;
    std::vector<const char*> sources;

    static bool scattered(const Op& op) {
        return op.mine.kind == REDUCE_SCATTER || op.mine.kind == SCATTER || op.mine.kind == ALL_TO_ALL;
    }
    // Parts of an all-to-all differ in size, so each begins with its own.
    static i64 lead(const Op& op) { return op.mine.kind == ALL_TO_ALL ? 64 : 0; }
    static bool rooted(const Op& op) { return op.mine.kind == BROADCAST || op.mine.kind == SCATTER; }  // all read the root alone
    static bool funnels(const Op& op) { return op.mine.kind == REDUCE || op.mine.kind == GATHER; }     // the root alone reads
    bool reads(const Op& op, int q) const {
        if (q == rank) return false;
        return rooted(op) ? q == op.mine.root : !funnels(op) || rank == op.mine.root;
    }
    static i64 within(const Op& op, i64 whole, i64 low) { return std::clamp(whole - low, i64(0), op.unit); }

    void begin(Op& op) {
        op.first = step;
        if (op.mine.kind == BARRIER) op.mine.bytes = 0;
        op.stride = scattered(op) ? b.chunk / n & ~i64(63) : 0;  // from one rank's part of a slot to the next
        op.unit = op.stride ? op.stride - lead(op) : b.chunk;
        op.shared = op.mine.kind == ALL_REDUCE && op.mine.bytes > small;
        i64 longest = op.mine.bytes;
        for (i64 size : op.in_sizes) longest = std::max(longest, size);
        op.mine.steps = std::max(i64(1), (longest + op.unit - 1) / op.unit);
    }

    bool may_write(const Op& op) const {
        const i64 least = op.first + op.written - DEPTH + 1;
        for (int q = 0; q < n; q++)
            if (b.members[q].done.value.load(std::memory_order_acquire) < least) return false;
        return true;
    }

    void write(Op& op) {
        const i64 at = op.first + op.written, low = op.written * op.unit;
        char* to = b.slot(rank, at);
        const int kind = op.mine.kind;
        if (scattered(op)) {
            for (int q = 0; q < n; q++)
                if (q != rank && (kind != SCATTER || rank == op.mine.root)) {
                    if (lead(op)) *reinterpret_cast<i64*>(to + q * op.stride) = op.in_size(q);
                    copy(to + q * op.stride + lead(op), op.part_in(q) + low, within(op, op.in_size(q), low));
                }
        } else if (kind != BROADCAST || rank == op.mine.root) {
            bool unread = funnels(op) && rank == op.mine.root;
            if (!unread) copy(to, op.in + low, within(op, op.mine.bytes, low));
        }
        b.me().headers[at % DEPTH] = op.mine;
        b.me().wrote.value.store(at + 1, std::memory_order_release);
        op.written++;
    }

    bool arrived(const Op& op, i64 at) const {
        for (int q = 0; q < n; q++)
            if (reads(op, q) && b.members[q].wrote.value.load(std::memory_order_acquire) <= at) return false;
        return true;
    }

    bool agreed(Op& op) {  // once, when the first step of all sources is there
        if (op.checked) return true;
        for (int q = 0; q < n; q++) {
            if (!reads(op, q)) continue;
            const Header& theirs = b.members[q].headers[op.first % DEPTH];
            bool same = op.mine.agrees(theirs) && op.mine.sequence == theirs.sequence;
            i64 bytes = theirs.bytes;
            if (same && op.mine.kind == ALL_TO_ALL) {
                bytes = *reinterpret_cast<i64*>(b.slot(q, op.first) + rank * op.stride);
                same = bytes == op.out_size(q);
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

    // Of `bytes`, what rank q reduces: `size` from `low` on.
    void part(i64 bytes, int q, i64& low, i64& size) const {
        const i64 each = padded((bytes + n - 1) / n);
        low = std::min(q * each, bytes);
        size = std::min(each, bytes - low);
    }

    void fold_part(Op& op) {
        const i64 at = op.first + op.folded, bytes = within(op, op.mine.bytes, op.folded * op.unit);
        i64 low, size;
        part(bytes, rank, low, size);
        for (int q = 0; q < n; q++) sources[q] = b.slot(q, at) + low;
        reduce(op.mine.dtype, op.mine.reduction, b.slot(rank, at) + low, sources, size);  // nobody else reads this part of mine
        b.me().reduced.value.store(at + 1, std::memory_order_release);
        op.folded++;
    }

    bool folded_by_all(const Op& op) const {
        for (int q = 0; q < n; q++)
            if (b.members[q].reduced.value.load(std::memory_order_acquire) <= op.first + op.finished) return false;
        return true;
    }

    void read(Op& op) {
        const i64 at = op.first + op.finished, low = op.finished * op.unit;
        const i64 bytes = within(op, op.mine.bytes, low);
        const int kind = op.mine.kind;
        const i64 mine = op.stride ? rank * op.stride + lead(op) : 0;  // my part of everyone's slot
        if (op.shared) {
            for (int q = 0; q < n; q++) {
                i64 from, size;
                part(bytes, q, from, size);
                copy(op.out + low + from, b.slot(q, at) + from, size);
            }
        } else if (kind == ALL_REDUCE || kind == REDUCE_SCATTER || (kind == REDUCE && rank == op.mine.root)) {
            for (int q = 0; q < n; q++)
                sources[q] = q != rank ? b.slot(q, at) + mine : op.part_in(kind == REDUCE_SCATTER ? q : 0) + low;
            reduce(op.mine.dtype, op.mine.reduction, op.out + low, sources, bytes);
        } else if (kind == ALL_GATHER || kind == ALL_TO_ALL || (kind == GATHER && rank == op.mine.root)) {
            for (int q = 0; q < n; q++) {
                const char* from = q != rank ? b.slot(q, at) + mine : (kind == ALL_TO_ALL ? op.part_in(q) : op.in) + low;
                copy(op.part_out(q) + low, from, within(op, op.out_size(q), low));
            }
        } else if (kind == SCATTER && rank == op.mine.root) {
            copy(op.out + low, op.part_in(rank) + low, bytes);
        } else if (rooted(op) && rank != op.mine.root) {
            copy(op.out + low, b.slot(op.mine.root, at) + mine, bytes);
        }
        b.me().done.value.store(at + 1, std::memory_order_release);
        op.finished++;
    }
};

}  // namespace shm
