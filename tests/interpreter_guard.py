"""Watch interpreted kernels: bounds, races between programs, and how often each element is read and written.

Patches private names of Triton's interpreter, so it belongs to tests alone.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, InterpreterOptions, interpreter_builder


class Launch:
    """What one launch did; tensors go by argument name, those in a tuple as ``name[i]``."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self._tensors: dict[str, Tensor] = {}
        self._valid: dict[str, np.ndarray] = {}  # address of every element, ascending
        self._read: dict[str, list[np.ndarray]] = defaultdict(list)
        self._written: dict[str, list[tuple[np.ndarray, int]]] = defaultdict(list)

    def times_read(self, name: str) -> np.ndarray:
        """Return how often each element was read, in the shape of the tensor."""
        return self._times(name, self._read[name])

    def times_written(self, name: str) -> np.ndarray:
        return self._times(name, [addresses for addresses, _ in self._written[name]])

    def bytes_read(self) -> dict[str, int]:
        """Return the bytes read of every tensor that was read."""
        return {name: sum(a.size for a in read) * self._size(name) for name, read in self._read.items() if read}

    def bytes_written(self) -> dict[str, int]:
        return {name: sum(a.size for a, _ in w) * self._size(name) for name, w in self._written.items() if w}

    def add_arguments(self, named: dict[str, object]) -> None:
        for name, x in named.items():
            if isinstance(x, tuple):
                self.add_arguments({f"{name}[{i}]": item for i, item in enumerate(x)})
            elif isinstance(x, Tensor) and x.numel():
                self._tensors[name] = x
                self._valid[name] = np.unique(_addresses(x))

    def record(self, pointers, mask, program: tuple[int, int, int] | None) -> None:
        """Note a load (``program`` None) or a store; every address must be an element of one argument."""
        taken = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)  # a mask may be 0 and 1
        addresses = pointers.data[taken].astype(np.int64)
        if not addresses.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        for name, valid in self._valid.items():
            within = np.arange(0, size, self._size(name))  # a word may hold several elements
            elements = (addresses[:, None] + within).ravel()
            at = np.searchsorted(valid, elements).clip(max=len(valid) - 1)
            if size % self._size(name) == 0 and (valid[at] == elements).all():
                if program is None:
                    self._read[name].append(elements)
                else:
                    self._written[name].append((elements, hash(program)))
                return
        what = "load" if program is None else "store"
        raise AssertionError(f"{self.kernel}: {what} out of bounds by program {interpreter_builder.grid_idx}")

    def check_races(self) -> None:
        """No two programs write one place, none reads what the launch writes: programs run in any order."""
        for name, writes in self._written.items():
            places = np.concatenate([a for a, _ in writes])
            owners = np.concatenate([np.full(a.size, program) for a, program in writes])
            pairs = np.unique(np.stack([places, owners]), axis=1)
            if len(np.unique(pairs[0])) != pairs.shape[1]:
                raise AssertionError(f"{self.kernel}: two programs write one place of {name}")
            read = [a for other in self._read.values() for a in other]
            if read and np.isin(np.concatenate(read), places).any():
                raise AssertionError(f"{self.kernel}: {name} is written and read in one launch")

    def _size(self, name: str) -> int:
        return self._tensors[name].element_size()

    def _times(self, name: str, accesses: list[np.ndarray]) -> np.ndarray:
        tensor, valid = self._tensors[name], self._valid[name]
        flat = np.concatenate(accesses) if accesses else np.empty(0, np.int64)
        count = np.bincount(np.searchsorted(valid, flat), minlength=len(valid))
        return count[np.searchsorted(valid, _addresses(tensor))].reshape(tensor.shape)


def _addresses(tensor: Tensor) -> np.ndarray:
    at = np.full(tensor.shape, tensor.data_ptr(), np.int64)
    for dim, (n, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        shape = [1] * tensor.dim()
        shape[dim] = n
        at += (np.arange(n) * stride * tensor.element_size()).reshape(shape)
    return at.ravel()


@contextlib.contextmanager
def guard() -> Iterator[list[Launch]]:
    """Record every launch inside; raise on an access out of bounds, a race, or an integer overflow."""
    launches: list[Launch] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    call, to_host, options = GridExecutor.__call__, GridExecutor._init_args_hst, interpreter_builder.options

    def watched_call(self, *args, **kwargs):
        launches.append(Launch(self.fn.__name__))
        call(self, *args, **kwargs)
        launches[-1].check_races()

    def watched_to_host(self, args, kwargs):
        args, kwargs = to_host(self, args, kwargs)
        launches[-1].add_arguments({**dict(zip(self.arg_names, args, strict=False)), **kwargs})
        return args, kwargs

    def watched_load(self, pointers, mask, other, *rest):
        launches[-1].record(pointers, mask, None)
        return load(self, pointers, mask, other, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        launches[-1].record(pointers, mask, self.grid_idx)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = watched_load, watched_store
    GridExecutor.__call__, GridExecutor._init_args_hst = watched_call, watched_to_host
    interpreter_builder.options = InterpreterOptions(debug=True)
    try:
        yield launches
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        GridExecutor.__call__, GridExecutor._init_args_hst = call, to_host
        interpreter_builder.options = options
