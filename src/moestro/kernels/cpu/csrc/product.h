// A product: row tiles of one expert's matrix times the tokens of a unit, in whichever way suits their number.
//
// Few tokens: codes are decoded in registers as they are multiplied. Many: a piece of a tile is decoded into cache, once,
// and multiplied by all tokens; bf16 is multiplied from where it lies. While one piece is multiplied the next is decoded,
// in between, and the one after it asked for: decoding straight from memory took
// three times as long (74 against 26 cycles a block of a panel, Zen 5).
#pragma once
#include <algorithm>
#include <cstring>

#include "int4.h"
#include "plan.h"

namespace moestro {

struct Place {     // a tile of two panels
  int64_t expert;  // negative: no tile
  int64_t tile;
};

struct Room {          // of a thread
  uint16_t* decoded;   // [2, kPieceElements]
  float* partial;      // [lines of a unit, 32]
};

class Product {
 public:
  Product(const MoestroLayer& layer, const MoestroTactic& tactic, const MoestroMatrix& matrix, int64_t rows,
          int64_t columns)
      : matrix_(matrix), kernels_(*kernels_of(layer)), panels_(rows / kPanel), columns_(columns),
        blocks_(columns / kBlock), fp4_(is_fp4(layer.format)), mx_(layer.format == MOESTRO_MXFP4),
        fp8_columns_(layer.format == MOESTRO_FP8 ? layer.scale_columns : 0), int4_(layer.format == MOESTRO_INT4),
        dequant_from_(tactic.dequant_from) {}

  // sums [tiles, T, 32] = `tiles` tiles from `first` on, times tokens; the tile at `after` is probably read next
  void run(Place first, int64_t tiles, Place after, const Tokens& tokens, float* sums, const Room& room) const {
    std::memset(sums, 0, sizeof(float) * tiles * tokens.count * kTileRows);
    if (int4_ && kernels_.direct_int4 && tokens.count < dequant_from_)
      direct_int4(first, tiles, after, tokens, sums);
    else if (fp8_columns_ || int4_)
      scaled(first, tiles, after, tokens, sums, room);
    else if (fp4_ && kernels_.direct && tokens.count < dequant_from_)
      direct(first, tiles, after, tokens, sums, room);
    else
      pieces(first, tiles, after, tokens, sums, room.decoded);
  }

 private:
  static constexpr int kStream = 12;  // up to so many tokens, a tile of bf16 is read from end to end

  struct Piece {  // blocks [block, block + count) of both panels of a tile
    Place at;
    int64_t block, count;
  };

  int64_t index(Place at, int64_t block) const { return (at.expert * panels_ + 2 * at.tile) * blocks_ + block; }
  int panels(Place at) const { return static_cast<int>(std::min<int64_t>(2, panels_ - 2 * at.tile)); }
  int64_t block_bytes() const { return fp4_ || int4_ ? kCodeBytes : kPanel * kBlock * (fp8_columns_ ? 1 : 2); }
  const uint8_t* codes(int64_t index) const { return matrix_.codes + index * block_bytes(); }
  const uint8_t* scales(int64_t index) const { return matrix_.scales + (mx_ ? index / 2 : index) * kPanel; }
  int64_t scale_stride() const { return (mx_ ? blocks_ / 2 : blocks_) * kPanel; }

  Codes codes_of(Place at, int64_t block, Place next) const {
    const int64_t here = index(at, block), then = index(next.expert < 0 ? at : next, 0);
    return {codes(here), fp4_ ? scales(here) : nullptr, blocks_ * block_bytes(), scale_stride(), panels(at),
            codes(then), fp4_ ? scales(then) : nullptr, mx_};
  }

  void direct(Place first, int64_t tiles, Place after, Tokens tokens, float* sums, const Room& room) const {
    auto* kernel = kernels_.direct;
    const int64_t stride = static_cast<int64_t>(tokens.count) * kernels_.split_line;
    if (tokens.count <= kernels_.split_most && (blocks_ + 1) / 2 * stride <= 2 * kPieceElements) {
      kernels_.split(tokens, static_cast<int>(blocks_), room.decoded);
      tokens = {room.decoded, stride, tokens.count}, kernel = kernels_.direct_split;
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const Place at{first.expert, first.tile + t}, next = t + 1 < tiles ? Place{at.expert, at.tile + 1} : after;
      kernel(codes_of(at, 0, next), static_cast<int>(blocks_), tokens, sums + t * tokens.count * kTileRows);
    }
  }

  void pieces(Place first, int64_t tiles, Place after, const Tokens& tokens, float* sums, uint16_t* decoded) const {
    const bool whole = !fp4_ && tokens.count <= kStream;
    const int64_t step = whole ? blocks_ : std::min<int64_t>(blocks_, kPieceColumns / kBlock);
    const int64_t all = (blocks_ + step - 1) / step * tiles;
    const auto piece_of = [&](int64_t i) {  // all tiles of some columns, then the next columns; then what comes after
      const Place& from = i < all ? first : after;
      const int64_t b = i % all / tiles * step;
      return Piece{{from.expert, from.tile + i % tiles}, b, std::min(step, blocks_ - b)};
    };
    const auto buffer = [&](int64_t i) { return decoded + i % 2 * kPieceElements; };
    if (fp4_) kernels_.decode(codes_of(piece_of(0)), static_cast<int>(step), buffer(0));
    for (int64_t i = 0; i < all; ++i) {
      const Piece piece = piece_of(i);
      // hardware follows a stream of bf16; asking as well cost 10 %
      Ahead ahead = whole ? Ahead{} : ask(piece_of(i + (fp4_ ? 2 : 1)));
      if (fp4_ && i + 1 < all) ahead.next = pending(piece_of(i + 1), buffer(i + 1));
      kernels_.multiply(dense(piece, buffer(i)), static_cast<int>(piece.count), from(tokens, piece),
                        sums + i % tiles * tokens.count * kTileRows, ahead);
      if (ahead.next.left() > 0) kernels_.decode(ahead.next.from, ahead.next.blocks, ahead.next.dense);
    }
  }

  // INT4 ---
  int64_t group_blocks() const { return matrix_.group / kBlock; }
  int64_t groups() const { return blocks_ / group_blocks(); }
  // Of the tile's first panel.
  const uint8_t* int4_scales(Place at) const {
    return matrix_.scales + (at.expert * panels_ + 2 * at.tile) * groups() * kPanel * scale_bytes(matrix_.scale_type);
  }
  const uint8_t* int4_zeros(Place at) const {
    return matrix_.zeros ? matrix_.zeros + (at.expert * panels_ + 2 * at.tile) * groups() * kPanel : nullptr;
  }

  void direct_int4(Place first, int64_t tiles, Place after, const Tokens& tokens, float* sums) const {
    for (int64_t t = 0; t < tiles; ++t) {
      const Place at{first.expert, first.tile + t}, then = t + 1 < tiles ? Place{at.expert, at.tile + 1} : after;
      const uint8_t* here = codes(index(at, 0));
      const Int4Codes from{here, int4_scales(at), int4_zeros(at), blocks_ * kCodeBytes, groups(),
                           static_cast<int>(group_blocks()), matrix_.scale_type, panels(at),
                           then.expert < 0 ? here : codes(index(then, 0))};
      kernels_.direct_int4(from, tokens, sums + t * tokens.count * kTileRows);
    }
  }

  // Blocks that are decoded at once: as many as share a scale, or a part of them that fits.
  int64_t scaled_step() const {
    if (fp8_columns_) return fp8_columns_ / kBlock;
    int64_t step = std::min<int64_t>(group_blocks(), kPieceColumns / kBlock);
    while (group_blocks() % step || step % 2) --step;
    return step;
  }

  void decode_piece(const Piece& piece, uint16_t* dense) const {
    Codes from = codes_of(piece);
    const int count = static_cast<int>(piece.count);
    if (!int4_) return kernels_.decode_fp8(from, count, dense);
    const uint8_t* zeros = int4_zeros(piece.at);
    from.scales = zeros ? zeros + piece.block / group_blocks() * kPanel : nullptr;
    from.scale_stride = groups() * kPanel;
    (kernels_.decode_int4 ? kernels_.decode_int4 : decode_int4_plain)(from, count, dense);
  }

  // What the sums of a piece's rows are multiplied by, [32].
  void scales_of(const Piece& piece, int64_t step, int64_t per_panel, float* scale) const {
    for (int p = 0; p < panels(piece.at); ++p) {
      if (int4_) {
        const int64_t group = p * groups() + piece.block / group_blocks();
        for (int r = 0; r < kPanel; ++r)
          scale[p * kPanel + r] = int4_scale(int4_scales(piece.at), matrix_.scale_type, group * kPanel + r);
      } else {
        const auto* of = reinterpret_cast<const float*>(matrix_.scales);
        const int64_t panel = piece.at.expert * panels_ + 2 * piece.at.tile + p;
        std::fill_n(scale + p * kPanel, kPanel, of[panel * per_panel + piece.block / step]);
      }
    }
  }

  // FP8 and INT4: the columns that share a scale are decoded, multiplied, and their sums scaled.
  void scaled(Place first, int64_t tiles, Place after, const Tokens& tokens, float* sums, const Room& room) const {
    const int64_t step = scaled_step(), per_panel = (blocks_ + step - 1) / step, all = per_panel * tiles;
    const auto piece_of = [&](int64_t i) {  // a tile from end to end, then the next
      const Place& from = i < all ? first : after;
      const int64_t b = i % per_panel * step;
      return Piece{{from.expert, from.tile + i % all / per_panel}, b, std::min(step, blocks_ - b)};
    };
    for (int64_t i = 0; i < all; ++i) {
      const Piece piece = piece_of(i);
      Ahead ahead = ask(piece_of(i + 2));
      std::memset(room.partial, 0, sizeof(float) * tokens.count * kTileRows);
      decode_piece(piece, room.decoded);
      kernels_.multiply(dense(piece, room.decoded), static_cast<int>(piece.count), from(tokens, piece), room.partial,
                        ahead);
      alignas(64) float scale[kTileRows] = {};
      scales_of(piece, step, per_panel, scale);
      float* to = sums + i / per_panel * tokens.count * kTileRows;
      for (int t = 0; t < tokens.count; ++t)
        for (int r = 0; r < kTileRows; ++r) to[t * kTileRows + r] += scale[r] * room.partial[t * kTileRows + r];
    }
  }

  Ahead ask(const Piece& next) const {
    if (next.at.expert < 0 || 2 * next.at.tile >= panels_) return {};
    const int64_t at = index(next.at, next.block), bytes = next.count * block_bytes();
    Ahead found{codes(at), blocks_ * block_bytes(), static_cast<int>(bytes / 64)};
    if (fp4_) found.scales = scales(at), found.scale_stride = scale_stride(), found.every = mx_ ? 16 : 8;
    return found;
  }

  static Tokens from(const Tokens& tokens, const Piece& piece) {
    return {tokens.data + piece.block / 2 * tokens.stride, tokens.stride, tokens.count};
  }

  Codes codes_of(const Piece& piece) const { return codes_of(piece.at, piece.block, piece.at); }

  Pending pending(const Piece& piece, uint16_t* decoded) const {
    return {codes_of(piece), static_cast<int>(piece.count), decoded, 0};
  }

  Dense dense(const Piece& piece, uint16_t* decoded) const {
    const int64_t here = index(piece.at, piece.block);
    if (!fp4_ && !fp8_columns_ && !int4_)
      return {reinterpret_cast<const uint16_t*>(codes(here)), columns_ * kPanel, panels(piece.at)};
    return {decoded, piece.count * kernels_.decoded_block, panels(piece.at)};
  }

  const MoestroMatrix& matrix_;
  const Kernels& kernels_;
  int64_t panels_, columns_, blocks_;
  bool fp4_, mx_;
  int fp8_columns_;
  bool int4_;
  int dequant_from_;
};

}  // namespace moestro
