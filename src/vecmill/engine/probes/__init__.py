"""Small experiments with torch and the device, run in a process of their own: a crash or a hang ends that process only.

`python -m vecmill.engine.probes` reads requests and writes results, a JSON object on each line. `results` imports no
torch: whoever asks needs none.
"""
