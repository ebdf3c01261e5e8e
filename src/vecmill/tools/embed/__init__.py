"""`vecmill embed`: the texts of a file, or of a folder, to a file of vectors, by way of a server's batches API.

Nothing here knows vecmill's own code: everything goes over HTTP.
"""
