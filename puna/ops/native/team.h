// Threads that share one piece of work: they wait a moment by spinning, then sleep, so an idle team costs nothing.
#pragma once
#include <immintrin.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

// About 20 us: the pause between two calls of one forward. More would steal a core from torch's own threads.
constexpr int SPINS = 400;

inline void wait_while(const std::atomic<uint32_t>& value, uint32_t old) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (value.load(std::memory_order_acquire) != old) return;
        _mm_pause();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old);
}

// Memory of one thread for one call; it grows to what the largest call took and stays.
class Scratch {
    struct Block {
        char* data;
        size_t size;
    };
    std::vector<Block> blocks;
    size_t used = 0;

public:
    template <typename T> T* take(int64_t count) {
        size_t bytes = (size_t(count) * sizeof(T) + 127) / 64 * 64;  // a vector's width of slack behind the last
        if (blocks.empty() || used + bytes > blocks.back().size) {
            size_t size = std::max<size_t>(bytes, blocks.empty() ? 1 << 18 : 2 * blocks.back().size);
            blocks.push_back({static_cast<char*>(::operator new(size, std::align_val_t(64))), size});
            used = 0;
        }
        used += bytes;
        return reinterpret_cast<T*>(blocks.back().data + used - bytes);
    }
    void reset() {
        while (blocks.size() > 1) {
            ::operator delete(blocks.front().data, std::align_val_t(64));
            blocks.erase(blocks.begin());
        }
        used = 0;
    }
};

class Team {
    std::vector<std::thread> helpers;
    std::vector<std::unique_ptr<Scratch>> scratches;
    Scratch shared;
    std::atomic<uint32_t> started{0}, finished{0}, arrived{0}, passed{0}, next{0};
    std::atomic<bool> failed{false};
    void (*work)(Team&, int, void*) = nullptr;
    void* argument = nullptr;
    int active = 1;
    int most = INT_MAX;  // threads this process can have
    std::mutex busy;

    void help(int thread, uint32_t seen) {
        for (;;) {
            wait_while(started, seen);
            seen = started.load(std::memory_order_acquire);
            if (thread < active) work(*this, thread, argument);
            // Also the helpers without work answer: none may sleep through a start and see the next one's work.
            if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 == helpers.size()) finished.notify_one();
        }
    }

    // How many threads there are for `threads` that are wanted: all of them, unless the system gives no more.
    int grow(int threads) {
        while (int(scratches.size()) < threads) scratches.push_back(std::make_unique<Scratch>());
        try {
            while (int(helpers.size()) < std::min(threads, most) - 1) {
                int thread = int(helpers.size()) + 1;
                uint32_t seen = started.load();
                helpers.emplace_back([this, thread, seen] { help(thread, seen); });
            }
        } catch (const std::exception&) {
            most = int(helpers.size()) + 1;
        }
        return std::min(threads, most);
    }

    // An exception that left a thread would end the process; and nobody may wait for this one at a barrier.
    template <typename Part> void attempt(Part& part, int thread) {
        try {
            part(thread);
        } catch (const std::exception&) {
            failed = true;
            passed.fetch_add(1, std::memory_order_acq_rel);
            passed.notify_all();
        }
    }

public:
    // Calls part(thread) in up to `threads` threads, this one among them. One call at a time: others wait for it.
    // Throws std::bad_alloc where memory ran out in any of them.
    template <typename Part> void run(int threads, Part&& part) {
        std::lock_guard<std::mutex> alone(busy);
        share_out(threads, part);
    }

    // The same with memory that all threads see, `bytes` of it: part(thread, memory).
    template <typename Part> void run_with(int threads, int64_t bytes, Part&& part) {
        std::lock_guard<std::mutex> alone(busy);
        shared.reset();
        char* memory = shared.take<char>(bytes);
        share_out(threads, [&](int thread) { part(thread, memory); });
    }

private:
    template <typename Part> void share_out(int threads, Part&& part) {
        active = grow(threads);
        next = 0;
        if (active == 1) return part(0);
        work = [](Team& team, int thread, void* given) {
            team.attempt(*static_cast<std::remove_reference_t<Part>*>(given), thread);
        };
        argument = &part;
        failed = false;
        arrived = finished = 0;
        started.fetch_add(1, std::memory_order_acq_rel);
        started.notify_all();
        attempt(part, 0);
        for (uint32_t done; (done = finished.load(std::memory_order_acquire)) < helpers.size();)
            wait_while(finished, done);
        if (failed) throw std::bad_alloc();
    }

public:
    // Every thread gets here before one goes on; or, where one has failed, none does.
    void barrier() {
        if (active == 1) {
            next = 0;
            return;
        }
        uint32_t round = passed.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(active)) {
            arrived = 0;
            next = 0;
            passed.fetch_add(1, std::memory_order_acq_rel);
            passed.notify_all();
        } else if (!failed) {  // read after `round`: whoever fails later wakes this one
            wait_while(passed, round);
        }
        if (failed) throw std::bad_alloc();
    }

    // Hands [0, count) out in pieces: whoever is free takes the next, since a neighbour may slow one thread down.
    template <typename Piece> void share(int64_t count, int64_t step, Piece&& piece) {
        for (;;) {
            int64_t from = int64_t(next.fetch_add(1, std::memory_order_relaxed)) * step;
            if (from >= count) return;
            piece(from, std::min(from + step, count));
        }
    }

    Scratch& scratch(int thread) {
        scratches[thread]->reset();
        return *scratches[thread];
    }
};

// One for the process. A forked child has none of the parent's threads, so it begins with a new one.
inline std::atomic<Team*> the_team{nullptr};

inline Team& team() {
    static std::once_flag once;
    std::call_once(once, [] {
        the_team = new Team;
        pthread_atfork(nullptr, nullptr, [] { the_team = new Team; });
    });
    return *the_team.load();
}
