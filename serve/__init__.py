"""Answers: one dense base with many adapters loaded, of which at most one is on in each request."""
