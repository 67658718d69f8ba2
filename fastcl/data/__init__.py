"""Streams of tasks from data that needs no download."""
