"""Files of requests that the server works through by itself: what OpenAI calls files and batches.

Everything is a file in the state folder, so that a broken one harms itself alone and several servers can share them.
Knows lines, places in files and what must be on disk before what. Does not know what a line asks for.
"""
