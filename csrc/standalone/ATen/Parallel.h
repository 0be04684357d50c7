// at::parallel_for for builds without torch: the CPU kernels use nothing else of it. CMakeLists.txt puts this folder among
// the include folders only there. Cut as torch cuts it, by the number of threads; the kernels' bits do not depend on that.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace at {

template <class Function>
void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain, const Function& function) {
  if (begin >= end) return;
  const std::int64_t total = end - begin;
#if defined(_OPENMP)
  const std::int64_t most = (total - 1) / std::max<std::int64_t>(grain, 1) + 1;
  const int threads = int(std::min<std::int64_t>(omp_get_max_threads(), most));
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    {
      const std::int64_t chunk = (total + omp_get_num_threads() - 1) / omp_get_num_threads();
      const std::int64_t first = begin + omp_get_thread_num() * chunk;
      if (first < end) function(first, std::min(first + chunk, end));
    }
    return;
  }
#endif
  function(begin, end);
}

}  // namespace at
