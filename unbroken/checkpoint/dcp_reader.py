"""Read the tensors of a torch.distributed.checkpoint folder. It is untrusted, so every place and size is checked."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from unbroken import files
from unbroken.checkpoint.format.checksum import crc32
from unbroken.checkpoint.format.dcp_metadata import Chunk, ChunkedTensor, Metadata
from unbroken.checkpoint.format.pickle_reader import unpickle
from unbroken.checkpoint.format.stored_tensor import StoredTensor
from unbroken.checkpoint.format.zip_index import list_entries
from unbroken.checkpoint.parallel_read import read_exactly
from unbroken.errors import UserError
from unbroken.text import printable

METADATA = ".metadata"
MAX_METADATA = 256 << 20
MAX_PICKLE = 1 << 16  # bytes of the pickle of one tensor
_DATA = "data/"


class DcpFolder:
    """The tensors of a folder by name. Constructor and methods raise UserError: a line that begins with the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._metadata = Metadata(files.read_whole(folder / METADATA, MAX_METADATA))
        except OSError as error:
            raise self._error(f"its {METADATA} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise self._error(str(error)) from None

    def find(self, *names: str) -> ChunkedTensor | None:
        """Return the first tensor of these names that the folder has."""
        try:
            return next(filter(None, map(self._metadata.tensor, names)), None)
        except ValueError as error:
            raise self._error(str(error)) from None

    def read(self, found: ChunkedTensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a floating-point tensor in fp32. `name` and `shape` are those that the caller needs."""
        if found.shape != shape or not found.dtype.is_floating_point:
            kind = str(found.dtype).removeprefix("torch.")
            raise self._error(
                f"its {name} is {list(found.shape)} {kind}, not {list(shape)} of numbers; another model made it"
            )
        whole, seen = torch.empty(shape), torch.zeros(shape, dtype=torch.bool)
        for chunk in found.chunks:
            index = tuple(slice(lo, lo + size) for lo, size in zip(chunk.offsets, chunk.shape, strict=True))
            try:
                whole[index] = self._chunk(chunk, found.dtype)
            except OSError as error:
                raise self._error(f"{printable(chunk.file)} cannot be read: {error.strerror}") from None
            except ValueError as error:
                raise self._error(f"its {name}: {error}") from None
            seen[index] = True
        if not bool(seen.all()):
            raise self._error(f"the chunks of its {name} overlap")
        return whole

    def _chunk(self, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        """Return one chunk, whose checksums are compared. Raises ValueError or OSError."""
        with open(self.folder / chunk.file, "rb", opener=files.regular) as file:
            if chunk.start + chunk.size > os.fstat(file.fileno()).st_size:
                raise ValueError(f"{printable(chunk.file)} is cut off")

            def read(offset: int, size: int) -> bytes:
                memory = bytearray(size)
                read_exactly(file.fileno(), memoryview(memory), chunk.start + offset)
                return bytes(memory)

            entries = list_entries(read, chunk.size)
            entry = entries.get("data.pkl")
            if entry is None or entry.size > MAX_PICKLE:
                raise ValueError("its bytes are not what torch.save writes for a tensor")
            pickled = read(entry.offset, entry.size)
            sizes = {name.removeprefix(_DATA): each.size for name, each in entries.items() if name.startswith(_DATA)}
            stored = unpickle(pickled, sizes)
            if type(stored) is not StoredTensor or stored.shape != chunk.shape or stored.dtype != dtype:
                raise ValueError("its bytes are not the tensor that .metadata describes")
            content = entries[_DATA + stored.key]
            data = bytearray(read(content.offset, content.size))
            if crc32(pickled) != entry.crc or crc32(data) != content.crc:
                raise ValueError("it is damaged: a checksum is wrong")
        if not stored.numel:
            return torch.empty(stored.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).as_strided(stored.shape, stored.strides, stored.offset)

    def _error(self, text: str) -> UserError:
        return UserError(f"{printable(self.folder, 4096)}: {text}")
