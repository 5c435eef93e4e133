"""How the rows of the loss are cut; no torch, so that memory can be told without it."""

CHUNK_BYTES = 5 * 1024**3 // 4
"""Scores that are held at a time. Each chunk reads and writes the fp32 gradient of the weight, so
that many small ones would cost time: these are 4,096 rows and more of a vocabulary of 152k in
BF16."""

_ROWS_MULTIPLE = 64
"""Rows of a chunk, where it has as many: what matrix kernels like."""


def row_chunks(num_rows: int, row_bytes: int, *, chunk_bytes: int) -> list[slice]:
    """As few chunks of rows as fit into memory, the first of them the longest.

    Args:
        num_rows: Of all chunks.
        row_bytes: Scores of one row.
        chunk_bytes: Most for a chunk; one row may take more.
    """
    most = max(1, chunk_bytes // row_bytes)
    if most >= _ROWS_MULTIPLE:
        most -= most % _ROWS_MULTIPLE
    equal = -(-num_rows // max(1, -(-num_rows // most)))
    rows = min(most, -(-equal // _ROWS_MULTIPLE) * _ROWS_MULTIPLE)
    return [slice(at, min(at + rows, num_rows)) for at in range(0, num_rows, max(1, rows))]
