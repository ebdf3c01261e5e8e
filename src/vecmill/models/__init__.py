"""One file per model family: packed token ids in, vectors out.

Knows torch, transformers and the hub's file layout. Does not know threads, queues, prompts applied or HTTP.
Only `checkpoint` and `source` may be imported by rooms that do not know torch.
"""
