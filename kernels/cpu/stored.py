"""Machine code on disk: compiled once a machine, loaded without Numba.

A file's name tells all that its code was made of, so a stale one is never loaded: the sources of this room and of the
formulas, the bodies that a user's loss brought, the versions, the processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

__all__ = ["entry"]

ROOM = Path(__file__).resolve().parent


def entry(n_integers: int, name: str, key: str, make: Callable[[], Any]) -> Any:
    """Return a C function of so many integers as ctypes calls it, without Python's lock.

    Args:
        n_integers: how many it takes.
        name: what the file on disk begins with.
        key: tells apart what ``make`` would make, beside the sources of this room.
        make: returns LLVM's module of the function ``entry``; called where the disk does not hold it.
    """
    digest = hashlib.sha256(f"{_origin()} {key}".encode()).hexdigest()
    path = _folder() / f"{name}-{digest[:24]}.o"
    try:
        code = path.read_bytes()
    except OSError:
        code = None
    if code is None or hashlib.sha256(code[32:]).digest() != code[:32]:  # not there, or cut off
        with _no_collection():
            made = _compiled(make())
        code = hashlib.sha256(made).digest() + made
        _keep(path, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code[32:]))
    engine.finalize_object()
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * n_integers)(engine.get_function_address("entry"))
    function.engine = engine  # which owns the code
    return function


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Let Python look for no cycles: to walk all of torch's objects again and again takes a fifth of a compile."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _compiled(module: Any) -> bytes:
    """Return the machine code of a module, optimised for this processor."""
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = True
    passes = llvm.create_pass_builder(_target(), tuning)
    passes.getModulePassManager().run(module, passes)
    code: bytes = _target().emit_object(module)
    return code


@functools.cache
def _target() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )


@functools.cache
def _origin() -> str:
    """Describe what all code is made of."""
    sources = hashlib.sha256()
    for path in sorted([*ROOM.glob("*.py"), *(ROOM.parent / "formulas").glob("*.py")]):
        sources.update(path.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite", "numpy")]
    machine = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    return " ".join([sources.hexdigest(), platform.python_version(), *versions, *machine])


@functools.cache
def _folder() -> Path:
    """Return the first folder that can be written: beside the sources, the user's, or none that lasts."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    for folder in (ROOM / "__pycache__", Path(cache) / "bonus_ops"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="bonus_ops-"))


def _keep(path: Path, code: bytes) -> None:
    """Write a file at once: another process sees all of it or nothing."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:  # a full disk: compiled again by the next process
        return
