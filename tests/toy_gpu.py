"""The GPU of `python -m bench gpu` with its own methods, on few numbers: for the stand-in."""

from bench import measure
from bench.gpu import devices
from bonus_ops import call
from tests import cuda_stand_in


class Toy(devices.Gpu):
    """The GPU's own methods, on few numbers."""

    def kernels(self):
        return None if call.why_not_triton(cuda_stand_in.PLACE) else "triton"

    def shape(self, n_rows, n_classes):
        return min(n_rows, 4), min(n_classes, 40)

    def copies(self, size):
        assert super().copies(size) >= 1
        return 2

    def host_us(self, step, n=1):
        return super().host_us(step, n)

    def replay_us(self, step, n=10):
        return super().replay_us(step, n)

    def copy_gb_per_s(self):
        return measure.copy_gb_per_s(1 << 12)

    def gemm_tflop_per_s(self, n=16):
        return super().gemm_tflop_per_s(n)
