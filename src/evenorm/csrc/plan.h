// How one operation is cut into units of work, and in which order their sums are added.
//
// A chunk is a run of samples or positions, a column a run of channels (one channel in planes); a unit is one of each, in one
// group. A panel is one column or, of short channels, some: what is computed once per channel is computed for a panel. All of them
// depend on the shape alone, and the sums of a channel's chunks are added in their order: the bits are the same for any number of
// threads. Which thread does which unit changes no sum.
#pragma once

#include <cstdlib>
#include <cstring>

#include "blocks.h"
#include "engine.h"

namespace {

using evenorm::Task;

constexpr int64_t chunk_elements = 16384;   // two or three operands of a chunk fit the level 2 cache together
constexpr int64_t most_in_chunk = 65536;    // of rows: one thread adds up the sums of all chunks, so those of large tensors are larger,
constexpr int64_t fewest_chunks = 32;       // as long as there are so many
constexpr int64_t block_elements = 2048;    // what is staged at a time: the three or four buffers in use fit the level 1 cache
constexpr int64_t marked_elements = 8192;   // of masked rows at a time, whose marks are spread beside them
constexpr int64_t widest_panel = 512;       // channels whose sums, coefficients and some rows fit the level 1 cache
constexpr int64_t short_channel = 4096;     // values: of shorter channels some make a panel,
constexpr int64_t most_columns = 16;        // up to this many
constexpr int64_t fewest_rows = 64;         // of a chunk, or writing its sums costs more than a few per cent of reading it
constexpr int64_t fewest_in_float = 256;    // values of a channel; of fewer each one's rounding shows in their sums,
constexpr int64_t fewest_cancelling = 32;   // and of fewer than this in the gradient, most of which the sums then take away
constexpr int64_t cached_bytes = 16 << 20;  // of the tensors in use: larger ones come from memory each time they are read
constexpr int64_t small_elements = 32768;   // up to this all lies in the level 2 cache, and a second thread costs more than it brings
constexpr int64_t longest_fetched = 24576;  // bytes of a plane: of longer ones the processor fetches most ahead by itself
constexpr int64_t gathered_ahead = 512;     // planes up to this are over before they are gathered
constexpr int64_t short_plane = 64;         // planes shorter than this are gathered before they are computed on,
constexpr int64_t short_in_cache = 32;      // or shorter than this where the tensor lies in the cache:
constexpr int64_t cached_elements = 1 << 18;
constexpr int64_t longest_spread = 128;     // planes up to this are rows of some channels, if there are
constexpr int64_t fewest_spread = 8;        // samples or more, which share the work of spreading coefficients
constexpr int64_t widest_spread = 1024;     // elements of such a row

struct Unit {
  int64_t offset, rows, width, stride;  // `rows` runs of `width` elements, `stride` apart
  int64_t position;                     // of its first run in the mask; where a sample is a row, that sample
};

struct Span {
  int64_t first, count;  // of channels
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Fills a row with copies of how it begins.
template <class Number>
inline void repeat_to(Number* row, int64_t begun, int64_t whole) {
  for (int64_t more; begun < whole; begun += more) {
    more = smaller(begun, whole - begun);
    std::memcpy(row + begun, row, size_t(more) * sizeof *row);
  }
}

struct Plan {
  const Task& task;
  bool rows = false;
  int64_t repeat = 1;       // rows of few channels are computed `repeat` at a time, as one wide row
  int64_t spread = 1;       // elements of a row for each channel: the planes of a sample's channels are one row where they are short
  int64_t wide = 0;         // coefficients of a group: channels * repeat
  int64_t panels = 1, panel_width = 1;
  int64_t columns = 1, column_width = 1, columns_together = 1;  // the last: those of a panel
  int64_t length = 0;       // positions of a plane, or of the merged planes of a single channel
  int64_t segments = 1;     // of a plane
  int64_t segment = 0;      // positions of each
  int64_t next_sample = 0;    // from a plane to what is fetched while it is summed: the channel's next one; 0: nothing
  int64_t next_panel = 0;     // while its y or dx is computed: one of the next panel, in the same sample
  int64_t next_gathered = 0;  // while it is gathered: the next channel's
  int64_t per_chunk = 1;    // samples (planes) or rows of a chunk
  bool fused = false;       // a panel goes through all phases while it lies in the cache
  bool small = false;
  bool serial = false;
  bool failed = false;
  bool large = false;         // the tensors come from memory
  bool stream = false;        // the output is written past the caches
  bool doubles_only = false;    // nothing is computed in float
  bool doubles_summed = false;  // no sum is
  bool doubles_moved = false;   // no gradient is
  int64_t* chunk_start = nullptr;  // groups + 1
  double* partial = nullptr;       // (chunks, 2, wide)
  double* table = nullptr;         // (groups, kinds, wide)
  double* inverse = nullptr;       // (groups, wide): 1 / standard deviation
  float* singles = nullptr;        // (groups, kinds, wide)
  uint8_t* scaled = nullptr;       // (groups, columns): all channels are scaled well enough for float,
  uint8_t* near = nullptr;         // and for all of them z is
  uint8_t* marks = nullptr;        // (samples, column_width * spread): the mask of a sample for each of its channels
  void* memory = nullptr;

  explicit Plan(const Task& given);
  ~Plan() { std::free(memory); }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  int64_t rows_of_sample() const { return spread > 1 ? 1 : task.positions; }
  int64_t samples_of(int64_t g) const { return task.starts[g + 1] - task.starts[g]; }
  int64_t chunks() const { return chunk_start[task.groups]; }
  Span span(int64_t first, int64_t width) const { return {first, smaller(width, task.channels - first)}; }
  Span span_of(int64_t column) const { return span(column * column_width, column_width); }
  Span span_of_panel(int64_t panel) const { return span(panel * panel_width, panel_width); }
  int64_t first_column(int64_t panel) const { return smaller(panel * columns_together, columns); }
  double* doubles_of(int64_t g) const { return table + g * kinds * wide; }
  float* singles_of(int64_t g) const { return singles + g * kinds * wide; }
  double* sums(int64_t chunk, int which) const { return partial + (chunk * 2 + which) * wide; }

  int64_t group_of(int64_t chunk) const {
    int64_t low = 0, high = task.groups - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (chunk_start[middle + 1] <= chunk) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  Unit unit(int64_t g, int64_t column, int64_t chunk) const;
  int64_t chunks_in(int64_t g) const;
  void spread_mask();
  void choose_rows();
  bool choose_spread();
};

inline int64_t common_divisor(int64_t a, int64_t b) { return b == 0 ? a : common_divisor(b, a % b); }

inline Plan::Plan(const Task& given) : task(given), rows(given.rows) {
  const int64_t elements = task.samples * task.channels * task.positions;
  small = elements <= small_elements;
  serial = small || task.threads == 1;
  length = task.positions;
  const int64_t bytes = evenorm::bytes_of(task.type);
  const bool inference = task.dy == nullptr && task.sums[0] == nullptr;  // x and y alone are in use, else dy and dx too
  large = (inference ? 2 : 4) * elements * bytes >= cached_bytes;
  if (rows) {
    choose_rows();
  } else if (choose_spread()) {
    rows = true;
    fused = serial || panels * task.groups >= 8 * task.threads;
  } else {
    columns = task.channels;
    columns_together = larger(1, smaller(most_columns, short_channel / larger(1, task.samples * length)));
    panel_width = columns_together;
    panels = divide_up(columns, columns_together);
    segments = larger(1, divide_up(length, 2 * chunk_elements));
    if (task.channels == 1) segments = 1;
    segment = segments == 1 ? length : divide_up(divide_up(length, segments), 64) * 64;
    per_chunk = larger(1, chunk_elements / larger(1, length));
    fused = serial || panels * task.groups >= 8 * task.threads;
    if (fused && task.channels > 1 && length <= gathered_ahead) next_gathered = length;
    if (large && length * bytes <= longest_fetched) {
      next_sample = task.channels * length;
      next_panel = fused ? columns_together * length : 0;
    }
  }
  wide = task.channels * repeat;

  const int64_t run = spread > 1 ? common_divisor(task.channels, column_width) * spread : rows ? task.channels * repeat : length;
  const uintptr_t outputs = reinterpret_cast<uintptr_t>(task.out) | reinterpret_cast<uintptr_t>(task.dresidual);
  const bool whole_lines = outputs % 64 == 0 && run * bytes % 64 == 0 && (repeat == 1 || task.groups == 1);
  stream = streams && whole_lines && task.out != nullptr && large;
  doubles_only = task.type == evenorm::Type::float64;
  const int64_t lines = task.channels * task.groups;
  doubles_summed = doubles_only || small || elements < fewest_in_float * lines;
  doubles_moved = doubles_only || elements < fewest_cancelling * lines;

  int64_t total = 0;
  for (int64_t g = 0; g < task.groups; ++g) total += chunks_in(g);
  const int64_t per_group = (kinds + 1) * wide, floats = doubles_only ? 0 : task.groups * kinds * wide;
  const int64_t doubles = total * 2 * wide + task.groups * (per_group + 1) + 1;
  const int64_t flags = task.groups * columns, marked = task.mask == nullptr || spread == 1 ? 0 : task.samples * column_width * spread;
  memory = std::malloc(size_t(doubles) * sizeof(double) + size_t(floats) * sizeof(float) + size_t(2 * flags + marked));
  failed = memory == nullptr;
  if (failed) return;
  chunk_start = static_cast<int64_t*>(memory);
  table = static_cast<double*>(memory) + task.groups + 1;
  inverse = table + task.groups * kinds * wide;
  partial = inverse + task.groups * wide;
  singles = reinterpret_cast<float*>(partial + total * 2 * wide);
  scaled = reinterpret_cast<uint8_t*>(singles + floats);
  near = scaled + flags;
  if (marked > 0) {
    marks = near + flags;
    spread_mask();
  }
  chunk_start[0] = 0;
  for (int64_t g = 0; g < task.groups; ++g) chunk_start[g + 1] = chunk_start[g] + chunks_in(g);
}

inline void Plan::choose_rows() {
  const int64_t channels = task.channels;
  if (channels < 128 && channels > 0) {
    const int64_t whole_vectors = 8 / common_divisor(channels, 8);
    repeat = divide_up(divide_up(128, channels), whole_vectors) * whole_vectors;
  }
  const int64_t elements = task.samples * task.positions * channels;
  const int64_t together = larger(chunk_elements, smaller(most_in_chunk, elements / fewest_chunks));
  per_chunk = divide_up(larger(fewest_rows, together / larger(1, channels)), repeat) * repeat;
  panel_width = column_width = larger(1, smaller(channels, widest_panel));
  panels = columns = divide_up(channels, panel_width);
}

// As many channels as make whole vectors, where there are so many: then no row but the last has an end.
inline bool Plan::choose_spread() {
  const int64_t vector = smaller(16, 64 / evenorm::bytes_of(task.type)), least = vector / common_divisor(length, vector);
  if (length < 2 || length > longest_spread || least * length > widest_spread || task.channels < least) return false;
  if (task.samples < fewest_spread * task.groups) return false;
  spread = length;
  panel_width = column_width = smaller(task.channels, widest_spread / (least * length) * least);
  panels = columns = divide_up(task.channels, column_width);
  per_chunk = larger(1, chunk_elements / (column_width * length));
  return true;
}

inline void Plan::spread_mask() {
  const int64_t width = column_width * spread;
  for (int64_t n = 0; n < task.samples; ++n) {
    std::memcpy(marks + n * width, task.mask + n * spread, size_t(spread));
    repeat_to(marks + n * width, spread, width);
  }
}

inline int64_t Plan::chunks_in(int64_t g) const {
  const int64_t samples = samples_of(g);
  if (rows) return divide_up(samples * rows_of_sample(), per_chunk);
  if (task.channels == 1) return divide_up(samples * length, chunk_elements);
  return length == 0 ? 0 : divide_up(samples, per_chunk) * segments;
}

inline Unit Plan::unit(int64_t g, int64_t column, int64_t chunk) const {
  const int64_t c = task.channels, first = task.starts[g];
  if (rows) {
    const int64_t row = first * rows_of_sample() + chunk * per_chunk;
    const int64_t count = smaller(per_chunk, task.starts[g + 1] * rows_of_sample() - row);
    const Span across = span_of(column);
    return {(row * c + across.first) * spread, count, across.count * spread, c * spread, row};
  }
  if (c == 1) {
    const int64_t from = first * length + chunk * chunk_elements;
    return {from, 1, smaller(chunk_elements, task.starts[g + 1] * length - from), 0, from};
  }
  const int64_t among = segments == 1 ? chunk : chunk / segments;  // a division takes as long as a vector of short planes
  const int64_t sample = first + among * per_chunk;
  const int64_t count = smaller(per_chunk, task.starts[g + 1] - sample);
  const int64_t from = smaller(length, (chunk - among * segments) * segment);
  const int64_t width = smaller(segment, length - from);
  return {(sample * c + column) * length + from, count, width, c * length, sample * length + from};
}

}  // namespace
