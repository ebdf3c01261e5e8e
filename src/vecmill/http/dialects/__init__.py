"""Wire dialects, a file each. A dialect turns a body into a request and a result into a body; nothing more.

To add one: write its file, with a `DIALECT` that declares its routes, its error shape and the paths where it holds;
add it to the list in `registry`; test it; name its clients in docs/clients.md.
"""
