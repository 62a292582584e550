// One batch enters the running statistics, and batches of several workers become one. The definitions are
// evenorm.updates.commit_ and evenorm.workers._merge; these are their copies for one call.

#include <cmath>

#include "engine.h"

namespace evenorm {

static double weight_of(const Update& update) {
  const bool cumulative = std::isnan(update.momentum);
  if (!cumulative && (!update.debias || update.momentum == 1)) return update.momentum;
  if (update.batches == nullptr) return 0;
  const double batches = double(*update.batches) + 1;  // with this one
  if (cumulative) return 1 / batches;
  const double before = -std::expm1((batches - 1) * std::log1p(-update.momentum));  // what all batches before this one weigh
  return update.momentum / (update.momentum + (1 - update.momentum) * before);  // 1 for the first, exactly
}

struct Pooled {
  double mean, m2;
};

// Where a merge starts: any number will do, but from an infinite one no other mean has a distance.
static double finite_start(double mean) { return std::isfinite(mean) ? mean : 0; }

// Chan's rule over the groups of a channel, from the largest group's mean so that equal means merge to themselves, whoever is empty.
static Pooled pooled(const Update& update, int64_t c, double count) {
  if (update.groups == 1) return {read(update.mean, 0, c), read(update.m2, 0, c)};
  int64_t largest = 0;
  for (int64_t g = 1; g < update.groups; ++g) {
    if (read(update.count, g, 0) > read(update.count, largest, 0)) largest = g;
  }
  const double start = finite_start(read(update.mean, largest, c));
  double step = 0, m2 = 0;
  for (int64_t g = 0; g < update.groups; ++g) step += read(update.count, g, 0) * (read(update.mean, g, c) - start);
  const double mean = start + step / count;
  for (int64_t g = 0; g < update.groups; ++g) {
    const double away = read(update.mean, g, c) - mean;
    m2 += read(update.m2, g, c) + read(update.count, g, 0) * away * away;
  }
  return {mean, m2};
}

// From here on a number is no longer finite when it is stored: a float16 buffer overflows where a double does not.
static double overflow_of(Type type) {
  switch (type) {
    case Type::float64: return HUGE_VAL;
    case Type::float16: return 65520.0;
    case Type::bfloat16: return 0x1.ffp127;
    case Type::float32: return 0x1.ffffffp127;
  }
  return 0;
}

// Some channels at a time, so that their types are asked for once and the arithmetic is done in vectors.
constexpr int64_t block = 128;

template <class T>
static void widen_all(const T* from, int64_t stride, int64_t count, double* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = double(from[i * stride]);
}

static void load(const Values& from, int64_t first, int64_t count, double* to) {
  const int64_t stride = from.channel_stride;
  switch (from.type) {
    case Type::float32: return widen_all(static_cast<const float*>(from.data) + first * stride, stride, count, to);
    case Type::float64: return widen_all(static_cast<const double*>(from.data) + first * stride, stride, count, to);
    default:
      for (int64_t i = 0; i < count; ++i) to[i] = read(from, 0, first + i);
  }
}

struct Block {
  double mean[block], var[block];
};

// What the batch brings: the mean and the unbiased variance of each channel.
static void load_batch(const Update& update, int64_t first, int64_t size, double count, Block& batch) {
  if (update.groups == 1) {
    load(update.mean, first, size, batch.mean);
    load(update.m2, first, size, batch.var);
  } else {
    for (int64_t i = 0; i < size; ++i) {
      const Pooled all = pooled(update, first + i, count);
      batch.mean[i] = all.mean;
      batch.var[i] = all.m2;
    }
  }
  for (int64_t i = 0; i < size; ++i) batch.var[i] /= count - 1;
}

// Returns how many of the channels had to be left out.
static int64_t track_block(const Update& update, int64_t first, int64_t size, double count, double weight) {
  Block batch, now;
  load_batch(update, first, size, count, batch);
  load(update.running_mean, first, size, now.mean);
  load(update.running_var, first, size, now.var);
  for (int64_t i = 0; i < size; ++i) {  // not now + weight * (batch - now), which a weight of 1 does not make batch
    now.mean[i] = (1 - weight) * now.mean[i] + weight * batch.mean[i];
    now.var[i] = (1 - weight) * now.var[i] + weight * batch.var[i];
  }
  const double mean_overflow = overflow_of(update.running_mean.type), var_overflow = overflow_of(update.running_var.type);
  bool finite[block];
  int64_t taken = 0;
  for (int64_t i = 0; i < size; ++i) {
    finite[i] = (std::fabs(now.mean[i]) < mean_overflow) & (std::fabs(now.var[i]) < var_overflow);
    taken += finite[i];
  }
  if (taken == size || !update.skip_nonfinite) {
    write(update.running_mean, first, size, now.mean);
    write(update.running_var, first, size, now.var);
    return 0;
  }
  for (int64_t i = 0; i < size; ++i) {
    if (!finite[i]) continue;
    write(update.running_mean, first + i, 1, now.mean + i);
    write(update.running_var, first + i, 1, now.var + i);
  }
  return size - taken;
}

void track(const Update& update) {
  double count = 0;
  for (int64_t g = 0; g < update.groups; ++g) count += read(update.count, g, 0);
  if (!(count > 1)) return;  // one value has no unbiased variance
  const double weight = weight_of(update);
  int64_t skipped = 0;
  for (int64_t first = 0; first < update.channels; first += block) {
    const int64_t size = update.channels - first < block ? update.channels - first : block;
    skipped += track_block(update, first, size, count, weight);
  }
  // A batch that no channel took does not count.
  if (update.batches != nullptr && skipped < update.channels) *update.batches += 1;
  if (update.skipped != nullptr && skipped > 0) *update.skipped += 1;
}

// Chan's rule, from the largest row's mean and in the order of rows, so that whoever has the same rows gets the same bits.
void merge(const double* rows, int64_t row_count, int64_t channels, double* count, double* mean, double* m2) {
  const int64_t row = 2 * channels + 1;
  int64_t largest = 0;
  *count = 0;
  for (int64_t r = 0; r < row_count; ++r) {
    *count += rows[r * row];
    if (rows[r * row] > rows[largest * row]) largest = r;
  }
  const double divisor = *count > 1 ? *count : 1, *start = rows + largest * row + 1;
  for (int64_t c = 0; c < channels; ++c) mean[c] = m2[c] = 0;
  for (int64_t r = 0; r < row_count; ++r) {
    const double own = rows[r * row], *own_mean = rows + r * row + 1;
    for (int64_t c = 0; c < channels; ++c) mean[c] += own * (own_mean[c] - finite_start(start[c]));
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] = start[c] + mean[c] / divisor;  // infinite where the largest's is
  for (int64_t r = 0; r < row_count; ++r) {
    const double own = rows[r * row], *own_mean = rows + r * row + 1, *own_m2 = own_mean + channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double away = own_mean[c] - mean[c];
      m2[c] += own_m2[c] + own * away * away;
    }
  }
}

void mean_of_sums(const double* rows, int64_t row_count, int64_t numbers, double count, double* means) {
  const double divisor = count > 1 ? count : 1;
  for (int64_t i = 0; i < numbers; ++i) {
    double sum = rows[i];
    for (int64_t r = 1; r < row_count; ++r) sum += rows[r * numbers + i];
    means[i] = sum / divisor;
  }
}

}  // namespace evenorm
