"""OpenMP's threads as the server sets them; to be imported before torch, which reads it once."""

import os

# Beside another busy process threads that spin while they wait take many times longer; see vecmill.app.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
