"""The one thread that owns the device: loading, warm-up, packed forward passes.

Knows torch, devices and models. Does not know queues, lanes, text or HTTP; what to run is handed to it.
"""
