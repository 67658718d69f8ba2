// |tanh x| in plain arithmetic, so that loops vectorise on every processor and CPU and GPU agree.
#pragma once

#include <cmath>

#include "core/platform.h"

namespace fastcl {

// With 2|x| = k ln 2 + r, |r| <= ln 2 / 2:  expm1(2|x|) = 2^k expm1(r) + (2^k - 1)  and  tanh = expm1 / (expm1 + 2). For small x, k is 0
// and nothing cancels; expm1(r) is its Taylor polynomial, whose truncation is below a quarter of an ulp on this range.
FASTCL_HD float abs_tanh(float x) {
  float y = 2 * fabsf(x);
  y = y > 19.0f ? 19.0f : y;        // tanh(9.5) rounds to 1; a NaN passes
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer that sits in the low bits
  const float shifted = y * 1.44269504f + round;
  const float k = shifted - round;
  const float scale = bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23);
  float r = y - k * 0.693359375f;  // ln 2 in two parts: the first product is exact
  r = r + k * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * (r * r) + r;
  const float e = scale * p + (scale - 1);
  return e / (e + 2);
}

FASTCL_HD double abs_tanh(double x) {
  double y = 2 * fabs(x);
  y = y > 40.0 ? 40.0 : y;
  const double round = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = y * 1.4426950408889634 + round;
  const double k = shifted - round;
  const double scale = bit_cast<double>((bit_cast<uint64_t>(shifted) + 1023u) << 52);
  double r = y - k * 0.693147180369123816490;
  r = r - k * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r;
  const double e = scale * p + (scale - 1);
  return e / (e + 2);
}

}  // namespace fastcl
