"""GPUs that are not there: tensors of one hold real values in ordinary memory, and keep the rules of a device.

An operation that mixes it with the CPU or with another raises, as torch's own kernels do. What makes the host wait for
the device, and every copy between them, is counted; so are the bytes that live on it. It has as much memory as a test
gives it, and raises what torch raises when that is full. As "mps" it refuses float64 and 8-bit floats; as "cuda" it has
streams, and an operation that reads what another stream has not yet been waited for raises.

torch's C++ knows the device as PrivateUse1, a backend that Python may write; Python code sees "cuda" or "mps". Both
need a process of their own: torch numbers its devices once, at the first gradient.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# What has a result that the host has to look at before it can go on.
_WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_dim",
    "bincount",
    "masked_select",
    "equal",
    "is_nonzero",
}
_MOVES = {"_to_copy", "copy_", "detach", "lift_fresh", "record_stream"}
_INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}  # CUDA copies indices that are on the CPU itself
# Sums of floating point numbers in an order that differs from run to run on CUDA.
_IN_ANY_ORDER = {"cumsum", "index_add", "index_add_", "scatter_add", "scatter_add_", "_index_put_impl_"}


class MixedDevices(RuntimeError):
    """As torch has it, of a type of its own: no code of ours may catch it as another."""


class Race(RuntimeError):
    """An operation reads what a stream computes that its own has not waited for."""


class Stream:
    """torch.cuda.Stream: operations are numbered, and known are those of other streams that were waited for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.done, self.known = 0, dict[int, int]()

    def wait_event(self, event: "Event") -> None:
        self.known[id(event.stream)] = max(event.tick, self.known.get(id(event.stream), 0))

    def wait_stream(self, other: "Stream") -> None:
        self.known[id(other)] = other.done

    def synchronize(self) -> None:
        ON.wait("synchronize")


class Event:
    """torch.cuda.Event."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.stream, self.tick = ON.default, 0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or ON.current()
        self.tick = self.stream.done

    def synchronize(self) -> None:
        ON.wait("synchronize")


@dataclass
class Counts:
    """What a scenario is judged by. waits, in_any_order: by operation. copies: to the device. bytes_back, bytes_there:
    copied. pageable: bytes of tensors of more than one dimension that came from memory that is not pinned. refused:
    allocations for which there was no room. peak: bytes, of the first one. made: tensors, by the number of the
    device."""

    waits: Counter[str] = field(default_factory=Counter)
    in_any_order: Counter[str] = field(default_factory=Counter)
    copies: int = 0
    bytes_back: int = 0
    bytes_there: int = 0
    pageable: int = 0
    refused: int = 0
    peak: int = 0
    made: Counter[int] = field(default_factory=Counter)


class Device:
    """The state of the devices. memory: bytes that each has; live: that are in use, by its number. largest: of the
    largest tensor that it takes, as where its memory is in pieces. refused_copy: the number of a copy to one for which
    there is no room."""

    def __init__(self) -> None:
        self.kind, self.number, self.memory, self.largest, self.refused_copy = "cpu", 1, 0, 0, 0
        self.counts, self.live = Counts(), Counter[int]()
        self.storages: dict[int, list[int]] = {}
        self.pinned = set[int]()
        self.lock, self.local, self.default = threading.RLock(), threading.local(), Stream()

    def current(self) -> Stream:
        return getattr(self.local, "stream", self.default)

    def wait(self, what: str) -> None:
        with self.lock:
            self.counts.waits[what] += 1

    def take(self, storage: torch.UntypedStorage, index: int) -> int:
        key = storage._cdata
        with self.lock:
            if key not in self.storages:
                if storage.nbytes() > min(self.memory - self.live[index], self.largest):
                    self.counts.refused += 1
                    raise self.out_of_memory(storage.nbytes())
                self.storages[key] = [storage.nbytes(), 0, index]
                self.live[index] += storage.nbytes()
                self.counts.peak = max(self.counts.peak, self.live[0])
                self.counts.made[index] += 1
            self.storages[key][1] += 1
        return key

    def give_back(self, key: int) -> None:
        with self.lock:
            self.storages[key][1] -= 1
            if not self.storages[key][1]:
                n_bytes, _, index = self.storages.pop(key)
                self.live[index] -= n_bytes

    def out_of_memory(self, n_bytes: int) -> RuntimeError:
        if self.kind == "mps":
            return RuntimeError(f"MPS backend out of memory (tried to allocate {n_bytes} bytes)")
        return torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {n_bytes} bytes")

    def is_meant(self, device: Any) -> bool:
        return device is not None and torch.device(device).type in (self.kind, _PLACE.type) and self.kind != "cpu"

    def refuse_dtype(self, dtype: torch.dtype) -> None:
        if self.kind == "mps" and (dtype == torch.float64 or "float8" in str(dtype)):
            raise TypeError(
                f"Trying to convert {dtype} to the MPS backend but it does not have support for that dtype."
            )


_PLACE = torch.device("privateuseone", 0)
_NAMED, _ANYWHERE = 8, -1
ON = Device()


class Held(torch.Tensor):
    """A tensor on the device of a number, which C++ is not told; elem: its values, in ordinary memory."""

    elem: torch.Tensor
    index: int
    stream: Stream
    tick: int
    of_inference: bool  # which torch's own tensor says of itself, and a view of an ordinary one must not
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: torch.Tensor, index: int) -> "Held":
        key = ON.take(elem.untyped_storage(), index)
        with torch.inference_mode(False):  # a view of an ordinary tensor is ordinary, and this may be one
            held: Held = torch.Tensor._make_wrapper_subclass(
                cls,
                elem.size(),
                strides=elem.stride(),
                storage_offset=elem.storage_offset(),
                dtype=elem.dtype,
                layout=elem.layout,
                device=_PLACE,
            )
        held.elem, held.index, held.stream = elem, index, ON.current()
        held.tick = held.stream.done
        weakref.finalize(held, ON.give_back, key)
        return held

    @property
    def device(self) -> torch.device:
        return torch.device(ON.kind, max(self.index, 0))

    @property
    def is_cuda(self) -> bool:
        return ON.kind == "cuda"

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        ON.wait("tolist")
        return self.elem.tolist()

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The same tensor where nothing changes, as torch's own: what the device is called differs in C++."""
        named = [a for a in (*args, kwargs.get("device")) if isinstance(a, str | torch.device)]
        dtypes = [a for a in (*args, kwargs.get("dtype")) if isinstance(a, torch.dtype)]
        like_another = any(isinstance(a, torch.Tensor) for a in args)
        if other := [_index(a) for a in named if ON.is_meant(a) and _index(a) not in (self.index, _ANYWHERE)]:
            return self._on(other[0]).to(*args, **kwargs)
        same = all(ON.is_meant(a) for a in named) and all(d == self.dtype for d in dtypes)
        return self if same and not like_another else super().to(*args, **kwargs)

    def _on(self, index: int) -> "Held":
        """A copy on another one, for which either waits."""
        _check_order("copy", [self])
        moved = Held(self.elem.clone(), index)
        moved.of_inference = torch.is_inference_mode_enabled()
        return moved

    def record_stream(self, stream: Stream) -> None:
        pass  # nothing here is freed before Python lets go of it

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"Held({self.elem!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Names(TorchFunctionMode):
    """While active in a thread, the device is called what C++ calls it before anything else looks at it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.tensor and "device" in kwargs:  # which asks nobody before it makes the values there
            there = self._named(kwargs.pop("device"))
            return func(*args, **kwargs).to(there)
        if "device" in kwargs:
            kwargs = kwargs | {"device": self._named(kwargs["device"])}
        return func(*map(self._named, args), **kwargs)

    @staticmethod
    def _named(x: Any) -> Any:
        named = isinstance(x, str | torch.device) and str(x).split(":")[0] == ON.kind != "cpu"
        return torch.device(_PLACE.type, _NAMED + _index(x)) if named else x


class Rules(TorchDispatchMode):
    """While active in a thread, operations on the device make tensors of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _index(device: Any) -> int:
    """Its number; that of the current one is 0. C++ knows one device, of which Python's have higher numbers: what C++
    makes by itself inside an operation goes with any."""
    if device is None or isinstance(device, int):
        return device or 0
    device = torch.device(device)
    index = device.index or 0
    if device.type != _PLACE.type:
        return index
    return index - _NAMED if index >= _NAMED else _ANYWHERE if ON.number > 1 else 0


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.split("::")[1]
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    held = [x for x in given if isinstance(x, Held)]
    if (held or ON.is_meant(kwargs.get("device"))) and _is_compound(func):
        with Rules():  # in inference mode such come whole
            return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
    pin = kwargs.pop("pin_memory", None)
    if not held and not ON.is_meant(kwargs.get("device")):
        made = func(*args, **kwargs)
        if pin and ON.kind == "cuda":
            _remember_pinned(made)
        return made
    _check(func, name, given, held)
    device, there, index = kwargs.get("device"), True, next((x.index for x in held if x.index != _ANYWHERE), _ANYWHERE)
    if device is not None:
        there, index = ON.is_meant(device), index if _index(device) == _ANYWHERE else _index(device)
        if torch.device(device).type == "meta":
            return func(*tree_map(_values, args), **kwargs)
        kwargs = kwargs | {"device": torch.device("cpu")}
    _count(name, given, held, there)
    made = func(*tree_map(_values, args), **tree_map(_values, kwargs))
    ON.current().done += 1

    def as_held(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, Held) or x.device.type == "meta":
            return x
        for tensor in held:
            if tensor.elem is x:
                return tensor
        ON.refuse_dtype(x.dtype)
        made = Held(x, index)
        bases = [tensor for tensor in held if tensor.elem.untyped_storage()._cdata == x.untyped_storage()._cdata]
        made.of_inference = bases[0].of_inference if bases else torch.is_inference_mode_enabled()
        return made

    # What is written in place stays where it is.
    into_host = name == "copy_" and not isinstance(args[0], Held)
    return args[0] if into_host else tree_map(as_held, made) if there else made


@cache
def _is_compound(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def _values(x: Any) -> Any:
    return x.elem if isinstance(x, Held) else x


def _check(func: Any, name: str, given: list[torch.Tensor], held: list[Held]) -> None:
    changed = given[0] if func._schema.is_mutable and given else None
    if isinstance(changed, Held) and changed.of_inference and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"Inplace update to inference tensor outside InferenceMode is not allowed ({name})")
    _check_order(name, held)
    if len({tensor.index for tensor in held} - {_ANYWHERE}) > 1 and name != "copy_":
        devices = ", ".join(sorted({str(tensor.device) for tensor in held}))
        raise MixedDevices(f"Expected all tensors to be on the same device, found {devices} ({name})")
    others = [x for x in given if not isinstance(x, Held) and x.dim() and x.device.type != "meta"]
    if held and others and name not in _MOVES:
        if name in _INDEXES:
            ON.wait("index of the CPU")
            return
        raise MixedDevices(f"Expected all tensors to be on the same device, found {held[0].device} and cpu ({name})")


def _check_order(name: str, held: list[Held]) -> None:
    here = ON.current()
    for tensor in held:
        if tensor.stream is not here and here.known.get(id(tensor.stream), 0) < tensor.tick:
            raise Race(f"{name} reads what another stream has not been waited for")


def _count(name: str, given: list[torch.Tensor], held: list[Held], there: bool) -> None:
    if name in _WAITS:
        ON.wait(name)
    with ON.lock:
        if name in _IN_ANY_ORDER and given[0].is_floating_point():
            ON.counts.in_any_order[name] += 1
    if name in ("_to_copy", "copy_") and given:
        source, from_there = given[-1], isinstance(given[-1], Held)
        to_there = there if name == "_to_copy" else isinstance(given[0], Held)
        n_bytes = source.numel() * source.element_size()
        with ON.lock:
            if from_there and not to_there:
                ON.counts.waits["copy back"] += 1
                ON.counts.bytes_back += n_bytes
            elif to_there and not from_there:
                ON.counts.copies += 1
                if ON.counts.copies == ON.refused_copy:
                    ON.counts.refused += 1
                    raise ON.out_of_memory(n_bytes)
                ON.counts.bytes_there += n_bytes
                if source.dim() > 1 and source.untyped_storage().data_ptr() not in ON.pinned:
                    ON.counts.pageable += n_bytes


def _remember_pinned(tensor: torch.Tensor) -> None:
    place = tensor.untyped_storage().data_ptr()
    ON.pinned.add(place)
    weakref.finalize(tensor, ON.pinned.discard, place)


_submit, _installed = ThreadPoolExecutor.submit, list[bool]()


def _submit_with_rules(self: ThreadPoolExecutor, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
    def run() -> Any:
        with Names(), Rules():
            return fn(*args, **kwargs)

    return _submit(self, run)


@contextmanager
def _on_stream(stream: Stream) -> Iterator[None]:
    before, ON.local.stream = ON.current(), stream
    try:
        yield
    finally:
        ON.local.stream = before


def _start_peak(*_: Any) -> None:
    ON.counts.peak = ON.live[0]


@contextmanager
def pretended(
    kind: str, memory: int = 8 << 30, *, number: int = 1, largest: int | None = None, refused_copy: int = 0
) -> Iterator[Counts]:
    """So many devices of this kind, "cuda" or "mps", with so many bytes of memory each, in a process that has no other;
    largest, refused_copy: as of Device."""
    if not _installed:
        _setup_privateuseone_for_python_backend("pretended")
        _installed.append(True)
    ON.kind, ON.number, ON.memory, ON.counts = kind, number, memory, Counts()
    ON.largest, ON.refused_copy = largest or memory, refused_copy
    replaced = {
        (ThreadPoolExecutor, "submit"): _submit_with_rules,
        (torch.cuda, "is_available"): lambda: kind == "cuda",
        (torch.cuda, "_lazy_init"): lambda: None,  # in hooks of gradients, where names are not changed
        (torch.cuda, "reset_peak_memory_stats"): _start_peak,
        (torch.cuda, "device_count"): lambda: ON.number,
        (torch.cuda, "current_device"): lambda: 0,
        (torch.cuda, "memory_allocated"): lambda device=0: ON.live[_index(device)],
        (torch.cuda, "memory_reserved"): lambda device=0: ON.live[_index(device)],
        (torch.cuda, "max_memory_allocated"): lambda *_: ON.counts.peak,
        (torch.cuda, "mem_get_info"): lambda device=0: (ON.memory - ON.live[_index(device)], ON.memory),
        (torch.cuda, "get_device_name"): lambda *_: "pretended",
        (torch.cuda, "Stream"): Stream,
        (torch.cuda, "Event"): Event,
        (torch.cuda, "stream"): _on_stream,
        (torch.cuda, "current_stream"): lambda *_: ON.current(),
        (torch.backends.mps, "is_available"): lambda: kind == "mps",
        (torch.mps, "recommended_max_memory"): lambda: ON.memory,
        (torch.mps, "driver_allocated_memory"): lambda: ON.live[0],
        (torch.mps, "empty_cache"): lambda: None,
    }
    patches = [mock.patch.object(owner, name, value) for (owner, name), value in replaced.items()]
    for patch in patches:
        patch.start()
    try:
        with Names(), Rules():
            yield ON.counts
    finally:
        for patch in patches:
            patch.stop()
        ON.kind = "cpu"
