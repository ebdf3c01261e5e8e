"""`vecmill bench`: a load generator for any embedding or rerank server, over HTTP alone.

Nothing here knows vecmill's own code, so that every server is measured the same way.
"""
