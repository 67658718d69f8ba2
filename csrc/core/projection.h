// A-GEM's and GEM's decisions, made from dot products where these are. The solver is written for a team of threads that share memory: one
// on the CPU, a block on a GPU.
#pragma once

#include <cmath>

#include "core/scalar.h"

namespace fastcl {

// What A-GEM adds of the reference: 0 if nothing is violated, NaN if the dot products are no longer finite numbers.
FASTCL_HD double agem_coefficient(double dot, double square) {
  if (!(square < INFINITY) || dot != dot) return NAN;
  return dot < 0 && square > 0 ? -dot / square : 0.0;  // squares that all vanish leave no direction
}

// Element of g + sum_k v_k m_k, the sum kept in double and rounded once at the end.
template <class M>
FASTCL_HD double add_scaled(double sum, double coefficient, M memory) {
#ifdef __CUDA_ARCH__
  return fma(coefficient, load<double>(memory), sum);  // not left to the compiler there
#else
  return sum + coefficient * load<double>(memory);
#endif
}

constexpr int kMostMemories = 64;
constexpr double kRoundoff = 0x1p-52;
constexpr double kSettled = 1e-9;  // what may be left of an equation, relative to the largest right side

// One thread that does everything.
struct Alone {
  static constexpr int rank = 0, size = 1;
  FASTCL_HD void sync() const {}
};

// min_u 1/2 u^T Q u + p^T u  subject to  u >= 0,  Q positive semi-definite: Lawson and Hanson's active set (Solving Least Squares Problems,
// 1974, chapter 23). The passive block of Q is inverted in place by Gauss-Jordan sweeps, whose rank-one updates a team can share, and each
// solution is refined twice against Q itself. The variables are scaled so that Q has a unit diagonal; one that depends linearly on the
// passive ones stays at 0. All threads of a team run through the same branches, since they decide from the same shared numbers.
struct NonnegativeQP {
  int n;
  double* q;         // [n, row_of(n)], scaled
  double* inverse;   // [n, row_of(n)]: of the passive block; elsewhere what the sweeps make of Q
  double* p;         // [n], scaled
  double* u;         // [n]: the solution, scaled
  double* s;         // [n]: the minimum over the passive variables
  double* residual;  // [n]
  double* row;       // [n]
  double* scale;     // [n]: of the variables
  int* passive;      // [n]
  int* blocked;      // [n]: refused as dependent since the last step

  static constexpr int kVectors = 6;
  static constexpr int kFlags = 2;

  // The length of a matrix row in memory: odd, so that a GPU's threads find one column's elements in different banks of shared memory.
  static constexpr FASTCL_HD int row_of(int n) { return n | 1; }

  template <class Team>
  FASTCL_HD void sweep(int k, const Team& team) const {
    const int width = row_of(n);
    const double reciprocal = 1 / inverse[k * width + k];
    FASTCL_ROLLED
    for (int j = team.rank; j < n; j += team.size) row[j] = inverse[k * width + j] * reciprocal;
    team.sync();
    FASTCL_ROLLED
    for (int i = team.rank; i < n; i += team.size) {
      if (i == k) continue;
      double* own = inverse + i * width;
      const double factor = own[k];
      for (int j = 0; j < n; ++j) own[j] -= factor * row[j];
      own[k] = -factor * reciprocal;
    }
    FASTCL_ROLLED
    for (int j = team.rank; j < n; j += team.size) inverse[k * width + j] = j == k ? reciprocal : row[j];
    team.sync();
  }

  // Sweeps in the entering variable; with none (-1), all passive ones from Q anew: what was swept in is not swept out, so that no rounding
  // piles up.
  template <class Team>
  FASTCL_HD void factor(int entering, const Team& team) const {
    const int width = row_of(n);
    if (entering < 0) {
      FASTCL_ROLLED
      for (int i = team.rank; i < n; i += team.size)
        for (int j = 0; j < n; ++j) inverse[i * width + j] = q[i * width + j];
      team.sync();
    }
    FASTCL_ROLLED
    for (int k = 0; k < n; ++k)
      if (entering < 0 ? passive[k] != 0 : k == entering) sweep(k, team);
  }

  template <class Team>
  FASTCL_HD void minimum(const Team& team) const {
    const int width = row_of(n);
    FASTCL_ROLLED
    for (int i = team.rank; i < n; i += team.size) s[i] = 0;
    team.sync();
    for (int refinement = 0; refinement < 3; ++refinement) {
      FASTCL_ROLLED
      for (int i = team.rank; i < n; i += team.size) {
        double sum = p[i];
        for (int j = 0; j < n; ++j) sum += q[i * width + j] * s[j];
        residual[i] = passive[i] ? sum : 0;
      }
      team.sync();
      FASTCL_ROLLED
      for (int i = team.rank; i < n; i += team.size) {
        if (!passive[i]) continue;
        double sum = 0;
        for (int j = 0; j < n; ++j) sum += inverse[i * width + j] * residual[j];
        s[i] -= sum;
      }
      team.sync();
    }
  }

  // Whether s solves the passive equations: where they are dependent but for rounding, refinement does not converge.
  template <class Team>
  FASTCL_HD bool settled(const Team& team) const {
    const int width = row_of(n);
    FASTCL_ROLLED
    for (int i = team.rank; i < n; i += team.size) {
      double sum = p[i];
      for (int j = 0; j < n; ++j) sum += q[i * width + j] * s[j];
      residual[i] = passive[i] ? fabs(sum) : 0;
    }
    team.sync();
    double largest = 0, size = 0;
    for (int i = 0; i < n; ++i) {
      largest = residual[i] > largest || residual[i] != residual[i] ? residual[i] : largest;
      size = fmax(size, fabs(p[i]));
    }
    team.sync();
    return largest <= kSettled * size;
  }

  // The free variable along which the objective falls most steeply, beyond rounding; -1 if there is none.
  template <class Team>
  FASTCL_HD int steepest(const Team& team) const {
    const int width = row_of(n);
    FASTCL_ROLLED
    for (int i = team.rank; i < n; i += team.size) {
      double gradient = p[i], magnitude = fabs(p[i]);
      for (int j = 0; j < n; ++j) {
        gradient += q[i * width + j] * u[j];
        magnitude += fabs(q[i * width + j]) * u[j];
      }
      residual[i] = !passive[i] && !blocked[i] && gradient < -4 * n * kRoundoff * magnitude ? gradient : 0;
    }
    team.sync();
    int best = -1;
    FASTCL_ROLLED
    for (int i = 0; i < n; ++i)
      if (residual[i] < (best < 0 ? 0 : residual[best])) best = i;
    team.sync();
    return best;
  }

  // Moves from u towards s as far as no passive variable becomes negative, and fixes those that reach 0. False: s is feasible.
  template <class Team>
  FASTCL_HD bool step_back(const Team& team) const {
    constexpr double far = 2;  // residual: how far each goes before it becomes 0
    FASTCL_ROLLED
    for (int i = team.rank; i < n; i += team.size) residual[i] = !(passive[i] && s[i] <= 0) ? far : u[i] > 0 ? u[i] / (u[i] - s[i]) : 0;
    team.sync();
    double shortest = far;
    FASTCL_ROLLED
    for (int i = 0; i < n; ++i) shortest = fmin(shortest, residual[i]);
    if (shortest == far) return false;
    FASTCL_ROLLED
    for (int i = team.rank; i < n; i += team.size) {
      if (!passive[i]) continue;
      const bool leaves = s[i] <= 0 && residual[i] <= shortest;
      u[i] = leaves ? 0 : u[i] + shortest * (s[i] - u[i]);
      passive[i] = !leaves;
    }
    team.sync();
    return true;
  }

  // Each part stands here once, and loops that a GPU team runs through once are not unrolled, so that all of it fits into registers.
  template <class Team>
  FASTCL_HD void solve(const Team& team) const {
    FASTCL_ROLLED
    for (int i = team.rank; i < n; i += team.size) {
      u[i] = 0;
      passive[i] = 0;
      blocked[i] = 0;
    }
    team.sync();
    int entering = -1, steps = 16 * n + 16;
    bool fresh = false;
    while (true) {
      factor(fresh ? entering : -1, team);
      if (entering >= 0) {
        minimum(team);
        if (fresh && !(settled(team) && s[entering] > 0)) {
          team.sync();
          if (team.rank == 0) {
            passive[entering] = 0;
            blocked[entering] = 1;
          }
          team.sync();
          entering = -1;
          fresh = false;
          continue;
        }
        fresh = false;
        if (step_back(team)) continue;
        FASTCL_ROLLED
        for (int i = team.rank; i < n; i += team.size) {
          u[i] = s[i];
          blocked[i] = 0;
        }
        team.sync();
      }
      for (entering = -1; entering < 0;) {
        if (steps-- == 0) return;
        entering = steepest(team);
        if (entering < 0) return;
        const bool dependent = !(inverse[entering * row_of(n) + entering] > 16 * n * kRoundoff);
        if (team.rank == 0) (dependent ? blocked : passive)[entering] = 1;
        team.sync();
        if (dependent) entering = -1;
      }
      fresh = true;
    }
  }
};

// Doubles and ints that gem_coefficients works in.
constexpr FASTCL_HD int64_t gem_workspace_doubles(int k) { return int64_t(2) * k * NonnegativeQP::row_of(k) + NonnegativeQP::kVectors * k; }
constexpr FASTCL_HD int64_t gem_workspace_ints(int k) { return int64_t(NonnegativeQP::kFlags) * k; }

// GEM's coefficients from the Gram matrix [k + 1, k + 1] of the memories and, last, the gradient.
// out: [violated, v_0 ... v_k-1, G_0 . g ... G_k-1 . g]; zeros for v if nothing is violated, NaN if the products are no longer numbers.
template <class Team>
FASTCL_HD void gem_coefficients(const double* products, int k, double margin, double ridge, double* out, double* doubles, int* ints,
                                const Team& team) {
  const int width = NonnegativeQP::row_of(k);
  constexpr int kViolated = 1, kNumbers = 2;
  FASTCL_ROLLED
  for (int i = team.rank; i < k; i += team.size) {
    const double* row = products + i * (k + 1);
    bool numbers = true;
    for (int j = 0; j <= k; ++j) numbers &= fabs(row[j]) < INFINITY;
    ints[i] = (row[k] >= 0 && row[i] < INFINITY ? 0 : kViolated) | (numbers ? kNumbers : 0);
  }
  team.sync();
  bool violated = false, numbers = true;
  FASTCL_ROLLED
  for (int i = 0; i < k; ++i) {
    violated |= (ints[i] & kViolated) != 0;
    numbers &= (ints[i] & kNumbers) != 0;
  }
  team.sync();
  double* vectors = doubles + 2 * k * width;
  const NonnegativeQP qp{
      k,    doubles, doubles + k * width, vectors, vectors + k, vectors + 2 * k, vectors + 3 * k, vectors + 4 * k, vectors + 5 * k,
      ints, ints + k};
  if (violated && numbers) {
    FASTCL_ROLLED
    for (int i = team.rank; i < k; i += team.size) {
      const double d = products[i * (k + 1) + i] + ridge;
      qp.scale[i] = d > 0 ? 1 / sqrt(d) : 0;
    }
    team.sync();
    // u = v - margin turns the bound into u >= 0 and the linear term into b + margin Q 1.
    FASTCL_ROLLED
    for (int i = team.rank; i < k; i += team.size) {
      double sum = 0;
      for (int j = 0; j < k; ++j) {
        const double element = products[i * (k + 1) + j] + (i == j ? ridge : 0);
        sum += element;
        qp.q[i * width + j] = i == j ? (element > 0 ? 1 : 0) : qp.scale[i] * element * qp.scale[j];
      }
      qp.p[i] = qp.scale[i] * (products[i * (k + 1) + k] + margin * sum);
    }
    team.sync();
    qp.solve(team);
    FASTCL_ROLLED
    for (int i = team.rank; i < k; i += team.size) out[1 + i] = margin + qp.scale[i] * qp.u[i];
  } else {
    FASTCL_ROLLED
    for (int i = team.rank; i < k; i += team.size) out[1 + i] = violated ? NAN : 0.0;
  }
  FASTCL_ROLLED
  for (int i = team.rank; i < k; i += team.size) out[1 + k + i] = products[i * (k + 1) + k];
  if (team.rank == 0) out[0] = violated ? 1 : 0;
}

}  // namespace fastcl
