"""Programs that train many models and compare them. Start them from the root of the repository."""
