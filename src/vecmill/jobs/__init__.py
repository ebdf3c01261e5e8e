"""Indexing jobs that clients register and drive; the server only keeps their turn.

Knows states, order and leases. Does not know embeddings, the scheduler or HTTP.
"""
