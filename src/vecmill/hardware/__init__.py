"""What the machine has: memory, and GPUs with their clocks and memory.

Knows psutil, NVML and the kernel's files. Does not know torch, models or requests. Not available is None, never zero.
"""
