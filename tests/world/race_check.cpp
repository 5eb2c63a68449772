// Ranks as threads of one process over one block, for the thread sanitizer: it finds what is read without an acquire that
// pairs with the writer's release, which x86 hides and ARM does not.

#include <cstdio>
#include <cstdlib>

#include "group.cpp"

static const i64 CHUNK = 3072, RING = 3072, SMALL = 1024;

static void expect(bool right, const char* what) {
    if (right) return;
    fprintf(stderr, "wrong: %s\n", what);
    exit(1);
}

static void collective(Group* g, int kind, std::vector<float>& in, std::vector<float>& out, i64 part, int root = 0) {
    Op* op = shm_start(g, kind, F32, SUM, root, part * 4, reinterpret_cast<char*>(in.data()),
                       reinterpret_cast<char*>(out.data()), nullptr, 10000000000);
    expect(!op, "a collective did not end");
}

// What rank q gives as element i of round r.
static float value(int q, i64 i, int r) { return float((i * 7 + q * 3 + r) % 11); }

static void rank(Group* g, int me, int n) {
    for (int r = 0; r < 20; r++)
        for (i64 size : {1, 100, 4000}) {
            std::vector<float> in(size * n), out(size * n), sum(size);
            for (i64 i = 0; i < size * n; i++) in[i] = value(me, i, r);
            auto total = [&](i64 i) {
                float x = 0;
                for (int q = 0; q < n; q++) x += value(q, i, r);
                return x;
            };
            // Underway while the others are done: a transfer to each neighbour, and a reduction nobody waits for yet.
            std::vector<float> around(size), last(size);
            const int to = (me + 1) % n, from = (me + n - 1) % n;
            Op* send = shm_start(g, SEND, F32, 5, to, size * 4, reinterpret_cast<char*>(in.data()), nullptr, nullptr, 0);
            Op* receive = shm_start(g, RECEIVE, F32, 5, from, size * 4, nullptr, reinterpret_cast<char*>(around.data()), nullptr, 0);
            Op* later = shm_start(g, ALL_REDUCE, F32, SUM, 0, size * 4, reinterpret_cast<char*>(in.data()),
                                  reinterpret_cast<char*>(last.data()), nullptr, 0);
            collective(g, ALL_REDUCE, in, out, size);
            for (i64 i = 0; i < size; i++) expect(out[i] == total(i), "all-reduce");
            collective(g, ALL_GATHER, in, out, size);
            for (i64 i = 0; i < size * n; i++) expect(out[i] == value(int(i / size), i % size, r), "all-gather");
            collective(g, REDUCE_SCATTER, in, sum, size);
            for (i64 i = 0; i < size; i++) expect(sum[i] == total(me * size + i), "reduce-scatter");
            collective(g, ALL_TO_ALL, in, out, size);
            for (i64 i = 0; i < size * n; i++) expect(out[i] == value(int(i / size), me * size + i % size, r), "all-to-all");
            collective(g, BROADCAST, in, out, size, r % n);
            for (i64 i = 0; i < size && me != r % n; i++) expect(out[i] == value(r % n, i, r), "broadcast");
            for (Op* op : {send, receive, later}) {
                expect(shm_wait(g, op, 10000000000) == DONE, "an operation did not end");
                shm_free(op);
            }
            for (i64 i = 0; i < size; i++) expect(around[i] == value(from, i, r) && last[i] == total(i), "what was underway");
        }
}

int main() {
    for (int n : {2, 3}) {
        const i64 length = shm_size(n, CHUNK, RING);
        char* base = static_cast<char*>(mmap(nullptr, size_t(length), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
        std::vector<Group*> groups;
        std::vector<std::thread> ranks;
        for (int q = 0; q < n; q++) groups.push_back(new Group(Block{q, n, CHUNK, RING, base}, SMALL));
        for (int q = 0; q < n; q++) ranks.emplace_back(rank, groups[q], q, n);
        for (auto& thread : ranks) thread.join();
        for (Group* g : groups) g->leave(1), delete g;
        munmap(base, size_t(length));
    }
    puts("ok");
}
