"""A caller's tree as sliced tensors and plain values, and a file's tree back into it.

A tree is any nesting of dicts, lists and tuples whose leaves are tensors, plain values, and objects with `state_dict`
and `load_state_dict` (modules, optimizers, schedulers, GradScaler and the like).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from unbroken.checkpoint.exceptions import MismatchError, UnsupportedValueError
from unbroken.checkpoint.format.pickle_reader import MAX_DEPTH
from unbroken.checkpoint.format.schema import dotted_path
from unbroken.checkpoint.format.stored_tensor import StoredTensor
from unbroken.distributed.sliced_tensor import SlicedTensor
from unbroken.errors import describe_error
from unbroken.text import printable

Path = tuple[str | int, ...]
_SCALARS = (bool, int, float, str, bytes)


def is_stateful(value: object) -> bool:
    """Return whether a value has `state_dict` and `load_state_dict`, and is no class."""
    methods = (getattr(value, name, None) for name in ("state_dict", "load_state_dict"))
    return not isinstance(value, type) and all(map(callable, methods))


class TreeToSave:
    """A caller's tree as it is saved: `values` has a SlicedTensor for each tensor.

    Two tensors that are the same memory become one. `device` is the GPU that holds some of them, or the CPU. A subclass
    of dict, list, tuple or a plain type becomes that type. Raises UnsupportedValueError, which names the value.
    """

    def __init__(self, tree: object) -> None:
        self.device = torch.device("cpu")
        # The tensors themselves are kept: the address of one that is gone could be that of the next.
        self._known: dict[object, tuple[torch.Tensor, SlicedTensor]] = {}
        self.values = self._convert(tree, ())

    def _convert(self, value: object, path: Path) -> Any:
        if len(path) > MAX_DEPTH - 2:
            raise UnsupportedValueError(
                f"`{dotted_path(path[:4])}...`: nested too deeply; at most {MAX_DEPTH - 2} deep"
            )
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if is_stateful(value):
            return self._convert(value.state_dict(), path)  # type: ignore[attr-defined]
        if isinstance(value, dict):
            return {self._key(key, path): self._convert(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self._convert(item, (*path, index)) for index, item in enumerate(value)]
            return tuple(items) if isinstance(value, tuple) else items
        return self._plain(value, path)

    def _key(self, key: object, path: Path) -> str | int:
        if type(key) not in (str, int):
            raise UnsupportedValueError(
                f"`{dotted_path(path)}`: a key is a {_type_name(key)}; only texts and whole numbers can be keys"
            )
        return key  # type: ignore[return-value]

    def _plain(self, value: object, path: Path) -> Any:
        if value is None or type(value) in _SCALARS:
            return value
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
            value = value.item()  # a number of numpy's
        for kind in _SCALARS:
            if isinstance(value, kind):
                return kind(value)  # type: ignore[arg-type]
        action = "convert it to a tensor or a plain value, or leave it out"
        if type(value).__name__ == "ndarray":
            action = "convert it with torch.from_numpy"
        raise UnsupportedValueError(f"`{dotted_path(path)}`: it is a {_type_name(value)}; {action}")

    def _tensor(self, tensor: torch.Tensor, path: Path) -> SlicedTensor:
        require_ordinary(tensor, path, UnsupportedValueError)
        tensor = tensor.detach()
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and identity in self._known:
            return self._known[identity][1]
        copied = tensor.resolve_conj().resolve_neg().contiguous()
        if copied.device.type not in ("cpu", "cuda"):
            copied = copied.cpu()
        if copied.is_cuda and self.device not in (copied.device, torch.device("cpu")):
            raise UnsupportedValueError(
                f"`{dotted_path(path)}`: it is on {copied.device}, others are on {self.device}; use one writer and one"
                " folder for each GPU"
            )
        self.device = copied.device if copied.is_cuda else self.device
        sliced = SlicedTensor.whole(copied)
        self._known[identity if tensor.numel() else object()] = tensor, sliced
        return sliced


def require_ordinary(tensor: torch.Tensor, path: Path, error: type[Exception]) -> None:
    """Raise `error` unless the tensor is whole, dense and has memory."""
    name = dotted_path(path)
    if hasattr(tensor, "to_local") or hasattr(tensor, "local_shards"):
        raise error(
            f"`{name}`: it is a {_type_name(tensor)}, of which this process holds a shard; save a sharded model with"
            " torch.distributed.checkpoint, or gather it with get_model_state_dict(model,"
            " options=StateDictOptions(full_state_dict=True))"
        )
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise error(f"`{name}`: it is a {_type_name(tensor)}; convert it to a torch.Tensor")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise error(f"`{name}`: it is sparse or quantized; convert it with to_dense() or dequantize()")
    if tensor.device.type == "meta":
        raise error(f"`{name}`: it is on the meta device and has no data; materialize it first")


def _type_name(value: object) -> str:
    kind = type(value)
    return printable(kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}")


class TreeToFill:
    """A match of a caller's tree with a file's tree: the place of each stored tensor in memory.

    `targets` is for `CheckpointFile.restore`: nested dicts from path to SlicedTensor. After it, `finish` completes the
    rest and returns the caller's tree with the file's values.

    Args:
        stored: the file's tree, with a StoredTensor for each tensor.
        place: the path of that tree in the file.
        device: where tensors go that the caller's tree does not have.
    """

    def __init__(self, stored: object, place: Path, device: torch.device | str = "cpu") -> None:
        self.targets: dict[Any, Any] = {}
        self._stored, self._place, self._device = stored, place, device
        self._live: dict[object, tuple[torch.Tensor, SlicedTensor]] = {}
        self._new: dict[StoredTensor, tuple[torch.Tensor, SlicedTensor]] = {}
        self._finishing: list[Callable[[], None]] = []

    def match(self, tree: object) -> Any:
        """Match a live tree; return it with the file's values, complete after `finish`. Raises MismatchError.

        The top level may name only some of the file's entries; below, the names must be the same.
        """
        if type(tree) is dict and _holds_live(tree) and isinstance(self._stored, dict):
            for key in tree:
                self._require(key in self._stored, (key,), f"the file has no such entry; it has {_names(self._stored)}")
            return {key: self._match(value, self._stored[key], (key,)) for key, value in tree.items()}
        return self._match(tree, self._stored, ())

    def build(self) -> Any:
        """Return the file's tree with new tensors, which are filled by `restore`."""
        return self._build(self._stored, ())

    def finish(self) -> None:
        """Complete what is not restored in place. Raises MismatchError if an object refuses its state."""
        for step in self._finishing:
            step()

    def _match(self, live: Any, stored: Any, path: Path) -> Any:
        if isinstance(live, torch.Tensor):
            return self._match_tensor(live, stored, path)
        if is_stateful(live):
            return self._match_stateful(live, stored, path)
        if not _holds_live(live):
            return self._build(stored, path)
        if isinstance(live, dict):
            self._require(isinstance(stored, dict), path, f"the file has a {_kind(stored)} there, the tree a dict")
            for key in [*live, *stored]:
                self._require(key in stored, (*path, key), "the file has no such entry")
                self._require(key in live, (*path, key), "the file has this entry, the tree has no place for it")
            return {key: self._match(item, stored[key], (*path, key)) for key, item in live.items()}
        fits = isinstance(stored, (list, tuple)) and len(stored) == len(live)
        self._require(fits, path, f"the file has a {_kind(stored)} there, the tree {len(live)} items")
        items = [self._match(item, stored[index], (*path, index)) for index, item in enumerate(live)]
        return tuple(items) if isinstance(live, tuple) else items

    def _match_tensor(self, live: torch.Tensor, stored: Any, path: Path) -> torch.Tensor:
        require_ordinary(live, path, MismatchError)
        self._require(
            isinstance(stored, StoredTensor), path, f"the file has a {_kind(stored)} there, the tree a tensor"
        )
        self._require(
            stored.shape == tuple(live.shape) and stored.dtype == live.dtype,
            path,
            f"the file has {list(stored.shape)} {_dtype(stored)}, the tree {list(live.shape)} {_dtype(live)}",
        )
        memory = live.detach()
        identity = (memory.device, memory.data_ptr(), memory.shape, memory.stride())
        if not memory.numel() or identity not in self._live:
            direct = memory.is_contiguous() and not memory.is_conj() and not memory.is_neg()
            target = (
                memory
                if direct and memory.device.type in ("cpu", "cuda")
                else torch.empty(live.shape, dtype=live.dtype)
            )
            if target is not memory:
                self._finishing.append(lambda: _copy(memory, target))
            if not memory.numel():
                identity = (object(),)  # type: ignore[assignment]
            self._live[identity] = memory, SlicedTensor.whole(target)
        self._put(path, self._live[identity][1])
        return live

    def _match_stateful(self, live: Any, stored: Any, path: Path) -> Any:
        if isinstance(live, torch.nn.Module):
            state = live.state_dict()
            own = {tensor.data_ptr() for tensor in (*live.parameters(), *live.buffers())}
            result = self._match(dict(state), stored, path) if state else {}
            if all(isinstance(item, torch.Tensor) and item.data_ptr() in own for item in state.values()):
                return live
        else:
            result = self._build(stored, path)

        def finish() -> None:
            try:
                live.load_state_dict(result)
            except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise MismatchError(
                    f"`{dotted_path(path)}`: the {_type_name(live)} refuses the file's state: {describe_error(error)}"
                ) from error

        self._finishing.append(finish)
        return live

    def _build(self, stored: Any, path: Path) -> Any:
        if isinstance(stored, StoredTensor):
            if stored not in self._new:
                made = torch.empty(stored.shape, dtype=stored.dtype, device=self._device)
                self._new[stored] = made, SlicedTensor.whole(made)
            tensor, sliced = self._new[stored]
            self._put(path, sliced)
            return tensor
        if isinstance(stored, dict):
            return {key: self._build(item, (*path, key)) for key, item in stored.items()}
        if isinstance(stored, (list, tuple)):
            items = [self._build(item, (*path, index)) for index, item in enumerate(stored)]
            return tuple(items) if isinstance(stored, tuple) else items
        return stored

    def _put(self, path: Path, sliced: SlicedTensor) -> None:
        *parents, last = (*self._place, *path)
        inner = self.targets
        for part in parents:
            inner = inner.setdefault(part, {})
        inner[last] = sliced

    def _require(self, condition: bool, path: Path, fact: str) -> None:
        if not condition:
            raise MismatchError(f"`{dotted_path(path)}`: {fact}; load it into the tree that it was saved from")


def _copy(memory: torch.Tensor, source: torch.Tensor) -> None:
    memory.copy_(source)


def _holds_live(value: object) -> bool:
    """Return whether a tensor or an object with a state is somewhere in the value."""
    if isinstance(value, torch.Tensor) or is_stateful(value):
        return True
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(map(_holds_live, items))


def _kind(stored: object) -> str:
    if isinstance(stored, StoredTensor):
        return "tensor"
    if isinstance(stored, (list, tuple)):
        return f"{type(stored).__name__} of {len(stored)} items"
    return type(stored).__name__


def _names(stored: dict[Any, Any]) -> str:
    return printable(", ".join(map(str, list(stored)[:8])), 200)


def _dtype(tensor: StoredTensor | torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
