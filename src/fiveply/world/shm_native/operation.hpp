// One collective or transfer on its way: what was asked for, and how far it has come.
//
// What it does not know: who moves it on.

#pragma once

#include <vector>

#include "block.hpp"

namespace shm {

enum State : int32_t { PENDING, DONE, MISMATCH, CANCELLED };

struct Op {
    std::atomic<int32_t> state{PENDING};
    int32_t blamed = -1;  // group rank of the mismatch, and of a receive's source
    Header mine{}, theirs{};
    const char* in = nullptr;
    char* out = nullptr;
    std::vector<const char*> ins;  // part by part, where they don't follow each other
    std::vector<char*> outs;
    std::vector<i64> in_sizes, out_sizes;  // where parts differ

    // of a collective: the step it began at, steps published, reduced and ended, and where a step's bytes stand in a slot
    i64 first = -1, written = 0, folded = 0, finished = 0;
    i64 unit = 0, stride = 0;
    bool shared = false;  // an all-reduce in two phases
    bool checked = false;

    // of a transfer
    i64 moved = 0;  // bytes
    bool opened = false;

    const char* part_in(int q) const { return ins.empty() ? in + q * mine.bytes : ins[q]; }
    char* part_out(int q) const { return outs.empty() ? out + q * mine.bytes : outs[q]; }
    i64 in_size(int q) const { return in_sizes.empty() ? mine.bytes : in_sizes[q]; }
    i64 out_size(int q) const { return out_sizes.empty() ? mine.bytes : out_sizes[q]; }
};

// How many have begun and not ended, and how an operation ends: after this its owner may free it at any moment.
struct Pending {
    std::atomic<int> count{0};

    void end(Op* op, State state) {
        count.fetch_sub(1, std::memory_order_relaxed);
        op->state.store(state, std::memory_order_release);
    }
};

}  // namespace shm
