"""The vocabulary that every room shares: types, errors, protocols.

Knows numpy and the standard library. Does not know HTTP, torch, settings or storage.
"""
