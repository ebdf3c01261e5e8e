"""What lasts beyond the process: SQLite, Redis and the state folder. The only place that knows any of them.

Knows bytes and rows. Does not know what a vector, a job or a batch means.
"""
