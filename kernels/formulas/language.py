"""What a formula is written in: `jit` and `tl`, Triton's own where it is installed.

A formula takes and returns scalars and uses of `tl` only ``where, maximum, minimum, abs, log, sqrt, static_range`` and
``constexpr``. Triton compiles it for GPUs; Numba compiles the same body for CPUs, with `tl` bound to twins of these,
and needs no Triton: then a formula stays the Python function that it is.
"""

try:
    import triton.language as tl
    from triton import jit
except ImportError:
    from types import SimpleNamespace

    def _as_it_is(x):
        return x

    jit, tl = _as_it_is, SimpleNamespace(constexpr=_as_it_is)

__all__ = ["jit", "tl"]
