"""Programs that measure the time and memory that hf_ilora needs. Start them from the root of the repository."""
