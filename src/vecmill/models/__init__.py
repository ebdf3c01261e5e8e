"""One file per model family: packed token ids in, vectors out.

Knows torch, transformers and the hub's file layout. Does not know threads, queues, prompts applied or HTTP.
What reads no tensors may be imported by rooms that do not know torch: `source`, `hub`, `checkpoint`, `sizes`, `cards`,
`card_examples`, `text_format`, `rerank_prompt`, `chat_template`, `tokenizer_files`.
"""
