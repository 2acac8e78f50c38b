// A program as a GPU reads it: one image in device memory, and the little that a kernel is told beside it. Plain numbers;
// byte offsets are from the image's beginning and multiples of 16 where a section begins.
//
// A block of threads works on a tile of S samples (a power of two). Its workspace is rows of S numbers: first all rows of a
// buffer's slot 0, then those of the next slot. An offset is in such rows, so the image does not depend on the shape of the
// tiles; and neighbouring rows of a slot begin in neighbouring banks of shared memory.
#pragma once

#include <cstdint>

#include "../operations.h"

namespace sparseflow::cuda {

inline constexpr int kQuad = 4;         // entries of a matrix row come in fours, filled up with zero weights
inline constexpr int kMaxStages = 16;
inline constexpr int kMaxTile = 32;

struct Place {
  int32_t row = -1;  // in the workspace; -1: absent
  int32_t slot = 0;  // rows from one slot of its buffer to the next
};

enum Flags : int32_t {
  kCarries = 1,
  kCurvature = 2,
  kRaw = 4,
  kSecond = 8,
  kIndirect = 16,           // the stream holds indices into the block's dynamic values
  kDynamicCoefficient = 32,  // so does the coefficient
  kEachStage = 64,          // gradient: a sum that is taken away after every evaluation
  kReduces = 128,
  kDense = 256,             // the stream holds all columns of four rows at a time
};

struct DeviceOp {
  int32_t kind, store, activation, slope_from, flags;
  int32_t first_chunk, chunks;
  int32_t next_chunk;         // what the list reads behind them, round and round; -1: nothing
  int32_t rows, cols, entries;  // of the matrix as it is walked
  int32_t modulation;         // its first row among those of all modulations
  int32_t values;             // indirect: its first number among the dynamic values
  int32_t coefficient;        // byte offset of one number per row, or its first among the dynamic values; -1: none
  int32_t factor_row, factor2_row;  // byte offsets; -1: the row itself
  int32_t pairs;              // gradient: byte offset of (row << 16 | column), one per entry
  int32_t sums;               // gradient: its first sum among those of a stage or of all time
  // pointwise: byte offsets of its instructions, operands, row vectors and totals; how many of them. The traces' registers lie
  // behind the row vectors.
  int32_t code, operands, vectors, instructions, n_vectors, traces, totals, n_totals, reserved[2];
  Place source, target, seed, weight, factor, factor2, addend, kept, slope_cotangent, value;
  double a, b;                // activation parameters
};

// An instruction of a pointwise operation (csrc/expression.h). A place is an operand of the operation, by its number, or a
// register of the thread: kRegister and its number. A row vector is one of the operation's.
struct DeviceInstruct {
  uint16_t op, reads, to, a, b, c, row_vector, reserved;
  double number;
};
inline constexpr int kRegister = 0x8000;
inline constexpr int kRegisters = 24;  // of a thread, at most

// The rows of a place (as an instruction's) are summed up into one row of the workspace.
struct DeviceTotal {
  int32_t place, row;
};

// Rows of the workspace, or numbers of the image, that a pointwise operation works on. step: 0 where one serves all rows.
struct DeviceRows {
  int32_t at, step;
};

// Some rows of a matrix as one piece of memory: [rows] of {row | quads << 16, first quad}, then the weights (or
// indices) of all quads, then their columns, 16 bits each.
struct Chunk {
  int32_t offset, bytes;  // in the image, multiples of 16
  int32_t rows, quads;
  // dense: the columns it holds. A slab of some columns leaves the sums of its rows where they are, for the next one; the
  // last is followed by what follows a row.
  int32_t first_column = 0, columns = 0, last = 1, reserved = 0;
};
struct RowHead {
  uint32_t row_and_quads, first;
};
// Where most entries are there, rows go by fours: a head is four row numbers of 16 bits (kNoRow: none), a quad the weights
// of one column in the four rows, and there are no columns to read.
inline constexpr int kNoRow = 0xffff;
inline constexpr int kSlabGroups = 64;  // fours of rows in a slab: a block has that many groups of threads, or does not run it

struct DeviceModulation {
  int32_t first, n;                                                   // rows
  int32_t bias, gate_slope, gate_offset, shift_slope, shift_offset;  // byte offsets; -1: absent
  int32_t scale;                                                      // byte offset of a scale that is constant; -1: one
  int32_t shift_sum, gate_sum;                                        // among the sums of a stage; -1: none
  int32_t totals;  // its first number among the totals: bias, then what it has of gate and shift; -1: none
};

// A matrix of path sums: values[entry] = sum of constant * gate over the entry's paths.
struct DeviceGated {
  int32_t entries, values;                        // how many; its first among the dynamic values
  int32_t path_ptr, path_gate, path_constant;    // byte offsets: [entries + 1], [paths], [paths]
  int32_t gate;                                   // first row of the gate's modulation
  int32_t sum;                                    // among the sums of a stage; -1: none
  int32_t totals;                                 // gradients of the constants
  int32_t gates, gate_ptr, gate_path, path_entry;  // adjoint: paths by gate; the entry of a path
};

enum List : int { kPrologue = 0, kBody = 1, kKeep = 2, kReverse = 3, kLists = 4 };

struct DeviceProgram {
  const char* image = nullptr;
  int32_t dim = 0, divergence = 0;
  int32_t ops = 0, chunks = 0, modulations = 0, gated = 0;  // byte offsets; the chunks follow the operations
  int32_t n_ops = 0, n_chunks = 0, n_modulations = 0, n_gated = 0;
  int32_t list[kLists + 1] = {0, 0, 0, 0, 0};  // where the lists of operations begin; the last: where they end
  int32_t modulation_rows = 0, dynamic_values = 0, workspace_rows = 0, dynamic_modulations = 0;
  int32_t gathered_rows = 0;  // that an operation reads at random, at most, slots counted
  int32_t lasting_sums = 0, stage_sums = 0, totals = 0;  // of a block; totals follow the lasting sums, the last one is of t
  int32_t streams = 0, stream_bytes = 0, largest_chunk = 0, slabs = 0;  // the chunks lie together; dense ones are slabs
  Place input, output, noise, ones, cotangent, trace_cotangent, state_cotangent;
  // Of graphs: numbers given per sample, and whether a last row of the input, behind those of the state, is the time.
  Place context, context_cotangent;
  int32_t context_rows = 0, time_in_input = 0;
};
static_assert(sizeof(DeviceOp) % 16 == 0 && sizeof(DeviceInstruct) == 24, "operations are copied by 16 bytes");

// How a kernel is launched, and where a block keeps what. Byte offsets in shared memory; -1: in global memory, where every
// block has `global_bytes`, with the offsets named below.
struct BlockPlan {
  int32_t tile_log = 3;   // S = 1 << tile_log
  int32_t split_log = 2;  // parts of a row, summed up by shuffles: at least as many as a thread has samples
  int32_t threads = 256;
  int32_t resident = 1;   // all streams are in shared memory; else they come through a ring of two chunks
  int32_t ops = 0, modulation = 0, dynamic = 0, reduce = 0, work = 0, state = 0, streams = 0;
  int32_t gathered = -1;  // where the workspace is in global memory: a copy of the rows that an operation reads at random
  int32_t shared_bytes = 0;
  int64_t work_global = 0, state_global = 0, dynamic_global = 0, global_bytes = 0;
};

struct DeviceTableau {
  int32_t adaptive, order, stages, last_stage_is_solution;
  double c[kMaxStages], b[kMaxStages], b_error[kMaxStages], b_mid[kMaxStages];
  double a[kMaxStages * (kMaxStages - 1) / 2];  // row i of i + 1 begins at i (i + 1) / 2
};

}  // namespace sparseflow::cuda
