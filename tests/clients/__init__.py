"""Client packages as they are published, asking a real server: each set of them in an environment of its own."""
