"""Checkpoints, and the models they become: packed token ids in, vectors out.

`families/` has a spec for each family, `checkpoint` reads a folder, `networks` runs it on the device. Knows torch,
transformers and the hub's file layout. Does not know threads, queues or HTTP.

Only `networks`, `packing`, `packed_attention`, `merged_projections`, `latent_attention`, `weights`, `bert`,
`transformers_networks` and `transformers_tokenizers` import torch or transformers; rooms that do not know them may
import all others. The last two, which alone import transformers with what they build on, are imported where a model
needs them.
"""
