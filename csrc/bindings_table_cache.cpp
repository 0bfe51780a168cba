#include "bindings.h"

#include <memory>
#include <string>
#include <utility>

#include "table_cache.h"

namespace {

using Tensors = std::vector<Tensor>;

std::shared_ptr<clex::TableCache> table_cache(int64_t handle) {
  auto cache = clex::find_table_cache(handle);
  STD_TORCH_CHECK(cache != nullptr, "table cache ", handle, " does not exist");
  return cache;
}

// an empty list is a miss: a stored payload has at least one tensor. A key is a number since torch's stable ABI leaks
// every string that an operator takes, and each step of decoding looks tables up.
Tensors table_cache_get(int64_t handle, int64_t key, int64_t length, int64_t fingerprint, bool pin) {
  const clex::Payload payload = table_cache(handle)->get(std::to_string(key), length, fingerprint, pin);
  return payload ? *std::static_pointer_cast<Tensors>(payload) : Tensors{};
}

void table_cache_put(int64_t handle, int64_t key, int64_t length, int64_t fingerprint, Tensors tensors) {
  int64_t bytes = 0;
  for (const Tensor& tensor : tensors) bytes += tensor.numel() * static_cast<int64_t>(tensor.element_size());
  auto payload = std::make_shared<Tensors>(std::move(tensors));
  table_cache(handle)->put(std::to_string(key), length, fingerprint, std::move(payload), bytes);
}

void table_cache_invalidate(int64_t handle) { table_cache(handle)->invalidate(); }

std::vector<int64_t> table_cache_stats(int64_t handle) {
  const clex::TableCacheStats stats = table_cache(handle)->stats();
  return {stats.hits, stats.misses, stats.evictions, stats.bytes, stats.entries, stats.invalidations};
}

// of contents, shapes and element sizes.
int64_t fingerprint(Tensors tensors) {
  uint64_t hash = tensors.size();
  for (const Tensor& strided : tensors) {
    const Tensor tensor = torch::stable::contiguous(strided);
    std::vector<int64_t> shape(tensor.sizes().begin(), tensor.sizes().end());
    shape.push_back(static_cast<int64_t>(tensor.element_size()));
    hash = clex::hash_bytes(shape.data(), shape.size() * sizeof(int64_t), hash);
    hash = clex::hash_bytes(tensor.const_data_ptr(), tensor.numel() * tensor.element_size(), hash);
  }
  return static_cast<int64_t>(hash);
}

STABLE_TORCH_LIBRARY_IMPL(clex, CompositeExplicitAutograd, m) {
  m.impl("table_cache_create", TORCH_BOX(&clex::create_table_cache));
  m.impl("table_cache_get", TORCH_BOX(&table_cache_get));
  m.impl("table_cache_put", TORCH_BOX(&table_cache_put));
  m.impl("table_cache_invalidate", TORCH_BOX(&table_cache_invalidate));
  m.impl("table_cache_stats", TORCH_BOX(&table_cache_stats));
}

STABLE_TORCH_LIBRARY_IMPL(clex, CPU, m) { m.impl("fingerprint", TORCH_BOX(&fingerprint)); }

}  // namespace
