"""Writes safetensors files front to back with their SHA-256, without a second pass over the disk.

The file format is that of the `safetensors` library, which reads these files; its own writer wants
all tensors in host memory at once. `write_tensors` holds one at a time; a `FileImage` is a whole
file in host memory, copied there quickly and written later.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ghostvis_mega.utils.files import HashingFile

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_PIECE_BYTES = 32 << 20


class FileImage:
    """What a file of these tensors will hold, byte by byte; the tensors are looked at later.

    Args:
        tensors: (key, contiguous tensor on any device).
        metadata: Texts for the file's header.
    """

    def __init__(self, tensors: Sequence[tuple[str, torch.Tensor]], *, metadata: Mapping[str, str]):
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
        self.head = len(text).to_bytes(8, "little") + text
        self.tensors = [tensor for _, tensor in ordered]
        self.size_bytes = len(self.head) + end

    def copy_to(self, buffer_B: torch.Tensor) -> None:
        """Put the whole file into host memory (uint8, `size_bytes` long); copies from a device may
        still be under way at the end."""
        at = len(self.head)
        buffer_B[:at] = torch.frombuffer(bytearray(self.head), dtype=torch.uint8)
        for tensor in self.tensors:
            num_bytes = tensor.numel() * tensor.element_size()
            place = buffer_B[at : at + num_bytes].view(tensor.dtype)
            place.copy_(tensor.detach().view(-1), non_blocking=True)
            at += num_bytes


def write_buffer(path: Path, buffer_B: torch.Tensor) -> str:
    """Write host memory to a new file and wait until it is on the disk; a second thread hashes.

    Returns:
        Hex SHA-256.
    """
    view = memoryview(buffer_B.numpy())
    file = HashingFile(path)
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
        try:
            for at in range(0, len(view), _PIECE_BYTES):
                file.write_beside(view[at : at + _PIECE_BYTES], pool)
            file.close()
        finally:
            file.discard()
    return file.sha256


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
    image = FileImage(tensors, metadata=metadata)
    file = HashingFile(path)
    try:
        file.write(image.head)
        for tensor in image.tensors:
            on_host = tensor.detach().to("cpu").view(-1).view(torch.uint8)
            file.write(memoryview(on_host.numpy()))
        file.close()
    finally:
        file.discard()
    return file.size_bytes, file.sha256
