"""Vision networks: what they are, and where their weights come from."""
