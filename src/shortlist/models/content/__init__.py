"""Text and image representations, relevance."""
