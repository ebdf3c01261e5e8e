"""Stands in for the process of the probes: answers as it did on a card, from the JSON object in RECORDED_PROBES."""

from __future__ import annotations

import json
import os
import sys
import time

RECORDED = json.loads(os.environ["RECORDED_PROBES"])
LOAD_SECONDS = 0.5  # time to look at the clocks

for line in sys.stdin:
    probe = json.loads(line)["probe"]
    if probe == "load":
        time.sleep(LOAD_SECONDS)
    answer = RECORDED[probe]
    sys.stdout.write(json.dumps(answer if "error" in answer else {"result": answer}) + "\n")
    sys.stdout.flush()
