"""Keys and values in blocks that texts share."""
