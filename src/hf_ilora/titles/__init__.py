"""Title encoders, and item embeddings from titles and co-occurrence counts, without training."""
