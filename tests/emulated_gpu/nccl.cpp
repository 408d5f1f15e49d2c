// NCCL of the emulated device, between processes and between threads of one: messages through sockets of the machine.
//
// Calls are work of the emulated stream and can be captured. Each message says which call it is part of, so that ranks
// that call different things are told apart from ranks that wait.
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "device.h"

extern "C" int cudaGetDevice(int*);

namespace {

using Clock = std::chrono::steady_clock;
constexpr auto PATIENCE = std::chrono::minutes(5);  // NCCL waits forever

enum Result { SUCCESS = 0, UNHANDLED = 1, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6 };
enum Kind { SEND, RECEIVE, ALL_REDUCE, ALL_GATHER, BROADCAST, REDUCE_SCATTER };
const char* const NAMES[] = {"ncclSend", "ncclRecv", "ncclAllReduce", "ncclAllGather", "ncclBroadcast",
                             "ncclReduceScatter"};
const size_t SIZES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8};  // of a number, by ncclDataType_t
constexpr int FLOAT = 7, DOUBLE = 8, SUM = 0;

struct Id {
    char bytes[128];
};

struct Communicator {
    int rank = 0, size = 1, device = 0;
    std::vector<int> peers;  // sockets, by rank; -1 for itself
    std::atomic<int> error{SUCCESS};
    std::atomic<bool> aborted{false};
    ~Communicator() {
        for (int peer : peers)
            if (peer >= 0) close(peer);
    }
};

struct Call {
    Kind kind;
    const char* from;
    char* to;
    size_t count;
    int type, root = -1;  // or the peer of a message between two
    size_t bytes() const { return count * SIZES[type]; }
};

// What goes ahead of each message: the call that it is part of, as its sender made it.
struct Head {
    int kind, type, root, unused;
    uint64_t count;
};

struct Work {
    std::shared_ptr<Communicator> with;
    std::vector<Call> calls;
};

std::mutex state;
std::map<void*, std::shared_ptr<Communicator>> communicators;
thread_local int group = 0;
thread_local std::map<std::pair<void*, void*>, std::vector<Call>> grouped;  // by communicator and stream

int fault(int result, const std::string& sentence) {
    emulated_fault(sentence.c_str());
    return result;
}

std::shared_ptr<Communicator> get(void* handle) {
    std::lock_guard<std::mutex> guard(state);
    auto found = communicators.find(handle);
    return found == communicators.end() ? nullptr : found->second;
}

// --- connections ----------------------------------------------------------------------------------------------------

// An address without a file, of a rank of the communicator with this id.
socklen_t address(const Id& id, int rank, sockaddr_un* made) {
    std::memset(made, 0, sizeof *made);
    made->sun_family = AF_UNIX;
    const std::string name = std::string("emulated NCCL ") + id.bytes + " " + std::to_string(rank);
    std::memcpy(made->sun_path + 1, name.data(), name.size());
    return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

bool all_of(int peer, void* data, size_t bytes, bool out) {
    for (char* at = static_cast<char*>(data); bytes;) {
        const ssize_t moved = out ? send(peer, at, bytes, MSG_NOSIGNAL) : recv(peer, at, bytes, 0);
        if (moved < 0 && errno == EINTR) continue;
        if (moved <= 0) return false;
        at += moved;
        bytes -= moved;
    }
    return true;
}

// A socket to each other rank: this one calls those below it and is called by those above.
bool connect_all(Communicator& with, const Id& id) {
    const auto end = Clock::now() + PATIENCE;
    sockaddr_un name;
    const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    socklen_t length = address(id, with.rank, &name);
    with.peers.assign(with.size, -1);
    bool well = !bind(listener, reinterpret_cast<sockaddr*>(&name), length) && !listen(listener, with.size);
    for (int rank = 0; well && rank < with.rank; rank++) {
        length = address(id, rank, &name);
        const int peer = with.peers[rank] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        while (connect(peer, reinterpret_cast<sockaddr*>(&name), length) && well) {
            well = Clock::now() < end;
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
        }
        well = well && all_of(peer, &with.rank, sizeof with.rank, true);
    }
    for (int above = with.rank + 1; well && above < with.size; above++) {
        pollfd asked{listener, POLLIN, 0};
        int rank = 0;
        well = poll(&asked, 1, std::chrono::milliseconds(PATIENCE).count()) > 0;
        const int peer = well ? accept4(listener, nullptr, nullptr, SOCK_CLOEXEC) : -1;
        well = well && all_of(peer, &rank, sizeof rank, false);
        if (well) with.peers[rank] = peer;
    }
    close(listener);
    return well;
}

// Whether all ranks gave the same size, and each a device of its own.
int compare(Communicator& with) {
    for (int peer : with.peers) {
        int own[2] = {with.size, with.device}, others[2];
        if (peer >= 0 && (!all_of(peer, own, sizeof own, true) || !all_of(peer, others, sizeof others, false)))
            return SYSTEM_ERROR;
        if (peer >= 0 && (others[0] != own[0] || others[1] == own[1])) {
            fprintf(stderr, "emulated GPU: two ranks of a communicator are on device %d, or differ in its size\n",
                    with.device);
            return INVALID_USAGE;
        }
    }
    return SUCCESS;
}

// --- messages -------------------------------------------------------------------------------------------------------

struct Piece {
    char* at;
    size_t left;
};

// Sends and receives until all of it is done, in any order between ranks. False if the communicator has failed.
bool exchange(Communicator& with, std::vector<std::vector<Piece>> out, std::vector<std::vector<Piece>> in,
              const std::string& what) {
    const auto end = Clock::now() + PATIENCE;
    std::vector<size_t> sent(with.size), received(with.size);
    for (;;) {
        std::vector<pollfd> asked;
        std::vector<int> of;
        for (int rank = 0; rank < with.size; rank++) {
            auto skip_empty = [](std::vector<Piece>& pieces, size_t& next) {
                while (next < pieces.size() && !pieces[next].left) next++;
                return next < pieces.size();
            };
            const short events = (skip_empty(out[rank], sent[rank]) ? POLLOUT : 0) |
                                 (skip_empty(in[rank], received[rank]) ? POLLIN : 0);
            if (!events || with.peers[rank] < 0) continue;
            asked.push_back({with.peers[rank], events, 0});
            of.push_back(rank);
        }
        if (asked.empty()) return true;
        if (with.aborted || with.error) return false;
        if (Clock::now() > end) {
            with.error = REMOTE_ERROR;
            fault(0, what + " on rank " + std::to_string(with.rank) + " has waited for rank " + std::to_string(of[0]) +
                         " for minutes");
            return false;
        }
        poll(asked.data(), asked.size(), 100);
        for (size_t i = 0; i < asked.size(); i++) {
            const int rank = of[i];
            auto move = [&](Piece& piece, bool outwards) {
                const ssize_t moved = outwards ? send(asked[i].fd, piece.at, piece.left, MSG_NOSIGNAL | MSG_DONTWAIT)
                                               : recv(asked[i].fd, piece.at, piece.left, MSG_DONTWAIT);
                if (moved > 0) {
                    piece.at += moved;
                    piece.left -= moved;
                } else if (moved == 0 || (errno != EAGAIN && errno != EINTR)) {
                    with.error = REMOTE_ERROR;  // it is gone
                }
            };
            if (asked[i].revents & POLLOUT) move(out[rank][sent[rank]], true);
            if (asked[i].revents & (POLLIN | POLLHUP) && (asked[i].events & POLLIN))
                move(in[rank][received[rank]], false);
        }
    }
}

bool in_memory(const Call& call, const char* what, const void* at, size_t bytes) {
    uint64_t first = 0, last = 0;
    const auto place = reinterpret_cast<uint64_t>(at);
    if (!bytes || (emulated_range(place, &first, &last) && bytes <= last - place)) return true;
    return fault(0, std::string(NAMES[call.kind]) + ": the buffer to " + what + " is not " + std::to_string(bytes) +
                        " bytes of device memory");
}

// Compares what was called here with what was called there; false, and a fault, if these are not the same.
bool agree(Communicator& with, const Call& call, Head theirs, int rank) {
    const int expected = call.kind == RECEIVE ? SEND : call.kind;
    if (theirs.kind == expected && theirs.type == call.type && theirs.count == call.count &&
        (call.kind <= RECEIVE || theirs.root == call.root))
        return true;
    with.error = INVALID_USAGE;
    for (int peer : with.peers) shutdown(peer, SHUT_RDWR);
    auto words = [](int kind, uint64_t count, int type) {
        return std::string(NAMES[kind]) + " of " + std::to_string(count) + " numbers of type " + std::to_string(type);
    };
    return fault(0, "rank " + std::to_string(with.rank) + " calls " + words(call.kind, call.count, call.type) +
                        ", rank " + std::to_string(rank) + " " + words(theirs.kind, theirs.count, theirs.type));
}

Head head_of(const Call& call) { return {call.kind, call.type, call.root, 0, call.count}; }

// Messages between two, all of a group at once.
void run_messages(Communicator& with, const std::vector<Call>& calls) {
    std::vector<std::vector<Piece>> out(with.size), in(with.size);
    std::vector<Head> heads(calls.size());
    std::vector<const Call*> to_self, from_self;
    for (size_t i = 0; i < calls.size(); i++) {
        const Call& call = calls[i];
        const bool outwards = call.kind == SEND;
        if (!in_memory(call, outwards ? "send" : "receive to", outwards ? call.from : call.to, call.bytes())) return;
        if (call.root == with.rank) {
            (outwards ? to_self : from_self).push_back(&call);
            continue;
        }
        auto& pieces = (outwards ? out : in)[call.root];
        if (outwards) heads[i] = head_of(call);
        pieces.push_back({reinterpret_cast<char*>(&heads[i]), sizeof(Head)});
        pieces.push_back({outwards ? const_cast<char*>(call.from) : call.to, call.bytes()});
    }
    if (to_self.size() != from_self.size()) {
        fault(0, "a rank sends to itself and does not receive it in the same group");
        return;
    }
    for (size_t i = 0; i < to_self.size(); i++) {
        if (!agree(with, *from_self[i], head_of(*to_self[i]), with.rank)) return;
        std::memmove(from_self[i]->to, to_self[i]->from, to_self[i]->bytes());
    }
    // Heads first: what is received must fit.
    auto part = [&](std::vector<std::vector<Piece>>& all, size_t round, bool head) {
        std::vector<std::vector<Piece>> some(with.size);
        for (int rank = 0; rank < with.size; rank++)
            if (2 * round < all[rank].size()) some[rank].push_back(all[rank][2 * round + !head]);
        return some;
    };
    size_t rounds = 0;
    for (int rank = 0; rank < with.size; rank++) rounds = std::max({rounds, out[rank].size() / 2, in[rank].size() / 2});
    for (size_t round = 0; round < rounds; round++) {
        if (!exchange(with, part(out, round, true), part(in, round, true), "ncclSend and ncclRecv")) return;
        for (size_t i = 0; i < calls.size(); i++) {
            const Call& call = calls[i];
            if (call.kind != RECEIVE || call.root == with.rank) continue;
            const auto& pieces = in[call.root];
            const bool now = 2 * round < pieces.size() && pieces[2 * round].at == reinterpret_cast<char*>(&heads[i]);
            if (now && !agree(with, call, heads[i], call.root)) return;
        }
        if (!exchange(with, part(out, round, false), part(in, round, false), "ncclSend and ncclRecv")) return;
    }
}

// What all ranks have at `from`, rank after rank; empty if the communicator has failed.
std::vector<char> gather(Communicator& with, const Call& call, size_t bytes) {
    std::vector<char> all(bytes * with.size + 1), own(call.from, call.from + bytes);
    std::vector<std::vector<Piece>> out(with.size), in(with.size), heads_in(with.size), heads_out(with.size);
    std::vector<Head> heads(with.size);
    Head mine = head_of(call);
    for (int rank = 0; rank < with.size; rank++) {
        if (rank == with.rank) continue;
        heads_out[rank] = {{reinterpret_cast<char*>(&mine), sizeof mine}};
        heads_in[rank] = {{reinterpret_cast<char*>(&heads[rank]), sizeof(Head)}};
        out[rank] = {{own.data(), bytes}};
        in[rank] = {{&all[rank * bytes], bytes}};
    }
    if (!exchange(with, heads_out, heads_in, NAMES[call.kind])) return {};
    for (int rank = 0; rank < with.size; rank++)
        if (rank != with.rank && !agree(with, call, heads[rank], rank)) return {};
    if (!exchange(with, out, in, NAMES[call.kind])) return {};
    std::memcpy(&all[with.rank * bytes], own.data(), bytes);
    return all;
}

// Sums as a ring does: each piece in the order of the ranks, but each begins with another rank.
template <class T>
void add(const Communicator& with, const std::vector<char>& all, size_t count, size_t first, size_t last, T* to) {
    const T* of = reinterpret_cast<const T*>(all.data());
    for (size_t i = first; i < last; i++) {
        const int start = static_cast<int>(i * with.size / count) + 1;
        T sum = of[start % with.size * count + i];
        for (int k = 1; k < with.size; k++) sum += of[(start + k) % with.size * count + i];
        to[i - first] = sum;
    }
}

void add(const Communicator& with, const Call& call, const std::vector<char>& all, size_t whole, size_t first,
         size_t count) {
    if (call.type == FLOAT) add(with, all, whole, first, first + count, reinterpret_cast<float*>(call.to));
    else add(with, all, whole, first, first + count, reinterpret_cast<double*>(call.to));
}

void run_collective(Communicator& with, const Call& call) {
    const size_t bytes = call.bytes(), whole = bytes * with.size;
    const size_t in = call.kind == REDUCE_SCATTER ? whole : bytes, out = call.kind == ALL_GATHER ? whole : bytes;
    if (!in_memory(call, "send", call.from, in) || !in_memory(call, "receive to", call.to, out)) return;
    const std::vector<char> all = gather(with, call, in);
    if (all.empty()) return;
    switch (call.kind) {
        case ALL_REDUCE: return add(with, call, all, call.count, 0, call.count);
        case REDUCE_SCATTER:
            return add(with, call, all, call.count * with.size, call.count * with.rank, call.count);
        case ALL_GATHER: std::memcpy(call.to, all.data(), whole); return;
        default: std::memcpy(call.to, &all[call.root * bytes], bytes);
    }
}

void run(void* context) {
    const Work& work = *static_cast<Work*>(context);
    if (work.with->error || work.with->aborted) return;
    std::vector<Call> messages;
    for (const Call& call : work.calls) {
        if (call.kind <= RECEIVE) messages.push_back(call);
        else run_collective(*work.with, call);
    }
    run_messages(*work.with, messages);
}

int enqueue(void* handle, void* stream, std::vector<Call> calls) {
    const std::string name = calls.size() == 1 ? NAMES[calls[0].kind] : "ncclGroupEnd";
    auto* work = new Work{get(handle), std::move(calls)};
    auto release = [](void* context) { delete static_cast<Work*>(context); };
    return emulated_enqueue_owned(stream, run, work, release, name.c_str()) ? UNHANDLED : SUCCESS;
}

int call(void* handle, void* stream, Call made, int operation = SUM) {
    auto with = get(handle);
    const std::string name = NAMES[made.kind];
    if (!with) return fault(INVALID_ARGUMENT, name + ": the communicator was destroyed");
    int current = -1;
    if (cudaGetDevice(&current) || current != with->device)
        return fault(INVALID_USAGE, name + ": the current device is " + std::to_string(current) +
                                        ", the communicator is of device " + std::to_string(with->device));
    if (made.type < 0 || made.type > DOUBLE) return fault(INVALID_ARGUMENT, name + ": numbers of an unknown type");
    const bool adds = made.kind == ALL_REDUCE || made.kind == REDUCE_SCATTER;
    if (adds && (operation != SUM || made.type < FLOAT))
        return fault(INVALID_ARGUMENT, name + ": only sums of float32 and float64 are emulated");
    if ((made.kind <= RECEIVE || made.kind == BROADCAST) && (made.root < 0 || made.root >= with->size))
        return fault(INVALID_ARGUMENT, name + ": there is no rank " + std::to_string(made.root));
    if (!group) return enqueue(handle, stream, {made});
    grouped[{handle, stream}].push_back(made);
    return SUCCESS;
}

}  // namespace

extern "C" {

int ncclGetVersion(int* version) { return *version = 22501, SUCCESS; }

const char* ncclGetErrorString(int result) {
    switch (result) {
        case SUCCESS: return "no error";
        case UNHANDLED: return "unhandled cuda error (emulated)";
        case SYSTEM_ERROR: return "unhandled system error (emulated)";
        case INVALID_ARGUMENT: return "invalid argument (emulated)";
        case INVALID_USAGE: return "invalid usage (emulated)";
        default: return "remote process exited or there was a network error (emulated)";
    }
}

int ncclGetUniqueId(Id* id) {
    std::memset(id, 0, sizeof *id);
    uint64_t numbers[2] = {};
    std::ifstream("/dev/urandom", std::ios::binary).read(reinterpret_cast<char*>(numbers), sizeof numbers);
    snprintf(id->bytes, sizeof id->bytes, "%016llx%016llx", static_cast<unsigned long long>(numbers[0]),
             static_cast<unsigned long long>(numbers[1]));
    return SUCCESS;
}

int ncclCommInitRankConfig(void** made, int size, Id id, int rank, void*) {
    if (size < 1 || rank < 0 || rank >= size) return INVALID_ARGUMENT;
    auto with = std::make_shared<Communicator>();
    with->rank = rank;
    with->size = size;
    if (cudaGetDevice(&with->device)) return UNHANDLED;
    if (!connect_all(*with, id)) return SYSTEM_ERROR;
    if (const int wrong = compare(*with)) return wrong;
    std::lock_guard<std::mutex> guard(state);
    communicators[*made = with.get()] = with;
    return SUCCESS;
}

int ncclCommInitRank(void** made, int size, Id id, int rank) {
    return ncclCommInitRankConfig(made, size, id, rank, nullptr);
}

int ncclCommDestroy(void* handle) {
    std::shared_ptr<Communicator> gone = get(handle);
    std::lock_guard<std::mutex> guard(state);
    return communicators.erase(handle) ? SUCCESS : INVALID_ARGUMENT;
}

int ncclCommAbort(void* handle) {
    if (auto with = get(handle)) with->aborted = true;
    return ncclCommDestroy(handle);
}

int ncclCommGetAsyncError(void* handle, int* error) {
    auto with = get(handle);
    if (!with) return INVALID_ARGUMENT;
    return *error = with->error, SUCCESS;
}

int ncclCommCount(void* handle, int* size) { return *size = get(handle)->size, SUCCESS; }
int ncclCommUserRank(void* handle, int* rank) { return *rank = get(handle)->rank, SUCCESS; }
int ncclCommCuDevice(void* handle, int* device) { return *device = get(handle)->device, SUCCESS; }

int ncclGroupStart() { return group++, SUCCESS; }

int ncclGroupEnd() {
    if (!group) return fault(INVALID_USAGE, "ncclGroupEnd without ncclGroupStart");
    if (--group) return SUCCESS;
    auto calls = std::move(grouped);
    grouped.clear();
    if (calls.size() > 1) return fault(INVALID_USAGE, "a group of more than one communicator or stream is not emulated");
    for (auto& [where, made] : calls) return enqueue(where.first, where.second, std::move(made));
    return SUCCESS;
}

int ncclSend(const char* from, size_t count, int type, int peer, void* with, void* stream) {
    return call(with, stream, {SEND, from, nullptr, count, type, peer});
}
int ncclRecv(char* to, size_t count, int type, int peer, void* with, void* stream) {
    return call(with, stream, {RECEIVE, nullptr, to, count, type, peer});
}
int ncclAllReduce(const char* from, char* to, size_t count, int type, int operation, void* with, void* stream) {
    return call(with, stream, {ALL_REDUCE, from, to, count, type}, operation);
}
int ncclAllGather(const char* from, char* to, size_t count, int type, void* with, void* stream) {
    return call(with, stream, {ALL_GATHER, from, to, count, type});
}
int ncclReduceScatter(const char* from, char* to, size_t count, int type, int operation, void* with, void* stream) {
    return call(with, stream, {REDUCE_SCATTER, from, to, count, type}, operation);
}
int ncclBroadcast(const char* from, char* to, size_t count, int type, int root, void* with, void* stream) {
    return call(with, stream, {BROADCAST, from, to, count, type, root});
}
}
