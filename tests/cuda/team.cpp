// GEM's solver on a team of real threads, for ThreadSanitizer, and against one thread alone: every number has one writer and a fixed order,
// so the bits are the same. Usage: team <threads>.
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "core/projection.h"

using namespace fastcl;

namespace {

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const long round = round_;
    if (++waiting_ == threads_) {
      waiting_ = 0;
      ++round_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return round != round_; });
    }
  }

 private:
  const int threads_;
  int waiting_ = 0;
  long round_ = 0;
  std::mutex mutex_;
  std::condition_variable all_;
};

struct Threads {
  int rank, size;
  Barrier* barrier;
  void sync() const { barrier->wait(); }
};

// Memories and a gradient of a few elements: with fewer elements than memories some depend linearly on others. The memories have much in
// common, so that variables also leave the active set again.
std::vector<double> products_of(int k, int elements, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  std::vector<double> common;
  for (int e = 0; e < elements; ++e) common.push_back(normal(random));
  std::vector<std::vector<double>> rows(size_t(k) + 1, std::vector<double>(size_t(elements)));
  for (auto& row : rows)
    for (size_t e = 0; e < row.size(); ++e) row[e] = normal(random) + (&row == &rows.back() ? -0.3 : 0.3) * common[e];
  std::vector<double> out;
  for (const auto& a : rows)
    for (const auto& b : rows) {
      double sum = 0;
      for (size_t e = 0; e < a.size(); ++e) sum += a[e] * b[e];
      out.push_back(sum);
    }
  return out;
}

template <class Team>
void solve(const std::vector<double>& products, int k, double margin, double ridge, std::vector<double>& out, std::vector<double>& doubles,
           std::vector<int>& ints, const Team& team) {
  gem_coefficients(products.data(), k, margin, ridge, out.data(), doubles.data(), ints.data(), team);
}

}  // namespace

int main(int, char** argv) {
  const int threads = std::atoi(argv[1]);
  std::mt19937_64 random(3);
  int violated = 0, active = 0;
  for (int k : {1, 2, 5, 17, 24}) {
    for (int elements : {k / 2 + 1, 3 * k}) {
      for (double margin : {0.0, 0.5}) {
        const double ridge = margin == 0 ? 0 : 1e-3;
        const std::vector<double> products = products_of(k, elements, random);
        // The workspace begins as NaN: reading what nobody has written shows.
        std::vector<double> doubles(size_t(gem_workspace_doubles(k)), NAN), expected(size_t(2 * k) + 1, NAN), out = expected;
        std::vector<int> ints(size_t(gem_workspace_ints(k)), 12345);
        solve(products, k, margin, ridge, expected, doubles, ints, Alone{});
        doubles.assign(doubles.size(), NAN);
        ints.assign(ints.size(), 54321);
        Barrier barrier(threads);
        std::vector<std::thread> team;
        for (int t = 0; t < threads; ++t)
          team.emplace_back([&, t] { solve(products, k, margin, ridge, out, doubles, ints, Threads{t, threads, &barrier}); });
        for (std::thread& t : team) t.join();
        if (std::memcmp(out.data(), expected.data(), out.size() * sizeof(double)) != 0) {
          std::printf("k %d, elements %d, margin %g: the team's result differs from one thread's\n", k, elements, margin);
          return 1;
        }
        violated += out[0] != 0;
        for (int i = 0; i < k; ++i) active += out[size_t(1 + i)] > margin;
      }
    }
  }
  if (violated < 8 || active < 8) {
    std::printf("only %d programmes were violated and %d coefficients above the margin: nothing was tried\n", violated, active);
    return 1;
  }
  std::printf("%d violated, %d coefficients above the margin: ok\n", violated, active);
  return 0;
}
