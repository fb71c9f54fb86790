"""Serves trained recommenders: recommendations for tables of users, exported models and indexes of items."""
