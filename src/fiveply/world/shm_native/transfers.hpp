// Sends and receives: each ordered pair of ranks has a ring of bytes, which moves independently of all others.
//
// Notable: a message is a header and its bytes, padded to 64. Messages of one pair keep their order; a receive takes the
// next message if its tag is right, and a message whose receive has not been posted stays in the ring.
//
// What it does not know: threads and locks (its caller holds one), time.

#pragma once

#include <algorithm>
#include <deque>

#include "operation.hpp"

namespace shm {

class Transfers {
   public:
    Transfers(Block& block, Pending& pending)
        : b(block), rank(block.rank), pending(pending), sends(b.n), receives(b.n), sent(b.n), received(b.n) {}

    // The peer is the header's `root` (-1: any, of a receive), the tag its `reduction`.
    void add(Op* op) {
        const int peer = op->mine.root;
        if (op->mine.kind == SEND) {
            op->mine.sequence = sent[peer]++;
            sends[peer].push_back(op);
        } else {
            if (peer >= 0) op->mine.sequence = received[peer]++;
            (peer < 0 ? anyone : receives[peer]).push_back(op);
        }
    }

    // To and from rank q, as far as it goes now.
    bool move(int q) {
        const bool sent = move_send(q), received = move_receive(q);
        return sent || received;
    }

    void cancel() {
        auto end = [this](std::deque<Op*>& queue) {
            for (Op* op : queue) pending.end(op, CANCELLED);
            queue.clear();
        };
        end(anyone);
        for (int q = 0; q < b.n; q++) end(sends[q]), end(receives[q]);
    }

   private:
    Block& b;
    const int rank;
    Pending& pending;
    std::deque<Op*> anyone;
    std::vector<std::deque<Op*>> sends, receives;  // by peer
    std::vector<i64> sent, received;               // sequence numbers

    void put(char* stream, i64 at, const char* from, i64 bytes) const {
        const i64 place = at % b.ring_bytes, straight = std::min(bytes, b.ring_bytes - place);
        copy(stream + place, from, straight);
        copy(stream, from + straight, bytes - straight);
    }
    void take(const char* stream, i64 at, char* to, i64 bytes) const {
        const i64 place = at % b.ring_bytes, straight = std::min(bytes, b.ring_bytes - place);
        copy(to, stream + place, straight);
        copy(to + straight, stream, bytes - straight);
    }

    bool move_send(int q) {
        if (sends[q].empty()) return false;
        Op& op = *sends[q].front();
        Ring& way = b.ring(rank, q);
        i64 head = way.head.value.load(std::memory_order_relaxed);
        const i64 start = head;
        i64 space = b.ring_bytes - (head - way.tail.value.load(std::memory_order_acquire));
        if (!op.opened && space >= i64(sizeof(Header))) {
            put(b.stream(rank, q), head, reinterpret_cast<const char*>(&op.mine), sizeof(Header));
            head += sizeof(Header), space -= sizeof(Header);
            op.opened = true;
        }
        // A quarter at most: the peer takes one part while this rank puts the next.
        const i64 bytes = std::min({op.mine.bytes - op.moved, space, b.ring_bytes / 4 & ~i64(63)});
        if (op.opened && bytes > 0) {
            put(b.stream(rank, q), head, op.in + op.moved, bytes);
            op.moved += bytes, head += padded(bytes);  // only the last part is no multiple of 64
        }
        if (head == start) return false;
        way.head.value.store(head, std::memory_order_release);
        if (op.opened && op.moved == op.mine.bytes) {
            sends[q].pop_front();
            pending.end(&op, DONE);
        }
        return true;
    }

    // Take the receive that was posted first for this sender and tag out of its queue; null if there is none.
    Op* receiver(int q, const Header& header) {
        for (std::deque<Op*>* queue : {&receives[q], &anyone})
            for (auto at = queue->begin(); at != queue->end(); ++at)
                if ((*at)->mine.reduction == header.reduction) {
                    Op* op = *at;
                    queue->erase(at);
                    return op;
                }
        return nullptr;
    }

    bool move_receive(int q) {
        if (receives[q].empty() && anyone.empty()) return false;
        Ring& way = b.ring(q, rank);
        i64 tail = way.tail.value.load(std::memory_order_relaxed);
        i64 ready = way.head.value.load(std::memory_order_acquire) - tail;
        if (ready == 0) return false;
        Op* op = receives[q].empty() || !receives[q].front()->opened ? nullptr : receives[q].front();
        if (!op) {
            Header header;
            take(b.stream(q, rank), tail, reinterpret_cast<char*>(&header), sizeof(Header));
            if (!(op = receiver(q, header))) return false;
            op->blamed = q;
            if (header.bytes != op->mine.bytes || header.dtype != op->mine.dtype) {
                op->theirs = header;
                pending.end(op, MISMATCH);
                return true;
            }
            receives[q].push_front(op);  // it takes the whole message before any other looks at the ring
            op->opened = true;
            tail += sizeof(Header), ready -= sizeof(Header);
        }
        const i64 bytes = std::min(op->mine.bytes - op->moved, ready);
        take(b.stream(q, rank), tail, op->out + op->moved, bytes);
        op->moved += bytes;
        way.tail.value.store(tail + padded(bytes), std::memory_order_release);
        if (op->moved == op->mine.bytes) {
            receives[q].pop_front();
            pending.end(op, DONE);
        }
        return true;
    }
};

}  // namespace shm
