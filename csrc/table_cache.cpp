#include "table_cache.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "isa.h"

namespace clex {

Payload TableCache::get(const std::string& key, int64_t length, int64_t fingerprint, bool pin) {
  Dropped dropped;
  const std::lock_guard lock(mutex_);
  expect_fingerprint(fingerprint, dropped);
  const auto found = index_.find(key);
  if (found == index_.end() || found->second->length < length) {
    ++stats_.misses;
    return nullptr;
  }
  ++stats_.hits;
  entries_.splice(entries_.begin(), entries_, found->second);
  found->second->pinned |= pin;
  return found->second->payload;
}

void TableCache::put(const std::string& key, int64_t length, int64_t fingerprint, Payload payload,
                     int64_t bytes) {
  Dropped dropped;
  const std::lock_guard lock(mutex_);
  expect_fingerprint(fingerprint, dropped);
  if (const auto found = index_.find(key); found != index_.end()) {
    if (found->second->length >= length) {
      // another thread built the same table first.
      dropped.push_back(std::move(payload));
      return;
    }
    drop(found->second, dropped);
  }
  entries_.push_front({key, length, bytes, false, std::move(payload)});
  index_[key] = entries_.begin();
  stats_.bytes += bytes;
  evict(dropped);
}

void TableCache::invalidate() {
  Dropped dropped;
  const std::lock_guard lock(mutex_);
  drop_all(dropped);
}

TableCacheStats TableCache::stats() const {
  const std::lock_guard lock(mutex_);
  TableCacheStats stats = stats_;
  stats.entries = static_cast<int64_t>(entries_.size());
  return stats;
}

void TableCache::expect_fingerprint(int64_t fingerprint, Dropped& dropped) {
  if (fingerprint != fingerprint_ && !entries_.empty()) drop_all(dropped);
  fingerprint_ = fingerprint;
}

void TableCache::drop_all(Dropped& dropped) {
  while (!entries_.empty()) drop(entries_.begin(), dropped);
  ++stats_.invalidations;
}

void TableCache::drop(Entries::iterator entry, Dropped& dropped) {
  if (entry->pinned) {
    retired_.push_back(std::move(entry->payload));
  } else {
    stats_.bytes -= entry->bytes;
    dropped.push_back(std::move(entry->payload));
  }
  index_.erase(entry->key);
  entries_.erase(entry);
}

void TableCache::evict(Dropped& dropped) {
  // a pinned entry would free nothing, so it stays.
  for (auto entry = entries_.end(); stats_.bytes > byte_budget_ && --entry != entries_.begin();) {
    if (entry->pinned) continue;
    ++stats_.evictions;
    drop(entry++, dropped);
  }
}

namespace {

// never destroyed: at process exit the allocators under the payloads may be gone already.
struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<TableCache>> caches;
  int64_t next_handle = 1;
};

Registry& registry() {
  static Registry* const instance = new Registry;
  return *instance;
}

}  // namespace

int64_t create_table_cache(int64_t byte_budget) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  all.caches.emplace(all.next_handle, std::make_shared<TableCache>(byte_budget));
  return all.next_handle++;
}

std::shared_ptr<TableCache> find_table_cache(int64_t handle) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  const auto found = all.caches.find(handle);
  return found == all.caches.end() ? nullptr : found->second;
}

void destroy_table_cache(int64_t handle) {
  Registry& all = registry();
  std::shared_ptr<TableCache> last;
  const std::lock_guard lock(all.mutex);
  if (const auto found = all.caches.find(handle); found != all.caches.end()) {
    last = std::move(found->second);
    all.caches.erase(found);
  }
}

// ---------------------------------------------------------------- content hash

namespace {

constexpr int64_t LANES = 32;
constexpr uint64_t MULTIPLIER = 0x9E3779B97F4A7C15u;

CLEX_INLINE uint64_t rotate_left(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

// Each step is a bijection of the lane and of the word, so one changed word always changes its lane.
template <class T>
CLEX_INLINE void absorb_body(const T* words, int64_t stripes, T* lanes) {
  T state[LANES];
  for (int64_t i = 0; i < LANES; ++i) state[i] = lanes[i];
  for (int64_t stripe = 0; stripe < stripes; ++stripe) {
#pragma omp simd
    for (int64_t i = 0; i < LANES; ++i) {
      T word;
      std::memcpy(&word, words + stripe * LANES + i, sizeof word);
      state[i] = rotate_left(state[i] ^ word, 29) * MULTIPLIER;
    }
  }
  for (int64_t i = 0; i < LANES; ++i) lanes[i] = state[i];
}

CLEX_MULTIVERSION(absorb, (const T* words, int64_t stripes, T* lanes), (words, stripes, lanes))

// the finaliser of splitmix64.
uint64_t mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

}  // namespace

uint64_t hash_bytes(const void* data, int64_t bytes, uint64_t seed) {
  uint64_t lanes[LANES], tail[LANES] = {};
  for (int64_t i = 0; i < LANES; ++i) lanes[i] = mix(seed + MULTIPLIER * (i + 1));
  const int64_t stripes = bytes / static_cast<int64_t>(sizeof tail), whole = stripes * sizeof tail;
  absorb(static_cast<const uint64_t*>(data), stripes, lanes);
  if (bytes > whole) {
    std::memcpy(tail, static_cast<const char*>(data) + whole, bytes - whole);
    absorb(tail, 1, lanes);
  }
  uint64_t hash = mix(seed ^ static_cast<uint64_t>(bytes));
  for (const uint64_t lane : lanes) hash = mix(rotate_left(hash, 23) * MULTIPLIER + mix(lane));
  return hash;
}

}  // namespace clex
