"""The only place that knows FastAPI: requests in, dialects, answers out.

Knows wire formats, statuses and headers. Does not know torch, batches or how anything is computed.
"""
