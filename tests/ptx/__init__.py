"""A CPU that executes PTX: what Triton compiles for an NVIDIA GPU, run and watched where there is none.

    program.py     the text of a kernel as a list of instructions
    operations.py  what each arithmetic instruction computes
    memory.py      global and shared memory, and what may go wrong there
    machine.py     the programs of a grid, a place in an array for each thread
    launching.py   every launch inside a context compiled and executed

It is slow and knows the instructions that these kernels are compiled to; an unknown one raises.
"""
