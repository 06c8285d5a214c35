"""A stand-in for a CUDA device: values on the CPU, `torch.cuda` replaced by what checks calls as CUDA would.

Tensors made on "cuda" say that they are elsewhere (on "meta") and hold their values in a tensor of the CPU; kernels are
interpreted. Who mixes the two, waits where nothing may wait, reads another stream's work too early, or times an event
that is not there yet, gets the error that CUDA gives or one for what CUDA answers with a wrong number. Time is a count
of operators. Belongs to tests alone: it patches private names of torch and of Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bonus_ops import call

MS = 0.01  # an operator's time, whatever its size
CYCLES_A_MS = 2e6
PLACE = "meta"  # a device type that needs no driver
# what reads values on the host, and what has a result of unknown size
WAITING = ("_local_scalar_dense", "equal.", "nonzero", "masked_select", "_unique", "unique")
MIXING = ("copy_", "_to_copy", "index.Tensor", "index_put", "_index_put_impl_")  # take tensors of both places
PROPERTIES = {
    "name": "NVIDIA H200", "multi_processor_count": 132, "total_memory": 150_000_000_000, "L2_cache_size": 62_914_560,
}  # fmt: skip


class There(Tensor):
    """A tensor that is elsewhere."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=PLACE,
        )  # fmt: skip
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:
        return f"There({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with Cuda.now.operators:  # left by an operator of ours, or by autograd
            return func(*args, **(kwargs or {}))


def each(function: Callable[[Tensor], Any], x: Any) -> Any:
    """Return ``x`` with every tensor in it replaced."""
    if isinstance(x, Tensor):
        return function(x)
    if type(x) in (list, tuple):
        return type(x)(each(function, y) for y in x)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(each(function, y) for y in x))
    return {key: each(function, y) for key, y in x.items()} if type(x) is dict else x


def held(x: Any) -> Any:
    return each(lambda t: t.held if isinstance(t, There) else t, x)


def tensors_in(*x: Any) -> list[Tensor]:
    found: list[Tensor] = []
    each(found.append, x)
    return found


class Stream:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.submitted, self.seen = cuda, 0, {}
        cuda.streams.append(self)

    def wait_stream(self, stream: Stream) -> None:
        self.seen |= stream.seen | {stream: stream.submitted}


class Event:
    def __init__(self, cuda: Cuda, enable_timing: bool = False) -> None:
        self.cuda, self.enable_timing, self.at = cuda, enable_timing, None

    def record(self) -> None:
        if self.enable_timing:
            self.cuda.forbidden_in_capture("an event is timed")
        self.at = self.cuda.ms

    def elapsed_time(self, end_event: Event) -> float:
        for event in (self, end_event):
            if not event.enable_timing:
                raise ValueError("Both events must be created with argument 'enable_timing=True'.")
            if event.at is None:
                raise ValueError("Both events must be recorded before calculating elapsed time.")
            if event.at > self.cuda.finished:
                raise RuntimeError("CUDA error: device not ready")
        return end_event.at - self.at


class CUDAGraph:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.work = cuda, None

    def replay(self) -> None:
        self.cuda.forbidden_in_capture("a graph is replayed")
        if self.work is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        with _disable_current_modes(), torch.no_grad():
            for again in self.work:
                again()
        self.cuda.launched(len(self.work))


class Cuda:
    """The state of the device."""

    now: Cuda

    def __init__(self) -> None:
        self.ms, self.finished = 0.0, -1.0  # the device's clock; what the host has waited for
        self.streams: list[Stream] = []
        self.stream = Stream(self)
        self.capture: list[Callable[[], None]] | None = None
        self.waits_raise = False
        self.why_no_kernels: str | None = None
        self.memory = {"now": 0, "peak": 0}
        self.operators = Operators(self)

    # --- what `torch.cuda` offers -------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        self.forbidden_in_capture("the host waits")
        for stream in self.streams:
            stream.seen = {other: other.submitted for other in self.streams}
        self.finished = self.ms

    def sleep(self, cycles: int) -> None:
        self.ms += cycles / CYCLES_A_MS

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def graph(self, cuda_graph: CUDAGraph) -> Iterator[None]:
        self.launched(0)  # torch waits for all streams here; who relies on it has forgotten one
        self.synchronize()
        work: list[Callable[[], None]] = []
        with self.on(Stream(self)):
            self.stream.seen = {other: other.submitted for other in self.streams}
            self.capture = work
            try:
                yield
            finally:
                self.capture = None
        cuda_graph.work = work

    def get_device_properties(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(**PROPERTIES)

    def set_sync_debug_mode(self, debug_mode: str) -> None:
        self.waits_raise = {"default": False, "warn": False, "error": True}[debug_mode]

    # --- the rules ----------------------------------------------------------------------------------------------------

    def forbidden_in_capture(self, what: str) -> None:
        if self.capture is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")

    def host_waits(self, what: str) -> None:
        if self.waits_raise:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
        self.forbidden_in_capture(what)
        self.finished = self.ms

    def launched(self, n: int = 1) -> None:
        here = self.stream
        for other in self.streams:
            if other is not here and here.seen.get(other, 0) < other.submitted:
                raise RuntimeError("work on a stream that has not waited for what another one may still write")
        here.submitted += n
        self.ms += n * MS

    def submit(self, work: Callable[[], Any], again: Callable[[Any], None] | None = None) -> Any:
        """Run ``work`` as one launch; in a capture keep how to run it ``again``."""
        out = work()
        if self.capture is None:
            self.launched()
        else:
            self.capture.append(functools.partial(again, out) if again else work)
        return out


class Operators(TorchDispatchMode):
    """Runs operators on what tensors elsewhere hold."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), f"{func.__name__}"
        if func.namespace == "bonus_ops":  # its kernels and its operators one by one
            from torch._library.custom_ops import OPDEFS

            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # below autograd it comes whole: `item` of `_local_scalar_dense`
                return func.decompose(*args, **kwargs)
        tensors = tensors_in(args, kwargs)
        there = [x for x in tensors if isinstance(x, There)]
        place = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if place is not None:
            kwargs["device"] = torch.device("cpu")
        is_there = place == PLACE if place else bool(there)
        if not there and not is_there:
            return func(*args, **kwargs)
        self._check(name, args, tensors, there, is_there)

        def run() -> Any:
            return func(*held(args), **held(kwargs))

        def again(out: Any) -> None:
            for old, new in zip(tensors_in(out), tensors_in(run()), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        out = run() if func.is_view else self.cuda.submit(run, again)
        known = {id(x.held): x for x in there}
        return each(lambda x: known[id(x)] if id(x) in known else There(x) if is_there else x, out)

    def _check(self, name: str, args: Any, tensors: list[Tensor], there: list[There], is_there: bool) -> None:
        here = [x for x in tensors if not isinstance(x, There) and x.dim() > 0]
        if there and here and not name.startswith(MIXING):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {name}")
        crosses = bool(there) != is_there if name.startswith("_to_copy") else False
        if name.startswith("copy_"):
            crosses = isinstance(args[0], There) != isinstance(args[1], There)
        mask = name.startswith("index.Tensor") and any(x is not None and x.dtype == torch.bool for x in args[1])
        if crosses or mask or (there and name.startswith(WAITING)):
            self.cuda.host_waits(name)


class Places(TorchFunctionMode):
    """Makes on "meta" what is to be made on "cuda"."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist and isinstance(args[0], There):
            self.cuda.host_waits("tolist")
            return args[0].held.tolist()
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = PLACE
        return func(*args, **kwargs)


@contextlib.contextmanager
def stand_in() -> Iterator[Cuda]:
    """Let the stand-in be `torch.cuda` while the context lasts, with interpreted kernels unless it says why not."""
    import pytest
    from torch._dynamo import trace_rules
    from triton.runtime.interpreter import GridExecutor

    trace_rules.get_torch_obj_rule_map()  # made once, at first use: it must not know what takes a function's place here
    cuda = Cuda.now = Cuda()
    launch, why_not, autocast = GridExecutor.__call__, call.why_not_triton, torch.is_autocast_enabled
    library = [m for name, m in sys.modules.items() if name.startswith("bonus_ops") and hasattr(m, "why_not_triton")]

    def interpret(self: Any, *args: Any, **kwargs: Any) -> None:
        there = [isinstance(x, There) for x in tensors_in(args, kwargs)]
        if not any(there):
            return launch(self, *args, **kwargs)
        if not all(there):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")

        def run() -> None:
            with _disable_current_modes():
                launch(self, *held(args), **held(kwargs))

        cuda.submit(run)

    def from_host(make: Callable[..., Tensor], data: Any, **options: Any) -> Tensor:
        if str(options.get("device")) not in ("cuda", PLACE):
            return make(data, **options)
        cuda.host_waits(make.__name__)
        del options["device"]
        requires_grad = options.pop("requires_grad", False)
        with _disable_current_modes():
            made = make(data, **options)
        return There(made).requires_grad_(requires_grad)

    assert_close = torch.testing.assert_close

    def assert_held_close(actual: Any, expected: Any, **options: Any) -> None:
        cuda.host_waits("assert_close")  # which of what is on "meta" compares the shapes alone
        with _disable_current_modes():
            assert_close(held(actual), held(expected), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.testing, "assert_close", assert_held_close)
        for name in ("tensor", "as_tensor"):  # no mode sees them everywhere
            patch.setattr(torch, name, functools.partial(from_host, getattr(torch, name)))
        patch.setattr(GridExecutor, "__call__", interpret)
        for module in library:
            patch.setattr(
                module, "why_not_triton", lambda place: cuda.why_no_kernels if place == PLACE else why_not(place)
            )
        patch.setattr(torch, "is_autocast_enabled", lambda place: place != PLACE and autocast(place))
        for name, value in {
            "Event": functools.partial(Event, cuda), "Stream": functools.partial(Stream, cuda),
            "CUDAGraph": functools.partial(CUDAGraph, cuda), "graph": cuda.graph, "stream": cuda.on,
            "current_stream": lambda: cuda.stream, "synchronize": cuda.synchronize, "_sleep": cuda.sleep,
            "get_device_properties": cuda.get_device_properties, "is_available": lambda: True,
            "set_sync_debug_mode": cuda.set_sync_debug_mode, "empty_cache": lambda: None,
            "mem_get_info": lambda: (10**11, 15 * 10**10), "memory_allocated": lambda: cuda.memory["now"],
            "max_memory_allocated": lambda: cuda.memory["peak"], "reset_peak_memory_stats": lambda: None,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        with Places(cuda), cuda.operators:
            yield cuda
