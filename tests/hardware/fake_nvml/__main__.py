"""`vecmill` beside the fake library: what `environment` names is loaded before anything asks for NVML."""

from __future__ import annotations

import os
from ctypes import CDLL

from vecmill.__main__ import main

if __name__ == "__main__":
    CDLL(os.environ["FAKE_NVML_LIBRARY"])
    main()
