// Which thread touches which values: the two dense layouts, the split of a tensor over a grid, and
// the walk of one thread.
//
// A piece is V consecutive values in memory. In the rows layout (channels_last, or [N, C]) a piece
// holds V channels of one position; in the planes layout (contiguous [N, C, *spatial]) it holds V
// positions of one channel. Either way all pieces of a thread have the same channels, so that
// per-channel values stay in registers.
#ifndef PFS_CUDA_GEOMETRY_CUH_
#define PFS_CUDA_GEOMETRY_CUH_

#include <algorithm>
#include <cstdint>

#include "reduce.cuh"

namespace pfs::cuda {

enum class Layout : int {
  kRows = 0,    // offset = row * C + c
  kPlanes = 1,  // offset = (n * C + c) * plane + s
};

// The dense tensor as a matrix of rows, or as planes. rows layout: outer = N * prod(spatial), plane
// = 1.
struct Shape {
  Layout layout;
  int64_t outer;
  int64_t channels;
  int64_t plane;

  C10_HOST_DEVICE int64_t numel() const { return outer * channels * plane; }
  C10_HOST_DEVICE int64_t values_per_channel() const { return outer * plane; }
  // Offset of the first value of a channel.
  C10_HOST_DEVICE int64_t channel_offset(int64_t c) const { return c * plane; }
  // Channel of the value at an offset.
  C10_HOST_DEVICE int64_t channel_at(int64_t offset) const { return offset / plane % channels; }
};

// The grid of one pass: block (x, y) works on the channels of tile x and on chunk y of their
// pieces.
struct Grid {
  Shape shape;
  int64_t columns;       // pieces side by side: C / V in the rows layout, C in the planes layout
  int64_t pieces;        // pieces of one column
  int64_t chunk;         // pieces of one column and block, but for the last block
  int64_t plane_pieces;  // planes layout: pieces of one plane
  int width;             // columns of a block; thread = ty * width + tx
  int height;            // pieces of a column that a block touches at once
  int64_t tiles;         // grid.x
  int64_t splits;        // grid.y

  int threads() const { return std::min((width * height + 31) / 32 * 32, kMaxThreads); }
  // Values per channel of one full chunk.
  C10_HOST_DEVICE int64_t chunk_values() const { return chunk * (shape.plane / plane_pieces); }
};

// The split depends on the shape alone, never on the device: the same sums in the same order on
// every GPU.
inline Grid make_grid(const Shape& shape, int vector_size) {
  // Columns of a rows block: 32 pieces of 16 bytes make the longest run that coalescing can use.
  constexpr int64_t kMaxWidth = 32;
  // Enough blocks to fill a large GPU twice over, with few pieces per thread ...
  constexpr int64_t kFillBlocks = 264, kFillPieces = 4;
  // ... and more only where each thread then still has work that pays for the block's start.
  constexpr int64_t kManyBlocks = 1056, kManyPieces = 16;
  constexpr int64_t kMaxGridY = 65535;
  // Keeps the number of pieces of a thread within an int.
  constexpr int64_t kMaxChunk = int64_t{1} << 30;

  Grid grid{};
  grid.shape = shape;
  if (shape.layout == Layout::kRows) {
    grid.columns = shape.channels / vector_size;
    grid.pieces = shape.outer;
    grid.plane_pieces = 1;
    grid.tiles = (grid.columns + kMaxWidth - 1) / kMaxWidth;
    grid.width = static_cast<int>((grid.columns + grid.tiles - 1) / grid.tiles);
  } else {
    grid.columns = shape.channels;
    grid.plane_pieces = shape.plane / vector_size;
    grid.pieces = shape.outer * grid.plane_pieces;
    grid.tiles = shape.channels;
    grid.width = 1;
  }
  grid.height = static_cast<int>(std::min<int64_t>(kMaxThreads / grid.width, grid.pieces));
  const int64_t turns = (grid.pieces + grid.height - 1) / grid.height;
  const int64_t wanted = std::max(std::min(turns / kManyPieces, kManyBlocks / grid.tiles),
                                  std::min(turns / kFillPieces, kFillBlocks / grid.tiles));
  const int64_t splits =
      std::clamp<int64_t>(std::max(wanted, grid.pieces / kMaxChunk), 1, kMaxGridY);
  // Whole turns per block; the number of blocks follows, so that none is empty.
  const int64_t chunk_turns = (turns + splits - 1) / splits;
  grid.chunk = chunk_turns * grid.height;
  grid.splits = (grid.pieces + grid.chunk - 1) / grid.chunk;
  return grid;
}

// The pieces of one thread, as offsets in values.
template <Layout kLayout, int V>
class Cursor {
 public:
  // Channels of a piece.
  static constexpr int kChannels = kLayout == Layout::kRows ? V : 1;

  C10_HOST_DEVICE Cursor(const Grid& grid, int64_t tile, int64_t split, int thread) {
    const int tx = thread % grid.width;
    const int ty = thread / grid.width;
    const int64_t column = tile * grid.width + tx;
    const int64_t first = split * grid.chunk + ty;
    const int64_t chunk_end = (split + 1) * grid.chunk;
    const int64_t end = chunk_end < grid.pieces ? chunk_end : grid.pieces;
    owns_column_ = column < grid.columns;
    is_first_row_ = ty == 0;
    channel_ = column * kChannels;
    const bool works = owns_column_ && ty < grid.height && first < end;
    count_ = works ? (static_cast<int>(end - first) + grid.height - 1) / grid.height : 0;
    const int64_t channels = grid.shape.channels;
    if constexpr (kLayout == Layout::kRows) {
      offset_ = first * channels + channel_;
      step_ = grid.height * channels;
    } else {
      // One division here instead of one per piece: each step adds a fixed number of planes and
      // pieces, with a carry.
      const int64_t plane = grid.shape.plane;
      plane_pieces_ = grid.plane_pieces;
      piece_ = first % plane_pieces_;
      piece_step_ = grid.height % plane_pieces_;
      offset_ = (first / plane_pieces_ * channels + channel_) * plane + piece_ * V;
      step_ = grid.height / plane_pieces_ * channels * plane + piece_step_ * V;
      carry_ = (channels - 1) * plane;
    }
  }

  C10_HOST_DEVICE int count() const { return count_; }
  C10_HOST_DEVICE int64_t offset() const { return offset_; }
  // First of the kChannels channels.
  C10_HOST_DEVICE int64_t channel() const { return channel_; }
  C10_HOST_DEVICE bool owns_column() const { return owns_column_; }
  // The thread that ends up with the result of block_reduce for its columns.
  C10_HOST_DEVICE bool holds_result() const { return owns_column_ && is_first_row_; }

  C10_HOST_DEVICE void advance() {
    offset_ += step_;
    if constexpr (kLayout == Layout::kPlanes) {
      piece_ += piece_step_;
      if (piece_ >= plane_pieces_) {
        piece_ -= plane_pieces_;
        offset_ += carry_;
      }
    }
  }

 private:
  int64_t offset_, step_, channel_;
  int64_t piece_ = 0, piece_step_ = 0, plane_pieces_ = 1, carry_ = 0;  // planes layout
  int count_;
  bool owns_column_, is_first_row_;
};

template <int U>
struct Unroll {
  static constexpr int value = U;
};

// Calls body(Unroll<U>, offsets[U]) on groups of U pieces, and body(Unroll<1>, offsets[1]) on what
// is left: within a group all loads can be in flight at once.
template <int U, typename Cursor, typename Body>
C10_HOST_DEVICE inline void for_each_group(Cursor& cursor, Body&& body) {
  int left = cursor.count();
  for (; left >= U; left -= U) {
    int64_t offsets[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      offsets[u] = cursor.offset();
      cursor.advance();
    }
    body(Unroll<U>{}, offsets);
  }
  for (; left > 0; --left) {
    const int64_t offsets[1] = {cursor.offset()};
    cursor.advance();
    body(Unroll<1>{}, offsets);
  }
}

}  // namespace pfs::cuda

#endif  // PFS_CUDA_GEOMETRY_CUH_
