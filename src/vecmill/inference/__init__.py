"""The facade that every dialect calls: embed() and rerank().

Knows text, tokens, prompts, admission and how a result is finished. Does not know HTTP or torch.
"""
