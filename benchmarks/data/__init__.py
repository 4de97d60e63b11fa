"""Data and networks: fetched, made, and compared."""
