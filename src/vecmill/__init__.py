"""vecmill: one device's embeddings and reranking for every client that asks."""

__version__ = "0.1.0"
