// Per-length tables kept between calls: lookup, growth, least-recently-used eviction under a byte budget,
// behind an integer handle (the stable ABI has no custom classes). A payload is a shared pointer to anything.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace clex {

using Payload = std::shared_ptr<void>;

struct TableCacheStats {
  int64_t hits = 0, misses = 0, evictions = 0, invalidations = 0, bytes = 0, entries = 0;
};

// Thread-safe. All entries come from the weights of one fingerprint; a call with another one drops them.
class TableCache {
 public:
  explicit TableCache(int64_t byte_budget) : byte_budget_(byte_budget) {}

  // The payload under `key` if it holds at least `length` positions, else null. A pinned payload lives as
  // long as the cache: a captured CUDA graph reads its memory at every replay.
  Payload get(const std::string& key, int64_t length, int64_t fingerprint, bool pin);

  // Stores a payload, in place of a shorter one of the same key (a longer one is kept, the new one dropped).
  // Then evicts until the budget holds, but never the payload just stored: one over it stands alone.
  void put(const std::string& key, int64_t length, int64_t fingerprint, Payload payload, int64_t bytes);

  // Drops all entries. Memory of pinned ones stays, out of reach of lookups.
  void invalidate();

  TableCacheStats stats() const;

 private:
  struct Entry {
    std::string key;
    int64_t length, bytes;
    bool pinned;
    Payload payload;
  };
  using Entries = std::list<Entry>;
  // payloads to free after the lock is released: freeing one may run foreign code.
  using Dropped = std::vector<Payload>;

  void expect_fingerprint(int64_t fingerprint, Dropped& dropped);
  void drop_all(Dropped& dropped);
  void drop(Entries::iterator entry, Dropped& dropped);
  void evict(Dropped& dropped);

  const int64_t byte_budget_;
  mutable std::mutex mutex_;
  Entries entries_;  // most recently used first
  std::unordered_map<std::string, Entries::iterator> index_;
  std::vector<Payload> retired_;
  int64_t fingerprint_ = 0;
  TableCacheStats stats_;
};

int64_t create_table_cache(int64_t byte_budget);

// Null for a handle that was never given out or was destroyed.
std::shared_ptr<TableCache> find_table_cache(int64_t handle);

// A cache in use by another thread is freed when that thread is done.
void destroy_table_cache(int64_t handle);

// 64-bit content hash of `bytes` bytes, continuing from `seed`; depends on their order and number.
uint64_t hash_bytes(const void* data, int64_t bytes, uint64_t seed);

}  // namespace clex
