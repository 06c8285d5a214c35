"""A CPU that executes PTX: what Triton compiles for an NVIDIA GPU, run and watched where there is none.

It is slow and knows the instructions that these kernels are compiled to; an unknown one raises.
"""
