"""Writes safetensors files front to back, one tensor in memory at a time, with their SHA-256.

The file format is that of the `safetensors` library, which reads these files; its own writer wants
all tensors in host memory at once and leaves the digest to a second pass over the disk.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ghostvis_mega.utils.files import HashingFile

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


def write_tensors(
    path: Path, tensors: Sequence[tuple[str, torch.Tensor]], *, metadata: Mapping[str, str]
) -> tuple[int, str]:
    """Write a new file and wait until it is on the disk.

    Args:
        path: Must not exist.
        tensors: (key, contiguous tensor on any device).
        metadata: Texts for the file's header.

    Returns:
        Size in bytes and hex SHA-256.
    """
    # The widest elements first keep every tensor aligned to its element size.
    ordered = sorted(tensors, key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = HashingFile(path)
    try:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in ordered:
            on_host = tensor.detach().to("cpu").view(-1).view(torch.uint8)
            file.write(memoryview(on_host.numpy()))
        file.close()
    finally:
        file.discard()
    return file.size_bytes, file.sha256
