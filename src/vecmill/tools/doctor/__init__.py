"""`vecmill doctor`: what is wrong with this machine and these settings, and what to do about it.

Knows the settings, the hardware's readings, the hub's cache and what the probes found. Imports no torch: probes run in
a process of their own, so that a torch that crashes, hangs or cannot be imported is a finding.
"""
