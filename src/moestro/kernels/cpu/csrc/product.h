// A product: row tiles of one expert's matrix times the tokens of a unit, in whichever way suits their number.
//
// Few tokens: codes are decoded in registers as they are multiplied. Many: a piece of a tile is decoded into cache, once,
// and multiplied by all tokens; bf16 is multiplied from where it lies. While one piece is multiplied the next is decoded,
// in between, and the one after it asked for: decoding straight from memory took
// three times as long (74 against 26 cycles a block of a panel, Zen 5).
#pragma once
#include <algorithm>
#include <cstring>

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
        fp8_columns_(layer.format == MOESTRO_FP8 ? layer.scale_columns : 0), dequant_from_(tactic.dequant_from) {}

  // sums [tiles, T, 32] = `tiles` tiles from `first` on, times tokens; the tile at `after` is probably read next
  void run(Place first, int64_t tiles, Place after, const Tokens& tokens, float* sums, const Room& room) const {
    std::memset(sums, 0, sizeof(float) * tiles * tokens.count * kTileRows);
    if (fp8_columns_)
      scaled(first, tiles, after, tokens, sums, room);
    else if (fp4_ && kernels_.direct && tokens.count < dequant_from_)
      direct(first, tiles, after, tokens, sums);
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
  int64_t block_bytes() const { return fp4_ ? kCodeBytes : kPanel * kBlock * (fp8_columns_ ? 1 : 2); }
  const uint8_t* codes(int64_t index) const { return matrix_.codes + index * block_bytes(); }
  const uint8_t* scales(int64_t index) const { return matrix_.scales + (mx_ ? index / 2 : index) * kPanel; }
  int64_t scale_stride() const { return (mx_ ? blocks_ / 2 : blocks_) * kPanel; }

  Codes codes_of(Place at, int64_t block, Place next) const {
    const int64_t here = index(at, block), then = index(next.expert < 0 ? at : next, 0);
    return {codes(here), fp4_ ? scales(here) : nullptr, blocks_ * block_bytes(), scale_stride(), panels(at),
            codes(then), fp4_ ? scales(then) : nullptr, mx_};
  }

  void direct(Place first, int64_t tiles, Place after, const Tokens& tokens, float* sums) const {
    for (int64_t t = 0; t < tiles; ++t) {
      const Place at{first.expert, first.tile + t}, next = t + 1 < tiles ? Place{at.expert, at.tile + 1} : after;
      kernels_.direct(codes_of(at, 0, next), static_cast<int>(blocks_), tokens, sums + t * tokens.count * kTileRows);
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

  // FP8: the columns that share a scale are decoded, multiplied, and their sums scaled.
  void scaled(Place first, int64_t tiles, Place after, const Tokens& tokens, float* sums, const Room& room) const {
    const int64_t step = fp8_columns_ / kBlock, per_panel = (blocks_ + step - 1) / step, all = per_panel * tiles;
    const auto piece_of = [&](int64_t i) {  // a tile from end to end, then the next
      const Place& from = i < all ? first : after;
      const int64_t b = i % per_panel * step;
      return Piece{{from.expert, from.tile + i % all / per_panel}, b, std::min(step, blocks_ - b)};
    };
    for (int64_t i = 0; i < all; ++i) {
      const Piece piece = piece_of(i);
      Ahead ahead = ask(piece_of(i + 2));
      std::memset(room.partial, 0, sizeof(float) * tokens.count * kTileRows);
      kernels_.decode_fp8(codes_of(piece), static_cast<int>(piece.count), room.decoded);
      kernels_.multiply(dense(piece, room.decoded), static_cast<int>(piece.count), from(tokens, piece), room.partial,
                        ahead);
      const auto* scale = reinterpret_cast<const float*>(matrix_.scales) +
                          (piece.at.expert * panels_ + 2 * piece.at.tile) * per_panel + i % per_panel;
      const float scale0 = scale[0], scale1 = panels(piece.at) == 2 ? scale[per_panel] : 0.f;
      float* to = sums + i / per_panel * tokens.count * kTileRows;
      for (int t = 0; t < tokens.count; ++t)
        for (int r = 0; r < kTileRows; ++r)
          to[t * kTileRows + r] += (r < kPanel ? scale0 : scale1) * room.partial[t * kTileRows + r];
    }
  }

  Ahead ask(const Piece& next) const {
    if (next.at.expert < 0 || 2 * next.at.tile >= panels_) return {};
    const int64_t at = index(next.at, next.block), bytes = next.count * block_bytes();
    if (fp4_) {
      Ahead few{scales(at), scale_stride(), static_cast<int>(next.count * kPanel / (mx_ ? 128 : 64) + 1)};
      few.ask(few.lines);
    }
    return {codes(at), blocks_ * block_bytes(), static_cast<int>(bytes / 64)};
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
    if (!fp4_ && !fp8_columns_)
      return {reinterpret_cast<const uint16_t*>(codes(here)), columns_ * kPanel, panels(piece.at)};
    return {decoded, piece.count * kernels_.decoded_block, panels(piece.at)};
  }

  const MoestroMatrix& matrix_;
  const Kernels& kernels_;
  int64_t panels_, columns_, blocks_;
  bool fp4_, mx_;
  int fp8_columns_;
  int dequant_from_;
};

}  // namespace moestro
