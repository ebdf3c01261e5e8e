"""What the machine is and has: memory, whether a GPU is present, the batch that suits it.

Knows psutil and the kernel's files. Does not know torch, models or requests. Not available is None, never zero.
"""
