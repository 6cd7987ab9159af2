"""Bodies of chunks, tensors in host memory as bytes and elements, and where a box lies in the bytes of its tensor."""

import ctypes
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
import xxhash

from weightcast.sync.chunks import Chunk
from weightcast.sync.delta_codec import as_elements
from weightcast.sync.delta_format import ByteArray, ElementArray
from weightcast.sync.errors import WireError

ChunkBytes: TypeAlias = ByteArray | torch.Tensor
"""A chunk's body: in host memory or, read from a device of this process, on it."""


def check_size(chunk: Chunk, body: ChunkBytes | None) -> ChunkBytes:
    """The body of a whole chunk; `WireError` when it is another size."""
    num_bytes = 0 if body is None else len(body)
    if body is None or num_bytes != chunk.num_bytes:
        raise WireError(f"has {num_bytes} bytes, {chunk.num_bytes} were announced; it is not used")
    return body


def check_hash(body: ByteArray, expected: bytes) -> None:
    """`WireError` unless `expected` is the xxh3-128 of `body`."""
    if xxhash.xxh3_128_digest(body.data) != expected:
        raise WireError("does not have the hash that came with it: its bytes were altered; not used")


@lru_cache(maxsize=1 << 14)
def find_run(shape: tuple[int, ...], offset: tuple[int, ...], whole: tuple[int, ...], itemsize: int) -> int | None:
    """Where a box begins in the bytes of its tensor, when it is one run of them; None when it is not."""
    cut = next((dim for dim, size in enumerate(shape) if size != 1), len(shape))
    if shape[cut + 1 :] != whole[cut + 1 :]:
        return None
    start = 0
    for size, first in zip(whole, offset, strict=True):
        start = start * size + first
    return start * itemsize


def find_bytes(tensor: torch.Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> int | None:
    """Where a box begins in the bytes of this tensor, when it is one run of them; none is of a view in strides."""
    return find_run(shape, offset, tuple(tensor.shape), tensor.element_size()) if tensor.is_contiguous() else None


def bytes_of(tensor: torch.Tensor) -> ByteArray:
    """A contiguous CPU tensor's bytes."""
    raw: ByteArray = tensor.reshape(-1).view(torch.uint8).numpy()
    return raw


def elements_of(tensor: torch.Tensor) -> ElementArray:
    """A contiguous CPU tensor's bits."""
    return as_elements(bytes_of(tensor), tensor.element_size())


def writable(raw: ByteArray) -> ByteArray:
    """The same bytes under an array that torch takes without a warning; nobody writes to it."""
    if raw.flags.writeable:
        return raw
    alias: ByteArray = np.ctypeslib.as_array((ctypes.c_uint8 * raw.nbytes).from_address(raw.ctypes.data))
    return alias
