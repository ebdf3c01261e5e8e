"""What the server has done: Prometheus metrics, rolling statistics, the log.

Knows counts and seconds. Does not know texts, vectors, torch or HTTP.
"""
