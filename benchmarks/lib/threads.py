"""OpenMP's threads and malloc as the server sets them; to be imported before torch, which reads some of it once."""

import os

from vecmill.hardware.memory import keep_freed_memory

# Beside another busy process threads that spin while they wait take many times longer; see vecmill.app.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
keep_freed_memory()
