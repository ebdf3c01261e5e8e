"""The tests of vecmill. Set here, because the hub's client reads it once, when it is first imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
