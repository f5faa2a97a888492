"""Kernels in CUDA C++, compiled by NVRTC at their first use: what Triton has no instruction for.

nvrtc.py compiles, cache.py keeps the machine code, driver.py loads and launches it, kernels/ holds the sources.
"""
