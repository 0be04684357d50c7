"""Triton kernels, one file an operator: functions on tensors that check, allocate and launch; no autograd.

The modules import nothing of this package but each other and, but for cache, device and geometry, triton;
mrvae_kernels.ops.triton imports them when a Triton operator is first used. With TRITON_INTERPRET=1 set before Python
starts they run on CPU tensors, in Triton's interpreter.
"""
