"""Device kernels, one operation a file: Triton for GPUs, beside them what the CPU compiles, each with its torch reference.

Boundary: tensors in, tensors out; what a kernel asks of layout and strides it asserts. Which kernel runs when is decided
above (`engine.attention`, `engine.models`).
"""
