"""Which waiting sequences run next.

Knows counts, tokens and futures. Does not know text, tensors, HTTP or the engine: it is handed a `ForwardRunner`.
"""
