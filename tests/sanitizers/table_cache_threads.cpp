// Eight threads on the table cache, built with ThreadSanitizer by thread.py: they look up, store and grow tables, change
// the fingerprint of the weights, invalidate, evict under a small budget, pin, read the counters, and create and destroy
// caches under one another. Every payload says what it is; what holds of it, and of the counters once all threads are
// done, is checked. Exit status 1 if something does not hold; ThreadSanitizer's own, 66, for a race.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "table_cache.h"

namespace {

constexpr int kThreads = 8, kKeys = 9, kLengths = 12;
constexpr int64_t kWord = sizeof(uint64_t), kBudget = 20 * kWord;

std::atomic<int64_t> failures = 0, live_tables = 0, live_bytes = 0;

void expect(bool holds, const char* what, int64_t got, int64_t expected) {
  if (holds) return;
  if (++failures <= 20) std::fprintf(stderr, "%s: expected %ld, got %ld\n", what, long(expected), long(got));
}

void expect_equal(const char* what, int64_t got, int64_t expected) { expect(got == expected, what, got, expected); }

// Words that follow from what the table stands for; they are neither atomic nor locked, as a tensor's are not.
struct Table {
  Table(int64_t key, int64_t length, int64_t fingerprint) : key(key), fingerprint(fingerprint), words(length) {
    for (int64_t i = 0; i < length; ++i) words[i] = word(i);
    ++live_tables;
    live_bytes += bytes();
  }
  ~Table() {
    --live_tables;
    live_bytes -= bytes();
    // who still reads freed words notices.
    for (uint64_t& value : words) value = ~value;
  }
  uint64_t word(int64_t i) const {
    return static_cast<uint64_t>(key * 1000003 + fingerprint * 10007 + i) * 0x9E3779B97F4A7C15u;
  }
  int64_t length() const { return static_cast<int64_t>(words.size()); }
  int64_t bytes() const { return length() * kWord; }

  const int64_t key, fingerprint;
  std::vector<uint64_t> words;
};

// splitmix64, of a thread's own.
struct Random {
  uint64_t state;
  int64_t below(int64_t count) {
    uint64_t x = state += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return static_cast<int64_t>((x ^ x >> 31) % static_cast<uint64_t>(count));
  }
};

struct Counts {
  std::atomic<int64_t> hits = 0, misses = 0, puts = 0, invalidations = 0;
};

void check_payload(const clex::Payload& payload, int64_t key, int64_t length, int64_t fingerprint) {
  const auto table = std::static_pointer_cast<Table>(payload);
  expect_equal("key of a payload", table->key, key);
  expect_equal("fingerprint of a payload", table->fingerprint, fingerprint);
  expect(table->length() >= length, "length of a payload, at least", table->length(), length);
  for (int64_t i = 0; i < table->length(); ++i) {
    expect_equal("word of a payload", static_cast<int64_t>(table->words[i]), static_cast<int64_t>(table->word(i)));
  }
}

void check_stats(const clex::TableCacheStats& stats, bool pins) {
  // without pins one table over the budget may stand alone, and none of these is.
  expect(stats.bytes >= 0 && (pins || stats.bytes <= kBudget), "bytes, at most", stats.bytes, kBudget);
  expect(stats.entries >= 0 && stats.entries <= kKeys, "entries, at most", stats.entries, kKeys);
}

// One step on a cache; the fingerprint hardly ever changes, or nothing would be found.
void work(clex::TableCache& cache, Counts& counts, Random& random, bool pins) {
  const int64_t kind = random.below(200), key = random.below(kKeys), length = 1 + random.below(kLengths);
  const int64_t fingerprint = 7 + (random.below(60) == 0);
  const std::string name = "table " + std::to_string(key);
  if (kind == 0) {
    cache.invalidate();
    ++counts.invalidations;
  } else if (kind < 10) {
    check_stats(cache.stats(), pins);
  } else if (kind < 90) {
    auto table = std::make_shared<Table>(key, length, fingerprint);
    const int64_t bytes = table->bytes();
    cache.put(name, length, fingerprint, std::move(table), bytes);
    ++counts.puts;
  } else {
    const clex::Payload found = cache.get(name, length, fingerprint, pins && random.below(500) == 0);
    ++(found ? counts.hits : counts.misses);
    if (found) check_payload(found, key, length, fingerprint);
  }
}

// What must hold of a cache that nobody works on any more.
void check_counts(const clex::TableCache& cache, const Counts& counts, bool pins) {
  const clex::TableCacheStats stats = cache.stats();
  check_stats(stats, pins);
  expect_equal("hits", stats.hits, counts.hits);
  expect_equal("misses", stats.misses, counts.misses);
  expect(stats.invalidations >= counts.invalidations, "invalidations, at least", stats.invalidations,
         counts.invalidations);
  expect(stats.evictions <= counts.puts, "evictions, at most", stats.evictions, counts.puts);
  for (const int64_t count : {stats.hits, stats.misses, stats.evictions, stats.invalidations}) {
    expect(count > 0, "a count, at least", count, 1);
  }
}

// A cache that threads take from one another: whoever still works on one that was destroyed works on.
std::atomic<int64_t> passed_on = 0;

void replace_cache(Random& random) {
  const int64_t old = passed_on.exchange(clex::create_table_cache(kBudget));
  clex::destroy_table_cache(old);
  // every handle is destroyed by the one thread that took it, and a second time does nothing.
  if (random.below(4) == 0) clex::destroy_table_cache(old);
  expect_equal("a destroyed cache", clex::find_table_cache(old) != nullptr, 0);
}

void check_hash(Random& random) {
  uint64_t words[41];
  for (uint64_t& word : words) word = static_cast<uint64_t>(random.below(INT64_MAX));
  const uint64_t hash = clex::hash_bytes(words, sizeof words, 7);
  expect_equal("a hash of the same words", clex::hash_bytes(words, sizeof words, 7) == hash, 1);
  ++words[random.below(41)];
  expect_equal("a hash of other words", clex::hash_bytes(words, sizeof words, 7) == hash, 0);
}

struct Shared {
  int64_t handle;
  bool pins;
  Counts counts;
};

void run(int seed, Shared (&shared)[2], int64_t steps) {
  Random random{static_cast<uint64_t>(seed)};
  Counts private_counts;
  // at once in all threads: the first use chooses the instruction set.
  check_hash(random);
  for (int64_t step = 0; step < steps; ++step) {
    Shared& cache = shared[step % 2];
    const auto found = clex::find_table_cache(cache.handle);
    expect_equal("a shared cache", found != nullptr, 1);
    work(*found, cache.counts, random, cache.pins);
    if (const auto passed = clex::find_table_cache(passed_on.load())) work(*passed, private_counts, random, false);
    if (step % 64 == 0) replace_cache(random);
    if (step % 128 == 0) check_hash(random);
  }
}

}  // namespace

int main(int argc, char** argv) {
  // of a thread, and no time: a busy machine does as much.
  const int64_t steps = argc > 1 ? std::atoll(argv[1]) : 20000;
  Shared shared[2] = {{clex::create_table_cache(kBudget), false, {}}, {clex::create_table_cache(kBudget), true, {}}};
  passed_on = clex::create_table_cache(kBudget);
  std::vector<std::thread> threads;
  for (int seed = 0; seed < kThreads; ++seed) threads.emplace_back([&, seed] { run(seed, shared, steps); });
  for (std::thread& thread : threads) thread.join();

  clex::destroy_table_cache(passed_on);
  int64_t kept_bytes = 0, calls = 0;
  for (const Shared& cache : shared) {
    const auto found = clex::find_table_cache(cache.handle);
    check_counts(*found, cache.counts, cache.pins);
    kept_bytes += found->stats().bytes;
    calls += cache.counts.hits + cache.counts.misses + cache.counts.puts;
  }
  expect_equal("bytes in memory", live_bytes, kept_bytes);
  for (const Shared& cache : shared) clex::destroy_table_cache(cache.handle);
  expect_equal("tables left over", live_tables, 0);
  std::printf("%d threads, %ld calls, %ld failures\n", kThreads, long(calls), long(failures.load()));
  return failures == 0 ? 0 : 1;
}
