"""What a trained recommender is used for: recommendations for tables of users."""
