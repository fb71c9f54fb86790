"""Item embeddings from data that need no training: co-occurrence counts and encoded titles."""
