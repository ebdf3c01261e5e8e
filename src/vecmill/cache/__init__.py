"""The embedding cache: what a vector is kept under, how it is written, and what happens where it cannot be.

Knows keys, vectors and time. Does not know where they lie (`storage`), texts or HTTP.
"""
