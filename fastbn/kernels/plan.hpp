// How a call is cut: numbers only. _plan.pyx makes a Plan from a Task, the loops follow it, and `explain` prints it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastbn {

// What both the plan and the loops count with.
constexpr std::ptrdiff_t LINE = 64;        // bytes of a cache line
constexpr std::ptrdiff_t BLOCK = 128;      // bytes of arithmetic that a loop takes at once
constexpr std::ptrdiff_t COLUMNS = 4096;   // bytes of the accumulators of one unit's columns
constexpr std::ptrdiff_t PLANES = 32;      // channels of a unit whose planes are summed
constexpr std::ptrdiff_t CHAIN = 64;       // additions to one accumulator, before it is added to another: long chains lose digits
constexpr std::ptrdiff_t TILE = 16384;     // elements of a tile of planes
constexpr std::ptrdiff_t TILE_ROWS = 256;  // rows of a tile of columns
constexpr std::ptrdiff_t FEW_ROWS = TILE_ROWS;  // up to which a host's threads sum and map groups of columns at once: never more than one tile
constexpr std::ptrdiff_t MOST_TILES = 64;  // of a row, and of the rows that are summed together
constexpr std::ptrdiff_t MAP_ROWS = 4;     // rows mapped with one load of the parameters

// What a plan is made from, besides the sizes of the caches.
struct Task {
    std::ptrdiff_t outer, channels, inner;
    std::ptrdiff_t item;  // bytes of an element
    int threads;
    int reads;         // arrays that the sums read; 0 for a map alone
    int arrays;        // arrays that the map reads and writes; 0 for sums alone
    int touched;       // arrays that the whole call reads and writes
    bool streamable;   // the output is memory of its own; that of two has its cache lines at the same elements
    std::uintptr_t place;  // the address of the output; 0 is the begin of a cache line, of memory that was written before
    std::ptrdiff_t together; // such tasks that follow each other, as to what stays in the caches; 0 is 1
    bool apart;        // the map waits for all sums
    bool hosted;       // a host's threads run the units
};

// Numeric tiles: they decide the bits of a result, and depend on the shape alone.
struct Tiles {
    double count;                         // values of a channel
    std::ptrdiff_t tiles, width;          // their number, and partial sums in each
    std::ptrdiff_t images, pieces, piece; // planes: a tile is several images, or a piece of one
    std::ptrdiff_t columns;               // columns: in a row
    std::ptrdiff_t repeats, run;          // in a row: channels repeat, and each has a run of columns
};

// Units of work: whole numbers of tiles.
struct Units {
    bool by_columns;                  // not by planes
    bool reverse, nontemporal;
    bool early;                       // what a pass writes is asked for before its sums
    bool exceeds_l3;                  // the arrays do not stay in the caches: memory is read in one stream, not in one for each row
    std::ptrdiff_t rows, tail_columns, peel;  // columns: rows of `columns`, and one of `tail_columns`, behind `peel` elements
    std::ptrdiff_t channels_per_unit; // or columns
    std::ptrdiff_t channels_per_pass; // whose sums are followed by their map, before the next ones of the unit
    std::ptrdiff_t rows_per_unit;     // of a map of columns
    std::ptrdiff_t elements_per_unit; // of a map of planes: several, or a piece of one
    std::ptrdiff_t units;
    std::ptrdiff_t bytes;             // that all units read and write
};

struct Plan {
    Tiles tiles;
    bool resident;  // each unit is whole channels, sums and map one after the other; `sums` says how both are cut
    Units sums, map;
};

}  // namespace fastbn
