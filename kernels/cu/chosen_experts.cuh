// The rows of a weight of several experts that a decoder decodes, for dequant.cu and dequant_blocks.cu, before which the loader puts it:
// those of the experts that a step's tokens chose. grid.y is the number of selections; of several of one expert, the first decodes.

// Groups of eight values, numbered over the whole matrix.
struct Span { u32 begin, end; };

struct Choice {
    const int* offsets; // the first row of each expert, [experts + 1]; null decodes all rows
    const int* sorted;  // the selection of each row
    const int* chosen;  // the expert of each selection
    int first;          // the expert whose rows are the first of the matrix
    int rows;           // of an expert

    DEVICE Span span(u32 out, u32 row_groups) const {
        if (!offsets) return {0, out * row_groups};
        const int slot = blockIdx.y, expert = chosen[sorted[slot]], at = expert - first;
        if (offsets[expert] != slot || at < 0 || (u32)((at + 1) * rows) > out) return {0, 0};
        return {(u32)(at * rows) * row_groups, (u32)((at + 1) * rows) * row_groups};
    }
};
