"""The kernels of the simulated GPU: an operation of torch on CUDA tensors is queued on its stream.

It is computed there by torch's CPU kernel on the same memory.

`install()` replaces every kernel that torch has registered for CUDA, but for those that only look at sizes or memory.
The shapes of results come from the meta kernels, so that the host does not wait, and nothing keeps a tensor alive for
a queued operation: as on a GPU, memory that is reused on another stream too early is overwritten.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
_runtime = ctypes.CDLL(None)  # the preloaded cudart

# These look only at sizes and memory, or copy between host and device with cudaMemcpyAsync: torch's own code runs.
ON_HOST = {
    *("as_strided", "_reshape_alias", "view", "view_as_real", "view_as_complex", "unfold", "_nested_view_from_buffer"),
    *("empty.memory_format", "empty_strided", "resize_", "is_set_to", "record_stream", "_local_scalar_dense"),
    *("set_", "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor", "_fused_sdp_choice"),
}
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

used: Counter[str] = Counter()
_queued: dict[int, Callable[[], None]] = {}
_number = itertools.count(1)
_library = torch.library.Library("aten", "IMPL")


# ---- the queue


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _run(number: int) -> None:
    try:
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            _queued.pop(number)()
    except BaseException:
        traceback.print_exc()
        os._exit(86)  # a fault of this simulation


def _submit(device: torch.device, work: Callable[[], None]) -> None:
    number = next(_number)
    _queued[number] = work
    stream = torch.cuda.current_stream(device).cuda_stream
    error = _runtime.cudaLaunchHostFunc(ctypes.c_void_p(stream), _run, ctypes.c_void_p(number))
    error = error or _runtime.cudaGetLastError()  # as a kernel's launch, it reports an error that nobody has taken
    if error:
        raise RuntimeError(f"CUDA error: {error}")


class OnDevice:
    """Where a CUDA tensor's numbers are. It does not keep them alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.address, self.bytes = storage.data_ptr(), storage.nbytes()
        self.place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        self.dtype = tensor.dtype

    def on_host(self) -> torch.Tensor:
        """Return a CPU tensor on the same memory."""
        empty = torch.empty(0, dtype=self.dtype)
        if self.bytes == 0:
            return empty.new_empty(self.place[1])
        memory = torch.frombuffer((ctypes.c_char * self.bytes).from_address(self.address), dtype=torch.uint8)
        return empty.set_(memory.untyped_storage(), *self.place)


def _captured(value: Any) -> Any:
    """Return an argument as the queue keeps it: a CUDA tensor's place, a CPU tensor's value now."""
    if isinstance(value, torch.Tensor):
        return OnDevice(value) if value.is_cuda else value.clone()
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, torch.Generator) and value.device.type == "cuda":
        made = torch.Generator().manual_seed(value.initial_seed() * 1_000_003 + value.get_offset())
        value.set_offset(value.get_offset() + 4)
        return made
    return value


def _on_host(value: Any) -> Any:
    return value.on_host() if isinstance(value, OnDevice) else value


def _meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_cuda:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (torch.device, torch.Generator)):
        return torch.device("meta") if isinstance(value, torch.device) else None
    return value


# ---- any operation


def _device(values: Any) -> torch.device:
    for value in tree_flatten(values)[0]:
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return value.device
    return torch.device("cuda", torch.cuda.current_device())


def _queue(op: Any, args: Any, kwargs: Any) -> Any:
    used[str(op)] += 1
    device = _device((args, kwargs))
    with torch.cuda.device(device):
        mask = op.overloadpacket in (aten.index, aten._index_put_impl_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if mask or (READS & {*op.tags} and op.overloadpacket is not aten.index):
            return _now(op, args, kwargs, device)
        if op._schema.is_mutable:
            return _in_place(op, args, kwargs, device)
        try:
            made = _results(op, args, kwargs)
        except NotImplementedError:
            return _now(op, args, kwargs, device, reads=False)
        _compute(op, args, kwargs, device, made)
        return made


def _empty(meta: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(meta.size(), meta.stride(), dtype=meta.dtype, device=device)


def _compute(op: Any, args: Any, kwargs: Any, device: torch.device, into: Any = None) -> None:
    args, kwargs, into = (tree_map(_captured, values) for values in (args, kwargs, into))

    def work() -> None:
        result = op(*tree_map(_on_host, args), **tree_map(_on_host, kwargs))
        for target, value in zip(tree_flatten(into)[0], tree_flatten(result)[0], strict=into is not None):
            if isinstance(target, OnDevice):
                target.on_host().copy_(value)

    _submit(device, work)


def _in_place(op: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
    arguments = op._schema.arguments
    written = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    if any(argument.is_out for argument in arguments):
        metas = op(*tree_map(_meta, args), **tree_map(_meta, kwargs))
        for name, meta in zip(written, metas if isinstance(metas, (tuple, list)) else [metas], strict=True):
            if kwargs[name].size() != meta.size():
                kwargs[name].resize_(meta.size())
    _compute(op, args, kwargs, device)
    given = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
    returned = [given[name] for name in written][: len(op._schema.returns)]
    return None if not returned else returned[0] if len(returned) == 1 else tuple(returned)


def _now(op: Any, args: Any, kwargs: Any, device: torch.device, *, reads: bool = True) -> Any:
    """Wait for the stream, as an operation does whose result has a shape or value that the host must know."""
    if reads and torch.cuda.get_sync_debug_mode():
        raise RuntimeError(f"called a synchronizing CUDA operation: {op}")
    torch.cuda.current_stream(device).synchronize()
    captured = [tree_map(_on_host, tree_map(_captured, values)) for values in (args, kwargs)]
    result = op(*captured[0], **captured[1])
    return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, result)


# ---- operations of which the CPU has another form


def _copy(keys: Any, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    plain = target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()
    if target.is_cuda and source.is_cuda and not plain:
        return _queue(aten.copy_.default, (target, source), {})
    # The CPU's entry is torch's one function for all devices; it ends in cudaMemcpyAsync.
    return aten.copy_.default.redispatch(
        torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), target, source, non_blocking
    )


def _results(op: Any, args: Any, kwargs: Any) -> Any:
    """Return the results of an operation with their sizes, strides and dtypes, and no numbers yet."""
    metas = op(*tree_map(_meta, args), **tree_map(_meta, kwargs))
    return tree_map(lambda meta: _empty(meta, _device(args)) if isinstance(meta, torch.Tensor) else meta, metas)


def _rows(sums: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Return the log of the sums, (batch, heads, length); one kernel pads the length, one has a fourth axis."""
    return (sums.squeeze(3) if sums.ndim == 4 else sums)[..., : query.size(2)]


def _attention(op: Any, causal: int, bias: int = 0) -> Callable[..., Any]:
    """Return the kernel of an attention whose arguments `causal` and `bias` have these numbers; dropout is 0 here."""
    cpu = aten._scaled_dot_product_flash_attention_for_cpu.default

    def kernel(*args: Any, **kwargs: Any) -> Any:
        used[str(op)] += 1
        query, key, value = args[:3]
        made = _results(op, args, kwargs)
        more = {"scale": kwargs.get("scale"), "attn_mask": args[bias] if bias else None}
        is_causal = args[causal] if len(args) > causal else False
        sums = _rows(made[1], query) if made[1].numel() else None  # without a backward pass there may be none
        _compute(cpu, (query, key, value, 0.0, is_causal), more, query.device, (made[0], sums))
        return made

    return kernel


def _attention_backward(op: Any, out: int, causal: int, bias: int = 0) -> Callable[..., Any]:
    """Return the kernel of the backward pass; the log of the sums follows argument `out`."""
    cpu = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def kernel(*args: Any, **kwargs: Any) -> Any:
        used[str(op)] += 1
        made = _results(op, args, kwargs)
        more = {"scale": kwargs.get("scale"), "attn_mask": args[bias] if bias else None}
        sums = _rows(args[out + 1], args[1])
        _compute(cpu, (*args[:4], args[out], sums, 0.0, args[causal]), more, args[0].device, made[:3])
        return made

    return kernel


def _rms_norm_backward(grad, x, shape, rstd, weight, mask):  # type: ignore[no-untyped-def]
    used["_fused_rms_norm_backward"] += 1
    made = torch.empty_like(x), None if weight is None else torch.empty_like(weight)

    def on_cpu(grad, x, rstd, weight):  # type: ignore[no-untyped-def]
        normal, scaled = x.float() * rstd, grad.float() if weight is None else grad.float() * weight.float()
        axes = [*range(x.ndim - len(shape), x.ndim)]
        dx = rstd * (scaled - normal * (scaled * normal).mean(axes, keepdim=True))
        return dx, None if weight is None else (grad.float() * normal).sum([*range(x.ndim - len(shape))])

    _compute(on_cpu, (grad, x, rstd, weight), {}, x.device, made)
    return made


SPECIAL = {
    "_fused_rms_norm_backward": _rms_norm_backward,
    **{
        f"_scaled_dot_product_{name}": make(getattr(aten, f"_scaled_dot_product_{name}").default, *places)
        for name, make, *places in (
            ("flash_attention", _attention, 4),
            ("cudnn_attention", _attention, 6, 3),
            ("efficient_attention", _attention, 6, 3),
            ("flash_attention_backward", _attention_backward, 4, 11),
            ("cudnn_attention_backward", _attention_backward, 4, 14, 8),
            ("efficient_attention_backward", _attention_backward, 5, 11, 4),
        )
    },
}


def _sleep(cycles: int) -> None:
    _submit(torch.device("cuda", torch.cuda.current_device()), lambda: time.sleep(cycles / 2e9))


def _kernel(op: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _queue(op, args, kwargs)


def install() -> None:
    """Put these kernels in the place of torch's CUDA kernels, in all threads."""
    warnings.filterwarnings("ignore", "Warning only once for all operators")  # torch 2.11, of what is done here
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        space, name = name.split("::")
        if space != "aten" or name in ON_HOST:
            continue
        packet, _, overload = name.partition(".")
        op = getattr(getattr(aten, packet), overload or "default")
        _library.impl(op, SPECIAL.get(name) or _kernel(op), "CUDA")
    _library.impl(aten.copy_.default, _copy, "CUDA", with_keyset=True)
    torch.cuda._sleep = _sleep  # type: ignore[assignment]
    atexit.register(_end)


def _end() -> None:
    """Finish what is queued while Python still runs."""
    for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        if torch._C._cuda_hasPrimaryContext(device):
            torch.cuda.synchronize(device)
    report = os.environ.get("SIM_GPU_REPORT")
    if report:
        with open(report, "a", encoding="utf-8") as file:
            print(f"rank {os.environ.get('RANK', 0)} operations", *sorted(used), file=file, sep="\n  ")
