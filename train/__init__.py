"""Makes weights: the pocket base, the adapters, their GGUF files and their scores."""
