"""Compiled code for what torch does slowly on a CPU or a GPU; each kernel has a torch way of doing the same beside it.

Owns how the code is built and called. Knows neither models nor stores: a kernel is given tensors.
"""
