"""Requests that are meant to hurt."""
