"""The commands beside the server: `vecmill bench`, `embed`, `doctor`, `pull` and `verify`.

`bench` and `embed` speak HTTP to any server and know nothing of this one; the other three look at this machine, its
settings and its models.
"""
