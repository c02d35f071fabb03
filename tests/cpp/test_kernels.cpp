// Every kernel of every instruction set that runs here, against brute force in double precision.
//
// Buffers are exactly as long as they must be and start at odd places, so that a sanitizer sees each read or write
// beyond one. A result may differ from the truth by what rounding can do to it, and by no bit between 1, 2 and 3
// threads.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "results.h"

using namespace sslkern;

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr float NAN32 = std::numeric_limits<float>::quiet_NaN();
constexpr double ULP = 0x1p-23;

bool brief = false;
int passed = 0, failed = 0;
std::mt19937 random_bits(0);

double normal() { return std::normal_distribution<double>()(random_bits); }
int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(random_bits); }

// ---- Numbers in memory ----------------------------------------------------------------------------------------------

struct Format {
  int bytes, fraction, lowest;  // bits of the fraction, exponent of the smallest normal number
};
Format format(DType dtype) {
  return dtype == DType::F32 ? Format{4, 23, -126} : dtype == DType::BF16 ? Format{2, 7, -126} : Format{2, 10, -14};
}

double rounded(double x, DType dtype) {
  const Format f = format(dtype);
  if (x == 0 || !std::isfinite(x)) return x;
  const double quantum = std::ldexp(1., std::max(std::ilogb(x), f.lowest) - f.fraction);
  const double y = std::nearbyint(x / quantum) * quantum, limit = std::ldexp(1., 2 - f.lowest);
  return std::fabs(y) < limit ? y : std::copysign(INF, y);
}

uint32_t encoded(double x, DType dtype) {
  const Format f = format(dtype);
  const uint32_t sign = std::signbit(x) ? 1u << (f.bytes * 8 - 1) : 0, infinity = uint32_t(2 * (1 - f.lowest) + 1)
                                                                                  << f.fraction;
  if (std::isnan(x)) return infinity | 1u << (f.fraction - 1);
  x = std::fabs(rounded(x, dtype));
  if (std::isinf(x)) return sign | infinity;
  const int exponent = x == 0 ? f.lowest : std::max(std::ilogb(x), f.lowest);
  return sign |
         uint32_t((uint32_t(exponent - f.lowest) << f.fraction) + uint32_t(std::ldexp(x, f.fraction - exponent)));
}

float decoded(uint32_t bits, DType dtype) {
  const Format f = format(dtype);
  const int sign = f.bytes * 8 - 1, infinite = 1 + 2 * (1 - f.lowest);
  const int exponent = int((bits & ~(1u << sign)) >> f.fraction), power = (exponent > 0 ? exponent - 1 : 0) + f.lowest;
  const uint32_t fraction = bits & ((1u << f.fraction) - 1), whole = exponent > 0 ? 1u << f.fraction : 0;
  const double size = exponent < infinite ? std::ldexp(whole + fraction, power - f.fraction)
                      : fraction == 0     ? INF
                                          : NAN;
  return float(bits >> sign ? -size : size);
}

// Numbers of some type, in a block of the heap that ends with the last one and starts one number before the first.
class Numbers {
 public:
  Numbers(DType dtype, const std::vector<double>& values)
      : dtype_(dtype), bytes_(format(dtype).bytes), memory_((values.size() + 1) * bytes_) {
    for (size_t i = 0; i < values.size(); ++i) {
      const uint32_t bits = encoded(values[i], dtype);
      memcpy(data() + i * bytes_, &bits, bytes_);
    }
  }
  char* data() { return memory_.data() + bytes_; }
  std::vector<float> values() {
    std::vector<float> x(memory_.size() / bytes_ - 1);
    for (size_t i = 0; i < x.size(); ++i) {
      uint32_t bits = 0;
      memcpy(&bits, data() + i * bytes_, bytes_);
      x[i] = decoded(bits, dtype_);
    }
    return x;
  }

 private:
  DType dtype_;
  int bytes_;
  std::vector<char> memory_;
};

// ---- similarity_lse -------------------------------------------------------------------------------------------------

enum class Mask { NONE, DIFFERENT, SAME, FAR_IDS, BIAS, LIMIT };
const char* const MASKS[] = {"none", "different", "same", "far ids", "bias", "limit"};

struct Case {
  int64_t groups, n, m, d;
  DType dtype;
  bool itself;
  Mask mask;
  double scale, length;  // of the features
  bool poisoned;         // one feature is NaN, one infinite
};

// The problem and its solution. `slack` of a sum is the sum of the absolute values of its terms.
struct Problem {
  Case c;
  std::vector<double> q, k, bias, limit;
  std::vector<int64_t> q_ids, k_ids;
  std::vector<float> bias32, limit32, g, h;
  std::vector<double> s;
  std::vector<double> row, col, best_row, best_col, mean, mean_slack;
  double largest = 0;  // |s| that may arise on the way to some s

  explicit Problem(const Case& shape);
  bool counts(int64_t group, int64_t i, int64_t j) const;
  Similarity arguments(Numbers& q_memory, Numbers& k_memory, int threads, float* kept = nullptr,
                       int64_t kept_rows = 0) const;
};

double log_sum_exp(const double* s, int64_t count, int64_t step) {
  double most = -INF, sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(s[i * step])) return s[i * step];
    most = std::max(most, s[i * step]);
  }
  if (std::isinf(most)) return most;
  for (int64_t i = 0; i < count; ++i) sum += std::exp(s[i * step] - most);
  return most + std::log(sum);
}

bool Problem::counts(int64_t group, int64_t i, int64_t j) const {
  if (c.itself && i == j) return false;
  if (q_ids.empty()) return true;
  const int64_t other = c.itself ? q_ids[group * c.n + j] : k_ids[group * c.m + j];
  return (q_ids[group * c.n + i] == other) == (c.mask == Mask::SAME);
}

Problem::Problem(const Case& shape) : c(shape) {
  const auto features = [&](int64_t rows) {
    std::vector<double> x(c.groups * rows * c.d);
    for (double& one : x) one = rounded(normal() * c.length / std::sqrt(double(c.d)), c.dtype);
    for (int64_t i = 1; i < c.groups * rows; i += 7)  // some rows are there twice: their similarity stands out
      std::copy_n(x.begin() + (i - 1) * c.d, c.d, x.begin() + i * c.d);
    return x;
  };
  q = features(c.n);
  if (!c.itself) k = features(c.m);
  if (c.poisoned) q[q.size() / 2] = NAN;
  if (c.poisoned && !c.itself) k[0] = INF;
  if (c.itself) k = q;
  if (c.mask == Mask::DIFFERENT || c.mask == Mask::SAME || c.mask == Mask::FAR_IDS) {
    const int64_t kinds = c.n < 100 ? 4 : 2 * c.n, step = c.mask == Mask::FAR_IDS ? INT64_MAX / kinds : 1;
    for (int64_t i = 0; i < c.groups * c.n; ++i) q_ids.push_back(c.n < 100 ? below(kinds) : i % c.n);
    for (int64_t j = 0; j < c.groups * c.m; ++j) k_ids.push_back(c.n < 100 ? below(kinds) : j % c.m * 3 / 2);
    for (int64_t& id : q_ids) id = id * step - (step > 1 ? INT64_MAX / 2 : 0);
    for (int64_t& id : k_ids) id = id * step - (step > 1 ? INT64_MAX / 2 : 0);
  }
  if (c.mask == Mask::BIAS)
    for (int64_t j = 0; j < c.groups * c.m; ++j) bias32.push_back(j % 5 == 2 ? -float(INF) : float(normal()));
  for (int64_t i = 0; i < c.groups * c.n; ++i) g.push_back(float(normal()));
  for (int64_t j = 0; j < c.groups * c.m; ++j) h.push_back(float(normal()));

  s.resize(c.groups * c.n * c.m);
  for (int64_t group = 0; group < c.groups; ++group)
    for (int64_t i = 0; i < c.n; ++i)
      for (int64_t j = 0; j < c.m; ++j) {
        const double *x = &q[(group * c.n + i) * c.d], *y = &k[(group * c.m + j) * c.d];
        double dot = 0, slack = 0;
        for (int64_t f = 0; f < c.d; ++f) dot += x[f] * y[f], slack += std::fabs(x[f] * y[f]);
        const double more = bias32.empty() ? 0 : bias32[group * c.m + j];
        s[(group * c.n + i) * c.m + j] = counts(group, i, j) ? float(c.scale) * dot + more : -INF;
        slack = std::fabs(c.scale) * slack + (std::isinf(more) ? 0 : std::fabs(more));
        if (std::isfinite(slack)) largest = std::max(largest, slack);
      }
  if (c.mask == Mask::LIMIT)
    for (int64_t i = 0; i < c.groups * c.n; ++i) {  // in a wide gap, that rounding does not cross
      std::vector<double> sorted(s.begin() + i * c.m, s.begin() + (i + 1) * c.m);
      std::sort(sorted.begin(), sorted.end());
      double limit = -1e9, widest = 0;
      for (int64_t j = c.m / 2; j + 1 < c.m; ++j)
        if (std::isfinite(sorted[j]) && sorted[j + 1] - sorted[j] > widest) {
          widest = sorted[j + 1] - sorted[j];
          limit = (sorted[j] + sorted[j + 1]) / 2;
        }
      limit32.push_back(float(limit));
      for (int64_t j = 0; j < c.m; ++j)
        if (s[i * c.m + j] > limit32.back()) s[i * c.m + j] = -INF;
    }
  for (int64_t group = 0; group < c.groups; ++group) {
    const double* tile = s.data() + group * c.n * c.m;
    for (int64_t i = 0; i < c.n; ++i) {
      row.push_back(log_sum_exp(tile + i * c.m, c.m, 1));
      best_row.push_back(c.m == 0 ? -INF : *std::max_element(tile + i * c.m, tile + (i + 1) * c.m));
    }
    for (int64_t j = 0; j < c.m; ++j) {
      col.push_back(log_sum_exp(tile + j, c.n, c.m));
      double most = -INF;
      for (int64_t i = 0; i < c.n; ++i) most = std::max(most, tile[i * c.m + j]);
      best_col.push_back(most);
    }
  }
}

Similarity Problem::arguments(Numbers& q_memory, Numbers& k_memory, int threads, float* kept, int64_t kept_rows) const {
  const auto optional = [](const auto& array) { return array.empty() ? nullptr : array.data(); };
  Similarity p{};
  p.dtype = c.dtype;
  p.groups = c.groups;
  p.n = c.n;
  p.m = c.m;
  p.d = c.d;
  p.q = q_memory.data();
  p.k = c.itself ? nullptr : k_memory.data();
  p.scale = float(c.scale);
  p.q_ids = optional(q_ids);
  p.k_ids = c.itself ? nullptr : optional(k_ids);
  p.same = c.mask == Mask::SAME;
  p.k_bias = optional(bias32);
  p.q_limit = optional(limit32);
  p.kept = kept;
  p.kept_rows = kept_rows;
  p.threads = threads;
  return p;
}

// The gradients of sum_i g_i row_i + sum_j h_j col_j by plain formulas.
struct Gradients {
  std::vector<double> q, q_slack, k, k_slack, bias, bias_slack;
  double scale = 0, scale_slack = 0;

  Gradients(const Problem& p, bool rows, bool columns) {
    const auto [groups, n, m, d] = std::array<int64_t, 4>{p.c.groups, p.c.n, p.c.m, p.c.d};
    q.resize(groups * n * d), q_slack = q;
    k.resize(groups * m * d), k_slack = k;
    bias.resize(groups * m), bias_slack = bias;
    for (int64_t i = 0; i < groups * n; ++i)
      for (int64_t j = i / n * m; j < i / n * m + m; ++j) {
        const double s = p.s[i * m + j % m];
        if (s == -INF) continue;
        const double by_row = rows ? p.g[i] * std::exp(s - p.row[i]) : 0,
                     by_col = columns ? p.h[j] * std::exp(s - p.col[j]) : 0;
        const double w = by_row + by_col, slack = std::fabs(by_row) + std::fabs(by_col);
        bias[j] += w, bias_slack[j] += slack;
        for (int64_t f = 0; f < d; ++f) {
          const double x = p.q[i * d + f], y = p.k[j * d + f];
          q[i * d + f] += w * y, q_slack[i * d + f] += slack * std::fabs(y);
          k[j * d + f] += w * x, k_slack[j * d + f] += slack * std::fabs(x);
          scale += w * x * y, scale_slack += slack * std::fabs(x * y);
        }
      }
    for (size_t at = 0; p.c.itself && at < q.size(); ++at) q[at] += k[at], q_slack[at] += k_slack[at];
    for (auto* gradient : {&q, &q_slack, &k, &k_slack})
      for (double& one : *gradient) one *= gradient == &q || gradient == &k ? p.c.scale : std::fabs(p.c.scale);
  }
};

// Empty where the results agree, else a sentence. An error may be tolerance * slack; without slack, tolerance.
std::string difference(const char* name, const std::vector<float>& got, const std::vector<double>& want,
                       const std::vector<double>* slack, double tolerance) {
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::fabs(got[i] - want[i]),
                 allowed = slack == nullptr ? tolerance : tolerance * (*slack)[i] + 1e-15;
    const bool same_class = std::isnan(want[i])   ? !std::isfinite(got[i])
                            : std::isinf(want[i]) ? got[i] == want[i]
                                                  : error <= allowed;
    if (same_class) continue;
    char text[200];
    snprintf(text, sizeof text, "%s[%zu] is %.9g, not %.9g; allowed %.3g", name, i, double(got[i]), want[i], allowed);
    return text;
  }
  return "";
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * 4) == 0);
}

// Calls run(threads), which returns all its results, with 1, 2 (unless brief) and 3 threads: those of one thread, or ""
// and a failure.
template <class Run>
std::vector<std::vector<float>> for_threads(const Run& run, std::string& problem) {
  const auto results = run(1);
  for (int threads = brief ? 3 : 2; threads <= 3; ++threads) {
    const auto more = run(threads);
    for (size_t i = 0; i < results.size(); ++i)
      if (!same_bits(results[i], more[i]) && problem.empty())
        problem = "result " + std::to_string(i) + " has other bits with " + std::to_string(threads) + " threads";
  }
  return results;
}

void report(const Kernels& kernels, const Case& c, const std::string& call, const std::string& problem) {
  char text[300];
  snprintf(text, sizeof text,
           "%s %s, groups %ld, n %ld, m %ld, d %ld, dtype %d, itself %d, mask %s, scale %g, length %g", kernels.name,
           call.c_str(), long(c.groups), long(c.n), long(c.m), long(c.d), int(c.dtype), c.itself, MASKS[int(c.mask)],
           c.scale, c.length);
  count_result(text, problem);
}

void test_forward(const Kernels& kernels, const Problem& p, double tolerance) {
  const Case& c = p.c;
  Numbers q(c.dtype, p.q), k(c.dtype, p.k);
  for (const bool columns : {false, true}) {
    if (columns && c.itself) continue;
    std::string problem;
    const int64_t per_group = c.n + (columns ? c.m : 0);
    const auto results = for_threads(
        [&](int threads) {
          std::vector<float> row(c.groups * c.n, NAN32), col(columns ? c.groups * c.m : 0, NAN32),
              best(c.groups * per_group, NAN32);
          float nothing;  // an empty vector has no address, and null means that the result is not wanted
          kernels.similarity_lse_fwd(p.arguments(q, k, threads), row.data(),
                                     !columns      ? nullptr
                                     : col.empty() ? &nothing
                                                   : col.data(),
                                     best.empty() ? nullptr : best.data());
          return std::vector<std::vector<float>>{row, col, best};
        },
        problem);
    if (problem.empty()) problem = difference("row", results[0], p.row, nullptr, tolerance);
    if (problem.empty() && columns) problem = difference("col", results[1], p.col, nullptr, tolerance);
    std::vector<double> best;
    for (int64_t group = 0; group < c.groups; ++group) {
      best.insert(best.end(), p.best_row.begin() + group * c.n, p.best_row.begin() + (group + 1) * c.n);
      if (columns) best.insert(best.end(), p.best_col.begin() + group * c.m, p.best_col.begin() + (group + 1) * c.m);
    }
    if (problem.empty() && !c.poisoned) problem = difference("best", results[2], best, nullptr, tolerance);
    report(kernels, c, columns ? "similarity_lse_fwd with columns" : "similarity_lse_fwd", problem);
  }
}

void test_frozen(const Kernels& kernels, const Problem& p, double tolerance, double product_tolerance) {
  const Case& c = p.c;
  if (c.itself || c.poisoned) return;
  Numbers q(c.dtype, p.q), k(c.dtype, p.k);
  std::vector<double> mean(c.groups * c.n * c.d), slack(mean);
  for (int64_t i = 0; i < c.groups * c.n; ++i)
    for (int64_t j = 0; j < c.m; ++j) {
      const double w = p.s[i * c.m + j] == -INF ? 0 : std::exp(p.s[i * c.m + j] - p.row[i]);
      for (int64_t f = 0; w > 0 && f < c.d; ++f) {
        const double y = p.k[(i / c.n * c.m + j) * c.d + f];
        mean[i * c.d + f] += w * y, slack[i * c.d + f] += w * std::fabs(y);
      }
    }
  std::string problem;
  const auto results = for_threads(
      [&](int threads) {
        std::vector<float> row(c.groups * c.n, NAN32), mean(c.groups * c.n * c.d, NAN32), best(c.groups * c.n, NAN32);
        kernels.similarity_lse_frozen_fwd(p.arguments(q, k, threads), row.data(), mean.data(),
                                          best.empty() ? nullptr : best.data());
        return std::vector<std::vector<float>>{row, mean, best};
      },
      problem);
  if (problem.empty()) problem = difference("row", results[0], p.row, nullptr, tolerance);
  if (problem.empty()) problem = difference("mean", results[1], mean, &slack, product_tolerance);
  if (problem.empty()) problem = difference("best", results[2], p.best_row, nullptr, tolerance);
  report(kernels, c, "similarity_lse_frozen_fwd", problem);
}

void test_backward(const Kernels& kernels, const Problem& p, const Gradients& want, bool rows, bool columns,
                   double tolerance, double product_tolerance) {
  const Case& c = p.c;
  Numbers q(c.dtype, p.q), k(c.dtype, p.k);
  std::vector<float> row(p.row.begin(), p.row.end()), col(p.col.begin(), p.col.end()), g = p.g, h = p.h;
  for (size_t i = 0; i < row.size(); ++i)
    if (std::isinf(row[i])) g[i] = NAN32;  // what arrives at an empty row must not matter
  for (size_t j = 0; j < col.size(); ++j)
    if (std::isinf(col[j])) h[j] = NAN32;
  for (int wanted = 1; wanted < 4; ++wanted) {
    const bool need_q = wanted & 1, need_k = !c.itself && (wanted & 2);
    if (c.itself && wanted != 3) continue;
    std::string problem;
    const auto results = for_threads(
        [&](int threads) {
          const auto sized = [](bool needed, int64_t count) { return std::vector<float>(needed ? count : 0, NAN32); };
          auto dq = sized(need_q, c.groups * c.n * c.d), dk = sized(need_k, c.groups * c.m * c.d),
               dscale = sized(true, 1);
          auto dbias = sized(!p.bias32.empty(), c.groups * c.m);
          const auto at = [](auto& array) { return array.empty() ? nullptr : array.data(); };
          const auto run = [&](float* kept, int64_t kept_rows) {
            kernels.similarity_lse_bwd(p.arguments(q, k, threads, kept, kept_rows), rows ? row.data() : nullptr,
                                       columns ? col.data() : nullptr, rows ? g.data() : nullptr,
                                       columns ? h.data() : nullptr, at(dq), at(dk), at(dscale), at(dbias));
            return std::vector<std::vector<float>>{dq, dk, dscale, dbias};
          };
          const auto results = run(nullptr, 0);
          const int64_t shares[] = {c.n, c.n / 2};
          for (const int64_t kept_rows : shares) {
            if (wanted != 3 || p.s.empty()) break;
            std::vector<float> kept(c.groups * kept_rows * c.m + 1, NAN32), to_row(row.size()), to_col(col.size());
            kernels.similarity_lse_fwd(p.arguments(q, k, threads, kept.data(), kept_rows), to_row.data(),
                                       columns ? to_col.data() : nullptr, nullptr);
            const auto recalled = run(kept.data(), kept_rows);
            for (size_t i = 0; i < results.size(); ++i)
              if (!same_bits(results[i], recalled[i])) problem = "other bits from what the forward kept";
          }
          return results;
        },
        problem);
    const std::vector<double> scale_slack = {want.scale_slack};
    if (problem.empty() && need_q) problem = difference("dq", results[0], want.q, &want.q_slack, product_tolerance);
    if (problem.empty() && need_k) problem = difference("dk", results[1], want.k, &want.k_slack, product_tolerance);
    if (problem.empty()) problem = difference("dscale", results[2], {want.scale}, &scale_slack, product_tolerance);
    if (problem.empty() && !p.bias32.empty())
      problem = difference("dbias", results[3], want.bias, &want.bias_slack, tolerance);
    report(kernels, c,
           std::string("similarity_lse_bwd") + (rows ? " rows" : "") + (columns ? " columns" : "") +
               (need_q ? " dq" : "") + (need_k ? " dk" : ""),
           problem);
  }
}

void test_topk(const Kernels& kernels, const Problem& p, int64_t count, double tolerance) {
  const Case& c = p.c;
  Numbers q(c.dtype, p.q), k(c.dtype, p.k);
  std::string problem;
  const auto results = for_threads(
      [&](int threads) {
        std::vector<float> values(c.groups * c.n * count, NAN32);
        std::vector<int64_t> indices(values.size(), -2);
        kernels.similarity_topk(p.arguments(q, k, threads), count, values.data(), indices.data());
        return std::vector<std::vector<float>>{values, std::vector<float>(indices.begin(), indices.end())};
      },
      problem);
  std::vector<double> best, there;  // the best scores, and the scores in the places named
  for (int64_t i = 0; i < c.groups * c.n; ++i) {
    std::vector<double> s(p.s.begin() + i * c.m, p.s.begin() + (i + 1) * c.m);
    for (double& one : s) one = std::isnan(one) ? -INF : one;
    const auto named = [&](int64_t t) { return int64_t(results[1][i * count + t]); };
    for (int64_t t = 0; t < count; ++t) {
      there.push_back(named(t) < 0 ? -INF : s[named(t)]);
      for (int64_t before = 0; before < t && named(t) >= 0 && problem.empty(); ++before)
        if (named(before) == named(t)) problem = "a place is named twice";
      if (t > 0 && results[0][i * count + t - 1] == results[0][i * count + t] && named(t) >= 0 &&
          named(t - 1) > named(t))
        problem = "of equal scores the lower place does not come first";
    }
    std::sort(s.begin(), s.end(), std::greater<double>());
    s.resize(count, -INF);
    best.insert(best.end(), s.begin(), s.end());
  }
  if (problem.empty()) problem = difference("values", results[0], best, nullptr, tolerance);
  if (problem.empty()) problem = difference("scores in those places", results[0], there, nullptr, tolerance);
  report(kernels, c, "similarity_topk of " + std::to_string(count), problem);
}

// bias and weights of the rows are g, in order and reversed: both signs, all sizes.
void test_softplus(const Kernels& kernels, const Problem& p, float sign, double tolerance, double product_tolerance) {
  const Case& c = p.c;
  if (c.poisoned) return;
  const std::vector<float>&bias = p.g, weight(p.g.rbegin(), p.g.rend());
  const auto zeros = [](int64_t count) { return std::vector<double>(count); };
  auto total = zeros(c.groups), scale = total, row = zeros(c.groups * c.n), d_bias = row,
       k_bias = zeros(c.groups * c.m), dq = zeros(row.size() * c.d), dk = zeros(k_bias.size() * c.d);
  auto total_slack = total, scale_slack = scale, row_slack = row, d_bias_slack = row, k_bias_slack = k_bias,
       dq_slack = dq, dk_slack = dk;
  const double factor = float(c.scale);
  for (int64_t i = 0; i < c.groups * c.n; ++i)
    for (int64_t j = i / c.n * c.m; j < i / c.n * c.m + c.m; ++j) {
      const double s = p.s[i * c.m + j % c.m], t = sign * (s + bias[i]), e = std::exp(-std::fabs(t));
      if (s == -INF) continue;
      const double value = std::max(t, 0.) + std::log1p(e), w = weight[i] * sign * (t > 0 ? 1 : e) / (1 + e);
      const auto add = [](double x, double slack, double& to, double& to_slack) {
        to += x, to_slack += std::fabs(slack);
      };
      add(value, value + 1, row[i], row_slack[i]);
      add(weight[i] * value, weight[i] * (value + 1), total[i / c.n], total_slack[i / c.n]);
      add(w, w, d_bias[i], d_bias_slack[i]);
      add(w, w, k_bias[j], k_bias_slack[j]);
      for (int64_t f = 0; f < c.d; ++f) {
        const double x = p.q[i * c.d + f], y = p.k[j * c.d + f];
        add(factor * w * y, factor * w * y, dq[i * c.d + f], dq_slack[i * c.d + f]);
        add(factor * w * x, factor * w * x, c.itself ? dq[j * c.d + f] : dk[j * c.d + f],
            c.itself ? dq_slack[j * c.d + f] : dk_slack[j * c.d + f]);
        add(w * x * y, w * x * y, scale[i / c.n], scale_slack[i / c.n]);
      }
    }
  Numbers q(c.dtype, p.q), k(c.dtype, p.k);
  for (int wanted = c.itself ? 2 : 0; wanted < 4; ++wanted) {  // bits: dk, dq and the others
    const bool need_q = wanted & 2, need_k = !c.itself && (wanted & 1);
    std::string problem;
    const auto results = for_threads(
        [&](int threads) {
          const auto sized = [](bool needed, size_t count) { return std::vector<float>(needed ? count : 0, NAN32); };
          const auto at = [](auto& array) { return array.empty() ? nullptr : array.data(); };
          std::vector<std::vector<float>> to = {sized(true, total.size()),
                                                sized(true, row.size()),
                                                sized(need_q, dq.size()),
                                                sized(need_k, dk.size()),
                                                sized(need_q, scale.size()),
                                                sized(need_q, row.size()),
                                                sized(!p.bias32.empty() && need_q, k_bias.size())};
          kernels.similarity_softplus(p.arguments(q, k, threads), bias.data(), weight.data(), sign, at(to[0]),
                                      at(to[1]), {at(to[2]), at(to[3]), at(to[4]), at(to[5]), at(to[6])});
          return to;
        },
        problem);
    const std::vector<double>* const want[] = {&total, &row, &dq, &dk, &scale, &d_bias, &k_bias};
    const std::vector<double>* const slack[] = {&total_slack, &row_slack,    &dq_slack,    &dk_slack,
                                                &scale_slack, &d_bias_slack, &k_bias_slack};
    const char* const names[] = {"total", "row", "dq", "dk", "dscale", "dbias", "dk_bias"};
    for (int r = 0; r < 7; ++r)
      if (problem.empty() && !results[r].empty())
        problem =
            difference(names[r], results[r], *want[r], slack[r], r == 2 || r == 3 ? product_tolerance : tolerance);
    report(kernels, c, sign > 0 ? "similarity_softplus" : "similarity_softplus with sign -1", problem);
  }
}

void test_similarity(const Case& c) {
  const Problem p(c);
  std::vector<std::pair<bool, bool>> sides;  // of the backward: rows, columns
  if (!c.poisoned) sides = {{true, false}};
  if (!c.poisoned && !c.itself) sides.insert(sides.end(), {{true, true}, {false, true}});
  std::vector<Gradients> gradients;
  for (const auto& [rows, columns] : sides) gradients.emplace_back(p, rows, columns);
  // e^s turns an absolute error of s, and of the log-sum-exp it is compared with, into a relative one of the weight.
  const double tolerance = ULP * (16 + (2 + std::sqrt(double(c.d))) * p.largest);
  for (const Kernels* const* one = all_kernels(); *one != nullptr; ++one) {
    const std::string name = (*one)->name;
    const bool rounds_weights = c.dtype == DType::BF16 && (name == "avx512_bf16" || name.rfind("amx", 0) == 0);
    const double product_tolerance =
        2 * tolerance + (rounds_weights ? 0x1.1p-8 : 0) + ULP * std::sqrt(double(c.n + c.m));
    test_forward(**one, p, tolerance);
    test_frozen(**one, p, tolerance, product_tolerance);
    for (const int64_t count : {1, 100}) test_topk(**one, p, count, tolerance);
    for (const float sign : {1.f, -1.f}) test_softplus(**one, p, sign, 2 * tolerance, product_tolerance);
    for (size_t i = 0; i < sides.size(); ++i)
      test_backward(**one, p, gradients[i], sides[i].first, sides[i].second, 2 * tolerance, product_tolerance);
  }
}

// ---- unit_pairs -----------------------------------------------------------------------------------------------------

void test_unit_pairs(DType dtype, int64_t n, int64_t d, bool normalize) {
  const double ulp = std::ldexp(1., -format(dtype).fraction);
  const Case c = {1, n, n, d, dtype, false, Mask::NONE, 1, 3, false};
  const auto numbers = [](int64_t count, DType type) {
    std::vector<double> x(count);
    for (double& one : x) one = rounded(3 * normal(), type);
    return x;
  };
  std::vector<double> xy = numbers(2 * n * d, dtype), unit(xy), unit_slack(xy), norm(2 * n, 1);
  const std::vector<double> pull = numbers(n, DType::F32), upstream = numbers(2 * n * d, DType::F32);
  if (n > 1 && normalize) std::fill_n(xy.begin() + d, d, 0.);  // a row without a direction
  for (int64_t i = 0; i < 2 * n; ++i) {
    double squares = 0;
    for (int64_t f = 0; f < d; ++f) squares += xy[i * d + f] * xy[i * d + f];
    // What is too short has a gradient of 0 in fp16, where it would else be infinite.
    const double shortest = dtype == DType::FP16 ? double(INF) : 1e-12, length = std::sqrt(squares);
    if (normalize) norm[i] = float(length < 1e-12 ? shortest : length);
    for (int64_t f = 0; f < d; ++f) {
      unit[i * d + f] = rounded(xy[i * d + f] / norm[i], dtype);
      unit_slack[i * d + f] = std::fabs(unit[i * d + f]) + ulp;
    }
  }
  std::vector<double> cosine(n), cosine_slack(n), grad(2 * n * d), grad_slack(grad);
  for (int64_t i = 0; i < 2 * n; ++i) {
    const double* const other = &unit[(i + n) % (2 * n) * d];
    double along = 0, along_slack = 0;
    for (int64_t f = 0; f < d; ++f) {
      const double u = unit[i * d + f], du = upstream[i * d + f] - pull[i % n] * other[f];
      along += normalize ? u * du : 0, along_slack += normalize ? std::fabs(u * du) : 0;
      if (i < n) cosine[i] += u * other[f], cosine_slack[i] += unit_slack[i * d + f] * (std::fabs(other[f]) + ulp);
    }
    for (int64_t f = 0; f < d; ++f) {
      const double u = unit[i * d + f], pulled = pull[i % n] * other[f];
      grad[i * d + f] = rounded((upstream[i * d + f] - pulled - along * u) / norm[i], dtype);
      grad_slack[i * d + f] =
          (std::fabs(upstream[i * d + f]) + std::fabs(pulled) + along_slack * std::fabs(u)) / norm[i];
    }
  }
  const auto floats = [](const std::vector<double>& of) { return std::vector<float>(of.begin(), of.end()); };
  const auto half = [&](const std::vector<double>& of, int which) {
    return std::vector<double>(of.begin() + which * n * d, of.begin() + (which + 1) * n * d);
  };
  const std::vector<double> slacks[] = {half(grad_slack, 0), half(grad_slack, 1)};
  const std::vector<float> norm32 = floats(norm), pull32 = floats(pull), upstream32 = floats(upstream);
  Numbers x(dtype, half(xy, 0)), y(dtype, half(xy, 1)), units(dtype, unit);
  const double noise = ULP * (4 + std::sqrt(double(d)));
  for (const Kernels* const* one = all_kernels(); *one != nullptr; ++one) {
    std::string problem;
    const auto results = for_threads(
        [&](int threads) {
          Numbers z(dtype, upstream), dx(dtype, half(upstream, 0)), dy(dtype, half(upstream, 1));
          std::vector<float> lengths(2 * n, 1), dots(n, NAN32);
          (*one)->unit_pairs_fwd(dtype, n, d, x.data(), y.data(), z.data(), normalize ? lengths.data() : nullptr,
                                 dots.data(), threads);
          (*one)->unit_pairs_bwd(dtype, n, d, units.data(), normalize ? norm32.data() : nullptr, pull32.data(),
                                 upstream32.data(), upstream32.data() + n * d, dx.data(), dy.data(), threads);
          return std::vector<std::vector<float>>{z.values(), lengths, dots, dx.values(), dy.values()};
        },
        problem);
    // Before it is rounded to its type a number may be off by noise, and so come out as a neighbour.
    if (problem.empty()) problem = difference("z", results[0], unit, &unit_slack, ulp + noise);
    if (problem.empty()) problem = difference("norm", results[1], norm, &norm, noise);
    if (problem.empty()) problem = difference("cosine", results[2], cosine, &cosine_slack, 2 * ulp + noise);
    if (problem.empty()) problem = difference("dx", results[3], half(grad, 0), &slacks[0], ulp + 2 * noise);
    if (problem.empty()) problem = difference("dy", results[4], half(grad, 1), &slacks[1], ulp + 2 * noise);
    report(**one, c, normalize ? "unit_pairs" : "unit_pairs as they are", problem);
  }
}

// ---- queue_push -----------------------------------------------------------------------------------------------------

void test_queue(DType queue_type, DType keys_type, int64_t size, int64_t dim, int64_t batch, int64_t start) {
  const double awkward[] = {0,        -0.,  1 / 3.,     65504,      65519.99, -65520, 1e-8, 2.98e-8,
                            2.981e-8, 6e-5, 1.00390625, 1.01171875, INF,      -INF,   NAN};
  std::vector<double> old(size * dim), keys(batch * dim);
  for (double& x : old) x = rounded(normal(), queue_type);
  for (double& x : keys) x = rounded(below(4) ? normal() : awkward[below(15)], keys_type);
  std::vector<double> after = old;
  for (int64_t i = 0; i < batch; ++i)
    for (int64_t f = 0; f < dim; ++f) after[(start + i) % size * dim + f] = keys[i * dim + f];
  Numbers want(queue_type, after);
  for (const Kernels* const* one = all_kernels(); *one != nullptr; ++one)
    for (int threads = 1; threads <= 3; ++threads) {
      Numbers queue(queue_type, old), from(keys_type, keys);
      int64_t ptr = start;
      (*one)->queue_push(queue_type, keys_type, size, dim, batch, queue.data(), &ptr, from.data(), false, threads);
      const bool same = memcmp(queue.data(), want.data(), size * dim * format(queue_type).bytes) == 0;
      char text[200];
      snprintf(text, sizeof text,
               "%s queue_push, types %d from %d, size %ld, dim %ld, batch %ld, start %ld, threads %d", (*one)->name,
               int(queue_type), int(keys_type), long(size), long(dim), long(batch), long(start), threads);
      count_result(text, ptr != (start + batch) % size ? "the pointer is wrong" : same ? "" : "the queue is wrong");
    }
}

void test_unit_queue(DType queue_type, DType keys_type, int64_t size, int64_t dim, int64_t batch, int64_t start) {
  std::vector<double> old(size * dim), keys(batch * dim);
  for (double& x : old) x = rounded(normal(), queue_type);
  for (double& x : keys) x = rounded(normal(), keys_type);
  std::vector<double> want = old;
  for (int64_t i = 0; i < batch; ++i) {
    double squares = 0;
    for (int64_t f = 0; f < dim; ++f) squares += keys[i * dim + f] * keys[i * dim + f];
    for (int64_t f = 0; f < dim; ++f) want[(start + i) % size * dim + f] = keys[i * dim + f] / std::sqrt(squares);
  }
  const double tolerance = queue_type == DType::F32 ? 64 * ULP : queue_type == DType::BF16 ? 0x1p-8 : 0x1p-11;
  for (const Kernels* const* one = all_kernels(); *one != nullptr; ++one) {
    std::string problem;
    const auto results = for_threads(
        [&](int threads) {
          Numbers queue(queue_type, old), from(keys_type, keys);
          int64_t ptr = start;
          (*one)->queue_push(queue_type, keys_type, size, dim, batch, queue.data(), &ptr, from.data(), true, threads);
          return std::vector<std::vector<float>>{queue.values()};
        },
        problem);
    if (problem.empty()) problem = difference("queue", results[0], want, nullptr, tolerance);
    count_result(std::string((*one)->name) + " queue_push, normalized", problem);
  }
}

// ---- sampled_similarity, bank_update --------------------------------------------------------------------------------

void test_sampled(DType dtype, int64_t groups, int64_t n, int64_t m, int64_t d, int64_t count) {
  std::vector<double> q(groups * n * d), k(groups * m * d);
  for (double& x : q) x = rounded(normal(), dtype);
  for (double& x : k) x = rounded(normal(), dtype);
  std::vector<int64_t> index(groups * n * count);
  for (int64_t& j : index) j = below(m);
  std::vector<float> g(index.size());
  for (float& x : g) x = float(normal());
  std::vector<double> out(index.size()), slack(index.size()), dq(q.size()), dk(k.size()), q_slack(q.size()),
      k_slack(k.size());
  for (int64_t i = 0; i < groups * n; ++i)
    for (int64_t t = i * count; t < (i + 1) * count; ++t)
      for (int64_t c = 0; c < d; ++c) {
        const int64_t at_q = i * d + c, at_k = (i / n * m + index[t]) * d + c;
        out[t] += q[at_q] * k[at_k];
        slack[t] += std::fabs(q[at_q] * k[at_k]);
        dq[at_q] += g[t] * k[at_k];
        q_slack[at_q] += std::fabs(g[t] * k[at_k]);
        dk[at_k] += g[t] * q[at_q];
        k_slack[at_k] += std::fabs(g[t] * q[at_q]);
      }
  Numbers q_memory(dtype, q), k_memory(dtype, k);
  const double exact = 64 * ULP, weights = dtype == DType::BF16 ? 0x1p-7 : exact;
  for (const Kernels* const* one = all_kernels(); *one != nullptr; ++one)
    for (const bool streams : {false, true}) {
      const Kernels& kernels = **one;
      std::string problem;
      const auto at = [&](int threads) {
        Similarity p{};
        p.dtype = dtype;
        p.groups = groups;
        p.n = n;
        p.m = m;
        p.d = d;
        p.q = q_memory.data();
        p.k = k_memory.data();
        p.scale = 1;
        p.threads = threads;
        return p;
      };
      const auto results = for_threads(
          [&](int threads) {
            std::vector<float> to(out.size(), NAN32), to_q(q.size(), NAN32), to_k(streams ? k.size() : 0, NAN32);
            if (!kernels.sampled_similarity_fwd(at(threads), count, index.data(), streams, to.data()) ||
                !kernels.sampled_similarity_bwd(at(threads), count, index.data(), streams, g.data(), to_q.data(),
                                                streams ? to_k.data() : nullptr))
              problem = "an index was refused";
            return std::vector<std::vector<float>>{to, to_q, to_k};
          },
          problem);
      if (problem.empty()) problem = difference("out", results[0], out, &slack, exact);
      if (problem.empty()) problem = difference("dq", results[1], dq, &q_slack, streams ? weights : exact);
      if (problem.empty() && streams) problem = difference("dk", results[2], dk, &k_slack, weights);
      const int64_t last = index.back();
      const int64_t outside[] = {-1, m, int64_t(1) << 62};
      for (const int64_t bad : outside) {
        index.back() = bad;
        std::vector<float> untouched(out.size(), 7.f);
        if (kernels.sampled_similarity_fwd(at(1), count, index.data(), streams, untouched.data()) ||
            untouched != std::vector<float>(out.size(), 7.f))
          problem = "an index outside was taken";
      }
      index.back() = last;
      count_result(std::string(kernels.name) + " sampled_similarity, " + (streams ? "streamed" : "gathered"), problem);
    }
}

void test_bank(DType bank_type, DType x_type, int64_t size, int64_t dim, int64_t batch, double momentum) {
  std::vector<double> old(size * dim), x(batch * dim);
  for (double& value : old) value = rounded(normal(), bank_type);
  for (double& value : x) value = rounded(normal(), x_type);
  std::vector<int64_t> index(batch);
  for (int64_t& i : index) i = below(size);
  std::vector<double> want = old;
  for (int64_t i = 0; i < batch; ++i) {
    double length = 0;
    for (int64_t c = 0; c < dim; ++c) {
      double& value = want[index[i] * dim + c];
      value = momentum * old[index[i] * dim + c] + (1 - momentum) * x[i * dim + c];
      length += value * value;
    }
    for (int64_t c = 0; c < dim; ++c) want[index[i] * dim + c] /= std::max(std::sqrt(length), 1e-12);
  }
  const double tolerance = bank_type == DType::F32 ? 64 * ULP : bank_type == DType::BF16 ? 0x1p-7 : 0x1p-10;
  for (const Kernels* const* one = all_kernels(); *one != nullptr; ++one) {
    std::string problem;
    const auto results = for_threads(
        [&](int threads) {
          Numbers bank(bank_type, old), from(x_type, x);
          if (!(*one)->bank_update(bank_type, x_type, size, dim, batch, bank.data(), index.data(), from.data(),
                                   float(momentum), threads))
            problem = "an index was refused";
          return std::vector<std::vector<float>>{bank.values()};
        },
        problem);
    if (problem.empty()) problem = difference("bank", results[0], want, nullptr, tolerance);
    count_result(std::string((*one)->name) + " bank_update", problem);
  }
}

}  // namespace

void count_result(const std::string& call, const std::string& problem) {
  problem.empty() ? ++passed : ++failed;
  if (!problem.empty()) printf("FAILED %s: %s\n", call.c_str(), problem.c_str());
}

// With an argument, as sanitizers run it, each shape and type meets one way of leaving pairs out in turn, not all. With
// one more, as CI runs it, there are fewer numbers of threads.
int main(int argc, char**) {
  const bool in_turn = argc > 1;
  brief = argc > 2;
  test_tiles();
  int turn = 0;
  const DType dtypes[] = {DType::F32, DType::BF16, DType::FP16};
  const Mask masks[] = {Mask::NONE, Mask::DIFFERENT, Mask::SAME, Mask::FAR_IDS, Mask::BIAS, Mask::LIMIT};
  // Nothing, one, few; one under and over the lengths from which there are more blocks, or a block is full; not square;
  // groups.
  const int64_t shapes[][4] = {{1, 0, 5, 3},     {1, 5, 0, 3},      {0, 4, 4, 4},    {1, 1, 1, 1},
                               {2, 2, 17, 3},    {3, 17, 2, 33},    {1, 33, 47, 1},  {1, 95, 97, 33},
                               {1, 191, 193, 3}, {1, 300, 40, 257}, {40, 9, 11, 16}, {2, 66, 130, 64}};
  for (const auto& [groups, n, m, d] : shapes)
    for (const DType dtype : dtypes) {
      ++turn;
      for (const Mask mask : masks)
        for (const bool itself : {false, true}) {
          if ((itself && n == 0) || (in_turn && mask != masks[(turn + 3 * itself) % 6])) continue;
          const double scales[] = {1, -2, 40, 0};
          test_similarity({groups, n, itself ? n : m, d, dtype, itself, mask, scales[below(4)], 1, false});
        }
    }
  for (const DType dtype : dtypes)
    for (const bool itself : {false, true}) {
      test_similarity(
          {1, 5, itself ? 5 : 3000, 3, dtype, itself, Mask::NONE, 1, 1, false});  // columns split and merged
      test_similarity(
          {1, 40, itself ? 40 : 50, 16, dtype, itself, Mask::NONE, 100, 1, false});  // e^-200 beside e^0 in a tile
      test_similarity({1, 40, itself ? 40 : 50, 16, dtype, itself, Mask::NONE, 1, 30, false});  // far from normalised
      test_similarity({1, 130, itself ? 130 : 50, 17, dtype, itself, Mask::DIFFERENT, 1, 1, true});
      if (in_turn && dtype != DType::F32) continue;
      test_similarity({1, 580, itself ? 580 : 390, 20, dtype, itself, Mask::DIFFERENT, 5, 1, false});  // full blocks
      test_similarity(
          {1, 97, itself ? 97 : 100, 600, dtype, itself, Mask::NONE, 5, 1, false});  // deeper than a packed block
    }
  for (const DType dtype : dtypes)
    for (const bool normalize : {true, false})
      for (const int64_t d : {1, 3, 33, 257})
        for (const int64_t n : {0, 1, 17, 300}) test_unit_pairs(dtype, n, d, normalize);
  for (const DType queue_type : dtypes)
    for (const DType keys_type : dtypes) {
      test_queue(queue_type, keys_type, 7, 5, 3, 0);
      test_unit_queue(queue_type, keys_type, 70, 33, 90, 6);
      test_queue(queue_type, keys_type, 7, 5, 4, 6);    // wraps
      test_queue(queue_type, keys_type, 7, 33, 24, 2);  // more than fits
      test_queue(queue_type, keys_type, 1, 1, 0, 0);
      test_queue(queue_type, keys_type, 700, 257, 300, 690);
    }
  for (const DType dtype : dtypes) {
    test_sampled(dtype, 1, 1, 1, 1, 1);
    test_sampled(dtype, 3, 17, 33, 5, 40);
    test_sampled(dtype, 1, 70, 400, 130, 37);
    if (!in_turn || dtype == DType::F32) test_sampled(dtype, 1, 300, 193, 33, 50);  // more than one part of queries
    for (const DType x_type : dtypes) {
      test_bank(dtype, x_type, 7, 5, 30, 0.5);  // the last of equal ones counts
      test_bank(dtype, x_type, 40, 33, 0, 0.5);
      test_bank(dtype, x_type, 700, 129, 600, 0.9);
    }
  }
  printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
